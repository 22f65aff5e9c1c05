"""Folders: class folders, split folders, flat names, links that go round, names that nobody should give."""

import os
from pathlib import Path

import pytest

from source_runs import Run, run_source, touch
from visionloop.errors import SourceError
from visionloop.ingest.paths import listing
from visionloop.ingest.sources import PassedOver


def run(home: Path, *paths: str, **section: str) -> Run:
    touch(home / "photos", paths)
    return run_source(home, kind="folder", path="photos", **section)


def test_class_folders_in_the_order_of_their_paths(tmp_path: Path) -> None:
    found = run(tmp_path, "dog/1.jpg", "cat/b/2.PNG", "cat/10.jpg", "cat/2.jpg", "cat/notes.txt", "cat/.hidden.jpg")
    assert found.facts() == [
        ("cat/10.jpg", ("cat",), None),
        ("cat/2.jpg", ("cat",), None),
        ("cat/b/2.PNG", ("cat",), None),
        ("dog/1.jpg", ("dog",), None),
    ]
    (line,) = found.told
    assert line.endswith("photos: files passed over: .txt 1, hidden 1")
    facts = (tmp_path / "photos/cat/10.jpg").stat()
    assert found.items[0].stamp == f"{facts.st_size}-{facts.st_mtime_ns}-{facts.st_ino}"
    assert found.items[0].read(10) == b"x"


def test_train_and_one_other_folder_with_labels(tmp_path: Path) -> None:
    found = run(tmp_path, "train/cat/1.jpg", "train/dog/1.jpg", "validation/cat/1.jpg", "validation/dog/1.jpg")
    assert {(i.side, i.test_is_given) for i in found.items if "train" in i.origin} == {(None, True)}
    assert {(i.side, i.test_is_given) for i in found.items if "validation" in i.origin} == {("test", False)}
    (line,) = found.told
    assert line.endswith(
        "no test side is given, so the images for validation are the test side; validation gets part of train"
    )
    assert run(tmp_path / "b", "train/cat/1.jpg", "train/dog/1.jpg", "test/cat/1.jpg").told == [], "a test side is one"


def test_split_folder_without_labels_is_for_prediction_only(tmp_path: Path) -> None:
    found = run(tmp_path, "train/cat/1.jpg", "train/dog/1.jpg", "val/cat/1.jpg", "val/dog/1.jpg", "test/1.jpg")
    assert [(i.labels, i.side) for i in found.items if "test" in i.origin] == [((), None)]
    assert {i.side for i in found.items if "val" in i.origin} == {"test"}
    assert "images of test/ without labels, for prediction only: 1" in found.told[0]


def test_single_unknown_folder_below_test_is_no_class(tmp_path: Path) -> None:
    found = run(tmp_path, "train/cat/1.jpg", "train/dog/1.jpg", "test/unknown/1.jpg")
    assert found.facts()[0] == ("test/unknown/1.jpg", (), None)
    assert {label for i in found.items for label in i.labels} == {"cat", "dog"}


def test_what_lies_outside_is_rejected_not_lost(tmp_path: Path) -> None:
    found = run(tmp_path, "train/cat/1.jpg", "train/dog/1.jpg", "extra/1.jpg", "loose.jpg", "train/loose.jpg")
    assert sorted(found.codes()) == [
        ("extra/1.jpg", "no_label"),
        ("loose.jpg", "no_label"),
        ("train/loose.jpg", "no_label"),
    ]
    reasons = {one.origin: one.reason for one in found.rejected}
    assert reasons["folder:extra/1.jpg"] == "it lies outside of the split folders train"
    assert reasons["folder:train/loose.jpg"] == "it lies in no class folder"


def test_flat_names_by_a_pattern(tmp_path: Path) -> None:
    found = run(tmp_path, "cat.0.jpg", "dog.1.JPG", "readme.jpg", pattern="{label}.*.jpg")
    assert found.facts() == [("cat.0.jpg", ("cat",), None), ("dog.1.JPG", ("dog",), None)]
    assert found.codes() == [("readme.jpg", "no_label")]
    assert found.rejected[0].reason == "its name does not fit the pattern {label}.*.jpg"


