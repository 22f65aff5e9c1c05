"""Keeps the memory of one training step for the next one.

glibc hands large blocks back to the system when they are freed. A step on a CPU frees all its activations, and has the
system fill them with zeros again, page by page, in the next: for MobileNetV2 two fifths of its time.
"""

import contextlib
import ctypes
import sys
from collections.abc import Iterator
from typing import Any

# Of malloc.h: the largest free block that stays at the top of the heap, and how many blocks may lie outside of it.
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
LARGEST, NONE = 2**31 - 1, 0
DEFAULTS = {M_TRIM_THRESHOLD: 128 * 1024, M_MMAP_MAX: 65_536}


@contextlib.contextmanager
def keep_memory() -> Iterator[None]:
    """Keep freed memory inside of the process, and give it back at the end. Does nothing without glibc."""
    libc = _find_glibc()
    if libc is None:
        yield
        return
    libc.mallopt(M_TRIM_THRESHOLD, LARGEST)
    libc.mallopt(M_MMAP_MAX, NONE)
    try:
        yield
    finally:
        for parameter, value in DEFAULTS.items():
            libc.mallopt(parameter, value)
        libc.malloc_trim(0)


def _find_glibc() -> Any:
    """Return the C library of this process if it is glibc, else None (musl, macOS, Windows)."""
    if not sys.platform.startswith("linux"):
        return None
    libc = ctypes.CDLL(None)
    return libc if hasattr(libc, "gnu_get_libc_version") and hasattr(libc, "mallopt") else None
