"""A bundle's answers on a test side, from the original bytes in the store, with the preprocessing of its own card.

    scores/<bundle digest>/<test digest>-<engine>.npz     probs (n, k) and chosen, rows in the order of sha256

`engine` is a digest of the code and the libraries that answer: other ones may answer differently, and answer again.

`chosen` is one class for each image (n,), or for multilabel a bool for each class (n, k).

Dimensions in names: n test images, k classes.
"""

import functools
import io
import platform
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from statistics import median

import numpy as np
from numpy.typing import NDArray

from visionloop.code_digests import compute_module_digest
from visionloop.data.images import UInt8Array
from visionloop.data.manifest import make_image_key
from visionloop.errors import BundleError, DatasetError, ObjectMissing
from visionloop.evaluation.slices import MEASURES, measure_images
from visionloop.parallel import map_parallel
from visionloop.predictor import Choices, FloatArray, Predictor
from visionloop.records import ImageRecord, compute_digest
from visionloop.store import ObjectStore

BATCH_BYTES = 32 * 1024 * 1024
BATCH_IMAGES = 64
LATENCY_WARM, LATENCY_RUNS = 3, 30  # runs of one image before times count, and that count
ENGINE = ("onnxruntime", "numpy", "pillow", "simplejpeg")  # the libraries that turn bytes into answers


@dataclass(frozen=True)
class Scores:
    """Probabilities (n, k) and answers of one model: indices into its own `classes` (n,), or sets of them (n, k).

    `abstained_n` says for which images it does not know (n,); None if its card has no rule for that. `measures` are
    figures of the images as this model sees them (`measure_images`), (n,) each.
    """

    classes: tuple[str, ...]
    probs_nk: FloatArray
    chosen: Choices
    abstained_n: NDArray[np.bool_] | None = None
    measures: Mapping[str, NDArray[np.float64]] = field(default_factory=dict)


def select_test(records: Iterable[ImageRecord], *, with_negatives: bool = False) -> list[ImageRecord]:
    """Return the images of the test side, sorted by sha256: the labelled ones, or also those without a label."""
    tests = (r for r in records if r.side == "test" and (r.labels or with_negatives))
    return sorted(tests, key=lambda r: r.sha256)


def compute_test_digest(tests: Sequence[ImageRecord]) -> str:
    """Return the digest of a test side: over its images and their labels, in any order."""
    return compute_digest(sorted([r.sha256, sorted(r.labels)] for r in tests))


@functools.cache
def compute_engine_digest() -> str:
    """Return a digest of what turns the bytes of an image into an answer, besides the bundle: code and libraries."""
    versions = [f"{name} {version(name)}" for name in ENGINE]
    return compute_digest([compute_module_digest(__name__), *versions, platform.machine()])