def test_sides_and_groups_by_a_pattern(tmp_path: Path) -> None:
    names = ("train_cat_p1_0.jpg", "test_dog_p2_0.jpg", "val_dog_p3_0.jpg")
    found = run(tmp_path, *names, pattern="{side}_{label}_{group}_*")
    assert [(i.labels, i.side, i.group) for i in found.items] == [
        (("dog",), "test", "p2"),
        (("cat",), "train", "p1"),
        (("dog",), "val", "p3"),
    ]


@pytest.mark.parametrize(
    ("names", "labels"),
    [
        (("cat.0.jpg", "cat.1.jpg", "dog.0.jpg", "dog.1.png"), {"cat", "dog"}),
        (("big_cat_0.jpg", "big_cat_1.jpg", "dog_0.jpg", "dog_7.jpg"), {"big_cat", "dog"}),
        (("cat (1).jpg", "cat (2).jpg", "dog (1).jpg", "dog (2).jpg"), {"cat", "dog"}),
    ],
)
def test_pattern_of_flat_names_is_guessed_and_told(tmp_path: Path, names: tuple[str, ...], labels: set[str]) -> None:
    found = run(tmp_path, *names)
    assert {label for item in found.items for label in item.labels} == labels
    assert "labels guessed from names by the pattern {label}" in found.told[0]


def test_kaggles_cats_and_dogs_as_it_comes(tmp_path: Path) -> None:
    names = [f"train/{name}.{i}.jpg" for name in ("cat", "dog") for i in range(3)]
    found = run(tmp_path, *names, "test1/1.jpg", "test1/2.jpg")
    assert [i.labels for i in found.items] == [(), (), *[("cat",)] * 3, *[("dog",)] * 3]
    assert {(i.side, i.test_is_given) for i in found.items} == {(None, False)}


@pytest.mark.parametrize(
    "names",
    [("IMG_1.jpg", "IMG_2.jpg", "DSC_1.jpg", "DSC_2.jpg"), ("a.jpg", "b.jpg"), ("1.jpg",), ("cat_1.jpg", "cat_2.jpg")],
)
def test_no_label_is_made_of_names_that_hold_none(tmp_path: Path, names: tuple[str, ...]) -> None:
    with pytest.raises(
        SourceError, match=r"no image in any class folder; expected CLASS/IMAGE\.jpg.*or give the source"
    ):
        run(tmp_path, *names)


def test_one_folder_around_split_folders_is_no_class(tmp_path: Path) -> None:
    found = run(tmp_path, "pets/train/cat/1.jpg", "pets/train/dog/1.jpg", "pets/test/cat/1.jpg")
    assert found.facts()[0] == ("pets/test/cat/1.jpg", ("cat",), "test")
    assert "all images are inside pets/" in found.told[0]
    one_class = run_source(
        touch(tmp_path / "b", ["photos/cat/2020/1.jpg", "photos/cat/2021/2.jpg"]), kind="folder", path="photos"
    )
    assert {i.labels for i in one_class.items} == {("cat",)}


def test_pattern_that_fits_nothing(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"no file fits the pattern \{label\}_\*\.png, as 'cat\.0\.jpg' does not"):
        run(tmp_path, "cat.0.jpg", pattern="{label}_*.png")


def test_links_that_go_round_end(tmp_path: Path) -> None:
    photos = touch(tmp_path / "photos", ["cat/1.jpg", "dog/1.jpg"])
    (photos / "cat" / "up").symlink_to(photos)
    (photos / "cat" / "self").symlink_to(photos / "cat")
    for i in range(40):  # each leads to the next one twice: 2 ** 40 paths
        (photos / "dog" / f"d{i}").mkdir()
        for way in "ab":
            (photos / "dog" / f"d{i}" / way).symlink_to(photos / "dog" / f"d{i + 1}")
    assert [i.origin for i in run(tmp_path).items] == ["folder:cat/1.jpg", "folder:dog/1.jpg"]


