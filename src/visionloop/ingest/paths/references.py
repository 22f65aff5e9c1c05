"""Find the file that a table means, below one folder and nowhere else."""

import re
from collections import defaultdict
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path

from visionloop.errors import ImageError
from visionloop.ingest.paths.listing import Found, list_files
from visionloop.ingest.paths.names import is_image_name

MAX_REFERENCE = 4096
OUTSIDE = re.compile(r"^([/~]|[A-Za-z][A-Za-z0-9+.-]*:)")


class ImageFolder:
    """The files below a folder, listed once, found by path, by path without suffix, or by name alone."""

    def __init__(self, root: Path) -> None:
        self._root = root

    @classmethod
    def of_files(cls, files: Iterable[Found]) -> "ImageFolder":
        """Return an index of files that are known already; nothing is read."""
        folder = cls(Path())
        folder.files = {found.relative: found for found in files}
        return folder

    @cached_property
    def files(self) -> dict[str, Found]:
        """All files by their path below the folder, in its order. Raises SourceError."""
        return {found.relative: found for found in list_files(self._root, f"folder {self._root}", stay_inside=True)}

    @cached_property
    def _stems(self) -> dict[str, list[str]]:
        """Paths of images by their path without suffix and by their name without suffix."""
        stems: dict[str, list[str]] = defaultdict(list)
        for relative in self.files:
            if not is_image_name(relative.rsplit("/", 1)[-1]):
                continue
            stem = relative[: relative.rfind(".")]
            for key in {stem, stem.rsplit("/", 1)[-1], relative.rsplit("/", 1)[-1]}:
                stems[key].append(relative)
        return stems

    def find(self, reference: str) -> Path | None:
        """Return the file that a cell of a table means, or None. Raises ImageError (`unsafe_path`, `ambiguous`)."""
        found = self.look_up(reference)
        return Path(found.path) if found else None

    def look_up(self, reference: str) -> Found | None:
        """Return what `find` does, with the file's place and stamp. Raises ImageError."""
        found = self._look_up(reference)
        if found and found.problem:
            raise ImageError(f"reference {found.relative}", found.problem, "a file", reason_code="unsafe_path")
        return found

    def _look_up(self, reference: str) -> Found | None:
        path = clean_reference(reference)
        if path in self.files:
            return self.files[path]
        matches = self._stems.get(path) or []
        if len(matches) > 1:
            nearest = [match for match in matches if match.rsplit(".", 1)[0] == path] or matches
            if len(nearest) > 1:
                found = f"fits {len(nearest)} files: {nearest[0]}, {nearest[1]}"
                raise ImageError(f"reference {path}", found, "one file", reason_code="ambiguous")
            matches = nearest
        return self.files[matches[0]] if matches else None


def clean_reference(reference: str) -> str:
    """Return a path of a table as a path below its folder, `/` between its parts. Raises ImageError (`unsafe_path`)."""
    text = reference.strip().replace("\\", "/")
    parts = [part for part in text.split("/") if part not in ("", ".")]
    unsafe = OUTSIDE.match(text) or ".." in parts or not text.isprintable() or len(text) > MAX_REFERENCE
    if unsafe or not parts:
        shown = text[:80].encode("unicode_escape").decode()
        raise ImageError(f"reference {shown}", "leaves its folder", "a path below it", reason_code="unsafe_path")
    return "/".join(parts)
