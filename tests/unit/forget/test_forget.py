"""Images out of the dataset and of every copy; a kill at any point is made good by running it again. No dvc in here."""

import io
import json
from dataclasses import replace
from datetime import UTC, date, datetime
from pathlib import Path

import pytest

from fakes import make_image
from visionloop.data.leaks import load_leaks
from visionloop.data.manifest import (
    latest_version,
    list_versions,
    load_pin,
    load_quarantine,
    make_image_key,
    make_pin,
    write_pin,
)
from visionloop.data.parts import load_version_records
from visionloop.data.prediction_log import PREDICTIONS, make_kept_key, read_predictions
from visionloop.data.prepare import prepare
from visionloop.data.tombstones import Forgetting, load_tombstones, load_unfinished
from visionloop.errors import BusyError, DatasetError, StoreError
from visionloop.forget import find_everything, resolve_images
from visionloop.ingest.inspect import Facts
from visionloop.ingest.journal import Journal, make_journal_path
from visionloop.params import Ingest, make_params
from visionloop.records import DatasetVersion, ImageRecord, canonical_json
from visionloop.store import LocalStore
from visionloop.workfolder import lock_work
from visionloop.workspace import connect
from workspaces import NAME, NOW, SECRET, Pets, commit, make_pets, read_all, store_image


@pytest.fixture
def pets(tmp_path: Path) -> Pets:
    return make_pets(tmp_path)


def holds_text(store: LocalStore, text: str) -> list[str]:
    """The objects that hold a text, also inside a manifest."""
    found = [key for key, data in read_all(store.root).items() if text.encode() in data]
    for version in list_versions(store, NAME):
        found += [f"version {version.version}" for r in load_version_records(store, version) if text in str(r.origins)]
    return found


def test_a_new_version_without_it_and_nothing_else_changed(pets: Pets) -> None:
    done = pets.forget(pets.anna.sha256[:12])
    assert done.version is not None
    assert (done.version.version, done.version.num_images, done.version.num_added, done.pin_moved) == (3, 15, 0, True)
    kept = load_version_records(pets.store, done.version)
    assert kept == sorted((r for r in pets.rows if r != pets.anna), key=lambda r: r.sha256)
    assert len(done.version.parts) == 1
    assert (done.version.split, done.version.cursors) == (pets.versions[1].split, {})
    pin = load_pin(pets.settings.pin_path)
    assert (pin.version, pin.digest) == (3, done.version.digest)


def test_the_bytes_are_gone_and_the_tombstone_says_who_and_why(pets: Pets) -> None:
    pets.forget(pets.anna.sha256)
    assert not pets.store.exists(make_image_key(pets.anna.sha256))
    assert all(pets.store.exists(make_image_key(r.sha256)) for r in pets.rows if r != pets.anna)
    assert load_tombstones(pets.store, NAME) == {pets.anna.sha256}
    tombstone = json.loads(pets.store.get(f"tombstones/{NAME}/{pets.anna.sha256}.json"))
    assert tombstone == {"sha256": pets.anna.sha256, "at": NOW, "by": "me", "why": "asked"}
    assert load_unfinished(pets.store, NAME) == []


def test_no_list_in_the_store_names_its_origin(pets: Pets) -> None:
    assert len(holds_text(pets.store, SECRET)) > 3
    done = pets.forget(origins=("photos:anna/*",))
    assert holds_text(pets.store, SECRET) == []
    # A part, a quarantine list, a leak list. The versions still read, by their digests.
    assert done.num_rewritten == 3
    assert [len(load_version_records(pets.store, v)) for v in list_versions(pets.store, NAME)] == [10, 16, 15]
    rejected = load_quarantine(pets.store, pets.versions[0])
    assert {(r.origin, r.code) for r in rejected} == {("(forgotten)", "label_conflict"), ("photos:b.png", "empty")}
    assert len(load_leaks(pets.store, pets.versions[0]).rows) == 3
    assert not any(key.endswith(".rewritten") for key in pets.store.list("")), "no spare copy stays"
    assert done.version is not None
    assert [row.sha256 for row in load_leaks(pets.store, done.version).rows] == [pets.rows[4].sha256]
    assert done.version.num_leaks == 1


