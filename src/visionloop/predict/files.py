"""Answers for files: images and videos that are named, in folders, or the matches of globs."""

import contextlib
import fnmatch
import glob
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from visionloop.errors import ImageError, SourceError, shorten
from visionloop.ingest.paths.listing import is_video_name, list_files, list_images
from visionloop.ingest.paths.names import escape_name, is_passed, store_name
from visionloop.predictor import Predictor
from visionloop.records import Prediction
from visionloop.video.player import End, Frame, Player, check_installed
from visionloop.video.sample import DecodeJob
from visionloop.video.timeline import describe_timeline, make_timeline, measure_frames

REPORT_EVERY = 64
MAX_VIDEO_S, MAX_VIDEO_FRAMES = 24 * 3600.0, 1_000_000
OF_THE_WHOLE = ("prediction", "labels", "confidence", "abstained")


@dataclass(frozen=True)
class Sampling:
    """How a video is looked at: a frame every `every_s`; a change for less than `smooth_s` is taken for a flicker."""

    every_s: float = 0.5
    smooth_s: float = 1.0


@dataclass(frozen=True)
class FilePrediction:
    """The answer for one file: a prediction, or the reason why there is none. `path` is for tables, `shown` for people.

    Of a video it is the answer for the whole, with the mean probabilities over its time, and `video` has what
    `POST /predict/video` answers beside it: `segments`, `shares`, `duration_s`, `num_frames`, `notes` and so on.
    """

    path: str
    prediction: Prediction | None
    error: str | None = None
    video: Mapping[str, Any] | None = None

    @property
    def shown(self) -> str:
        """The path in one line that a terminal only shows."""
        return escape_name(self.path)


def find_new(paths: Sequence[str], folder: Path) -> tuple[list[Path], Path]:
    """Return the images of `paths` that no table in a folder answers yet, and the next table: 000001.parquet, ...

    A table bears the time at which its run began (`mtime`): a file that has changed since is answered again.

    Raises:
        SourceError: a path does not exist, or a table is damaged.
    """
    answered: dict[str, int] = {}
    tables = sorted(one for one in folder.glob("*.parquet") if one.stem.isdigit())
    for table in tables:
        answered |= dict.fromkeys(_read_paths(table), table.stat().st_mtime_ns)
    files = [one for path in paths for one in find_images([path], may_be_none=True)]
    new = [one for one in files if answered.get(store_name(str(one)), 0) < _read_change_ns(one)]
    return list(dict.fromkeys(new)), folder / f"{int(tables[-1].stem) + 1 if tables else 1:06d}.parquet"


def _read_change_ns(path: Path) -> int:
    """Return when a file was changed, or put where it is; 0 where it is gone again."""
    with contextlib.suppress(OSError):
        return path.stat().st_ctime_ns
    return 0


def _read_paths(table: Path) -> list[str]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return [str(one) for one in pq.read_table(table, columns=["path"])["path"].to_pylist()]
    except (pa.ArrowException, OSError, KeyError) as exc:
        todo = "Remove it: then its images are answered again."
        raise SourceError(str(table), "is damaged", "a table of answers", todo) from exc


def find_images(paths: Sequence[str], *, may_be_none: bool = False) -> list[Path]:
    """Return the files that are named, the images and videos in folders that are named, and the matches of globs.

    They are in that order.

    In folders, and below the wildcards of a glob, hidden files and systems' own are passed over and links are followed,
    as `ingest` does.

    Raises:
        SourceError: a path does not exist, or nothing matches.
    """
    files: list[Path] = []
    for text in paths:
        path = Path(text).expanduser()
        if path.is_dir():
            files += [Path(one.path) for one in list_images(path, text, with_videos=True)[0]]
        elif path.is_file():
            files.append(path)
        elif matches := _expand(path, text):
            files += matches
        elif not (may_be_none and glob.has_magic(text)):
            found = "matches nothing" if glob.has_magic(text) else "does not exist"
            shown = re.sub(r":[^@]*@", ":***@", text)  # an address of a camera with a slash too few
            raise SourceError(shown, found, "an image, a folder or a glob", "Check the path.")
    if not files and not may_be_none:
        raise SourceError(shorten(list(paths)), "no image there", "image files")
    return list(dict.fromkeys(files))


