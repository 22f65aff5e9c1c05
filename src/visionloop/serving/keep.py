"""Which answered images are kept, and how likely each was. Pure, but for the reference that is read from a bundle.

Whoever estimates something from the kept images weighs each by 1 / `keep_probability`: then unsure and novel images,
which are kept more often, do not count more. For that the probability must be exact, and not depend on the draw: it
follows from the image and from what was kept before it.

Dimensions: n images, d embedding size, r reference embeddings.
"""

import io
import random
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from visionloop.confidence import compute_distances, pick_reference
from visionloop.errors import BundleError
from visionloop.params import KeepImages
from visionloop.predictor import FloatArray, Predictor

NEIGHBOURS, MAX_REFERENCE = 5, 1000
BURST_S = 600  # what was not kept in this time may be kept at once


@dataclass(frozen=True)
class Choice:
    """Whether an image is kept, with which probability that was decided, and what spoke for it: None, nothing did."""

    is_kept: bool
    probability: float
    reason: str | None


class Throttle:
    """Lowers probabilities so that about `per_hour` images are kept, however many come.

    The factor halves for each `step` images that were kept above the budget, so it is never 0, and an image's chance
    does not depend on its own draw. Example, at 360 an hour: step is 18. At a rate of 3,600 an hour it settles where
    the factor is 0.1: 60 images above the budget.
    """

    def __init__(self, per_hour: int, now_s: float) -> None:
        self._rate_s, self._step = per_hour / 3600, max(1.0, per_hour / 20)
        self._debt, self._at_s = -self._rate_s * BURST_S, now_s

    def get_factor(self, now_s: float) -> float:
        """Return by how much the next probability is lowered: 1 is not at all."""
        earned = self._rate_s * max(0.0, now_s - self._at_s)
        self._debt, self._at_s = max(self._debt - earned, -self._rate_s * BURST_S), max(now_s, self._at_s)
        return float(2.0 ** -max(0.0, self._debt / self._step))

    def count(self) -> None:
        """Count an image that was kept."""
        self._debt += 1


class Keeper:
    """Decides for each image by the rules of `serve.keep_images`. Belongs to one thread."""

    def __init__(self, rules: KeepImages, *, now_s: float, draw: random.Random) -> None:
        self._rules, self._draw = rules, draw
        self._throttle = Throttle(rules.per_hour, now_s)
        self._digest = ""
        self._novelty: Novelty | None = None

    def choose(
        self, predictor: Predictor, confidence_n: Sequence[float], embedding_nd: FloatArray, now_s: float
    ) -> list[Choice]:
        """Decide for answered images, one after the other."""
        novel_n = self._find_novel(predictor, embedding_nd)
        return [self._choose(*one, now_s) for one in zip(confidence_n, novel_n, strict=True)]

    def _choose(self, confidence: float, is_novel: bool, now_s: float) -> Choice:
        """Decide by the likeliest reason: unsure and novel images are kept for certain, as far as the throttle lets."""
        rules = self._rules
        chances = {
            "confidence": float(rules.confidence is not None and not confidence >= rules.confidence),
            "novel": float(is_novel),
            "random": rules.random,
        }
        probability = max(chances.values()) * self._throttle.get_factor(now_s)
        is_kept = self._draw.random() < probability
        if is_kept:
            self._throttle.count()
        return Choice(is_kept, probability, "|".join(name for name, chance in chances.items() if chance) or None)

    def _find_novel(self, predictor: Predictor, embedding_nd: FloatArray) -> list[bool]:
        if self._rules.novel is None:
            return [False] * len(embedding_nd)
        if predictor.digest != self._digest:
            self._digest, self._novelty = predictor.digest, Novelty.load(predictor, self._rules.novel)
        return [False] * len(embedding_nd) if self._novelty is None else self._novelty.find(embedding_nd)


class Novelty:
    """Tells images that are farther from the validation images than nearly all of those are from each other."""

    def __init__(self, reference_rd: FloatArray, share: float) -> None:
        """`share` of the reference (rows of length 1) are not novel among the others."""
        self._reference_rd = reference_rd
        own = np.eye(len(reference_rd), dtype=bool)
        self.limit = float(
            np.quantile(compute_distances(reference_rd, reference_rd, NEIGHBOURS, without_nr=own), share)
        )

    @classmethod
    def load(cls, predictor: Predictor, share: float) -> "Novelty | None":
        """Read the reference of a bundle; None where it has too few embeddings, or they cannot be read any more."""
        try:
            with np.load(io.BytesIO(predictor.bundle.read("reference.npz")), allow_pickle=False) as arrays:
                embedding_rd = arrays["embedding_nd"]
        except (BundleError, ValueError, KeyError, zipfile.BadZipFile):
            return None
        if embedding_rd.ndim != 2 or len(embedding_rd) < 2 * NEIGHBOURS or not np.isfinite(embedding_rd).all():
            return None
        reference_rd = pick_reference(embedding_rd)
        step = -(-len(reference_rd) // MAX_REFERENCE)
        return cls(reference_rd[::step], share)

    def find(self, embedding_nd: FloatArray) -> list[bool]:
        """Say which of some embeddings are novel."""
        distances = compute_distances(embedding_nd, self._reference_rd, NEIGHBOURS)
        return [not distance <= self.limit for distance in distances.tolist()]
