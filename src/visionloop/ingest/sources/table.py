"""A table whose rows name images: CSV, Parquet, JSON or JSON lines, with the images beside it, by URL, or inside.

Rows and images that have no counterpart are listed, not fatal. Folders beside the table without labels come last.
"""

import shlex
from collections.abc import Iterator
from pathlib import Path

from visionloop.errors import SourceError
from visionloop.ingest.item import Item, PassedOver, SourceContext
from visionloop.ingest.tables.choose import ALL_TABLES, choose_tables
from visionloop.ingest.tables.join import read_shelf_table
from visionloop.ingest.tables.label_table import FolderShelf, LabelTable, Shelf
from visionloop.ingest.tables.rows import Row, make_url_finder
from visionloop.params import TableSource
from visionloop.records import Rejected


def read_table(source: TableSource, context: SourceContext) -> Iterator[Item | Rejected | PassedOver]:
    """Yield the rows of a table in its order, then the images of folders without labels.

    The path may be that of the folder that holds the table. Rows without an image and images without a row come as
    `Rejected`, with the codes `row_without_image` and `image_without_row`.

    Raises:
        SourceError: the table is missing, is no table, has no header that says enough, or none of its images is found.
    """
    path = context.resolve(source.path)
    where = f"source {source.name} {path}"
    is_folder, names = path.is_dir(), [path.name]
    if is_folder:
        names = _choose(source, path, where, context)
        path = path / names[0]
        where = f"source {source.name} {path}"
    elif not path.is_file():
        raise SourceError(where, "is no regular file" if path.exists() else "does not exist", "a table", "Check it.")
    command = f"visionloop ingest {shlex.quote(str(path))}"
    if len(names) > 1:
        command = f"visionloop ingest {shlex.quote(str(path.parent))} --table {shlex.quote(ALL_TABLES)}"
    shelf = FolderShelf(path.parent)
    images: tuple[Shelf, str] | None = None
    if source.images is not None:
        is_beside = (path.parent / source.images).is_dir() and not Path(source.images).is_absolute()
        images = (shelf, source.images) if is_beside else (FolderShelf(context.resolve(source.images)), "")
    table = LabelTable(
        source=source.name,
        where=where,
        shelf=shelf,
        name=path.name,
        columns=source.columns,
        tell=context.tell,
        images=images,
        unlabelled=source.unlabelled,
        encoding=source.encoding,
        parts=names if len(names) > 1 else (),
        is_all=is_folder,
        several=context.several,
        command=command,
        find_url=make_url_finder(source.hosts, context) if source.hosts else None,
    )
    yield from read_shelf_table(table)


def _choose(source: TableSource, folder: Path, where: str, context: SourceContext) -> list[str]:
    """Return the table in a folder, or those that are one for each side. Raises SourceError."""
    shelf = FolderShelf(folder)

    def read(name: str) -> Iterator[Row]:
        columns, encoding = source.columns, source.encoding
        look = LabelTable(source.name, where, shelf, name, columns, lambda line: None, encoding=encoding, command="")
        return look.rows()

    names = [child.name for child in folder.iterdir() if child.is_file()]
    return choose_tables(names, where, context.tell, read, source.columns)