def _expand(pattern: Path, text: str) -> list[Path]:
    """Return the files that a glob stands for, sorted. Raises SourceError: a folder may not be read.

    `**` goes through folders as `ingest` does: `glob` would go round in a link that leads up, 40 times.
    """
    start = next((i for i, part in enumerate(pattern.parts) if glob.has_magic(part)), len(pattern.parts))
    root, wild = Path(*pattern.parts[:start]), pattern.parts[start:]
    if "**" in wild and root.is_dir():
        below = (found.relative for found in list_files(root, text) if _fits(found.relative.split("/"), wild))
    else:
        is_hidden_wanted = any(part.startswith(".") for part in wild)
        matches = glob.iglob(str(Path(*wild)), root_dir=root)
        below = (relative for relative in matches if is_hidden_wanted or not is_passed(Path(relative).as_posix()))
    return [file for file in sorted(root / relative for relative in below) if file.is_file()]


def _fits(parts: Sequence[str], wild: Sequence[str]) -> bool:
    """Say whether a path fits a glob, part by part; `**` is any number of folders, and at the end a file too."""
    if not wild or not parts:
        return not parts and all(part == "**" for part in wild)
    if wild[0] == "**":
        return _fits(parts, wild[1:]) or _fits(parts[1:], wild)
    return fnmatch.fnmatch(parts[0], wild[0]) and _fits(parts[1:], wild[1:])


def predict_files(
    predictor: Predictor,
    files: Sequence[Path],
    *,
    sampling: Sampling = Sampling(),
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Iterator[FilePrediction]:
    """Yield the answers for files, in their order; a file that cannot be used gets its reason."""
    number = 0
    with Player() as player:
        for is_video, some in groupby(files, lambda path: is_video_name(path.name)):
            paths = list(some)
            each = (
                (predict_video(predictor, path, sampling, player) for path in paths)
                if is_video
                else map(make_answer, paths, predictor.predict_each(paths))
            )
            for answer in each:
                number += 1
                if is_video or number % REPORT_EVERY == 0 or number == len(files):
                    on_progress(number, len(files))
                yield answer


def make_answer(path: Path, answer: Prediction | ImageError) -> FilePrediction:
    """Return an image's answer, or the reason why there is none, as that of its file."""
    if isinstance(answer, ImageError):
        return FilePrediction(store_name(str(path)), None, f"{answer.found}; expected {answer.expected}")
    return FilePrediction(store_name(str(path)), answer)


def predict_video(predictor: Predictor, path: Path, sampling: Sampling, player: Player) -> FilePrediction:
    """Answer for a video file: its frames, smoothed over time. One that ends early is answered as far as it goes."""
    name, times_s, ends = store_name(str(path)), list[float](), list[End]()
    try:
        check_installed(name)
    except SourceError as exc:
        return FilePrediction(name, None, f"{exc.found}; {exc.todo}")

    def read() -> Iterator[bytes]:
        for found in player.play(_make_job(path, sampling, predictor)):
            if isinstance(found, Frame):
                times_s.append(found.t_ms / 1000)
                yield found.jpeg
            elif isinstance(found, End):
                ends.append(found)

    rows, doubts = list[NDArray[np.float64]](), list[str | None]()  # an answer itself is ten times as large
    for one in predictor.predict_each(read()):
        if isinstance(one, Prediction):
            rows.append(np.array(list(one.probabilities.values())))
            doubts.append(one.abstained)
    end = ends[0]
    if not rows or len(rows) < len(times_s):  # the decoder's own JPEG files can be read
        return FilePrediction(name, None, f"its video {end.text or 'has no frame'}")
    probs_tk = np.array(rows)
    found = make_timeline(times_s, probs_tk, doubts, predictor.card, **vars(sampling), end_s=end.end_s)
    seconds_t = measure_frames(times_s, sampling.every_s, end.end_s)
    means = map(float, np.average(probs_tk, axis=0, weights=seconds_t))
    whole = Prediction(
        prediction=found.prediction,
        probabilities=dict(zip(predictor.card.classes, means, strict=True)),
        confidence=found.confidence,
        labels=found.labels,
        abstained=found.abstained,
    )
    notes = [*end.told, *([end.text] if end.text else [])]
    told = describe_timeline(found, len(times_s), notes, **vars(sampling))
    return FilePrediction(name, whole, video={key: told[key] for key in told if key not in OF_THE_WHOLE})


def _make_job(path: Path, sampling: Sampling, predictor: Predictor) -> DecodeJob:
    return DecodeJob(
        every_s=sampling.every_s,
        scene=None,
        spans=[(0.0, None)],
        max_frames=MAX_VIDEO_FRAMES,
        max_s=MAX_VIDEO_S,
        max_pixels=predictor.card.max_pixels,
        file=str(path.absolute()),
    )
