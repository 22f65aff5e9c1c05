"""Add what a pull has found to the rows of the version before, and compare the result with `ingest.expect`.

Only the lists of quarantine and leaks are written, under their digests. A side that an image has never changes.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from visionloop.data.leaks import Leak, Leaks, load_leaks, make_leaks, write_leaks
from visionloop.data.manifest import load_version_records, make_version, write_quarantine
from visionloop.data.tombstones import load_tombstones
from visionloop.errors import ParamsError, SourceError, shorten
from visionloop.ingest.check import Checked
from visionloop.ingest.inspect import Inspected
from visionloop.ingest.labels import Correction, Labels, make_label_rules, relabel, unite_labels
from visionloop.ingest.sides import Newcomer, decide_sides, make_leak_error
from visionloop.params import Expect, Params, Split
from visionloop.records import DatasetVersion, ImageRecord, Rejected
from visionloop.store import ObjectStore


def check_expectations(name: str, expect: Expect, records: Sequence[ImageRecord]) -> None:
    """Raise SourceError naming everything that is broken. Excluded images do not count, unlabelled ones in no class."""
    if expect == Expect():
        return
    used = [record for record in records if record.side != "excluded"]
    counts = Counter(label for record in used for label in record.labels)
    broken = [*_compare_classes(expect, counts), *_compare_sources(expect, records), *_compare_sizes(expect, used)]
    if broken:
        raise SourceError(
            f"dataset {name}",
            "; ".join(broken),
            "what ingest.expect in params.yaml asks for; no version was made",
            "Mend the source, or change ingest.expect.",
        )


def _compare_classes(expect: Expect, counts: Counter[str]) -> list[str]:
    broken = []
    if expect.classes is not None and (foreign := set(counts) - set(expect.classes)):
        broken.append(f"classes that are not expected ({shorten([f'{c}: {counts[c]} images' for c in foreign])})")
    names = {*(expect.classes or ()), *counts}
    if few := [f"{c}: {counts[c]}" for c in names if counts[c] < expect.min_per_class]:
        broken.append(f"fewer than {expect.min_per_class} images of {shorten(few)}")
    if expect.max_imbalance is not None and counts:
        (most, high), (least, low) = counts.most_common(1)[0], min(counts.items(), key=lambda pair: (pair[1], pair[0]))
        if high > expect.max_imbalance * low:
            ratio = f"{high / low:.1f} times"
            broken.append(
                f"{ratio} as many images of {most} ({high}) as of {least} ({low}), not {expect.max_imbalance:g}"
            )
    return broken


def _compare_sources(expect: Expect, records: Sequence[ImageRecord]) -> list[str]:
    if expect.sources is None:
        return []
    foreign = {source for record in records for source in record.sources} - set(expect.sources)
    return [f"sources that may not deliver ({shorten([*foreign])})"] if foreign else []


def _compare_sizes(expect: Expect, used: Sequence[ImageRecord]) -> list[str]:
    if expect.size_px is None:
        return []
    shortest, longest = expect.size_px
    bad = [r for r in used if min(r.width, r.height) < shortest or max(r.width, r.height) > longest]
    if not bad:
        return []
    named = shorten([f"{r.origins[0]} {r.width}x{r.height}" for r in bad])
    return [f"{len(bad)} images with a side outside {shortest} to {longest} px ({named})"]


@dataclass(frozen=True)
class Merged:
    """A version that is not committed yet (the parent itself, when no row is new or differs), and what was refused."""

    version: DatasetVersion
    changed: list[ImageRecord]
    refused: list[Rejected]


@dataclass(frozen=True, slots=True)
class _Found:
    """One image (by sha256) that this pull offers, in the order of the sources, with its final labels."""

    same: list[Inspected]
    labels: Labels

    @property
    def first(self) -> Inspected:
        return self.same[0]


def merge(
    store: ObjectStore,
    params: Params,
    parent: DatasetVersion | None,
    checked: Checked,
    *,
    now: str,
    corrections: Sequence[Correction] = (),
) -> Merged:
    """Add what was checked to the parent's rows.

    Raises:
        ParamsError: the split differs from the one that version 1 fixed, or the label map renames twice.
        SourceError: there is only one class, a correction fits no image, there are leaks and `on_leak` is `fail`, or
            an expectation of `ingest.expect` is not met.
    """
    split = _fixed_split(parent, params.ingest.split)
    before = {r.sha256: r for r in load_version_records(store, parent)} if parent else {}
    forgotten = load_tombstones(store, params.name)
    rules = make_label_rules(params, corrections)
    rows, by_content, refused = relabel(rules, before, checked.inspected, forgotten)
    found, conflicts = _unite(by_content, rows, several=rules.several)
    refused += conflicts
    sides = _find_side_conflicts(found, rows, split)
    if split.on_leak == "fail" and sides:
        raise make_leak_error(sides)
    new = _add(store, params, rows, found, is_first=parent is None)
    records = [rows[sha256] for sha256 in sorted(rows)]
    changed = [row for row in records if (old := before.get(row.sha256)) is not row and old != row]
    _check_classes(params.name, records, [*checked.rejected, *refused])
    check_expectations(params.name, params.ingest.expect, records)
    mine = make_leaks([*sides, *new])
    if parent and not changed:
        in_vain = [Rejected(leak.other_origins[0], "side_conflict", leak.reason) for leak in sides]
        return Merged(parent, [], [*refused, *in_vain])
    everything = [*checked.rejected, *refused]
    leaks = _inherit_leaks(store, parent, rows, mine)
    version = make_version(
        params.name,
        parent,
        records,
        changed,
        num_added=len(rows) - len(before),
        split=split.fixed(),
        rejected=write_quarantine(store, params.name, everything),
        num_rejected=len(everything),
        created_at=now,
        cursors={**(parent.cursors if parent else {}), **checked.cursors},
        leaks=write_leaks(store, params.name, leaks),
        num_leaks=len(leaks.rows),
    )
    return Merged(version, changed, refused)


def _unite(
    by_content: Mapping[str, Sequence[tuple[Inspected, Labels]]], rows: Mapping[str, ImageRecord], *, several: bool
) -> tuple[dict[str, _Found], list[Rejected]]:
    """Find the labels of each content. The same bytes under two labels are a conflict: all of them go to quarantine."""
    found: dict[str, _Found] = {}
    conflicts: list[Rejected] = []
    for sha256, offers in by_content.items():
        known = rows[sha256].labels if sha256 in rows else ()
        labels = unite_labels(known, (labels for _, labels in offers), several=several)
        if labels is None:
            names = shorten([*{label for some in (known, *(labels for _, labels in offers)) for label in some}])
            conflicts += [Rejected(o.item.origin, "label_conflict", f"same bytes labelled {names}") for o, _ in offers]
        else:
            found[sha256] = _Found(sorted((one for one, _ in offers), key=lambda one: one.ordinal), labels)
    return found, conflicts


def _find_side_conflicts(found: Mapping[str, _Found], rows: Mapping[str, ImageRecord], split: Split) -> list[Leak]:
    """Return the images that a source gives another side than the one they have: the first given side stands."""
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
    return conflicts


def _make_conflict(sha256: str, side: str, places: tuple[str, ...], origin: str, other_side: str) -> Leak:
    reason = f"the same bytes are given {side} and {other_side}; {side}, which was first, stands"
    return Leak("conflict", sha256, places or (origin,), side, None, (origin,), other_side, None, None, reason)


def _find_given_side(found: _Found) -> str | None:
    return next((one.item.side for one in found.same if one.item.side), None)


def _add(
    store: ObjectStore, params: Params, rows: dict[str, ImageRecord], found: Mapping[str, _Found], *, is_first: bool
) -> list[Leak]:
    """Put what was found into `rows`: known images get new places and labels, new ones a side. Return the new leaks."""
    before = list(rows.values())
    first_ordinal = 1 + max((r.ordinal for r in before), default=-1)
    fresh = sorted((f for s, f in found.items() if s not in rows), key=lambda f: f.first.ordinal)
    newcomers = [_make_newcomer(one) for one in fresh]
    sides = decide_sides(store, params.ingest, before, newcomers, is_first=is_first)
    for sha256, one in found.items():
        if sha256 in rows:
            rows[sha256] = _extend(rows[sha256], one)
    for one, newcomer in zip(fresh, newcomers, strict=True):
        side, key = sides.of[newcomer.sha256]
        rows[newcomer.sha256] = _make_record(one, newcomer, first_ordinal, side, key)
    return sides.leaks


def _make_newcomer(found: _Found) -> Newcomer:
    facts = found.first.facts
    group = next((one.item.group for one in found.same if one.item.group), None)
    return Newcomer(
        sha256=facts.sha256,
        phash=facts.phash,
        origins=tuple(sorted({one.item.origin for one in found.same})),
        is_labelled=bool(found.labels),
        group=group,
        side=_find_given_side(found),
        learn=any(one.item.test_is_given for one in found.same),
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


def _check_classes(name: str, records: Sequence[ImageRecord], refused: Sequence[Rejected]) -> None:
    """Raise SourceError when there are fewer than two classes; it names what the other images were refused for."""
    classes = {label for r in records if r.side != "excluded" for label in r.labels}
    if len(classes) >= 2:
        return
    codes = Counter(one.code for one in refused)
    found = f"has {len(classes)} class ({shorten(list(classes)) or 'none'})"
    for code, number in codes.most_common(3):
        first = min((one for one in refused if one.code == code), key=lambda one: one.origin)
        found += f", and {number:,} not taken as {code}, such as {first.origin} ({first.reason[:120]})"
    todos = {
        "several_labels": "Set `task: multilabel`.",
        "label_conflict": "Keep one copy of each image, or say which label is right in ingest.corrections.",
    }
    worst = codes.most_common(1)[0][0] if codes else ""
    others = "Mend what was not taken." if codes else "Add a folder of images for each other class."
    raise SourceError(f"dataset {name}", found, "two classes or more", todos.get(worst, others))
