"""Tables that lie side by side, one for each side; and bare names whose images lie in several folders."""

import json
import re
import shlex
import shutil
import zipfile
from pathlib import Path
from typing import Any

import pytest

from source_runs import Run, run_source, touch
from visionloop.cli.ingest import make_source
from visionloop.errors import SourceError
from visionloop.ingest.sources import SourceContext
from visionloop.ingest.sources.guess import guess_source


def write(home: Path, tables: dict[str, str], *paths: str) -> Path:
    touch(home / "data", paths)
    for name, text in tables.items():
        (home / "data" / name).write_text(text)
    return home


def run(home: Path, tables: dict[str, str], *paths: str, kind: str = "table", **section: Any) -> Run:
    """Read tables and images as a folder, or as a zip; `kind` is what the command line has to take them for."""
    write(home, tables, *paths)
    assert guess_source(str(home / "data")).kind == kind
    return run_source(home, **{"kind": kind, "path": "data", **section})


def run_zip(home: Path, tables: dict[str, str], *paths: str) -> Run:
    with zipfile.ZipFile(write(home, {}) / "a.zip", "w") as file:
        for name, text in {**dict.fromkeys(paths, "x"), **tables}.items():
            file.writestr(name, text)
    return run_source(home, kind="archive", path="a.zip")


def sides_of(found: Run) -> dict[str, tuple[str, str]]:
    """Return label and side of each image; `learn` is divided between train and val."""
    return {
        item.origin.partition(":")[2]: (
            item.labels[0] if item.labels else "",
            item.side or ("learn" if item.test_is_given else "any"),
        )
        for item in found.items
    }


COCO = [
    json.dumps(
        {
            "images": [{"id": i, "file_name": f"{i}.jpg"} for i in (a, b)],
            "annotations": [{"id": i, "image_id": i, "category_id": i % 2} for i in (a, b)],
            "categories": [{"id": 0, "name": "cat"}, {"id": 1, "name": "dog"}],
        }
    )
    for a, b in ((1, 2), (3, 4), (5, 6))
]
ROWS = [
    "file,label\n1.jpg,dog\n2.jpg,cat\n",
    "file,label\n3.jpg,dog\n4.jpg,cat\n",
    "file,label\n5.jpg,dog\n6.jpg,cat\n",
]


