"""Dataset versions: the manifest's rows, their digest, the commit object, and the pin of a workspace.

manifests/<digest>.parquet        rows that came with a version, at most 250,000 of them; in the order of their sha256
datasets/NAME/000001.json         the commit: created only if the number is free
quarantine/NAME/<digest>.json     files that could not be used
data/dataset.json                 the pin (in the workspace, in git)

Rows of a version are read from all of its parts at once, in their order: whoever needs them one after the other
(`iterate_version`) never holds all of them.
"""

import hashlib
import json
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from io import BytesIO
from itertools import islice, pairwise
from operator import attrgetter
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from visionloop.errors import DatasetError, ObjectMissing, StoreError
from visionloop.params.text import has_conflict_marks
from visionloop.records import SIDES, DatasetVersion, ImageRecord, Pin, Rejected, canonical_json, compute_digest
from visionloop.store import ObjectStore
from visionloop.store.keys import make_number_key

# One more place where an image was found does not change what is learned from it.
NOT_IN_DIGEST = frozenset({"sources", "origins"})
PART_ROWS = 250_000
# Listed in a quarantine for an image that is in the dataset all the same.
IS_TAKEN = "side_conflict"
# Listed, but not broken: images that no row names or whose split is an unknown word, forgotten ones, left-out classes.
NOT_UNUSABLE = frozenset({"image_without_row", "unknown_side", "forgotten", "class_left_out", IS_TAKEN})
GROUP_ROWS = 16_384  # that a part has together, and a reader in memory
BATCH_ROWS = 4096
MOST_SHARED = 16_384  # values of a part that are held, for rows that have the same
MOST_PARTS = 100  # of a version: a pull that finds so many writes all rows into new ones
MOST_OPEN = 64  # parts that are read where they lie; of more the bytes are held

# In the order of the record's fields.
COLUMNS = {
    "sha256": "string",
    "labels": "list",
    "sources": "list",
    "origins": "list",
    "ordinal": "int64",
    "group": "string",
    "key": "string",
    "side": "string",
    "captured_at": "string",
    "width": "int32",
    "height": "int32",
    "format": "string",
    "num_bytes": "int64",
    "phash": "string",
}
_encode_row = json.JSONEncoder(
    sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False, check_circular=False
).encode
get_row = attrgetter(*COLUMNS)
IN_DIGEST = tuple(name for name in COLUMNS if name not in NOT_IN_DIGEST)
_get_digested = attrgetter(*IN_DIGEST)
# Columns whose values many rows share: each is held once.
SHARED = ("labels", "sources", "group", "side", "captured_at", "width", "height", "format")


class Rows(Protocol):
    """Rows that may be read again and again, and whose number is known: a list, or what reads them from elsewhere."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[ImageRecord]: ...


def make_image_key(sha256: str) -> str:
    """Return the store key of an image's bytes."""
    return f"images/{sha256[:2]}/{sha256}"


def _encode_for_digest(record: ImageRecord) -> bytes:
    """Return the same bytes as `canonical_json` of these fields and a line feed, four times as fast."""
    return _encode_row(dict(zip(IN_DIGEST, _get_digested(record), strict=True))).encode() + b"\n"


def compute_rows_digest(records: Iterable[ImageRecord]) -> str:
    """Return the sha256 over all fields of rows, in their order: the name of a part. As `compute_digest` of a list."""
    total, between = hashlib.sha256(b"["), b""
    for record in records:
        total.update(between + _encode_row(dict(zip(COLUMNS, get_row(record), strict=True))).encode())
        between = b","
    total.update(b"]")
    return total.hexdigest()


def encode_records(records: Iterable[ImageRecord]) -> bytes:
    """Encode rows, sorted by sha256, as Parquet."""
    sink = BytesIO()
    write_records(sink, records)
    return sink.getvalue()


