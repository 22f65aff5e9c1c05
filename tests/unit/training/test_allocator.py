"""Memory of a step is kept for the next one, and given back at the end."""

import resource
import sys

import psutil
import pytest
import torch

from visionloop.training.loop import _find_glibc, keep_memory

NUM_FLOATS = 4 * 1024 * 1024
NUM_BYTES = 4 * NUM_FLOATS
PAGES = NUM_BYTES // resource.getpagesize()

only_glibc = pytest.mark.skipif(not sys.platform.startswith("linux") or _find_glibc() is None, reason="no glibc")


def count_faults() -> int:
    """How many pages the system had to give for filling and freeing 16 MiB three times, after some times uncounted."""
    for _ in range(30):
        torch.ones(NUM_FLOATS)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(3):
        torch.ones(NUM_FLOATS)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


@only_glibc
def test_pages_are_kept_inside_and_given_back_at_the_end() -> None:
    with keep_memory():
        assert count_faults() < PAGES / 10, "outside it would be three times all pages"
        inside = psutil.Process().memory_info().rss
    assert inside - psutil.Process().memory_info().rss > 0.9 * NUM_BYTES


@only_glibc
def test_an_error_inside_gives_the_memory_back_too() -> None:
    before = psutil.Process().memory_info().rss
    with pytest.raises(RuntimeError, match="inside"), keep_memory():
        for _ in range(4):
            torch.ones(NUM_FLOATS)
        assert psutil.Process().memory_info().rss - before > 0.9 * NUM_BYTES
        raise RuntimeError("inside")
    assert psutil.Process().memory_info().rss - before < 0.5 * NUM_BYTES
