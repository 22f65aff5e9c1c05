"""Figures of a model that may give an image several labels, each with a 95 % interval. Pure: numpy only, by seed.

Dimensions in names: n images, k classes, r resamples, g groups of equal scores. `targets_nk` and `chosen_nk` say which
classes an image has, and which the model says it has.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from visionloop.evaluation.metrics import (
    ClassFigures,
    FloatArray,
    IntArray,
    Statistic,
    compute_intervals,
    compute_wilson,
)
from visionloop.records import Interval

BoolArray = NDArray[np.bool_]
CLIP = np.finfo(np.float64).eps


@dataclass(frozen=True)
class LabelCounts:
    """How often a class is found (true positive), missed (false negative) and wrongly given (extra, false positive)."""

    name: str
    found: int
    missed: int
    extra: int


def compute_label_metrics(
    targets_nk: BoolArray,
    probs_nk: NDArray[np.floating],
    chosen_nk: BoolArray,
    *,
    resamples: int,
    seed: int,
) -> dict[str, Interval]:
    """Compute accuracy, macro_f1, micro_f1, map and log_loss.

    accuracy is the share of images with exactly the right labels (exact match), with a Wilson interval. The others have
    percentile bootstrap intervals over images (Efron & Tibshirani 1993, chapter 13). map is the mean of the average
    precisions of the classes that occur, and is left out if none occurs. log_loss is the mean binary cross-entropy over
    images and classes.
    """
    assert targets_nk.shape == probs_nk.shape == chosen_nk.shape and len(targets_nk) > 0, "a row for each image"
    losses_n = compute_label_losses(targets_nk, probs_nk).mean(axis=1)
    statistics: dict[str, Statistic] = {
        "macro_f1": make_macro_f1(targets_nk, chosen_nk),
        "micro_f1": make_micro_f1(targets_nk, chosen_nk),
        "map": make_map(targets_nk, probs_nk),
        "log_loss": lambda rows_rn: losses_n[rows_rn].mean(axis=1),
    }
    if not targets_nk.any():
        del statistics["map"]
    hits_n = (targets_nk == chosen_nk).all(axis=1)
    figures = {"accuracy": compute_wilson(int(hits_n.sum()), len(hits_n))}
    return figures | compute_intervals(statistics, len(targets_nk), resamples=resamples, seed=seed)


def compute_label_losses(targets_nk: BoolArray, probs_nk: NDArray[np.floating]) -> FloatArray:
    """Return -ln of the probability given to the truth, for each image and class (n, k), at most 36."""
    right_nk = np.where(targets_nk, probs_nk, 1 - probs_nk.astype(np.float64))
    return np.asarray(-np.log(np.clip(right_nk, CLIP, 1.0)))


def make_macro_f1(targets_nk: BoolArray, chosen_nk: BoolArray) -> Statistic:
    """Return the mean F1 of the classes that occur in some rows, as a function of these rows; 0 where none occurs.

    For one label an image it is `metrics.compute_macro_f1`.
    """
    hits_nk, given_nk, wanted_nk = _to_counts(targets_nk, chosen_nk)

    def compute(rows_rn: IntArray) -> FloatArray:
        times_rn = _count_rows(rows_rn, len(targets_nk))
        hits_rk, given_rk, wanted_rk = times_rn @ hits_nk, times_rn @ given_nk, times_rn @ wanted_nk
        f1_rk = 2 * hits_rk / np.maximum(wanted_rk + given_rk, 1)
        return np.asarray(f1_rk.sum(axis=1) / np.maximum((wanted_rk > 0).sum(axis=1), 1))

    return compute


def make_micro_f1(targets_nk: BoolArray, chosen_nk: BoolArray) -> Statistic:
    """Return the F1 over all pairs of image and class in some rows, as a function of these rows.

    0 if there is no label at all. scikit-learn: f1_score(average="micro").
    """
    hits_n, given_n, wanted_n = (counts_nk.sum(axis=1) for counts_nk in _to_counts(targets_nk, chosen_nk))

    def compute(rows_rn: IntArray) -> FloatArray:
        hits_r, sum_r = hits_n[rows_rn].sum(axis=1), (given_n + wanted_n)[rows_rn].sum(axis=1)
        return np.asarray(2 * hits_r / np.maximum(sum_r, 1))

    return compute


def make_map(targets_nk: BoolArray, probs_nk: NDArray[np.floating]) -> Statistic:
    """Return the mean average precision of the classes that occur in some rows, as a function of these rows.

    NaN for rows in which none occurs.
    """
    classes = [make_average_precision(targets_nk[:, k], probs_nk[:, k]) for k in range(targets_nk.shape[1])]

    def compute(rows_rn: IntArray) -> FloatArray:
        times_nr = np.ascontiguousarray(_count_rows(rows_rn, len(targets_nk)).T)
        sum_r, num_r = np.zeros(len(rows_rn)), np.zeros(len(rows_rn))
        for compute_class in classes:
            average_r = compute_class(times_nr)
            occurs_r = ~np.isnan(average_r)
            sum_r[occurs_r] += average_r[occurs_r]
            num_r += occurs_r
        return np.asarray(np.divide(sum_r, num_r, out=np.full(len(rows_rn), np.nan), where=num_r > 0))

    return compute


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


def compute_label_figures(
    targets_nk: BoolArray, probs_nk: NDArray[np.floating], chosen_nk: BoolArray, classes: Sequence[str]
) -> list[ClassFigures]:
    """Return precision, recall, F1, support and average precision of every class, in the order of `classes`."""
    hits_k, given_k, wanted_k = (counts_nk.sum(axis=0) for counts_nk in _to_counts(targets_nk, chosen_nk))
    once_nr = np.ones((len(targets_nk), 1))
    figures = []
    for k, name in enumerate(classes):
        average = float(make_average_precision(targets_nk[:, k], probs_nk[:, k])(once_nr)[0])
        one = ClassFigures(
            name=name,
            precision=float(hits_k[k] / max(given_k[k], 1)),
            recall=float(hits_k[k] / max(wanted_k[k], 1)),
            f1=float(2 * hits_k[k] / max(wanted_k[k] + given_k[k], 1)),
            support=int(wanted_k[k]),
            average_precision=0.0 if np.isnan(average) else average,
        )
        figures.append(one)
    return figures


def _to_counts(targets_nk: BoolArray, chosen_nk: BoolArray) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Return which labels are right, given and true, each (n, k), as 0.0 or 1.0: products are then exact and fast."""
    hits_nk = targets_nk & chosen_nk
    return hits_nk.astype(np.float64), chosen_nk.astype(np.float64), targets_nk.astype(np.float64)


