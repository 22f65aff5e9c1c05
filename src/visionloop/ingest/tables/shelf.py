"""Where a table and its images lie: a folder. Zips and buckets have shelves of their own, beside their sources."""

from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import BinaryIO, Protocol

from visionloop.ingest.item import PassedOver, make_file_reader
from visionloop.ingest.paths.listing import ImageFolder, ListedFile, list_images


class Shelf(Protocol):
    """Files below one place. A `folder` is "" for the place itself, or the path of a folder in it."""

    def list_folders(self) -> list[str]:
        """Return the names of the folders at the top, sorted."""

    def open_table(self, name: str) -> BinaryIO | Path:
        """Return the table of this name, to be read once."""

    def index(self, folder: str) -> ImageFolder:
        """Return the files below a folder. Raises SourceError."""

    def list_images(self, folder: str) -> tuple[list[ListedFile], PassedOver]:
        """Return the images below a folder, and how many other files there are. Raises SourceError."""

    def make_reader(self, found: ListedFile) -> Callable[[int], bytes]:
        """Return the `read` of an item."""


class FolderShelf:
    """A folder of this machine. What lies in it is listed when it is asked for, once."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._indexes: dict[str, ImageFolder] = {}

    def list_folders(self) -> list[str]:
        return self._folders

    @cached_property
    def _folders(self) -> list[str]:
        return sorted(child.name for child in self._root.iterdir() if child.is_dir() and child.name[0] != ".")

    def open_table(self, name: str) -> BinaryIO | Path:
        return self._root / name

    def index(self, folder: str) -> ImageFolder:
        if folder not in self._indexes:
            self._indexes[folder] = self._cut_index(folder) or ImageFolder(self._root / folder)
        return self._indexes[folder]

    def _cut_index(self, folder: str) -> ImageFolder | None:
        """Return what lies in a folder, out of what is listed already."""
        if "" not in self._indexes or folder not in self._folders or (self._root / folder).is_symlink():
            return None
        inside = (one for path, one in self._indexes[""].files.items() if path.startswith(f"{folder}/"))
        return ImageFolder.of_files(one._replace(relative=one.relative[len(folder) + 1 :]) for one in inside)

    def list_images(self, folder: str) -> tuple[list[ListedFile], PassedOver]:
        return list_images(self._root / folder, f"folder {self._root / folder}")

    def make_reader(self, found: ListedFile) -> Callable[[int], bytes]:
        return make_file_reader(found.path)
