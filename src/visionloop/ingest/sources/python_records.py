"""The records that a user's function yields, each checked by itself: a bad one is `Rejected` with its number."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, is_dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from visionloop.errors import ImageError, shorten
from visionloop.ingest.paths.names import escape_name, find_side
from visionloop.ingest.paths.references import ImageFolder
from visionloop.ingest.sources.item import Cursor, Item, Reading, make_file_reader
from visionloop.ingest.tables.cell_readers import give_bytes, is_url, make_url_finder
from visionloop.ingest.tables.cells import parse_time, to_text
from visionloop.ingest.tables.row_items import Found
from visionloop.ingest.tables.rows import RowPlan
from visionloop.params import PythonSource
from visionloop.records import Rejected

KEYS = frozenset({"image", "label", "labels", "side", "group", "captured_at", "origin", "id", "stamp"})
MAX_CURSOR = 10_000
MAX_ORIGIN = 1000


class Records:
    """Turns records into items: `image` is bytes, a path, a URL, or a function without arguments that gives bytes."""

    def __init__(self, source: PythonSource, reading: Reading) -> None:
        self._source, self._reading = source, reading
        self._told = False

    def read(self, number: int, record: object) -> Item | Rejected | Cursor:
        """Return what a record says; `number` counts from 1."""
        try:
            fields = _to_mapping(record)
            if "cursor" in fields:
                return Cursor(self._source.name, _read_cursor(fields))
            if unknown := [str(key)[:60] for key in fields if key not in KEYS]:
                raise _refuse(f"has unknown keys {shorten(unknown)}", f"keys of {shorten(list(KEYS), len(KEYS))}")
            return self._read_item(number, fields)
        except ImageError as exc:
            reason = f"{exc.found}; expected {exc.expected}"
            return Rejected(f"{self._source.name}:record {number}", exc.reason_code, reason)

    def _read_item(self, number: int, fields: Mapping[str, Any]) -> Item:
        labels = _read_labels(fields)
        side, time = fields.get("side"), fields.get("captured_at")
        found = self._find(fields.get("image"), number)
        named = to_text(fields.get("origin")) or to_text(fields.get("id"))
        if not named and found.place == f"record {number}" and not self._told:
            self._told = True
            self._reading.tell(f"source {self._source.name}: records without `id` are called by their number")
        if side is not None and not (isinstance(side, str) and find_side(side)):
            raise _refuse(f"has side {str(side)[:60]!r}", "train, val or test")
        if time is not None and parse_time(time) is None:
            raise _refuse(f"has captured_at {str(time)[:60]!r}", "a time: ISO 8601, seconds since 1970, or datetime")
        return Item(
            origin=f"{self._source.name}:{escape_name(named or found.place)[:MAX_ORIGIN]}",
            source=self._source.name,
            labels=labels,
            read=found.read,
            stamp=to_text(fields.get("stamp")) or found.stamp,
            side=find_side(side) if side else None,
            group=escape_name(to_text(fields.get("group"))) or None,
            captured_at=parse_time(time),
        )

    def _find(self, image: object, number: int) -> Found:
        """Return where the image is and how it is read. Raises ImageError."""
        if isinstance(image, bytes | bytearray | memoryview):
            return Found(f"record {number}", partial(give_bytes, bytes(image)))
        if isinstance(image, Path):  # the function's own word; a text is data, and stays below its folder
            path = self._reading.home / image
            place = path.relative_to(self._reading.home) if path.is_relative_to(self._reading.home) else path
            return Found(place.as_posix().lstrip("/"), make_file_reader(str(path)))
        if isinstance(image, str) and image.strip():
            if is_url(image):
                return self._find_url(image)
            file = self._images.look_up(image)
            if file is None:
                raise ImageError(
                    "record", f"names no file: {image[:120]!r}", "one below `images`", reason_code="no_file"
                )
            return Found(file.relative, make_file_reader(file.path), file.stamp)
        if callable(image):
            return Found(f"record {number}", partial(_call, image))
        raise _refuse(f"has an image of {type(image).__name__}", "bytes, a path, a URL, or a function that gives bytes")

    @cached_property
    def _images(self) -> ImageFolder:
        return ImageFolder(self._reading.resolve(self._source.images or "."))

    @cached_property
    def _find_url(self) -> Callable[[str], Found]:
        return make_url_finder(self._source.hosts, self._reading)


def _to_mapping(record: object) -> Mapping[str, Any]:
    """Return a dict, a dataclass or a named tuple as a mapping. Raises ImageError."""
    if isinstance(record, Mapping):
        return record
    if is_dataclass(record) and not isinstance(record, type):
        return {name: value for name, value in asdict(record).items() if value is not None}
    if isinstance(record, tuple) and hasattr(record, "_asdict"):
        return {name: value for name, value in record._asdict().items() if value is not None}
    raise _refuse(f"is a {type(record).__name__}", "a dict, a dataclass or a named tuple")


def _read_cursor(fields: Mapping[str, Any]) -> str:
    cursor = fields["cursor"]
    if (
        len(fields) > 1
        or isinstance(cursor, bool)
        or not isinstance(cursor, str | int)
        or len(str(cursor)) > MAX_CURSOR
    ):
        raise _refuse("has a cursor that is none", f"{{'cursor': text of at most {MAX_CURSOR:,} characters}} alone")
    return str(cursor)


def _read_labels(fields: Mapping[str, Any]) -> tuple[str, ...]:
    if "label" in fields and "labels" in fields:
        raise _refuse("has label and labels", "one of them")
    key = "labels" if "labels" in fields else "label"
    return RowPlan(image=None, labels=(key,)).read_labels(fields)


def _call(function: Callable[[], object], max_bytes: int) -> bytes:
    """Return what the user's reader gives. Raises ImageError."""
    try:
        data = function()
    except Exception as exc:
        found = f"its reader raised {type(exc).__name__}"
        raise ImageError("record", found, "bytes", "Mend the function.", reason_code="unreadable") from exc
    if not isinstance(data, bytes | bytearray | memoryview):
        raise ImageError("record", f"its reader gave {type(data).__name__}", "bytes", reason_code="unreadable")
    return give_bytes(bytes(data), max_bytes)


def _refuse(found: str, expected: str) -> ImageError:
    return ImageError("record", found, expected, reason_code="bad_record")
