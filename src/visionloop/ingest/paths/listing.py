"""The files below a folder in the order of their paths, and look-up of a file by a name."""

import os
import re
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from visionloop.errors import ImageError, SourceError
from visionloop.ingest.item import PassedOver
from visionloop.ingest.paths.names import (
    IMAGE_FOLDERS,
    SPLIT_NAMES,
    UNLABELLED_FOLDERS,
    escape_name,
    find_side,
    get_suffix,
    is_image_name,
    is_label,
    is_system_file,
    is_system_folder,
    is_text,
    store_name,
)

__all__ = [
    "IMAGE_FOLDERS",
    "SPLIT_NAMES",
    "UNLABELLED_FOLDERS",
    "VIDEO_SUFFIXES",
    "ImageFolder",
    "ListedFile",
    "choose_images",
    "clean_reference",
    "escape_name",
    "find_side",
    "is_image_name",
    "is_label",
    "is_video_name",
    "list_files",
    "list_images",
]
MAX_DEPTH = 64
VIDEO_SUFFIXES = frozenset(
    (
        *(".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".ts", ".m2ts", ".mts", ".mpg", ".mpeg", ".vob"),
        *(".flv", ".ogv", ".ogg", ".3gp", ".3g2"),
    )
)
MAX_REFERENCE = 4096
OUTSIDE = re.compile(r"^([/~]|[A-Za-z][A-Za-z0-9+.-]*:)")


class ListedFile(NamedTuple):
    """A file: its path below the folder (`/` between its parts), its path on this machine, and its stamp.

    The stamp holds size, mtime and inode. `problem` says why it cannot be read; "" when it can.
    """

    relative: str
    path: str
    stamp: str | None
    problem: str = ""


def list_files(root: Path, where: str, *, stay_inside: bool = False) -> list[ListedFile]:
    """Return the files below a folder in the order of their paths; what is hidden or a system's own is passed over.

    A link to a folder is followed unless that folder is read anyway: it lies in the root, lies around it, or another
    link led to it. With `stay_inside` no link is followed out of the root, and those within are.

    Raises:
        SourceError: there is no such folder, a folder in it may not be read, or lies too deep.
    """
    return _walk(_Walk(root, where, stay_inside))


def list_images(
    root: Path, where: str, *, has_stamps: bool = True, with_videos: bool = False
) -> tuple[list[ListedFile], PassedOver]:
    """Return the images below a folder, and how many other files there are. Raises SourceError as `list_files`."""
    is_wanted = is_image_or_video_name if with_videos else is_image_name
    walk = _Walk(root, where, stay_inside=False, is_wanted=is_wanted, has_stamps=has_stamps)
    return _walk(walk), walk.passed


def is_video_name(name: str) -> bool:
    """Say whether a file's suffix is one of a video."""
    return os.path.splitext(name)[1].lower() in VIDEO_SUFFIXES


def is_image_or_video_name(name: str) -> bool:
    """Say whether a file's suffix is one of an image or of a video."""
    return is_image_name(name) or is_video_name(name)


def list_paths(root: Path, where: str) -> list[str]:
    """Return the paths of all files that `list_files` would. No file is looked at. Raises SourceError."""
    return [found.relative for found in _walk(_Walk(root, where, stay_inside=False, has_stamps=False, counts=False))]


def choose_images(files: Iterable[ListedFile]) -> tuple[list[ListedFile], PassedOver]:
    """Return the images among the files of an archive or a bucket, and how many others there are."""
    images, passed = [], PassedOver()
    for found in files:
        *folders, name = found.relative.split("/")
        depth = next((i for i, folder in enumerate(folders) if is_system_folder(folder)), None)
        prefix = "".join(f"{folder}/" for folder in folders[:depth])
        if depth is not None:
            passed.add_folder(prefix, escape_name(folders[depth]), 1)
        elif is_system_file(name) or not is_image_name(name):
            passed.add_file(prefix, get_suffix(name))
        else:
            images.append(found)
    return images, passed


def _walk(walk: "_Walk") -> list[ListedFile]:
    root, where = walk.root, walk.where
    if not root.is_dir():
        raise SourceError(where, "is a file" if root.exists() else "does not exist", "a folder", "Check the path.")
    try:
        return list(walk.run(str(root), "", (os.path.realpath(root),)))
    except OSError as exc:
        found = f"cannot be read ({exc.strerror}: {exc.filename})"
        raise SourceError(where, found, "folders that may be read", "Check the permissions.") from exc


class _Walk:
    """One walk: its root, and the folders that links have led to. None is entered by a link twice.

    `passed` counts what it passes over. Only files whose names are wanted are looked at more closely: that takes longer
    than to list them. Without stamps none is; `counts` False: nothing is counted.
    """

    def __init__(
        self,
        root: Path,
        where: str,
        stay_inside: bool,
        is_wanted: Callable[[str], bool] = lambda name: True,
        *,
        has_stamps: bool = True,
        counts: bool = True,
    ) -> None:
        self.root, self.where, self.passed = root, where, PassedOver()
        self._is_wanted, self._has_stamps, self._counts = is_wanted, has_stamps, counts
        self._top = os.path.join(os.path.realpath(root), "")
        self._inside = self._top if stay_inside else ""
        self._linked: set[str] = set()

    def run(self, folder: str, prefix: str, above: tuple[str, ...]) -> Iterator[ListedFile]:
        """Yield the files below `folder`; `prefix` is its path below the root, `above` the real folders it lies in."""
        if len(above) > MAX_DEPTH:
            raise SourceError(self.where, f"goes deeper than {MAX_DEPTH} folders", "fewer", "Check what lies in it.")
        for name, entry in self._list(folder, prefix):
            if name[0] == "." or is_system_file(name) or (is_system_folder(name) and entry.is_dir()):
                self._pass(entry, prefix)
                continue
            if not self._is_wanted(name) and _is_file(entry):
                self.passed.add_file(prefix, get_suffix(name))
                continue
            relative, real = prefix + name, ""
            if not self._has_stamps and _is_file(entry):
                yield ListedFile(relative, entry.path, None)
                continue
            if entry.is_symlink():
                real = os.path.realpath(entry.path)
                if not real.startswith(self._inside):
                    yield ListedFile(relative, entry.path, None, "is a link that leaves its folder")
                    continue
            try:
                facts = entry.stat() if entry.is_file() else None
            except OSError:  # links in a circle, or a file that was just removed
                yield from self._name_other(entry, prefix, "cannot be found")
                continue
            if facts:
                yield ListedFile(relative, entry.path, f"{facts.st_size}-{facts.st_mtime_ns}-{facts.st_ino}")
            elif not entry.is_dir():
                yield from self._name_other(entry, prefix, "is a link to nothing" if real else "is no regular file")
            elif not real or self._may_follow(f"{relative}/", real, above):
                yield from self.run(entry.path, f"{relative}/", (*above, real or os.path.join(above[-1], name)))

    def _list(self, folder: str, prefix: str) -> "list[tuple[str, os.DirEntry[str]]]":
        """Return what lies in a folder, by name; nothing if it was removed since its own folder was listed."""
        try:
            with os.scandir(folder) as entries:
                listed = sorted((entry.name, entry) for entry in entries)
        except (FileNotFoundError, NotADirectoryError):
            if not prefix:
                raise
            return []
        self.passed.empty += [] if listed else [prefix]
        return listed

    def _name_other(self, entry: "os.DirEntry[str]", prefix: str, problem: str) -> Iterator[ListedFile]:
        """Yield what is neither a file nor a folder, or count it if its name is not wanted."""
        if self._is_wanted(entry.name):
            yield ListedFile(prefix + entry.name, entry.path, None, problem)
        else:
            self.passed.add_file(prefix, get_suffix(entry.name))

    def _may_follow(self, link: str, real: str, above: tuple[str, ...]) -> bool:
        """Say whether a link to the folder `real` is followed, and keep what is done with it."""
        below = real[len(self._top) :] if real.startswith(self._top) else ""
        if not self._inside and below and not any(map(is_system_folder, below.split("/"))):
            refusal = f"not followed: its files are those of {below}/"
        elif real in above or self._top.startswith(os.path.join(real, "")):
            refusal = "not followed: it leads to a folder around it"
        else:
            refusal = "not followed: another link leads there too" if real in self._linked else ""
        self._linked.add(real)
        self.passed.links[escape_name(link)] = refusal or f"followed to {escape_name(real)}"
        return not refusal

    def _pass(self, entry: "os.DirEntry[str]", prefix: str) -> None:
        """Count what is hidden, or a system's own."""
        if not self._counts:
            return
        if not entry.is_dir(follow_symlinks=False):
            self.passed.add_file(prefix, "hidden")
            return
        num_files = sum(len(files) for _, _, files in os.walk(entry.path))
        self.passed.add_folder(prefix, escape_name(entry.name), num_files)


def _is_file(entry: "os.DirEntry[str]") -> bool:
    try:
        return entry.is_file()
    except OSError:  # links in a circle
        return False


class ImageFolder:
    """The files below a folder, listed once, found by path, by path without suffix, or by name alone."""

    def __init__(self, root: Path) -> None:
        self._root = root

    @classmethod
    def of_files(cls, files: Iterable[ListedFile]) -> "ImageFolder":
        """Return an index of files that are known already; nothing is read."""
        folder = cls(Path())
        folder.files = {found.relative: found for found in files}
        return folder

    @cached_property
    def files(self) -> dict[str, ListedFile]:
        """All files by their path below the folder, in its order. Raises SourceError."""
        return {found.relative: found for found in list_files(self._root, f"folder {self._root}", stay_inside=True)}

    @cached_property
    def _names(self) -> dict[str, list[str]]:
        """Paths of files by what a row may call them, in NFC.

        An image: by its path, its path without suffix, its name, and its name without suffix. Another file: by its path
        where that is not in NFC.
        """
        names: dict[str, list[str]] = defaultdict(list)
        for relative in self.files:
            path = relative if relative.isascii() else unicodedata.normalize("NFC", relative)
            if is_image_name(path.rsplit("/", 1)[-1]):
                stem = path[: path.rfind(".")]
                for key in {path, stem, stem.rsplit("/", 1)[-1], path.rsplit("/", 1)[-1]}:
                    names[key].append(relative)
            elif path is not relative:
                names[path].append(relative)
        return names

    @cached_property
    def _folded(self) -> dict[str, list[str]]:
        """The same, for names that are spelled differently."""
        folded: dict[str, list[str]] = defaultdict(list)
        for name, paths in self._names.items():
            folded[_fold(name)] += paths
        return folded

    def find(self, reference: str) -> Path | None:
        """Return the file that a cell of a table names, or None. Raises ImageError (`unsafe_path`, `ambiguous`)."""
        found = self.look_up(reference)
        return Path(found.path) if found else None

    def look_up(self, reference: str, read_side: Callable[[], str | None] | None = None) -> ListedFile | None:
        """Return what `find` does, with the file's place and stamp. Raises ImageError.

        `read_side` returns the side of the row. Of several files of one name it is the one in a folder of that side;
        where split folders use the same names, a file in a folder of another side is not meant.
        """
        found = self._look_up(reference, read_side)
        if found and found.problem:
            raise ImageError(f"reference {found.relative}", found.problem, "a file", reason_code="unsafe_path")
        return found

    def count_repeated(self, folder: str) -> int:
        """Return how many names of images in a folder (its path with a `/` at the end) are used outside of it too."""
        return sum(
            0 < sum(path.startswith(folder) for path in paths) < len(paths)
            for name, paths in self._names.items()
            if len(paths) > 1 and "/" not in name and is_image_name(name)
        )

    @cached_property
    def _has_same_names(self) -> bool:
        """Whether images in folders of different sides have the same name."""
        several = (paths for paths in self._names.values() if len(paths) > 1)
        return any(len({find_path_side(path) for path in paths} - {None}) > 1 for paths in several)

    @cached_property
    def _odd(self) -> dict[str, str]:
        """Names that are no plain path, with a line feed, a backslash or no text: as they are, and as `predict` and
        messages write them."""
        odd = [name for name in (*self.files, *self._names) if "\\" in name or not name.isprintable()]
        return {escape(name): name for escape in (escape_name, store_name, str) for name in odd}

    def _cut_root(self, reference: str) -> str:
        """Return an absolute path that lies in this folder, as `predict` may write it, as a path below the folder."""
        above = next((root for root in self._roots if reference.startswith(root)), "")
        return reference[len(above) :]

    @cached_property
    def _roots(self) -> tuple[str, ...]:
        if self._root == Path():  # of files that are known already
            return ()
        return tuple(os.path.join(root, "") for root in (os.path.abspath(self._root), os.path.realpath(self._root)))

    def _look_up(self, reference: str, read_side: Callable[[], str | None] | None) -> ListedFile | None:
        path = self._odd.get(reference.removeprefix("./")) or clean_reference(self._cut_root(reference))
        if path in self.files:
            return self.files[path]
        matches = self._names.get(path) or [*dict.fromkeys(self._folded.get(_fold(path), ()))]
        if len(matches) > 1:
            nearest = [match for match in matches if path in (match, match.rsplit(".", 1)[0])] or matches
            if len(nearest) > 1 and (side := read_side() if read_side else None):
                nearest = [match for match in nearest if find_path_side(match) == side] or nearest
            if len(nearest) > 1:
                found = f"fits {len(nearest)} files: {nearest[0]}, {nearest[1]}"
                raise ImageError(f"reference {path}", found, "one file", reason_code="ambiguous")
            matches = nearest
        elif matches and read_side and (there := find_path_side(matches[0])) and self._has_same_names:
            matches = [] if read_side() not in (None, there) else matches
        return self.files[matches[0]] if matches else None


def find_path_side(path: str) -> str | None:
    """Return the side that a folder of a path names, the uppermost one first."""
    return next((side for folder in path.split("/")[:-1] if (side := find_side(folder))), None)


def clean_reference(reference: str) -> str:
    """Return a path of a table as a path below its folder, `/` between its parts. Raises ImageError (`unsafe_path`)."""
    text = reference.strip().replace("\\", "/")
    parts = [part for part in text.split("/") if part not in ("", ".")]
    unsafe = OUTSIDE.match(text) or ".." in parts or not is_text(text) or len(text) > MAX_REFERENCE
    if unsafe or not parts:
        shown = text[:80].encode("unicode_escape").decode()
        raise ImageError(f"reference {shown}", "leaves its folder", "a path below it", reason_code="unsafe_path")
    return unicodedata.normalize("NFC", "/".join(parts))


def is_outside(reference: str) -> bool:
    """Say whether a reference leads out of its folder."""
    return bool(OUTSIDE.match(reference)) or ".." in reference.replace("\\", "/").split("/")


def is_spelled_so(relative: str, reference: str) -> bool:
    """Say whether a reference has the letters of the path it stands for, and not another case or other spaces.

    Bytes of a name that are no UTF-8 may be escaped in it, wherever they stand: `\\udcff.png` is such a name.
    """
    found, text = unicodedata.normalize("NFC", relative), reference.removeprefix("./")
    if any(_ends_so(escape(name), text) for name in (relative, found) for escape in (escape_name, store_name)):
        return True
    return not is_outside(text) and _ends_so(found, clean_reference(text))


def _ends_so(path: str, end: str) -> bool:
    return f"/{path}".endswith(f"/{end}") or f"/{path[: path.rfind('.')]}".endswith(f"/{end}")


def _fold(path: str) -> str:
    """Return what is left of a name when case, kinds of space and the ways to write `.jpg` do not matter."""
    text = " ".join(path.casefold().split())
    return f"{text[: text.rfind('.')]}.jpg" if text.endswith((".jpeg", ".jpe")) else text
