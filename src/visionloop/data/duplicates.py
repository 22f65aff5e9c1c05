"""Near duplicates: a perceptual hash of 64 bits, all pairs of hashes four bits apart or less, and the test on pixels.

Pure. The hash is stored with every image; families are built from confirmed pairs (`families.py`). Dimensions in
names: n images or hashes, p pairs.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

MIN_SIDE_PX = 32
MAX_DISTANCE = 4
_SIZE = 32
_KEPT = 8
# Weights as whole numbers: every sum stays below 2^24 (first product, float32) and 2^53 (second, float64), so that
# it is exact in whatever order a processor adds, and a hash is the same on every machine.
_SCALE = 4096
# OpenBLAS starts threads of its own above this size of a product; the callers are many threads already.
_ONE_THREAD = 262_144

# Two of six bands agree when at most four bits differ: 15 sorted tables find every such pair.
_BAND_BITS = (11, 11, 11, 11, 10, 10)
# In a table a hash is compared with so many neighbours: none is missed before that many share 21 bits.
_WINDOW = 512
# Bounds where thousands of images look alike (a camera that never moves): pairs per image, and pairs in all.
_NEAREST = 16
_MOST_PAIRS = 4_000_000

THUMB_PX = 32
_MAX_RMS = 8.0
_MAX_RATIO = 0.25
_MAX_PATCH = 16.0
_MIN_CONTRAST = 8.0
_GREY = np.array([0.299, 0.587, 0.114], np.float32)

UInt64Array = NDArray[np.uint64]
IntArray = NDArray[np.int64]


def compute_phash_of_grey(grey_hw: NDArray[np.uint8]) -> str:
    """Return the 64-bit DCT hash in hex of an upright grey image of any size. Empty below 32 px, where it means little.

    The image is averaged to 32 x 32 and its 64 lowest frequencies are kept. After Zauner, "Implementation and
    benchmarking of perceptual image hash functions", 2010; the threshold is somewhat above the median, because most
    coefficients lie near it and a re-saved image would turn them over. A plain colour has the first bit alone.
    """
    height, width = grey_hw.shape
    if min(height, width) < MIN_SIDE_PX:
        return ""
    weights, step = _make_weights(height), max(8, _ONE_THREAD // (_KEPT * width))
    sums_kw = np.zeros((_KEPT, width), np.float64)
    for top in range(0, height, step):
        sums_kw += weights[:, top : top + step] @ grey_hw[top : top + step].astype(np.float32)
    values = (sums_kw @ _make_weights(width).T.astype(np.float64)).ravel()
    median = np.partition(values[1:], 31)[31]
    # Whole numbers, compared as such: value > median + a quarter of the mean amplitude + half a grey level.
    bits = (values - median) * 252 > np.abs(values[1:]).sum() + 126 * _SCALE**2
    return np.packbits(bits).tobytes().hex()


@lru_cache(maxsize=1024)
def _make_weights(length: int) -> NDArray[np.float32]:
    """Average `length` pixels to 32 and take the 8 lowest frequencies (DCT-II), as one matrix of whole numbers."""
    edges = np.arange(_SIZE + 1) * (length / _SIZE)
    pixels = np.arange(length)
    overlap = np.minimum(edges[1:, None], pixels + 1) - np.maximum(edges[:-1, None], pixels)
    area = np.clip(overlap, 0, None) * (_SIZE / length)
    k, n = np.arange(_KEPT)[:, None], np.arange(_SIZE)[None, :]
    dct = np.cos(np.pi * (2 * n + 1) * k / (2 * _SIZE)) * np.sqrt(2 / _SIZE)
    dct[0] /= np.sqrt(2)
    return np.asarray((dct @ area * _SCALE).round().astype(np.float32))


@dataclass(frozen=True)
class Pairs:
    """Pairs of rows, `later_p` > `earlier_p`, with the Hamming distance of their hashes."""

    later_p: IntArray
    earlier_p: IntArray
    distance_p: IntArray


def find_near_pairs(hash_n: UInt64Array, kind_n: IntArray, first_new: int) -> Pairs:
    """Return pairs of rows whose hashes are four bits apart or less, the later row at or after `first_new`.

    `kind_n` (small numbers) says on which side a row is: an image with more than 16 earlier neighbours of one kind
    keeps the 16 nearest of them. So 10,000 equal images make 160,000 pairs, not fifty million, and one family still.
    """
    value_u, value_n = np.unique(hash_n, return_inverse=True)
    is_new_u = np.zeros(len(value_u), bool)
    is_new_u[value_n[first_new:]] = True
    near = [*_find_near_values(value_u, is_new_u)]
    left_p, right_p = (np.concatenate([np.array([], np.int64), *(pair[i] for pair in near)]) for i in (0, 1))
    # A value is near itself: images whose hashes are equal.
    same_u = np.flatnonzero(is_new_u)
    later_p, earlier_p = _expand(np.append(left_p, same_u), np.append(right_p, same_u), value_n, kind_n)
    is_pair = (later_p >= first_new) & (later_p != earlier_p)
    later_p, earlier_p = later_p[is_pair], earlier_p[is_pair]
    distance_p = np.bitwise_count(hash_n[later_p] ^ hash_n[earlier_p]).astype(np.int64)
    keep = _choose_nearest(later_p, earlier_p, distance_p, kind_n)
    return Pairs(later_p[keep], earlier_p[keep], distance_p[keep])


def compute_difference(thumbs_a: NDArray[np.uint8], thumbs_b: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Return how different pairs of thumbnails (p, 32, 32, 3) look: 1 and below is a near duplicate, 0 is equal.

    The largest of three ratios to their limits: the root mean square difference in grey (8 levels); the same by the
    contrast of the image (a quarter: fog is not fog); and the mean colour of the worst 4 x 4 patch (16 levels: a thing
    that is there or is not, a coat of another colour). Re-saved and resized photos stay below a half.
    """
    a, b = thumbs_a.astype(np.float32), thumbs_b.astype(np.float32)
    grey_a, grey_b = a @ _GREY, b @ _GREY
    rms = np.sqrt(((grey_a - grey_b) ** 2).mean((1, 2)))
    contrast = np.maximum(np.maximum(grey_a.std((1, 2)), grey_b.std((1, 2))), _MIN_CONTRAST)
    patch = np.abs((a - b).reshape(len(a), 8, 4, 8, 4, 3).mean((2, 4))).max((1, 2, 3), initial=0)
    worst = np.maximum(np.maximum(rms / _MAX_RMS, rms / contrast / _MAX_RATIO), patch / _MAX_PATCH)
    return np.asarray(worst, np.float64)


