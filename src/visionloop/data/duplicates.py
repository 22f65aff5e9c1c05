"""Perceptual hashes: what an image looks like, in 64 bits. Pure.

Stored with every image; families of near duplicates are built from them.
"""

from functools import cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image

MIN_SIDE_PX = 32
_SIZE = 32
_KEPT = 8


@cache
def _dct_matrix() -> NDArray[np.float64]:
    """Rows of the orthonormal DCT-II (Ahmed, Natarajan and Rao, 1974), the 8 lowest frequencies."""
    k, n = np.arange(_KEPT)[:, None], np.arange(_SIZE)[None, :]
    matrix = np.cos(np.pi * (2 * n + 1) * k / (2 * _SIZE)) * np.sqrt(2 / _SIZE)
    matrix[0] /= np.sqrt(2)
    return np.asarray(matrix)


def compute_phash(image: Image.Image) -> str:
    """Return the 64-bit DCT hash in hex: bit = coefficient above the median. Empty below 32 px, where it means little.

    After Zauner, "Implementation and benchmarking of perceptual image hash functions", 2010.
    """
    if min(image.size) < MIN_SIDE_PX:
        return ""
    small = image.convert("L").resize((_SIZE, _SIZE), Image.Resampling.BILINEAR, reducing_gap=2.0)
    matrix = _dct_matrix()
    coefficients = (matrix @ np.asarray(small, dtype=np.float64) @ matrix.T).ravel()
    bits = coefficients > np.median(coefficients[1:])
    return np.packbits(bits).tobytes().hex()
