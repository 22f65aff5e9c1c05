"""The dataset without some images: a new version, the pin on it, and the older lists without the images' origins.

An older version keeps the row of a forgotten image, without where it came from: its digest does not cover that.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from io import BytesIO

import pyarrow as pa
import pyarrow.compute as pc

from visionloop.data.answers import drop_asked
from visionloop.data.drop import load_aside, make_smaller_version, write_aside
from visionloop.data.leaks import Leak
from visionloop.data.manifest import latest_version, list_versions, load_pin, make_pin, write_pin
from visionloop.data.parts import commit_version, iterate_batches, iterate_version, make_part_key
from visionloop.data.rows import hold_rows, iterate_file, iterate_part, translate_damage
from visionloop.errors import DatasetError
from visionloop.records import DatasetVersion, Rejected, canonical_json
from visionloop.settings import Settings
from visionloop.store import ObjectStore

FORGOTTEN = "(forgotten)"
COMMIT_TRIES = 20
SPARE = ".rewritten"


@dataclass(frozen=True)
class Trace:
    """Where the versions of a dataset name some images: parts of manifests, version numbers, origins."""

    parts: dict[str, frozenset[str]]
    versions: tuple[int, ...]
    origins: frozenset[str]


def trace_images(store: ObjectStore, name: str, sha256s: frozenset[str]) -> Trace:
    """Read every part of every version for the rows of some images. Raises DatasetError."""
    _restore_spares(store, name)
    versions = list_versions(store, name)
    parts: dict[str, frozenset[str]] = {}
    origins: set[str] = set()
    lists = (part for version in versions for part in (*version.parts, version.aside) if part)
    for part in dict.fromkeys(lists):
        with store.open(make_part_key(part)) as file:
            rows = [r for r in iterate_part(file, f"manifest {part[:12]}") if r.sha256 in sha256s]
        if rows:
            parts[part] = frozenset(r.sha256 for r in rows)
            origins.update(origin for r in rows for origin in r.origins)
    holding = tuple(v.version for v in versions if any(part in parts for part in v.parts))
    return Trace(parts, holding, frozenset(origins - {FORGOTTEN}))


def commit_without(store: ObjectStore, name: str, sha256s: frozenset[str], *, now: str) -> DatasetVersion | None:
    """Commit the version without these images, unless the newest is that already; return the newest."""
    for _ in range(COMMIT_TRIES):
        parent = latest_version(store, name)
        if parent is None:
            return None
        kept = hold_rows(_leave_out(batch, sha256s) for batch in iterate_batches(store, parent))
        if len(kept) == parent.num_images:
            return parent
        aside = [row for row in load_aside(store, parent).values() if row.sha256 not in sha256s]
        version = make_smaller_version(store, parent, kept, created_at=now, aside=write_aside(store, aside))
        if commit_version(store, version, kept):
            return version
    raise DatasetError(
        f"dataset {name}", f"lost the race for a version {COMMIT_TRIES} times", "a quieter moment", "Run it again."
    )


def _leave_out(batch: pa.RecordBatch, sha256s: frozenset[str]) -> pa.RecordBatch:
    return batch.filter(pc.invert(_is_in(batch, sha256s)))


def _is_in(batch: pa.RecordBatch, sha256s: frozenset[str]) -> pa.Array:
    return pc.is_in(batch["sha256"], pa.array(sorted(sha256s), pa.string()))


def move_pin(settings: Settings, version: DatasetVersion, holding: Iterable[int]) -> bool:
    """Pin the version if the workspace stands on one that holds a forgotten image; say whether it did."""
    try:
        pin = load_pin(settings.pin_path)
    except DatasetError:
        return False
    if pin.name != version.name or pin.version not in set(holding):
        return False
    write_pin(settings.pin_path, make_pin(version))
    return True


def redact(store: ObjectStore, name: str, sha256s: frozenset[str], trace: Trace) -> int:
    """Take the origins of forgotten images out of all older lists; return how many lists were rewritten.

    The parts come last: they are what the origins are known from, when this is run again after a kill.
    """
    rewritten = 0
    for key in store.list(f"quarantine/{name}/"):
        rejected = [Rejected.from_json(row) for row in json.loads(store.get(key))]
        clean = [Rejected(FORGOTTEN, r.code, FORGOTTEN) if r.origin in trace.origins else r for r in rejected]
        rewritten += _rewrite(store, key, canonical_json([r.to_json() for r in clean]), rejected != clean)
    for key in store.list(f"leaks/{name}/"):
        if not key.endswith(".json"):
            continue
        leaks = [Leak.from_json(row) for row in json.loads(store.get(key))]
        cleaned = [_redact_leak(row, sha256s) for row in leaks]
        rewritten += _rewrite(store, key, canonical_json([r.to_json() for r in cleaned]), leaks != cleaned)
    for key in [key for key in store.list(f"review/{name}/") if key.endswith(".json")]:
        asked = json.loads(store.get(key))
        rest = drop_asked(asked, sha256s)
        rewritten += _rewrite(store, key, canonical_json(rest), asked != rest)
    for part in trace.parts:
        data, sink = BytesIO(store.get(make_part_key(part))), BytesIO()
        with translate_damage(f"manifest {part[:12]}"):
            if all(_redact_rows(batch, sha256s).equals(batch) for batch in iterate_file(data)):
                continue
            hold_rows((_redact_rows(batch, sha256s) for batch in iterate_file(data)), sink)
        rewritten += _rewrite(store, make_part_key(part), sink.getvalue(), changed=True)
    return rewritten


def find_other_holders(store: ObjectStore, name: str, sha256s: frozenset[str]) -> dict[str, frozenset[str]]:
    """Return the other datasets of this store whose newest version holds some of the images."""
    names = sorted({key.split("/")[1] for key in store.list("datasets/")} - {name})
    holders = {}
    for other in names:
        latest = latest_version(store, other)
        rows = iterate_version(store, latest) if latest else ()
        held = frozenset(r.sha256 for r in rows if r.sha256 in sha256s)
        if held:
            holders[other] = held
    return holders


def _names(row: Leak, sha256s: frozenset[str]) -> bool:
    return row.sha256 in sha256s or row.other in sha256s


def _redact_leak(row: Leak, sha256s: frozenset[str]) -> Leak:
    if not _names(row, sha256s):
        return row
    return replace(
        row,
        origins=(FORGOTTEN,) if row.sha256 in sha256s else row.origins,
        other_origins=(FORGOTTEN,) if row.other in sha256s else row.other_origins,
        reason=FORGOTTEN,
    )


def _redact_rows(batch: pa.RecordBatch, sha256s: frozenset[str]) -> pa.RecordBatch:
    is_gone = _is_in(batch, sha256s)
    if not pc.any(is_gone).as_py():
        return batch
    pairs = zip(batch["origins"].to_pylist(), is_gone.to_pylist(), strict=True)
    origins = pa.array(([FORGOTTEN] if gone else origins for origins, gone in pairs), batch["origins"].type)
    return batch.set_column(batch.schema.get_field_index("origins"), "origins", origins)


def _rewrite(store: ObjectStore, key: str, data: bytes, changed: bool) -> int:
    """Replace an object and all its earlier versions. A kill in between leaves a spare copy, which is put back."""
    if not changed:
        return 0
    store.put(key + SPARE, data)
    _put_for_good(store, key, data)
    return 1


def _restore_spares(store: ObjectStore, name: str) -> None:
    for prefix in ("manifests/", f"quarantine/{name}/", f"leaks/{name}/", f"review/{name}/"):
        for key in [key for key in store.list(prefix) if key.endswith(SPARE)]:
            _put_for_good(store, key.removesuffix(SPARE), store.get(key))


def _put_for_good(store: ObjectStore, key: str, data: bytes) -> None:
    store.purge(key)
    store.put(key, data)
    store.purge(key + SPARE)
