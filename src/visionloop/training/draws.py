"""Random numbers of an image: functions of (seed, epoch, image) alone, so that neither its place in a batch, nor the
worker or rank that reads it, nor a resume changes what is drawn. Pure.

Dimensions: n images, d draws an image.
"""

import hashlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

UInt64Array = NDArray[np.uint64]

GOLDEN = np.uint64(0x9E3779B97F4A7C15)
PRIME = 2**64 - 59  # the largest of 64 bits: seeds of any size are taken by their remainder
ORDER, AUGMENT = 1, 2  # what is drawn for: draws for one never tell of those for the other


def make_image_keys(sha256_n: Sequence[str]) -> UInt64Array:
    """Return a 64-bit number of each image."""
    digests = b"".join(hashlib.blake2b(sha256.encode(), digest_size=8).digest() for sha256 in sha256_n)
    return np.frombuffer(digests, "<u8").astype(np.uint64)


def draw_bits(key_n: UInt64Array, *, seed: int, epoch: int, purpose: int) -> UInt64Array:
    """Return 64 random bits (n) of each image. SplitMix64: Steele, Lea and Flood, OOPSLA 2014."""
    state_n = key_n
    for part in (purpose, seed % PRIME, epoch):
        state_n = _mix(state_n ^ _mix(np.asarray(part, np.uint64) + GOLDEN))
    return state_n


def draw_uniform(bits_n: UInt64Array, num: int, turn_n: NDArray[np.int64] | None = None) -> NDArray[np.float64]:
    """Return `num` uniform numbers in [0, 1) of each image, (n, d). `turn_n`: how often it came before in the epoch."""
    if turn_n is not None:
        bits_n = _mix(bits_n + turn_n.astype(np.uint64))
    steps_d = np.arange(1, num + 1, dtype=np.uint64) * GOLDEN
    words_nd = _mix(bits_n[:, None] + steps_d[None, :])
    return (words_nd >> np.uint64(11)).astype(np.float64) * 2.0**-53


def count_turns(rows_n: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return how often each row has come before in the sequence: of [4, 7, 4] it is [0, 0, 1]."""
    order = np.argsort(rows_n, kind="stable")
    ordered = rows_n[order]
    starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])[: len(ordered)]
    lengths = np.diff(np.r_[starts, len(ordered)])
    turn_n = np.empty(len(rows_n), np.int64)
    turn_n[order] = np.arange(len(rows_n)) - np.repeat(starts, lengths)
    return turn_n


def _mix(z: UInt64Array) -> UInt64Array:
    with np.errstate(over="ignore"):
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
