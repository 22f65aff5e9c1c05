"""What a validation side can promise: the largest share of images that is right often enough, with a bound. Pure.

Geifman and El-Yaniv, "Selective classification for deep neural networks", NeurIPS 2017 (their SGR): order the images by
a score, look at some of the highest m, and bound the share of wrong ones among them by the exact binomial inversion
(Clopper and Pearson 1934). Each of the t numbers m that are looked at gets delta / t, so that all bounds hold at once
with probability 1 - delta. Ours are chosen from the number of images alone, before an answer is seen, while a binary
search (as theirs) chooses the next m by what it saw.

    1,000 images, at most 2 % wrong, delta 0.05: t = 10 looks, each at delta 0.005, m = 263 to 1,000.
    263 is the least that can promise it: without a mistake the bound is 1 - 0.005 ^ (1 / 263) = 2 %.
    8 wrong among the highest 918: bound 2.01 %, no. 4 wrong among the highest 754: bound 1.66 %, yes.

Where no look keeps the wish, fewer images are looked at as well, to tell how near one comes.

Given the (m + 1)-th score, the m images above it are independent draws from all that score higher, whatever the scores
are: so the binomial is exact. It needs independent images. The frames of a film are not: one image of a key counts.

Dimensions: n images, t looks.
"""

import math
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]
BoolArray = NDArray[np.bool_]

FEWEST = 4  # of the further looks: fewer images promise next to nothing


@dataclass(frozen=True)
class Promise:
    """The images whose score is at least `limit`: of `num_answered` there `num_wrong` were wrong, and `bound` holds.

    `kept`: the bound is the wanted one or lower. Otherwise this is the look with the lowest bound. `num_images` counts
    all that were looked at, of which `least` without a mistake would have done.
    """

    kept: bool
    limit: float
    num_answered: int
    num_wrong: int
    bound: float
    num_images: int
    least: int


def find_promise(score_n: NDArray[np.floating], hits_n: BoolArray, error: float, delta: float) -> Promise:
    """Return the lowest score from which at most a share `error` is wrong, with probability 1 - delta.

    Images with the score -inf are not answered whatever comes out.
    """
    promises = list_promises(score_n, hits_n, error, delta)
    kept = [promise for promise in promises if promise.kept]
    return max(kept, key=lambda p: p.num_answered) if kept else min(promises, key=lambda p: (p.bound, -p.num_answered))


def list_promises(score_n: NDArray[np.floating], hits_n: BoolArray, error: float, delta: float) -> list[Promise]:
    """Return what each look can promise; where none keeps `error`, there are further looks, at fewer images.

    Those cannot keep it either: they are to tell how near one can come, and have half of delta. All bounds of the list
    hold at once with probability 1 - delta.
    """
    answered_n = np.isfinite(score_n)
    score_n, hits_n = score_n[answered_n], hits_n[answered_n]
    least = count_flawless(error, delta)
    if not len(score_n):
        return [Promise(False, math.inf, 0, 0, 1.0, 0, least)]
    order_n = np.argsort(-score_n, kind="stable")
    sorted_n, hits_n = score_n[order_n], hits_n[order_n]
    looks_t = choose_looks(len(score_n), error, delta)
    each = delta / len(looks_t)
    promises = [_look(sorted_n, hits_n, look, error, each) for look in looks_t]
    lower_t = choose_lower_looks(int(looks_t[0]))
    if len(lower_t) and not any(promise.kept for promise in promises):
        lower = min(each, delta / 2 / len(lower_t))
        promises = [_look(sorted_n, hits_n, look, error, lower) for look in lower_t]
        promises += [_look(sorted_n, hits_n, look, error, each / 2) for look in looks_t]
    return [replace(promise, least=least) for promise in promises]


def _look(sorted_n: NDArray[np.floating], hits_n: BoolArray, look: int, error: float, delta: float) -> Promise:
    """Bound the errors among the highest `look` images. Scores descend."""
    # Of equal scores all are taken. They are the lowest of these, so if anything the bound is too careful.
    number = int((sorted_n >= sorted_n[look - 1]).sum())
    below = float(sorted_n[number]) if number < len(sorted_n) else -math.inf
    wrong = int((~hits_n[:number]).sum())
    bound = bound_errors(wrong, number, delta)
    limit = 0.0 if below == -math.inf else float(np.nextafter(below, np.float32(np.inf), dtype=np.float32))
    return Promise(bound <= error, limit, number, wrong, bound, len(sorted_n), count_flawless(error, delta))


def choose_looks(num_images: int, error: float, delta: float) -> IntArray:
    """Return the numbers m of highest images to look at, ascending: log2(n) of them, fewer where n is small.

    More looks find a finer m, but each has a smaller share of delta, so that the least m is larger: there are only so
    many that it is at most half of all. The first look is at that many, the last of several at all images.
    """
    for number in range(max(1, math.ceil(math.log2(max(num_images, 2)))), 1, -1):
        least = count_flawless(error, delta / number)
        if 2 * least <= num_images:
            return np.linspace(least, num_images, number).round().astype(np.int64)
    return np.array([min(count_flawless(error, delta), num_images)], np.int64)


def choose_lower_looks(first: int) -> IntArray:
    """Return a half of the first look, a quarter, ..., down to `FEWEST` images; ascending."""
    halvings = range(1, max(first, 1).bit_length())
    return np.array([first >> k for k in halvings if first >> k >= FEWEST][::-1], np.int64)


def count_flawless(error: float, delta: float) -> int:
    """Return how many images without a mistake it takes to promise at most `error`: (1 - error)^n <= delta."""
    return math.ceil(math.log(delta) / math.log1p(-error) - 1e-9)


def bound_errors(num_wrong: int, num_images: int, delta: float) -> float:
    """Return the upper bound of a share of which `num_wrong` of `num_images` were seen (Clopper & Pearson 1934)."""
    if num_wrong >= num_images:
        return 1.0
    from scipy.special import betaincinv

    return float(betaincinv(num_wrong + 1, num_images - num_wrong, 1 - delta))


def bound_share_above(num_images: int, share: float, delta: float) -> int:
    """Return the largest j for which a share of all lies at or above the j-th lowest of n scores, with 1 - delta.

    The share above the j-th lowest of n independent scores is distributed as Beta(n - j + 1, j), whatever the scores
    are (Wilks 1941, tolerance limits). 0: not even the lowest of all can promise it.
    """
    from scipy.special import betainc

    places_j = np.arange(1, num_images + 1)
    below_j = betainc(num_images - places_j + 1, places_j, share)  # P(share above < wanted); grows with j
    return int((below_j <= delta).sum())


def keep_one_of_a_key(key_n: IntArray) -> IntArray:
    """Return the rows of one image of each key: the first. In the order of sha256 that is a random one."""
    return np.sort(np.unique(key_n, return_index=True)[1]).astype(np.int64)


def compute_risk_curve(confidence_n: NDArray[np.floating], hits_n: BoolArray) -> tuple[FloatArray, FloatArray]:
    """Return coverage and share of wrong answers, when only the surest 1, 2, ... n are answered.

    Equal confidences come together: only points that a limit can reach are in it. El-Yaniv & Wiener 2010.
    """
    order_n = np.argsort(-confidence_n, kind="stable")
    sorted_n, wrong_n = confidence_n[order_n], np.cumsum(~hits_n[order_n])
    last_n = np.append(sorted_n[1:] != sorted_n[:-1], True) if len(sorted_n) else np.zeros(0, bool)
    number_n = np.flatnonzero(last_n) + 1
    return number_n / max(len(sorted_n), 1), wrong_n[last_n] / number_n
