"""The commands of data as people type them: what they print, write and refuse."""

import csv
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from fakes import make_image, run_here, write_photos
from visionloop.cli.pictures import choose_images
from visionloop.data.manifest import latest_version, list_versions, load_pin, make_image_key
from visionloop.data.parts import load_version_records
from visionloop.data.rows import Tally, hold_records, tally_rows
from visionloop.errors import format_bytes
from visionloop.params import load_params
from visionloop.records import ImageRecord, Rejected
from visionloop.store import LocalStore
from visionloop.words import describe_classes, describe_counts
from workspaces import commit, store_image

PARAMS = """\
name: pets # the name

ingest:
  sources: [] # none yet
  max_rejected_ratio: 0.5
"""


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A workspace with a folder of photos beside it; the test stands in it."""
    folder = tmp_path / "ws"
    folder.mkdir()
    (folder / "params.yaml").write_text(PARAMS)
    write_photos(tmp_path / "photos", 8)
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def store(home: Path) -> LocalStore:
    return LocalStore(home / ".visionloop" / "store")


class Shell:
    """Runs commands in this process and keeps what they said."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self._monkeypatch, self._capsys = monkeypatch, capsys

    def __call__(self, *argv: str) -> str:
        code, out, err = self.run(*argv)
        assert (code, err) == (0, ""), err
        return out

    def fail(self, *argv: str) -> str:
        """Return the one line of a command that ends with 2."""
        code, _, err = self.run(*argv)
        assert (code, err.count("\n")) == (2, 1), err
        return err

    def run(self, *argv: str) -> tuple[int, str, str]:
        code = run_here(self._monkeypatch, *argv)
        said = self._capsys.readouterr()
        return code, said.out, said.err


