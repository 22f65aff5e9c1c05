"""The answers for many files, kept in chunks until their table is written, so that a run that was stopped goes on."""

import contextlib
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from visionloop.ingest.paths.listing import is_video_name
from visionloop.ingest.paths.names import escape_name
from visionloop.predict.cluster import SENT_IMAGES, Cluster
from visionloop.predict.files import FilePrediction, Sampling, predict_files
from visionloop.predict.tables import KAGGLE, Table, check_ids
from visionloop.predictor import Predictor
from visionloop.records import Prediction, canonical_json, compute_digest
from visionloop.workfolder import lock_work, write_file

CHUNK_IMAGES = 512
VIDEO_IMAGES = 64  # a video counts as so many: it takes as long


@contextlib.contextmanager
def predict_in_chunks(
    predictor: Predictor,
    files: Sequence[Path],
    table: Table,
    folder: Path,
    *,
    sampling: Sampling = Sampling(),  # noqa: B008 - it is frozen
    cluster: Cluster | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
    tell: Callable[[str], None] = lambda line: None,
) -> Iterator["Chunks"]:
    """Answer for files and keep the answers in `folder` until the block ends without an error.

    `cluster` None: on this machine.

    A run for the same table with the same model and files (paths, sizes, times) takes up the chunks that are there.

    Raises:
        SourceError: for kaggle, two files have the same id. BusyError: another process writes the same table.
    """
    if table.form == KAGGLE:
        check_ids(files)
    place = folder / compute_digest(str(table.out.absolute()))[:16]
    size = SENT_IMAGES if cluster else CHUNK_IMAGES
    with lock_work(place, _compute_key(predictor, files, [vars(sampling), size])) as work:
        chunks = Chunks(work)
        parts = _divide(files, size)
        waiting = {start: part for start, part in parts.items() if not chunks.has(start)}
        if found := len(files) - sum(map(len, waiting.values())):
            tell(f"{found:,} of {len(files):,} were answered by a run that stopped")
        if cluster:
            done = found
            for start, answers in _answer_there(cluster, predictor, waiting, sampling=sampling):
                chunks.keep(start, answers)
                done += len(answers)
                on_progress(done, len(files))
        for start, part in () if cluster else waiting.items():
            report = partial(_report, on_progress, start, len(files))
            chunks.keep(start, predict_files(predictor, part, sampling=sampling, on_progress=report))
        yield chunks
    shutil.rmtree(place, ignore_errors=True)


def _divide(files: Sequence[Path], size: int) -> dict[int, list[Path]]:
    """Return the files in parts, by the number of the first one in each."""
    parts: dict[int, list[Path]] = {}
    start, weight = 0, size
    for number, path in enumerate(files):
        if weight >= size:
            start, weight = number, 0
            parts[start] = []
        parts[start].append(path)
        weight += VIDEO_IMAGES if is_video_name(path.name) else 1
    return parts


def _answer_there(
    cluster: Cluster, predictor: Predictor, waiting: Mapping[int, Sequence[Path]], *, sampling: Sampling
) -> Iterator[tuple[int, list[FilePrediction]]]:
    """Yield the answers of a cluster, part by part, as they come; the videos between them are answered here."""
    for start, answers in cluster.answer(predictor, waiting):
        videos = [path for path, one in zip(waiting[start], answers, strict=True) if one is None]
        here = predict_files(predictor, videos, sampling=sampling)
        yield start, [next(here) if one is None else one for one in answers]


def _report(on_progress: Callable[[int, int], None], start: int, total: int, done: int, _: int) -> None:
    on_progress(start + done, total)


@dataclass(frozen=True)
class Chunks:
    """The answers so far, as JSON lines, one file a chunk."""

    folder: Path

    def has(self, start: int) -> bool:
        """Say whether the chunk that begins with this file is there."""
        return self._path(start).is_file()

    def keep(self, start: int, answers: Iterable[FilePrediction]) -> None:
        """Write a chunk, whole or not at all."""
        lines = [
            canonical_json([a.path, a.prediction.to_json() if a.prediction else None, a.error, a.video]) + b"\n"
            for a in answers
        ]
        write_file(self._path(start), b"".join(lines))

    def read(self) -> Iterator[FilePrediction]:
        """Yield all answers, in the order of the files."""
        for path in sorted(self.folder.glob("*.jsonl")):
            with path.open(encoding="utf-8", newline="\n") as file:
                for line in file:
                    name, answer, error, video = json.loads(line)
                    yield FilePrediction(name, Prediction.from_json(answer) if answer else None, error, video)

    def _path(self, start: int) -> Path:
        return self.folder / f"{start:012d}.jsonl"


def _compute_key(predictor: Predictor, files: Sequence[Path], wishes: Sequence[object]) -> str:
    """Return the digest of the model and of the files: their names, sizes and times."""
    facts = []
    for path in files:
        with contextlib.suppress(OSError):
            found = path.stat()
            facts.append([escape_name(str(path)), found.st_size, found.st_mtime_ns])
    return compute_digest([predictor.digest, predictor.engine, *wishes, facts])