def test_links_to_elsewhere_are_followed_and_dead_ones_named(tmp_path: Path) -> None:
    touch(tmp_path, ["cache/ab", "more/3.jpg"])
    photos = touch(tmp_path / "photos", ["cat/1.jpg"])
    (photos / "cat" / "2.jpg").symlink_to(tmp_path / "cache" / "ab")
    (photos / "cat" / "4.jpg").symlink_to(tmp_path / "gone")
    (photos / "dog").symlink_to(tmp_path / "more")
    os.mkfifo(photos / "cat" / "5.jpg")
    found = run(tmp_path)
    assert [i.origin for i in found.items] == ["folder:cat/1.jpg", "folder:cat/2.jpg", "folder:dog/3.jpg"]
    assert [(o, r.reason) for (o, _), r in zip(found.codes(), found.rejected, strict=True)] == [
        ("cat/4.jpg", "is a link to nothing"),
        ("cat/5.jpg", "is no regular file"),
    ]


def test_names_that_are_no_text_are_escaped(tmp_path: Path) -> None:
    photos = touch(tmp_path / "photos", ["cat/1.jpg", "dog/two\nlines\x1b.jpg", "bad\nclass/1.jpg"])
    (photos / "dog" / os.fsdecode(b"\xff\xfe.jpg")).write_bytes(b"y")
    found = run(tmp_path)
    assert [i.origin for i in found.items] == [
        "folder:cat/1.jpg",
        r"folder:dog/two\nlines\x1b.jpg",
        r"folder:dog/\udcff\udcfe.jpg",
    ]
    assert found.items[2].read(10) == b"y"
    assert found.codes() == [(r"bad\nclass/1.jpg", "no_label")]


def test_folder_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    photos = touch(tmp_path / "photos", ["cat/1.jpg", "dog/1.jpg"])
    scandir = os.scandir

    def refusing(path: str) -> object:
        if path.endswith("dog"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(listing.os, "scandir", refusing)
    with pytest.raises(SourceError, match=rf"cannot be read \(Permission denied: {photos}/dog\)"):
        run(tmp_path)


def test_folder_that_is_too_deep(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="goes deeper than 64 folders"):
        run(tmp_path, "cat/" + "d/" * 70 + "1.jpg")


def test_what_is_passed_over_is_counted_by_suffix_and_by_folder(tmp_path: Path) -> None:
    names = ("cat/1.jpg", "dog/1.jpg", "cat/a.txt", "cat/b.TXT", "dog/README", "dog/.DS_Store", "Thumbs.db")
    found = run(tmp_path, *names, "cat/@eaDir/1.jpg/THUMB.jpg", "dog/@eaDir/x/y.jpg", "#recycle/1.jpg", ".NET/1.jpg")
    assert [item.labels for item in found.items] == [("cat",), ("dog",)]
    (passed,) = found.passed
    assert passed.files == {("cat/", ".txt"): 2, ("dog/", "no suffix"): 1, ("dog/", "hidden"): 1, ("", "hidden"): 1}
    assert passed.folders == {("cat/", "@eaDir"): 1, ("dog/", "@eaDir"): 1, ("", "#recycle"): 1, ("", ".NET"): 1}
    assert passed.num_files == 9
    assert len(names) + 4 == len(found.items) + passed.num_files
    hidden, line = found.told
    assert hidden.endswith("the folder .NET/ is hidden, and its 1 files are passed over: rename it")
    assert line.endswith("passed over: .txt 2, hidden 2, no suffix 1; in @eaDir 2, in #recycle 1, in .NET 1")


@pytest.mark.parametrize(
    ("names", "kinds"),
    [
        (("b/1", "b/2"), "no suffix 2"),
        (("b/1.jpg_large", "b/2.jp2"), ".jp2 1, .jpg_large 1"),
        (
            ("b/x/1.cr2", "b/2.dng", "b/y/3.cr2"),
            ".cr2 2 (RAW: export as JPEG or PNG), .dng 1 (RAW: export as JPEG or PNG)",
        ),
        (("b/1.jpg.crdownload", "b/.hidden.jpg"), ".crdownload 1"),
    ],
)
def test_a_class_folder_that_gives_no_image_is_told(tmp_path: Path, names: tuple[str, ...], kinds: str) -> None:
    found = run(tmp_path, "a/1.jpg", "c/1.jpg", *names)
    assert [item.labels for item in found.items] == [("a",), ("c",)]
    assert found.told[0].endswith(f"the folder b/ gives no image: it holds {kinds}")


def test_a_suffix_with_a_space_behind_it_is_one(tmp_path: Path) -> None:
    assert [item.labels for item in run(tmp_path, "a/1.jpg", "b/1.JPG ").items] == [("a",), ("b",)]


def test_many_kinds_of_passed_over_files_are_cut(tmp_path: Path) -> None:
    passed = PassedOver()
    for i in range(14):
        passed.add_file(f"{i}/", f".{i:02d}")
    assert passed.describe().endswith(".09 1, 4 others 4")


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("data.zip",), r"it holds \.zip 1; .* Take the zip itself: give the path of data\.zip"),
        (("a.tar.gz", "notes.txt"), r"it holds \.gz 1, \.txt 1; .* Unpack a\.tar\.gz, or make a zip of it"),
        (("labels.xlsx",), r"Save labels\.xlsx as CSV"),
        (("sub/1.NEF", "2.xyz"), r"it holds \.nef 1 \(RAW: export as JPEG or PNG\), \.xyz 1; expected"),
    ],
)
def test_a_folder_without_images_says_what_it_holds(tmp_path: Path, names: tuple[str, ...], message: str) -> None:
    with pytest.raises(SourceError, match=message):
        run(tmp_path, *names)


