"""Items of files that say what they are by where they lie: in a folder, an archive or a bucket."""

from collections.abc import Callable, Iterator, Sequence

from visionloop.ingest.paths.layout import place_all
from visionloop.ingest.paths.listing import Found
from visionloop.ingest.paths.names import escape_name
from visionloop.ingest.sources.item import Item, Reading
from visionloop.records import Rejected

Read = Callable[[int], bytes]


def read_by_place(
    source: str,
    files: Sequence[Found],
    make_reader: Callable[[Found], Read],
    reading: Reading,
    *,
    where: str,
    pattern: str | None,
    loose: bool = False,
) -> Iterator[Item | Rejected]:
    """Yield images by their places, in the order given; `loose` as in `place_all`. Raises SourceError."""
    places = place_all([found.relative for found in files], where, reading.tell, pattern=pattern, loose=loose)
    for found, place in zip(files, places, strict=True):
        origin = f"{source}:{escape_name(found.relative)}"
        if found.problem:
            yield Rejected(origin, "unreadable", found.problem)
        elif isinstance(place, str):
            yield Rejected(origin, "no_label", place)
        else:
            read = make_reader(found)
            yield Item(origin, source, place.labels, read, found.stamp, place.side, place.test_is_given, place.group)
