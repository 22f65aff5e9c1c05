"""Versions and pins: what the digest covers, what is refused."""

import hashlib
import io
import json
import random
import tracemalloc
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from counting_store import CountingStore
from visionloop.data import manifest, parts
from visionloop.data.parts import hold_version
from visionloop.data.rows import SCHEMA, HeldRows, encode_rows, hold_records, iterate_part, make_batches
from visionloop.errors import DatasetError
from visionloop.records import SIDES, DatasetVersion, ImageRecord, Rejected, canonical_json, compute_digest
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


def make_version(
    parent: DatasetVersion | None, records: Sequence[ImageRecord], changed: Sequence[ImageRecord], **facts: Any
) -> DatasetVersion:
    return parts.make_version("pets", parent, hold_records(records), hold_records(changed), **{**FACTS, **facts})


def compute_digest_of(*records: ImageRecord) -> str:
    return make_version(None, records, []).digest


def commit(store: LocalStore, records: list[ImageRecord]) -> DatasetVersion:
    version = make_version(manifest.latest_version(store, "pets"), records, records)
    assert parts.commit_version(store, version, hold_records(records))
    return version


def encode(records: Sequence[ImageRecord]) -> bytes:
    return hold_records(records).file.getvalue()


def decode(data: bytes) -> list[ImageRecord]:
    return list(iterate_part(io.BytesIO(data), "x"))


def test_rows_survive_parquet() -> None:
    records = [make_record("b"), make_record("a", side="test")]
    assert decode(encode(records)) == [records[1], records[0]]


