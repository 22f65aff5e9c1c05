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

from visionloop.evaluation.promises import (
    BoolArray,
    FloatArray,
    IntArray,
    Promise,
    bound_errors,
    bound_share_above,
    count_flawless,
    list_promises,
)
from visionloop.params.train import Threshold

DELTA = 0.05
DELTA_OF_PLAIN = DELTA / 10  # the rest is of the looks at the highest m images
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

    `is_kept` False: the wanted precision or recall cannot be promised, and this comes nearest.
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
        shares = [float(((score_n >= at) == truth_n).mean()) for at in (wanted.at, PLAIN)]
        words = f"as params.yaml says: {shares[0]:.1%} of the validation images right, {shares[1]:.1%} at 0.5"
        return Chosen(wanted.at, words)
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
    """Take the lowest look that keeps it. Else the best bound that is not worse than the plain threshold."""
    error = 1 - precision
    promises = list_promises(score_n, truth_n, error, DELTA - DELTA_OF_PLAIN)
    plain = _promise_plain(score_n, truth_n, error)
    kept = [promise for promise in (plain, *promises) if promise.kept]
    if kept:
        best = max(kept, key=lambda p: p.num_answered)
    else:
        fine = [promise for promise in promises if not _is_worse(promise, plain)]
        best = min((plain, *fine), key=lambda p: p.bound)
        best = plain if best.num_answered == plain.num_answered else best
    promised = 1 - best.bound
    seen = f"{best.num_answered - best.num_wrong} of {best.num_answered} right, {promised:.1%} promised"
    if best.kept:
        return Chosen(best.limit, seen, promised)
    words = f"a precision of {precision:g} cannot be promised; the best there is: {seen}"
    least = count_flawless(error, DELTA - DELTA_OF_PLAIN)
    if best.num_answered < least:
        words += f"; it takes {least:,} without a mistake"
    return Chosen(best.limit, words, promised, is_kept=False)


def _promise_plain(score_n: NDArray[np.floating], truth_n: BoolArray, error: float) -> Promise:
    """Bound the errors from 0.5 on: known before any score was seen, it is one more look with a delta of its own."""
    given_n = score_n >= PLAIN
    number, wrong = int(given_n.sum()), int((given_n & ~truth_n).sum())
    bound = bound_errors(wrong, number, DELTA_OF_PLAIN)
    least = count_flawless(error, DELTA_OF_PLAIN)
    return Promise(bound <= error, PLAIN, number, wrong, bound, len(score_n), least)


def _is_worse(promise: Promise, plain: Promise) -> bool:
    """Whether what is given is right less often than from 0.5 on, or a lower threshold makes more mistakes."""
    right, more = promise.num_answered - promise.num_wrong, promise.num_answered - plain.num_answered
    if more > 0 and 2 * (promise.num_wrong - plain.num_wrong) > more:
        return True
    return right * plain.num_answered < (plain.num_answered - plain.num_wrong) * promise.num_answered


def _promise_recall(score_n: NDArray[np.floating], truth_n: BoolArray, recall: float) -> Chosen:
    positive_n = np.sort(score_n[truth_n].astype(np.float64))
    place = bound_share_above(len(positive_n), recall, DELTA)
    if place:
        threshold = float(positive_n[place - 1])
        found = int((positive_n >= threshold).sum())
        if _gives_everything(score_n, truth_n, threshold):
            words = f"a recall of {recall:g} is kept only by saying yes to all {len(score_n)} images; not tuned"
            return Chosen(PLAIN, words, 0.0, is_kept=False)
        return Chosen(threshold, f"{found} of {len(positive_n)} found, {recall:.1%} promised", recall)
    if not len(positive_n):
        words = f"a recall of {recall:g} cannot be promised: no independent image of it; not tuned"
        return Chosen(PLAIN, words, 0.0, is_kept=False)
    # The lowest of n scores has above it at least a share delta^(1/n) of all; so has every lower threshold. Down to the
    # next image without the class they give the same answers: of these the nearest to 0.5.
    promised, lowest = DELTA ** (1 / len(positive_n)), float(positive_n[0])
    lower_n = score_n[~truth_n & (score_n < lowest)].astype(np.float64)
    below = float(lower_n.max()) if len(lower_n) else 0.0
    threshold = min(PLAIN, lowest) if below < PLAIN else (below + lowest) / 2
    if _costs_more(score_n, truth_n, threshold):
        words = f"a recall of {recall:g} cannot be promised by {len(positive_n)} images of it, and coming nearer costs "
        return Chosen(PLAIN, f"{words}more wrong answers than it finds; not tuned", 0.0, is_kept=False)
    words = f"a recall of {recall:g} cannot be promised by {len(positive_n)} images of it; {promised:.1%} can"
    if len(positive_n) < (least := count_flawless(1 - recall, DELTA)):
        words += f"; it takes {least:,}"
    return Chosen(threshold, words, promised, is_kept=False)


def _gives_everything(score_n: NDArray[np.floating], truth_n: BoolArray, threshold: float) -> bool:
    """Whether a threshold below 0.5 tells nothing apart: every image is given, also all that are not of the class."""
    return threshold < PLAIN and not truth_n.all() and bool((score_n >= threshold).all())


def _costs_more(score_n: NDArray[np.floating], truth_n: BoolArray, threshold: float) -> bool:
    """Whether of what a threshold gives beyond 0.5 more is wrong than right."""
    more_n = (score_n >= threshold) & (score_n < PLAIN)
    return bool((more_n & ~truth_n).sum() > (more_n & truth_n).sum())
