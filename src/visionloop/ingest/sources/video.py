"""Frames of videos: a file, a folder of them, or a camera (`ingest/video/cameras.py`).

Labels come from class folders, from `label`, or from a table (`ingest/video/segments.py`) of labelled parts.
The frames of a video are one group, so they are all on one side.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path

from visionloop.errors import SourceError
from visionloop.ingest.item import Item, SourceContext
from visionloop.ingest.paths.layout import Placement, place_all, settle_sides
from visionloop.ingest.paths.listing import (
    VIDEO_SUFFIXES,
    ListedFile,
    escape_name,
    find_side,
    is_video_name,
    list_files,
)
from visionloop.ingest.video.cameras import is_camera, open_camera
from visionloop.ingest.video.clip import DECODING, Clip, Index, Spool, make_stamp
from visionloop.ingest.video.segments import Segment, read_segments
from visionloop.params import VideoSource
from visionloop.records import Rejected
from visionloop.video.player import PASSING, Player, check_installed
from visionloop.video.sample import DecodeJob, find_spans


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
