"""A folder per class, with or without split folders above: `cats/1.jpg` or `train/cats/1.jpg`; or flat, by a pattern.

Labels and sides are read from paths in `layout.py`, for folders, archives and buckets alike. The digits are a folder
too: 1,797 grey images of 8 x 8 pixels, 10 classes (E. Alpaydin and C. Kaynak, UCI, 1998; CC BY 4.0).
"""

import os
import shlex
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from visionloop.errors import SourceError
from visionloop.ingest.item import Item, PassedOver, SourceContext, make_file_reader
from visionloop.ingest.paths.layout import place_all
from visionloop.ingest.paths.listing import ListedFile, list_images
from visionloop.ingest.paths.names import escape_name, is_passed, is_small_copies
from visionloop.ingest.sources.reading import Place, explain_no_image, find_split_tables, read_split_tables, tell_unread
from visionloop.ingest.tables.label_table import FolderShelf
from visionloop.params import Columns, DigitsSource, FolderSource
from visionloop.records import Rejected

Read = Callable[[int], bytes]


@dataclass(frozen=True)
class Files:
    """The images of one place in the order of their paths, what lies beside them, and how they are read."""

    source: str
    where: str
    images: Sequence[ListedFile]
    passed: PassedOver
    make_reader: Callable[[ListedFile], Read]


def read_by_place(
    files: Files, context: SourceContext, *, pattern: str | None, unlabelled: Sequence[str] = ()
) -> Iterator[Item | Rejected | PassedOver]:
    """Yield images by their places, in the order given, then what was passed over. Raises SourceError."""
    source, where = files.source, files.where
    places = place_all(
        [found.relative for found in files.images],
        where,
        context.tell,
        pattern=pattern,
        unlabelled=unlabelled,
        passed=files.passed,
    )
    for found, place in zip(files.images, places, strict=True):
        if place is None:
            parts = found.relative.split("/")
            depth = next(i for i, part in enumerate(parts) if is_small_copies(part))
            files.passed.add_folder("".join(f"{part}/" for part in parts[:depth]), parts[depth], 1)
    if text := files.passed.describe():
        context.tell(f"{where}: files passed over: {text}")
    for found, place in zip(files.images, places, strict=True):
        origin = f"{source}:{escape_name(found.relative)}"
        if place is None:
            continue
        if found.problem:
            yield Rejected(origin, "unreadable", found.problem)
        elif isinstance(place, str):
            yield Rejected(origin, "no_label", place)
        else:
            read = files.make_reader(found)
            yield Item(origin, source, place.labels, read, found.stamp, place.side, place.test_is_given, place.group)
    yield files.passed


def read_folder(source: FolderSource, context: SourceContext) -> Iterator[Item | Rejected | PassedOver]:
    """Yield the images of a folder in the order of their paths; hidden files and other file types are passed over.

    A split folder without labels inside comes in without labels, for prediction only; but if there are only split
    folders, the tables in them are read.

    Raises:
        SourceError: the folder is missing or may not be read, no image has a label, or it can be read in two ways.
    """
    folder = context.resolve(source.path)
    where = f"source {source.name} {folder}"
    images, passed = list_images(folder, where)
    paths = [found.relative for found in images]

    def list_names(inside: str) -> list[str]:
        return [entry.name for entry in os.scandir(folder / inside) if entry.is_file() and not is_passed(entry.name)]

    if line := passed.describe_links():
        context.tell(f"{where}: {line}")
    if not images:
        raise explain_no_image(where, list_names(""), passed, str(folder))
    if not source.pattern and (tables := find_split_tables(paths, list_names)):
        place = Place(
            source=source.name,
            where=where,
            enter=lambda inside: FolderShelf(folder / inside),
            list_names=list_names,
            columns=source.columns,
            command=f"visionloop ingest {shlex.quote(str(folder))}",
            encoding=source.encoding,
        )
        yield from read_split_tables(tables, place, context)
        yield passed
        return
    if source.columns != Columns() or source.encoding:
        found = "columns or an encoding are named, but labels are those of the paths"
        todo = "Give the path of the table, or leave them out."
        raise SourceError(where, found, "a table in each split folder", todo)
    tell_unread(list_names(""), where, context.tell)
    files = Files(source.name, where, images, passed, lambda found: make_file_reader(found.path))
    yield from read_by_place(files, context, pattern=source.pattern, unlabelled=source.unlabelled)


def read_digits(source: DigitsSource, context: SourceContext) -> Iterator[Item | Rejected | PassedOver]:
    """Write the digits into class folders of the workspace's hidden folder, once, and yield them."""
    folder = context.hidden_dir / "sources" / "digits"
    if not folder.is_dir():
        _write_digits(folder)
    yield from read_folder(FolderSource(kind="folder", path=str(folder), name=source.name), context)


def _write_digits(folder: Path) -> None:
    from sklearn.datasets import load_digits

    staged = folder.with_name(f".{folder.name}.staged")
    shutil.rmtree(staged, ignore_errors=True)
    digits = load_digits()
    for number, (values, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        path = staged / str(label) / f"{number:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((values * (255 / 16)).round().astype("uint8")).save(path)
    staged.rename(folder)
