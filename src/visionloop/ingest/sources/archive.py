"""A zip of class folders, of flat files, or of a table and its images. Nothing is extracted to disk.

The archive is checked in `ingest/zips.py`; labels and sides come from paths as in a folder.
"""

import copy
import io
import shlex
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import BinaryIO

from visionloop.errors import SourceError
from visionloop.ingest.item import Item, PassedOver, SourceContext
from visionloop.ingest.paths.listing import ImageFolder, ListedFile, choose_images
from visionloop.ingest.paths.names import escape_name, is_image_name, is_passed
from visionloop.ingest.sources.folder import Files, read_by_place
from visionloop.ingest.sources.reading import (
    Place,
    explain_no_image,
    find_split_tables,
    is_read_by_table,
    read_split_tables,
    tell_unread,
)
from visionloop.ingest.tables.choose import ALL_TABLES, choose_tables
from visionloop.ingest.tables.join import read_shelf_table
from visionloop.ingest.tables.label_table import LabelTable, Shelf
from visionloop.ingest.tables.rows import Row
from visionloop.ingest.zips import TODO, ZipReader
from visionloop.params import ArchiveSource, Columns
from visionloop.records import Rejected

ARCHIVE_SUFFIXES = (".zip", ".tar", ".tgz", ".gz", ".bz2", ".xz", ".7z", ".rar", ".zst")
MAX_PARQUET_BYTES = 1 << 30  # Parquet is read from its end, so the file must be in memory as a whole


def read_archive(source: ArchiveSource, context: SourceContext) -> Iterator[Item | Rejected | PassedOver]:
    """Yield the images of a zip in the order of their paths, or of its table's rows.

    Hidden files, other file types and archives inside are passed over; a member that cannot be trusted is `Rejected`.

    Raises:
        SourceError: the file is missing or no zip, the archive is not to be trusted, or no image has a label.
    """
    path = context.resolve(source.path)
    where = f"source {source.name} {path}"
    if not path.is_file():
        found = "is no regular file" if path.exists() else "does not exist"
        raise SourceError(where, found, "a zip archive", "Check the path.")
    command = f"visionloop ingest {shlex.quote(str(path))}"
    reader = ZipReader(path, where, source.encoding, command)
    shelf = ZipShelf(reader, source.encoding)
    if reader.guessed:
        context.tell(f"{where}: {reader.guessed}")
    inner = sum(name.lower().endswith(ARCHIVE_SUFFIXES) for name in shelf.files)
    if inner:
        context.tell(f"{where}: archives inside, which are not opened: {inner:,}")
    images, passed = choose_images(shelf.all_files)
    if not images and shelf.refused:
        codes = Counter(f"{member.problem} ({member.code})" for member in shelf.refused)
        found = "; ".join(f"{number:,}: {problem}" for problem, number in codes.most_common(5))
        raise SourceError(where, f"no image is left of it, entries refused: {found}", "plain entries", TODO)
    if not images:
        raise explain_no_image(where, list(shelf.files), passed)
    paths = [found.relative for found in images]
    if source.table is None and source.pattern is None and (tables := find_split_tables(paths, shelf.list_files_in)):
        columns, encoding = source.columns, source.encoding
        place = Place(source.name, where, shelf.make_inner, shelf.list_files_in, columns, command, encoding)
        yield from read_split_tables(tables, place, context)
        yield passed
    elif source.table is not None or (source.pattern is None and shelf.is_read_by_table(where, context)):
        yield from _read_by_table(source, context, shelf, where)
        yield passed
    else:
        tell_unread(shelf.list_files(), where, context.tell)
        files = Files(source.name, where, images, passed, shelf.make_reader)
        yield from read_by_place(files, context, pattern=source.pattern, unlabelled=source.unlabelled)
    for member in shelf.refused:
        yield Rejected(f"{source.name}:{escape_name(member.name)}", member.code, member.problem)


def _read_by_table(
    source: ArchiveSource, context: SourceContext, shelf: "ZipShelf", where: str
) -> Iterator[Item | Rejected | PassedOver]:
    name, names = source.table, []
    command = f"visionloop ingest {shlex.quote(str(context.resolve(source.path)))}"
    if name is None or name == ALL_TABLES:
        if top := shelf.find_wrapper():
            context.tell(f"{where}: everything lies in {top}")
            shelf.enter(top)
        names = choose_tables(shelf.list_files(), where, context.tell, shelf.read_rows, source.columns)
        name = names[0]
    elif name not in shelf.files:
        raise SourceError(where, f"has no entry {name!r}", "the path of the table inside", "Edit `table`.")
    elif source.images is None and shelf.has_images(top := name[: name.rfind("/") + 1]):
        shelf.enter(top)
        name = name.removeprefix(top)
    images: tuple[Shelf, str] | None = (shelf, source.images.rstrip("/")) if source.images else None
    yield from read_shelf_table(
        LabelTable(
            source=source.name,
            where=f"{where} {name}",
            shelf=shelf,
            name=name,
            columns=source.columns,
            tell=context.tell,
            images=images,
            several=context.several,
            fallback=source.encoding,
            command=f"{command} --table {shlex.quote(source.table)}" if source.table else command,
            parts=names if len(names) > 1 else (),
        )
    )


