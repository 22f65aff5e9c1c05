"""The validation images of a model that are nearest to an image, by the embeddings that its bundle holds.

They say on what a model's answer rests: images like this one, and their labels. Dimensions: n images, d embedding size.
"""

import zipfile
from dataclasses import dataclass

import numpy as np

from visionloop.bundle import Bundle
from visionloop.confidence import pick_rows
from visionloop.errors import DatasetError
from visionloop.features.neighbours import find_neighbours
from visionloop.predictor import FloatArray
from visionloop.serving.body import RequestError


@dataclass(frozen=True)
class Neighbour:
    """A validation image, by the sha256 of its file, and its cosine distance (0 to 2)."""

    sha256: str
    labels: tuple[str, ...]
    distance: float


class Reference:
    """The validation images of one model: at most 5,000, evenly picked; 26 MB at 1,280 numbers each."""

    def __init__(self, bundle: Bundle) -> None:
        """Raises RequestError for a bundle that does not say which images its embeddings are of."""
        classes, several = bundle.card.classes, None
        try:
            with np.load(bundle.folder / "reference.npz", allow_pickle=False) as arrays:
                sha256_n, label_n, embedding_nd = (arrays[k] for k in ("sha256_n", "label_n", "embedding_nd"))
                several = arrays.get("targets_nk")
            rows = pick_rows(len(sha256_n))
            self._embedding_nd: FloatArray = embedding_nd[rows].astype(np.float32)
            self._sha256_n = [sha256_n[row].decode() for row in rows]
            chosen = [np.flatnonzero(several[row]) if several is not None else [label_n[row]] for row in rows]
            self._labels_n = [tuple(classes[k] for k in each if k >= 0) for each in chosen]
        except (OSError, ValueError, KeyError, IndexError, AttributeError, zipfile.BadZipFile) as exc:
            found, todo = (
                "this model does not say which images it was judged with",
                "Ask a model that was trained anew.",
            )
            raise RequestError(found, todo=todo, status=409, reason_code="no_reference") from exc

    def find(self, embedding_d: FloatArray, k: int) -> list[Neighbour]:
        """Return the k nearest, nearest first. Raises RequestError."""
        try:
            distance_mk, row_mk = find_neighbours(embedding_d[None], self._embedding_nd, k)
        except DatasetError as exc:
            raise RequestError(exc.found, exc.expected, status=409, reason_code="no_reference") from exc
        pairs = zip(distance_mk[0], row_mk[0], strict=True)
        return [Neighbour(self._sha256_n[row], self._labels_n[row], float(distance)) for distance, row in pairs]