@pytest.mark.parametrize("number", [0, 1, 5, 23])
def test_a_version_and_its_parts_are_named_after_the_canonical_json_of_their_rows(
    store: LocalStore, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """In any order, with all that JSON escapes; so they were when rows were encoded one by one."""
    monkeypatch.setattr(parts, "PART_ROWS", 5)
    for name, size in {"GROUP_ROWS": 4, "BATCH_ROWS": 3}.items():
        monkeypatch.setattr(f"visionloop.data.rows.{name}", size)
    rng = random.Random(number)
    texts = ("cat", 'a "cat"\n', "back\\slash\x00", "żółw 海 \U0001f600\u2028", "")
    rows = [
        replace(
            make_record(f"{i:064x}", side=rng.choice(SIDES)),
            labels=tuple(rng.sample(texts, rng.randrange(4))),
            origins=tuple(rng.sample(texts, rng.randrange(4))),
            group=rng.choice((None, *texts)),
            captured_at=rng.choice((None, *texts)),
            ordinal=rng.randrange(2**40),
        )
        for i in range(number)
    ]
    version = commit(store, rng.sample(rows, number))
    plain = [{name: getattr(row, name) for name in parts.IN_DIGEST} for row in rows]
    assert version.digest == hashlib.sha256(b"".join(canonical_json(row) + b"\n" for row in plain)).hexdigest()
    some = [rows[start : start + 5] for start in range(0, max(1, number), 5)]
    assert version.parts == tuple(compute_digest([asdict(row) for row in part]) for part in some)
    assert [decode(store.get(parts.make_part_key(part))) for part in version.parts] == some
    assert parts.load_version_records(store, version) == rows
    assert version.num_images == number and version.classes == tuple(sorted({one for r in rows for one in r.labels}))
    counts = Counter((row.side, label) for row in rows for label in row.labels or ("(unlabelled)",))
    assert {(side, label): n for side, some in version.counts.items() for label, n in some.items()} == counts


def test_rows_that_pass_by_must_be_in_order() -> None:
    a, b = make_record("a"), make_record("b")
    assert [batch["sha256"].to_pylist() for batch in make_batches([a, b, b])] == [["a", "b", "b"]]
    with pytest.raises(AssertionError, match="in the order of their sha256"):
        list(make_batches([b, a]))


def test_digest_ignores_origins_but_not_labels() -> None:
    a, b = make_record("a"), make_record("b")
    digest = compute_digest_of(a, b)
    assert digest == "b6a31f84430f6b75c89ac5631c331494fafcf6617a17bc491f57eafea46adfaa"
    assert digest == compute_digest_of(replace(a, origins=("elsewhere",)), b)
    assert digest != compute_digest_of(replace(a, labels=("dog",)), b)
    assert digest != compute_digest_of(replace(a, side="val"), b)
    assert digest == compute_digest_of(b, a)


def test_later_part_wins(store: LocalStore) -> None:
    first = commit(store, [make_record("a"), make_record("b")])
    changed = make_record("b", label="dog")
    second = make_version(first, [make_record("a"), changed], [changed])
    assert parts.commit_version(store, second, hold_records([changed]))
    assert second.version == 2
    assert [r.labels for r in parts.load_version_records(store, second)] == [("cat",), ("dog",)]
    assert [r.labels for r in parts.load_version_records(store, first)] == [("cat",), ("cat",)]


def test_number_is_taken_once(store: LocalStore) -> None:
    records = [make_record("a"), make_record("b", "dog")]
    one = make_version(None, records, records)
    assert parts.commit_version(store, one, hold_records(records))
    assert not parts.commit_version(store, replace(one, created_at="later"), hold_records(records))
    assert [v.created_at for v in manifest.list_versions(store, "pets")] == [FACTS["created_at"]]


def test_changed_rows_are_noticed(store: LocalStore) -> None:
    version = commit(store, [make_record("a"), make_record("b")])
    store.put(f"manifests/{version.parts[0]}.parquet", encode([make_record("a")]))
    with pytest.raises(DatasetError, match="rows have digest"):
        parts.load_version_records(store, version)


def test_pin_of_a_version_that_is_not_in_the_store(store: LocalStore) -> None:
    pin = manifest.make_pin(make_version(None, [make_record("a")], []))
    with pytest.raises(DatasetError, match=r"dataset pets version 1: is not in the store .*; expected the store it"):
        list(parts.iterate_records(store, pin))


def test_pin_of_another_content(store: LocalStore) -> None:
    version = commit(store, [make_record("a"), make_record("b")])
    with pytest.raises(DatasetError, match="This is another store"):
        list(parts.iterate_records(store, replace(manifest.make_pin(version), digest="0" * 64)))


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
    version = make_version(None, [make_record("a")], [], rejected=digest)
    assert manifest.load_quarantine(store, version) == [rows[1], rows[0]]
    assert manifest.write_quarantine(store, "pets", []) is None


def make_rows(number: int) -> list[ImageRecord]:
    """Rows in the order of their sha256; every third one has a group."""
    rows = [make_record(f"{i:064x}") for i in range(number)]
    return [replace(row, group="film", ordinal=i) if i % 3 == 0 else row for i, row in enumerate(rows)]


def test_the_bytes_of_a_small_part_are_those_that_they_always_were() -> None:
    """A manifest of before the rows were streamed, made in one piece."""
    rows = make_rows(100)
    for some in (rows, []):
        columns = {name: [getattr(row, name) for row in some] for name in SCHEMA.names}
        sink = io.BytesIO()
        pq.write_table(pa.table(columns, schema=SCHEMA), sink, compression="zstd")
        assert encode(some[::-1]) == sink.getvalue()
        assert parts.digest_rows(make_batches(some)) == compute_digest([asdict(row) for row in some])


def test_many_rows_are_several_parts_and_read_back_in_order(store: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "PART_ROWS", 40)
    rows = make_rows(100)
    first = commit(store, rows)
    sizes = [len(decode(store.get(parts.make_part_key(part)))) for part in first.parts]
    assert sizes == [40, 40, 20]
    changed = [replace(row, labels=("dog",)) for row in rows[35:90]]
    everything = [*rows[:35], *changed, *rows[90:]]
    second = make_version(first, everything, changed)
    assert parts.commit_version(store, second, hold_records(changed))
    assert (second.parts[:3], len(second.parts)) == (first.parts, 5)
    assert parts.load_version_records(store, second) == everything
    assert parts.load_version_records(store, first) == rows
    third = make_version(second, everything, everything, is_whole=True)
    assert parts.commit_version(store, third, hold_records(everything))
    assert len(third.parts) == 3
    assert parts.load_version_records(store, third) == everything


def test_a_missing_part_is_named_before_a_row_is_told(store: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "PART_ROWS", 40)
    version = commit(store, make_rows(100))
    store.delete(f"manifests/{version.parts[1]}.parquet")
    with pytest.raises(DatasetError, match=f"its part {version.parts[1][:12]} is not in the store"):
        next(parts.iterate_version(store, version))


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
    assert held.file.seek(0) == 0 and held.file.read() == encode(rows)
    for text in hostile:
        row = replace(rows[0], group=text)
        (batch,) = HeldRows(io.BytesIO(encode([row]))).iterate_batches()
        digest = hashlib.sha256(encode_rows(batch, parts.IN_DIGEST, "\n")).hexdigest()
        told = canonical_json({name: getattr(row, name) for name in parts.IN_DIGEST})
        assert digest == hashlib.sha256(told + b"\n").hexdigest()


def test_parts_are_merged_wherever_they_lie(store: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts in any order: apart, within each other, with the same images, larger than a batch and than a group."""
    monkeypatch.setattr("visionloop.data.rows.BATCH_ROWS", 7)
    monkeypatch.setattr("visionloop.data.rows.GROUP_ROWS", 10)
    rng, rows, version = random.Random(0), {}, None
    everything = make_rows(120)
    for number, low, high, share in ((0, 60, 120, 1.0), (1, 0, 50, 1.0), (2, 20, 100, 0.3), (3, 0, 120, 0.1)):
        part = [replace(row, ordinal=number) for row in everything[low:high] if rng.random() < share]
        rows |= {row.sha256: row for row in part}
        kept = [rows[sha256] for sha256 in sorted(rows)]
        version = make_version(version, kept, part)
        assert parts.commit_version(store, version, hold_records(part))
        assert parts.load_version_records(store, version) == kept
    assert {row.ordinal for row in rows.values()} == {0, 1, 2, 3}


def test_a_version_of_very_many_parts_is_read_without_as_many_open_files(tmp_path: Path) -> None:
    store, rows, version = CountingStore(tmp_path), make_rows(parts.MOST_OPEN + 2), None
    for i, row in enumerate(rows):
        version = make_version(version, rows[: i + 1], [row])
        assert parts.commit_version(store, version, hold_records([row]))
    assert version is not None
    assert parts.load_version_records(store, version) == rows
    assert store.most_open < 3


def test_four_times_as_many_rows_take_no_more_memory_one_after_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("GROUP_ROWS", "BATCH_ROWS"):
        monkeypatch.setattr(f"visionloop.data.rows.{name}", 256)

    def measure(number: int) -> int:
        store = LocalStore(tmp_path / f"{number}")
        version = commit(store, make_rows(number))
        assert sum(1 for _ in parts.iterate_version(store, version)) == number  # loads what is loaded once
        tracemalloc.start()
        rows = sum(1 for _ in parts.iterate_version(store, version))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert rows == number
        return peak

    assert measure(4000) < 1.5 * measure(1000)


def test_rows_that_are_held_share_what_is_equal(store: LocalStore) -> None:
    one, *others = parts.load_version_records(store, commit(store, make_rows(9)))
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
        file = io.BytesIO(encode(rows))
        del rows
        tracemalloc.start()
        deque(iterate_part(file, "part"), maxlen=0)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return peak

    measure(1)
    monkeypatch.setattr("visionloop.data.rows.BATCH_ROWS", 500)
    monkeypatch.setattr("visionloop.data.rows.MOST_SHARED", 1000)
    assert measure(16_000) < 1.5 * measure(4000)