@pytest.mark.parametrize("read", [run, run_zip])
@pytest.mark.parametrize(
    ("names", "rows"),
    [
        (("train.csv", "valid.csv", "test.csv"), ROWS),
        (("train_labels.csv", "val_labels.csv", "test_labels.csv"), ROWS),
        (("labels-train.csv", "labels-dev.csv", "labels-eval.csv"), ROWS),
        (("y_train.csv", "y_val.csv", "y_test.csv"), ROWS),
        (("pets_train.csv", "pets_val.csv", "pets_test.csv"), ROWS),
        (("Training_set.csv", "Validation_set.csv", "Testing_set.csv"), ROWS),
        (("train.json", "val.json", "test.json"), COCO),
        (("instances_train2017.json", "instances_val2017.json", "instances_test2017.json"), COCO),
    ],
)
@pytest.mark.parametrize("folders", [("images",) * 3, ("train", "valid", "test"), ("",) * 3, ("images/a",) * 3])
def test_one_table_for_each_side(
    tmp_path: Path, read: Any, names: tuple[str, ...], rows: list[str], folders: tuple[str, ...]
) -> None:
    paths = [f"{folders[i // 2]}/{i + 1}.jpg".strip("/") for i in range(6)]
    found = read(tmp_path, dict(zip(names, rows, strict=True)), *paths)
    expected = {path: ("cat" if i % 2 else "dog", ("train", "val", "test")[i // 2]) for i, path in enumerate(paths)}
    assert sides_of(found) == expected
    assert found.codes() == []
    assert f"3 tables, their names say the split: {', '.join(names)}" in found.told[0]


@pytest.mark.parametrize("read", [run, run_zip])
def test_the_same_names_in_the_folder_of_each_side(tmp_path: Path, read: Any) -> None:
    tables = {f"{side}.csv": f"file,label\n1.jpg,{side}-a\n2.jpg,{side}-b\n9.jpg,x\n" for side in ("train", "test")}
    found = read(tmp_path, tables, "train/1.jpg", "train/2.jpg", "test/1.jpg", "test/2.jpg", "train/9.jpg")
    assert sides_of(found) == {
        "train/1.jpg": ("train-a", "learn"),
        "train/2.jpg": ("train-b", "learn"),
        "train/9.jpg": ("x", "learn"),
        "test/1.jpg": ("test-a", "test"),
        "test/2.jpg": ("test-b", "test"),
    }
    assert found.codes() == [("test.csv row 3", "row_without_image")], "train/9.jpg is another image"


def test_images_of_all_sides_in_the_folder_of_one(tmp_path: Path) -> None:
    tables = {"train.csv": ROWS[0], "val.csv": ROWS[1]}
    found = run(tmp_path, tables, *(f"train/{i}.jpg" for i in range(1, 5)), "test/7.jpg")
    assert [side for _, side in sides_of(found).values()] == ["learn", "learn", "test", "test", "any"]
    assert sides_of(found)["test/7.jpg"] == ("", "any"), "without a table: for prediction only"


@pytest.mark.parametrize(
    "test",
    ["file\n5.jpg\n6.jpg\n", "file,width\n5.jpg,10\n6.jpg,20\n", "file,label\n5.jpg,\n6.jpg,\n"],
)
def test_a_table_without_labels_is_named_and_passed_over(tmp_path: Path, test: str) -> None:
    tables = {"train.csv": ROWS[0], "test.csv": test, "sample_submission.csv": "file,label\n5.jpg,dog\n"}
    found = run(tmp_path, tables, "train/1.jpg", "train/2.jpg", "test/5.jpg", "test/6.jpg")
    assert sides_of(found) == {
        "train/1.jpg": ("dog", "any"),
        "train/2.jpg": ("cat", "any"),
        "test/5.jpg": ("", "any"),
        "test/6.jpg": ("", "any"),
    }
    told = [line.partition("data: ")[2] for line in found.told]
    assert "not read, because it is a form for answers: sample_submission.csv" in told
    assert "test.csv has no labels, and is not read" in told


def test_tables_of_one_side_in_parts_and_beside_others(tmp_path: Path) -> None:
    tables = {"train_1.csv": ROWS[0], "train_2.csv": ROWS[1], "test.csv": ROWS[2], "classes.csv": "id,name\n0,cat\n"}
    found = run(tmp_path, tables, *(f"images/{i}.jpg" for i in range(1, 7)))
    assert [side for _, side in sides_of(found).values()] == ["learn"] * 4 + ["test"] * 2
    assert any("not read: classes.csv" in line for line in found.told)


def test_the_table_of_labels_among_those_of_a_side(tmp_path: Path) -> None:
    tables = {"train.csv": "file,width\n1.jpg,7\n2.jpg,9\n", "train_labels.csv": ROWS[0], "test_labels.csv": ROWS[1]}
    found = run(tmp_path, tables, *(f"images/{i}.jpg" for i in range(1, 5)))
    assert [label for label, _ in sides_of(found).values()] == ["dog", "cat", "dog", "cat"]


def test_a_table_of_all_labels_is_taken_before_those_of_the_sides(tmp_path: Path) -> None:
    tables = {"labels.csv": ROWS[0], "train.csv": "file\n1.jpg\n", "test.csv": "file\n2.jpg\n"}
    found = run(tmp_path, tables, "images/1.jpg", "images/2.jpg")
    assert sides_of(found) == {"images/1.jpg": ("dog", "any"), "images/2.jpg": ("cat", "any")}
    names = {"labels.csv": "ClassId,Name\n0,cat\n1,dog\n", "train.csv": ROWS[0], "test.csv": ROWS[1]}
    found = run(tmp_path / "b", names, *(f"images/{i}.jpg" for i in range(1, 5)))
    assert [side for _, side in sides_of(found).values()] == ["learn", "learn", "test", "test"]


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        (
            {"train.csv": ROWS[0], "valid.csv": "file,class\n3.jpg,dog\n4.jpg,cat\n"},
            r"valid\.csv: has no column label, which train\.csv has; expected the same columns",
        ),
        (
            {"train.csv": ROWS[0], "train_full.csv": ROWS[0], "test.csv": ROWS[1]},
            r"holds 2 tables of one side: train\.csv, train_full\.csv; expected one for each side",
        ),
        ({"train.csv": ROWS[0], "test.csv": ""}, r"test\.csv|has no row|is empty"),
    ],
)
def test_tables_that_do_not_fit_together(tmp_path: Path, tables: dict[str, str], message: str) -> None:
    with pytest.raises(SourceError, match=message):
        run(tmp_path, tables, *(f"images/{i}.jpg" for i in range(1, 5)))


ALL = "file,label\n" + "".join(f"{i},{'cat' if i % 2 else 'dog'}\n" for i in range(1, 7))


@pytest.mark.parametrize(
    "folders", [("train", "test"), ("images", "photos"), ("images_1", "images_2"), ("images/train", "images/val")]
)
@pytest.mark.parametrize("read", [run, run_zip])
def test_bare_names_are_looked_for_in_all_folders(tmp_path: Path, read: Any, folders: tuple[str, str]) -> None:
    paths = [f"{folders[i > 3]}/{i}.jpg" for i in range(1, 7)]
    found = read(tmp_path, {"labels.csv": ALL}, *paths)
    assert [item.origin.partition(":")[2] for item in found.items] == paths
    assert all(item.labels for item in found.items)
    assert found.codes() == []
    if read is run:
        assert run_source(tmp_path, kind="table", path="data/labels.csv").facts() == found.facts()


def test_rows_beyond_the_first_ones_lead_elsewhere(tmp_path: Path) -> None:
    paths = [f"{'train' if i < 300 else 'test'}/{i}.jpg" for i in range(310)]
    rows = "".join(f"{i}.jpg,{'ab'[i % 2]}\n" for i in range(310))
    found = run(tmp_path, {"labels.csv": f"file,label\n{rows}"}, *paths)
    assert len([item for item in found.items if item.labels]) == 310
    assert found.codes() == []


def test_a_bare_name_of_two_images_is_ambiguous_row_by_row(tmp_path: Path) -> None:
    paths = [*(f"train/{i}.jpg" for i in (1, 2, 3)), *(f"test/{i}.jpg" for i in (3, 4, 5, 6))]
    found = run(tmp_path, {"labels.csv": ALL}, *paths)
    assert [item.origin for item in found.items] == [
        f"table:{path}" for path in ("train/1.jpg", "train/2.jpg", "test/4.jpg", "test/5.jpg", "test/6.jpg")
    ]
    assert ("labels.csv row 3", "ambiguous") in found.codes()
    assert [one.reason for one in found.rejected if one.code == "ambiguous"] == [
        "reference 3: fits 2 files: test/3.jpg, train/3.jpg; expected one file."
    ]


def test_a_split_column_says_which_image_of_two_is_meant(tmp_path: Path) -> None:
    rows = "file,label,split\n1.jpg,cat,train\n1.jpg,dog,test\n2.jpg,cat,test\n"
    found = run(tmp_path, {"labels.csv": rows}, "train/1.jpg", "test/1.jpg", "test/2.jpg")
    assert sides_of(found) == {
        "train/1.jpg": ("cat", "learn"),
        "test/1.jpg": ("dog", "test"),
        "test/2.jpg": ("cat", "test"),
    }


def test_kaggles_test_folder_with_the_same_names_stays_unlabelled(tmp_path: Path) -> None:
    table = "file,label\n1.jpg,cat\n2.jpg,dog\n7.jpg,dog\n"
    found = run(tmp_path, {"labels.csv": table}, "train/1.jpg", "train/2.jpg", "test/1.jpg", "test/2.jpg")
    assert sides_of(found) == {
        "train/1.jpg": ("cat", "any"),
        "train/2.jpg": ("dog", "any"),
        "test/1.jpg": ("", "any"),
        "test/2.jpg": ("", "any"),
    }
    assert found.codes() == [("labels.csv row 3", "row_without_image")]
    assert any("names that are in train/ and elsewhere too: 2; those in train/ are meant" in one for one in found.told)


@pytest.mark.parametrize("read", [run, run_zip])
def test_tables_that_label_more_than_class_folders_do_are_read(tmp_path: Path, read: Any) -> None:
    """As in the traffic signs: class folders in Train/, a flat Test/, and a table of each."""
    tables = {
        "Train.csv": "Width,class_id,Path\n10,0,Train/0/a.png\n11,1,Train/1/b.png\n",
        "Test.csv": "Width,class_id,Path\n10,1,Test/a.png\n11,0,Test/b.png\n",
        "Meta.csv": "Path,class_id\nMeta/0.png,0\nMeta/1.png,1\n",
    }
    paths = ("Train/0/a.png", "Train/1/b.png", "Test/a.png", "Test/b.png")
    found = read(tmp_path, tables, *paths)
    assert sides_of(found) == {
        "Train/0/a.png": ("0", "learn"),
        "Train/1/b.png": ("1", "learn"),
        "Test/a.png": ("1", "test"),
        "Test/b.png": ("0", "test"),
    }


def test_class_folders_win_over_tables_that_say_the_same(tmp_path: Path) -> None:
    tables = {f"{side}.csv": f"file,label\n{side}/cat/1.jpg,cat\n{side}/dog/1.jpg,dog\n" for side in ("train", "test")}
    found = run(tmp_path, tables, *(f"{s}/{c}/1.jpg" for s in ("train", "test") for c in ("cat", "dog")), kind="folder")
    assert {label for label, _ in sides_of(found).values()} == {"cat", "dog"}
    unlabelled = {"train.csv": "file,label\ncat/1.jpg,cat\n", "test.csv": "file\n7.jpg\n"}
    found = run(tmp_path / "b", unlabelled, "train/cat/1.jpg", "train/dog/1.jpg", "test/7.jpg", kind="folder")
    assert sides_of(found)["test/7.jpg"] == ("", "any")


def test_class_folders_against_tables_of_all_sides_are_asked_about_and_both_answers_work(tmp_path: Path) -> None:
    tables = {
        f"{side}.csv": "file,label\n"
        + "".join(f"{side}/{who}/{i}.jpg,{'ab'[i]}\n" for who in ("x", "y") for i in (0, 1))
        for side in ("train", "test")
    }
    paths = [f"{side}/{who}/{i}.jpg" for side in ("train", "test") for who in ("x", "y") for i in (0, 1)]
    folder = str(write(tmp_path, tables, *paths) / "data")
    with pytest.raises(SourceError, match=r"two ways: .*train\.csv names 8 of 8 images in 8 rows") as caught:
        guess_source(folder)
    first, second = (shlex.split(text)[2:] for text in re.findall(r"`(visionloop ingest [^`]*)`", str(caught.value)))
    assert first == [folder, "--table", "*"]
    for options, label in (({"table": first[2]}, "a"), ({"pattern": second[2]}, "x")):
        source = make_source(folder, options, tmp_path)
        section = {**source.model_dump(exclude_defaults=True), "kind": source.kind}
        assert sides_of(run_source(tmp_path, **section))["test/x/0.jpg"] == (label, "test")


@pytest.mark.parametrize("form", ["folder", "zip"])
def test_a_question_about_the_encoding_of_tables_for_all_sides_is_answered_as_it_says(
    tmp_path: Path, form: str
) -> None:
    tables = {"train.csv": "file,label\n1.jpg,for\u00eat\n2.jpg,dog\n", "test.csv": "file,label\n3.jpg,for\u00eat\n"}
    place = tmp_path / "data"
    touch(place, ["1.jpg", "2.jpg", "3.jpg"])
    for name, text in tables.items():
        (place / name).write_bytes(text.encode("cp1252"))
    if form == "zip":
        place = Path(shutil.make_archive(str(tmp_path / "a"), "zip", place))
    with pytest.raises(SourceError, match="does not say its encoding") as asked:
        take(place, {}, tmp_path)
    command = re.findall(r"`(visionloop ingest [^`]+ cp1252)`", str(asked.value))[0]
    _, _, path, *options = shlex.split(command)
    given = dict(zip((one.removeprefix("--") for one in options[::2]), options[1::2], strict=True))
    found = take(Path(path), given, tmp_path)
    assert sides_of(found) == {
        "1.jpg": ("for\u00eat", "learn"),
        "2.jpg": ("dog", "learn"),
        "3.jpg": ("for\u00eat", "test"),
    }


def take(place: Path, given: dict[str, str], home: Path) -> Run:
    found = Run()
    found.take(make_source(str(place), given, home), SourceContext(home, home, {}, tell=found.told.append))
    if found.error:
        raise found.error
    return found
