"""Near duplicates, in three steps: a 64-bit perceptual hash, all pairs of near hashes, a comparison of the pixels.

Pure. The hash is stored with every image. Pairs whose pixels agree too are made into families (`families.py`).

Dimensions in names: n images, u different hash values, p pairs, k frequencies, h, w pixels.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

MIN_SIDE_PX = 32
MAX_DISTANCE = 4
_SIZE = 32
_KEPT = 8
# The weights are rounded to whole numbers. Then every sum is a whole number, below 2^24 in the first product (float32)
# and below 2^53 in the second (float64). Such sums are exact, so the hash is the same on every machine.
_SCALE = 4096
# Size of a matrix product above which OpenBLAS starts its own threads. The callers already run in many threads.
_ONE_THREAD = 262_144

# The 64 bits are cut into six bands. If at most four bits differ, at least two bands are equal. See the example below.
_BAND_BITS = (11, 11, 11, 11, 10, 10)
# A hash is compared with this many neighbours in a sorted table. A pair is missed only where more hashes than that
# share 20 bits or more.
_WINDOW = 512
# Limits where thousands of images look alike (a camera that never moves): pairs of an image, and pairs in all.
_NEAREST = 16
_MOST_PAIRS = 4_000_000
_AT_ONCE = 262_144  # pairs of values that are compared together

THUMB_PX = 32
_MAX_RMS = 8.0
_MAX_RATIO = 0.25
_MAX_PATCH = 16.0
_MIN_CONTRAST = 8.0
_GREY = np.array([0.299, 0.587, 0.114], np.float32)

UInt64Array = NDArray[np.uint64]
IntArray = NDArray[np.int64]
Int32Array = NDArray[np.int32]


def compute_phash_of_grey(grey_hw: NDArray[np.uint8]) -> str:
    """Return the 64-bit DCT hash in hex of an upright grey image of any size; "" if a side is below 32 px.

    The image is averaged to 32 x 32 pixels. A bit says whether one of the 8 x 8 lowest frequencies is above a
    threshold. After Zauner, "Implementation and benchmarking of perceptual image hash functions", 2010. There the
    threshold is the median; ours is a little higher. Most coefficients lie near the median, and saving the image again
    would flip their bits. An image of one colour has only the first bit set.
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
    # value > median + mean amplitude / 4 + 1 / 2, multiplied by 252 = 4 x 63 so that all terms are whole numbers.
    bits = (values - median) * 252 > np.abs(values[1:]).sum() + 126 * _SCALE**2
    return np.packbits(bits).tobytes().hex()


@lru_cache(maxsize=1024)
def _make_weights(length: int) -> NDArray[np.float32]:
    """Return the matrix (8, length) that averages pixels to 32 and takes the 8 lowest frequencies (DCT-II).

    Its values are multiplied by `_SCALE` and rounded to whole numbers.
    """
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


def find_near_pairs(hash_n: UInt64Array, kind_n: NDArray[Any], first_new: int) -> Pairs:
    """Return pairs of rows whose hashes differ in at most four bits. The later row is at or after `first_new`.

    `kind_n` is a small number for the side of each row. Of each kind an image keeps the 16 nearest earlier rows. So
    10,000 equal images give 160,000 pairs instead of 50 million, and they still end in one family.
    """
    # Worked example (tests/unit/data/test_duplicates.py runs it), `first_new` = 1:
    #
    #   row 0   0x000000000     stored earlier
    #   row 1   0x200400801     4 bits from row 0: bits 0, 11, 22 and 33, one in each of the first four bands
    #   row 2   0x00000001F     5 bits from row 0: bits 0 to 4, all in the first band
    #   row 3   0x200400801     equal to row 1
    #
    # 1. Different values, sorted: u0 = 0, u1 = 0x1F, u2 = 0x200400801. Rows 1 and 3 share u2.
    # 2. A table keeps two of the six bands of each value and sorts by them. There are 15 ways to choose two bands.
    #    u0 and u2 differ in bands 1 to 4. Only in the table of bands 5 and 6 are their keys equal (both 0). There
    #    they are compared: 4 bits differ, so (u0, u2) is a pair.
    #    u0 and u1 differ in band 1 alone, so ten tables compare them. 5 bits differ: no pair in any of them.
    #    A pair that is found in several tables counts in the first one only.
    # 3. Back to rows: u0 is row 0, u2 is rows 1 and 3, so (1, 0) and (3, 0). Equal hashes are a pair too: (3, 1).
    # 4. Nearest first, at most 16 for each kind: row 1 keeps row 0 (4 bits); row 3 keeps row 1 (0) and row 0 (4).
    value_u, value_n = _number(hash_n)
    is_new_u = np.zeros(len(value_u), bool)
    is_new_u[value_n[first_new:]] = True
    near = [*_find_near_values(value_u, is_new_u)]
    left_p, right_p = (np.concatenate([np.array([], np.int64), *(pair[i] for pair in near)]) for i in (0, 1))
    # A value is near itself: images whose hashes are equal.
    same_u = np.flatnonzero(is_new_u & (np.bincount(value_n, minlength=len(value_u)) > 1))
    left_p, right_p = np.append(left_p, same_u), np.append(right_p, same_u)
    is_near_u = np.zeros(len(value_u), bool)
    is_near_u[left_p] = is_near_u[right_p] = True
    rows = np.flatnonzero(is_near_u[value_n])  # most images are near no other
    later_p, earlier_p = (rows[end_p] for end_p in _expand(left_p, right_p, value_n[rows], kind_n[rows]))
    is_pair = (later_p >= first_new) & (later_p != earlier_p)
    later_p, earlier_p = later_p[is_pair], earlier_p[is_pair]
    distance_p = np.bitwise_count(hash_n[later_p] ^ hash_n[earlier_p]).astype(np.int64)
    keep = _choose_nearest(later_p, earlier_p, distance_p, kind_n)
    return Pairs(later_p[keep], earlier_p[keep], distance_p[keep])


