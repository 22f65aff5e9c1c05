"""One map over chunks, on all cores. Threads: Pillow, hashing and file reads release Python's lock."""

import os
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def count_cores() -> int:
    """Return the cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def map_parallel(function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """Yield `function(item)` in the order of the items; at most a few are in memory at a time."""
    from joblib import Parallel, delayed

    pool = Parallel(n_jobs=count_cores(), prefer="threads", return_as="generator", pre_dispatch="4*n_jobs")
    yield from pool(delayed(function)(item) for item in items)
