"""A table whose rows name images: CSV, Parquet, JSON or JSON lines, with the images beside it, by URL, or inside.

Rows and images that have no counterpart are listed, not fatal. Folders beside the table without labels come last.
"""

import shlex
from collections.abc import Iterator

from visionloop.errors import SourceError
from visionloop.ingest.item import Item, PassedOver, SourceContext
from visionloop.ingest.tables.join import choose_tables, read_shelf_table
from visionloop.ingest.tables.label_table import FolderShelf, LabelTable, Shelf
from visionloop.ingest.tables.rows import make_url_finder
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
        names = choose_tables([child.name for child in path.iterdir() if child.is_file()], where, context.tell)
        path = path / names[0]
        where = f"source {source.name} {path}"
    elif not path.is_file():
        raise SourceError(where, "is no regular file" if path.exists() else "does not exist", "a table", "Check it.")
    shelf = FolderShelf(path.parent)
    images: tuple[Shelf, str] | None = None
    if source.images is not None:
        beside = path.parent / source.images
        images = (shelf, source.images) if beside.is_dir() else (FolderShelf(context.resolve(source.images)), "")
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
        command=f"visionloop ingest {shlex.quote(str(path))}",
        find_url=make_url_finder(source.hosts, context) if source.hosts else None,
    )
    yield from read_shelf_table(table)
