"""Add what a pull has found to the rows of the version before.

Only the lists of quarantine and leaks are written, under their digests. A side that an image has never changes.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from visionloop.data.drop import load_aside, write_aside
from visionloop.data.leaks import Leak, Leaks, load_leaks, make_leaks, write_leaks
from visionloop.data.manifest import MOST_PARTS, load_version_records, make_version, write_quarantine
from visionloop.data.tombstones import load_tombstones
from visionloop.errors import ParamsError
from visionloop.ingest.check import Checked
from visionloop.ingest.expect import check_classes, check_expectations, check_new_classes, find_small_classes
from visionloop.ingest.inspect import Inspected, describe_bits
from visionloop.ingest.labels import Correction, Labels, make_label_rules, relabel, unite_labels
from visionloop.ingest.moves import (
    Moves,
    Offers,
    Wishes,
    advise_relabel,
    describe_copies,
    describe_done,
    describe_moves,
    describe_unusable_classes,
    explain_conflict,
    explain_relabelled,
    find_moves,
    find_saved_again,
    relabel_rows,
)
from visionloop.ingest.sides import Newcomer, Sides, decide_sides, describe_sides, make_leak_error
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
    changed: list[ImageRecord]
    refused: list[Rejected]
    notes: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()
    advice: str = ""


@dataclass(frozen=True, slots=True)
class _Found:
    """One image (by sha256) that this pull offers, in the order of the sources, with its final labels."""

    offers: Sequence[tuple[Inspected, Labels]]
    labels: Labels

    @property
    def same(self) -> list[Inspected]:
        return sorted((one for one, _ in self.offers), key=lambda one: one.ordinal)

    @property
    def first(self) -> Inspected:
        return self.offers[0][0] if len(self.offers) == 1 else self.same[0]


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
    """
    split = _fixed_split(parent, params.ingest.split)
    known = _load_known(store, params.name, parent)
    offered = _read_offers(params, known, checked, corrections, wishes)
    rows, found, moves = offered.rows, offered.found, offered.moves
    sides = _find_side_conflicts(found, rows, split)
    added = _add(store, params, rows, found, known.aside, is_first=parent is None)
    left = _leave_out(params, rows, known, moves if wishes.prune else Moves())
    small, out = left.small, left.out
    refused = [*offered.refused, *_list_left_out(found, out, small, params.ingest.expect.min_per_class)]
    records = [rows[sha256] for sha256 in sorted(rows.keys() - out.keys())]
    check_classes(params.name, records, [*checked.rejected, *refused])
    check_expectations(params.name, params.ingest.expect, records)
    changed = [row for row in records if (old := known.before.get(row.sha256)) is not row and old != row]
    taken = out.keys() & known.before.keys()
    remarks = _remark(checked, offered, wishes)
    advice = f"{wishes.say('--relabel')} takes the labels that their source gives now." if moves.relabelled else ""
    if parent and not (changed or taken) and left.aside == known.aside and parent.left_out == tuple(sorted(small)):
        return Merged(parent, [], [*refused, *_list_in_vain(sides)], (), remarks, advice)
    everything = [*checked.rejected, *refused]
    leaks = _inherit_leaks(store, parent, {r.sha256: r for r in records}, make_leaks([*sides, *added.leaks]))
    # The rows of earlier parts would bring back what was taken out; and a version of very many parts is slow to read.
    is_whole = bool(taken) or (parent is not None and len(parent.parts) >= MOST_PARTS)
    newest = records if is_whole else changed
    version = make_version(
        params.name,
        parent,
        records,
        newest,
        is_whole=is_whole,
        num_added=len(records) - len(known.before.keys() - taken),
        split=split.fixed(),
        rejected=write_quarantine(store, params.name, everything),
        num_rejected=len(everything),
        created_at=now,
        cursors={**(parent.cursors if parent else {}), **checked.cursors},
        leaks=write_leaks(store, params.name, leaks),
        num_leaks=len(leaks.rows),
        aside=write_aside(store, [*left.aside.values()]),
        left_out=tuple(sorted(small)),
    )
    notes = (*describe_done(moves, version.version, wishes), *describe_sides(version, records, added, split))
    return Merged(version, newest, refused, notes, remarks, advice)


@dataclass(frozen=True)
class _Left:
    """What the new version does not hold: the rows `out`, by small class or gone; those that are kept `aside`."""

    small: dict[str, int]
    out: dict[str, ImageRecord]
    aside: dict[str, ImageRecord]


def _leave_out(params: Params, rows: Mapping[str, ImageRecord], known: "_Known", pruned: Moves) -> _Left:
    """Choose what is left out. A row that is gone would come back with its class: it is not kept aside then."""
    small = find_small_classes(params, [row for sha256, row in rows.items() if sha256 not in pruned.gone])
    too_few = {s: row for s, row in rows.items() if s not in pruned.gone and {*row.labels} & small.keys()}
    gone = {s: rows[s] for s in pruned.gone}
    waits = {s: row for s, row in gone.items() if not {*row.labels} & small.keys()}
    out = {**too_few, **gone}
    aside = {**known.aside, **too_few, **waits}
    return _Left(small, out, {s: row for s, row in aside.items() if s in out or s not in rows})


