"""A table on a shelf (a folder, a zip, a bucket): its settings, its encoding, and its rows, read as often as wanted."""

import shlex
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import BinaryIO, Protocol

from visionloop.errors import ImageError, SourceError
from visionloop.ingest.item import PassedOver, make_file_reader
from visionloop.ingest.paths.listing import ImageFolder, ListedFile, list_images
from visionloop.ingest.tables.choose import find_table_side
from visionloop.ingest.tables.files import TEXT_KINDS, TableKind, guess_table_kind, read_rows
from visionloop.ingest.tables.rows import BAD_ROW, Reading, Row, RowImage
from visionloop.ingest.tables.text_lines import settle_encoding
from visionloop.params import Columns


class Shelf(Protocol):
    """Files below one place. A `folder` is "" for the place itself, or the path of a folder in it."""

    def list_folders(self) -> list[str]:
        """Return the names of the folders at the top, sorted."""

    def open_table(self, name: str) -> BinaryIO | Path:
        """Return the table of this name, to be read once."""

    def index(self, folder: str) -> ImageFolder:
        """Return the files below a folder. Raises SourceError."""

    def list_images(self, folder: str) -> tuple[list[ListedFile], PassedOver]:
        """Return the images below a folder, without stamps, and how many other files there are. Raises SourceError."""

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
        return list_images(self._root / folder, f"folder {self._root / folder}", has_stamps=False)

    def make_reader(self, found: ListedFile) -> Callable[[int], bytes]:
        return make_file_reader(found.path)


@dataclass(frozen=True)
class LabelTable:
    """A table on a shelf: its name there and its settings. `images`: where the images lie, if params say so.

    `is_all`: the whole shelf is the source, so that all of its files are accounted for, not only those where the images
    are. `encoding`: that of the table, None: UTF-8 or guessed; `fallback`: that of a table that is not UTF-8. `parts`
    are all files of a table in parts, each of one split.
    `several`: an image may have several labels. `command` names the table on the command line.
    `find_url` returns the reader of a URL and its name for people; None: URLs are not allowed.
    """

    source: str
    where: str
    shelf: Shelf
    name: str
    columns: Columns
    tell: Callable[[str], None]
    images: tuple[Shelf, str] | None = None
    unlabelled: tuple[str, ...] | None = None
    encoding: str | None = None
    parts: Sequence[str] = ()
    is_all: bool = True
    find_url: Callable[[str], RowImage] | None = None
    several: bool = False
    command: str = "visionloop ingest TABLE"
    fallback: str | None = None
    told: set[str] = field(default_factory=set)
    encodings: dict[str, str | None] = field(default_factory=dict)

    def rows(self) -> Iterator[Row]:
        """Read the table from its start. Raises SourceError."""
        for name in self.parts or (self.name,):
            yield from self._read_rows(name)

    def placed_rows(self) -> Iterator[tuple[str, Row]]:
        """Read the table from its start, each row with its place. Raises SourceError."""
        for name in self.parts or (self.name,):
            for number, row in enumerate(self._read_rows(name), start=1):
                yield f"{name} row {number}", row

    def _read_rows(self, name: str) -> Iterator[Row]:
        split = {"split": find_table_side(name)} if self.parts else {}
        try:
            data = self.shelf.open_table(name)
            rows = read_rows(data, self.kind_of(name), self.where, self.tell_once, self.settle_encoding(name))
            if split:
                yield from (row if BAD_ROW in row else {**split, **row} for row in rows)
            else:
                yield from rows
        except ImageError as exc:  # a member of an archive that is damaged
            raise SourceError(self.where, exc.found, exc.expected, exc.todo) from exc

    def settle_encoding(self, name: str) -> str | None:
        """Return the encoding of the text after a look at all of it, which is taken once; None for Parquet.

        Raises:
            SourceError: it is not clear which it is.
        """
        if self.encoding or self.kind_of(name) not in TEXT_KINDS:
            return self.encoding
        if name not in self.encodings:
            data = self.shelf.open_table(name)
            try:
                with data.open("rb") if isinstance(data, Path) else data as stream:
                    found = settle_encoding(stream, self.where, self.tell_once, self.command, self.fallback)
            except OSError as exc:
                raise SourceError(self.where, f"cannot be read ({exc.strerror})", "a table", "Check the path.") from exc
            self.encodings[name] = found
        return self.encodings[name]

    def kind_of(self, name: str) -> TableKind:
        kind = guess_table_kind(name)
        if kind is None:
            expected = ".csv, .tsv, .parquet, .json, .jsonl or .ndjson"
            raise SourceError(self.where, "has the suffix of no table", expected, "Rename or convert it.")
        return kind

    def tell_once(self, line: str) -> None:
        """Tell a guess once, although the table is read more than once."""
        if line not in self.told:
            self.told.add(line)
            self.tell(line)


def make_reading(table: LabelTable) -> Reading:
    """Return how the columns of a table are read: after all of its rows, and with the commands that answer."""
    columns = table.columns
    named = {"--image-column": columns.image, "--label-column": columns.label}
    options = [f"{key} {shlex.quote(name)}" for key, name in named.items() if isinstance(name, str)]
    return Reading(table.several, " ".join([table.command, *options]), table.rows)