@pytest.fixture
def shell(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Shell:
    return Shell(monkeypatch, capsys)


def test_a_one_time_pull_says_so_and_leaves_params_alone(home: Path, shell: Shell) -> None:
    shown = shell("ingest", "../photos")
    assert "a one-time pull of ../photos (kind folder, name photos)" in shown
    assert "dataset pets version 1: 16 new images, 16 in all" in shown
    assert "to pull it on every run, say --save" in shown
    assert (home / "params.yaml").read_text() == PARAMS
    assert "dataset pets version 1: nothing new, 16 in all" in shell("ingest", "../photos")


def test_the_same_photos_in_a_second_place_are_a_version_that_is_told_and_moves_no_pin(
    home: Path, shell: Shell, store: LocalStore
) -> None:
    shell("ingest", "../photos")
    pin = (home / "data" / "dataset.json").read_bytes()
    shutil.make_archive(str(home.parent / "again"), "zip", home.parent / "photos")
    stays = "the pin stays at version 1, which holds the same images: no stage runs again"
    for what in ("no new image, new places of known ones", "nothing new"):
        told = f"\ndataset pets version 2: {what}, 16 in all\n{stays}\n"
        assert told in shell("ingest", "../again.zip")
    assert (home / "data" / "dataset.json").read_bytes() == pin, "dvc depends on this file"
    first, second = list_versions(store, "pets")
    assert (second.digest, second.sources) == (first.digest, ("again", "photos"))
    *rows, after = shell("datasets").splitlines()
    assert after.startswith("next: `visionloop datasets show 2`, `visionloop datasets diff 1` tells what the last one")
    listed = [line.split() for line in rows]
    assert [(line[:2], "same" in line) for line in listed] == [(["*", "1"], False), (["2", first.digest[:12]], True)]


def test_a_saved_source_is_pulled_from_then_on(home: Path, shell: Shell) -> None:
    shown = shell("ingest", "../photos", "--name", "mine", "--save")
    assert "source mine is in params.yaml" in shown
    text = (home / "params.yaml").read_text()
    path = home.parent / "photos"
    assert "  sources:    # none yet\n" in text, "the comment keeps its column"
    assert load_params(home / "params.yaml").ingest.sources[0].model_dump()["path"] == str(path)
    assert "nothing new" in shell("ingest")
    assert "nothing new" in shell("ingest", "../photos", "--name", "mine", "--save")
    assert (home / "params.yaml").read_text() == text, "saved once"


def test_a_source_inside_the_workspace_is_saved_by_its_relative_path(home: Path, shell: Shell) -> None:
    (home.parent / "photos").rename(home / "photos")
    shell("ingest", "photos", "--save")
    assert "- {kind: folder, path: photos, name: photos}" in (home / "params.yaml").read_text()


def test_flat_files_by_a_pattern(home: Path, shell: Shell) -> None:
    flat = home.parent / "flat"
    flat.mkdir()
    for path in (home.parent / "photos").rglob("*.png"):
        path.rename(flat / f"{path.parent.name}.{path.name}")
    shell("ingest", "../flat", "--pattern", "{label}.*.png", "--save")
    source = load_params(home / "params.yaml").ingest.sources[0]
    assert (source.kind, source.name, getattr(source, "pattern", None)) == ("folder", "flat", "{label}.*.png")
    assert load_pin(home / "data" / "dataset.json").classes == ("cat", "dog")


def test_a_table_with_named_columns(home: Path, shell: Shell) -> None:
    rows = [(f"{p.parent.name}/{p.name}", p.parent.name, "x") for p in sorted((home.parent / "photos").rglob("*.png"))]
    with (home.parent / "photos" / "list.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("where", "what", "label"), *rows])
    shell("ingest", "../photos/list.csv", "--image-column", "where", "--label-column", "what", "--save")
    source = load_params(home / "params.yaml").ingest.sources[0]
    assert source.kind == "table"
    assert (source.columns.image, source.columns.label) == ("where", "what")
    assert load_pin(home / "data" / "dataset.json").classes == ("cat", "dog")


def test_a_failed_pull_saves_nothing(home: Path, shell: Shell) -> None:
    (home.parent / "one" / "cat").mkdir(parents=True)
    (home.parent / "one" / "cat" / "1.png").write_bytes(make_image(1))
    assert "has 1 class (cat)" in shell.fail("ingest", "../one", "--save")
    assert (home / "params.yaml").read_text() == PARAMS


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("ingest", "--save"), "--save: no WHAT is given"),
        (("ingest", "--label-column", "x"), "--label-column: no WHAT is given"),
        (
            ("ingest", "../photos", "--label-column", "x"),
            "photos: columns or an encoding are named, but labels are those of the paths",
        ),
        (("ingest", "nowhere"), "does not exist"),
        (("ingest", "http://me:secret@x.test/list.json", "--save"), "would hold a password"),
        (("ingest", "../photos", "--name", "No Name"), "expected lower-case letters"),
        (("datasets", "show"), "this workspace has no images yet"),
        (("datasets", "diff", "1", "2"), "dataset pets version 1: is not in the store"),
        (("datasets", "export", "1", "out"), "dataset pets version 1: is not in the store"),
        (("forget", "12345678"), "is no image of dataset pets"),
        (("similar", "params.yaml"), "params.yaml: is text, not an image"),
        (("similar", "nowhere.jpg"), "nowhere.jpg: does not exist"),
    ],
)
def test_mistakes_are_one_line(home: Path, shell: Shell, argv: tuple[str, ...], message: str) -> None:
    line = shell.fail(*argv)
    assert message in line
    assert "secret" not in line
    assert not (home / "out").exists()


def test_what_is_unusable_is_counted_by_code(home: Path, shell: Shell) -> None:
    for i in range(5):
        (home.parent / "photos" / "cat" / f"bad{i}.jpg").write_text("text")
    (home.parent / "photos" / "dog" / "empty.png").write_bytes(b"")
    shown = shell("ingest", "../photos")
    assert "quarantined 6 files that cannot be used:\n      1  empty\n" in shown
    assert "      5  not_an_image\n         photos:cat/bad0.jpg: is text, not an image" in shown
    assert "         and 2 more\n" in shown
    assert "bad4.jpg" in shell("datasets", "show", "--all")


def test_versions_are_listed_and_shown(home: Path, store: LocalStore, shell: Shell) -> None:
    assert "no version of pets yet" in shell("datasets")
    shell("ingest", "../photos")
    assert shell("datasets").startswith("*    1  ")
    shown = shell("datasets", "show")
    assert "  sources   photos 16\n  formats   PNG 16\n  pixels    32 x 32\n" in shown
    assert "  class" in shown
    picture = home / ".visionloop" / "datasets" / "pets-000001.png"
    assert f"look at {picture}" in shown
    with Image.open(picture) as image:
        assert image.size[0] > 800
    shell("datasets", "show", "1", "--sheet", "mine")
    assert (home / "mine.png").read_bytes() == picture.read_bytes()
    value = json.loads(shell("datasets", "show", "--json"))
    assert (value["num_images"], value["images_per_source"], value["rejected_rows"]) == (16, {"photos": 16}, [])
    assert [v["pinned"] for v in json.loads(shell("datasets", "--json"))["versions"]] == [True]
    assert "is not in the store" in shell.fail("datasets", "show", "7")
    store.root.rename(home / "moved")
    away = shell.fail("datasets", "show")
    assert away == shell.fail("datasets") and "a store that was moved is known again" in away
    assert "run `visionloop ingest`" not in shell.fail("datasets", "show", "1")


