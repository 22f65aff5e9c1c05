"""A stable, stratified subset of a dataset for quick experiments (`prepare.limit`). Pure.

A stratum is one class of one side; an image of several labels belongs to that of its rarest one. Seats go to strata by
the method of Sainte-Laguë (1910), which is fair to small ones and monotone: more images, or a higher limit, add to the
subset and take little away. Within a stratum the images with the lowest sha256 are taken, so that a new image changes
one place at most.
"""

import heapq
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence

from visionloop.records import SIDES, ImageRecord

Stratum = tuple[str, str]  # side, class


def choose_subset(records: Sequence[ImageRecord], limit: int) -> list[ImageRecord]:
    """Return about the proportions of `records` in `limit` images, sorted by sha256; all of them if they are fewer.

    At least one of each class and side, as far as `limit` goes: first the training side.
    """
    ordered = sorted(records, key=lambda r: r.sha256)
    counts = Counter((r.side, label) for r in ordered for label in r.labels)
    strata: dict[Stratum, list[ImageRecord]] = defaultdict(list)
    for record in ordered:
        strata[record.side, _find_rarest(record, counts)].append(record)
    first = choose_first(ordered, counts, limit)
    taken = Counter((r.side, _find_rarest(r, counts)) for r in first.values())
    seats = divide_seats({name: len(members) for name, members in strata.items()}, limit, taken)
    chosen = list(first.values())
    for name, members in strata.items():
        others = [r for r in members if r.sha256 not in first]
        chosen += others[: seats[name] - taken[name]]
    return sorted(chosen, key=lambda r: r.sha256)


def choose_first(ordered: Sequence[ImageRecord], counts: Mapping[Stratum, int], limit: int) -> dict[str, ImageRecord]:
    """Choose at most `limit` images, by sha256, that show every class on every side: the first of each.

    The rarest class comes first: where images have several labels, its image often shows others too.
    """
    first_of: dict[Stratum, ImageRecord] = {}
    for record in ordered:
        for label in record.labels:
            first_of.setdefault((record.side, label), record)
    chosen: dict[str, ImageRecord] = {}
    shown: set[Stratum] = set()
    for stratum in sorted(counts, key=lambda name: (SIDES.index(name[0]), counts[name], name[1])):
        if stratum not in shown and len(chosen) < limit:
            record = first_of[stratum]
            chosen[record.sha256] = record
            shown.update((record.side, label) for label in record.labels)
    return chosen


def divide_seats(sizes: Mapping[Stratum, int], limit: int, taken: Mapping[Stratum, int]) -> dict[Stratum, int]:
    """Divide `limit` seats among strata by their sizes; some are `taken` already, and none gets more than it has."""
    seats = {name: taken.get(name, 0) for name in sizes}
    claims = [(-size / (2 * seats[name] + 1), name) for name, size in sizes.items() if size > seats[name]]
    heapq.heapify(claims)
    for _ in range(min(limit, sum(sizes.values())) - sum(seats.values())):
        _, name = heapq.heappop(claims)
        seats[name] += 1
        if seats[name] < sizes[name]:
            heapq.heappush(claims, (-sizes[name] / (2 * seats[name] + 1), name))
    return seats


def _find_rarest(record: ImageRecord, counts: Mapping[Stratum, int]) -> str:
    """Return the label of an image that is rarest on its side; "" without a label."""
    return min(record.labels, key=lambda label: (counts[record.side, label], label), default="")
