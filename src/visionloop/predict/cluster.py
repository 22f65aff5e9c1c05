"""Batch prediction on a Ray cluster: this machine reads the files, the nodes decode and answer.

A node takes the model from its folder where it has the same disk, else from the store. Videos are answered here.
"""

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from visionloop.bundle import download_bundle, load_bundle
from visionloop.data.inputs import read_image_file
from visionloop.errors import ImageError
from visionloop.ingest.paths.listing import is_video_name
from visionloop.parallel import Engine, map_chunks
from visionloop.predict.files import FilePrediction, make_answer
from visionloop.predictor import Predictor
from visionloop.records import Prediction
from visionloop.store import open_store
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
