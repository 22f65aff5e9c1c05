"""Two models on the same images: exact tests, intervals and sample sizes. Pure; only the bootstrap of F1 has a seed.

What is drawn, flipped and counted is the key (a film, a patient, a family of near duplicates), never its images. Where
each key is one image, the tests are the usual ones of paired shares.

Dimensions in names: n images, g keys, k classes, r resamples, s sums (five for each class).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, sqrt
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from visionloop.evaluation.resampling import (
    compute_key_interval,
    draw_keys,
    find_t_quantile,
    sum_keys,
)
from visionloop.predictor import Choices

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float64]
BoolArray = NDArray[np.bool_]

MIN_KEYS = 6  # below them no statement about groups: with 5 equal ones, one side wins all of them in 3 % of cases
POWER = 0.8
STEPS = 60  # of a bisection: to the last bit


@dataclass(frozen=True)
class Pair:
    """Both models' answers for the same images, and the truth: classes (n,), or sets of labels (n, k)."""

    labels: Choices
    candidate: Choices
    champion: Choices
    key_n: IntArray
    num_classes: int

    def take(self, rows_n: IntArray) -> "Pair":
        """Return the pair on some of the images."""
        parts = (self.labels[rows_n], self.candidate[rows_n], self.champion[rows_n], self.key_n[rows_n])
        return Pair(*parts, self.num_classes)

    def count_hits(self) -> "Hits":
        """Count the right answers of both. Of several labels: exactly the true ones."""
        candidate_n, champion_n = (_find_hits(self.labels, each) for each in (self.candidate, self.champion))
        return count_hits(candidate_n, champion_n, self.key_n)

    def count_class_hits(self, k: int) -> "Hits | None":
        """Count the images of one class that both models find. None if there is no such image."""
        rows_n = np.flatnonzero(_has_class(self.labels, k))
        candidate_n, champion_n = (_has_class(each[rows_n], k) for each in (self.candidate, self.champion))
        return count_hits(candidate_n, champion_n, self.key_n[rows_n]) if len(rows_n) else None


@dataclass(frozen=True)
class Hits:
    """Right answers of two models, by key: `candidate_g`, `champion_g`, and the number of images `count_g`.

    `only_candidate` and `only_champion` are the images that one model alone answers rightly.
    """

    candidate_g: FloatArray
    champion_g: FloatArray
    count_g: FloatArray
    only_candidate: int
    only_champion: int

    @property
    def num_images(self) -> int:
        return int(self.count_g.sum())

    @property
    def difference_g(self) -> FloatArray:
        return self.candidate_g - self.champion_g

    @property
    def value(self) -> float:
        """The difference of the two shares of right answers, candidate minus champion."""
        return float(self.difference_g.sum() / self.count_g.sum())

    @property
    def are_images(self) -> bool:
        """Whether every key is one image."""
        return len(self.count_g) == self.num_images

    def swap(self) -> "Hits":
        """Return the same with the models in each other's place."""
        return Hits(self.champion_g, self.candidate_g, self.count_g, self.only_champion, self.only_candidate)

    def compute_p_above(self, line: float = 0.0) -> float:
        """Return the p-value of "the difference is above `line`": how likely data like these are if it is not.

        At and above 0 this is the exact test over keys (`compute_flip_p`; for images McNemar's, by the binomial). The
        score test of the line, and for keys the t test of their sums, must agree: the largest p counts. So a verdict
        never contradicts the interval that is shown, and groups never make it surer than the images alone would.
        """
        ps = [compute_score_p(self.only_candidate, self.only_champion, self.num_images, line)]
        if not self.are_images:
            ps.append(self._compute_t_p(line))
        if line >= 0:
            ps.append(compute_flip_p(self.difference_g))
        return max(ps)

    def compute_p_below(self, line: float = 0.0) -> float:
        """Return the p-value of "the difference is below `line`"."""
        return self.swap().compute_p_above(-line)

    def compute_interval(self, level: float) -> tuple[float, float]:
        """Return the interval of the difference: Tango's for images; for keys also the t interval, the wider counts."""
        low, high = compute_tango(self.only_candidate, self.only_champion, self.num_images, level)
        if self.are_images:
            return low, high
        if len(self.count_g) < MIN_KEYS:
            return -1.0, 1.0
        by_key = compute_key_interval(self.difference_g, self.count_g, level)
        assert by_key.low is not None and by_key.high is not None, "there are two keys or more"
        return max(min(low, by_key.low), -1.0), min(max(high, by_key.high), 1.0)

    def compute_error(self) -> float:
        """Return the standard error of the difference. One image that tells them apart is always assumed."""
        number, value = self.num_images, self.value
        share = (self.only_candidate + self.only_champion + 1) / number
        error = sqrt(max(share - value**2, 1 / number**2) / number)
        if self.are_images or len(self.count_g) < 2:
            return error
        return max(error, _compute_key_error(self.difference_g, self.count_g))

    def _compute_t_p(self, line: float) -> float:
        from scipy.special import stdtr

        if len(self.count_g) < MIN_KEYS:
            return 1.0
        error = _compute_key_error(self.difference_g, self.count_g)
        if error == 0:
            return 0.0 if self.value > line else 1.0
        return float(stdtr(len(self.count_g) - 1, -(self.value - line) / error))


