"""Figures of a model that may give an image several labels, each with a 95 % interval. Pure: numpy only, by seed.

Dimensions in names: n images, k classes, r resamples, g groups of equal scores. `targets_nk` and `chosen_nk` say which
classes an image has, and which the model says it has.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from visionloop.evaluation.counts import make_label_counts
from visionloop.evaluation.metrics import (
    ClassFigures,
    compute_calibration_error,
    compute_confidence_bins,
    compute_count_figures,
    compute_mean,
    compute_share,
    make_class_figures,
)
from visionloop.evaluation.ranking import compute_mean_average_precision, make_average_precision
from visionloop.evaluation.resampling import FloatArray, IntArray
from visionloop.records import Interval

Statistic = Callable[[IntArray], FloatArray]
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
    key_n: IntArray,
    *,
    resamples: int,
    seed: int,
) -> dict[str, Interval]:
    """Compute accuracy, balanced_accuracy, macro_f1, micro_f1, weighted_f1, map, log_loss, brier and ece.

    accuracy is the share of images with exactly the right labels (exact match). map is the mean of the average
    precisions of the classes that occur, and is left out if none occurs. log_loss and brier are means over images and
    classes; ece is that of all pairs of image and class.
    """
    assert targets_nk.shape == probs_nk.shape == chosen_nk.shape and len(targets_nk) > 0, "a row for each image"
    figures = {"accuracy": compute_share((targets_nk == chosen_nk).all(axis=1), key_n)}
    figures |= compute_count_figures(make_label_counts(targets_nk, chosen_nk, key_n))
    found = compute_mean_average_precision(targets_nk, probs_nk, key_n, resamples=resamples, seed=seed)
    figures |= {"map": found} if found else {}
    figures["log_loss"] = compute_mean(compute_label_losses(targets_nk, probs_nk).mean(axis=1), key_n)
    figures["brier"] = compute_mean(((probs_nk - targets_nk) ** 2).mean(axis=1), key_n)
    bins = compute_confidence_bins(probs_nk.ravel(), targets_nk.ravel())
    figures["ece"] = Interval(compute_calibration_error(bins), None, None)
    return figures


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


def compute_label_figures(
    targets_nk: BoolArray,
    probs_nk: NDArray[np.floating],
    chosen_nk: BoolArray,
    classes: Sequence[str],
    key_n: IntArray,
) -> list[ClassFigures]:
    """Return precision, recall, F1, support and average precision of every class, in the order of `classes`."""
    once_nr = np.ones((len(targets_nk), 1))
    figures = []
    for k, name in enumerate(classes):
        average = float(make_average_precision(targets_nk[:, k], probs_nk[:, k])(once_nr)[0])
        shown = None if np.isnan(average) else average
        figures.append(make_class_figures(name, targets_nk[:, k], chosen_nk[:, k], key_n, shown))
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
