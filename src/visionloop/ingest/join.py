"""What is known of each image beside what is offered of it: one after the other, in the order of their sha256.

So nothing of all images is held but what must be seen at once: counts, hashes, sides. Their rows are put down.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from heapq import merge as merge_sorted
from itertools import groupby
from operator import itemgetter
from typing import Any

from visionloop.data.leaks import Leak
from visionloop.data.parts import iterate_version, rank_rows
from visionloop.data.rows import get_row
from visionloop.ingest.check import Checked
from visionloop.ingest.inspect import Depths, Inspected
from visionloop.ingest.labels import LabelRules, Labels, Relabelling, find_refusal, unite_labels
from visionloop.ingest.moves import (
    Copies,
    MoveFinder,
    Moves,
    Offers,
    Places,
    Relabelled,
    Wishes,
    explain_conflict,
    explain_relabelled,
    relabel_row,
)
from visionloop.ingest.sides import Trained
from visionloop.ingest.spill import IS_LATE, LEARN, NEAR_TEST, Crowd
from visionloop.params import Split
from visionloop.records import DatasetVersion, ImageRecord, Rejected
from visionloop.store import ObjectStore

# A row of a crowd: the fields of the manifest; the ordinal of the image's first offer (-1: it is not offered) and the
# places of its offers. Behind them, of images that are known: whether the version before holds it; whether it differs
# from that; and its labels, sources and places from now on (None: those of the row).
FIRST, PLACES, IS_BEFORE, DIFFERS, NEWS = range(14, 19)
BEFORE, WAITING, OFFERED = range(3)


@dataclass(frozen=True)
class Known:
    """What is known before a pull: the version `parent`, the rows beside it, and what was forgotten.

    The rows beside it that are `waiting` are of a class that was left out: they may come back.
    """

    store: ObjectStore
    parent: DatasetVersion | None
    aside: Mapping[str, ImageRecord]
    forgotten: frozenset[str]

    @property
    def waiting(self) -> list[ImageRecord]:
        """Return the rows that may come back."""
        left_out = {*self.parent.left_out} if self.parent else set()
        return [row for _, row in sorted(self.aside.items()) if {*row.labels} & left_out]

    def iterate(self) -> Iterator[tuple[str, int, ImageRecord]]:
        """Yield the rows with what they are, in the order of their sha256."""
        before = iterate_version(self.store, self.parent) if self.parent else iter(())
        return merge_sorted(rank_rows(before, BEFORE), rank_rows(self.waiting, WAITING))


@dataclass
class Joined:
    """What is known and offered: the images that the dataset has (`old`) and has not (`new`), and what is told of them.

    `counts` are the old images by side and labels as they are from now on; `classes` the labels of the dataset before
    anything moved, `before` those of its version from now on. `files` and `usable`: all labels that are offered, by
    file and of images that can be used; `fresh` counts the new images by theirs. What is `refused` and the `conflicts`
    of sides are in the order of the sources.
    """

    old: Crowd
    new: Crowd
    trained: Trained
    moves: Moves = field(default_factory=Moves)
    refused: list[Rejected] = field(default_factory=list)
    conflicts: list[Leak] = field(default_factory=list)
    counts: Counter[tuple[str, Labels]] = field(default_factory=Counter)
    classes: set[str] = field(default_factory=set)
    before: set[str] = field(default_factory=set)
    files: Counter[Labels] = field(default_factory=Counter)
    usable: set[str] = field(default_factory=set)
    fresh: Counter[Labels] = field(default_factory=Counter)
    remarks: list[str] = field(default_factory=list)
    first_ordinal: int = 0
    num_before: int = 0
    differs: bool = False


def join(known: Known, checked: Checked, rules: LabelRules, split: Split, wishes: Wishes) -> Joined:
    """Apply label map, answers and corrections, and compare. Raises SourceError if a correction fits no image."""
    return _Joining(known, checked, rules, split, wishes).run()


class _Joining:
    def __init__(self, known: Known, checked: Checked, rules: LabelRules, split: Split, wishes: Wishes) -> None:
        groups: dict[str, int] = {}
        old, new = (Crowd(checked.inspected.folder, groups) for _ in range(2))
        self.result = Joined(old, new, Trained(split.min_train))
        self._known, self._checked, self._rules, self._split, self._wishes = known, checked, rules, split, wishes
        self._relabelling = Relabelling(rules, known.forgotten, known.aside)
        self._places = Places(checked.rejected)
        self._mover = MoveFinder(self._places, wishes.whole)
        self._copies = Copies()
        # With the ordinal of the first offer: they are wanted in the order of the sources.
        self._refused: list[tuple[int, list[Rejected]]] = []
        self._conflicts: list[tuple[int, Leak]] = []

    def run(self) -> Joined:
        """Look at all images."""
        result, depths = self.result, self._refuse()
        offered = ((one.sha256, OFFERED, one) for one in self._checked.inspected)
        for sha256, together in groupby(merge_sorted(self._known.iterate(), offered), itemgetter(0)):
            self._look(sha256, [(rank, one) for _, rank, one in together])
        self._relabelling.finish()
        result.moves = self._mover.close()
        self._refused.sort(key=itemgetter(0))
        result.refused += [one for _, some in self._refused for one in some]
        result.conflicts = [leak for _, leak in sorted(self._conflicts, key=itemgetter(0))]
        result.remarks = [*self._copies.describe(), *depths.describe()]
        return result

    def _refuse(self) -> Depths:
        """Find the files that are not taken in, before anything moves: their places are not judged."""
        refused, depths = list[tuple[int, Rejected]](), Depths()
        for one in self._checked.inspected:
            depths.add(one)
            self._places.add(one.origin)
            if why := find_refusal(self._rules, one, self._known.forgotten):
                refused.append((one.ordinal, why))
        self.result.refused = [why for _, why in sorted(refused, key=itemgetter(0))]
        self._places.close(self.result.refused)
        return depths

    def _look(self, sha256: str, together: Sequence[tuple[int, Any]]) -> None:
        """Look at one image: its row, if there is one, and its offers."""
        ranks = {rank: one for rank, one in together if rank != OFFERED}
        taken = [
            one
            for rank, one in together
            if rank == OFFERED and not find_refusal(self._rules, one, self._known.forgotten)
        ]
        row = ranks.get(WAITING, ranks.get(BEFORE))
        known, labels = self._relabelling.apply(sha256, row.labels if row else None, [one.labels for one in taken])
        offers, moved = [*zip(taken, labels, strict=True)], None
        if row:
            row = row if known == row.labels else replace(row, labels=known)
            self.result.classes.update(row.labels)
            if BEFORE in ranks and sha256 not in self._known.forgotten:
                moved = self._mover.look(row, offers)
            if moved and self._wishes.relabel:
                row = relabel_row(row, moved)
        for labels_of_one in labels:
            self.result.files[labels_of_one] += 1
        united = self._unite(sha256, row, offers, moved)
        if united is not None:
            self.result.usable.update(united)
            self._copies.add(taken)
            self._find_conflict(sha256, row.side if row else None, taken)
        if row:
            self._add_old(ranks.get(BEFORE), row, taken if united is not None else [], united)
        elif united is not None:
            self._add_new(taken, united)

    def _unite(self, sha256: str, row: ImageRecord | None, offers: Offers, moved: Relabelled | None) -> Labels | None:
        """Return the labels of an image that is offered. The same bytes under two labels all go to quarantine."""
        if not offers:
            return None
        known = row.labels if row else ()
        united = unite_labels(known, (labels for _, labels in offers), several=self._rules.several)
        if united is None:
            reason = explain_relabelled(moved) if moved else explain_conflict(sha256, known, [o[1] for o in offers])
            refused = [Rejected(one.origin, "label_conflict", reason) for one, _ in offers]
            self._refused.append((offers[0][0].ordinal, refused))
        return united

    def _find_conflict(self, sha256: str, side: str | None, taken: Sequence[Inspected]) -> None:
        """Note an image that a source gives another side than the one it has: the first given side stands."""
        given = _find_given_side(taken)
        side = side or given
        if self._split.method == "random" or given is None or side in {None, "excluded"}:
            return
        for one in taken:
            other = one.side or ("train" if one.test_is_given and side == "test" else side)
            if other != side:
                places = tuple(sorted(o.origin for o in taken if o.side != other))
                leak = _make_conflict(sha256, str(side), places, one.origin, str(other))
                self._conflicts.append((taken[0].ordinal, leak))
                return

    def _add_old(
        self, before: ImageRecord | None, row: ImageRecord, taken: Sequence[Inspected], labels: Labels | None
    ) -> None:
        """Add an image of the dataset: with new places where it was found, and a label if it had none."""
        result, now = self.result, row
        sources, origins = {one.source for one in taken}, {one.origin for one in taken}
        if taken and (labels != row.labels or not (sources <= {*row.sources} and origins <= {*row.origins})):
            places = tuple(sorted(sources.union(row.sources))), tuple(sorted(origins.union(row.origins)))
            now = replace(row, labels=labels or (), sources=places[0], origins=places[1])
        news = None if now is row else (now.labels, now.sources, now.origins)
        differs = before is not now and before != now
        offers = (taken[0].ordinal, tuple(one.origin for one in taken)) if taken else (-1, ())
        mark = IS_LATE if before is None else 0
        result.old.add((*get_row(row), *offers, before is not None, differs, news), row.side, mark=mark)
        result.counts[row.side, now.labels] += 1
        result.differs |= differs
        result.first_ordinal = max(result.first_ordinal, row.ordinal + 1)
        if before is not None:
            result.num_before += 1
            result.before.update(now.labels)
        if row.side == "train":
            result.trained.add(row.labels, row.key)

    def _add_new(self, taken: Sequence[Inspected], labels: Labels) -> None:
        """Add an image that the dataset has not.

        One that was taken out before, and comes again, has the side that it had, unless its source gives it one now.
        """
        first, earlier = taken[0], self._known.aside.get(taken[0].sha256)
        learn = any(one.test_is_given for one in taken)
        is_its_word = any(one.test_is_given and not one.excluded_near_test for one in taken)
        lost = {"excluded", "test"} if is_its_word else {"excluded"}
        had = earlier.side if earlier and earlier.side not in lost else None
        side = _find_given_side(taken) or had
        places = tuple(one.origin for one in taken)
        row = ImageRecord(
            sha256=first.sha256,
            labels=labels,
            sources=tuple(sorted({one.source for one in taken})),
            origins=places if len(places) == 1 else tuple(sorted({*places})),
            ordinal=first.ordinal,
            group=next((one.group for one in taken if one.group), None),
            key="",
            side="",
            captured_at=first.captured_at,
            width=first.width,
            height=first.height,
            format=first.format,
            num_bytes=first.num_bytes,
            phash=first.phash,
        )
        near_test = any(one.excluded_near_test for one in taken)
        mark = (LEARN if learn else 0) | (NEAR_TEST if near_test else 0)
        self.result.new.add((*get_row(row), first.ordinal, places), side, mark=mark)
        self.result.fresh[labels] += 1


def _make_conflict(sha256: str, side: str, places: tuple[str, ...], origin: str, other_side: str) -> Leak:
    reason = f"the same bytes are given {side} and {other_side}; {side}, which was first, stands"
    return Leak("conflict", sha256, places or (origin,), side, None, (origin,), other_side, None, None, reason)


def _find_given_side(taken: Sequence[Inspected]) -> str | None:
    return next((one.side for one in taken if one.side), None)
