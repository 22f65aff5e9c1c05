"""Pull images from sources into a new dataset version. Resumable: what is stored is not stored again.

Nothing is visible before the version's commit object; two pulls at once both succeed, one after the other.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from visionloop.data.manifest import (
    commit_version,
    latest_version,
    load_pin,
    load_version_records,
    make_pin,
    make_version,
    write_pin,
    write_quarantine,
)
from visionloop.data.split import choose_side
from visionloop.errors import DatasetError, ParamsError, SourceError, shorten
from visionloop.ingest.inspect import Inspected, store_item
from visionloop.ingest.sources import Item, read_source
from visionloop.parallel import map_parallel
from visionloop.params import Ingest, Params, Source, Split
from visionloop.records import DatasetVersion, ImageRecord, Pin, Rejected
from visionloop.settings import Settings
from visionloop.store import ObjectStore

COMMIT_TRIES = 20


@dataclass(frozen=True)
class PullReport:
    """What a pull found and what came of it. `changed` is False when the dataset is as before."""

    pin: Pin
    version: DatasetVersion
    changed: bool
    num_seen: int
    num_added: int
    rejected: tuple[Rejected, ...]


def pull(
    settings: Settings,
    params: Params,
    store: ObjectStore,
    *,
    sources: Sequence[Source],
    now: str,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> PullReport:
    """Read sources, quarantine what is unusable, commit a version if anything is new, and pin it in the workspace.

    Raises:
        SourceError: a source is missing or empty, too many files are unusable, or there is only one class.
        ParamsError: the split differs from the one that version 1 fixed.
    """
    items = [i for s in sources for i in read_source(s, home=settings.home, hidden_dir=settings.hidden_dir)]
    inspected, rejected = _inspect(items, store, params.ingest, on_progress)
    _check_rejected(rejected, len(items), params.ingest.max_rejected_ratio)
    for _ in range(COMMIT_TRIES):
        parent = latest_version(store, params.name)
        version, changed, conflicts = _merge(store, params, parent, inspected, rejected, now=now)
        if parent and not changed:
            version = parent
        elif not commit_version(store, version, changed):
            continue  # another pull took this number: merge with what it brought
        pin = _move_pin(settings, version)
        num_added = version.num_images - (parent.num_images if parent else 0)
        return PullReport(
            pin=pin,
            version=version,
            changed=parent is None or version.digest != parent.digest,
            num_seen=len(items),
            num_added=num_added,
            rejected=tuple(sorted([*rejected, *conflicts], key=lambda r: r.origin)),
        )
    raise DatasetError(
        f"dataset {params.name}", f"lost the race for a version {COMMIT_TRIES} times", "a quieter moment"
    )


def check_sources(params: Params) -> Sequence[Source]:
    """Return the declared sources. Raises SourceError when there are none."""
    if not params.ingest.sources:
        raise SourceError(
            "params.yaml ingest.sources",
            "names no source",
            "at least one",
            "Run `visionloop ingest FOLDER` once, or add a source to the file.",
        )
    return params.ingest.sources


def _inspect(
    items: Sequence[Item], store: ObjectStore, limits: Ingest, on_progress: Callable[[int, int], None]
) -> tuple[list[Inspected], list[Rejected]]:
    inspected: list[Inspected] = []
    rejected: list[Rejected] = []

    def check(item: Item) -> Inspected | Rejected:
        return store_item(item, store, max_file_bytes=limits.max_file_bytes, max_pixels=limits.max_pixels)

    for done, result in enumerate(map_parallel(check, items), start=1):
        if isinstance(result, Rejected):
            rejected.append(result)
        else:
            inspected.append(result)
        on_progress(done, len(items))
    return inspected, rejected


def _check_rejected(rejected: Sequence[Rejected], total: int, max_ratio: float) -> None:
    if rejected and len(rejected) > max_ratio * total:
        worst = shorten([f"{r.origin} ({r.code})" for r in rejected])
        raise SourceError(
            "ingest",
            f"{len(rejected)} of {total} files cannot be used: {worst}",
            f"at most {max_ratio:.0%}",
            "Mend them, or raise ingest.max_rejected_ratio.",
        )


def _merge(
    store: ObjectStore,
    params: Params,
    parent: DatasetVersion | None,
    inspected: Sequence[Inspected],
    rejected: Sequence[Rejected],
    *,
    now: str,
) -> tuple[DatasetVersion, list[ImageRecord], list[Rejected]]:
    """Add what was inspected to the parent's rows; return the new version, its new or changed rows, label conflicts."""
    split = _fixed_split(parent, params.ingest.split)
    before = {r.sha256: r for r in load_version_records(store, parent)} if parent else {}
    first_ordinal = 1 + max((r.ordinal for r in before.values()), default=-1)
    found, conflicts = _unite(inspected, before)
    rows = dict(before)
    for sha256, same in found.items():
        rows[sha256] = _extend(before[sha256], same) if sha256 in before else _make_record(same, split, first_ordinal)
    changed = [row for sha256, row in sorted(rows.items()) if before.get(sha256) != row]
    records = [rows[sha256] for sha256 in sorted(rows)]
    _check_classes(params.name, records)
    everything = [*rejected, *conflicts]
    version = make_version(
        params.name,
        parent,
        records,
        changed,
        num_added=len(rows) - len(before),
        split=split.model_dump(mode="json"),
        rejected=write_quarantine(store, params.name, everything),
        num_rejected=len(everything),
        created_at=now,
    )
    return version, changed, conflicts


