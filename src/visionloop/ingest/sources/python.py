"""A function of the user that yields records, for data that no other source reads: a NoSQL collection, a queue.

Its module lies in the workspace or is installed. Each record is checked by itself.
"""

import inspect
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, is_dataclass
from functools import cached_property, partial
from importlib import import_module, invalidate_caches
from pathlib import Path
from typing import Any

from visionloop.errors import ImageError, SourceError, VisionLoopError, shorten
from visionloop.ingest.item import Cursor, Item, SourceContext, make_file_reader
from visionloop.ingest.paths.listing import ImageFolder, escape_name, find_side
from visionloop.ingest.tables.cells import parse_time, to_text
from visionloop.ingest.tables.rows import RowImage, RowPlan, give_bytes, is_url, make_url_finder
from visionloop.params import PythonSource
from visionloop.records import Rejected

KEYS = frozenset({"image", "label", "labels", "side", "group", "captured_at", "origin", "id", "stamp"})
MAX_CURSOR = 10_000
MAX_ORIGIN = 1000


class Records:
    """Turns records into items: `image` is bytes, a path, a URL, or a function without arguments that gives bytes."""

    def __init__(self, source: PythonSource, context: SourceContext) -> None:
        self._source, self._context = source, context
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
            self._context.tell(f"source {self._source.name}: records without `id` are called by their number")
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

    def _find(self, image: object, number: int) -> RowImage:
        """Return where the image is and how it is read. Raises ImageError."""
        if isinstance(image, bytes | bytearray | memoryview):
            return RowImage(f"record {number}", partial(give_bytes, bytes(image)))
        if isinstance(image, Path):  # chosen by the function; a text may come from data
            path = self._context.home / image
            place = path.relative_to(self._context.home) if path.is_relative_to(self._context.home) else path
            return RowImage(place.as_posix().lstrip("/"), make_file_reader(str(path)))
        if isinstance(image, str) and image.strip():
            if is_url(image):
                return self._find_url(image)
            file = self._images.look_up(image)
            if file is None:
                raise ImageError(
                    "record", f"names no file: {image[:120]!r}", "one below `images`", reason_code="no_file"
                )
            return RowImage(file.relative, make_file_reader(file.path), file.stamp)
        if callable(image):
            return RowImage(f"record {number}", partial(_call, image))
        raise _refuse(f"has an image of {type(image).__name__}", "bytes, a path, a URL, or a function that gives bytes")

    @cached_property
    def _images(self) -> ImageFolder:
        return ImageFolder(self._context.resolve(self._source.images or "."))

    @cached_property
    def _find_url(self) -> Callable[[str], RowImage]:
        return make_url_finder(self._source.hosts, self._context)


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


def read_python(source: PythonSource, context: SourceContext) -> Iterator[Item | Rejected | Cursor]:
    """Call the function with `options` (and `cursor`, if it takes one) and yield what its records say.

    Raises:
        SourceError: there is no such function, it cannot be called so, or it raised: with its file and line.
    """
    where = f"source {source.name} {source.function}"
    records = Records(source, context)
    known = set(sys.modules)
    try:
        with _workspace_on_path(context.home):
            function = _load(source.function, context.home, where)
            produced = _start(function, source, context, where)
        number = 0
        while True:
            # The workspace is on Python's path only while the function runs, not while its records are used.
            with _workspace_on_path(context.home):
                try:
                    record = next(produced)
                except StopIteration:
                    return
                except (Exception, SystemExit) as exc:
                    raise _translate(exc, where, f"failed after {number:,} records") from exc
            number += 1
            yield records.read(number, record)
    finally:
        _forget_modules(known, context.home)


@contextmanager
def _workspace_on_path(home: Path) -> Iterator[None]:
    """Let modules of the workspace be imported, and no longer than this lasts."""
    entry = str(home)
    sys.path.insert(0, entry)
    try:
        yield
    finally:
        if entry in sys.path:
            sys.path.remove(entry)


def _forget_modules(known: set[str], home: Path) -> None:
    """Drop what was imported from the workspace: another one may have a module of the same name."""
    for name in set(sys.modules) - known:
        file = getattr(sys.modules[name], "__file__", None)
        if file and Path(file).is_relative_to(home):
            del sys.modules[name]


def _load(function: str, home: Path, where: str) -> Callable[..., Any]:
    """Import a function. Raises SourceError."""
    name, _, attribute = function.partition(":")
    invalidate_caches()
    try:
        found = getattr(import_module(name), attribute, None)
    except (Exception, SystemExit) as exc:
        missing = exc.name or "" if isinstance(exc, ModuleNotFoundError) else ""
        if missing and f"{name}.".startswith(f"{missing}."):
            expected = f"{name.replace('.', '/')}.py in the workspace, or an installed module"
            raise SourceError(where, f"no module {name!r}", expected, "Write it, or edit `function`.") from exc
        raise _translate(exc, where, "cannot be imported") from exc
    if not callable(found):
        raise SourceError(where, f"no function {attribute!r} in {name}", "its name", "Write it, or edit `function`.")
    return found  # type: ignore[no-any-return]


def _start(function: Callable[..., Any], source: PythonSource, context: SourceContext, where: str) -> Iterator[Any]:
    """Call the function and return what it iterates over. Raises SourceError."""
    arguments = dict(source.options)
    try:
        signature = inspect.signature(function)
        if "cursor" in signature.parameters:
            arguments["cursor"] = context.cursor
        signature.bind(**arguments)
    except (TypeError, ValueError) as exc:
        found = f"cannot be called with its `options` ({exc})"
        raise SourceError(where, found, "options that are its arguments", "Edit `options`, or the function.") from exc
    try:
        return iter(function(**arguments))
    except (Exception, SystemExit) as exc:
        if isinstance(exc, TypeError) and exc.__traceback__ and exc.__traceback__.tb_next is None:
            raise SourceError(where, f"does not yield records ({exc})", "an iterable of dicts", "Edit it.") from exc
        raise _translate(exc, where, "failed") from exc


def _translate(exc: BaseException, where: str, found: str) -> SourceError:
    """Say in one line what the user's code raised, and where: the last line of it that is no library's."""
    if isinstance(exc, SyntaxError):
        place = f"{Path(exc.filename or '').name} line {exc.lineno}"
    else:
        frames = traceback.extract_tb(exc.__traceback__)
        own = [f for f in frames if "site-packages" not in f.filename and f.filename not in (__file__, "<frozen>")]
        own = [f for f in own if not f.filename.startswith(("<frozen", sys.base_prefix))]
        place = f"{Path(own[-1].filename).name} line {own[-1].lineno}" if own else "its code"
    text = str(exc) if not isinstance(exc, VisionLoopError) else exc.found
    text = re.sub(r"//[^/@\s]*@", "//***@", " ".join(text.split()))[:200]
    reason = f"{type(exc).__name__}: {text}" if text else type(exc).__name__
    return SourceError(f"{where}, {place}", f"{found} ({reason})", "records", "Mend the function.")
