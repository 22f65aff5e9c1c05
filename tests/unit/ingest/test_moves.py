"""A place that is read again after people have sorted its files anew: told, with a way that works."""

import csv
import io
import re
import shutil
from pathlib import Path

import pytest

from fakes import write_photos
from pull_desk import PullDesk, find_files, move


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> PullDesk:
    return PullDesk(tmp_path, monkeypatch, capsys)


# Sorted again


def test_images_in_another_class_folder_keep_their_label_until_the_command_that_is_told_is_typed(
    desk: PullDesk,
) -> None:
    write_photos(desk.photos)
    desk.pull()
    before = desk.rows()
    move(find_files(desk.photos / "cat", 2), desk.photos / "dog")
    for _ in range(2):  # told again while it is so
        told = desk.pull()
        assert "moved: 2 images have another label in the source now; the old one stands:" in told
        assert "photos:cat/0.png (cat) is now photos:dog/moved-0.png (dog)" in told
        assert "`--relabel` with the same command takes the new labels" in told
    assert [row.labels for row in desk.rows().values()] == [row.labels for row in before.values()]
    assert "relabelled as the source says now: 2 images (cat -> dog 2)" in desk.pull("--relabel")
    after = {row.sha256: row for row in desk.rows().values()}
    for place in ("photos:cat/0.png", "photos:cat/1.png"):
        old, new = before[place], after[before[place].sha256]
        assert (new.labels, new.side, new.origins) == (("dog",), old.side, (f"photos:dog/moved-{place[-5:]}",))
    told = desk.pull()
    assert "moved:" not in told
    assert "nothing new" in told


def test_the_line_of_the_quarantine_settles_it_as_a_correction(desk: PullDesk) -> None:
    write_photos(desk.photos)
    desk.pull()
    move(find_files(desk.photos / "cat", 2), desk.photos / "dog")
    lines = re.findall(r"was cat, and is dog in its source now; (\w{12},cat,dog)", desk.pull())
    assert len(lines) == 2
    (desk.home / "corrections.csv").write_text("\n".join(["sha256,old,new", *lines]))
    desk.write("  corrections: corrections.csv\n")
    told = desk.pull()
    assert "moved:" not in told
    assert "quarantined" not in told
    assert sorted(desk.labels().values()) == ["cat"] * 8 + ["dog"] * 12


def test_a_declared_source_is_told_the_command_that_takes_the_labels(desk: PullDesk) -> None:
    write_photos(desk.photos)
    desk.write(f"  sources: [{{kind: folder, path: {desk.photos}, name: photos}}]\n")
    desk.run("ingest")
    move(find_files(desk.photos / "cat", 2), desk.photos / "dog")
    command = re.search(r"`visionloop (ingest --relabel)` takes", desk.run("ingest"))
    assert command
    desk.run(*command[1].split())
    assert "moved:" not in desk.run("ingest")


@pytest.mark.parametrize("way", ["relabel", "label_map"])
def test_a_class_folder_with_another_name_stops_the_pull_and_both_ways_out_work(desk: PullDesk, way: str) -> None:
    write_photos(desk.photos)
    desk.pull()
    (desk.photos / "cat").rename(desk.photos / "feline")
    told = desk.pull(code=2)
    assert "10 of 20 files cannot be used" in told
    assert "`--relabel` with the same command takes the labels that their source gives now" in told
    desk.write(ratio=1)
    pairs = re.search(r"(label_map: \{.*\})", desk.pull())
    assert pairs
    assert pairs[1] == 'label_map: {"cat": "feline"}'
    if way == "relabel":
        desk.write()
        desk.pull("--relabel")
    else:
        desk.write(f"  {pairs[1]}\n")
        desk.pull()
    assert sorted({*desk.labels().values()}) == ["dog", "feline"]
    assert len(desk.labels()) == 20
    assert "moved:" not in desk.pull()


def test_labels_that_were_mended_in_a_table_are_seen_at_their_places(desk: PullDesk) -> None:
    write_photos(desk.photos, classes=("",))
    table, names = desk.photos / "labels.csv", sorted(path.name for path in desk.photos.iterdir())
    table.write_text("file,label\n" + "".join(f"{name},{'cat' if i < 5 else 'dog'}\n" for i, name in enumerate(names)))
    desk.what = (table, "--name", "photos")
    desk.pull()
    table.write_text(table.read_text().replace("0.png,cat", "0.png,dog"))
    assert "photos:0.png (cat) is now photos:0.png (dog)" in desk.pull()
    desk.pull("--relabel")
    assert desk.labels()["0.png"] == "dog"
    # And a label that was taken away: it may go too.
    table.write_text(table.read_text().replace("1.png,cat", "1.png,"))
    assert "photos:1.png (cat) is now photos:1.png (unlabelled)" in desk.pull()
    desk.pull("--relabel")
    assert desk.labels()["1.png"] == ""


