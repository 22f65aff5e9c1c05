"""From folders to a pinned version: sides, quarantine, conflicts, nothing new, two at once, a kill in the middle."""

import shutil
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from fakes import write_photos
from visionloop.data.encoded import name_readable
from visionloop.data.manifest import list_versions, load_pin, make_image_key
from visionloop.data.parts import load_version_records
from visionloop.errors import ParamsError, SourceError, StoreError
from visionloop.ingest.pull import PullReport, pull
from visionloop.params import FolderSource, Params, make_params
from visionloop.settings import Settings
from visionloop.store import LocalStore
from visionloop.workspace import connect
from workspaces import NOW


def run(settings: Settings, store: LocalStore, folder: Path, **sections: Any) -> PullReport:
    params: Params = make_params({"name": "pets", **sections})
    source = FolderSource(kind="folder", path=str(folder), name="photos")
    return pull(connect(settings, params, store=store), sources=[source], now=NOW)


def test_first_pull_pins_version_1(settings: Settings, store: LocalStore, tmp_path: Path) -> None:
    report = run(settings, store, write_photos(tmp_path / "photos", 40))
    assert (report.version.version, report.num_added, report.changed) == (1, 80, True)
    assert load_pin(settings.pin_path) == report.pin
    assert report.pin.classes == ("cat", "dog")
    assert sum(sum(c.values()) for c in report.version.counts.values()) == 80
    assert set(report.version.counts) == {"train", "val", "test"}
    origins = [r.origins for r in load_version_records(store, report.version)]
    assert ("photos:cat/0.png",) in origins


def test_nothing_new_makes_no_version(settings: Settings, store: LocalStore, tmp_path: Path) -> None:
    folder = write_photos(tmp_path / "photos")
    run(settings, store, folder)
    report = run(settings, store, folder)
    assert (report.changed, report.num_added, len(list_versions(store, "pets"))) == (False, 0, 1)


def test_a_later_version_is_cumulative_and_moves_nothing(settings: Settings, store: LocalStore, tmp_path: Path) -> None:
    first = run(settings, store, write_photos(tmp_path / "a"))
    second = run(settings, store, write_photos(tmp_path / "b", first=100))
    sides = {r.sha256: r.side for r in load_version_records(store, second.version)}
    assert (second.pin.version, second.num_added, len(sides)) == (2, 20, 40)
    assert all(sides[r.sha256] == r.side for r in load_version_records(store, first.version))


def test_one_held_out_folder_is_the_test_side(settings: Settings, store: LocalStore, tmp_path: Path) -> None:
    write_photos(tmp_path / "photos" / "train", 50)
    write_photos(tmp_path / "photos" / "validation", 8, first=500)
    report = run(settings, store, tmp_path / "photos")
    assert report.version.counts["test"] == {"cat": 8, "dog": 8}
    assert sum(report.version.counts["train"].values()) + sum(report.version.counts["val"].values()) == 100
    assert 0 < sum(report.version.counts["val"].values()) < 40


def test_three_split_folders_are_taken_as_they_are(settings: Settings, store: LocalStore, tmp_path: Path) -> None:
    for i, name in enumerate(("train", "valid", "test")):
        write_photos(tmp_path / "photos" / name, 3, first=100 * i)
    counts = run(settings, store, tmp_path / "photos").version.counts
    assert counts == {side: {"cat": 3, "dog": 3} for side in ("train", "val", "test")}


def test_what_is_no_image_is_quarantined_and_named(settings: Settings, store: LocalStore, tmp_path: Path) -> None:
    folder = write_photos(tmp_path / "photos", 30)
    (folder / "cat" / "notes.jpg").write_text("not a photo")
    (folder / "dog" / "empty.png").write_bytes(b"")
    (folder / "dog" / "readme.txt").write_text("passed over")
    report = run(settings, store, folder)
    assert [(r.origin, r.code) for r in report.rejected] == [
        ("photos:cat/notes.jpg", "not_an_image"),
        ("photos:dog/empty.png", "empty"),
    ]
    assert (report.num_added, report.version.num_rejected) == (60, 2)


def test_too_many_unusable_files_stop_the_pull(settings: Settings, store: LocalStore, tmp_path: Path) -> None:
    folder = write_photos(tmp_path / "photos", 3)
    for i in range(4):
        (folder / "cat" / f"bad{i}.jpg").write_text("x")
    with pytest.raises(SourceError, match=r"4 of 10 files cannot be used: photos:cat/bad0\.jpg \(not_an_image\)"):
        run(settings, store, folder)
    assert list_versions(store, "pets") == []
    assert not settings.pin_path.exists()


def test_same_bytes_under_two_labels_go_to_quarantine(settings: Settings, store: LocalStore, tmp_path: Path) -> None:
    folder = write_photos(tmp_path / "photos", 20)
    shutil.copy(folder / "cat" / "3.png", folder / "dog" / "copy.png")
    shutil.copy(folder / "cat" / "4.png", folder / "cat" / "again.png")
    report = run(settings, store, folder)
    assert {r.origin for r in report.rejected} == {"photos:cat/3.png", "photos:dog/copy.png"}
    assert {r.code for r in report.rejected} == {"label_conflict"}
    assert report.num_added == 39
    both = [r.origins for r in load_version_records(store, report.version) if len(r.origins) == 2]
    assert both == [("photos:cat/4.png", "photos:cat/again.png")]


