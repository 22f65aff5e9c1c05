"""Figures of a classifier on labelled images, each with a 95 % interval. Pure: numpy only, random by seed.

Dimensions in names: n images, k classes, r resamples, g groups of equal scores. A class is an index into `classes`.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import ArrayLike, NDArray

from visionloop.records import Interval

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float64]
Statistic = Callable[[IntArray], FloatArray]

Z_95 = 1.959963984540054
TAILS_95 = (0.025, 0.975)
CHUNK_ROWS = 1_000_000


@dataclass(frozen=True)
class ClassFigures:
    """The figures of one class. A ratio with denominator 0 is 0, as in scikit-learn.

    `average_precision` is for multilabel only.
    """

    name: str
    precision: float
    recall: float
    f1: float
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
    *,
    resamples: int,
    seed: int,
) -> dict[str, Interval]:
    """Compute accuracy, macro_f1 and log_loss; for two classes also auc, precision and recall of `classes[1]`.

    accuracy, precision and recall have Wilson intervals, the others percentile bootstrap intervals over images (Efron &
    Tibshirani 1993, chapter 13). auc is left out if the labels hold only one class.
    """
    assert len(labels_n) == len(probs_nk) == len(chosen_n) > 0, "one label and one answer per image"
    losses_n = compute_log_losses(labels_n, probs_nk)
    statistics: dict[str, Statistic] = {
        "macro_f1": lambda rows_rn: compute_macro_f1(labels_n[rows_rn], chosen_n[rows_rn], len(classes)),
        "log_loss": lambda rows_rn: losses_n[rows_rn].mean(axis=1),
    }
    if len(classes) == 2 and len(np.unique(labels_n)) == 2:
        statistics["auc"] = make_auc(labels_n, probs_nk[:, 1])
    hits_n = labels_n == chosen_n
    figures = {"accuracy": compute_wilson(int(hits_n.sum()), len(hits_n))}
    figures |= compute_intervals(statistics, len(labels_n), resamples=resamples, seed=seed)
    if len(classes) == 2:
        positive_hits = int((hits_n & (labels_n == 1)).sum())
        figures["precision"] = compute_wilson(positive_hits, int((chosen_n == 1).sum()))
        figures["recall"] = compute_wilson(positive_hits, int((labels_n == 1).sum()))
    return figures


def compute_wilson(hits: int, trials: int) -> Interval:
    """Return a share with its 95 % score interval (Wilson 1927). Without trials it is 0, with the interval 0 to 1."""
    if trials == 0:
        return Interval(0.0, 0.0, 1.0)
    share, z2 = hits / trials, Z_95**2
    center = (share + z2 / (2 * trials)) / (1 + z2 / trials)
    half = Z_95 * np.sqrt(share * (1 - share) / trials + z2 / (4 * trials**2)) / (1 + z2 / trials)
    # For the shares 0 and 1 one bound is the share itself. Rounding must not move it past the share.
    return Interval(share, float(min(max(center - half, 0.0), share)), float(max(min(center + half, 1.0), share)))


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


def make_auc(labels_n: IntArray, scores_n: NDArray[np.floating]) -> Statistic:
    """Return the area under the ROC curve of class 1 as a function of rows: the Mann-Whitney U over all pairs.

    Ties count half (Hanley & McNeil 1982). NaN for rows that hold only one class.
    """
    group_n = np.unique(scores_n, return_inverse=True)[1]
    num_groups = int(group_n.max()) + 1
    key_n = group_n * 2 + labels_n

    def compute_auc(rows_rn: IntArray) -> FloatArray:
        offsets = np.arange(len(rows_rn))[:, None] * (2 * num_groups)
        counts = np.bincount((key_n[rows_rn] + offsets).ravel(), minlength=len(rows_rn) * 2 * num_groups)
        negative_rg, positive_rg = np.moveaxis(counts.reshape(len(rows_rn), num_groups, 2), 2, 0)
        below_rg = np.cumsum(negative_rg, axis=1) - negative_rg
        wins_r = (positive_rg * (below_rg + negative_rg / 2)).sum(axis=1)
        pairs_r = (positive_rg.sum(axis=1) * negative_rg.sum(axis=1)).astype(np.float64)
        return np.asarray(np.divide(wins_r, pairs_r, out=np.full(len(rows_rn), np.nan), where=pairs_r > 0))

    return compute_auc


def draw_rows(num_images: int, resamples: int, seed: int) -> Iterator[IntArray]:
    """Yield bootstrap resamples as row numbers (r, n), in blocks. Equal arguments give equal rows."""
    generator = np.random.default_rng(seed)
    size = max(1, CHUNK_ROWS // num_images)
    for start in range(0, resamples, size):
        yield generator.integers(0, num_images, size=(min(size, resamples - start), num_images))


def compute_confusion(labels_n: IntArray, chosen_n: IntArray, num_classes: int) -> IntArray:
    """Count images by actual class (row) and answered class (column)."""
    cells = np.bincount(labels_n * num_classes + chosen_n, minlength=num_classes**2)
    return np.asarray(cells.reshape(num_classes, num_classes))


def compute_class_figures(confusion_kk: IntArray, classes: Sequence[str]) -> list[ClassFigures]:
    """Return precision, recall, F1 and support of every class, in the order of `classes`."""
    hits_k, support_k, given_k = np.diag(confusion_kk), confusion_kk.sum(axis=1), confusion_kk.sum(axis=0)
    precision_k = hits_k / np.maximum(given_k, 1)
    recall_k = hits_k / np.maximum(support_k, 1)
    f1_k = 2 * hits_k / np.maximum(support_k + given_k, 1)
    return [
        ClassFigures(name, float(precision_k[i]), float(recall_k[i]), float(f1_k[i]), int(support_k[i]))
        for i, name in enumerate(classes)
    ]


def compute_confidence_bins(
    confidence_n: NDArray[np.floating], hits_n: NDArray[np.bool_], num_bins: int = 10
) -> list[ConfidenceBin]:
    """Sort answers into equal bins of confidence; empty bins are left out (reliability diagram: Guo et al. 2017)."""
    bin_n = np.minimum((confidence_n.astype(np.float64) * num_bins).astype(np.int64), num_bins - 1)
    bins = []
    for number in np.unique(bin_n):
        mine = bin_n == number
        confidence, accuracy = float(confidence_n[mine].mean(dtype=np.float64)), float(hits_n[mine].mean())
        bins.append(
            ConfidenceBin(number / num_bins, (number + 1) / num_bins, int(mine.sum()), confidence, accuracy),
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


def compute_intervals(
    statistics: dict[str, Statistic], num_images: int, *, resamples: int, seed: int
) -> dict[str, Interval]:
    """Return each statistic of all images with its percentile bootstrap interval, drawn by seed."""
    draws: dict[str, list[FloatArray]] = {name: [] for name in statistics}
    for rows_rn in draw_rows(num_images, resamples, seed):
        for name, statistic in statistics.items():
            draws[name].append(statistic(rows_rn))
    everything = np.arange(num_images)[None]
    intervals = {}
    for name, statistic in statistics.items():
        value = float(statistic(everything)[0])
        drawn_r = np.concatenate(draws[name])
        # The bootstrap interval of a biased statistic may not hold its value. It is widened until it does.
        low, high = np.nanquantile(drawn_r, TAILS_95) if not np.isnan(drawn_r).all() else (value, value)
        intervals[name] = Interval(value, min(float(low), value), max(float(high), value))
    return intervals