def _count_rows(rows_rn: IntArray, num_images: int) -> FloatArray:
    """Return how often each image is in each row of a resample (r, n)."""
    keys_rn = rows_rn + np.arange(len(rows_rn))[:, None] * num_images
    times = np.bincount(keys_rn.ravel(), minlength=len(rows_rn) * num_images)
    return times.reshape(len(rows_rn), num_images).astype(np.float64)


def count_labels(targets_nk: BoolArray, chosen_nk: BoolArray, classes: Sequence[str]) -> list[LabelCounts]:
    """Count for each class the images in which it is found, missed, and wrongly given."""
    found_k = (targets_nk & chosen_nk).sum(axis=0)
    missed_k, extra_k = (targets_nk & ~chosen_nk).sum(axis=0), (chosen_nk & ~targets_nk).sum(axis=0)
    return [LabelCounts(name, int(found_k[k]), int(missed_k[k]), int(extra_k[k])) for k, name in enumerate(classes)]


def compute_swaps(targets_nk: BoolArray, chosen_nk: BoolArray) -> IntArray:
    """Count the images in which one class is missed (row) and another is wrongly given (column), (k, k).

    The diagonal counts the images in which a class is found. With one label an image this is the confusion matrix.
    """
    missed_nk, extra_nk = targets_nk & ~chosen_nk, chosen_nk & ~targets_nk
    swaps_kk = missed_nk.T.astype(np.float64) @ extra_nk.astype(np.float64)
    np.fill_diagonal(swaps_kk, (targets_nk & chosen_nk).sum(axis=0))
    return swaps_kk.astype(np.int64)