def _remark(checked: Checked, offered: "_Offered", wishes: Wishes) -> tuple[str, ...]:
    """Return what is to be told of the sources at each pull, as long as it is so."""
    moves, found = offered.moves, offered.found
    files = Counter(label for same in offered.by_content.values() for _, labels in same for label in labels)
    files.update(checked.rejected_labels)
    usable = {label for one in found.values() for label in one.labels}
    usable.update(label for one in moves.relabelled for label in one.after)
    lines = describe_unusable_classes(files, usable) + describe_copies([one.same for one in found.values()])
    lines += describe_bits(checked.inspected)
    if not wishes.relabel:
        lines += advise_relabel(moves, offered.by_content, wishes.say)
    if not wishes.prune:
        lines += describe_moves(moves, find_saved_again(moves, offered.rows, found), wishes.say)
    return tuple(lines)


@dataclass(frozen=True)
class _Offered:
    """What a pull offers, by sha256: the files with their labels, the images that can be used, and what is not so.

    `rows` are those of the dataset, with the labels that they have from now on.
    """

    rows: dict[str, ImageRecord]
    by_content: Offers
    found: dict[str, _Found]
    moves: Moves
    refused: list[Rejected]


def _read_offers(
    params: Params, known: "_Known", checked: Checked, corrections: Sequence[Correction], wishes: Wishes
) -> _Offered:
    """Apply label map and corrections, and compare with what is known. Raises SourceError, ParamsError as `merge`."""
    rules = make_label_rules(params, corrections, wishes.answers)
    rows, by_content, refused = relabel(rules, known.rows, checked.inspected, known.forgotten, known.aside)
    held = {sha256: rows[sha256] for sha256 in known.before if sha256 not in known.forgotten}
    moves = find_moves(held, by_content, checked, refused, wishes.whole)
    before = [*rows.values()]
    if wishes.relabel:
        relabel_rows(rows, moves)
    found, conflicts = _unite(by_content, rows, explain_relabelled(moves), several=rules.several)
    if known.before and not wishes.allow_new_classes:
        new = [one.labels for sha256, one in found.items() if sha256 not in rows]
        relabelled = [one.after for one in moves.relabelled] if wishes.relabel else []
        check_new_classes(params, before, new, relabelled, option=wishes.say("--allow-new-classes"))
    return _Offered(rows, by_content, found, moves, [*refused, *conflicts])


@dataclass(frozen=True)
class _Known:
    """What is known before a pull: the rows `before` of the version, those beside it, and what was forgotten."""

    before: dict[str, ImageRecord]
    aside: dict[str, ImageRecord]
    waiting: dict[str, ImageRecord]  # those beside it whose class was left out: they may come back
    forgotten: frozenset[str]

    @property
    def rows(self) -> dict[str, ImageRecord]:
        return {**self.before, **self.waiting}


def _load_known(store: ObjectStore, name: str, parent: DatasetVersion | None) -> _Known:
    forgotten = load_tombstones(store, name)
    if parent is None:
        return _Known({}, {}, {}, forgotten)
    before = {r.sha256: r for r in load_version_records(store, parent)}
    aside = {s: r for s, r in load_aside(store, parent).items() if s not in forgotten}
    return _Known(before, aside, {s: r for s, r in aside.items() if {*r.labels} & {*parent.left_out}}, forgotten)


def _list_in_vain(conflicts: Sequence[Leak]) -> list[Rejected]:
    return [Rejected(leak.other_origins[0], "side_conflict", leak.reason) for leak in conflicts]


def _list_left_out(
    found: Mapping[str, "_Found"], out: Mapping[str, ImageRecord], small: Mapping[str, int], least: int
) -> list[Rejected]:
    """Return a line for each file of this pull whose class is left out."""
    return [
        Rejected(
            one.item.origin,
            "class_left_out",
            f"its class {label} has {small[label]} images, fewer than ingest.expect.min_per_class ({least})",
        )
        for sha256, row in out.items()
        if sha256 in found
        for one in found[sha256].same
        for label in row.labels
    ]


def _unite(
    by_content: Offers, rows: Mapping[str, ImageRecord], reasons: Mapping[str, str], *, several: bool
) -> tuple[dict[str, _Found], list[Rejected]]:
    """Find the labels of each content. The same bytes under two labels are a conflict: all of them go to quarantine.

    `reasons` says why, by sha256, where more is known.
    """
    found: dict[str, _Found] = {}
    conflicts: list[Rejected] = []
    for sha256, offers in by_content.items():
        known = rows[sha256].labels if sha256 in rows else ()
        labels = unite_labels(known, (labels for _, labels in offers), several=several)
        if labels is None:
            reason = reasons.get(sha256) or explain_conflict(sha256, known, [labels for _, labels in offers])
            conflicts += [Rejected(one.item.origin, "label_conflict", reason) for one, _ in offers]
        else:
            found[sha256] = _Found(offers, labels)
    return found, conflicts


