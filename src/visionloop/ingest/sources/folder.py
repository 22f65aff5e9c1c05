"""A folder per class, with or without split folders above: `cats/1.jpg` or `train/cats/1.jpg`; or flat, by a pattern.

Labels and sides are read from paths in `layout.py`, for folders, archives and buckets alike. The digits are a folder
too: 1,797 grey images of 8 x 8 pixels, 10 classes (E. Alpaydin and C. Kaynak, UCI, 1998; CC BY 4.0).
"""

import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from PIL import Image

from visionloop.ingest.item import Item, SourceContext, make_file_reader
from visionloop.ingest.paths.layout import place_all
from visionloop.ingest.paths.listing import ListedFile, escape_name, is_image_name, list_files
from visionloop.params import DigitsSource, FolderSource
from visionloop.records import Rejected

Read = Callable[[int], bytes]


def read_by_place(
    source: str,
    files: Sequence[ListedFile],
    make_reader: Callable[[ListedFile], Read],
    context: SourceContext,
    *,
    where: str,
    pattern: str | None,
    loose: bool = False,
) -> Iterator[Item | Rejected]:
    """Yield images by their places, in the order given; `loose` as in `place_all`. Raises SourceError."""
    places = place_all([found.relative for found in files], where, context.tell, pattern=pattern, loose=loose)
    for found, place in zip(files, places, strict=True):
        origin = f"{source}:{escape_name(found.relative)}"
        if found.problem:
            yield Rejected(origin, "unreadable", found.problem)
        elif isinstance(place, str):
            yield Rejected(origin, "no_label", place)
        else:
            read = make_reader(found)
            yield Item(origin, source, place.labels, read, found.stamp, place.side, place.test_is_given, place.group)


def read_folder(source: FolderSource, context: SourceContext) -> Iterator[Item | Rejected]:
    """Yield the images of a folder in the order of their paths; hidden files and other file types are passed over.

    A split folder without labels inside comes in without labels, for prediction only.

    Raises:
        SourceError: the folder is missing or may not be read, or no image in it has a label.
    """
    folder = context.resolve(source.path)
    where = f"source {source.name} {folder}"
    files = [found for found in list_files(folder, where) if is_image_name(found.relative.rsplit("/", 1)[-1])]
    yield from read_by_place(
        source.name, files, lambda found: make_file_reader(found.path), context, where=where, pattern=source.pattern
    )


def read_digits(source: DigitsSource, context: SourceContext) -> Iterator[Item | Rejected]:
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
