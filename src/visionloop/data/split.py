"""Which side an image is on: a pure function of the seed and the image's key. No global randomness, no order.

A side is decided once, when an image is first seen, and stored in the manifest.
"""

import hashlib
import math

import numpy as np


def compute_position(key: str, seed: int) -> float:
    """Return a number in [0, 1) that depends on seed and key alone (the first 53 bits of a sha256)."""
    digest = hashlib.sha256(f"{seed}:{key}".encode()).digest()
    return (int.from_bytes(digest[:8], "big") >> 11) / 2**53


def choose_side(key: str, seed: int, fractions: tuple[float, ...], *, test_is_given: bool = False) -> str:
    """Return train, val or test in proportion to `fractions` (train, val, test).

    With `test_is_given` (the source brings its own test folder) only train and val are handed out, in their proportion.
    """
    train, val, test = fractions
    position = compute_position(key, seed)
    if test_is_given:
        return "val" if position < val / (train + val) else "train"
    if position < test:
        return "test"
    return "val" if position < test + val else "train"


def choose_random_sides(number: int, seed: int, test_fraction: float) -> list[str]:
    """Return train or test for each of `number` rows, as scikit-learn's `train_test_split` divides them.

    The same as `train_test_split(range(number), test_size=test_fraction, random_state=seed, shuffle=True)`: a
    permutation of NumPy's legacy generator, of which the first ceil(number * test_fraction) rows are the test side.
    """
    num_test = math.ceil(test_fraction * number)
    sides = ["train"] * number
    for row in np.random.RandomState(seed).permutation(number)[:num_test]:
        sides[row] = "test"
    return sides