def _find_near_values(value_u: UInt64Array, is_new_u: NDArray[np.bool_]) -> Iterator[tuple[IntArray, IntArray]]:
    """Yield pairs of different values (positions in `value_u`) at most four bits apart, one of them new; each once."""
    masks, found = _make_masks(), 0
    for number, mask in enumerate(masks):
        key_u = value_u & mask
        new_keys = np.unique(key_u[is_new_u])
        place = np.minimum(np.searchsorted(new_keys, key_u), max(0, len(new_keys) - 1))
        in_play = np.flatnonzero(new_keys[place] == key_u) if len(new_keys) else place
        order = in_play[np.argsort(key_u[in_play], kind="stable")]
        value, key, is_new = value_u[order], key_u[order], is_new_u[order]
        start = np.arange(len(order))
        for step in range(1, min(_WINDOW, len(order))):
            start = start[start < len(order) - step]
            start = start[key[start] == key[start + step]]
            if not len(start) or (found > _MOST_PAIRS and step > _NEAREST):
                break
            apart = value[start] ^ value[start + step]
            hit = (np.bitwise_count(apart) <= MAX_DISTANCE) & (is_new[start] | is_new[start + step])
            # Found by an earlier table already?
            for earlier in masks[:number]:
                hit &= (apart & earlier) != 0
            found += int(hit.sum())
            yield order[start[hit]], order[start[hit] + step]


@lru_cache(maxsize=1)
def _make_masks() -> tuple[np.uint64, ...]:
    ends = np.cumsum(_BAND_BITS)
    bands = [((1 << bits) - 1) << int(end - bits) for bits, end in zip(_BAND_BITS, ends, strict=True)]
    return tuple(np.uint64(a | b) for a, b in combinations(bands, 2))


def _expand(left_p: IntArray, right_p: IntArray, value_n: IntArray, kind_n: IntArray) -> tuple[IntArray, IntArray]:
    """Turn pairs of values into pairs of rows (later, earlier), as far as they are few: the first rows of each kind."""
    rank_n = _rank(value_n, kind_n)
    for most in (64, 16, 4, 1):
        rows = np.flatnonzero(rank_n < most)
        rows = rows[np.argsort(value_n[rows], kind="stable")]
        count_u = np.bincount(value_n[rows], minlength=int(value_n.max(initial=-1)) + 1)
        if int((count_u[left_p] * count_u[right_p]).sum()) <= _MOST_PAIRS:
            break
    first_u = np.cumsum(count_u) - count_u
    a, b = _cross(first_u[left_p], count_u[left_p], first_u[right_p], count_u[right_p])
    a, b = rows[a], rows[b]
    # Beyond the first rows of a value: each with the very first rows of its own value.
    rest = np.flatnonzero(rank_n >= most)
    few_u = np.minimum(count_u, _NEAREST)
    c, d = _cross(np.arange(len(rest)), np.ones_like(rest), first_u[value_n[rest]], few_u[value_n[rest]])
    a, b = np.append(a, rest[c]), np.append(b, rows[d])
    return np.maximum(a, b), np.minimum(a, b)


def _cross(first_a: IntArray, count_a: IntArray, first_b: IntArray, count_b: IntArray) -> tuple[IntArray, IntArray]:
    """Return all combinations of each range of a with its range of b, as two flat lists of positions."""
    total = count_a * count_b
    pair = np.repeat(np.arange(len(total)), total)
    place = np.arange(len(pair)) - np.repeat(np.cumsum(total) - total, total)
    return first_a[pair] + place // count_b[pair], first_b[pair] + place % count_b[pair]


def _choose_nearest(later_p: IntArray, earlier_p: IntArray, distance_p: IntArray, kind_n: IntArray) -> IntArray:
    """Return the pairs to keep, in order: each once, and of each kind the nearest earlier rows of a row."""
    order = np.lexsort((earlier_p, distance_p, kind_n[earlier_p], later_p))
    later, earlier = later_p[order], earlier_p[order]
    is_first = np.append(True, (later[1:] != later[:-1]) | (earlier[1:] != earlier[:-1]))[: len(order)]
    order = order[is_first]
    rank = _rank(later_p[order], kind_n[earlier_p[order]])
    return np.asarray(order[rank < _NEAREST])


def _rank(first: IntArray, second: IntArray) -> IntArray:
    """Return the place of each row among the rows that are equal to it in both columns."""
    order = np.lexsort((second, first))
    a, b = first[order], second[order]
    is_first = np.append(True, (a[1:] != a[:-1]) | (b[1:] != b[:-1]))[: len(order)]
    place = np.arange(len(order))
    rank = np.empty(len(order), np.int64)
    rank[order] = place - np.maximum.accumulate(np.where(is_first, place, 0))
    return rank
