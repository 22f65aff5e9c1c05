"""How good are the answers, as far as one can know? From late labels, from the confidence, and which class grew. Pure.

Labels come for few images, late, and not at random: images that the model is unsure of are kept and asked about more
often. So each label stands for 1 / (the probability that its image was kept) images.

Dimensions: n images, g blocks, k classes, r resamples. A confusion matrix has the truth in its rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from visionloop.evaluation.resampling import (
    compute_key_interval,
    compute_score_interval,
    compute_wilson,
    draw_keys,
    find_t_quantile,
    sum_keys,
)
from visionloop.records import Interval

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]
BoolArray = NDArray[np.bool_]

MIN_LABELS = 30
RESAMPLES, LEAST_RESAMPLES = 400, 50
MAX_CELLS = 4_000_000  # of confusion matrices that are drawn at a time
ROUNDS = 300  # of the search for class shares
TINY = 1e-12


@dataclass(frozen=True)
class LabelledAccuracy:
    """The accuracy by labels; None with fewer than MIN_LABELS that have a known probability.

    `covered`: the share of all traffic that images like the labelled ones stand for. `num_unweighted` labels are of
    images whose probability of being kept is not known: they are counted, and not used.
    """

    accuracy: Interval | None
    num_labels: int
    num_unweighted: int
    covered: float


@dataclass(frozen=True)
class ClassShare:
    """How large a share of the images a class is, by BBSE: in the reference, and in the window with its interval."""

    name: str
    before: float
    now: Interval

    @property
    def grew(self) -> bool:
        """Whether luck alone does not explain the larger share."""
        return self.now.low is not None and self.now.low > self.before


def compute_labelled_accuracy(
    hit_n: BoolArray, labelled_n: BoolArray, probability_n: FloatArray, reason_n: Sequence[str], block_n: IntArray
) -> LabelledAccuracy:
    """Return the accuracy of all traffic from the labels of some images that were kept.

    `probability_n` is that of being kept, NaN where it is not known; `reason_n` why it was kept. Of the kept images of
    one reason the labelled ones stand for all (weighting classes: Little & Rubin 2002, section 3.3.2), so labels that
    are late, or given in some order of reasons, do no harm.

    The accuracy is a ratio of weighted sums (Hájek 1971). Example: of 98 sure images 2 % are kept and of 2 unsure ones
    all: labels of 2 sure ones, both right, and of 2 unsure ones, both wrong, are no accuracy of 50 %: the sure ones
    stand for 50 each, so it is 100 / 102 = 98 %.
    """
    known_n = np.isfinite(probability_n) & (probability_n > 0)
    used_n = labelled_n & known_n
    weight_n = np.where(known_n, 1 / np.where(known_n, probability_n, 1.0), 0.0)
    codes_n = np.unique(np.asarray(reason_n, np.str_), return_inverse=True)[1] if len(hit_n) else np.zeros(0, int)
    covered = 0.0
    for code in np.unique(codes_n[known_n]):
        cell_n = known_n & (codes_n == code)
        labelled = float(weight_n[cell_n & labelled_n].sum())
        if labelled:
            covered += float(weight_n[cell_n].sum())
            weight_n[cell_n] *= float(weight_n[cell_n].sum()) / labelled
    total = float(np.where(known_n, 1 / np.where(known_n, probability_n, 1.0), 0.0).sum())
    number, others = int(used_n.sum()), int((labelled_n & ~known_n).sum())
    share = covered / total if total else 0.0
    if number < MIN_LABELS:
        return LabelledAccuracy(None, number, others, share)
    return LabelledAccuracy(_weigh(hit_n[used_n], weight_n[used_n], block_n[used_n]), number, others, share)


def _weigh(hit_n: BoolArray, weight_n: FloatArray, block_n: IntArray) -> Interval:
    """Return a weighted share with its interval over blocks.

    Few labels with a large weight carry most of what is known, and their mistakes are rare: where none of them is wrong
    by luck, a variance says that all is known. So the number of images that it is worth is at most Kish's (1965).
    """
    hits_g, total_g = sum_keys(hit_n * weight_n, block_n), sum_keys(weight_n, block_n)
    plain = compute_key_interval(hits_g, total_g)
    if plain.high is None:
        return plain
    degrees = len(total_g) - 1
    number = float(total_g.sum() ** 2 / (total_g**2).sum())
    variance = ((plain.high - plain.value) / find_t_quantile(degrees)) ** 2
    variance = max(variance, plain.value * (1 - plain.value) / number)
    flawless = compute_wilson(number, number).low
    assert flawless is not None
    return compute_score_interval(plain.value, variance, degrees, flawless=flawless)


def compute_expected_accuracy(confidence_n: FloatArray, block_n: IntArray) -> Interval:
    """Return the accuracy that the confidence promises: its mean, with the interval over blocks.

    It is right while the confidence is calibrated (Guo et al. 2017), which holds for images like those it was
    calibrated on: not once they have drifted.
    """
    found = compute_key_interval(sum_keys(confidence_n, block_n), sum_keys(np.ones(len(confidence_n)), block_n))
    if found.low is None or found.high is None:
        return found
    return Interval(found.value, max(found.low, 0.0), min(found.high, 1.0))


def estimate_shares(confusion: FloatArray, answered_rk: FloatArray) -> FloatArray:
    """Return the true shares of classes, (r, k), from how often each was answered. `confusion`: (k, k) or (r, k, k).

    If images of a class look as before, and only their number has changed, then answered = true shares @ confusion, the
    latter as shares of each row: "black box shift estimation" (Lipton, Wang & Smola, "Detecting and correcting for
    label shift with black box predictors", ICML 2018). It is solved by the EM algorithm (Saerens, Latinne &
    Decaestecker 2002), which never gives a share below 0. Example: a model takes 10 % of the cats for dogs and no dog
    for a cat. Of 100 answers 45 are cat: 50 of the images are cats.

    A class without an image in the confusion matrix is taken to be always found.
    """
    empty = confusion.sum(axis=-1) == 0
    counts = confusion + empty[..., None] * np.eye(confusion.shape[-1])
    share = counts / counts.sum(axis=-1, keepdims=True)
    answered_rk = answered_rk / np.maximum(answered_rk.sum(axis=1, keepdims=True), TINY)
    found_rk = np.full_like(answered_rk, 1 / confusion.shape[-1])
    for _ in range(ROUNDS):
        before_rk = found_rk
        expected_rk = np.maximum(np.matmul(found_rk[:, None], share)[:, 0], TINY)
        found_rk = found_rk * np.matmul((answered_rk / expected_rk)[:, None], np.swapaxes(share, -1, -2))[:, 0]
        found_rk /= np.maximum(found_rk.sum(axis=1, keepdims=True), TINY)
        if np.abs(found_rk - before_rk).max() < 1e-7:
            break
    return found_rk


def compute_class_shares(
    classes: Sequence[str],
    confusion_kk: IntArray,
    reference_nk: BoolArray,
    window_nk: BoolArray,
    block_n: IntArray,
    *,
    seed: int = 0,
) -> list[ClassShare]:
    """Return each class's share before and now, the one that grew most first. `block_n` is of the window's images.

    The interval is from redrawn blocks of the window and redrawn validation images (percentiles of 95 %).
    """
    generator, counts_kk = np.random.default_rng(seed), confusion_kk.astype(np.float64)
    before_k = estimate_shares(counts_kk, reference_nk.sum(axis=0, dtype=np.float64)[None])[0]
    now_k = estimate_shares(counts_kk, window_nk.sum(axis=0, dtype=np.float64)[None])[0]
    sums_gk = sum_keys(window_nk, block_n)
    number_k = len(classes)
    resamples = max(LEAST_RESAMPLES, min(RESAMPLES, MAX_CELLS // number_k**2))
    drawn_rk = np.concatenate([draw_rg @ sums_gk for draw_rg in draw_keys(block_n, resamples, seed)])
    size = max(1, MAX_CELLS // number_k**2)
    found_rk = np.concatenate(
        [
            estimate_shares(generator.poisson(counts_kk, (len(part_rk), number_k, number_k)).astype(float), part_rk)
            for part_rk in (drawn_rk[start : start + size] for start in range(0, resamples, size))
        ]
    )
    low_k, high_k = np.quantile(found_rk, [0.025, 0.975], axis=0)
    shares = [
        ClassShare(name, float(before_k[k]), Interval(float(now_k[k]), float(low_k[k]), float(high_k[k])))
        for k, name in enumerate(classes)
    ]
    return sorted(shares, key=lambda one: (one.before - one.now.value, one.name))
