"""How well scores put images of a class before the others: areas under ROC and precision-recall curves. Pure.

Dimensions in names: n images, k classes, r resamples, g keys; in average precision g groups of equal scores.
"""

from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

from visionloop.evaluation.counts import compute_flawless_bound, has_few
from visionloop.evaluation.resampling import (
    Z_95,
    FloatArray,
    IntArray,
    compute_score_interval,
    count_keys,
    draw_keys,
    sum_keys,
)
from visionloop.records import Interval

BoolArray = NDArray[np.bool_]
MAX_CELLS = 4_000_000


def compute_auc(has_n: BoolArray, scores_n: NDArray[np.floating], key_n: IntArray) -> Interval:
    """Return the area under the ROC curve with its interval. Both kinds of images must occur.

    The area is the Mann-Whitney U over all pairs, ties count half (Hanley & McNeil 1982). The interval is the score
    interval of Newcombe (2006, part 2, method 5): it stays wide at an area of 1, where the usual ones have no width.
    Example: 1 of 7 + 6 images is 0.73 ... 1. For keys of several images the numbers of images are divided by the design
    effect: the variance of the placements over keys (DeLong 1988, for groups Obuchowski 1997) to Newcombe's.
    """
    place_n = _compute_placements(has_n, scores_n)
    value = float(place_n[has_n].mean())
    positive, negative = int(has_n.sum()), int((~has_n).sum())
    effect = 1.0
    if count_keys(key_n) < len(key_n):
        effect = _compute_design_effect(place_n, has_n, key_n, value)
    low, high = _solve_newcombe(value, positive / effect, negative / effect)
    return Interval(value, low, high)


def _compute_placements(has_n: BoolArray, scores_n: NDArray[np.floating]) -> FloatArray:
    """Return for each image the share of images of the other kind that it is on the right side of (ties half)."""
    ordered = [np.sort(scores_n[~has_n]), np.sort(scores_n[has_n])]
    shares = []
    for others in ordered:
        below, upto = (np.searchsorted(others, scores_n, side=side) for side in ("left", "right"))
        shares.append((below + upto) / (2 * len(others)))
    return np.where(has_n, shares[0], 1 - shares[1])


def _compute_design_effect(place_n: FloatArray, has_n: BoolArray, key_n: IntArray, value: float) -> float:
    """Return how much larger the variance over keys is than over images; with few misplaced keys, as if more."""
    positive, negative = has_n.sum(), (~has_n).sum()
    share_n = (place_n - value) / np.where(has_n, positive, negative)
    number = count_keys(key_n)
    plain = _compute_newcombe_variance(value, float(positive), float(negative))
    most = max(positive / count_keys(key_n[has_n]), negative / count_keys(key_n[~has_n]))
    mixed = int((sum_keys(place_n < 1, key_n) > 0).sum())
    if number < 2 or plain <= 0:
        return float(most)
    found = number / (number - 1) * float((sum_keys(share_n, key_n) ** 2).sum()) / plain
    return float(max(1.0, found, (mixed * found + most) / (mixed + 1)))


def _compute_newcombe_variance(area: float, positive: float, negative: float) -> float:
    """Hanley & McNeil's variance for exponential scores, made the same for both kinds of images (Newcombe 2006)."""
    mean = (positive + negative) / 2 - 1
    inside = 1 + mean * (1 - area) / (2 - area) + mean * area / (1 + area)
    return area * (1 - area) * inside / (positive * negative)


def _solve_newcombe(value: float, positive: float, negative: float) -> tuple[float, float]:
    """Return the areas whose distance from `value` is 1.96 standard errors at that area, by halving."""

    def find(far: float) -> float:
        near = value
        for _ in range(60):
            middle = (near + far) / 2
            variance = max(_compute_newcombe_variance(middle, positive, negative), 0.0)
            near, far = (middle, far) if abs(middle - value) < Z_95 * variance**0.5 else (near, middle)
        return near

    return find(0.0), find(1.0)