def score_bundle(
    store: ObjectStore,
    predictor: Predictor,
    tests: Sequence[ImageRecord],
    *,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Scores:
    """Return a model's answers on a test side; computed once, then read from the store.

    Raises:
        DatasetError: an image is missing from the store. ImageError: one is damaged there.
        BundleError: an answer is no number.
    """
    key = f"scores/{predictor.digest}/{compute_test_digest(tests)}-{compute_engine_digest()[:12]}.npz"
    if scores := _load_scores(store, key, predictor, len(tests)):
        return scores
    parts, seen = [], []
    for images_nhwc in _read_batches(store, predictor, tests):
        parts.append(predictor.run(images_nhwc))
        seen.append(measure_images(images_nhwc))
        on_progress(sum(len(p.probs_nk) for p in parts), len(tests))
    probs_nk = np.concatenate([p.probs_nk for p in parts])
    _check_numbers(predictor, tests, probs_nk)
    abstained_n = np.concatenate([p.abstained_n for p in parts])
    measures = {name: np.concatenate([part[name] for part in seen]) for name in MEASURES}
    sink = io.BytesIO()
    np.savez(
        sink, probs=probs_nk, chosen=predictor.choose(probs_nk), abstained=abstained_n, measures=list(measures.values())
    )
    scores = _make_scores(predictor, probs_nk, predictor.choose(probs_nk), abstained_n, measures)
    store.put(key, sink.getvalue())
    return scores


def measure_latency(models: Sequence[Predictor], runs: int = LATENCY_RUNS) -> list[float]:
    """Return the median time in ms that each model takes for one image, measured in turns on this machine."""
    images = [np.zeros((1, *model.card.image_size, 3), np.uint8) for model in models]
    seconds: list[list[float]] = [[] for _ in models]
    for run in range(LATENCY_WARM + runs):
        for model, image_nhwc, mine in zip(models, images, seconds, strict=True):
            started = time.perf_counter()
            model.run(image_nhwc)
            if run >= LATENCY_WARM:
                mine.append(time.perf_counter() - started)
    return [round(1000 * median(mine), 3) for mine in seconds]


def map_scores(scores: Scores, classes: Sequence[str]) -> Scores:
    """Put answers into another model's order of classes, by name. `classes` must name all of the scores' classes."""
    columns = np.array([classes.index(name) for name in scores.classes])
    probs_nk = np.zeros((len(scores.probs_nk), len(classes)), np.float32)
    probs_nk[:, columns] = scores.probs_nk
    if scores.chosen.ndim == 1:
        return replace(scores, classes=tuple(classes), probs_nk=probs_nk, chosen=columns[scores.chosen])
    chosen_nk = np.zeros(probs_nk.shape, bool)
    chosen_nk[:, columns] = scores.chosen
    return replace(scores, classes=tuple(classes), probs_nk=probs_nk, chosen=chosen_nk)


def to_sets(scores: Scores) -> Scores:
    """Turn answers of one class for each image (n,) into sets of one (n, k). Sets are returned as they are."""
    if scores.chosen.ndim == 2:
        return scores
    chosen_nk = np.arange(len(scores.classes)) == scores.chosen[:, None]
    return replace(scores, chosen=chosen_nk)


def _check_numbers(predictor: Predictor, tests: Sequence[ImageRecord], probs_nk: FloatArray) -> None:
    """Raise BundleError if a probability is no number: it would count as the first class."""
    bad_n = np.flatnonzero(~np.isfinite(probs_nk).all(axis=1))
    if len(bad_n):
        raise BundleError(
            f"bundle {predictor.digest[:12]}",
            f"answers {len(bad_n):,} of {len(tests):,} test images with no number, first {tests[bad_n[0]].sha256[:12]}",
            "probabilities",
            "Train again; a smaller train.learning_rate may help.",
        )


def _load_scores(store: ObjectStore, key: str, predictor: Predictor, num_test: int) -> Scores | None:
    """Read cached answers. None if there are none, or if they are damaged, no numbers or of another shape."""
    try:
        with np.load(io.BytesIO(store.get(key)), allow_pickle=False) as file:
            probs_nk, chosen, abstained_n = file["probs"], file["chosen"], file["abstained"]
            measures = dict(zip(MEASURES, file["measures"], strict=True))
    except (ObjectMissing, ValueError, KeyError, EOFError, OSError, zipfile.BadZipFile):
        return None
    shape, is_several = (num_test, len(predictor.card.classes)), predictor.card.task == "multilabel"
    if probs_nk.shape != shape or chosen.shape != (shape if is_several else shape[:1]):
        return None
    if any(part.shape != shape[:1] for part in (abstained_n, *measures.values())) or not np.isfinite(probs_nk).all():
        return None
    chosen = chosen.astype(bool) if is_several else chosen.astype(np.int64)
    return _make_scores(predictor, probs_nk.astype(np.float32), chosen, abstained_n.astype(bool), measures)


def _make_scores(
    predictor: Predictor,
    probs_nk: FloatArray,
    chosen: Choices,
    abstained_n: NDArray[np.bool_],
    measures: Mapping[str, NDArray[np.float64]],
) -> Scores:
    return Scores(predictor.card.classes, probs_nk, chosen, abstained_n if predictor.card.abstain else None, measures)


def _read_batches(store: ObjectStore, predictor: Predictor, tests: Sequence[ImageRecord]) -> Iterator[UInt8Array]:
    """Decode in threads and yield images (n, h, w, 3) in batches of limited memory."""

    def decode(record: ImageRecord) -> UInt8Array:
        try:
            data = store.get(make_image_key(record.sha256))
        except ObjectMissing as exc:
            raise DatasetError(
                f"test image {record.sha256[:12]}",
                f"is not in the store {store.url}",
                "every image of the dataset version",
                "Set VISIONLOOP_STORE, or ingest its source again.",
            ) from exc
        # The image was accepted at this size: a pixel limit that was lowered since then must not stop the gate.
        where, max_pixels = f"test image {record.sha256[:12]}", record.width * record.height
        return predictor.decode(data, where, max_pixels=max_pixels)

    height, width = predictor.card.image_size
    size = max(1, min(BATCH_IMAGES, BATCH_BYTES // (height * width * 3)))
    waiting: list[UInt8Array] = []
    for array in map_parallel(decode, tests):
        waiting.append(array)
        if len(waiting) == size:
            yield np.stack(waiting)
            waiting = []
    if waiting:
        yield np.stack(waiting)
