"""A query of a database: one row an image, by path, URL or blob, with its labels. Reads only, chunk by chunk.

Incremental with `cursor`: a later pull asks for rows from the last value on. The last value is asked for again, because
later rows may have the same value. Rows without a value (NULL) are offered each time. So no row is missed, and an image
that is offered twice is stored once.

The last value is kept for one query: with another query or other columns, all rows are read again. The guessed meaning
of the columns is kept with it, so that a later pull with few rows cannot guess something else.
"""

import hashlib
import json
import math
import re
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import asdict, dataclass
from datetime import date, datetime
from decimal import Decimal
from functools import cached_property
from itertools import chain, islice
from typing import Any

from visionloop.errors import ImageError, SourceError, describe_install
from visionloop.ingest.item import Cursor, Item, SourceContext, make_file_reader
from visionloop.ingest.paths.listing import ImageFolder, escape_name
from visionloop.ingest.tables.cells import Row, to_text
from visionloop.ingest.tables.rows import (
    SAMPLE_ROWS,
    Reading,
    RowImage,
    RowPlan,
    find_stamp_column,
    make_item,
    plan_columns,
    read_stamp,
)
from visionloop.params import SqlSource
from visionloop.records import Rejected, compute_digest
from visionloop.secrets import Environment, mask
from visionloop.web.download import Fetcher, make_fetcher

_KINDS: dict[str, tuple[type, Callable[[Any], Any], Callable[[Any], Any]]] = {
    # name: (type, to JSON, from JSON); a datetime is a date too, so it comes first
    "int": (int, int, int),
    "float": (float, float, float),
    "str": (str, str, str),
    "datetime": (datetime, datetime.isoformat, datetime.fromisoformat),
    "date": (date, date.isoformat, date.fromisoformat),
    "decimal": (Decimal, str, Decimal),
}
KEY_NAMES = ("id", "uuid", "guid", "key", "pk", "image_id", "img_id", "name", "filename", "file_name")
SAMPLE_BYTES = 64 << 20
MAX_QUERY_CHARS = 100_000
Sized = tuple[dict[str, Any], bool]


@dataclass(frozen=True)
class CursorState:
    """The last value seen, and what the columns mean."""

    value: object
    plan: RowPlan


def compute_query_digest(source: SqlSource) -> str:
    """Return the digest of the settings that decide which rows a source asks for and what they mean."""
    asked = source.model_dump(mode="json", include={"query", "columns", "cursor", "images"})
    for key in ("no_label", "sides"):  # so that cursors of versions without these keys go on
        if asked["columns"][key] is None:
            del asked["columns"][key]
    return compute_digest(asked)


def write_progress(progress: CursorState, digest: str, where: str) -> str:
    """Return the state as text. Raises SourceError when the cursor column holds values that cannot be ordered."""
    value = progress.value
    for kind, (of_type, to_json, _) in _KINDS.items():
        if isinstance(value, of_type) and not isinstance(value, bool):
            if isinstance(value, float) and not math.isfinite(value):
                break
            state = {"digest": digest, "kind": kind, "value": to_json(value), "plan": asdict(progress.plan)}
            return json.dumps(state, sort_keys=True)
    found = f"the cursor column holds {type(value).__name__} ({str(value)[:40]})"
    raise SourceError(f"{where} cursor", found, "a number, text, a date or a time", "Choose another column.")


def read_progress(text: str | None, digest: str) -> CursorState | None:
    """Return what `write_progress` wrote for the same query; None for anything else."""
    try:
        state = json.loads(text or "")
        if state["digest"] != digest:
            return None
        stored: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in {**state["plan"]}.items()
        }
        plan = RowPlan(**stored)
        return CursorState(_KINDS[state["kind"]][2](state["value"]), plan)
    except (ValueError, KeyError, TypeError, ArithmeticError):
        return None


def read_sql(source: SqlSource, context: SourceContext) -> Iterator[Item | Rejected | Cursor]:
    """Yield the images of a query in its order; with `cursor`, in the order of that column.

    Raises:
        SourceError: the database refuses the query, cannot be reached or takes too long, or there are too many rows.
    """
    where = f"source {source.name}"
    environment = Environment(context.env, where)
    try:
        yield from _read(source, context, environment, where)
    except SourceError as exc:
        # The cause stays out: a driver's error may hold the password.
        parts = (mask(part, tuple(environment.secrets)) for part in (exc.where, exc.found, exc.expected, exc.todo))
        raise SourceError(*parts) from None


def _read(
    source: SqlSource, context: SourceContext, environment: Environment, where: str
) -> Iterator[Item | Rejected | Cursor]:
    try:
        from visionloop.ingest.database import SqlQuery, Stopwatch, make_database
    except ModuleNotFoundError as exc:
        todo = f"Run `{describe_install('ingest')}`."
        raise SourceError(where, f"{exc.name} is not installed", "the extra `ingest`", todo) from exc
    max_bytes = context.limits.max_file_bytes
    database = make_database(source.url, environment, context.resolve, max_bytes)
    if len(source.query) > MAX_QUERY_CHARS or "\0" in source.query:  # a driver ends the text at a NUL
        expected = f"at most {MAX_QUERY_CHARS:,} characters"
        raise SourceError(f"{where} query", "is too long or holds a NUL", expected, "Edit it.")
    digest = compute_query_digest(source)
    progress = read_progress(context.cursor, digest) if source.cursor else None
    if context.cursor and source.cursor and not progress:
        context.tell(f"{where}: the query, its columns or its cursor changed: read from the start")
    query = SqlQuery(
        text=source.query.rstrip("; \t\r\n"),
        dialect=database.dialect,
        where=f"{where} {database.place}",
        max_value_bytes=max_bytes,
        chunk_rows=source.chunk_rows,
        cursor=source.cursor,
        start=progress.value if progress else None,
    )
    stopwatch = Stopwatch(source.timeout_s)
    pull = _Pull(source, context, where, tuple(environment.secrets), max_bytes)
    with (
        database.open(stopwatch, where, context.tell) as connection,
        closing(query.read(connection, stopwatch)) as rows,
    ):
        yield from pull.make_items(rows, progress)
    if source.cursor and pull.last is not None:
        yield Cursor(source.name, write_progress(pull.last, digest, where))


