"""A folder per class, with or without split folders above: `cats/1.jpg` or `train/cats/1.jpg`; or flat, by a pattern.

What lies where is read in `layout.py`, for folders, archives and buckets alike.
"""

from collections.abc import Iterator

from visionloop.ingest.paths.layout import place_all
from visionloop.ingest.paths.listing import list_files
from visionloop.ingest.paths.names import escape_name, is_image_name
from visionloop.ingest.sources.item import Item, Reading, make_file_reader
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
    places = place_all([found.relative for found in files], where, reading.tell, pattern=source.pattern)
    for found, place in zip(files, places, strict=True):
        origin = f"{source.name}:{escape_name(found.relative)}"
        if found.problem:
            yield Rejected(origin, "unreadable", found.problem)
        elif isinstance(place, str):
            yield Rejected(origin, "no_label", place)
        else:
            read = make_file_reader(found.path)
            yield Item(
                origin, source.name, place.labels, read, found.stamp, place.side, place.test_is_given, place.group
            )
