"""Add what a pull has found to the rows of the version before.

Only the lists of quarantine and leaks are written, under their digests. A side that an image has never changes.

Images pass by one after the other in the order of their sha256: what is known beside what is offered (`join.py`); when
all sides are decided, as rows of the new version, to see what it leaves out; and for its digest.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from heapq import merge as merge_sorted

import numpy as np
from pyarrow import RecordBatch

from visionloop.data.drop import load_aside, write_aside
from visionloop.data.leaks import Leak, Leaks, load_leaks, make_leaks, write_leaks
from visionloop.data.manifest import count_unusable, write_quarantine
from visionloop.data.parts import MOST_PARTS, make_version
from visionloop.data.rows import Rows, make_batches
from visionloop.data.tombstones import load_tombstones
from visionloop.errors import ParamsError
from visionloop.ingest.check import Checked
from visionloop.ingest.expect import check_classes, check_expectations, check_new_classes, find_small_classes
from visionloop.ingest.join import (
    BEFORE,
    DIFFERS,
    FIRST,
    IS_BEFORE,
    NEWS,
    OFFERED,
    PLACES,
    WAITING,
    Joined,
    Known,
    join,
)
from visionloop.ingest.labels import Correction, make_label_rules
from visionloop.ingest.moves import (
    Moves,
    Wishes,
    advise_relabel,
    describe_done,
    describe_moves,
    describe_unusable_classes,
    is_saved_again,
)
from visionloop.ingest.sides import Sides, decide_sides, describe_sides, make_leak_error
from visionloop.ingest.spill import NAMES, Row
from visionloop.params import Params, Split
from visionloop.records import DatasetVersion, ImageRecord, Rejected
from visionloop.store import ObjectStore


@dataclass(frozen=True)
class Merged:
    """A version that is not committed yet (the parent itself, when nothing is new or differs), and what was refused.

    `changed` are the rows of its newest part. `notes` are to be told once, `remarks` at each pull that finds the same.
    `advice` is the way out where too much was refused; "" where nothing special helps.
    """

    version: DatasetVersion
    changed: Rows
    refused: list[Rejected]
    notes: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()
    advice: str = ""


def merge(
    store: ObjectStore,
    params: Params,
    parent: DatasetVersion | None,
    checked: Checked,
    *,
    now: str,
    corrections: Sequence[Correction] = (),
    wishes: Wishes = Wishes(),  # noqa: B008
) -> Merged:
    """Add what was checked to the parent's rows.

    Raises:
        ParamsError: the split differs from the one that version 1 fixed, or the label map renames twice.
        SourceError: there is only one class, a correction fits no image, there are leaks and `on_leak` is `fail`,
            an expectation is not met, or new classes look like a mistake.
        DiskError: there is no room for what is put down.
    """
    split, expect = _fixed_split(parent, params.ingest.split), params.ingest.expect
    known = _load_known(store, params.name, parent)
    joined = join(known, checked, make_label_rules(params, corrections, wishes.answers), split, wishes)
    _check(params, joined, split, wishes)
    moves = joined.moves
    sides = decide_sides(store, params.ingest, joined.old, joined.new, joined.trained, is_first=parent is None)
    draft = _Draft(known, joined, sides, moves if wishes.prune else Moves())
    left = draft.leave_out(params)
    refused = [*joined.refused, *left.refused]
    check_classes(params.name, left.classes, [*checked.rejected, *refused])
    check_expectations(params.name, expect, draft.records)
    remarks = _remark(checked, joined, left, wishes)
    advice = f"{wishes.say('--relabel')} takes the labels that their source gives now." if moves.relabelled else ""
    taken_out, small = left.num_taken, tuple(sorted(draft.small))
    if parent and not (len(draft.changed) or taken_out) and left.aside == known.aside and parent.left_out == small:
        return Merged(parent, draft.changed, [*refused, *_list_in_vain(joined.conflicts)], (), remarks, advice)
    everything = [*checked.rejected, *refused]
    leaks = _inherit_leaks(store, parent, draft.records, make_leaks([*joined.conflicts, *sides.leaks]))
    # The rows of earlier parts would bring back what was taken out; and a version of very many parts is slow to read.
    is_whole = bool(taken_out) or (parent is not None and len(parent.parts) >= MOST_PARTS)
    newest = draft.records if is_whole else draft.changed
    version = make_version(
        params.name,
        parent,
        draft.records,
        newest,
        is_whole=is_whole,
        num_added=len(draft.records) - (joined.num_before - taken_out),
        split=split.fixed(),
        rejected=write_quarantine(store, params.name, everything),
        num_rejected=count_unusable(everything),
        created_at=now,
        cursors={**(parent.cursors if parent else {}), **checked.cursors},
        leaks=write_leaks(store, params.name, leaks),
        num_leaks=len(leaks.rows),
        aside=write_aside(store, [*left.aside.values()]),
        left_out=small,
    )
    notes = (*describe_done(moves, version.version, wishes), *describe_sides(version, draft.records, sides, split))
    return Merged(version, newest, refused, notes, remarks, advice)


def _load_known(store: ObjectStore, name: str, parent: DatasetVersion | None) -> Known:
    forgotten = load_tombstones(store, name)
    aside = load_aside(store, parent) if parent else {}
    return Known(store, parent, {s: r for s, r in aside.items() if s not in forgotten}, forgotten)


def _check(params: Params, joined: Joined, split: Split, wishes: Wishes) -> None:
    if joined.num_before and not wishes.allow_new_classes:
        relabelled = [one.after for one in joined.moves.relabelled] if wishes.relabel else []
        option = wishes.say("--allow-new-classes")
        check_new_classes(params, joined.classes, joined.fresh, relabelled, option=option)
    if split.on_leak == "fail" and joined.conflicts:
        raise make_leak_error(joined.conflicts)


@dataclass
class _Left:
    """What the new version does not hold: `num_taken` rows of the one before, those that are kept `aside`.

    `refused` are the files of this pull whose class is left out; `classes` are those that remain. `again` are images
    that were saved again under another label, each behind the one that is gone.
    """

    aside: dict[str, ImageRecord]
    num_taken: int = 0
    refused: list[Rejected] = field(default_factory=list)
    classes: set[str] = field(default_factory=set)
    again: list[tuple[ImageRecord, ImageRecord]] = field(default_factory=list)


class _Records:
    """Rows of a draft that are made when they are asked for."""

    def __init__(self, number: int, iterate: Callable[[], Iterator[ImageRecord]]) -> None:
        self._number, self._iterate = number, iterate

    def __len__(self) -> int:
        return self._number

    def __iter__(self) -> Iterator[ImageRecord]:
        return self._iterate()

    def iterate_batches(self) -> Iterator[RecordBatch]:
        return make_batches(self)


class _Draft:
    """The rows of the next version: `records` are all, `changed` those that are new or differ.

    Left out are those that were `pruned`, and classes that are too `small`. It holds none of its `Rows`: in a cycle it
    would keep its files when another pull was faster, until Python collects garbage, which is rare in a pull.
    """

    def __init__(self, known: Known, joined: Joined, sides: Sides, pruned: Moves) -> None:
        self._known, self._joined, self._sides, self._pruned = known, joined, sides, pruned
        self.small: dict[str, int] = {}
        self._num_records = self._num_changed = 0

    @property
    def records(self) -> Rows:
        """Return all rows; first comes `leave_out`."""
        return _Records(self._num_records, lambda: (record for _, _, record in self._iterate(is_out=False)))

    @property
    def changed(self) -> Rows:
        """Return those that are new or differ; first comes `leave_out`."""
        rows = lambda: (one for rank, row, one in self._iterate(is_out=False) if _differs(rank, row))  # noqa: E731
        return _Records(self._num_changed, rows)

    def leave_out(self, params: Params) -> _Left:
        """Choose what is left out, and look once at all rows."""
        self.small = find_small_classes(params, self._count_classes())
        left = _Left(dict(self._known.aside))
        gone = {} if self._pruned.gone else {r.key: r for r in self._joined.moves.gone.values() if r.group is None}
        least = params.ingest.expect.min_per_class
        refused = list[tuple[int, int, list[Rejected]]]()
        again = list[tuple[int, ImageRecord, ImageRecord]]()
        for rank, row, record in self._iterate():
            if row[FIRST] >= 0 and (old := gone.get(record.key)) and is_saved_again(old, record):
                again.append((row[FIRST], old, record))
            if self._is_out(record):
                left.num_taken += rank == BEFORE
                self._set_aside(record, left.aside)
                refused.append((rank, row[4] if rank == OFFERED else 0, self._refuse(row, record, least)))
                continue
            left.aside.pop(record.sha256, None)
            self._num_records += 1
            self._num_changed += _differs(rank, row)
            if record.side != "excluded":
                left.classes.update(record.labels)
        refused.sort(key=lambda one: one[:2])
        left.refused = [one for _, _, some in refused for one in some]
        left.again = [(old, new) for _, old, new in sorted(again, key=lambda one: one[0])]
        return left

    def _count_classes(self) -> Counter[str]:
        """Count the images of each class, but for the pruned and the excluded ones."""
        new, counts = self._joined.new, Counter[str]()
        numbers = Counter(self._joined.counts)
        numbers.subtract((row.side, row.labels) for row in self._pruned.gone.values())
        sets, codes = [*new.label_sets], len(NAMES)
        both, number = np.unique(new.label_n.astype(np.int64) * codes + self._sides.of, return_counts=True)
        for pair, several in zip(both.tolist(), number.tolist(), strict=True):
            numbers[NAMES[pair % codes], sets[pair // codes]] += several
        for (side, labels), several in numbers.items():
            counts.update({label: several for label in labels if several and side != "excluded"})
        return counts

    def _iterate(self, is_out: bool | None = None) -> Iterator[tuple[int, Row, ImageRecord]]:
        """Yield what each row is, and its record: of all, or of those that are left out or not."""
        old = ((row[0], BEFORE if row[IS_BEFORE] else WAITING, row) for row in self._joined.old.rows)
        new = ((row[0], OFFERED, self._finish(place, row)) for place, row in enumerate(self._joined.new.rows))
        for _, rank, row in merge_sorted(old, new):
            news = row[NEWS] if rank != OFFERED else None
            record = ImageRecord(row[0], *news, *row[4:FIRST]) if news else ImageRecord(*row[:FIRST])
            if is_out is None or is_out == self._is_out(record):
                yield rank, row, record

    def _finish(self, place: int, row: Row) -> Row:
        """Return the row of a new image with its ordinal, its key and its side."""
        side, key = self._sides.get(place, row)
        return (*row[:4], row[4] + self._joined.first_ordinal, row[5], key, side, *row[8:])

    def _is_out(self, record: ImageRecord) -> bool:
        return record.sha256 in self._pruned.gone or bool(self.small and self.small.keys() & {*record.labels})

    def _set_aside(self, record: ImageRecord, aside: dict[str, ImageRecord]) -> None:
        """Keep a row beside the version. One that is gone would come back with its class: it is not kept then."""
        if (record.sha256 in self._pruned.gone) != bool(self.small.keys() & {*record.labels}):
            aside[record.sha256] = record

    def _refuse(self, row: Row, record: ImageRecord, least: int) -> list[Rejected]:
        """Return a line for each file of an image whose class is left out."""
        return [
            Rejected(
                origin,
                "class_left_out",
                f"its class {label} has {self.small[label]} images, fewer than ingest.expect.min_per_class ({least})",
            )
            for origin in row[PLACES]
            for label in record.labels
        ]


def _differs(rank: int, row: Row) -> bool:
    return rank == OFFERED or bool(row[DIFFERS])


def _remark(checked: Checked, joined: Joined, left: _Left, wishes: Wishes) -> tuple[str, ...]:
    """Return what is to be told of the sources at each pull, as long as it is so."""
    moves, files = joined.moves, Counter[str]()
    for labels, number in joined.files.items():
        files.update(dict.fromkeys(labels, number))
    offered = {*files}
    files.update(checked.rejected_labels)
    usable = joined.usable.union(*(one.after for one in moves.relabelled))
    lines = [*describe_unusable_classes(files, usable), *joined.remarks]
    if not wishes.relabel:
        lines += advise_relabel(moves, offered, wishes.say)
    if not wishes.prune:
        lines += describe_moves(moves, left.again, wishes.say)
    return tuple(lines)


def _list_in_vain(conflicts: Sequence[Leak]) -> list[Rejected]:
    return [Rejected(leak.other_origins[0], "side_conflict", leak.reason) for leak in conflicts]


def _inherit_leaks(store: ObjectStore, parent: DatasetVersion | None, records: Rows, mine: Leaks) -> Leaks:
    """Return the leaks of the parent that are still there, and those of this pull; each once."""
    earlier = load_leaks(store, parent).rows if parent else ()
    named = {sha256 for leak in earlier for sha256 in (leak.sha256, leak.other)}
    there = {None, *(row.sha256 for row in (records if named else ()) if row.sha256 in named)}
    still = [leak for leak in earlier if leak.sha256 in there and leak.other in there]
    return make_leaks(
        [*{(leak.kind, leak.sha256, leak.other, leak.other_side): leak for leak in (*mine.rows, *still)}.values()]
    )


def _fixed_split(parent: DatasetVersion | None, split: Split) -> Split:
    if parent is None or (fixed := {"method": "hash", "first": None, **parent.split}) == split.fixed():
        return split
    raise ParamsError(
        "params.yaml ingest.split",
        f"got seed {split.seed}, fractions {list(split.fractions)}",
        f"seed {fixed['seed']}, fractions {fixed['fractions']}, as version 1 of {parent.name} fixed them",
        "Put them back, or choose another `name` to start anew.",
    )
