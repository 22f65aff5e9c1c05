"""A mistake can be taken back, and what a message advises works: real commands in a workspace without sources."""

import hashlib
import json
import shutil
import sqlite3
from pathlib import Path

import pytest

from fakes import make_image, run_here, write_photos
from visionloop.data.manifest import list_versions, load_pin
from visionloop.data.parts import load_version_records
from visionloop.data.split import choose_side
from visionloop.promotion.ledger import append_entry
from visionloop.records import ImageRecord
from visionloop.store import LocalStore

PARAMS = "name: pets\nprepare:\n  image_size: 32\n"


class Desk:
    """A workspace, and what the commands say there."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self.home, self.patch, self.capsys = folder / "ws", monkeypatch, capsys
        self.photos = write_photos(folder / "photos")
        self.home.mkdir()
        self.write()
        monkeypatch.chdir(self.home)

    def write(self, more: str = "") -> None:
        (self.home / "params.yaml").write_text(PARAMS + more)

    def run(self, *argv: str, code: int = 0) -> str:
        assert run_here(self.patch, *map(str, argv)) == code
        told = self.capsys.readouterr()
        return told.err if code else told.out

    @property
    def store(self) -> LocalStore:
        return LocalStore(self.home / ".visionloop" / "store")

    def rows(self, number: int = -1) -> dict[str, ImageRecord]:
        version = list_versions(self.store, "pets")[number]
        return {r.sha256: r for r in load_version_records(self.store, version)}

    def pin(self) -> int:
        return load_pin(self.home / "data" / "dataset.json").version


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Desk:
    desk = Desk(tmp_path, monkeypatch, capsys)
    desk.run("ingest", desk.photos, "--name", "photos")
    return desk


def add_more(desk: Desk, name: str = "more", first: int = 100, number: int = 10) -> Path:
    folder = write_photos(desk.home.parent / name, number, first)
    desk.run("ingest", folder, "--name", name)
    return folder


def test_the_newest_version_is_taken_back_and_the_drop_too(desk: Desk) -> None:
    add_more(desk)
    one, two = desk.rows(0), desk.rows(1)
    told = desk.run("datasets", "drop", "2")
    assert "removed 20: " in told
    assert "dataset pets version 3: 20 images, without 20 others" in told
    assert "the pin is on version 3" in told
    assert (desk.rows(), desk.pin(), len(list_versions(desk.store, "pets"))) == (one, 3, 3)
    assert all(desk.store.exists(f"images/{s[:2]}/{s}") for s in two)
    assert "datasets drop 3" in told
    desk.run("datasets", "drop", "3")
    assert (desk.rows(), desk.pin()) == (two, 4)


def test_one_can_go_back_further_than_one_version(desk: Desk) -> None:
    add_more(desk)
    add_more(desk, "third", 200)
    desk.run("datasets", "drop", "3")
    desk.run("datasets", "drop", "2")  # what version 4 holds is version 2
    assert (desk.rows(), desk.pin()) == (desk.rows(0), 5)


def test_a_source_is_taken_out_and_what_another_has_too_stays(desk: Desk) -> None:
    folder = write_photos(desk.home.parent / "more", 10, 100)
    shutil.copytree(desk.photos, folder, dirs_exist_ok=True)
    desk.run("ingest", folder, "--name", "more")
    assert len(desk.rows()) == 40
    told = desk.run("datasets", "drop", "--source", "more")
    assert "without 20 others" in told
    assert desk.rows() == desk.rows(0)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("1",), "dataset pets version 1: is not the newest, which is 2"),
        (("9",), "dataset pets version 9: is not in the store"),
        (("--source", "ware"), "no image of version 2 came from the source ware; expected one of more, photos."),
        ((), "neither a version nor a source is named"),
        (("2", "--source", "more"), "a version and a source are named"),
    ],
)
def test_what_cannot_be_dropped_says_what_to_do(desk: Desk, words: tuple[str, ...], message: str) -> None:
    add_more(desk)
    assert message in desk.run("datasets", "drop", *words, code=2)
    assert len(list_versions(desk.store, "pets")) == 2


def test_nothing_left_is_refused_and_the_way_out_works(desk: Desk) -> None:
    told = desk.run("datasets", "drop", "1", code=2)
    assert "version 1 is the first: nothing would be left" in told
    assert "another `name`" in told
    assert "would have 0 class (none) left" in desk.run("datasets", "drop", "--source", "photos", code=2)
    (desk.home / "params.yaml").write_text(PARAMS.replace("pets", "cattle"))
    desk.run("ingest", desk.photos)
    assert load_pin(desk.home / "data" / "dataset.json").name == "cattle"


def test_images_that_come_again_have_the_sides_they_had(desk: Desk) -> None:
    write_photos(desk.home / "one", 20, 300)
    write_photos(desk.home / "two", 20, 400)
    sources = "[{kind: folder, path: one, name: one}, {kind: folder, path: two, name: two}]"
    (desk.home / "params.yaml").write_text(f"name: cattle\ningest:\n  sources: {sources}\n")
    desk.run("ingest")
    first = {r.sha256: r for r in load_version_records(desk.store, list_versions(desk.store, "cattle")[0])}
    sides = {s: r.side for s, r in first.items()}
    assert any(side != choose_side(first[s].key, 0, (0.7, 0.15, 0.15)) for s, side in sides.items())
    desk.run("datasets", "drop", "--source", "two")
    desk.run("ingest")
    last = load_version_records(desk.store, list_versions(desk.store, "cattle")[-1])
    assert {r.sha256: r.side for r in last} == sides


def test_a_side_that_the_right_folder_gives_counts_after_a_mistake(desk: Desk) -> None:
    wrong = write_photos(desk.home.parent / "wrong", 10, 100)
    desk.run("ingest", wrong)
    desk.run("datasets", "drop", "2")
    for side, first, last in (("train", 100, 107), ("val", 107, 108), ("test", 108, 110)):
        for name in ("cat", "dog"):
            (folder := desk.home.parent / "right" / side / name).mkdir(parents=True)
            for i in range(first, last):
                shutil.copy(wrong / name / f"{i}.png", folder)
    desk.run("ingest", desk.home.parent / "right")
    for row in desk.rows().values():
        if row.sources == ("right",):
            assert row.origins[0].split(":")[1].startswith(f"{row.side}/")


def test_after_a_promotion_the_champion_is_named(desk: Desk) -> None:
    add_more(desk)
    digest = list_versions(desk.store, "pets")[1].digest
    how = {"action": "promote", "model_version": "1", "decision": 1, "run_id": None, "by": "me", "why": "x", "at": "t"}
    dataset = {"name": "pets", "version": 2, "digest": digest}
    append_entry(desk.store, "pets", None, bundle="b" * 64, dataset=dataset, **how)
    told = desk.run("datasets", "drop", "2")
    assert "the champion, bundle bbbbbbbbbbbb, was trained on version 2, which had them" in told
    assert desk.pin() == 3


def test_a_declared_source_is_named_before_it_comes_back(desk: Desk) -> None:
    write_photos(desk.home / "more", 10, 100)
    desk.write("ingest:\n  sources: [{kind: folder, path: more, name: more}]\n")
    desk.run("ingest")
    told = desk.run("datasets", "drop", "2")
    assert "params.yaml still names the source more: mend it or take it out" in told
    desk.run("ingest")
    assert len(desk.rows()) == 40


def test_a_dropped_image_can_be_forgotten(desk: Desk) -> None:
    add_more(desk)
    gone = sorted(desk.rows().keys() - desk.rows(0).keys())[0]
    desk.run("datasets", "drop", "2")
    desk.run("forget", gone[:12], "--yes")
    assert not desk.store.exists(f"images/{gone[:2]}/{gone}")
    desk.run("ingest", desk.home.parent / "more")
    assert gone not in desk.rows()
    assert len(desk.rows()) == 39


def test_an_older_pin_is_told_at_the_next_ingest(desk: Desk) -> None:
    pin = (desk.home / "data" / "dataset.json").read_text()
    add_more(desk)
    (desk.home / "data" / "dataset.json").write_text(pin)
    folder = write_photos(desk.home.parent / "third", 3, 300)
    assert "pinned is version 1; what is new goes on top of version 2" in desk.run("ingest", folder)
    (desk.home / "data" / "dataset.json").write_text(pin)
    assert "the pin" in desk.run("datasets", "drop", "3")


@pytest.mark.parametrize("names", [("bird", "cow"), ("train", "dog"), ("New Folder (2)", "cat"), ("images2", "cat")])
def test_new_classes_that_look_like_a_mistake_are_asked_about(desk: Desk, names: tuple[str, str]) -> None:
    folder = write_photos(desk.home.parent / "wrong", 5, 500, (names[0],))
    write_photos(folder, 20 if names[1] in ("cat", "dog") else 5, 600, (names[1],))
    told = desk.run("ingest", folder, "--pattern", "{label}/*", code=2) if names[0] == "train" else ""
    told = told or desk.run("ingest", folder, code=2)
    assert f"would get new classes ({', '.join(f'{n}: 5 images' for n in names if n not in ('cat', 'dog'))})" in told
    assert "--allow-new-classes" in told
    assert len(list_versions(desk.store, "pets")) == 1


def test_the_flag_and_the_list_of_classes_both_let_them_in(desk: Desk) -> None:
    folder = write_photos(desk.home.parent / "wild", 5, 500, ("bird", "cow"))
    desk.run("ingest", folder, code=2)
    desk.run("ingest", folder, "--allow-new-classes")
    assert list_versions(desk.store, "pets")[-1].classes == ("bird", "cat", "cow", "dog")
    desk.write("ingest:\n  expect: {classes: [bird, cat, cow, dog, emu]}\n")
    desk.run("ingest", write_photos(desk.home.parent / "emus", 5, 700, ("emu", "cow")))
    assert "emu" in list_versions(desk.store, "pets")[-1].classes


def test_a_new_class_among_many_known_images_is_no_mistake(desk: Desk) -> None:
    folder = write_photos(desk.home.parent / "more", 10, 100)
    desk.run("ingest", write_photos(folder, 5, 500, ("bird",)))
    assert "bird" in list_versions(desk.store, "pets")[-1].classes


def test_a_class_below_the_least_is_left_out_told_and_comes_back(desk: Desk) -> None:
    desk.write("ingest:\n  expect: {min_per_class: 4}\n")
    folder = write_photos(desk.home.parent / "more", 5, 100)
    told = desk.run("ingest", write_photos(folder, 2, 500, ("bird",)))
    assert "left out: bird, with fewer images than ingest.expect.min_per_class" in told
    assert "2  class_left_out" in told
    assert list_versions(desk.store, "pets")[-1].classes == ("cat", "dog")
    again = desk.run("ingest", folder)
    assert "what could not be used is the same as last time" in again
    assert "sum: 12 files = 10 taken, 2 listed" in again
    write_photos(folder, 2, 502, ("bird",))
    assert "left out" not in desk.run("ingest", folder)
    assert sum(r.labels == ("bird",) for r in desk.rows().values()) == 4


def add_bird_on(desk: Desk, side: str) -> Path:
    """Ingest ten known kinds and one bird, whose hash says `side`."""
    folder = write_photos(desk.home.parent / "more", 5, 100)
    birds = (make_image(seed) for seed in range(5000, 6000))
    bird = next(b for b in birds if choose_side(hashlib.sha256(b).hexdigest(), 0, (0.7, 0.15, 0.15)) == side)
    (folder / "bird").mkdir()
    (folder / "bird" / "1.png").write_bytes(bird)
    return folder


@pytest.mark.parametrize("side", ["val", "test"])
def test_the_only_image_of_a_class_goes_to_train_and_that_is_told(desk: Desk, side: str) -> None:
    told = desk.run("ingest", add_bird_on(desk, side))
    assert "1 image of classes without 1 on train went there, whatever their hash says (bird: 1" in told
    assert [r.side for r in desk.rows().values() if r.labels == ("bird",)] == ["train"]
    assert "fewer than 5 test images, whose figures say little: bird 0, cat 3, dog 1" in told


def test_a_class_that_is_in_already_is_left_out_without_a_source_and_training_goes_on(desk: Desk) -> None:
    desk.write("ingest:\n  split: {min_train: 0}\n")
    desk.run("ingest", add_bird_on(desk, "test"))
    desk.run("prepare")
    told = desk.run("train", code=2)
    assert "no training image of bird, of which the other sides have 1" in told
    assert "set ingest.expect.min_per_class, which leaves it out" in told
    desk.write("ingest:\n  expect: {min_per_class: 2}\n")
    told = desk.run("ingest")
    assert "params.yaml names no source: no image is read" in told
    assert "left out: bird" in told
    desk.run("prepare")
    assert json.loads((desk.home / "data" / "prepared" / "classes.json").read_text()) == ["cat", "dog"]
    desk.write()
    desk.run("ingest")
    assert [r.side for r in desk.rows().values() if r.labels == ("bird",)] == ["test"]


def test_what_the_store_lost_is_mended_as_the_message_says(desk: Desk) -> None:
    one, other = sorted(desk.rows())[:2]
    for sha256 in (one, other):
        desk.store.delete(f"images/{sha256[:2]}/{sha256}")
    told = desk.run("prepare", code=2)
    assert "`visionloop ingest PATH --name photos --verify`" in told
    assert "`visionloop ingest PATH --verify`" in desk.run("ingest", "--verify", code=2)
    desk.run("ingest", desk.photos, "--verify", "--name", "photos")
    desk.run("prepare")
    desk.store.delete(f"images/{one[:2]}/{one}")
    shutil.rmtree(desk.home / "data" / "prepared")
    assert f"`visionloop forget {one[:12]} --why lost`" in desk.run("prepare", code=2)
    desk.run("forget", one[:12], "--why", "lost", "--yes")
    desk.run("prepare")
    assert len(desk.rows()) == 19


def test_a_pin_with_forgotten_images_is_moved_by_ingest_without_a_source(desk: Desk) -> None:
    pin = (desk.home / "data" / "dataset.json").read_text()
    desk.run("forget", sorted(desk.rows())[0][:12], "--yes")
    (desk.home / "data" / "dataset.json").write_text(pin)
    assert "Pin a later one: `visionloop ingest`" in desk.run("prepare", code=2)
    desk.run("ingest")
    desk.run("prepare")
    assert desk.pin() == 2


def test_a_name_that_was_changed_after_the_ingest_is_told(desk: Desk) -> None:
    desk.run("prepare")
    (desk.home / "params.yaml").write_text(PARAMS.replace("pets", "cattle"))
    for command in (["prepare"], ["train"], ["gate"], ["datasets", "show"]):
        told = desk.run(*command, code=2)
        assert "data/dataset.json: pins version 1 of pets; expected a version of cattle" in told
    assert "names no source" in desk.run("ingest", code=2)
    desk.run("ingest", desk.photos)
    desk.run("prepare")


def test_a_journal_of_the_dropped_version_is_not_believed(desk: Desk) -> None:
    folder = add_more(desk)
    desk.run("datasets", "drop", "2")
    with sqlite3.connect(desk.home / ".visionloop" / "ingest" / "journal.sqlite") as journal:
        assert journal.execute("SELECT count(*) FROM pulls").fetchone() == (1,)
    told = desk.run("ingest", folder, "--name", "more")
    assert "20 new images" in told


@pytest.mark.parametrize("there", [False, True])
def test_a_start_that_fails_leaves_no_workspace_that_it_made(desk: Desk, there: bool) -> None:
    shutil.rmtree(desk.photos / "cat")
    new = desk.home / "new"
    if there:
        new.mkdir()
    told = desk.run("start", desk.photos, "new", code=2)
    assert "nothing was ingested: the workspace is removed again" in told
    assert "has 1 class (dog)" in told
    assert (new.exists(), list(new.iterdir()) if there else []) == (there, [])
    write_photos(desk.photos)
    before = sorted(desk.home.rglob("*"))
    desk.write("  resize: wrong\n")
    desk.run("ingest", code=2)
    assert sorted(desk.home.rglob("*")) == before, "what was there before stays"