def _find_side_conflicts(found: Mapping[str, _Found], rows: Mapping[str, ImageRecord], split: Split) -> list[Leak]:
    """Return the images that a source gives another side than the one they have: the first given side stands.

    Raises SourceError if there are any, and `on_leak` is `fail`.
    """
    if split.method == "random":
        return []
    conflicts = []
    for sha256, one in found.items():
        given = _find_given_side(one)
        side = rows[sha256].side if sha256 in rows else given
        if given is None or side in {None, "excluded"}:
            continue
        for offer in one.same:
            other = offer.item.side or ("train" if offer.item.test_is_given and side == "test" else side)
            if other != side:
                places = tuple(sorted(o.item.origin for o in one.same if o.item.side != other))
                conflicts.append(_make_conflict(sha256, str(side), places, offer.item.origin, str(other)))
                break
    if split.on_leak == "fail" and conflicts:
        raise make_leak_error(conflicts)
    return conflicts


def _make_conflict(sha256: str, side: str, places: tuple[str, ...], origin: str, other_side: str) -> Leak:
    reason = f"the same bytes are given {side} and {other_side}; {side}, which was first, stands"
    return Leak("conflict", sha256, places or (origin,), side, None, (origin,), other_side, None, None, reason)


def _find_given_side(found: _Found) -> str | None:
    return next((one.item.side for one in found.same if one.item.side), None)


def _add(
    store: ObjectStore,
    params: Params,
    rows: dict[str, ImageRecord],
    found: Mapping[str, _Found],
    aside: Mapping[str, ImageRecord],
    *,
    is_first: bool,
) -> Sides:
    """Put what was found into `rows`: known images get new places and labels, new ones a side.

    An image that was taken out before, and comes again, has the side that it had, unless its source gives it one now.
    """
    before = list(rows.values())
    first_ordinal = 1 + max((r.ordinal for r in before), default=-1)
    fresh = sorted((f for s, f in found.items() if s not in rows), key=lambda f: f.first.ordinal)
    newcomers = [_make_newcomer(one, aside.get(one.first.facts.sha256)) for one in fresh]
    sides = decide_sides(store, params.ingest, before, newcomers, is_first=is_first)
    for sha256, one in found.items():
        if sha256 in rows:
            rows[sha256] = _extend(rows[sha256], one)
    for one, newcomer in zip(fresh, newcomers, strict=True):
        side, key = sides.of[newcomer.sha256]
        rows[newcomer.sha256] = _make_record(one, newcomer, first_ordinal, side, key)
    return sides


def _make_newcomer(found: _Found, earlier: ImageRecord | None) -> Newcomer:
    facts = found.first.facts
    learn = any(one.item.test_is_given for one in found.same)
    is_its_word = any(one.item.test_is_given and not one.item.excluded_near_test for one in found.same)
    lost = {"excluded", "test"} if is_its_word else {"excluded"}
    had = earlier.side if earlier and earlier.side not in lost else None
    group = next((one.item.group for one in found.same if one.item.group), None)
    return Newcomer(
        sha256=facts.sha256,
        phash=facts.phash,
        origins=tuple(sorted({one.item.origin for one in found.same})),
        labels=found.labels,
        group=group,
        side=_find_given_side(found) or had,
        learn=learn,
        excluded_near_test=any(one.item.excluded_near_test for one in found.same),
    )


def _make_record(found: _Found, newcomer: Newcomer, first_ordinal: int, side: str, key: str) -> ImageRecord:
    first, facts = found.first, found.first.facts
    return ImageRecord(
        sha256=newcomer.sha256,
        labels=found.labels,
        sources=tuple(sorted({one.item.source for one in found.same})),
        origins=newcomer.origins,
        ordinal=first_ordinal + first.ordinal,
        group=newcomer.group,
        key=key,
        side=side,
        captured_at=first.item.captured_at,
        width=facts.width,
        height=facts.height,
        format=facts.format,
        num_bytes=facts.num_bytes,
        phash=facts.phash,
    )


def _extend(known: ImageRecord, found: _Found) -> ImageRecord:
    """Add new places where a known image was found, and a label if it had none; all else stays as first seen."""
    sources, origins = {s.item.source for s in found.same}, {s.item.origin for s in found.same}
    if sources <= {*known.sources} and origins <= {*known.origins} and found.labels == known.labels:
        return known
    return replace(
        known,
        labels=found.labels,
        sources=tuple(sorted(sources | {*known.sources})),
        origins=tuple(sorted(origins | {*known.origins})),
    )


def _inherit_leaks(
    store: ObjectStore, parent: DatasetVersion | None, rows: Mapping[str, ImageRecord], mine: Leaks
) -> Leaks:
    """Return the leaks of the parent that are still there, and those of this pull; each once."""
    earlier = load_leaks(store, parent).rows if parent else ()
    still = [leak for leak in earlier if leak.sha256 in rows and (leak.other is None or leak.other in rows)]
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