def write_records(sink: BinaryIO, records: Iterable[ImageRecord]) -> None:
    """Write rows, sorted by sha256, as Parquet, one group after the other."""
    _write_in_order(sorted(records, key=lambda r: r.sha256), sink)


def _write_in_order(records: Iterable[ImageRecord], sink: BinaryIO) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    types = {"string": pa.string(), "list": pa.list_(pa.string()), "int64": pa.int64(), "int32": pa.int32()}
    schema = pa.schema([(name, types[kind]) for name, kind in COLUMNS.items()])
    rows = iter(records)
    with pq.ParquetWriter(sink, schema, compression="zstd") as writer:
        some = [*islice(rows, GROUP_ROWS)]
        while True:
            assert all(a.sha256 <= b.sha256 for a, b in pairwise(some)), "rows are in the order of their sha256"
            columns = {name: [getattr(row, name) for row in some] for name in COLUMNS}
            writer.write_table(pa.table(columns, schema=schema))
            if not (some := [*islice(rows, GROUP_ROWS)]):
                return


def decode_records(data: bytes, where: str) -> list[ImageRecord]:
    """Decode the rows of a manifest part. Raises DatasetError."""
    return list(iterate_part(BytesIO(data), where))


def iterate_part(file: BinaryIO, where: str) -> Iterator[ImageRecord]:
    """Yield the rows of a manifest part, in the order of their sha256. Raises DatasetError, StoreError."""
    from visionloop.data.rows import decode_batches, iterate_file

    with translate_damage(where):
        yield from decode_batches(iterate_file(file))


@contextmanager
def translate_damage(where: str) -> Iterator[None]:
    """Say of a part that cannot be read as rows where it is. Raises DatasetError."""
    import pyarrow as pa

    try:
        yield
    except StoreError:
        raise
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, OSError, TypeError, KeyError) as exc:
        raise DatasetError(where, "is damaged", "a manifest in Parquet", "Restore the store from its backup.") from exc


def list_versions(store: ObjectStore, name: str) -> list[DatasetVersion]:
    """Return all versions of a dataset, oldest first."""
    return [_read_version(store, key) for key in store.list(f"datasets/{name}/")]


def latest_version(store: ObjectStore, name: str) -> DatasetVersion | None:
    """Return the newest version of a dataset, or None."""
    keys = list(store.list(f"datasets/{name}/"))
    return _read_version(store, keys[-1]) if keys else None


def load_version(store: ObjectStore, name: str, number: int) -> DatasetVersion:
    """Return one version. Raises DatasetError when the store has no such version."""
    try:
        return _read_version(store, _version_key(name, number))
    except ObjectMissing as exc:
        newest = latest_version(store, name)
        raise DatasetError(
            f"dataset {name} version {number}",
            f"is not in the store {store.url}" + (f", whose newest one is {newest.version}" if newest else ""),
            "the store it was ingested into, or another version",
            "Set VISIONLOOP_STORE, or run `visionloop ingest` again; `visionloop datasets` lists what is there.",
        ) from exc


def is_experiment(version: DatasetVersion) -> bool:
    """Say whether a version is split at random, as tutorials do. Its models are for comparison, never promoted."""
    return version.split.get("method") == "random"


def load_version_records(store: ObjectStore, version: DatasetVersion) -> list[ImageRecord]:
    """Return the rows of a version, sorted by sha256, checked against its digest. Raises DatasetError."""
    return list(iterate_version(store, version))


def iterate_version(store: ObjectStore, version: DatasetVersion) -> Iterator[ImageRecord]:
    """Yield the rows of a version, sorted by sha256; a few of them are in memory. Raises as `rows.iterate_batches`."""
    from visionloop.data.rows import decode_batches, iterate_batches

    return decode_batches(iterate_batches(store, version))


def rank_rows(rows: Iterable[ImageRecord], rank: int) -> Iterator[tuple[str, int, ImageRecord]]:
    """Yield rows with what `heapq.merge` compares: the sha256, then the rank of where they are from."""
    for row in rows:
        yield row.sha256, rank, row