def _number(hash_n: UInt64Array) -> tuple[UInt64Array, Int32Array]:
    """Return the different hashes, sorted, and the number of each row's. As `np.unique`, in a third of the memory."""
    order = np.argsort(hash_n).astype(np.int32)
    sorted_n = hash_n[order]
    is_first_n = np.append(True, sorted_n[1:] != sorted_n[:-1])[: len(order)]
    value_n = np.empty(len(order), np.int32)
    value_n[order] = np.cumsum(is_first_n, dtype=np.int32) - 1
    return sorted_n[is_first_n], value_n


def compute_difference(thumbs_a: NDArray[np.uint8], thumbs_b: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Return how different pairs of thumbnails (p, 32, 32, 3) look, (p,). 0 is equal; up to 1 is a near duplicate.

    It is the largest of three values, each divided by its limit:
    - the root mean square difference in grey (limit 8 levels);
    - the same, divided by the contrast of the image (limit 1/4): two different foggy scenes differ by few levels;
    - the difference of the mean colour in the worst 4 x 4 patch (limit 16 levels): an object that is in one image only.

    Photos that were saved again or resized stay below 0.5. Example: plain white (255) against plain 254. The grey
    differs by 1: 1 / 8 = 0.125. The contrast is 0 and counts as 8: 1 / 8 / 0.25 = 0.5. The patch differs by 1:
    1 / 16 = 0.06. The result is 0.5. Against plain 200 it is 55 / 8 / 0.25 = 27.5.
    """
    a, b = thumbs_a.astype(np.float32), thumbs_b.astype(np.float32)
    grey_a, grey_b = a @ _GREY, b @ _GREY
    rms = np.sqrt(((grey_a - grey_b) ** 2).mean((1, 2)))
    contrast = np.maximum(np.maximum(grey_a.std((1, 2)), grey_b.std((1, 2))), _MIN_CONTRAST)
    patch = np.abs((a - b).reshape(len(a), 8, 4, 8, 4, 3).mean((2, 4))).max((1, 2, 3), initial=0)
    worst = np.maximum(np.maximum(rms / _MAX_RMS, rms / contrast / _MAX_RATIO), patch / _MAX_PATCH)
    return np.asarray(worst, np.float64)


def _find_near_values(value_u: UInt64Array, is_new_u: NDArray[np.bool_]) -> Iterator[tuple[IntArray, IntArray]]:
    """Yield pairs of different values (positions in `value_u`) that differ in at most four bits.

    At least one value of a pair is new. Each pair comes once.
    """
    masks, found = _make_masks(), 0
    for number, mask in enumerate(masks):
        order = _sort_by_key(value_u, is_new_u, mask)
        value = value_u[order]
        start = np.flatnonzero(((value[1:] ^ value[:-1]) & mask) == 0).astype(np.int32)
        for step in range(1, min(_WINDOW, len(order))):
            start = start[start < len(order) - step]
            start = start[((value[start] ^ value[start + step]) & mask) == 0]
            if not len(start) or (found > _MOST_PAIRS and step > _NEAREST):
                break
            for first in range(0, len(start), _AT_ONCE):
                some = start[first : first + _AT_ONCE]
                left, right = order[some], order[some + step]
                apart = value_u[left] ^ value_u[right]
                hit = (np.bitwise_count(apart) <= MAX_DISTANCE) & (is_new_u[left] | is_new_u[right])
                # An earlier table has found the pair if the bits that it keeps are equal.
                for earlier in masks[:number]:
                    hit &= (apart & earlier) != 0
                found += int(hit.sum())
                yield left[hit].astype(np.int64), right[hit].astype(np.int64)


def _sort_by_key(value_u: UInt64Array, is_new_u: NDArray[np.bool_], mask: np.uint64) -> Int32Array:
    """Return the values whose key a new value has, in the order of their keys. The key is what the mask keeps."""
    key_u = value_u & mask
    if is_new_u.all():
        return np.argsort(key_u, kind="stable").astype(np.int32)
    new_keys = np.unique(key_u[is_new_u])
    place = np.minimum(np.searchsorted(new_keys, key_u), max(0, len(new_keys) - 1))
    in_play = np.flatnonzero(new_keys[place] == key_u) if len(new_keys) else place[:0]
    return in_play[np.argsort(key_u[in_play], kind="stable")].astype(np.int32)


@lru_cache(maxsize=1)
def _make_masks() -> tuple[np.uint64, ...]:
    ends = np.cumsum(_BAND_BITS)
    bands = [((1 << bits) - 1) << int(end - bits) for bits, end in zip(_BAND_BITS, ends, strict=True)]
    return tuple(np.uint64(a | b) for a, b in combinations(bands, 2))


def _expand(
    left_p: IntArray, right_p: IntArray, value_n: Int32Array, kind_n: NDArray[Any]
) -> tuple[IntArray, IntArray]:
    """Turn pairs of values into pairs of rows (later, earlier).

    Where this would give more than `_MOST_PAIRS` pairs, only the first rows of each value and kind are paired with
    those of other values. Every other row is paired with the first rows of its own value.
    """
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
    # The remaining rows of each value: paired with the first rows of the same value.
    rest = np.flatnonzero(rank_n >= most)
    few_u = np.minimum(count_u, _NEAREST)
    c, d = _cross(np.arange(len(rest)), np.ones_like(rest), first_u[value_n[rest]], few_u[value_n[rest]])
    a, b = np.append(a, rest[c]), np.append(b, rows[d])
    return np.maximum(a, b), np.minimum(a, b)


def _cross(first_a: IntArray, count_a: IntArray, first_b: IntArray, count_b: IntArray) -> tuple[IntArray, IntArray]:
    """Return all combinations of positions of the i-th range of a and the i-th range of b, as two flat lists.

    Example: first_a = [10], count_a = [2], first_b = [50], count_b = [3] give a = 10 10 10 11 11 11 and
    b = 50 51 52 50 51 52.
    """
    total = count_a * count_b
    pair = np.repeat(np.arange(len(total)), total)
    place = np.arange(len(pair)) - np.repeat(np.cumsum(total) - total, total)
    return first_a[pair] + place // count_b[pair], first_b[pair] + place % count_b[pair]


def _choose_nearest(later_p: IntArray, earlier_p: IntArray, distance_p: IntArray, kind_n: NDArray[Any]) -> IntArray:
    """Return the pairs to keep, by later row: each pair once, and for each kind the nearest earlier rows."""
    order = np.lexsort((earlier_p, distance_p, kind_n[earlier_p], later_p))
    later, earlier = later_p[order], earlier_p[order]
    is_first = np.append(True, (later[1:] != later[:-1]) | (earlier[1:] != earlier[:-1]))[: len(order)]
    order = order[is_first]
    rank = _rank(later_p[order], kind_n[earlier_p[order]])
    return np.asarray(order[rank < _NEAREST])


def _rank(first: NDArray[Any], second: NDArray[Any]) -> IntArray:
    """Number the rows that are equal in both columns: 0, 1, 2 ... in their order.

    Example: first = [7, 7, 5, 7], second = [0, 0, 0, 0] gives [0, 1, 0, 2].
    """
    order = np.lexsort((second, first))
    a, b = first[order], second[order]
    is_first = np.append(True, (a[1:] != a[:-1]) | (b[1:] != b[:-1]))[: len(order)]
    place = np.arange(len(order))
    rank = np.empty(len(order), np.int64)
    rank[order] = place - np.maximum.accumulate(np.where(is_first, place, 0))
    return rank