def test_prepared_data_reports_and_pictures_of_it_go(pets: Pets) -> None:
    hidden, reports = pets.settings.hidden_dir, pets.settings.reports_dir
    prepare(connect(pets.settings, make_params({"name": NAME, "prepare": {"image_size": 32}}), store=pets.store))
    (reports / "figures").mkdir(parents=True)
    for name in ("figures/mistakes.png", "report.html", "metrics.json"):
        (reports / name).write_text("x")
    (reports / "predictions.csv").write_text(f"sha256,actual\n{pets.anna.sha256},cat\n")
    (hidden / "work" / "train" / "abc").mkdir(parents=True)
    (hidden / "work" / "train" / "abc" / "x").write_text("x")
    (hidden / "datasets").mkdir()
    for name in (f"{NAME}-000001.png", f"{NAME}-000001-leaks.png", "mine.png"):
        (hidden / "datasets" / name).write_bytes(b"x")
    done = pets.forget(pets.anna.sha256)
    assert not pets.settings.prepared_dir.exists()
    assert sorted(read_all(reports)) == ["metrics.json"]
    assert list((hidden / "work" / "train").iterdir()) == [hidden / "work" / "train" / "lock"]
    assert sorted(read_all(hidden / "datasets")) == ["mine.png"]
    assert {"data/prepared", "unfinished work of train", "2 contact sheets"} <= set(done.removed)


def test_pages_about_decisions_that_show_it_go(pets: Pets) -> None:
    folder = pets.settings.decisions_dir
    folder.mkdir()
    (folder / "note.html").write_bytes(b"\xff written by another program")
    for name, sha256 in (("000001", pets.anna.sha256), ("000002", pets.rows[4].sha256), ("latest", pets.anna.sha256)):
        (folder / f"{name}.html").write_text(f'<div class="photo" data-image="{sha256}">')
        (folder / f"{name}.json").write_text("{}")
    done = pets.forget(pets.anna.sha256)
    assert sorted(path.name for path in folder.glob("*.html")) == ["000002.html", "note.html"]
    assert len(list(folder.glob("*.json"))) == 3
    assert "decisions/: 2 pages with pictures" in done.removed


def test_what_does_not_hold_it_stays(pets: Pets) -> None:
    prepare(connect(pets.settings, make_params({"name": NAME, "prepare": {"image_size": 32}}), store=pets.store))
    stranger = make_image(99)
    sha256 = store_image(pets.store, 99, data=stranger).sha256
    (pets.settings.reports_dir).mkdir()
    (pets.settings.reports_dir / "predictions.csv").write_text(f"sha256,actual\n{pets.anna.sha256},cat\n")
    (pets.settings.work_dir("train") / "0123").mkdir(parents=True)
    done = pets.forget(sha256)
    assert done.removed == (f"1 image in {pets.store.url}, with all earlier versions",)
    assert (pets.settings.work_dir("train") / "0123").is_dir(), "no version held it: no stage has worked on it"
    assert (pets.settings.prepared_dir / "index.parquet").is_file()
    assert done.version == pets.versions[1], "it was in no version: none is made"
    assert not done.pin_moved
    assert load_tombstones(pets.store, NAME) == {sha256}


def test_a_pin_on_a_version_without_it_stays(pets: Pets) -> None:
    write_pin(pets.settings.pin_path, make_pin(pets.versions[0]))
    late = pets.rows[12]
    assert not pets.forget(late.sha256).pin_moved
    assert load_pin(pets.settings.pin_path).version == 1


def test_the_journal_of_ingest_forgets_it(pets: Pets) -> None:
    def open_journal() -> Journal:
        return Journal(make_journal_path(pets.settings), pets.store.url, Ingest())

    journal = open_journal()
    for row in (pets.anna, pets.rows[5]):
        facts = Facts(row.sha256, 32, 32, "PNG", row.num_bytes, "")
        journal.keep([(row.origins[0], "stamp", facts)])
    journal.flush()
    journal.mark_synced()
    journal.close()
    pets.forget(pets.anna.sha256)
    journal = open_journal()
    assert set(journal.load("photos")) == {pets.rows[5].origins[0]}
    journal.close()


def test_another_dataset_of_the_store_keeps_its_bytes(pets: Pets) -> None:
    commit(pets.store, [], [pets.anna, pets.rows[5]], name="zoo")
    done = pets.forget(pets.anna.sha256)
    assert pets.store.exists(make_image_key(pets.anna.sha256))
    assert done.left[0].what == "dataset zoo of the same store holds 1 of the images"
    assert load_tombstones(pets.store, "zoo") == frozenset()
    assert latest_version(pets.store, "zoo").num_images == 2  # type: ignore[union-attr]