def link_all(photos: Path, links: dict[str, str]) -> None:
    for link, target in links.items():
        (photos / link).parent.mkdir(parents=True, exist_ok=True)
        (photos / link).symlink_to(target)


@pytest.mark.parametrize(
    ("links", "origins", "said"),
    [
        ({"dog": "../more"}, ["cat/1.jpg", "dog/3.jpg"], "dog/ followed to {home}/more"),
        ({"best": "cat"}, ["cat/1.jpg"], "best/ not followed: its files are those of cat/"),
        ({"cat/up": "../.."}, ["cat/1.jpg"], "cat/up/ not followed: it leads to a folder around it"),
        ({"cat/self": "."}, ["cat/1.jpg"], "cat/self/ not followed: its files are those of cat/"),
        ({"dog": ".store/dog"}, ["cat/1.jpg", "dog/2.jpg"], "dog/ followed to {home}/photos/.store/dog"),
        (
            {"dog": "../more", "hound": "../more"},
            ["cat/1.jpg", "dog/3.jpg"],
            "dog/ followed to {home}/more; hound/ not followed: another link leads there too",
        ),
        ({"dog": "../loop"}, ["cat/1.jpg", "dog/4.jpg"], "dog/ followed to {home}/loop; dog/round/ not followed: it"),
    ],
)
def test_a_link_to_a_folder_is_followed_if_it_is_not_read_anyway_and_named(
    tmp_path: Path, links: dict[str, str], origins: list[str], said: str
) -> None:
    touch(tmp_path, ["more/3.jpg", "loop/4.jpg", "photos/.store/dog/2.jpg"])
    (tmp_path / "loop" / "round").symlink_to(tmp_path / "loop")
    link_all(touch(tmp_path / "photos", ["cat/1.jpg"]), links)
    found = run(tmp_path)
    assert [i.origin.partition(":")[2] for i in found.items] == origins
    (line,) = [line for line in found.told if "links to folders: " in line]
    assert line.partition("links to folders: ")[2].startswith(said.format(home=tmp_path))


def test_folders_of_small_copies_are_passed_over_named_and_counted(tmp_path: Path) -> None:
    found = run(tmp_path, "cat/1.jpg", "dog/2.jpg", "Thumbs/1.jpg", "Thumbs/x/2.jpg", "cat/thumbnails/1.jpg")
    assert found.facts() == [("cat/1.jpg", ("cat",), None), ("dog/2.jpg", ("dog",), None)]
    assert found.codes() == []
    (passed,) = found.passed
    assert passed.folders == {("", "Thumbs"): 2, ("cat/", "thumbnails"): 1}
    assert "folders of small copies are passed over: Thumbs/, cat/thumbnails/" in found.told[0]
    assert found.told[1].endswith("files passed over: in Thumbs 2, in thumbnails 1")
