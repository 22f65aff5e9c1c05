"""Pulled again: what is known is not read, what changes the outcome is merged, what is lost is found, cursors move."""

import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fakes import make_image, write_photos
from visionloop.data.manifest import list_versions, load_pin, make_image_key
from visionloop.data.parts import load_version_records
from visionloop.data.tombstones import make_tombstone_key
from visionloop.errors import StoreError
from visionloop.ingest import pull as pull_module
from visionloop.ingest.journal import make_journal_path
from visionloop.ingest.pull import PullReport, pull
from visionloop.ingest.sources import Cursor, Item, SourceContext
from visionloop.params import FolderSource, Params, make_params
from visionloop.settings import Settings
from visionloop.store import LocalStore
from visionloop.workspace import connect
from workspaces import NOW


def run(
    settings: Settings,
    store: LocalStore,
    folder: Path,
    *,
    verify: bool = False,
    said: list[str] | None = None,
    **sections: Any,
) -> PullReport:
    params: Params = make_params({"name": "pets", **sections})
    source = FolderSource(kind="folder", path=str(folder), name="photos")
    tell = (said if said is not None else []).append
    return pull(connect(settings, params, store=store), sources=[source], now=NOW, tell=tell, verify=verify)


def forbid_merge(monkeypatch: pytest.MonkeyPatch) -> None:
    def merge(*args: object, **kwargs: object) -> None:
        raise AssertionError("merged")

    monkeypatch.setattr(pull_module, "merge", merge)


def test_with_nothing_new_nothing_is_read_or_merged_and_the_report_is_the_same(
    settings: Settings, store: LocalStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_photos(tmp_path / "photos", 30)
    (folder / "cat" / "notes.jpg").write_text("not a photo")
    shutil.copy(folder / "cat" / "3.png", folder / "dog" / "copy.png")
    sections = {"ingest": {"max_rejected_ratio": 0.1}}
    first = run(settings, store, folder, **sections)
    forbid_merge(monkeypatch)
    settings.pin_path.unlink()
    again = run(settings, store, folder, **sections)
    assert (first.num_read, again.num_read, again.num_seen, again.changed) == (62, 0, 62, False)
    assert {r.code for r in again.rejected} == {"not_an_image", "label_conflict"}
    assert (again.rejected, again.version, again.pin) == (first.rejected, first.version, first.pin)
    assert load_pin(settings.pin_path) == first.pin


def test_what_changes_the_outcome_is_merged_again_though_nothing_is_read(
    settings: Settings, store: LocalStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_photos(tmp_path / "photos")
    first = run(settings, store, folder)
    (settings.home / "corrections.csv").write_text("sha256,old,new\n")
    corrected = {"ingest": {"corrections": "corrections.csv"}}
    run(settings, store, folder, **corrected)
    forbid_merge(monkeypatch)
    run(settings, store, folder, **corrected)
    with pytest.raises(AssertionError, match="merged"):
        run(settings, store, folder, ingest={"label_map": {"cat": "feline"}})
    with pytest.raises(AssertionError, match="merged"):
        run(settings, store, folder, task="multilabel")
    one = load_version_records(store, first.version)[0]
    (settings.home / "corrections.csv").write_text(f"sha256,old,new\n{one.sha256},{one.labels[0]},bird\n")
    with pytest.raises(AssertionError, match="merged"):
        run(settings, store, folder, **corrected)
    (settings.home / "corrections.csv").write_text("sha256,old,new\n")
    run(settings, store, folder, **corrected)
    store.put(make_tombstone_key("pets", "0" * 64), b"{}")
    with pytest.raises(AssertionError, match="merged"):
        run(settings, store, folder, **corrected)


def test_another_version_since_then_is_merged_with(settings: Settings, store: LocalStore, tmp_path: Path) -> None:
    a, b = write_photos(tmp_path / "a"), write_photos(tmp_path / "b", first=100)
    for folder in (a, b, a, a):
        report = run(settings, store, folder)
    assert (report.version.version, report.num_read, report.changed) == (2, 0, False)


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_bytes(b"x" * 5000)])
def test_without_its_journal_a_pull_ends_the_same(
    settings: Settings, store: LocalStore, tmp_path: Path, damage: Any
) -> None:
    folder = write_photos(tmp_path / "photos")
    first = run(settings, store, folder)
    damage(make_journal_path(settings))
    again = run(settings, store, folder)
    assert (again.num_read, again.changed, again.version) == (20, False, first.version)
    assert run(settings, store, folder).num_read == 0


