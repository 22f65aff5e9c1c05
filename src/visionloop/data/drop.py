"""A mistaken version, or a source, taken back: a new version without what it brought. Versions themselves never change.

What is taken out keeps its row beside the version (`aside`): an image that comes again gets the side that it had.
Its bytes stay in the store; `forget` removes those.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from io import BytesIO
from typing import Any

from visionloop.data.leaks import load_leaks, make_leaks, write_leaks
from visionloop.data.manifest import count_unusable, latest_version, load_quarantine, load_version, write_quarantine
from visionloop.data.parts import (
    commit_version,
    digest_rows,
    load_version_records,
    make_part_key,
    make_version,
    write_part,
)
from visionloop.data.rows import HeldRows, hold_records, iterate_part
from visionloop.data.tombstones import load_tombstones
from visionloop.errors import DatasetError, shorten
from visionloop.records import DatasetVersion, ImageRecord
from visionloop.store import ObjectStore

COMMIT_TRIES = 20
Rows = dict[str, ImageRecord]


@dataclass(frozen=True)
class Dropped:
    """The version that holds what was taken back, the new one without it, and the rows of both."""

    before: DatasetVersion
    after: DatasetVersion
    rows_before: tuple[ImageRecord, ...]
    rows_after: tuple[ImageRecord, ...]


def load_aside(store: ObjectStore, version: DatasetVersion) -> Rows:
    """Return the rows that were taken out of a dataset up to a version, by sha256. Raises DatasetError, StoreError."""
    if version.aside is None:
        return {}
    where = f"dataset {version.name} version {version.version}, images taken out"
    return {r.sha256: r for r in iterate_part(BytesIO(store.get(make_part_key(version.aside))), where)}


def write_aside(store: ObjectStore, records: Sequence[ImageRecord]) -> str | None:
    """Keep the rows that are in no version any more; return the digest of their list, None if there are none."""
    if not records:
        return None
    held = hold_records(records)
    digest = digest_rows(held.iterate_batches())
    write_part(store, digest, held.iterate_batches())
    return digest


def make_smaller_version(store: ObjectStore, parent: DatasetVersion, kept: HeldRows, **facts: Any) -> DatasetVersion:
    """Describe the version after `parent` that holds `kept` alone; `facts` are `created_at`, and what else differs.

    Its rows are one part of their own: those of the parent's parts would bring the others back. No side changes. The
    leaks are those of the parent between images that are still there, and its quarantine is the parent's.
    """
    earlier = load_leaks(store, parent).rows
    named = {sha256 for leak in earlier for sha256 in (leak.sha256, leak.other)}
    held = {None, *(record.sha256 for record in (kept if named else ()) if record.sha256 in named)}
    leaks = make_leaks([leak for leak in earlier if leak.sha256 in held and leak.other in held])
    names = ("cursors", "aside", "left_out", "split", "rejected", "num_rejected")
    inherited = {"num_added": 0, **{name: getattr(parent, name) for name in names}}
    written = {"leaks": write_leaks(store, parent.name, leaks), "num_leaks": len(leaks.rows)}
    return make_version(parent.name, parent, kept, kept, is_whole=True, **{**inherited, **written, **facts})


def drop_version(store: ObjectStore, name: str, number: int, *, now: str) -> Dropped:
    """Commit a version without what the newest one brought: images, labels, places, and how far sources were read.

    After a drop the newest version holds what an earlier one holds: that number may be dropped too, to go back
    further; and the drop itself may be dropped.

    Raises:
        DatasetError: the version is not the newest, or there would be no dataset without it.
    """

    def choose(newest: DatasetVersion, rows: Rows) -> tuple[Rows, dict[str, Any]]:
        wanted = newest if number == newest.version else load_version(store, name, number)
        if wanted.digest != newest.digest:
            raise DatasetError(
                f"dataset {name} version {number}",
                f"is not the newest, which is {newest.version}",
                "the newest version: each holds all of the ones before",
                f"Drop {newest.version} first, or take out one source: `visionloop datasets drop --source NAME`.",
            )
        if wanted.parent is None:
            raise _make_empty_error(name, f"version {number} is the first: nothing would be left")
        parent = load_version(store, name, wanted.parent)
        gone = load_tombstones(store, name)
        kept = {r.sha256: r for r in load_version_records(store, parent) if r.sha256 not in gone}
        if kept == rows:
            raise DatasetError(
                f"dataset {name} version {number}",
                f"brought nothing that version {parent.version} has not",
                "a version with images or labels of its own",
                "`visionloop datasets` lists what each one brought.",
            )
        quarantine = {"rejected": parent.rejected, "num_rejected": parent.num_rejected}
        return kept, {"cursors": parent.cursors, "left_out": parent.left_out, **quarantine}

    return _commit(store, name, choose, now)


def drop_source(store: ObjectStore, name: str, source: str, *, now: str) -> Dropped:
    """Commit a version without a source: what no other source has goes; other images lose only this place.

    Raises:
        DatasetError: no image came from such a source, or there would be no dataset without it.
    """

    def choose(newest: DatasetVersion, rows: Rows) -> tuple[Rows, dict[str, Any]]:
        if source not in newest.sources:
            found = f"no image of version {newest.version} came from the source {source}"
            raise DatasetError(f"dataset {name}", found, f"one of {shorten(newest.sources)}", "Name one of them.")
        kept = {}
        for sha256, row in rows.items():
            if left := tuple(one for one in row.sources if one != source):
                origins = tuple(origin for origin in row.origins if not origin.startswith(f"{source}:"))
                kept[sha256] = (
                    replace(row, sources=left, origins=origins or row.origins) if left != row.sources else row
                )
        rest = [one for one in load_quarantine(store, newest) if not one.origin.startswith(f"{source}:")]
        quarantine = {"rejected": write_quarantine(store, name, rest), "num_rejected": count_unusable(rest)}
        return kept, {"cursors": {one: at for one, at in newest.cursors.items() if one != source}, **quarantine}

    return _commit(store, name, choose, now)


def _commit(
    store: ObjectStore,
    name: str,
    choose: Callable[[DatasetVersion, Rows], tuple[Rows, dict[str, Any]]],
    now: str,
) -> Dropped:
    """Commit the rows that `choose` keeps of the newest version; once more if another process takes the number."""
    for _ in range(COMMIT_TRIES):
        newest = latest_version(store, name)
        if newest is None:
            raise DatasetError(
                f"dataset {name}", "has no version in this store", "one or more", "Run `visionloop ingest PATH`."
            )
        rows = {r.sha256: r for r in load_version_records(store, newest)}
        kept, facts = choose(newest, rows)
        _check_left(name, kept)
        facts["aside"] = _set_aside(store, newest, rows, kept, facts.get("left_out", newest.left_out))
        facts["num_added"] = len(kept.keys() - rows.keys())
        held = hold_records(kept.values())
        version = make_smaller_version(store, newest, held, created_at=now, **facts)
        if commit_version(store, version, held):
            return Dropped(newest, version, tuple(rows.values()), tuple(kept[sha256] for sha256 in sorted(kept)))
        # Another process took this number: look again.
    raise DatasetError(
        f"dataset {name}", f"lost the race for a version {COMMIT_TRIES} times", "a quieter moment", "Run it again."
    )


def _set_aside(
    store: ObjectStore, newest: DatasetVersion, rows: Rows, kept: Rows, left_out: Sequence[str]
) -> str | None:
    """Write the rows that are out now. Those of classes that were left out would come back by themselves: not these."""
    taken = {sha256: row for sha256, row in rows.items() if sha256 not in kept and not set(row.labels) & set(left_out)}
    earlier = load_aside(store, newest)
    return write_aside(store, [row for sha256, row in {**earlier, **taken}.items() if sha256 not in kept])


def _check_left(name: str, kept: Rows) -> None:
    classes = {label for row in kept.values() if row.side != "excluded" for label in row.labels}
    if len(classes) < 2:
        raise _make_empty_error(name, f"would have {len(classes)} class ({shorten(list(classes)) or 'none'}) left")


def _make_empty_error(name: str, found: str) -> DatasetError:
    return DatasetError(
        f"dataset {name}",
        found,
        "two classes or more that stay",
        "To start anew, write another `name` into params.yaml and run `visionloop ingest PATH`.",
    )
