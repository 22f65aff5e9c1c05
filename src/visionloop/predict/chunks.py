"""The answers for many files, kept in chunks until their table is written, so that a run that was stopped goes on.

They are answered on this machine, or on a Ray cluster: then this machine reads the files, the nodes decode and answer.
A node takes the model from its folder where it has the same disk, else from the store. Videos are answered here.
"""

import contextlib
import json
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

from visionloop.bundle import download_bundle, load_bundle
from visionloop.data.inputs import read_image_file
from visionloop.errors import ImageError
from visionloop.ingest.paths.listing import is_video_name
from visionloop.ingest.paths.names import escape_name
from visionloop.parallel import Engine, map_chunks
from visionloop.predict.files import FilePrediction, Sampling, make_answer, predict_files
from visionloop.predict.tables import KAGGLE, Table, check_ids
from visionloop.predictor import Predictor
from visionloop.records import Prediction, canonical_json, compute_digest
from visionloop.store import open_store
from visionloop.workfolder import lock_work, write_file
from visionloop.workspace import Workspace

SENT_IMAGES = 64  # whose bytes travel together
HELD_CHUNKS = 8


@dataclass(frozen=True)
class Cluster:
    """A Ray cluster (`address` None: one on this machine while it works), and the store that its nodes reach."""

    address: str | None
    store_url: str

    @classmethod
    def plan(cls, workspace: Workspace) -> "Cluster | None":
        """Return the cluster of `compute`; None: everything is done on this machine."""
        compute = workspace.params.compute
        return cls(compute.address, workspace.settings.store_url) if compute.engine == "ray" else None

    def answer(
        self, predictor: Predictor, parts: Mapping[int, Sequence[Path]]
    ) -> Iterator[tuple[int, list[FilePrediction | None]]]:
        """Yield the number of each part and the answers for its files, as they are ready; None for a video.

        Raises:
            ParamsError: Ray is not installed or cannot be reached. BundleError, StoreError: a node gets no model.
        """
        bundle = predictor.bundle
        work = _NodeWork(self.store_url, bundle.digest, str(bundle.folder.absolute()), predictor.engine)
        loads = (_Load(start, [_read(path) for path in part]) for start, part in parts.items())
        for start, answers in map_chunks(work, loads, Engine("ray", self.address), max_held=HELD_CHUNKS):
            pairs = zip(parts[start], answers, strict=True)
            yield start, [None if one is None else make_answer(path, one) for path, one in pairs]


@dataclass(frozen=True)
class _Load:
    """A part on its way: the bytes of its images, what is wrong with those that cannot be read, None for videos."""

    start: int
    images: Sequence[bytes | ImageError | None]


def _read(path: Path) -> bytes | ImageError | None:
    if is_video_name(path.name):
        return None
    try:
        return read_image_file(str(path))
    except ImageError as exc:
        return exc


@dataclass(frozen=True)
class _NodeWork:
    """What a node does. It is sent to the nodes, so it holds only words."""

    store_url: str
    digest: str
    folder: str
    engine: str

    def __call__(self, load: _Load) -> tuple[int, list[Prediction | ImageError | None]]:
        """Answer for the images of a part; what is no image stays as it is."""
        predictor = _open_here(self.store_url, self.digest, self.folder, self.engine)
        answers = predictor.predict_each(one for one in load.images if isinstance(one, bytes))
        return load.start, [next(answers) if isinstance(one, bytes) else one for one in load.images]


@lru_cache(maxsize=1)
def _open_here(store_url: str, digest: str, folder: str, engine: str) -> Predictor:
    """Open the model on a node, once for each process. Raises BundleError, StoreError."""
    with tempfile.TemporaryDirectory(prefix="visionloop-") as place:
        if Path(folder).is_dir():
            bundle = load_bundle(Path(folder), expected_digest=digest)
        else:
            bundle = download_bundle(open_store(store_url), digest, Path(place))
        predictor = Predictor(bundle, threads=1, engine=engine)
        predictor.check_golden()
        return predictor


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
