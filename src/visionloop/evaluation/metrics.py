"""Figures of a classifier on labelled images, each with a 95 % interval. Pure: numpy only, random by seed.

Dimensions in names: n images, k classes, r resamples, b bins. A class is an index into `classes`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import ArrayLike, NDArray

from visionloop.evaluation.counts import (
    Counts,
    balanced_accuracy,
    compute_count_interval,
    macro_f1,
    make_counts,
    make_label_counts,
    micro_f1,
    weighted_f1,
)
from visionloop.evaluation.ranking import compute_auc, compute_mean_average_precision
from visionloop.evaluation.resampling import (
    FloatArray,
    IntArray,
    compute_key_interval,
    compute_share_interval,
    sum_keys,
)
from visionloop.records import Interval

TOP_K = (3, 5)
NUM_BINS = 10
CHUNK_ROWS = 1_000_000


@dataclass(frozen=True)
class ClassFigures:
    """The figures of one class, each with its interval; None where there is nothing to divide by.

    `support` is the number of its test images. `average_precision` is for multilabel only.
    """

    name: str
    precision: Interval | None
    recall: Interval | None
    f1: Interval | None
    support: int
    average_precision: float | None = None


@dataclass(frozen=True)
class ConfidenceBin:
    """The answers with a confidence in [low, high): their number, mean confidence and share of right answers."""

    low: float
    high: float
    count: int
    confidence: float
    accuracy: float


def compute_metrics(
    labels_n: IntArray,
    probs_nk: NDArray[np.floating],
    chosen_n: IntArray,
    classes: Sequence[str],
    key_n: IntArray,
    *,
    resamples: int,
    seed: int,
) -> dict[str, Interval]:
    """Compute the figures of answers with one label, each with its interval over keys.

    accuracy, balanced_accuracy, macro_f1, micro_f1, weighted_f1; top_3 and top_5 where there are more classes than
    that; log_loss, brier, ece; for two classes also auc, pr_auc, precision and recall of `classes[1]`. auc and pr_auc
    are left out if the labels hold only one class.
    """
    assert len(labels_n) == len(probs_nk) == len(chosen_n) == len(key_n) > 0, "one label and one answer per image"
    hits_n = labels_n == chosen_n
    figures = {"accuracy": compute_share(hits_n, key_n)}
    figures |= compute_count_figures(make_counts(labels_n, chosen_n, len(classes), key_n))
    figures["micro_f1"] = figures["accuracy"]  # with one label an image they are the same
    place_n = (probs_nk > probs_nk[np.arange(len(labels_n)), labels_n][:, None]).sum(axis=1)
    figures |= {f"top_{k}": compute_share(place_n < k, key_n) for k in TOP_K if k < len(classes)}
    figures["log_loss"] = compute_mean(compute_log_losses(labels_n, probs_nk), key_n)
    figures["brier"] = compute_mean(compute_brier(labels_n, probs_nk), key_n)
    confidence_n = probs_nk[np.arange(len(labels_n)), chosen_n]
    figures["ece"] = Interval(compute_calibration_error(compute_confidence_bins(confidence_n, hits_n)), None, None)
    if len(classes) == 2:
        figures |= _compute_binary(labels_n, probs_nk[:, 1], chosen_n, key_n, resamples=resamples, seed=seed)
    return figures


def _compute_binary(
    labels_n: IntArray,
    scores_n: NDArray[np.floating],
    chosen_n: IntArray,
    key_n: IntArray,
    *,
    resamples: int,
    seed: int,
) -> dict[str, Interval]:
    has_n, given_n, figures = labels_n == 1, chosen_n == 1, {}
    if 0 < has_n.sum() < len(has_n):
        figures["auc"] = compute_auc(has_n, scores_n, key_n)
        found = compute_mean_average_precision(has_n[:, None], scores_n[:, None], key_n, resamples=resamples, seed=seed)
        figures |= {"pr_auc": found} if found else {}
    shares = {"precision": compute_ratio(has_n, given_n, key_n), "recall": compute_ratio(given_n, has_n, key_n)}
    return figures | {name: found or Interval(0.0, 0.0, 1.0) for name, found in shares.items()}


def compute_count_figures(counts: Counts) -> dict[str, Interval]:
    """Compute the figures that depend on counts of classes alone."""
    figures = {
        "balanced_accuracy": balanced_accuracy,
        "macro_f1": macro_f1,
        "micro_f1": micro_f1,
        "weighted_f1": weighted_f1,
    }
    return {name: compute_count_interval(figure, counts) for name, figure in figures.items()}


def compute_share(hits_n: NDArray[np.bool_], key_n: IntArray) -> Interval:
    """Return the share of images that are right, with its interval."""
    return compute_share_interval(sum_keys(hits_n, key_n), sum_keys(np.ones(len(key_n)), key_n))


def compute_ratio(hits_n: NDArray[np.bool_], among_n: NDArray[np.bool_], key_n: IntArray) -> Interval | None:
    """Return the share of the images `among_n` that are right, with its interval; None if there are none."""
    return compute_share(hits_n[among_n], key_n[among_n]) if among_n.any() else None


def compute_mean(values_n: FloatArray, key_n: IntArray) -> Interval:
    """Return the mean of figures that are never negative, with its interval."""
    found = compute_key_interval(sum_keys(values_n, key_n), sum_keys(np.ones(len(key_n)), key_n))
    return found if found.low is None else Interval(found.value, max(found.low, 0.0), found.high)


def compute_brier(labels_n: IntArray, probs_nk: NDArray[np.floating]) -> FloatArray:
    """Return the squared error of the probabilities of each image, summed over classes: 0 to 2 (Brier 1950)."""
    truth_nk = np.arange(probs_nk.shape[1]) == labels_n[:, None]
    return np.asarray(((probs_nk - truth_nk) ** 2).sum(axis=1), np.float64)


def compute_macro_f1(labels_rn: ArrayLike, chosen_rn: ArrayLike, num_classes: int) -> FloatArray:
    """Return the macro F1 of each row of images, averaged over the classes that occur in that row's labels.

    F1 = 2 TP / (2 TP + FP + FN) (van Rijsbergen 1979). scikit-learn: f1_score(average="macro", labels=unique(labels)).
    """
    labels, chosen = np.atleast_2d(labels_rn), np.atleast_2d(chosen_rn)
    num_rows = len(labels)
    offsets = np.arange(num_rows)[:, None] * num_classes

    def count(keys: IntArray) -> IntArray:
        return np.bincount(keys.ravel(), minlength=num_rows * num_classes).reshape(num_rows, num_classes)

    support_rk, given_rk = count(labels + offsets), count(chosen + offsets)
    hits_rk = count((labels + offsets)[labels == chosen])
    f1_rk = np.where(support_rk > 0, 2 * hits_rk / np.maximum(support_rk + given_rk, 1), 0.0)
    return np.asarray(f1_rk.sum(axis=1) / (support_rk > 0).sum(axis=1))


def compute_log_losses(labels_n: IntArray, probs_nk: NDArray[np.floating]) -> FloatArray:
    """Return -ln of the probability given to each true class, at most 36 (clipped as scikit-learn's log_loss)."""
    true_n = probs_nk[np.arange(len(labels_n)), labels_n].astype(np.float64)
    return np.asarray(-np.log(np.clip(true_n, np.finfo(np.float64).eps, 1.0)))


def compute_confusion(labels_n: IntArray, chosen_n: IntArray, num_classes: int) -> IntArray:
    """Count images by actual class (row) and answered class (column)."""
    cells = np.bincount(labels_n * num_classes + chosen_n, minlength=num_classes**2)
    return np.asarray(cells.reshape(num_classes, num_classes))


def compute_class_figures(
    labels_n: IntArray, chosen_n: IntArray, classes: Sequence[str], key_n: IntArray
) -> list[ClassFigures]:
    """Return precision, recall, F1 and support of every class, in the order of `classes`."""
    return [make_class_figures(name, labels_n == k, chosen_n == k, key_n) for k, name in enumerate(classes)]


def make_class_figures(
    name: str, has_n: NDArray[np.bool_], given_n: NDArray[np.bool_], key_n: IntArray, average: float | None = None
) -> ClassFigures:
    """Return the figures of one class from the images that have it and those that are given it.

    F1 is a share too: of twice the hits among support plus given. Its interval is that of the figure of one class.
    """
    support = int(has_n.sum())
    f1 = None
    if support:
        f1 = compute_count_interval(macro_f1, make_label_counts(has_n[:, None], given_n[:, None], key_n))
    return ClassFigures(
        name,
        compute_ratio(has_n, given_n, key_n),
        compute_ratio(given_n, has_n, key_n),
        f1,
        support,
        average,
    )


def compute_confidence_bins(confidence_n: NDArray[np.floating], hits_n: NDArray[np.bool_]) -> list[ConfidenceBin]:
    """Sort answers into equal bins of confidence; empty bins are left out (reliability diagram: Guo et al. 2017)."""
    bin_n = np.minimum((confidence_n.astype(np.float64) * NUM_BINS).astype(np.int64), NUM_BINS - 1)
    bins = []
    for number in np.unique(bin_n):
        mine = bin_n == number
        confidence, accuracy = float(confidence_n[mine].mean(dtype=np.float64)), float(hits_n[mine].mean())
        bins.append(
            ConfidenceBin(number / NUM_BINS, (number + 1) / NUM_BINS, int(mine.sum()), confidence, accuracy),
        )
    return bins


def compute_equal_bins(
    confidence_n: NDArray[np.floating], hits_n: NDArray[np.bool_], num_bins: int = 10
) -> list[ConfidenceBin]:
    """Sort answers into bins of (nearly) equally many images, by confidence (Nguyen & O'Connor 2015, section 4.1).

    Equal confidences stay in one bin, so there may be fewer bins. Bins of equal width leave most of them almost empty
    where a model is sure of nearly all its answers.
    """
    order_n = np.argsort(confidence_n, kind="stable")
    sorted_n = confidence_n[order_n].astype(np.float64)
    cuts = [round(len(order_n) * place / num_bins) for place in range(1, num_bins)]
    starts = {0, *(int(np.searchsorted(sorted_n, sorted_n[cut])) for cut in cuts if cut < len(order_n))}
    bins = []
    for start, end in pairwise([*sorted(starts), len(order_n)]):
        mine, accuracy = sorted_n[start:end], float(hits_n[order_n[start:end]].mean())
        bins.append(ConfidenceBin(mine[0], mine[-1], end - start, float(mine.mean()), accuracy))
    return bins


def compute_calibration_error(bins: Sequence[ConfidenceBin]) -> float:
    """Return the expected calibration error: mean |confidence - accuracy|, weighted by count (Guo et al. 2017)."""
    total = sum(b.count for b in bins)
    return sum(b.count * abs(b.confidence - b.accuracy) for b in bins) / total if total else 0.0