def count_hits(candidate_n: BoolArray, champion_n: BoolArray, key_n: IntArray) -> Hits:
    """Count by key which images each model has right."""
    values_n3 = np.stack([candidate_n, champion_n, np.ones(len(key_n), bool)], axis=1)
    candidate_g, champion_g, count_g = sum_keys(values_n3, key_n).T
    only = [int((one & ~other).sum()) for one, other in ((candidate_n, champion_n), (champion_n, candidate_n))]
    return Hits(candidate_g, champion_g, count_g, *only)


def compute_flip_p(difference_g: ArrayLike) -> float:
    """Return how likely a sum at least this large is, if each key's difference were as likely with the other sign.

    That is so if the two models are equally good, however alike the images of a key are (sign-flip test: Fisher 1935,
    section 21; Pitman 1937). All sums are counted, none is drawn. Where each key is one image it is the exact test of
    McNemar (1947): `scipy.stats.binomtest(wins, wins + losses, 0.5, "greater")`.
    Example: 5 images that the candidate alone has right, 1 that the champion alone has: (6 + 1) / 2^6 = 0.109.
    """
    from scipy.special import bdtrc

    sizes, counts = np.unique(np.abs(np.asarray(difference_g, np.int64)), return_counts=True)
    sizes, counts = sizes[sizes > 0], counts[sizes > 0]
    total = int(np.sum(difference_g))
    if len(sizes) == 0:
        return 1.0
    if len(sizes) == 1:
        number = int(counts[0])
        wins = (total // int(sizes[0]) + number) // 2
        return float(bdtrc(wins - 1, number, 0.5)) if wins else 1.0
    shares, most = np.ones(1), int((sizes * counts).sum())
    for size, count in zip(sizes, counts, strict=True):
        shares = np.convolve(shares, _space_binomial(int(count), int(size)))
    # Place i holds the sum 2 i - most.
    return float(min(shares[(total + most) // 2 :].sum(), 1.0))


def compute_score_p(only_first: int, only_second: int, number: int, line: float) -> float:
    """Return the p-value of "the difference of two paired shares is above `line`" by the score test (Tango 1998)."""
    from scipy.special import ndtr

    return float(ndtr(-_compute_score(only_first, only_second, number, line)))


def compute_tango(only_first: int, only_second: int, number: int, level: float) -> tuple[float, float]:
    """Return the score interval of the difference of two paired shares (Tango 1998, Statistics in Medicine 17: 891).

    Its ends are where the score test is just not significant. Example: of 44 images the first model alone has 12 right,
    the second alone 2: the difference is 10 / 44 = 0.227, its 95 % interval 0.069 ... 0.386.
    """
    from scipy.special import ndtri

    limit, value = float(ndtri((1 + level) / 2)), (only_first - only_second) / number

    def find_end(inside: float, outside: float, sign: int) -> float:
        for _ in range(STEPS):
            middle = (inside + outside) / 2
            is_inside = sign * _compute_score(only_first, only_second, number, middle) < limit
            inside, outside = (middle, outside) if is_inside else (inside, middle)
        return (inside + outside) / 2

    return find_end(value, -1.0, 1), find_end(value, 1.0, -1)


def estimate_images(value: float, error: float, number: int, line: float, alpha: float) -> int | None:
    """Return how many images would show, with 80 % power, that a difference is above `line`, if it is as found.

    None if it was not found above the line. n = n0 ((z_alpha + z_power) error / (value - line))^2, from the standard
    error on n0 images (Lachin 1981; for paired shares Connor 1987). Example: 3 points with an error of 2 on 300 images
    at 5 %: 300 (2.486 x 2 / 3)^2 = 825.
    """
    from scipy.special import ndtri

    if value <= line:
        return None
    return ceil(number * ((float(ndtri(1 - alpha)) + float(ndtri(POWER))) * error / (value - line)) ** 2)


def find_dropped(p_values: Sequence[float], alpha: float) -> list[int]:
    """Return which of several tests are significant together: a false one among them has at most `alpha` (Holm 1979).

    The smallest of m p-values is held against alpha / m, the next against alpha / (m - 1), until one is above.
    """
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    found: list[int] = []
    for place, i in enumerate(order):
        if p_values[i] > alpha / (len(order) - place):
            break
        found.append(i)
    return found


def draw_f1_differences(pair: Pair, *, resamples: int, seed: int) -> tuple[float, float, FloatArray]:
    """Return macro F1 of candidate and champion, and the difference in each bootstrap resample of keys, (r,).

    The mean is over the classes that occur in the labels, as in `metrics.compute_macro_f1`. A resample holds the same
    keys for both models (Efron & Tibshirani 1993, chapters 8 and 13).
    """
    sums_ns = _count_answers(pair)
    sums_gs = _sum_rows(sums_ns, pair.key_n)
    draws = draw_keys(pair.key_n, resamples, seed)
    parts = [_compute_f1((sums_gs.T @ drawn_rg.T).T, pair.num_classes) for drawn_rg in draws]
    drawn_r = np.concatenate([candidate_r - champion_r for candidate_r, champion_r in parts])
    candidate, champion = _compute_f1(np.asarray(sums_ns.sum(axis=0)).reshape(1, -1), pair.num_classes)
    return float(candidate[0]), float(champion[0]), drawn_r.round(12)  # so that equal values do not differ


def widen_tail(alpha: float, num_keys: int) -> float:
    """Return the tail for bootstrap quantiles so that few keys are covered as Student's t would (Hesterberg 2015).

    The "expanded percentile interval": Phi(-sqrt(g / (g - 1)) t(alpha, g - 1)). With 16 keys, 5 % becomes 3.5 %.
    """
    from scipy.special import ndtr, stdtrit

    if num_keys < 2:
        return 0.0
    return float(ndtr(sqrt(num_keys / (num_keys - 1)) * stdtrit(num_keys - 1, alpha)))


def _find_hits(labels: Choices, chosen: Choices) -> BoolArray:
    same = np.equal(labels, chosen)
    return np.asarray(same if same.ndim == 1 else same.all(axis=1), bool)


def _has_class(choices: Choices, k: int) -> BoolArray:
    return np.asarray(choices[:, k] if choices.ndim == 2 else choices == k, bool)


def _compute_score(only_first: int, only_second: int, number: int, line: float) -> float:
    """Return the score statistic of "the difference is `line`"; the nuisance share is the likeliest under it."""
    linear = -(only_first + only_second) + line * (2 * number - only_first + only_second)
    constant = -only_second * line * (1 - line)
    share = (sqrt(max(linear**2 - 8 * number * constant, 0.0)) - linear) / (4 * number)
    variance = number * (2 * share + line * (1 - line))
    distance = only_first - only_second - number * line
    if variance <= 1e-12:
        return 0.0 if abs(distance) < 1e-9 else float(np.copysign(np.inf, distance))
    return distance / sqrt(variance)


def _compute_key_error(difference_g: FloatArray, count_g: FloatArray) -> float:
    interval = compute_key_interval(difference_g, count_g, 0.5)
    assert interval.high is not None, "there are two keys or more"
    return (interval.high - interval.value) / find_t_quantile(len(count_g) - 1, 0.5)


def _space_binomial(number: int, size: int) -> FloatArray:
    """Return the shares of 0 to `number` heads of a coin, `size` places apart."""
    from scipy.special import bdtr

    below = np.concatenate([[0.0], bdtr(np.arange(number + 1), number, 0.5)])
    spaced = np.zeros(number * size + 1)
    spaced[::size] = np.diff(below)
    return spaced


def _count_answers(pair: Pair) -> Any:
    """Return what each image counts for, as a sparse matrix (n, s): five times the classes.

    Its labels, then what the candidate answers and has right, then the same of the champion.
    """
    from scipy.sparse import csr_array, hstack

    answers = [pair.labels, pair.candidate, pair.champion]
    if pair.labels.ndim == 1:
        rows_n, ones_n, shape = (
            np.arange(len(pair.labels)),
            np.ones(len(pair.labels)),
            (len(pair.labels), pair.num_classes),
        )
        labels_nk, *chosen = (csr_array((ones_n, (rows_n, each)), shape=shape) for each in answers)
    else:
        labels_nk, *chosen = (csr_array(each.astype(np.float64)) for each in answers)
    return hstack([labels_nk, *(part for nk in chosen for part in (nk, nk.multiply(labels_nk)))], format="csr")


def _sum_rows(sums_ns: Any, key_n: IntArray) -> Any:
    """Sum the rows of the images of each key, in ascending order of keys: (g, s)."""
    from scipy.sparse import csr_array

    code_n = np.unique(key_n, return_inverse=True)[1]
    return csr_array((np.ones(len(key_n)), (code_n, np.arange(len(key_n))))) @ sums_ns


def _compute_f1(sums_rs: FloatArray, num_classes: int) -> tuple[FloatArray, FloatArray]:
    """Return macro F1 of candidate and champion for each row of sums, over the classes that occur in the labels."""
    parts = np.asarray(sums_rs).reshape(-1, 5, num_classes)
    wanted_rk, occurs_r = parts[:, 0], np.maximum((parts[:, 0] > 0).sum(axis=1), 1)
    f1 = [
        (np.where(wanted_rk > 0, 2 * hits_rk / np.maximum(wanted_rk + given_rk, 1), 0.0)).sum(axis=1) / occurs_r
        for given_rk, hits_rk in ((parts[:, 1], parts[:, 2]), (parts[:, 3], parts[:, 4]))
    ]
    return f1[0], f1[1]
