"""Versions and pins: what the digest covers, what is refused."""

import hashlib
import io
import json
import random
import tracemalloc
from collections import deque
from dataclasses import asdict, replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from counting_store import CountingStore
from visionloop.data import manifest
from visionloop.data.rows import HeldRows, encode_rows, hold_rows, hold_version
from visionloop.errors import DatasetError
from visionloop.records import ImageRecord, Rejected, canonical_json, compute_digest
from visionloop.store import LocalStore

FACTS = {
    "num_added": 2,
    "split": {"seed": 0, "fractions": [0.7, 0.15, 0.15]},
    "rejected": None,
    "num_rejected": 0,
    "created_at": "2026-01-01T00:00:00+00:00",
}


def make_record(sha256: str, label: str = "cat", side: str = "train") -> ImageRecord:
    return ImageRecord(
        sha256, (label,), ("s",), (f"s:{sha256}",), 0, None, sha256, side, None, 40, 30, "PNG", 99, "00ff"
    )


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path / "store")


def compute_digest_of(*records: ImageRecord) -> str:
    return manifest.make_version("pets", None, records, [], **FACTS).digest


def commit(store: LocalStore, records: list[ImageRecord]) -> manifest.DatasetVersion:
    version = manifest.make_version("pets", manifest.latest_version(store, "pets"), records, records, **FACTS)
    assert manifest.commit_version(store, version, records)
    return version


def test_rows_survive_parquet() -> None:
    records = [make_record("b"), make_record("a", side="test")]
    assert manifest.decode_records(manifest.encode_records(records), "x") == [records[1], records[0]]