class ZipShelf:
    """The files of a zip as a shelf; hidden ones are left out. `files` are by their path.

    `refused` are the members that cannot be used: images, and whatever has a name that is an attack.
    """

    def __init__(self, reader: ZipReader, encoding: str | None = None) -> None:
        self._reader, self._encoding = reader, encoding
        self._members = {member.name: member for member in reader.members if not member.problem}
        names = sorted(self._members, key=lambda name: name.split("/"))
        offsets = {name: self._members[name].info.header_offset for name in names}
        self.all_files = [ListedFile(name, name, f"{reader.stamp}-{offsets[name]}") for name in names]
        self.files = {found.relative: found for found in self.all_files if not is_passed(found.relative)}
        bad = {member.name: member for member in reader.members if member.problem}
        self.refused = [one for one in bad.values() if one.code == "unsafe_path" or is_image_name(one.name)]

    def is_read_by_table(self, where: str, context: SourceContext) -> bool:
        """Say whether images are labelled by a table at the top, or in the one folder that holds all."""
        prefix = self.find_wrapper()
        paths = [path[len(prefix) :] for path in self.files]
        images = [path for path in paths if is_image_name(path.rsplit("/", 1)[-1])]
        inner = self.make_inner(prefix)
        place = where.rpartition(" ")[2]
        return is_read_by_table(images, [path for path in paths if "/" not in path], inner.read_rows, where, place)

    def read_rows(self, name: str) -> Iterator[Row]:
        """Read a table of the shelf, to see what it holds. Raises SourceError."""
        look = LabelTable("", f"zip {name}", self, name, Columns(), lambda line: None, command="")
        return replace(look, fallback=self._encoding).rows()

    def list_files_in(self, folder: str) -> list[str]:
        """Return the names of the files in a folder, whose path has a `/` at its end."""
        inside = (path[len(folder) :] for path in self.files if path.startswith(folder))
        return [name for name in inside if "/" not in name]

    def make_inner(self, prefix: str) -> "ZipShelf":
        """Return a shelf of what lies in one folder."""
        inner = copy.copy(self)
        inner.enter(prefix)
        return inner

    def enter(self, prefix: str) -> None:
        """Take a folder (its path with a `/` at the end) as the top; what lies beside it is left out."""
        inside = {path[len(prefix) :]: one for path, one in self.files.items() if path.startswith(prefix)}
        self.files = {path: one._replace(relative=path) for path, one in inside.items()}

    def has_images(self, prefix: str) -> bool:
        """Say whether there are images below a folder."""
        return any(path.startswith(prefix) and is_image_name(path.rsplit("/", 1)[-1]) for path in self.files)

    def find_wrapper(self) -> str:
        """Return the one folder that everything lies in, with a `/` at its end, or ""."""
        tops = {path.partition("/")[0] if "/" in path else "" for path in self.files}
        top = next(iter(tops), "")
        return f"{top}/" if len(tops) == 1 and top else ""

    def list_files(self) -> list[str]:
        """Return the files at the top."""
        return [path for path in self.files if "/" not in path]

    def list_folders(self) -> list[str]:
        return sorted({path.partition("/")[0] for path in self.files if "/" in path})

    def index(self, folder: str) -> ImageFolder:
        prefix = f"{folder}/" if folder else ""
        inside = [one for path, one in self.files.items() if path.startswith(prefix)]
        return ImageFolder.of_files(one._replace(relative=one.relative[len(prefix) :]) for one in inside)

    def list_images(self, folder: str) -> tuple[list[ListedFile], PassedOver]:
        return choose_images(self.index(folder).files.values())[0], PassedOver()  # `read_archive` counts the others

    def make_reader(self, found: ListedFile) -> Callable[[int], bytes]:
        return partial(self._reader.read, self._members[found.path])

    def open_table(self, name: str) -> BinaryIO | Path:
        """Open the table as a stream. Raises ImageError, also while it is read."""
        member = self._members[self.files[name].path]
        if name.lower().endswith(".parquet"):
            return io.BytesIO(self._reader.read(member, MAX_PARQUET_BYTES))
        return self._reader.open(member)