def _unite(
    inspected: Iterable[Inspected], before: dict[str, ImageRecord]
) -> tuple[dict[str, list[Inspected]], list[Rejected]]:
    """Group by content. The same bytes under two labels are a conflict: all of them go to quarantine."""
    groups: dict[str, list[Inspected]] = defaultdict(list)
    for one in inspected:
        groups[one.sha256].append(one)
    conflicts: list[Rejected] = []
    for sha256, same in list(groups.items()):
        labels = {one.item.labels for one in same} | ({before[sha256].labels} if sha256 in before else set())
        if len(labels) > 1:
            names = shorten([label for group in labels for label in group])
            conflicts += [Rejected(s.item.origin, "label_conflict", f"same bytes labelled {names}") for s in same]
            del groups[sha256]
    return dict(groups), conflicts


def _make_record(same: Sequence[Inspected], split: Split, first_ordinal: int) -> ImageRecord:
    first = min(same, key=lambda s: s.item.ordinal)
    key = first.item.group or first.sha256
    given = next((s.item.side for s in sorted(same, key=lambda s: s.item.ordinal) if s.item.side), None)
    side = given or choose_side(key, split.seed, split.fractions, test_is_given=first.item.test_is_given)
    return ImageRecord(
        sha256=first.sha256,
        labels=first.item.labels,
        sources=tuple(sorted({s.item.source for s in same})),
        origins=tuple(sorted({s.item.origin for s in same})),
        ordinal=first_ordinal + first.item.ordinal,
        group=first.item.group,
        key=key,
        side=side,
        captured_at=None,
        width=first.width,
        height=first.height,
        format=first.format,
        num_bytes=first.num_bytes,
        phash=first.phash,
    )


def _extend(known: ImageRecord, same: Sequence[Inspected]) -> ImageRecord:
    """Add new places where a known image was found; all else stays as first seen."""
    return replace(
        known,
        sources=tuple(sorted({*known.sources, *(s.item.source for s in same)})),
        origins=tuple(sorted({*known.origins, *(s.item.origin for s in same)})),
    )


def _fixed_split(parent: DatasetVersion | None, split: Split) -> Split:
    if parent is None or parent.split == split.model_dump(mode="json"):
        return split
    fixed = parent.split
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


def _move_pin(settings: Settings, version: DatasetVersion) -> Pin:
    """Pin the version, unless the pin stands on the same content already."""
    pin = make_pin(version)
    if settings.pin_path.is_file():
        try:
            current = load_pin(settings.pin_path)
        except DatasetError:
            current = None
        if current and (current.name, current.digest) == (pin.name, pin.digest):
            return current
    write_pin(settings.pin_path, pin)
    return pin
