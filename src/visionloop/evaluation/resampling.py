"""Intervals of figures whose images come in groups: the key is drawn, never the frame of a film. Pure.

Images of one key (a film, a patient, near duplicates) are alike, so 256 frames of 16 films tell little more than 16
images. Each interval here is one over keys. Where every key is one image it is the usual one over images.

Dimensions in names: n images, g keys, r resamples.
"""

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from visionloop.records import Interval

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float64]

LEVEL = 0.95
Z_95 = 1.959963984540054
CHUNK_CELLS = 1_000_000


def code_keys(keys: Sequence[str]) -> IntArray:
    """Return a number for each image (n,), equal where the keys are: 0 is the first key in the order of text."""
    return np.unique(np.asarray(keys, np.str_), return_inverse=True)[1].astype(np.int64)


def count_keys(key_n: IntArray) -> int:
    """Return how many different keys some images have."""
    return len(np.unique(key_n))


def describe_images(num_images: int, num_keys: int, word: str = "images") -> str:
    """Say how many images there are, and in how many groups if some belong together. `word` is in the plural."""
    word = word.removesuffix("s") if num_images == 1 else word
    if num_keys >= num_images:
        return f"{num_images:,} {word}"
    return f"{num_images:,} {word} in {num_keys:,} group{'s' * (num_keys != 1)}"


def sum_keys(values: ArrayLike, key_n: IntArray) -> FloatArray:
    """Sum values of images (n,) or (n, k) over the images of each key that occurs: (g,) or (g, k)."""
    array = np.asarray(values, np.float64)
    code_n = np.unique(key_n, return_inverse=True)[1]
    out = np.zeros((int(code_n.max(initial=-1)) + 1, *array.shape[1:]))
    np.add.at(out, code_n, array)
    return out


def compute_key_interval(sum_g: ArrayLike, count_g: ArrayLike, level: float = LEVEL) -> Interval:
    """Return a mean over images, with its interval over keys: `sum_g` of values, `count_g` of images for each key.

    The mean is a ratio of two sums. Its variance is that of the jackknife over keys (Tukey 1958; for unequal keys the
    most careful of the usual ones: MacKinnon, Nielsen & Webb 2023, "CV3"), its quantile that of Student's t with g - 1
    degrees of freedom (Cameron & Miller 2015, section VI). Example: sums 3, 1 and 2 of 4, 4 and 4 images: mean 0.5,
    without each key 0.375, 0.625, 0.5; variance 2/3 of 0.03125; t = 4.303: 0.5 +- 0.621. The bounds are None for one
    key. Values that are all equal give an interval without width: for shares see `compute_share_interval`.
    """
    sums, counts = np.asarray(sum_g, np.float64), np.asarray(count_g, np.float64)
    value = float(sums.sum() / counts.sum())
    if len(sums) < 2:
        return Interval(value, None, None)
    half = find_t_quantile(len(sums) - 1, level) * float(np.sqrt(_compute_variance(sums, counts)))
    return Interval(value, value - half, value + half)


def compute_wilson(hits: float, trials: float) -> Interval:
    """Return a share with its 95 % score interval (Wilson 1927). Without trials it is 0, with the interval 0 to 1."""
    if trials == 0:
        return Interval(0.0, 0.0, 1.0)
    share, z2 = hits / trials, Z_95**2
    center = (share + z2 / (2 * trials)) / (1 + z2 / trials)
    half = Z_95 * np.sqrt(share * (1 - share) / trials + z2 / (4 * trials**2)) / (1 + z2 / trials)
    # For the shares 0 and 1 one bound is the share itself. Rounding must not move it past the share.
    return Interval(share, float(min(max(center - half, 0.0), share)), float(max(min(center + half, 1.0), share)))


def compute_score_interval(
    value: float,
    variance: float,
    degrees: int,
    *,
    flawless: float,
    center: float | None = None,
) -> Interval:
    """Return the interval of a figure from 0 to 1: Wilson's, with the effective number of images.

    That is the number of independent images with this variance (Kish 1965; for score intervals of grouped data: Korn &
    Graubard 1998, with their factor for few `degrees` of freedom). `flawless` is the lower bound of a figure of 1,
    where the variance says nothing. `center` is the figure without its bias, where that is known.
    """
    middle = value if center is None or not 0 < center < 1 else center
    number = Z_95**2 * flawless / (1 - flawless)  # Wilson's bound of so many images, all right, is `flawless`
    if variance > 0 and 0 < middle < 1:
        number = middle * (1 - middle) / variance * (Z_95 / find_t_quantile(degrees)) ** 2
    found = compute_wilson(middle * number, number)
    assert found.low is not None and found.high is not None
    # More errors than none cannot give a higher bound than none: a rare class, or a bad film, may be missing by luck.
    return Interval(value, min(found.low, value, flawless), max(found.high, value, 1 - flawless))


def compute_share_interval(hits_g: ArrayLike, count_g: ArrayLike) -> Interval:
    """Return the share of right images with its interval over keys: Wilson's where every key is one image."""
    hits, counts = np.asarray(hits_g, np.float64), np.asarray(count_g, np.float64)
    hits, counts = hits[counts > 0], counts[counts > 0]
    total, number = float(counts.sum()), len(counts)
    if total == number:
        return compute_wilson(float(hits.sum()), total)
    value = float(hits.sum()) / total
    if number < 2:
        return Interval(value, None, None)
    bound = compute_wilson(number, number).low
    assert bound is not None
    return compute_score_interval(value, _compute_variance(hits, counts), number - 1, flawless=bound)


def draw_keys(key_n: IntArray, resamples: int, seed: int) -> Iterator[FloatArray]:
    """Yield bootstrap resamples of keys, in blocks: how often each key is drawn (r, g), as many draws as keys.

    The keys are in ascending order, as in `sum_keys`: `draw @ sum_keys(values, key_n)` is the sum over a resample.
    """
    generator, num_keys = np.random.default_rng(seed), count_keys(key_n)
    size = max(1, CHUNK_CELLS // num_keys)
    for start in range(0, resamples, size):
        rows = min(size, resamples - start)
        drawn_rg = generator.integers(0, num_keys, size=(rows, num_keys)) + np.arange(rows)[:, None] * num_keys
        times = np.bincount(drawn_rg.ravel(), minlength=rows * num_keys)
        yield times.reshape(rows, num_keys).astype(np.float64)


def find_t_quantile(degrees: int, level: float = LEVEL) -> float:
    """Return Student's t that a share `level` lies within, on both sides."""
    from scipy.special import stdtrit

    return float(stdtrit(degrees, (1 + level) / 2))


def _compute_variance(sum_g: FloatArray, count_g: FloatArray) -> float:
    """Return the jackknife variance of a ratio of sums, over two or more keys."""
    total, count = sum_g.sum(), count_g.sum()
    without_g = (total - sum_g) / (count - count_g)
    number = len(sum_g)
    return float((number - 1) / number * ((without_g - total / count) ** 2).sum())