def test_what_another_run_had_only_begun_is_finished_too(pets: Pets) -> None:
    begun = Forgetting((pets.anna.sha256,), NOW, "somebody", "asked first")
    pets.store.put(f"forgetting/{NAME}/{'0' * 64}.json", canonical_json(begun.to_json()))
    pets.forget(pets.rows[12].sha256)
    assert load_tombstones(pets.store, NAME) == {pets.anna.sha256, pets.rows[12].sha256}
    assert b"asked first" in pets.store.get(f"tombstones/{NAME}/{pets.anna.sha256}.json")
    assert holds_text(pets.store, SECRET) == []


def test_done_twice_changes_nothing(pets: Pets) -> None:
    pets.forget(pets.anna.sha256)
    before = read_all(pets.store.root)
    again = pets.forget(pets.anna.sha256, why="once more")
    assert (again.removed, again.num_rewritten, again.pin_moved) == ((), 0, False)
    assert read_all(pets.store.root) == before
    assert pets.forget().removed == ()


def test_bytes_that_came_back_go_again(pets: Pets) -> None:
    data = pets.store.get(make_image_key(pets.anna.sha256))
    pets.forget(pets.anna.sha256)
    pets.store.put(make_image_key(pets.anna.sha256), data)
    assert pets.forget().removed == (f"1 image in {pets.store.url}, with all earlier versions",)
    assert not pets.store.exists(make_image_key(pets.anna.sha256))


def test_looking_changes_nothing(pets: Pets) -> None:
    prepare(connect(pets.settings, make_params({"name": NAME, "prepare": {"image_size": 32}}), store=pets.store))
    before = read_all(pets.settings.home)
    found = find_everything(pets, frozenset({pets.anna.sha256}))
    assert [copy.what for copy in found.copies] == [
        f"1 image in {pets.store.url}, with all earlier versions",
        "data/prepared",
    ]
    assert (found.trace.versions, len(found.trace.parts)) == ((1, 2), 1)
    assert read_all(pets.settings.home) == before


def test_a_version_that_another_process_commits_meanwhile_loses_it_too(
    pets: Pets, monkeypatch: pytest.MonkeyPatch
) -> None:
    from visionloop.forget import dataset

    late, real = store_image(pets.store, 50), dataset.commit_version
    raced: list[DatasetVersion] = []

    def race(store: LocalStore, version: DatasetVersion, changed: list[ImageRecord]) -> bool:
        if not raced:
            raced.append(commit(store, pets.rows, [late], pets.versions[1]))
        return real(store, version, changed)

    monkeypatch.setattr(dataset, "commit_version", race)
    done = pets.forget(pets.anna.sha256)
    assert done.version is not None
    kept = {r.sha256 for r in load_version_records(pets.store, done.version)}
    assert (done.version.version, pets.anna.sha256 in kept, late.sha256 in kept) == (4, False, True)