class BucketLike(LocalStore):
    """A folder that says it is a bucket: it is not listed at each pull."""

    url = "s3://bucket/pets"  # type: ignore[assignment]


@pytest.mark.parametrize("kind", [LocalStore, BucketLike])
def test_what_vanished_from_the_store_is_stored_again(
    settings: Settings, tmp_path: Path, kind: type[LocalStore]
) -> None:
    store, said = kind(tmp_path / "store"), []
    folder = write_photos(tmp_path / "photos")
    first = run(settings, store, folder)
    keys = [make_image_key(r.sha256) for r in load_version_records(store, first.version)]
    for key in keys[:5]:
        store.delete(key)
    again = run(settings, store, folder, said=said)
    assert (again.num_read, again.version) == (5, first.version)
    assert "5 images were missing from the store: stored again" in said
    assert all(store.exists(key) for key in keys)


def test_what_is_damaged_in_the_store_is_mended_by_verify(
    settings: Settings, store: LocalStore, tmp_path: Path
) -> None:
    folder = write_photos(tmp_path / "photos")
    first = run(settings, store, folder)
    key = make_image_key(load_version_records(store, first.version)[0].sha256)
    good = store.get(key)
    store.put(key, b"\0" * len(good))
    assert run(settings, store, folder).num_read == 0
    assert store.get(key) != good
    report = run(settings, store, folder, verify=True)
    assert (report.num_read, report.changed) == (20, False)
    assert store.get(key) == good


def test_the_store_is_synced_once_a_pull_and_only_when_something_was_stored(
    settings: Settings, store: LocalStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    num_synced = 0

    def sync(self: LocalStore) -> None:
        nonlocal num_synced
        num_synced += 1

    monkeypatch.setattr(LocalStore, "sync", sync)
    folder = write_photos(tmp_path / "photos")
    counts = []
    for _ in range(2):
        run(settings, store, folder)
        counts.append(num_synced)
    os.utime(folder / "cat" / "1.png")  # read again, and the same: no new version
    assert run(settings, store, folder).num_read == 1
    assert [*counts, num_synced] == [1, 1, 2]


def test_a_full_disk_is_told_and_nothing_is_visible(
    settings: Settings, store: LocalStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_photos(tmp_path / "photos")

    def write(file: int, data: bytes) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "write", write)
    with pytest.raises(StoreError, match=r"no space left for .*; expected a disk with free space\. Free some, and run"):
        run(settings, store, folder)
    monkeypatch.undo()
    assert list_versions(store, "pets") == []
    assert [path for path in store.root.rglob("*") if path.is_file()] == []


def test_a_cursor_that_moves_alone_is_remembered_until_a_version_holds_it(
    settings: Settings, store: LocalStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = [(f"rows:{i}", ("cat", "dog")[i % 2], make_image(i)) for i in range(20)]
    images[10:12] = images[0:2]  # rows that bring nothing new
    end, asked_from = 0, []

    def read_rows(source: object, context: SourceContext) -> Iterator[Item | Cursor]:
        start = int(context.cursor or 0)
        asked_from.append(start)
        for origin, label, data in images[start:end]:
            yield Item(origin, "photos", (label,), lambda limit, data=data: data)
        yield Cursor("photos", str(end))

    monkeypatch.setattr(pull_module, "read_source", read_rows)
    versions = []
    for end in (10, 12, 12, 20, 20):  # noqa: B007 - read by the source
        versions.append(run(settings, store, tmp_path).version)
    assert [(v.version, v.cursors["photos"]) for v in versions] == [(1, "10")] * 3 + [(2, "20")] * 2
    assert asked_from == [0, 10, 12, 12, 20]
    make_journal_path(settings).unlink()
    run(settings, store, tmp_path)
    run(settings, store, tmp_path, verify=True)
    assert asked_from[-2:] == [20, 0], "the version's own; and from the start, where nothing is believed"


def test_a_cursor_that_moved_alone_is_lost_with_the_journal_and_only_read_again(
    settings: Settings, store: LocalStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked_from = []

    def read_rows(source: object, context: SourceContext) -> Iterator[Item | Cursor]:
        asked_from.append(context.cursor)
        for i in range(4):
            yield Item(f"rows:{i}", "photos", (("cat", "dog")[i % 2],), lambda limit, i=i: make_image(i))
        yield Cursor("photos", str(10 * len(asked_from)))

    monkeypatch.setattr(pull_module, "read_source", read_rows)
    for _ in range(3):
        run(settings, store, tmp_path)
    make_journal_path(settings).unlink()
    assert not run(settings, store, tmp_path).changed
    assert asked_from == [None, "10", "20", "10"]