@pytest.mark.parametrize("number", [0, 1, 6, 23])
def test_rows_held_by_column_make_the_same_version_and_the_same_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    for name, size in {"PART_ROWS": 6, "GROUP_ROWS": 4, "BATCH_ROWS": 3}.items():
        monkeypatch.setattr(manifest, name, size)
    rows = [
        make_record(f"{i:02d}", 'a "cat"\n' if i % 3 else "dog", ("train", "excluded")[i % 2]) for i in range(number)
    ]
    rows = [
        replace(row, labels=row.labels if i % 5 else (), group="\u00e9" if i % 4 else None)
        for i, row in enumerate(rows)
    ]
    stores, versions = [LocalStore(tmp_path / name) for name in ("records", "columns")], []
    for store, some in zip(
        stores, (rows, hold_rows(HeldRows(io.BytesIO(manifest.encode_records(rows))).iterate_batches())), strict=True
    ):
        versions.append(manifest.make_version("pets", None, some, some, **FACTS))
        assert manifest.commit_version(store, versions[-1], some)
        assert manifest.load_version_records(store, versions[-1]) == rows
    assert versions[0] == versions[1]
    assert len(versions[0].parts) == max(1, -(-number // 6))
    for part in versions[0].parts:
        key = f"manifests/{part}.parquet"
        assert stores[0].get(key) == stores[1].get(key)


def test_digest_ignores_origins_but_not_labels() -> None:
    a, b = make_record("a"), make_record("b")
    digest = compute_digest_of(a, b)
    assert digest == "b6a31f84430f6b75c89ac5631c331494fafcf6617a17bc491f57eafea46adfaa"
    assert digest == compute_digest_of(replace(a, origins=("elsewhere",)), b)
    assert digest != compute_digest_of(replace(a, labels=("dog",)), b)
    assert digest != compute_digest_of(replace(a, side="val"), b)
    with pytest.raises(AssertionError, match="in the order of their sha256"):
        compute_digest_of(b, a)


def test_later_part_wins(store: LocalStore) -> None:
    first = commit(store, [make_record("a"), make_record("b")])
    changed = make_record("b", label="dog")
    second = manifest.make_version("pets", first, [make_record("a"), changed], [changed], **FACTS)
    assert manifest.commit_version(store, second, [changed])
    assert second.version == 2
    assert [r.labels for r in manifest.load_version_records(store, second)] == [("cat",), ("dog",)]
    assert [r.labels for r in manifest.load_version_records(store, first)] == [("cat",), ("cat",)]


def test_number_is_taken_once(store: LocalStore) -> None:
    records = [make_record("a"), make_record("b", "dog")]
    one = manifest.make_version("pets", None, records, records, **FACTS)
    assert manifest.commit_version(store, one, records)
    assert not manifest.commit_version(store, replace(one, created_at="later"), records)
    assert [v.created_at for v in manifest.list_versions(store, "pets")] == [FACTS["created_at"]]


def test_changed_rows_are_noticed(store: LocalStore) -> None:
    version = commit(store, [make_record("a"), make_record("b")])
    store.put(f"manifests/{version.parts[0]}.parquet", manifest.encode_records([make_record("a")]))
    with pytest.raises(DatasetError, match="rows have digest"):
        manifest.load_version_records(store, version)


def test_pin_of_a_version_that_is_not_in_the_store(store: LocalStore) -> None:
    pin = manifest.make_pin(manifest.make_version("pets", None, [make_record("a")], [], **FACTS))
    with pytest.raises(DatasetError, match=r"dataset pets version 1: is not in the store .*; expected the store it"):
        list(manifest.iterate_records(store, pin))


def test_pin_of_another_content(store: LocalStore) -> None:
    version = commit(store, [make_record("a"), make_record("b")])
    with pytest.raises(DatasetError, match="This is another store"):
        list(manifest.iterate_records(store, replace(manifest.make_pin(version), digest="0" * 64)))


def test_pin_round_trip_and_damage(tmp_path: Path, store: LocalStore) -> None:
    pin = manifest.make_pin(commit(store, [make_record("a"), make_record("b", "dog")]))
    path = tmp_path / "data" / "dataset.json"
    manifest.write_pin(path, pin)
    assert manifest.load_pin(path) == pin
    assert sorted(json.loads(path.read_text())) == ["classes", "digest", "name", "num_images", "version"]
    path.write_text("{")
    with pytest.raises(DatasetError, match=r"data/dataset\.json: is damaged"):
        manifest.load_pin(path)
    path.unlink()
    with pytest.raises(DatasetError, match="no images yet"):
        manifest.load_pin(path)


def test_quarantine_is_kept(store: LocalStore) -> None:
    rows = [Rejected("s:b", "damaged", "cut"), Rejected("s:a", "empty", "0 bytes")]
    digest = manifest.write_quarantine(store, "pets", rows)
    version = manifest.make_version("pets", None, [make_record("a")], [], **{**FACTS, "rejected": digest})
    assert manifest.load_quarantine(store, version) == [rows[1], rows[0]]
    assert manifest.write_quarantine(store, "pets", []) is None


def make_rows(number: int) -> list[ImageRecord]:
    """Rows in the order of their sha256; every third one has a group."""
    rows = [make_record(f"{i:064x}") for i in range(number)]
    return [replace(row, group="film", ordinal=i) if i % 3 == 0 else row for i, row in enumerate(rows)]


def test_the_bytes_of_a_small_part_are_those_that_they_always_were() -> None:
    """A manifest of before the rows were streamed, made in one piece."""
    rows = make_rows(100)
    types = {"string": pa.string(), "list": pa.list_(pa.string()), "int64": pa.int64(), "int32": pa.int32()}
    schema = pa.schema([(name, types[kind]) for name, kind in manifest.COLUMNS.items()])
    for some in (rows, []):
        columns = {name: [getattr(row, name) for row in some] for name in manifest.COLUMNS}
        sink = io.BytesIO()
        pq.write_table(pa.table(columns, schema=schema), sink, compression="zstd")
        assert manifest.encode_records(some[::-1]) == sink.getvalue()
        assert manifest.compute_rows_digest(some) == compute_digest([asdict(row) for row in some])


def test_many_rows_are_several_parts_and_read_back_in_order(store: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifest, "PART_ROWS", 40)
    rows = make_rows(100)
    first = commit(store, rows)
    sizes = [len(manifest.decode_records(store.get(f"manifests/{part}.parquet"), "x")) for part in first.parts]
    assert sizes == [40, 40, 20]
    changed = [replace(row, labels=("dog",)) for row in rows[35:90]]
    everything = [*rows[:35], *changed, *rows[90:]]
    second = manifest.make_version("pets", first, everything, changed, **FACTS)
    assert manifest.commit_version(store, second, changed)
    assert (second.parts[:3], len(second.parts)) == (first.parts, 5)
    assert manifest.load_version_records(store, second) == everything
    assert manifest.load_version_records(store, first) == rows
    third = manifest.make_version("pets", second, everything, everything, is_whole=True, **FACTS)
    assert manifest.commit_version(store, third, everything)
    assert len(third.parts) == 3
    assert manifest.load_version_records(store, third) == everything


def test_a_missing_part_is_named_before_a_row_is_told(store: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifest, "PART_ROWS", 40)
    version = commit(store, make_rows(100))
    store.delete(f"manifests/{version.parts[1]}.parquet")
    with pytest.raises(DatasetError, match=f"its part {version.parts[1][:12]} is not in the store"):
        next(manifest.iterate_version(store, version))


def test_rows_by_column_are_the_digest_and_the_bytes_of_the_same_records(store: LocalStore) -> None:
    """With all that JSON escapes, and what it does not; with any number of labels, and without a group."""
    hostile = ['say "x"', "back\\slash", "line\nfeed\x00\x1f\x7f", "żółw 海 \U0001f600\u2028", "", " "]
    rows = [
        replace(row, labels=tuple(hostile[:i]), group=(None, *hostile)[i], captured_at=(*hostile, None)[i], key=text)
        for i, (row, text) in enumerate(zip(make_rows(7), (*hostile, "k"), strict=True))
    ]
    version = commit(store, rows)
    held = hold_version(store, version)
    assert (list(held), held[5], held[-1], held[1:6:2]) == (rows, rows[5], rows[-1], rows[1:6:2])
    assert held.file.seek(0) == 0 and held.file.read() == manifest.encode_records(rows)
    for text in hostile:
        row = replace(rows[0], group=text)
        (batch,) = HeldRows(io.BytesIO(manifest.encode_records([row]))).iterate_batches()
        digest = hashlib.sha256(encode_rows(batch, manifest.IN_DIGEST, "\n")).hexdigest()
        told = canonical_json({name: getattr(row, name) for name in manifest.IN_DIGEST})
        assert digest == hashlib.sha256(told + b"\n").hexdigest()


def test_parts_are_merged_wherever_they_lie(store: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts in any order: apart, within each other, with the same images, larger than a batch and than a group."""
    monkeypatch.setattr(manifest, "BATCH_ROWS", 7)
    monkeypatch.setattr(manifest, "GROUP_ROWS", 10)
    rng, rows, version = random.Random(0), {}, None
    everything = make_rows(120)
    for number, low, high, share in ((0, 60, 120, 1.0), (1, 0, 50, 1.0), (2, 20, 100, 0.3), (3, 0, 120, 0.1)):
        part = [replace(row, ordinal=number) for row in everything[low:high] if rng.random() < share]
        rows |= {row.sha256: row for row in part}
        kept = [rows[sha256] for sha256 in sorted(rows)]
        version = manifest.make_version("pets", version, kept, part, **FACTS)
        assert manifest.commit_version(store, version, part)
        assert manifest.load_version_records(store, version) == kept
    assert {row.ordinal for row in rows.values()} == {0, 1, 2, 3}


def test_a_version_of_very_many_parts_is_read_without_as_many_open_files(tmp_path: Path) -> None:
    store, rows, version = CountingStore(tmp_path), make_rows(manifest.MOST_OPEN + 2), None
    for i, row in enumerate(rows):
        version = manifest.make_version("pets", version, rows[: i + 1], [row], **FACTS)
        assert manifest.commit_version(store, version, [row])
    assert version is not None
    assert manifest.load_version_records(store, version) == rows
    assert store.most_open < 3


def test_four_times_as_many_rows_take_no_more_memory_one_after_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, number in (("GROUP_ROWS", 256), ("BATCH_ROWS", 256)):
        monkeypatch.setattr(manifest, name, number)

    def measure(number: int) -> int:
        store = LocalStore(tmp_path / f"{number}")
        version = commit(store, make_rows(number))
        assert sum(1 for _ in manifest.iterate_version(store, version)) == number  # loads what is loaded once
        tracemalloc.start()
        rows = sum(1 for _ in manifest.iterate_version(store, version))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert rows == number
        return peak

    assert measure(4000) < 1.5 * measure(1000)


def test_rows_that_are_held_share_what_is_equal(store: LocalStore) -> None:
    one, *others = manifest.load_version_records(store, commit(store, make_rows(9)))
    for other in others:
        assert other.labels is one.labels and other.sources is one.sources
        assert other.format is one.format and other.side is one.side and other.key is other.sha256
    assert not hasattr(one, "__dict__")


def test_rows_that_share_nothing_are_not_held_while_they_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each image has a time and a group of its own, as those of a camera that nobody has divided."""

    def measure(number: int) -> int:
        rows = [
            replace(
                make_record(f"{place:064x}"), captured_at=f"2026-01-01T00:00:{place:09d}", group=f"film {place:09d}"
            )
            for place in range(number)
        ]
        file = io.BytesIO(manifest.encode_records(rows))
        del rows
        tracemalloc.start()
        deque(manifest.iterate_part(file, "part"), maxlen=0)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return peak

    measure(1)
    monkeypatch.setattr(manifest, "BATCH_ROWS", 500)
    monkeypatch.setattr(manifest, "MOST_SHARED", 1000)
    assert measure(16_000) < 1.5 * measure(4000)