def test_a_running_stage_stops_it_and_a_second_run_finishes(pets: Pets, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("visionloop.workfolder.LOCK_WAIT_S", 0.0)
    with lock_work(pets.settings.work_dir("train"), "x"), pytest.raises(BusyError, match="stage train"):
        pets.forget(pets.anna.sha256)
    assert "unfinished work of train" in pets.forget().removed
    assert holds_text(pets.store, SECRET) == []


@pytest.mark.parametrize(
    ("digests", "origins", "message"),
    [
        (("1234567",), (), r"forget '1234567': is no sha256; expected 8 to 64 hexadecimal digits"),
        (("photos:anna/1.png",), (), "To name images by where they came from, use --origin"),
        (("0" * 8,), (), "is no image of dataset pets"),
        (("0" * 64,), (), "is no image of dataset pets"),
        ((), ("photos:nobody/*",), "no image came from 'photos:nobody/\\*'"),
    ],
)
def test_what_names_no_image(pets: Pets, digests: tuple[str, ...], origins: tuple[str, ...], message: str) -> None:
    with pytest.raises(DatasetError, match=message):
        pets.forget(*digests, origins=origins)
    assert load_tombstones(pets.store, NAME) == frozenset()


def test_a_prefix_of_two_images_is_refused(pets: Pets) -> None:
    twin = pets.rows[0].sha256[:10] + "f" * 54
    commit(pets.store, pets.rows, [replace(pets.rows[0], sha256=twin)], pets.versions[1])
    with pytest.raises(DatasetError, match=r"is the beginning of 2 images; expected one. They are "):
        pets.forget(twin[:8])


def test_every_image_may_go(pets: Pets) -> None:
    done = pets.forget(origins=("photos:*",))
    assert done.version is not None
    assert (done.version.num_images, done.version.classes) == (0, ())
    assert list(pets.store.list("images/")) == []


def test_an_empty_dataset_has_nothing_to_forget(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    assert resolve_images(store, NAME, [], []).sha256s == frozenset()
    with pytest.raises(DatasetError, match="is no image of dataset pets"):
        resolve_images(store, NAME, ["abcdefab"], [])


def test_a_damaged_list_is_named(pets: Pets) -> None:
    pets.store.put(f"forgetting/{NAME}/x.json", b"{")
    with pytest.raises(DatasetError, match=rf"store object forgetting/{NAME}/x.json: is damaged"):
        pets.forget()
    pets.store.purge(f"forgetting/{NAME}/x.json")
    pets.store.put(f"manifests/{pets.versions[0].parts[0]}.parquet", b"x")
    with pytest.raises((DatasetError, StoreError), match="is damaged"):
        pets.forget(pets.rows[12].sha256)


def test_a_table_of_predictions_that_is_none(pets: Pets) -> None:
    pets.settings.reports_dir.mkdir()
    (pets.settings.reports_dir / "predictions.csv").write_bytes(b"\xff\xfe" + io.BytesIO(b"x").read())
    assert not any("reports" in what for what in pets.forget(pets.anna.sha256).removed)


def write_log(pets: Pets, others: str) -> None:
    """Let a server have written down Anna's image, and another one, in the store and in the spool; both were kept."""
    now = datetime(2026, 11, 28, 12, tzinfo=UTC)
    rows = [{"request_id": sha256[:4], "time": now, "image_sha256": sha256} for sha256 in (pets.anna.sha256, others)]
    both, hers = PREDICTIONS.encode(rows), PREDICTIONS.encode(rows[:1])
    for part, data in (("1", both), ("2", hers)):
        key = PREDICTIONS.make_key(NAME, now.date(), part)
        pets.store.put(key, data)
        spool = pets.settings.hidden_dir / "predictions"
        spool.mkdir(parents=True, exist_ok=True)
        (spool / key.replace("/", "+")).write_bytes(data)
    for sha256 in (pets.anna.sha256, others):
        key = make_kept_key(NAME, now.date(), sha256)
        pets.store.put(key, b"image")
        (spool / key.replace("/", "+")).write_bytes(b"image")


def test_what_servers_wrote_down_of_it_goes(pets: Pets) -> None:
    others = "f" * 64
    write_log(pets, others)
    done = pets.forget(pets.anna.sha256)
    assert f"2 parts of the prediction log in {pets.store.url}, written again without them" in done.removed
    assert f"1 image that a server kept in {pets.store.url}, with all earlier versions" in done.removed
    assert "3 files of the prediction log on the way to the store" in done.removed
    assert read_predictions(pets.store, NAME).table["image_sha256"].to_pylist() == [others]
    assert [key.rpartition("/")[2] for key in pets.store.list("kept/")] == [others]
    spool = sorted((pets.settings.hidden_dir / "predictions").iterdir())
    assert [path.name.rpartition("+")[2] for path in spool] == [others, "1.parquet"]
    assert PREDICTIONS.decode(spool[1].read_bytes(), "spool")["image_sha256"].to_pylist() == [others]
    assert pets.anna.sha256.encode() not in b"".join(path.read_bytes() for path in spool)
    assert [copy for copy in pets.forget(pets.anna.sha256).removed if "log" in copy] == []


def test_an_image_that_only_a_server_saw_can_be_forgotten(pets: Pets) -> None:
    write_log(pets, "f" * 64)
    pets.store.put(PREDICTIONS.make_key(NAME, date(2026, 11, 28), "damaged"), b"broken")
    with pytest.raises(DatasetError, match="is no image of dataset"):
        resolve_images(pets.store, NAME, ["e" * 64], [])
    pets.forget("f" * 64)
    assert read_predictions(pets.store, NAME).table["image_sha256"].to_pylist() == [pets.anna.sha256] * 2
    assert "f" * 64 in load_tombstones(pets.store, NAME)
