"""A zip of class folders, of flat files, or of a table and its images. Nothing is extracted to disk.

The archive is checked in `ingest/zips.py`; labels and sides come from paths as in a folder.
"""

import io
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import BinaryIO

from visionloop.errors import SourceError
from visionloop.ingest.item import Item, PassedOver, SourceContext
from visionloop.ingest.paths.listing import (
    ImageFolder,
    ListedFile,
    choose_images,
    escape_name,
    find_side,
    is_image_name,
)
from visionloop.ingest.sources.folder import read_by_place
from visionloop.ingest.tables.join import LabelTable, Shelf, choose_table, is_read_by_table, read_shelf_table
from visionloop.ingest.zips import ZipReader
from visionloop.params import ArchiveSource
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
    shelf = ZipShelf(ZipReader(path, where))
    inner = sum(name.lower().endswith(ARCHIVE_SUFFIXES) for name in shelf.files)
    if inner:
        context.tell(f"{where}: archives inside, which are not opened: {inner:,}")
    if source.table is not None or (source.pattern is None and shelf.is_read_by_table()):
        yield from _read_by_table(source, context, shelf, where)
    else:
        images = [found for found in shelf.files.values() if is_image_name(found.relative.rsplit("/", 1)[-1])]
        yield from read_by_place(
            source.name, images, shelf.make_reader, context, where=where, pattern=source.pattern, loose=True
        )
    for member in shelf.refused:
        yield Rejected(f"{source.name}:{escape_name(member.name)}", member.code, member.problem)


def _read_by_table(
    source: ArchiveSource, context: SourceContext, shelf: "ZipShelf", where: str
) -> Iterator[Item | Rejected | PassedOver]:
    name = source.table
    if name is None:
        if top := shelf.find_wrapper():
            context.tell(f"{where}: everything lies in {top}")
            shelf.enter(top)
        name = choose_table(shelf.list_files(), where, context.tell)
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
        )
    )


class ZipShelf:
    """The files of a zip as a shelf; hidden ones are left out. `files` are by their path.

    `refused` are the members that cannot be used: images, and whatever has a name that is an attack.
    """

    def __init__(self, reader: ZipReader) -> None:
        self._reader = reader
        self._members = {member.name: member for member in reader.members if not member.problem}
        names = sorted((name for name in self._members if not _is_hidden(name)), key=lambda name: name.split("/"))
        offsets = {name: self._members[name].info.header_offset for name in names}
        self.files = {name: ListedFile(name, name, f"{reader.stamp}-{offsets[name]}") for name in names}
        bad = {member.name: member for member in reader.members if member.problem}
        self.refused = [one for one in bad.values() if one.code == "unsafe_path" or is_image_name(one.name)]

    def is_read_by_table(self) -> bool:
        """Say whether images are labelled by a table at the top, or in the one folder that holds all."""
        prefix = self.find_wrapper()
        paths = [path[len(prefix) :] for path in self.files]
        return is_read_by_table([path for path in paths if "/" not in path], _list_class_folders(paths))

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
        return choose_images(self.index(folder).files.values())

    def make_reader(self, found: ListedFile) -> Callable[[int], bytes]:
        return partial(self._reader.read, self._members[found.path])

    def open_table(self, name: str) -> BinaryIO | Path:
        """Open the table as a stream. Raises ImageError, also while it is read."""
        member = self._members[self.files[name].path]
        if name.lower().endswith(".parquet"):
            return io.BytesIO(self._reader.read(member, MAX_PARQUET_BYTES))
        return self._reader.open(member)


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or "/." in name


def _list_class_folders(paths: Sequence[str]) -> list[str]:
    """Return the folders that images lie in: at the top, and in split folders."""
    folders = set()
    for path in paths:
        *parents, name = path.split("/")
        if parents and is_image_name(name):
            folders.add(parents[1] if len(parents) > 1 and find_side(parents[0]) else parents[0])
    return sorted(folders)
