"""What changed from one dataset version to another. Pure."""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from heapq import merge
from itertools import groupby
from typing import Any

from visionloop.data.parts import rank_rows
from visionloop.records import ImageRecord

UNLABELLED = "(unlabelled)"


@dataclass(frozen=True)
class Change:
    """One image that both versions hold, with different rows."""

    before: ImageRecord
    after: ImageRecord


@dataclass(frozen=True)
class Diff:
    """The images that only one version holds, and those that changed. `moved`: on another side, which must not happen.

    `classes` and `sources` are name -> images (before, after), where the two differ.
    """

    added: tuple[ImageRecord, ...]
    removed: tuple[ImageRecord, ...]
    relabelled: tuple[Change, ...]
    moved: tuple[Change, ...]
    classes: dict[str, tuple[int, int]]
    sources: dict[str, tuple[int, int]]
    num_same: int

    @property
    def is_empty(self) -> bool:
        return not (self.added or self.removed or self.relabelled or self.moved)

    def to_json(self) -> dict[str, Any]:
        """Return the comparison as JSON-ready builtins."""
        return {
            "added": [_name(record) for record in self.added],
            "removed": [_name(record) for record in self.removed],
            "relabelled": [
                {**_name(c.after), "from": list(c.before.labels), "to": list(c.after.labels)} for c in self.relabelled
            ],
            "moved": [{**_name(c.after), "from": c.before.side, "to": c.after.side} for c in self.moved],
            "classes": {name: list(counts) for name, counts in self.classes.items()},
            "sources": {name: list(counts) for name, counts in self.sources.items()},
            "num_same": self.num_same,
        }


def pair_rows(
    before: Iterable[ImageRecord], after: Iterable[ImageRecord]
) -> Iterator[tuple[ImageRecord | None, ImageRecord | None]]:
    """Yield the rows of each image in two versions, both in the order of sha256; None where one does not hold it."""
    for _, same in groupby(merge(rank_rows(before, 0), rank_rows(after, 1)), key=lambda one: one[0]):
        found = {version: record for _, version, record in same}
        yield found.get(0), found.get(1)


def compare_records(before: Iterable[ImageRecord], after: Iterable[ImageRecord]) -> Diff:
    """Compare the rows of two versions; of iterators, which are in the order of sha256, only what differs is held."""
    runs = [rows if isinstance(rows, Iterator) else sorted(rows, key=lambda r: r.sha256) for rows in (before, after)]
    added, removed, relabelled, moved = list[ImageRecord](), list[ImageRecord](), list[Change](), list[Change]()
    classes, sources = (Counter[str](), Counter[str]()), (Counter[str](), Counter[str]())
    num_same = 0
    for old, new in pair_rows(*runs):
        for one, labels, places in zip((old, new), classes, sources, strict=True):
            if one:
                labels.update(one.labels or (UNLABELLED,))
                places.update(one.sources)
        if old is None or new is None:
            added += [new] if new else []
            removed += [old] if old else []
            continue
        relabelled += [Change(old, new)] if {*old.labels} != {*new.labels} else []
        moved += [Change(old, new)] if old.side != new.side else []
        num_same += {*old.labels} == {*new.labels} and old.side == new.side
    return Diff(
        added=tuple(added),
        removed=tuple(removed),
        relabelled=tuple(relabelled),
        moved=tuple(moved),
        classes=_compare_counts(*classes),
        sources=_compare_counts(*sources),
        num_same=num_same,
    )


def _compare_counts(before: Counter[str], after: Counter[str]) -> dict[str, tuple[int, int]]:
    names = sorted(before.keys() | after.keys())
    return {name: (before[name], after[name]) for name in names if before[name] != after[name]}


def _name(record: ImageRecord) -> dict[str, Any]:
    facts = ("sha256", "labels", "side", "sources", "origins")
    return {fact: value for fact, value in record.to_json().items() if fact in facts}
