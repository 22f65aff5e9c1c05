"""Figures that depend on counts of classes alone (F1, balanced accuracy), with intervals over keys. Pure.

Dimensions in names: g keys, n images, k classes, r rows.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from visionloop.evaluation.resampling import CHUNK_CELLS, FloatArray, IntArray, compute_score_interval, count_keys
from visionloop.records import Interval

AnyArray = NDArray[Any]  # counts, or true and false
# Of rows (r, k): how often each class is right, true and given. Returns a figure of each row (r,).
CountFigure = Callable[[FloatArray, FloatArray, FloatArray], FloatArray]
MIN_A_CLASS = 5  # keys
MOST_SMALL = 0.1  # of the classes may have fewer
TAIL = 0.025


@dataclass(frozen=True)
class Counts:
    """How often each class is right (`hits`), true (`support`) and given in the images of each key, (g, k).

    `times_g` says how many keys have the same row.
    """

    hits_gk: AnyArray
    support_gk: AnyArray
    given_gk: AnyArray
    times_g: IntArray

    @property
    def parts(self) -> tuple[AnyArray, AnyArray, AnyArray]:
        return self.hits_gk, self.support_gk, self.given_gk

    @property
    def num_keys(self) -> int:
        return int(self.times_g.sum())

    def total(self) -> tuple[FloatArray, FloatArray, FloatArray]:
        """Return the counts of all keys, (k,) each."""
        hits_k, support_k, given_k = (np.asarray(self.times_g @ part, np.float64) for part in self.parts)
        return hits_k, support_k, given_k


def make_counts(labels_n: IntArray, chosen_n: IntArray, num_classes: int, key_n: IntArray) -> Counts:
    """Count one label an image. Where every key is one image, equal pairs of label and answer share a row."""
    eye_kk = np.eye(num_classes, dtype=bool)
    if count_keys(key_n) < len(key_n):
        return make_label_counts(eye_kk[labels_n], eye_kk[chosen_n], key_n)
    cells, times_g = np.unique(labels_n * num_classes + chosen_n, return_counts=True)
    support_gk, given_gk = eye_kk[cells // num_classes], eye_kk[cells % num_classes]
    return Counts(support_gk & given_gk, support_gk, given_gk, times_g.astype(np.int64))


def make_label_counts(targets_nk: NDArray[np.bool_], chosen_nk: NDArray[np.bool_], key_n: IntArray) -> Counts:
    """Count several labels an image."""
    parts: list[AnyArray] = [targets_nk & chosen_nk, targets_nk, chosen_nk]
    code_n = np.unique(key_n, return_inverse=True)[1]
    num_keys = int(code_n.max()) + 1
    if num_keys < len(key_n):
        parts = [_sum_rows(part, code_n, num_keys) for part in parts]
    return Counts(parts[0], parts[1], parts[2], np.ones(num_keys, np.int64))


def _sum_rows(part_nk: AnyArray, code_n: IntArray, num_keys: int) -> IntArray:
    out_gk = np.zeros((num_keys, part_nk.shape[1]), np.int64)
    np.add.at(out_gk, code_n, part_nk)
    return out_gk


def macro_f1(hits_rk: FloatArray, support_rk: FloatArray, given_rk: FloatArray) -> FloatArray:
    """Return the mean F1 = 2 TP / (2 TP + FP + FN) of the classes that occur (van Rijsbergen 1979); 0 if none does."""
    return _average(_compute_f1(hits_rk, support_rk, given_rk), support_rk > 0)


def weighted_f1(hits_rk: FloatArray, support_rk: FloatArray, given_rk: FloatArray) -> FloatArray:
    """Return the mean F1 of the classes, weighted by their images. scikit-learn: f1_score(average="weighted")."""
    return _average(_compute_f1(hits_rk, support_rk, given_rk), support_rk)


def micro_f1(hits_rk: FloatArray, support_rk: FloatArray, given_rk: FloatArray) -> FloatArray:
    """Return the F1 over all pairs of image and class: with one label an image, accuracy. 0 without any label."""
    return np.asarray(2 * hits_rk.sum(axis=1) / np.maximum((support_rk + given_rk).sum(axis=1), 1))


def balanced_accuracy(hits_rk: FloatArray, support_rk: FloatArray, given_rk: FloatArray) -> FloatArray:
    """Return the mean recall of the classes that occur. scikit-learn: balanced_accuracy_score."""
    return _average(hits_rk / np.maximum(support_rk, 1), support_rk > 0)


def _compute_f1(hits_rk: FloatArray, support_rk: FloatArray, given_rk: FloatArray) -> FloatArray:
    return np.asarray(2 * hits_rk / np.maximum(support_rk + given_rk, 1))


def _average(values_rk: FloatArray, weight_rk: AnyArray) -> FloatArray:
    return np.asarray((values_rk * weight_rk).sum(axis=1) / np.maximum(weight_rk.sum(axis=1), 1))


def compute_count_interval(figure: CountFigure, counts: Counts) -> Interval:
    """Return a figure of the counts with its interval over keys.

    Each key is left out once (jackknife, Tukey 1958), which gives a variance and a bias (Quenouille 1956). Macro F1 of
    small classes is biased: by the jackknife's figure where the sizes of the classes are drawn, by almost nothing where
    they are fixed. The interval is centred between the two, and half their distance adds to its width. The rest is
    `compute_score_interval`. There is no interval if more than one class in ten that occur has fewer than 5 keys.
    """
    total = counts.total()
    value = float(figure(*(part_k[None] for part_k in total))[0])
    keys_k = counts.times_g.astype(np.float64) @ (counts.support_gk > 0)
    keys_k = keys_k[keys_k > 0]
    if has_few(keys_k):
        return Interval(value, None, None)
    number = counts.num_keys
    without_g = np.concatenate(list(_leave_out(figure, counts, total)))
    mean = float(counts.times_g @ without_g) / number
    variance = (number - 1) / number * float(counts.times_g @ (without_g - mean) ** 2)
    half_bias = (number - 1) * (mean - value) / 2
    return compute_score_interval(
        value,
        variance + half_bias**2,
        number - 1,
        center=value - half_bias,
        flawless=compute_flawless_bound(keys_k, number),
    )


def has_few(keys_k: FloatArray) -> bool:
    """Whether there are too few keys of the classes for an interval of a mean over classes."""
    return not len(keys_k) or bool((keys_k < MIN_A_CLASS).mean() > MOST_SMALL)


def _leave_out(figure: CountFigure, counts: Counts, total: tuple[FloatArray, ...]) -> Iterator[FloatArray]:
    """Yield the figure without each key, in blocks."""
    size = max(1, CHUNK_CELLS // counts.hits_gk.shape[1])
    for start in range(0, len(counts.times_g), size):
        hits_rk, support_rk, given_rk = (
            total_k - part[start : start + size] for total_k, part in zip(total, counts.parts, strict=True)
        )
        yield figure(hits_rk, support_rk, given_rk)


def compute_flawless_bound(keys_k: FloatArray, num_keys: int) -> float:
    """Return the lower bound of a mean of the recalls of classes, of `keys_k` keys each, where all are right.

    It is the lowest mean under which only right answers still have the probability TAIL: the rule of three (Hanley &
    Lippman-Hand 1983) for several classes. The lowest sum of recalls with a product of recall^keys = TAIL has recalls
    of min(1, m x keys), by Lagrange; m is found by halving. Example: one class of 30 images has 0.025^(1/30) = 0.884,
    two classes of 15 the same; of 30 and 5 images 0.739: the second class may be right in 48 % only. Where keys hold
    several classes, so that there are more pairs of key and class than `num_keys`, they count for no more than that.
    """
    keys_k = keys_k * min(1.0, num_keys / keys_k.sum())
    low, high = 0.0, 1 / float(keys_k.min())
    for _ in range(60):
        middle = (low + high) / 2
        is_low = (keys_k * np.log(np.minimum(1, middle * keys_k))).sum() < np.log(TAIL)
        low, high = (middle, high) if is_low else (low, middle)
    return float(np.minimum(1, high * keys_k).mean())
