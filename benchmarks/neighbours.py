"""Speed of the search for nearest neighbours: ours against scikit-learn's own cosine metric, on the same vectors."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from row import Row
from visionloop.features.neighbours import find_neighbours

NUM_IMAGES, NUM_FEATURES, NUM_QUERIES = 25_000, 512, 4_000
K = 5
REPEATS = 3


def bench_neighbours(*, num_images: int = NUM_IMAGES, num_queries: int = NUM_QUERIES) -> Row:
    """Search vectors like the output of a ReLU. Raises RuntimeError if the two find different neighbours."""
    from sklearn.neighbors import NearestNeighbors

    rng = np.random.default_rng(0)
    table_nd = np.maximum(rng.normal(0.3, 1, (num_images, NUM_FEATURES)), 0).astype(np.float32)
    query_md = np.maximum(rng.normal(0.3, 1, (num_queries, NUM_FEATURES)), 0).astype(np.float32)

    def search_plainly() -> tuple[Any, Any]:
        found = NearestNeighbors(n_neighbors=K, algorithm="brute", metric="cosine").fit(table_nd).kneighbors(query_md)
        return found[0], found[1]

    (our_distance, our_rows), ours = time_searches(lambda: find_neighbours(query_md, table_nd, K))
    (their_distance, their_rows), theirs = time_searches(search_plainly)
    # Rows may differ only where their distances are equal in fp32.
    if np.abs(our_distance - their_distance).max() > 1e-5 or (our_rows == their_rows).mean() < 0.999:
        raise RuntimeError("the neighbours are not the same")
    what = f"{K} nearest of {num_images:,} x {NUM_FEATURES}"
    return Row(what, num_queries / ours, num_queries / theirs, "queries/s", "scikit-learn, metric=cosine")


def time_searches(search: Callable[[], Any]) -> tuple[Any, float]:
    """Return the result of a search and its median seconds, after a first run that is not counted."""
    found, seconds = search(), []
    for _ in range(REPEATS):
        started = time.perf_counter()
        search()
        seconds.append(time.perf_counter() - started)
    return found, statistics.median(seconds)
