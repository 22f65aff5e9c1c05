"""From which probability on a class is the answer: chosen on the validation side for what is wanted. Pure.

    max_f1               the threshold with the best F1 there
    {precision: 0.95}    the lowest from which 95 % of what is given is right, promised by a bound (`promises.py`)
    {recall: 0.9}        the highest with which 90 % of the class is found, promised by Wilks' tolerance limit
    {cost: {...}}        the least cost of mistakes there

A promise is of one class by itself, and holds with probability 0.95. Where a threshold does equally well from one value
to another, the one nearest to theory is taken: 0.5 for F1; for costs c(false positive) / (c(false positive) + c(false
negative)), which is best for true probabilities (Elkan, "The foundations of cost-sensitive learning", 2001).

Dimensions: n images, c cuts.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from visionloop.evaluation.promises import BoolArray, FloatArray, IntArray, bound_share_above, find_promise
from visionloop.params.train import Threshold

DELTA = 0.05
PLAIN = 0.5


@dataclass(frozen=True)
class Sweep:
    """What each cut gives: answers yes from `cut_c` on, so many of them right, wrong, and missed."""

    cut_c: FloatArray
    found_c: IntArray
    extra_c: IntArray
    missed_c: IntArray

    @property
    def precision_c(self) -> FloatArray:
        """The share of what is given that is right; 1 where nothing is given."""
        given_c = self.found_c + self.extra_c
        return np.where(given_c > 0, self.found_c / np.maximum(given_c, 1), 1.0)

    @property
    def recall_c(self) -> FloatArray:
        return np.asarray(self.found_c / np.maximum(self.found_c + self.missed_c, 1))

    @property
    def f1_c(self) -> FloatArray:
        return np.asarray(2 * self.found_c / np.maximum(2 * self.found_c + self.extra_c + self.missed_c, 1))


@dataclass(frozen=True)
class Chosen:
    """A threshold, and how it came to be, in words. `promised` is the bound that holds; None: none was asked for.

    `is_kept` False: the wanted precision or recall cannot be promised, and this is the best there is.
    """

    threshold: float
    words: str
    promised: float | None = None
    is_kept: bool = True


def sweep_thresholds(score_n: NDArray[np.floating], truth_n: BoolArray, prefer: float = PLAIN) -> Sweep:
    """Count what every cut gives: 0, `prefer`, and the middles between neighbouring scores."""
    scores = np.unique(score_n.astype(np.float64))
    top = [(scores[-1] + 1) / 2] if len(scores) and scores[-1] < 1 else []
    cut_c = np.unique(np.concatenate([[0.0, prefer], (scores[1:] + scores[:-1]) / 2, top]))
    yes, no = np.sort(score_n[truth_n].astype(np.float64)), np.sort(score_n[~truth_n].astype(np.float64))
    found_c = len(yes) - np.searchsorted(yes, cut_c, side="left")
    extra_c = len(no) - np.searchsorted(no, cut_c, side="left")
    return Sweep(cut_c, found_c.astype(np.int64), extra_c.astype(np.int64), (len(yes) - found_c).astype(np.int64))


def choose_threshold(
    score_n: NDArray[np.floating], truth_n: BoolArray, single_n: IntArray, wanted: Threshold
) -> Chosen:
    """Choose the threshold of one class. `single_n`: rows of independent images, which alone count for a promise."""
    if wanted.at is not None:
        return Chosen(wanted.at, "as asked for")
    counts = int(truth_n.sum()), int((~truth_n).sum())
    if 0 in counts:
        what = "image of it" if not counts[0] else "image without it"
        return Chosen(PLAIN, f"no validation {what}: not tuned", is_kept=False)
    if wanted.precision is not None:
        return _promise_precision(score_n[single_n], truth_n[single_n], wanted.precision)
    if wanted.recall is not None:
        return _promise_recall(score_n[single_n], truth_n[single_n], wanted.recall)
    prefer, cost = PLAIN, wanted.cost
    if cost is not None:
        prefer = cost.false_positive / (cost.false_positive + cost.false_negative)
    sweep = sweep_thresholds(score_n, truth_n, prefer)
    if cost is not None:
        loss_c = cost.false_positive * sweep.extra_c + cost.false_negative * sweep.missed_c
        best = _choose_nearest(sweep.cut_c, -loss_c, prefer)
        words = f"cost {loss_c[best]:g} on validation, {loss_c[np.searchsorted(sweep.cut_c, prefer)]:g} at {prefer:.3g}"
    else:
        best = _choose_nearest(sweep.cut_c, sweep.f1_c, prefer)
        words = f"F1 {sweep.f1_c[best]:.3f} on validation, {sweep.f1_c[np.searchsorted(sweep.cut_c, PLAIN)]:.3f} at 0.5"
    return Chosen(float(sweep.cut_c[best]), words)


def _choose_nearest(cut_c: FloatArray, merit_c: NDArray[np.floating] | IntArray, prefer: float) -> int:
    """Return the best cut, and of equal ones the nearest to `prefer`."""
    best = np.flatnonzero(merit_c >= merit_c.max() - 1e-12)
    return int(best[np.argmin(np.abs(cut_c[best] - prefer))])


def _promise_precision(score_n: NDArray[np.floating], truth_n: BoolArray, precision: float) -> Chosen:
    promise = find_promise(score_n, truth_n, 1 - precision, DELTA)
    promised = 1 - promise.bound
    seen = f"{promise.num_answered - promise.num_wrong} of {promise.num_answered} right, {promised:.1%} promised"
    if promise.kept:
        return Chosen(promise.limit, seen, promised)
    words = f"a precision of {precision:g} cannot be promised; the best there is: {seen}"
    return Chosen(min(promise.limit, 1.0), words, promised, is_kept=False)


def _promise_recall(score_n: NDArray[np.floating], truth_n: BoolArray, recall: float) -> Chosen:
    positive_n = np.sort(score_n[truth_n].astype(np.float64))
    place = bound_share_above(len(positive_n), recall, DELTA)
    if place:
        threshold = float(positive_n[place - 1])
        found = int((positive_n >= threshold).sum())
        return Chosen(threshold, f"{found} of {len(positive_n)} found, {recall:.1%} promised", recall)
    # The lowest of n scores has above it at least a share delta^(1/n) of all.
    promised = DELTA ** (1 / len(positive_n)) if len(positive_n) else 0.0
    words = f"a recall of {recall:g} cannot be promised by {len(positive_n)} images of it; {promised:.1%} can"
    return Chosen(float(positive_n[0]) if len(positive_n) else PLAIN, words, promised, is_kept=False)
