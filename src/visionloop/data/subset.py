"""A stable, stratified subset of a dataset for quick experiments (`prepare.limit`). Pure.

A stratum is one class of one side. Seats go to strata by the method of Sainte-Laguë (1910), which is fair to small ones
and monotone: more images, or a higher limit, add to the subset and take little away. Within a stratum the images with
the lowest sha256 are taken, so that a new image changes one place at most.
"""

import heapq
from collections import defaultdict
from collections.abc import Sequence

from visionloop.records import SIDES, ImageRecord


def choose_subset(records: Sequence[ImageRecord], limit: int) -> list[ImageRecord]:
    """Return about the proportions of `records` in `limit` images, sorted by sha256; all of them if they are fewer.

    At least one of each class and side, as far as `limit` goes: first the training side.
    """
    strata: dict[tuple[str, str], list[ImageRecord]] = defaultdict(list)
    for record in sorted(records, key=lambda r: r.sha256):
        strata[record.side, record.labels[0]].append(record)
    sizes = {name: len(members) for name, members in strata.items()}
    seats = divide_seats(sizes, limit)
    return sorted((r for name, members in strata.items() for r in members[: seats[name]]), key=lambda r: r.sha256)


def divide_seats(sizes: dict[tuple[str, str], int], limit: int) -> dict[tuple[str, str], int]:
    """Divide `limit` seats among strata (side, class) by their sizes; none gets more than it has."""
    seats = dict.fromkeys(sizes, 0)
    first_served = sorted(sizes, key=lambda name: (SIDES.index(name[0]), name[1]))
    for name in first_served[:limit]:
        seats[name] = 1
    claims = [(-size / 3, name) for name, size in sizes.items() if size > 1]
    heapq.heapify(claims)
    for _ in range(min(limit, sum(sizes.values())) - sum(seats.values())):
        _, name = heapq.heappop(claims)
        seats[name] += 1
        if seats[name] < sizes[name]:
            heapq.heappush(claims, (-sizes[name] / (2 * seats[name] + 1), name))
    return seats