def make_version(
    name: str,
    parent: DatasetVersion | None,
    records: Iterable[ImageRecord],
    changed: Rows,
    *,
    is_whole: bool = False,
    **facts: Any,
) -> DatasetVersion:
    """Describe the version after `parent` that holds `records`, of which `changed` are new or differ.

    Both are in the order of their sha256; the digest over all rows is the data version everywhere. `is_whole`:
    `changed` are all of them, and the parts of the parent are not among those of the version.
    """
    from visionloop.data.rows import HeldRows, digest_parts, sum_up

    digest, kinds, sources = sum_up(records) if isinstance(records, HeldRows) else _sum_up(records)
    parts = digest_parts(changed) if isinstance(changed, HeldRows) else map(compute_rows_digest, _split_parts(changed))
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for (side, labels), number in kinds.items():
        counts[side].update(dict.fromkeys(labels or ("(unlabelled)",), number))
    return DatasetVersion(
        name=name,
        version=parent.version + 1 if parent else 1,
        digest=digest,
        parent=parent.version if parent else None,
        parts=(*(parent.parts if parent and not is_whole else ()), *parts),
        num_images=kinds.total(),
        classes=tuple(sorted({label for _, labels in kinds for label in labels})),
        counts={side: dict(sorted(counts[side].items())) for side in SIDES if counts[side]},
        sources=tuple(sorted(sources)),
        **facts,
    )


def _sum_up(records: Iterable[ImageRecord]) -> tuple[str, Counter[tuple[str, tuple[str, ...]]], set[str]]:
    """As `rows.sum_up`, of records."""
    total, last = hashlib.sha256(), ""
    kinds, sources = Counter[tuple[str, tuple[str, ...]]](), set[str]()
    for record in records:
        assert last <= record.sha256, "rows are in the order of their sha256"
        last = record.sha256
        total.update(_encode_for_digest(record))
        kinds[record.side, record.labels] += 1
        sources.update(record.sources)
    return total.hexdigest(), kinds, sources