def make_average_precision(targets_n: BoolArray, scores_n: NDArray[np.floating]) -> Callable[[FloatArray], FloatArray]:
    """Return the average precision of one class as a function of how often each image counts (n, r).

    From the highest score g = 1 downwards it is the sum of (R_g - R_g-1) P_g, where R is recall and P precision. There
    is no interpolation, and equal scores are one step (scikit-learn: average_precision_score). NaN if no image has the
    class.
    """
    order_n = np.argsort(-scores_n, kind="stable")
    has_n = targets_n[order_n]
    if not has_n.any():
        return lambda times_nr: np.full(times_nr.shape[1], np.nan)
    step_n = np.cumsum(np.append(True, np.diff(scores_n[order_n]) != 0)) - 1
    # Recall grows only at scores that an image of the class has, so only these steps add to the sum.
    rising_g, first_hit_g = np.unique(step_n[has_n], return_index=True)
    end_g = np.searchsorted(step_n, rising_g, side="right")
    start_g = np.append(0, end_g[:-1])

    def compute(times_nr: FloatArray) -> FloatArray:
        given_gr = np.cumsum(np.add.reduceat(times_nr[order_n[: end_g[-1]]], start_g, axis=0), axis=0)
        gained_gr = np.add.reduceat(times_nr[order_n[has_n]], first_hit_g, axis=0)
        hits_gr = np.cumsum(gained_gr, axis=0)
        sum_r = (gained_gr * hits_gr / np.maximum(given_gr, 1)).sum(axis=0)
        return np.asarray(np.divide(sum_r, hits_gr[-1], out=np.full(len(sum_r), np.nan), where=hits_gr[-1] > 0))

    return compute


def compute_mean_average_precision(
    targets_nk: BoolArray, scores_nk: NDArray[np.floating], key_n: IntArray, *, resamples: int, seed: int
) -> Interval | None:
    """Return the mean average precision of the classes that occur, with its interval. None if no class occurs.

    For one class it is the area under the precision-recall curve. The variance is that of the bootstrap over keys
    (Efron & Tibshirani 1993, chapter 6), the rest is `compute_score_interval`.
    """
    classes = [
        make_average_precision(targets_nk[:, k], scores_nk[:, k]) for k in np.flatnonzero(targets_nk.any(axis=0))
    ]
    if not classes:
        return None
    value = float(np.mean([compute(np.ones((len(key_n), 1)))[0] for compute in classes]))
    keys_k = (sum_keys(targets_nk, key_n) > 0).sum(axis=0)
    keys_k = keys_k[keys_k > 0].astype(np.float64)
    if has_few(keys_k):
        return Interval(value, None, None)
    drawn_r = np.concatenate(
        [_average([compute(times_nr) for compute in classes]) for times_nr in _draw_images(key_n, resamples, seed)]
    )
    number = count_keys(key_n)
    return compute_score_interval(
        value,
        float(np.var(drawn_r, ddof=1)),
        number - 1,
        flawless=compute_flawless_bound(keys_k, number),
    )


def _average(values: list[FloatArray]) -> FloatArray:
    """Return the mean over classes of each resample, without the classes that are not in it; 0 if none is."""
    values_kr = np.stack(values)
    drawn_kr = ~np.isnan(values_kr)
    return np.asarray(np.where(drawn_kr, values_kr, 0).sum(axis=0) / np.maximum(drawn_kr.sum(axis=0), 1))


def _draw_images(key_n: IntArray, resamples: int, seed: int) -> Iterator[FloatArray]:
    """Yield how often each image is drawn (n, r), if keys are drawn, in blocks of limited memory."""
    code_n = np.unique(key_n, return_inverse=True)[1]
    size = max(1, MAX_CELLS // len(key_n))
    for times_rg in draw_keys(key_n, resamples, seed):
        for start in range(0, len(times_rg), size):
            yield np.ascontiguousarray(times_rg[start : start + size, code_n].T)
