"""Add what a pull has found to the rows of the version before: sides, conflicts, and the version that comes of it.

Nothing is written here but quarantine and leak lists, which lie under their digest. A side that was given stays.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from visionloop.data.manifest import load_version_records, make_version, write_quarantine
from visionloop.data.split import choose_side
from visionloop.errors import ParamsError, SourceError, shorten
from visionloop.ingest.check import Checked
from visionloop.ingest.inspect import Inspected
from visionloop.params import Params, Split
from visionloop.records import DatasetVersion, ImageRecord, Rejected
from visionloop.store import ObjectStore


@dataclass(frozen=True)
class Merged:
    """A version that is not committed yet, its new or changed rows, and what the merge refused."""

    version: DatasetVersion
    changed: list[ImageRecord]
    refused: list[Rejected]


def merge(store: ObjectStore, params: Params, parent: DatasetVersion | None, checked: Checked, *, now: str) -> Merged:
    """Add what was checked to the parent's rows.

    Raises:
        ParamsError: the split differs from the one that version 1 fixed.
        SourceError: there is only one class.
    """
    split = _fixed_split(parent, params.ingest.split)
    before = {r.sha256: r for r in load_version_records(store, parent)} if parent else {}
    first_ordinal = 1 + max((r.ordinal for r in before.values()), default=-1)
    found, conflicts = _unite(checked.inspected, before)
    rows = dict(before)
    for sha256, same in found.items():
        rows[sha256] = _extend(before[sha256], same) if sha256 in before else _make_record(same, split, first_ordinal)
    changed = [row for sha256, row in sorted(rows.items()) if before.get(sha256) != row]
    records = [rows[sha256] for sha256 in sorted(rows)]
    _check_classes(params.name, records)
    everything = [*checked.rejected, *conflicts]
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
    )
    return Merged(version, changed, conflicts)


def _unite(
    inspected: Iterable[Inspected], before: dict[str, ImageRecord]
) -> tuple[dict[str, list[Inspected]], list[Rejected]]:
    """Group by content. The same bytes under two labels are a conflict: all of them go to quarantine."""
    groups: dict[str, list[Inspected]] = defaultdict(list)
    for one in inspected:
        groups[one.facts.sha256].append(one)
    conflicts: list[Rejected] = []
    for sha256, same in list(groups.items()):
        labels = {one.item.labels for one in same} | ({before[sha256].labels} if sha256 in before else set())
        if len(labels) > 1:
            names = shorten([label for group in labels for label in group])
            conflicts += [Rejected(s.item.origin, "label_conflict", f"same bytes labelled {names}") for s in same]
            del groups[sha256]
    return dict(groups), conflicts


def _make_record(same: Sequence[Inspected], split: Split, first_ordinal: int) -> ImageRecord:
    first = min(same, key=lambda s: s.ordinal)
    key = first.item.group or first.facts.sha256
    given = next((s.item.side for s in sorted(same, key=lambda s: s.ordinal) if s.item.side), None)
    side = given or choose_side(key, split.seed, split.fractions, test_is_given=first.item.test_is_given)
    return ImageRecord(
        sha256=first.facts.sha256,
        labels=first.item.labels,
        sources=tuple(sorted({s.item.source for s in same})),
        origins=tuple(sorted({s.item.origin for s in same})),
        ordinal=first_ordinal + first.ordinal,
        group=first.item.group,
        key=key,
        side=side,
        captured_at=first.item.captured_at,
        width=first.facts.width,
        height=first.facts.height,
        format=first.facts.format,
        num_bytes=first.facts.num_bytes,
        phash=first.facts.phash,
    )


def _extend(known: ImageRecord, same: Sequence[Inspected]) -> ImageRecord:
    """Add new places where a known image was found; all else stays as first seen."""
    return replace(
        known,
        sources=tuple(sorted({*known.sources, *(s.item.source for s in same)})),
        origins=tuple(sorted({*known.origins, *(s.item.origin for s in same)})),
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


def _check_classes(name: str, records: Sequence[ImageRecord]) -> None:
    classes = {label for r in records for label in r.labels}
    if len(classes) < 2:
        raise SourceError(
            f"dataset {name}",
            f"has {len(classes)} class ({shorten(list(classes)) or 'none'})",
            "two classes or more",
            "Add a folder of images for each other class.",
        )