def test_a_missing_image_is_a_grey_square_not_an_end(home: Path, store: LocalStore, shell: Shell) -> None:
    shell("ingest", "../photos")
    for key in list(store.list("images/"))[:3]:
        store.delete(key)
    assert "look at " in shell("datasets", "show")
    assert "is missing from the store or damaged there" in shell.fail("datasets", "export", "1", "out")


def test_two_versions_are_compared(home: Path, store: LocalStore, shell: Shell) -> None:
    one = [store_image(store, seed) for seed in range(6)]
    first = commit(store, [], one)
    late = [store_image(store, 6), store_image(store, 9, sources=("camera",))]
    listed = Rejected("photos:gone.png", "forgotten", "was forgotten on purpose, and is not taken in again")
    commit(store, one, late, first, rejected=[Rejected("photos:bad.png", "empty", "is empty"), listed])
    shown = shell("datasets", "diff", "1", "2")
    assert shown.startswith("pets version 1 -> 2: 6 -> 8 images\nadded 2: train 1, val 1\n")
    assert "  cat         3      4  +1\n" in shown
    assert "  camera       0      1  +1\n" in shown
    assert "new: quarantined 1 file that cannot be used:\n      1  empty\n" in shown
    assert "new: 1 listed only:\n      1  forgotten\n" in shown
    assert shell("datasets", "diff", "2", "2") == (
        "pets version 2 -> 2: 8 -> 8 images\nthe same images, labels and sides\n"
        "next: `visionloop start` retrains, `visionloop datasets drop 2` takes it back\n"
    )
    value = json.loads(shell("datasets", "diff", "1", "--json"))
    assert (value["before"], value["after"], len(value["added"]), value["rejected"][0]["code"]) == (1, 2, 2, "empty")


def test_what_was_quarantined_stays_so_after_a_forget(home: Path, store: LocalStore, shell: Shell) -> None:
    bad = Rejected("photos:bad.png", "empty", "is empty")
    rows = [store_image(store, seed) for seed in range(6)]
    first = commit(store, [], rows, rejected=[bad])
    late = [store_image(store, seed, sources=("camera",)) for seed in range(6, 9)]
    commit(store, rows, late, first, rejected=[bad, Rejected("camera:bad.png", "empty", "is empty")])
    shell("forget", rows[1].sha256, "--yes")
    assert [version.num_rejected for version in list_versions(store, "pets")] == [1, 2, 2]
    assert "quarantined" not in shell("datasets", "diff", "2", "3")
    shell("datasets", "drop", "--source", "camera")
    assert list_versions(store, "pets")[-1].num_rejected == 1


def test_an_export_of_some_sides(home: Path, store: LocalStore, shell: Shell) -> None:
    commit(store, [], [store_image(store, seed) for seed in range(12)])
    shown = shell("datasets", "export", "1", "out", "--side", "val", "--side", "test")
    assert f"{home / 'out'} holds 6 images" in shown
    assert sorted(p.name for p in (home / "out").iterdir()) == ["images.csv", "test", "val"]
    assert "is not empty" in shell.fail("datasets", "export", "1", "nowhere/../out")
    assert f"{home / 'more'} holds 6 images" in shell("datasets", "export", "1", "out/../more", "--side", "train")
    shell("datasets", "export", "1", "tar", "--format", "webdataset")
    assert sorted(p.suffix for p in (home / "tar").iterdir()) == [".csv", ".json", ".tar", ".tar", ".tar"]


