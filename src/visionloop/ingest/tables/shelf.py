"""What a table and its images lie on: a folder of this machine, or an archive. Reading a table needs no more."""

from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import BinaryIO, Protocol

from visionloop.ingest.paths.listing import Found
from visionloop.ingest.paths.references import ImageFolder
from visionloop.ingest.sources.item import make_file_reader


class Shelf(Protocol):
    """Files below one place. A `folder` is "" for the place itself, or the path of a folder in it."""

    def list_folders(self) -> list[str]:
        """Return the names of the folders at the top, sorted."""

    def open_table(self, name: str) -> BinaryIO | Path:
        """Return the table of this name, to be read once."""

    def index(self, folder: str) -> ImageFolder:
        """Return the files below a folder. Raises SourceError."""

    def make_reader(self, found: Found) -> Callable[[int], bytes]:
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
            self._indexes[folder] = ImageFolder(self._root / folder)
        return self._indexes[folder]

    def make_reader(self, found: Found) -> Callable[[int], bytes]:
        return make_file_reader(found.path)
