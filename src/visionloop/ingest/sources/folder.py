"""A folder per class, with or without split folders above: `cats/1.jpg` or `train/cats/1.jpg`; or flat, by a pattern.

What lies where is read in `layout.py`, for folders, archives and buckets alike.
"""

from collections.abc import Iterator

from visionloop.ingest.paths.listing import list_files
from visionloop.ingest.paths.names import is_image_name
from visionloop.ingest.sources.item import Item, Reading, make_file_reader
from visionloop.ingest.sources.placed import read_by_place
from visionloop.params import FolderSource
from visionloop.records import Rejected


def read_folder(source: FolderSource, reading: Reading) -> Iterator[Item | Rejected]:
    """Yield the images of a folder in the order of their paths; hidden files and other file types are passed over.

    A split folder without labels inside comes in without labels, for prediction only.

    Raises:
        SourceError: the folder is missing or may not be read, or no image in it has a label.
    """
    folder = reading.resolve(source.path)
    where = f"source {source.name} {folder}"
    files = [found for found in list_files(folder, where) if is_image_name(found.relative.rsplit("/", 1)[-1])]
    yield from read_by_place(
        source.name, files, lambda found: make_file_reader(found.path), reading, where=where, pattern=source.pattern
    )
