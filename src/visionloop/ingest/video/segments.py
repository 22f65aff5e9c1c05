"""A table of labelled videos, or parts of them: one row a segment (file, label, start and end in seconds)."""

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any

from visionloop.errors import ImageError, SourceError
from visionloop.ingest.item import SourceContext
from visionloop.ingest.paths.listing import clean_reference
from visionloop.ingest.tables.cells import Row, to_text
from visionloop.ingest.tables.rows import SAMPLE_ROWS, Reading, RowPlan, guess_table_kind, plan_columns, read_rows
from visionloop.params import VideoSource
from visionloop.records import Rejected

START_NAMES = ("start", "start_s", "start_time", "begin", "begin_s")
END_NAMES = ("end", "end_s", "end_time", "stop", "stop_s")
MAX_SEGMENTS = 10_000  # of one video
MAX_SECONDS = 1e7
VIDEO_NAMES = ("video", "clip", "file", "filename", "file_name", "path")
_CLOCK = re.compile(r"(?:(\d{1,4}):)?(\d{1,2}):(\d{1,2}(?:\.\d+)?)")


@dataclass(frozen=True)
class Segment:
    """A labelled part of a video: seconds [start, end) from its beginning; end None: to its end.

    `side`, `test_is_given`, `group` as in `Item`; `time` is when the segment was recorded, ISO 8601.
    """

    start: float
    end: float | None
    labels: tuple[str, ...]
    side: str | None = None
    test_is_given: bool = False
    group: str | None = None
    time: str | None = None


@dataclass(frozen=True)
class Segments:
    """What a table says: segments by the video's path below the source, in the order of the rows, and bad rows."""

    segments: dict[str, list[Segment]] = field(default_factory=lambda: defaultdict(list))
    rejected: list[Rejected] = field(default_factory=list)


def read_segments(
    path: Path, source: VideoSource, context: SourceContext, where: str, videos: Sequence[str]
) -> Segments:
    """Read the table of a source whose videos lie at these paths. Raises SourceError."""
    place = f"{where} table {path.name}"
    kind = guess_table_kind(path.name)
    if kind is None or not path.is_file():
        found = "does not exist" if not path.exists() else "is not a table"
        raise SourceError(place, found, "a .csv, .json, .jsonl or .parquet file", "Check the path.")
    rows = read_rows(path, kind, place, context.tell)
    sample = list(islice(rows, SAMPLE_ROWS))
    start, end = (_find_column(sample, names) for names in (START_NAMES, END_NAMES))
    columns = source.columns
    if columns.image is None and (column := _find_column(sample, VIDEO_NAMES)):
        columns = columns.model_copy(update={"image": column})
    bare = [{key: value for key, value in row.items() if key not in (start, end)} for row in sample]
    plan = plan_columns(columns, bare, place, context.tell, Reading(context.several))
    table, names = Segments(), _Videos(videos)
    for number, row in enumerate(chain(sample, rows), start=1):
        try:
            relative = names.find(plan.read_image(row))
            if len(table.segments.get(relative, ())) >= MAX_SEGMENTS:
                raise ImageError("row", f"{relative} has more segments", f"{MAX_SEGMENTS:,}", reason_code="bad_row")
            table.segments[relative].append(_make_segment(row, plan, start, end))
        except ImageError as exc:
            reason = f"{exc.found}; expected {exc.expected}"
            origin = f"{source.name}:{path.name} row {number}"
            table.rejected.append(Rejected(origin, exc.reason_code, reason, is_row=True))
    return table


def _make_segment(row: Row, plan: RowPlan, start: str | None, end: str | None) -> Segment:
    """Raises ImageError."""
    first = parse_seconds(row.get(start)) if start else None
    last = parse_seconds(row.get(end)) if end else None
    if last is not None and last <= (first or 0.0):
        raise ImageError("row", f"ends at {last:g} s", "an end after its start", reason_code="bad_row")
    side, group, time = plan.read_side(row), plan.read_group(row), plan.read_time(row)
    return Segment(first or 0.0, last, plan.read_labels(row), side, False, group, time)


def parse_seconds(value: Any) -> float | None:
    """Return seconds: of a number, or of text like 12.5 or 1:02:03.5. None for nothing. Raises ImageError."""
    text = to_text(value)
    if not text:
        return None
    match = _CLOCK.fullmatch(text)
    try:
        seconds = (int(match[1] or 0) * 60 + int(match[2])) * 60 + float(match[3]) if match else float(text)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds <= MAX_SECONDS:
        raise ImageError("row", f"the time {text[:40]!r}", "seconds like 12.5, or 1:02:03.5", reason_code="bad_row")
    return seconds


def _find_column(sample: Sequence[Row], names: Sequence[str]) -> str | None:
    lower: Mapping[str, str] = {str(key).strip().lower(): key for row in sample[:1] for key in row}
    return next((lower[name] for name in names if name in lower), None)


class _Videos:
    """Videos by the names that a cell may use: path, file name, either without suffix; the most exact first."""

    def __init__(self, paths: Sequence[str]) -> None:
        self._by: tuple[dict[str, list[str]], ...] = tuple(defaultdict(list) for _ in range(4))
        for path in paths:
            name = path.rsplit("/", 1)[-1]
            for by, key in zip(self._by, (path, name, path.rsplit(".", 1)[0], name.rsplit(".", 1)[0]), strict=True):
                by[key].append(path)

    def find(self, reference: str | bytes | None) -> str:
        """Return the path of the video that a cell means. Raises ImageError."""
        if reference is None or isinstance(reference, bytes):
            raise ImageError("row", "names no video", "a file", reason_code="row_without_image")
        path = clean_reference(reference)
        found = next((by[path] for by in self._by if path in by), [])
        if len(found) > 1:
            raise ImageError("row", f"{path} fits {len(found)} videos", "one", reason_code="ambiguous")
        if not found:
            expected = "a file of the source"
            raise ImageError("row", f"there is no video {path}", expected, reason_code="row_without_image")
        return found[0]
