"""Frames of videos: a file, a folder of them, or a camera (`ingest/video/cameras.py`).

Labels come from class folders, from `label`, or from a table of labelled videos or parts of them: one row a
segment (file, label, start and end in seconds).
The frames of a video are one group, so they are all on one side.
"""

import os
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

from visionloop.errors import ImageError, SourceError
from visionloop.ingest.item import Item, SourceContext
from visionloop.ingest.paths.layout import Placement, place_all, settle_sides
from visionloop.ingest.paths.listing import (
    VIDEO_SUFFIXES,
    ListedFile,
    clean_reference,
    escape_name,
    find_side,
    is_video_name,
    list_files,
)
from visionloop.ingest.tables.cells import Row, to_text
from visionloop.ingest.tables.rows import SAMPLE_ROWS, Reading, RowPlan, guess_table_kind, plan_columns, read_rows
from visionloop.ingest.video.cameras import is_camera, open_camera
from visionloop.ingest.video.clip import DECODING, Clip, Index, Spool, make_stamp
from visionloop.params import VideoSource
from visionloop.records import Rejected
from visionloop.video.player import PASSING, Player, check_installed
from visionloop.video.sample import DecodeJob, find_spans

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


@dataclass(frozen=True)
class Film:
    """A video to be read: its place below the source, its file, and its labelled parts (one for the whole of it)."""

    relative: str
    path: Path
    segments: Sequence[Segment]


def read_video(source: VideoSource, context: SourceContext) -> Iterator[Item | Rejected]:
    """Yield frames in the order of the videos' paths and their own times; a table gives the order of its rows.

    Raises:
        SourceError: the path or the table is missing, there is no video, or a camera's address is not allowed.
    """
    where = f"source {source.name}"
    check_installed(where)
    folder = context.hidden_dir / "ingest" / "video"
    spool = Spool(folder / "spool")
    if is_camera(source.path):
        yield from _watch(source, context, spool, where)
        return
    found = list(_find_films(source, context, where))
    index = Index(folder / f"index-{source.name}")
    with Player() as player:
        for one in found:
            if isinstance(one, Rejected):
                yield one
            else:
                yield from _read_film(one, source, context, _Tools(player, spool, index))
    index.forget_others()


@dataclass(frozen=True)
class _Tools:
    """What decoding needs."""

    player: Player
    spool: Spool
    index: Index | None


def _read_film(film: Film, source: VideoSource, context: SourceContext, tools: _Tools) -> Iterator[Item | Rejected]:
    """Yield the frames of a file, then what was wrong with it."""
    origin = f"{source.name}:{escape_name(film.relative)}"
    stamp = make_stamp(film.path)
    if stamp is None or not film.path.is_file():
        yield Rejected(origin, "unreadable", "is not a file that can be read")
        return
    size = film.path.stat().st_size
    if not size:
        yield Rejected(origin, "empty", "is empty (0 bytes)")
        return
    if size > source.max_video_bytes:
        yield Rejected(origin, "too_large", f"has {size:,} bytes; expected at most {source.max_video_bytes:,}")
        return
    job = make_job(source, context, [(part.start, part.end) for part in film.segments], file=str(film.path))
    clip = Clip(origin, film.path, stamp, job, tools.spool)
    known = tools.index.load(clip) if tools.index else None
    if known:
        clip.contents = known
    for t_ms in known.times_ms if known else clip.find_frames(tools.player):
        yield _make_item(clip, film, source, t_ms)
    contents = clip.contents
    if tools.index and not known and contents.code not in PASSING:
        tools.index.save(clip)
    for line in contents.told:
        context.tell(f"{origin}: {line}")
    if contents.code:
        yield Rejected(origin, contents.code, contents.text or "")


def make_job(
    source: VideoSource, context: SourceContext, spans: Sequence[Sequence[float | None]], *, file: str
) -> DecodeJob:
    """Return what the decoder is asked for."""
    return DecodeJob(
        every_s=source.every_s,
        scene=source.scene,
        spans=spans,
        max_frames=source.max_frames,
        max_s=source.max_video_s,
        max_pixels=context.limits.max_pixels,
        file=file,
    )


