"""What changed from one dataset version to another. Pure."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

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


def compare_records(before: Sequence[ImageRecord], after: Sequence[ImageRecord]) -> Diff:
    """Compare the rows of two versions, by sha256."""
    old, new = ({r.sha256: r for r in rows} for rows in (before, after))
    both = [Change(old[sha256], new[sha256]) for sha256 in sorted(old.keys() & new.keys())]
    relabelled = tuple(c for c in both if set(c.before.labels) != set(c.after.labels))
    moved = tuple(c for c in both if c.before.side != c.after.side)
    return Diff(
        added=tuple(new[sha256] for sha256 in sorted(new.keys() - old.keys())),
        removed=tuple(old[sha256] for sha256 in sorted(old.keys() - new.keys())),
        relabelled=relabelled,
        moved=moved,
        classes=_compare_counts(*(_count(r.labels or (UNLABELLED,) for r in rows) for rows in (before, after))),
        sources=_compare_counts(*(_count(r.sources for r in rows) for rows in (before, after))),
        num_same=len(both) - len({c.after.sha256 for c in (*relabelled, *moved)}),
    )


def _count(names: Iterable[Sequence[str]]) -> Counter[str]:
    return Counter(name for several in names for name in several)


def _compare_counts(before: Counter[str], after: Counter[str]) -> dict[str, tuple[int, int]]:
    names = sorted(before.keys() | after.keys())
    return {name: (before[name], after[name]) for name in names if before[name] != after[name]}


def _name(record: ImageRecord) -> dict[str, Any]:
    facts = ("sha256", "labels", "side", "sources", "origins")
    return {fact: value for fact, value in record.to_json().items() if fact in facts}
