"""A bundle's answers on a test side, from the original bytes in the store, each model with its own card.

    scores/<bundle digest>/<test digest>.npz     probs (n, k) and chosen (n,), rows in the order of sha256

Dimensions in names: n test images, k classes.
"""

import io
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from visionloop.data.images import MAX_PIXELS, UInt8Array
from visionloop.data.manifest import make_image_key
from visionloop.errors import DatasetError, ObjectMissing
from visionloop.evaluation.metrics import IntArray
from visionloop.parallel import map_parallel
from visionloop.predictor import FloatArray, Predictor, choose_classes
from visionloop.records import ImageRecord, compute_digest
from visionloop.store import ObjectStore

BATCH_BYTES = 32 * 1024 * 1024
BATCH_IMAGES = 64


@dataclass(frozen=True)
class Scores:
    """Probabilities (n, k) and answers (n,) of one model, as indices into its own `classes`."""

    classes: tuple[str, ...]
    probs_nk: FloatArray
    chosen_n: IntArray


def select_test(records: Sequence[ImageRecord]) -> list[ImageRecord]:
    """Return the labelled images of the test side, sorted by sha256."""
    return sorted((r for r in records if r.side == "test" and r.labels), key=lambda r: r.sha256)


def compute_test_digest(tests: Sequence[ImageRecord]) -> str:
    """Return the digest of a test side: its images and their labels, whatever their order."""
    return compute_digest(sorted([r.sha256, sorted(r.labels)] for r in tests))


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
    """
    key = f"scores/{predictor.digest}/{compute_test_digest(tests)}.npz"
    if scores := _load_scores(store, key, predictor, len(tests)):
        return scores
    parts = []
    for images_nhwc in _read_batches(store, predictor, tests):
        parts.append(predictor.run(images_nhwc).probs_nk)
        on_progress(sum(len(p) for p in parts), len(tests))
    probs_nk = np.concatenate(parts)
    scores = Scores(predictor.card.classes, probs_nk, choose_classes(probs_nk, predictor.card.threshold))
    sink = io.BytesIO()
    np.savez(sink, probs=scores.probs_nk, chosen=scores.chosen_n)
    store.put(key, sink.getvalue())
    return scores


def map_scores(scores: Scores, classes: Sequence[str]) -> Scores:
    """Put answers into another model's order of classes, by name. `classes` must name all of the scores' classes."""
    columns = np.array([classes.index(name) for name in scores.classes])
    probs_nk = np.zeros((len(scores.probs_nk), len(classes)), np.float32)
    probs_nk[:, columns] = scores.probs_nk
    return Scores(tuple(classes), probs_nk, columns[scores.chosen_n])


def _load_scores(store: ObjectStore, key: str, predictor: Predictor, num_test: int) -> Scores | None:
    """Read cached answers; None when there are none, or they are damaged or do not fit."""
    try:
        with np.load(io.BytesIO(store.get(key)), allow_pickle=False) as file:
            probs_nk, chosen_n = file["probs"], file["chosen"]
    except (ObjectMissing, ValueError, KeyError, EOFError, OSError, zipfile.BadZipFile):
        return None
    num_classes = len(predictor.card.classes)
    if probs_nk.shape != (num_test, num_classes) or chosen_n.shape != (num_test,):
        return None
    return Scores(predictor.card.classes, probs_nk.astype(np.float32), chosen_n.astype(np.int64))


def _read_batches(store: ObjectStore, predictor: Predictor, tests: Sequence[ImageRecord]) -> Iterator[UInt8Array]:
    """Decode in threads and yield images (n, h, w, 3), so many at a time that memory stays flat."""

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
        # It was let in at its size; a limit lowered since then must not stop the gate.
        max_pixels = max(MAX_PIXELS, record.width * record.height)
        return predictor.decode(data, f"test image {record.sha256[:12]}", max_pixels=max_pixels)

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