def _split_parts(changed: Rows) -> Iterator[Iterator[ImageRecord]]:
    """Yield the rows of each part, to be read at once; of one without rows, if there are none."""
    rows = iter(changed)
    for _ in range(max(1, -(-len(changed) // PART_ROWS))):
        yield islice(rows, PART_ROWS)


def commit_version(store: ObjectStore, version: DatasetVersion, changed: Rows) -> bool:
    """Write a version: its rows first, then the commit object. False if another process took the number."""
    from visionloop.data.rows import HeldRows, hold_rows, iterate_parts

    runs = max(1, -(-len(changed) // PART_ROWS))
    pieces: Iterable[Any] = iterate_parts(changed) if isinstance(changed, HeldRows) else _split_parts(changed)
    write = hold_rows if isinstance(changed, HeldRows) else _write_in_order
    for part, rows in zip(version.parts[-runs:], pieces, strict=True):
        sink = BytesIO()
        write(rows, sink)
        store.put(f"manifests/{part}.parquet", sink.getvalue())
    store.sync()
    return store.create(_version_key(version.name, version.version), canonical_json(version.to_json()))


def make_lost_error(sha256: str, origin: str) -> DatasetError:
    """Return the error of an image that the store has lost, with a way out for each kind of pull."""
    source = origin.partition(":")[0] if ":" in origin else "NAME"
    return DatasetError(
        f"image {sha256[:12]} ({origin})",
        "is missing from the store or damaged there",
        "its bytes as they were ingested",
        f"Run `visionloop ingest --verify`, or after a one-time pull `visionloop ingest PATH --name {source} --verify`"
        f" (with the options of then): it mends what its source still has. Without its source: "
        f"`visionloop forget {sha256[:12]} --why lost`.",
    )


def count_unusable(rejected: Iterable[Rejected]) -> int:
    """Return how many lines of a quarantine list are of what cannot be used."""
    return sum(one.code not in NOT_UNUSABLE for one in rejected)


def write_quarantine(store: ObjectStore, name: str, rejected: Sequence[Rejected]) -> str | None:
    """Keep the list of unusable files in the store; return its digest, None for an empty list."""
    if not rejected:
        return None
    rows = [r.to_json() for r in sorted(rejected, key=lambda r: (r.origin, r.code))]
    digest = compute_digest(rows)
    store.put(f"quarantine/{name}/{digest}.json", canonical_json(rows))
    return digest


def load_quarantine(store: ObjectStore, version: DatasetVersion) -> list[Rejected]:
    """Return the files that could not be used in the pull that made a version."""
    if version.rejected is None:
        return []
    return [Rejected.from_json(r) for r in json.loads(store.get(f"quarantine/{version.name}/{version.rejected}.json"))]


def make_pin(version: DatasetVersion) -> Pin:
    """Return the pin of a version."""
    return Pin(version.name, version.version, version.digest, version.num_images, version.classes)


def write_pin(path: Path, pin: Pin) -> None:
    """Write the pin atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    staged = path.with_name(f".{path.name}.{os.getpid()}")
    staged.write_text(json.dumps(pin.to_json(), indent=2) + "\n")
    os.replace(staged, path)


def load_pin(path: Path, name: str | None = None) -> Pin:
    """Read the pin of a workspace, whose `name` it should bear.

    Raises:
        DatasetError: nothing was ingested yet, the file is damaged, or it pins a dataset of another name.
    """
    text = ""
    try:
        text = path.read_text()
        pin = Pin.from_json(json.loads(text))
    except FileNotFoundError as exc:
        raise DatasetError(
            f"{path.parent.name}/{path.name}",
            "not found: this workspace has no images yet",
            "a pinned dataset version",
            "Run `visionloop ingest FOLDER`.",
        ) from exc
    except (ValueError, TypeError, AttributeError) as exc:
        raise DatasetError(
            f"{path.parent.name}/{path.name}",
            "has the conflict marks of a merge in it" if has_conflict_marks(text) else "is damaged",
            "JSON of a pin",
            "`git checkout HEAD data/dataset.json` brings the last one back; `visionloop ingest` pins the newest.",
        ) from exc
    if name is not None:
        check_name(pin, name)
    return pin


def check_name(pin: Pin, name: str) -> None:
    """Raise DatasetError unless a pin bears the name of its workspace: `name` was changed after the ingest."""
    if pin.name != name:
        raise DatasetError(
            "data/dataset.json",
            f"pins version {pin.version} of {pin.name}",
            f"a version of {name}, as `name` in params.yaml says",
            f"Put the name back, or run `visionloop ingest` (or `visionloop ingest PATH`) to make {name}.",
        )


def iterate_records(store: ObjectStore, pin: Pin) -> Iterator[ImageRecord]:
    """Yield the rows of the pinned version, as `iterate_version`, checked against the pin. Raises DatasetError."""
    yield from iterate_version(store, load_pinned(store, pin))


def load_pinned(store: ObjectStore, pin: Pin) -> DatasetVersion:
    """Return the pinned version. Raises DatasetError: the store has not this one."""
    version = load_version(store, pin.name, pin.version)
    if version.digest != pin.digest:
        raise DatasetError(
            f"dataset {pin.name} version {pin.version}",
            f"has digest {version.digest[:12]} in {store.url}",
            f"{pin.digest[:12]}, as data/dataset.json says",
            "This is another store: set VISIONLOOP_STORE, or ingest again.",
        )
    return version


def _version_key(name: str, number: int) -> str:
    return make_number_key(f"datasets/{name}", number)


def _read_version(store: ObjectStore, key: str) -> DatasetVersion:
    try:
        return DatasetVersion.from_json(json.loads(store.get(key)))
    except (ValueError, TypeError) as exc:
        raise DatasetError(f"store object {key}", "is damaged", "a dataset version") from exc
