"""Which images are worth a label: a share by lot, and of the rest those that are unsure, or new, and unlike each other.

Pure. Dimensions: n images, d embedding size, r images that are known already.

By lot: each image of the traffic has the same probability, though the server keeps unsure images more often: an image
that was kept with probability k is drawn with one in proportion to 1 / k (systematic sampling, Madow 1949). Example:
2 images were kept for certain, and 2 of 100 others, each with k = 0.02. To draw 2: the weights are 1, 1, 50, 50; an
unsure one is drawn with 2 / 102, another with 100 / 102, and both are 2 of 102 images of the traffic.

The rest: k-means++ (Arthur & Vassilvitskii 2007) with the known images as its first centres. An image is drawn in
proportion to the square of its distance to the nearest image that is known or drawn, times its doubt. So a new look is
asked about, but not fifty times the same picture; and one odd image is not all that counts, as with the farthest point.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from visionloop.confidence import compute_distances, scale_to_one

FloatArray = NDArray[np.float64]
Float32Array = NDArray[np.float32]
IntArray = NDArray[np.int64]
BoolArray = NDArray[np.bool_]

NEIGHBOURS, NOVEL_SHARE = 5, 0.95  # new: farther from the known images than this share of them is from the others
LEAST_DOUBT = 0.1  # of an image that the model is sure of: a sure answer to a new look may be wrong
UNSURE_BELOW = 0.8  # a confidence; where serve.keep_images does not say one
UNCERTAIN, NOVEL, SPREAD = "uncertain", "novel", "spread"  # spread: neither, only unlike what is known


@dataclass(frozen=True)
class Candidates:
    """Images that may be asked about. `embedding_nd`: rows of NaN where there is none. `known_rd`: of known images."""

    embedding_nd: Float32Array
    confidence_n: FloatArray
    known_rd: Float32Array


def draw_by_lot(keep_n: FloatArray, count: int, seed: Sequence[int]) -> tuple[IntArray, FloatArray]:
    """Draw images that were kept with some probability; return them, and the probability of each in the traffic."""
    number = len(keep_n)
    if count <= 0 or not number:
        return np.zeros(0, np.int64), np.zeros(0)
    chance_n = _share_out(1 / keep_n, min(count, number))
    generator = np.random.default_rng(seed)
    order_n = generator.permutation(number)
    ends_n = np.cumsum(chance_n[order_n])
    marks = generator.random() + np.arange(round(float(ends_n[-1])))
    rows = np.sort(order_n[np.minimum(np.searchsorted(ends_n, marks), number - 1)])
    return rows.astype(np.int64), chance_n[rows] * keep_n[rows]


def _share_out(weight_n: FloatArray, count: int) -> FloatArray:
    """Return probabilities in proportion to weights, at most 1, whose sum is `count`."""
    chance_n, sure_n = np.zeros(len(weight_n)), np.zeros(len(weight_n), bool)
    while True:
        left = count - int(sure_n.sum())
        chance_n = np.where(sure_n, 1.0, weight_n * (left / max(float(weight_n[~sure_n].sum()), 1e-300)))
        if not (chance_n > 1).any():
            return chance_n
        sure_n |= chance_n >= 1


def choose_spread(candidates: Candidates, count: int, seed: Sequence[int]) -> IntArray:
    """Choose images that are unsure or new, and unlike each other and the known ones; in the order of the choice."""
    number = len(candidates.confidence_n)
    doubt_n = LEAST_DOUBT + 1 - np.clip(np.nan_to_num(candidates.confidence_n), 0, 1)
    has_place_n = np.asarray(np.isfinite(candidates.embedding_nd).all(axis=1), bool)
    unit_nd = scale_to_one(np.where(has_place_n[:, None], candidates.embedding_nd, 0.0))
    near_n = _find_nearest(unit_nd, scale_to_one(candidates.known_rd))
    generator, free_n, chosen = np.random.default_rng(seed), np.ones(number, bool), list[int]()
    while len(chosen) < min(count, number):
        near_n[~has_place_n] = np.median(near_n[has_place_n & free_n]) if (has_place_n & free_n).any() else 1.0
        weight_n = np.where(free_n, near_n * doubt_n, 0.0)
        if not weight_n.sum() > 0:  # all that is left is like what is known
            weight_n = np.where(free_n, doubt_n, 0.0)
        row = int(generator.choice(number, p=weight_n / weight_n.sum()))
        chosen.append(row)
        free_n[row] = False
        if has_place_n[row]:
            near_n = np.minimum(near_n, _find_nearest(unit_nd, unit_nd[row : row + 1]))
    return np.asarray(chosen, np.int64)


def _find_nearest(unit_nd: Float32Array, centre_rd: Float32Array) -> FloatArray:
    """Return the squared distance of each to the nearest centre; 1 where there is none. What is equal is exactly 0."""
    if not len(centre_rd) or centre_rd.shape[1] != unit_nd.shape[1]:
        return np.ones(len(unit_nd))
    squared_n = 2 - 2 * np.max(unit_nd @ centre_rd.T, axis=1).astype(np.float64)
    return np.where(squared_n < 1e-6, 0.0, squared_n)


def find_novel(candidates: Candidates) -> BoolArray:
    """Say which images are farther from the known ones than nearly all of those are from each other."""
    known_rd, found_n = scale_to_one(candidates.known_rd), np.zeros(len(candidates.confidence_n), bool)
    has_place_n = np.asarray(np.isfinite(candidates.embedding_nd).all(axis=1), bool)
    if len(known_rd) < 2 * NEIGHBOURS or known_rd.shape[1] != candidates.embedding_nd.shape[1]:
        return found_n
    own = np.eye(len(known_rd), dtype=bool)
    limit = np.quantile(compute_distances(known_rd, known_rd, NEIGHBOURS, without_nr=own), NOVEL_SHARE)
    if has_place_n.any():
        found_n[has_place_n] = compute_distances(candidates.embedding_nd[has_place_n], known_rd, NEIGHBOURS) > limit
    return found_n