def test_a_label_that_was_taken_from_several_is_told(desk: PullDesk) -> None:
    write_photos(desk.photos, classes=("",))
    table, names = desk.photos / "labels.csv", sorted(path.name for path in desk.photos.iterdir())
    table.write_text("file,label\n" + "".join(f"{name},cat|dog\n" for name in names))
    (desk.home / "params.yaml").write_text("name: pets\ntask: multilabel\n")
    desk.what = (table, "--name", "photos")
    desk.pull()
    table.write_text(table.read_text().replace("0.png,cat|dog", "0.png,cat"))
    told = desk.pull()
    assert "photos:0.png (cat, dog) is now photos:0.png (cat)" in told
    assert "quarantined" not in told
    desk.pull("--relabel")
    assert desk.labels()["0.png"] == "cat"


def test_two_files_that_changed_places_are_both_relabelled(desk: PullDesk) -> None:
    write_photos(desk.photos)
    desk.pull()
    cat, dog = desk.photos / "cat" / "0.png", desk.photos / "dog" / "0.png"
    (a, b) = cat.read_bytes(), dog.read_bytes()
    cat.write_bytes(b)
    dog.write_bytes(a)
    told = desk.pull()
    assert "moved: 2 images have another label" in told
    assert "gone:" not in told


def test_an_image_that_another_source_has_under_the_old_label_is_a_conflict_and_no_move(desk: PullDesk) -> None:
    write_photos(desk.photos)
    desk.pull()
    copy = shutil.copytree(desk.photos, desk.home.parent / "copy")
    desk.run("ingest", copy, "--name", "copy")
    move(find_files(desk.photos / "cat", 1), desk.photos / "dog")
    told = desk.pull("--relabel")
    assert "moved:" not in told
    line = re.search(r"same bytes labelled cat, dog: cat stands; (\w{12},cat,dog)", told)
    assert line
    (desk.home / "corrections.csv").write_text(f"sha256,old,new\n{line[1]}\n")
    desk.write("  corrections: corrections.csv\n")
    assert "quarantined" not in desk.pull()


def test_in_the_first_version_no_label_stands_and_the_line_settles_it(desk: PullDesk) -> None:
    write_photos(desk.photos)
    shutil.copy(desk.photos / "cat" / "0.png", desk.photos / "dog" / "again.png")
    told = desk.pull()
    line = re.search(r"same bytes labelled cat, dog: none is taken; (\w{12},cat,dog)", told)
    assert line
    assert len(desk.labels()) == 19
    (desk.home / "corrections.csv").write_text(f"sha256,old,new\n{line[1]}\n")
    desk.write("  corrections: corrections.csv\n")
    desk.pull()
    assert desk.labels()["cat/0.png"] == "dog"


def test_a_label_with_a_comma_is_a_cell_of_the_line(desk: PullDesk) -> None:
    write_photos(desk.photos, classes=("cat", "dog, big"))
    shutil.copy(desk.photos / "cat" / "0.png", desk.photos / "dog, big" / "again.png")
    line = re.search(r"none is taken; (\w{12},.*)", desk.pull())
    assert line
    assert next(csv.reader(io.StringIO(line[1])))[1:] == ["cat", "dog, big"]


@pytest.mark.parametrize("name", ["train", "new folder"])
def test_a_folder_that_is_no_class_is_asked_about_also_with_relabel(desk: PullDesk, name: str) -> None:
    write_photos(desk.photos, classes=("cat", "dog", "fox"))
    desk.pull()
    move(find_files(desk.photos / "cat", 10), desk.photos / name)
    told = desk.run("ingest", desk.photos, "--name", "photos", "--pattern", "{label}/", "--relabel", code=2)
    assert f"{name} is a name for a folder rather than a class" in told
    desk.run(*("ingest", desk.photos, "--name", "photos", "--pattern", "{label}/", "--relabel", "--allow-new-classes"))
    assert sorted({*desk.labels().values()}) == sorted(["dog", "fox", name])
