"""List the files below a folder, fast, in the order of their paths. Enters no circle of links."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from visionloop.errors import SourceError

MAX_DEPTH = 64


class Found(NamedTuple):
    """A file: its path below the folder (`/` between its parts), its path on this machine, and its stamp.

    The stamp holds size, mtime and inode. `problem` says why it cannot be read; "" when it can.
    """

    relative: str
    path: str
    stamp: str | None
    problem: str = ""


def list_files(root: Path, where: str, *, stay_inside: bool = False) -> list[Found]:
    """Return the files below a folder in the order of their paths; hidden files and folders are passed over.

    A link is followed unless it leads to a folder above itself, to one that another link led to, or (`stay_inside`)
    out of the root.

    Raises:
        SourceError: there is no such folder, a folder in it may not be read, or lies too deep.
    """
    if not root.is_dir():
        raise SourceError(where, "is a file" if root.exists() else "does not exist", "a folder", "Check the path.")
    try:
        return list(_Walk(root, where, stay_inside).run(str(root), "", (os.path.realpath(root),)))
    except OSError as exc:
        found = f"cannot be read ({exc.strerror}: {exc.filename})"
        raise SourceError(where, found, "folders that may be read", "Check the permissions.") from exc


class _Walk:
    """One walk: its root, and the folders that links have led to. None is entered by a link twice."""

    def __init__(self, root: Path, where: str, stay_inside: bool) -> None:
        self._where = where
        self._inside = os.path.join(os.path.realpath(root), "") if stay_inside else ""
        self._linked: set[str] = set()

    def run(self, folder: str, prefix: str, above: tuple[str, ...]) -> Iterator[Found]:
        """Yield the files below `folder`; `prefix` is its path below the root, `above` the real folders it lies in."""
        if len(above) > MAX_DEPTH:
            raise SourceError(self._where, f"goes deeper than {MAX_DEPTH} folders", "fewer", "Check what lies in it.")
        with os.scandir(folder) as entries:
            listed = sorted((entry.name, entry) for entry in entries)
        for name, entry in listed:
            if name[0] == ".":
                continue
            relative, real = prefix + name, ""
            if entry.is_symlink():
                real = os.path.realpath(entry.path)
                if not real.startswith(self._inside):
                    yield Found(relative, entry.path, None, "is a link that leaves its folder")
                    continue
            try:
                facts = entry.stat() if entry.is_file() else None
            except OSError:  # links in a circle, or a file that has just gone
                yield Found(relative, entry.path, None, "cannot be found")
                continue
            if facts:
                yield Found(relative, entry.path, f"{facts.st_size}-{facts.st_mtime_ns}-{facts.st_ino}")
            elif not entry.is_dir():
                yield Found(relative, entry.path, None, "is a link to nothing" if real else "is no regular file")
            elif not real or not (real in above or real in self._linked):
                self._linked.update([real] if real else [])
                yield from self.run(entry.path, f"{relative}/", (*above, real or os.path.join(above[-1], name)))