@dataclass
class _Pull:
    """One pull of a query: turns its rows into items. `last` is how far it came."""

    source: SqlSource
    context: SourceContext
    where: str
    secrets: tuple[str, ...]
    max_bytes: int
    last: CursorState | None = None
    key: str | None = None
    stamp: str | None = None

    def make_items(self, rows: Iterator[Sized], progress: CursorState | None) -> Iterator[Item | Rejected]:
        """Yield the items of rows. Raises SourceError when there are more than max_rows."""
        self.last = progress
        sample = _take_sample(rows)
        if not sample and progress:
            return
        plain = [row for row, _ in sample]
        self.stamp = find_stamp_column(plain)
        found = [name for name in (plain[0] if plain else {}) if name.lower() in KEY_NAMES]
        keys = sorted(found, key=lambda name: KEY_NAMES.index(name.lower()))[:1]
        own = [*keys, self.stamp, self.source.cursor]
        reading = Reading(self.context.several, own=own)
        plan = (
            progress.plan
            if progress
            else plan_columns(self.source.columns, plain, self.where, self.context.tell, reading)
        )
        names = {name.lower(): name for name in (plain[0] if plain else {}) if name not in {plan.image, *plan.labels}}
        self.key = next((names[name] for name in KEY_NAMES if name in names), None)
        num_rows, column = 0, self.source.cursor
        for num_rows, (row, too_large) in enumerate(chain(sample, rows), start=1):
            if num_rows > self.source.max_rows:
                self._stop_at_cap(progress)
                return
            if column is not None and row.get(column) is not None:
                self.last = CursorState(row[column], plan)
            yield self._make_item(row, plan, num_rows, too_large=too_large)

    def _stop_at_cap(self, progress: CursorState | None) -> None:
        """End a pull at max_rows. Raises SourceError when the next pull could not go on from there."""
        max_rows = f"{self.source.max_rows:,}"
        if self.source.cursor is None or self.last is None or (progress and self.last.value == progress.value):
            found, todo = f"the query gives more than {max_rows} rows", "Narrow it, raise max_rows, or name a `cursor`."
            raise SourceError(self.where, found, f"at most {max_rows}", todo)
        self.context.tell(f"{self.where}: took {max_rows} rows (max_rows); the next pull goes on from there")

    def _make_item(self, row: Row, plan: RowPlan, number: int, *, too_large: bool) -> Item | Rejected:
        key = row.get(self.key) if self.key else None
        place = f"row {number}" if key is None else f"{self.key}={escape_name(to_text(key))[:200]}"
        if too_large:
            reason = f"a value is larger than {self.max_bytes:,} bytes (ingest.max_file_bytes)"
            return Rejected(f"{self.source.name}:{place}", "too_large", reason, is_row=True)
        stamp = read_stamp(row, self.stamp) if self.stamp else None
        return make_item(row, plan, self.source.name, place, lambda reference: self._find(reference, place, stamp))

    def _find(self, reference: str | bytes, place: str, stamp: str | None) -> RowImage:
        if isinstance(reference, bytes):
            digest = hashlib.sha256(reference).hexdigest()
            return RowImage(place if self.key else f"blob {digest[:16]}", _Blob(reference), f"sha256 {digest}")
        if re.match(r"(?i)https?:", reference):
            self._fetcher.check(reference)
            return RowImage(self._fetcher.describe(reference), self._fetcher.make_reader(reference), stamp)
        root = f"{self.context.resolve(self.source.images or '.')}/"
        found = self._folder.look_up(reference.removeprefix(root))
        if found is None:
            raise ImageError(f"reference {reference[:200]!r}", "no such file", reason_code="row_without_image")
        return RowImage(found.relative, make_file_reader(found.path), found.stamp)

    @cached_property
    def _fetcher(self) -> Fetcher:
        return make_fetcher(self.context.env, self.source.hosts, secrets=self.secrets)

    @cached_property
    def _folder(self) -> ImageFolder:
        if self.source.images is None:
            raise SourceError(self.where, "its rows hold paths", "`images`, the folder they lie in", "Name it.")
        return ImageFolder(self.context.resolve(self.source.images))


class _Blob:
    """The bytes of an image; the memory is freed once they are read."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    def __call__(self, max_bytes: int) -> bytes:
        data, self._data = self._data, b""
        if len(data) > max_bytes:
            raise ImageError("blob", "is too large", f"at most {max_bytes} bytes", reason_code="too_large")
        return data


def _take_sample(rows: Iterator[Sized]) -> list[Sized]:
    """Take rows to guess the columns from; fewer when they are large."""
    sample: list[Sized] = []
    num_bytes = 0
    for row in islice(rows, SAMPLE_ROWS):
        sample.append(row)
        num_bytes += sum(len(value) for value in row[0].values() if isinstance(value, str | bytes | memoryview))
        if num_bytes > SAMPLE_BYTES:
            break
    return sample