def _make_item(clip: Clip, film: Film, source: VideoSource, t_ms: int) -> Item:
    """Return a frame as an item. A frame in several segments has the labels of all of them."""
    inside = find_spans(clip.job.spans, t_ms / 1000)
    parts = [film.segments[number] for number in inside] or list(film.segments[:1])
    first = parts[0]
    return Item(
        origin=f"{clip.where}#t={t_ms / 1000:.3f}",
        source=source.name,
        labels=tuple(dict.fromkeys(label for part in parts for label in part.labels)),
        read=partial(clip.read, t_ms),
        # every_s, scene and limits are not part of it: they do not change the frame at a given time.
        stamp=f"{clip.stamp} {DECODING}",
        side=first.side,
        test_is_given=first.test_is_given,
        group=first.group or clip.where,
        captured_at=_add_time(first.time, t_ms / 1000 - first.start) or _add_time(clip.contents.created, t_ms / 1000),
    )


def _add_time(begin: str | None, seconds: float) -> str | None:
    """Return the time of a frame, ISO 8601 in UTC."""
    if begin is None:
        return None
    return (
        (datetime.fromisoformat(begin) + timedelta(seconds=seconds)).astimezone(UTC).isoformat(timespec="milliseconds")
    )


def _find_films(source: VideoSource, context: SourceContext, where: str) -> Iterator[Film | Rejected]:
    """Yield the videos of a file or a folder with their labels. Raises SourceError."""
    path = context.resolve(source.path)
    if path.is_file():
        root, files = path.parent, [ListedFile(path.name, str(path), make_stamp(path))]
    elif path.is_dir():
        root = path
        files = [one for one in list_files(root, f"{where} {root}") if is_video_name(one.relative)]
    else:
        found = "is no file and no folder" if path.exists() else "does not exist"
        raise SourceError(f"{where} {path}", found, "a video or a folder of them", "Check the path.")
    if not files:
        kinds = ", ".join(sorted(VIDEO_SUFFIXES)[:6])
        raise SourceError(f"{where} {path}", "holds no video", f"files like {kinds}", "Check the path.")
    if source.table is not None:
        yield from _match_table(source, context, where, {one.relative: one for one in files})
        return
    for one, place in zip(files, _place(source, context, f"{where} {root}", files), strict=True):
        if isinstance(place, str):
            yield Rejected(f"{source.name}:{escape_name(one.relative)}", "no_label", place)
        elif place is not None:
            part = Segment(0.0, None, place.labels, place.side, place.test_is_given, place.group)
            yield Film(one.relative, Path(one.path), [part])


def _place(
    source: VideoSource, context: SourceContext, where: str, files: Sequence[ListedFile]
) -> Sequence[Placement | str | None]:
    """Return labels and sides of videos: those of their folders, or `label` for all."""
    paths = [one.relative for one in files]
    sides = [find_side(path.partition("/")[0]) if "/" in path else None for path in paths]
    if source.label is None and any("/" in path for path in paths):
        return place_all(paths, where, context.tell, pattern=source.pattern, unlabelled=source.unlabelled)
    labels = () if source.label is None else (source.label,)
    if not labels:
        context.tell(f"{where}: no class folder, `label` or `table`: {len(files):,} videos come in for prediction only")
    settled = settle_sides({side for side in sides if side}, lambda line: context.tell(f"{where}: {line}"))
    return [Placement(labels, *settled[side]) if side else Placement(labels) for side in sides]


def _match_table(
    source: VideoSource, context: SourceContext, where: str, files: Mapping[str, ListedFile]
) -> Iterator[Film | Rejected]:
    """Yield the videos that a table names, then rows without a video and videos without a row."""
    assert source.table is not None
    table = read_segments(context.resolve(source.table), source, context, where, list(files))
    for relative, segments in table.segments.items():
        yield Film(relative, Path(files[relative].path), segments)
    yield from table.rejected
    for relative in files:
        if relative not in table.segments:
            origin = f"{source.name}:{escape_name(relative)}"
            yield Rejected(origin, "image_without_row", f"no row of {os.path.basename(source.table)} names it")


def _watch(source: VideoSource, context: SourceContext, spool: Spool, where: str) -> Iterator[Item | Rejected]:
    """Yield the frames of a camera, or of a video file that lies on a server."""
    labels = () if source.label is None else (source.label,)
    if not labels:
        context.tell(f"{where}: no `label`: its frames come in for prediction only")
    with open_camera(source, context, spool, where) as camera:
        if camera.file:
            film = Film(camera.stream.place, camera.file, [Segment(0.0, None, labels)])
            with Player() as player:
                yield from _read_film(film, source, context, _Tools(player, spool, None))
        else:
            yield from camera.watch(labels)