def test_a_forgotten_image_is_not_taken_in_again(home: Path, store: LocalStore, shell: Shell) -> None:
    shell("ingest", "../photos")
    version = latest_version(store, "pets")
    assert version is not None
    row = next(r for r in load_version_records(store, version) if r.origins == ("photos:cat/3.png",))
    shown = shell("forget", row.sha256[:10], "--dry-run")
    assert f"  {row.sha256[:12]}  {row.side:<8}  cat photos:cat/3.png\n" in shown
    assert "  - 1 image in file://" in shown
    assert shown.endswith("nothing was changed\nnext: the same without --dry-run\n")
    assert len(list_versions(store, "pets")) == 1
    assert "there is no terminal to ask on; expected --yes" in shell.fail("forget", row.sha256[:10])
    assert "forget --json: asks nothing; expected --yes with it" in shell.fail("forget", row.sha256[:10], "--json")
    assert shell("forget", "--dry-run").splitlines()[-1] == "next: `visionloop forget SHA256 --dry-run`"
    shown = shell("forget", row.sha256[:10], "--yes", "--why", "asked")
    assert "dataset pets version 2 holds 15 images, which is pinned now\nleft:\n" in shown
    assert "`similar`, `suspects` and `map` need it, or `visionloop prepare`, first" in shown.splitlines()[-1]
    assert "*    2  " in shell("datasets")
    assert "+0 -1" in shell("datasets")
    assert "1 of these images were forgotten since" in shell("datasets", "show", "1")
    assert shell("datasets", "diff", "1").splitlines()[-1] == "next: `visionloop start` retrains"
    for _ in range(2):
        shown = shell("ingest", "../photos")
        assert "nothing new, 15 in all" in shown
        assert "1 listed only:\n      1  forgotten\n" in shown
        assert not store.exists(make_image_key(row.sha256))
    again = shell("forget", "--yes")
    assert [line for line in again.splitlines() if line.startswith("removing")] == ["removing 1 contact sheet"]
    before = "1 that were forgotten before: looking for what is still there\n"
    assert shell("forget", "--quiet") == f"{before}nothing is left to remove\n"
    assert json.loads(shell("forget", "--json"))["copies"] == []


def test_nothing_to_forget(home: Path, shell: Shell) -> None:
    assert shell("forget") == (
        "nothing of pets was forgotten yet, and no image is named\nnext: `visionloop forget SHA256 --dry-run`\n"
    )


def add_up(records: list[ImageRecord]) -> Tally:
    return tally_rows(hold_records(records).iterate_batches())


def test_tables_of_few_and_of_many_classes(store: LocalStore) -> None:
    few = [store_image(store, seed) for seed in range(8)]
    lines = describe_classes(add_up(few))
    assert lines[0].split() == ["class", "train", "val", "test", "all"]
    assert lines[1].split() == ["cat", "2", "0", "2", "4"]
    assert len({len(line) for line in lines}) == 1
    base = store_image(store, 1)
    many = [replace(base, labels=(f"breed {k:03d}",)) for k in range(120) for _ in range(k + 1)]
    assert base.side == "train"
    lines = describe_classes(add_up(many))
    assert len(lines) == 1 + 8 + 1 + 8 + 1
    assert lines[1].split() == ["breed", "119", "120", "120"]
    assert "104 classes between them; --all shows every one" in lines[9]
    assert lines[-2].split() == ["breed", "000", "1", "1"]
    assert len(describe_classes(add_up(many), everything=True)) == 122
    digests = [replace(row, sha256=f"{number:064x}") for number, row in enumerate(many)]
    assert describe_counts(commit(store, [], digests)) == ["  train        7,260  120 classes of 1 to 120 images"]


def test_the_choice_of_images_is_stable_and_spread(store: LocalStore) -> None:
    rows = [store_image(store, seed, labels=(f"c{seed % 3}",) if seed else ()) for seed in range(60)]
    rows.sort(key=lambda row: row.sha256)
    chosen = choose_images(rows)
    assert len(chosen) == 25
    assert len({r.sha256 for r in chosen}) == 25
    counts = {label: sum(r.labels == (label,) for r in chosen) for label in ("c0", "c1", "c2")}
    assert counts == {"c0": 8, "c1": 8, "c2": 8}
    assert {r.side for r in chosen} == {"train", "val", "test"}
    many = [store_image(store, seed, labels=(f"k{seed:03d}",)) for seed in range(60)]
    assert len({r.labels for r in choose_images(many)}) == 25
    assert choose_images([]) == []


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0 B"), (999, "999 B"), (9200, "9.2 KB"), (123_456, "123 KB"), (2.5e9, "2.5 GB"), (3e13, "30.0 TB")],
)
def test_sizes_in_words(number: float, text: str) -> None:
    assert format_bytes(number) == text
