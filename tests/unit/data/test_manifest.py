"""Versions and pins: what the digest covers, what is refused."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from visionloop.data import manifest
from visionloop.errors import DatasetError
from visionloop.records import ImageRecord, Rejected
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


def commit(store: LocalStore, records: list[ImageRecord]) -> manifest.DatasetVersion:
    version = manifest.make_version("pets", manifest.latest_version(store, "pets"), records, records, **FACTS)
    assert manifest.commit_version(store, version, records)
    return version


def test_rows_survive_parquet() -> None:
    records = [make_record("b"), make_record("a", side="test")]
    assert manifest.decode_records(manifest.encode_records(records), "x") == [records[1], records[0]]


def test_digest_ignores_order_and_origins_but_not_labels() -> None:
    a, b = make_record("a"), make_record("b")
    digest = manifest.compute_dataset_digest([a, b])
    assert digest == manifest.compute_dataset_digest([b, a])
    assert digest == manifest.compute_dataset_digest([replace(a, origins=("elsewhere",)), b])
    assert digest != manifest.compute_dataset_digest([replace(a, labels=("dog",)), b])
    assert digest != manifest.compute_dataset_digest([replace(a, side="val"), b])


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
        manifest.load_records(store, pin)


def test_pin_of_another_content(store: LocalStore) -> None:
    version = commit(store, [make_record("a"), make_record("b")])
    with pytest.raises(DatasetError, match="This is another store"):
        manifest.load_records(store, replace(manifest.make_pin(version), digest="0" * 64))


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