def test_a_known_image_under_another_label_keeps_the_first(
    settings: Settings, store: LocalStore, tmp_path: Path
) -> None:
    first = run(settings, store, write_photos(tmp_path / "a"))
    (tmp_path / "b" / "dog").mkdir(parents=True)
    shutil.copy(tmp_path / "a" / "cat" / "1.png", tmp_path / "b" / "dog" / "1.png")
    params = {"ingest": {"max_rejected_ratio": 1.0}}
    report = run(settings, store, tmp_path / "b", **params)
    assert (report.changed, report.rejected[0].code) == (False, "label_conflict")
    assert report.version.digest == first.version.digest


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: None, "does not exist; expected a folder"),
        (lambda p: p.mkdir(), "no image in any class folder"),
        (lambda p: p.write_text("x"), "is a file; expected a folder"),
        (lambda p: write_photos(p, classes=("cat",)), r"has 1 class \(cat\); expected two classes or more"),
        (lambda p: (p / "cat").mkdir(parents=True), "no image in any class folder"),
    ],
    ids=["missing", "empty", "file", "one-class", "empty-class"],
)
def test_unusable_sources(settings: Settings, store: LocalStore, tmp_path: Path, make: Any, message: str) -> None:
    make(tmp_path / "photos")
    with pytest.raises(SourceError, match=message):
        run(settings, store, tmp_path / "photos")
    assert list_versions(store, "pets") == []


def test_another_split_needs_another_name(settings: Settings, store: LocalStore, tmp_path: Path) -> None:
    folder = write_photos(tmp_path / "photos")
    run(settings, store, folder)
    with pytest.raises(ParamsError, match=r"got seed 1.*expected seed 0.*as version 1 of pets fixed them"):
        run(settings, store, folder, ingest={"split": {"seed": 1}})


def test_two_pulls_at_once_both_succeed(settings: Settings, store: LocalStore, tmp_path: Path) -> None:
    folders = [write_photos(tmp_path / str(i), first=100 * i) for i in range(4)]
    failures: list[BaseException] = []

    def work(folder: Path) -> None:
        try:
            run(settings, store, folder)
        except BaseException as exc:
            failures.append(exc)

    threads = [threading.Thread(target=work, args=(folder,)) for folder in folders]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    versions = list_versions(store, "pets")
    assert [v.version for v in versions] == [1, 2, 3, 4]
    assert versions[-1].num_images == 80
    assert Counter(len(load_version_records(store, v)) for v in versions) == {20: 1, 40: 1, 60: 1, 80: 1}


def test_an_interrupted_pull_leaves_nothing_visible_and_ends_the_same(
    settings: Settings, store: LocalStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_photos(tmp_path / "photos")
    whole = run(settings, LocalStore(tmp_path / "other"), folder)
    settings.pin_path.unlink()
    added = 0
    add = LocalStore.add

    def failing_add(self: LocalStore, key: str, data: bytes) -> bool:
        nonlocal added
        added += 1
        if added > 9:
            raise StoreError("store", "no space left")
        return add(self, key, data)

    monkeypatch.setattr(LocalStore, "add", failing_add)
    with pytest.raises(StoreError, match="no space left"):
        run(settings, store, folder)
    assert list_versions(store, "pets") == []
    assert not settings.pin_path.exists()
    monkeypatch.undo()
    report = run(settings, store, folder)
    assert report.version == whole.version
    assert (report.num_seen, report.num_read) == (20, 11), "the nine that were stored are not read again"


def test_what_a_source_itself_refuses_is_counted_among_the_files(
    settings: Settings, store: LocalStore, tmp_path: Path
) -> None:
    folder = write_photos(tmp_path / "photos", 1)
    (folder / "cat" / "lost.jpg").symlink_to("nowhere.jpg")
    with pytest.raises(SourceError) as caught:
        run(settings, store, folder)
    assert "1 of 3 files cannot be used: photos:cat/lost.jpg (unreadable); the first one " in str(caught.value)
    assert list_versions(store, "pets") == []


def test_what_is_converted_is_stored_as_png_and_its_origin_says_so(
    settings: Settings, store: LocalStore, tmp_path: Path
) -> None:
    folder = write_photos(tmp_path / "photos", 6)
    for number in range(3):
        Image.open(folder / "cat" / f"{number}.png").save(folder / "cat" / f"{number}.png", "TIFF")
    Image.open(folder / "dog" / "0.png").save(folder / "dog" / "zero.ppm")
    refused = run(settings, store, folder, ingest={"max_rejected_ratio": 1})
    assert Counter(r.code for r in refused.rejected) == {"not_an_image": 4}
    assert (
        refused.rejected[0].reason == f"is TIFF; expected {name_readable()}. Set `ingest.convert: true`, or convert it."
    )

    taken = run(settings, store, folder, ingest={"convert": True})
    assert taken.rejected == ()
    records = {r.origins[-1]: r for r in load_version_records(store, taken.version)}
    assert sorted(name for name in records if name.endswith("#png")) == [
        *(f"photos:cat/{number}.png#png" for number in range(3)),
        "photos:dog/zero.ppm#png",
    ]
    data = store.get(make_image_key(records["photos:cat/0.png#png"].sha256))
    assert data.startswith(b"\x89PNG")
    assert records["photos:cat/0.png#png"].format == "PNG"
    again = run(settings, store, folder, ingest={"convert": True})
    assert (again.changed, again.num_read) == (False, 0), "the journal knows what was converted"
