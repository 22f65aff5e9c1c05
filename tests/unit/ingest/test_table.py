"""Tables and their images: Kaggle's labels.csv as it is, what has no counterpart, sides, repeated rows, blobs."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from source_runs import Run, run_source, touch
from visionloop.errors import ImageError, SourceError
from visionloop.ingest.paths.listing import is_spelled_so
from visionloop.ingest.tables.label_table import FolderShelf


def run(home: Path, table: str, *paths: str, name: str = "labels.csv", **section: object) -> Run:
    touch(home / "data", [*paths, name])
    (home / "data" / name).write_text(table)
    return run_source(home, **{"kind": "table", "path": "data", **section})


def test_kaggles_labels_csv_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "sampleSubmission.csv").write_text("id,pug,beagle\nt1,0.5,0.5\n")
    paths = ("train/b2.jpg", "train/a1.jpg", "train/zz.jpg", "test/t1.jpg", "test/t2.jpg", "cover.png")
    found = run(tmp_path, "id,breed\nb2,pug\ngone,pug\na1,beagle\n", *paths)
    assert found.facts() == [
        ("train/b2.jpg", ("pug",), None),
        ("train/a1.jpg", ("beagle",), None),
        ("test/t1.jpg", (), None),
        ("test/t2.jpg", (), None),
    ]
    assert found.codes() == [
        ("labels.csv row 2", "row_without_image"),
        ("cover.png", "image_without_row"),
        ("train/zz.jpg", "image_without_row"),
    ]
    assert [passed.describe() for passed in found.passed] == [".csv 2"]
    assert found.told[0].endswith("data: not read, because it is a form for answers: sampleSubmission.csv")
    assert [line.partition("labels.csv: ")[2] for line in found.told[1:]] == [
        "columns guessed: image = id, label = breed (name them under `columns` to be sure)",
        "images found in train/",
        "images of test/ without labels, for prediction only: 2",
    ]
    assert found.items[0].read(9) == b"x"
    assert found.items[0].stamp is not None
    assert run_source(tmp_path, kind="table", path="data/labels.csv").facts() == found.facts()


def test_images_beside_the_table_or_where_params_say(tmp_path: Path) -> None:
    beside = run(tmp_path / "a", "file,label\nx/1.jpg,cat\n2.jpg,dog\n", "x/1.jpg", "2.jpg")
    assert [i.origin for i in beside.items] == ["table:x/1.jpg", "table:2.jpg"]
    touch(tmp_path / "b", ["elsewhere/deep/1.jpg"])
    named = run(tmp_path / "b", "file,label\n1.jpg,cat\n", "train/1.jpg", images="elsewhere/deep")
    assert [i.origin for i in named.items] == ["table:1.jpg"]
    in_data = run(tmp_path / "c", "file,label\n1.jpg,cat\n", "p/1.jpg", "q/1.jpg", images="q", unlabelled=["p"])
    assert in_data.facts() == [("q/1.jpg", ("cat",), None), ("p/1.jpg", (), None)]


def test_a_test_folder_that_rows_lead_to_is_not_unlabelled(tmp_path: Path) -> None:
    table = "path,label,split\ntrain/1.jpg,cat,train\ntest/2.jpg,dog,test\n"
    found = run(tmp_path, table, "train/1.jpg", "test/2.jpg", "test/3.jpg")
    assert [(i.labels, i.side, i.test_is_given) for i in found.items] == [
        (("cat",), None, True),
        (("dog",), "test", False),
    ]
    assert found.codes() == [("test/3.jpg", "image_without_row")]


def test_sides_of_a_table_are_those_of_folders(tmp_path: Path) -> None:
    table = "file,label,split\n1.jpg,cat,Train\n2.jpg,cat,dev\n3.jpg,cat,test\n4.jpg,cat,\n5.jpg,,test\n"
    found = run(tmp_path, table, *(f"{i}.jpg" for i in range(1, 6)))
    assert [(i.side, i.test_is_given) for i in found.items] == [
        *(("train", True), ("val", True), ("test", True), (None, True), (None, False))
    ]
    assert "rows without a label, for prediction only: 1" in found.told[-1]
    assert not [line for line in found.told if "no test side is given" in line]
    held_out = run(tmp_path / "b", "file,label,split\n1.jpg,cat,train\n2.jpg,dog,dev\n", "1.jpg", "2.jpg")
    assert [(i.side, i.test_is_given) for i in held_out.items] == [(None, True), ("test", False)]
    assert held_out.told[-1].endswith("the test side; validation gets part of train")


def test_repeated_rows_are_told_and_conflicting_ones_handed_on(tmp_path: Path) -> None:
    found = run(tmp_path, "file,label\n1.jpg,cat\n1.jpg,cat\n1.jpg,dog\n2.jpg,dog\n", "1.jpg", "2.jpg")
    assert found.facts() == [("1.jpg", ("cat",), None), ("1.jpg", ("dog",), None), ("2.jpg", ("dog",), None)]
    assert "rows that repeat another one: 1" in found.told[-1]


def test_bad_rows_stop_nothing(tmp_path: Path) -> None:
    table = "file,label\n1.jpg,cat\n../x.jpg,cat\n1.jpg,cat,more\n,cat\nd,cat\n2.jpg," + "x" * 300 + "\n"
    found = run(tmp_path, table, "1.jpg", "2.jpg", "p/d.jpg", "q/d.jpg")
    assert found.facts() == [("1.jpg", ("cat",), None)]
    assert [one for one in found.codes() if "row" in one[0]] == [
        ("labels.csv row 2", "unsafe_path"),
        ("labels.csv row 3", "bad_row"),
        ("labels.csv row 4", "row_without_image"),
        ("labels.csv row 5", "ambiguous"),
    ]
    assert ("2.jpg", "bad_label") in found.codes()
    assert [one.is_row for one in found.rejected] == [True] * 4 + [False] * 3
    assert found.rejected[4].reason.startswith("labels.csv row 6: label: cannot be 'xxx")


def test_images_inside_a_parquet_file(tmp_path: Path) -> None:
    rows = {"image": [{"bytes": b"one", "path": "a.png"}, {"bytes": b"three", "path": None}], "label": [0, 1]}
    (tmp_path / "data").mkdir()
    pq.write_table(pa.table(rows), tmp_path / "data" / "train.parquet")
    found = run_source(tmp_path, kind="table", path="data/train.parquet")
    assert found.facts() == [("train.parquet row 1", ("0",), None), ("train.parquet row 2", ("1",), None)]
    assert [i.read(5) for i in found.items] == [b"one", b"three"]
    with pytest.raises(ImageError, match="holds 5 bytes; expected at most 4"):
        found.items[1].read(4)


def test_urls_need_hosts(tmp_path: Path) -> None:
    table = "url,label\nhttps://u:p@one.org/a?sig=1,cat\nhttps://two.org/b,cat\n"
    with pytest.raises(SourceError, match=r"names images by URL, at one\.org, two\.org; expected `hosts`"):
        run(tmp_path, table)
    found = run(tmp_path, table.replace("u:p@", ""), hosts=["one.org"])
    assert [i.origin for i in found.items] == ["table:one.org/a"]
    assert found.codes() == [("labels.csv row 2", "refused_url")]


@pytest.mark.parametrize(
    ("table", "section", "message"),
    [
        (
            "id,breed\na,b\n",
            {},
            r"none of its first 1 images is there, such as 'a'; expected files beside it or in train/",
        ),
        ("id,breed\na,b\n", {"images": "pictures"}, "pictures: does not exist; expected a folder"),
        ("id,breed\n1,b\n", {"unlabelled": ["gone"]}, "gone: does not exist; expected a folder"),
        ("id,breed\n1,b\n", {"path": "data/none.csv"}, r"none\.csv: does not exist; expected a table"),
        ("id,breed\n1,b\n", {"path": "data/1.jpg"}, "has the suffix of no table"),
        ("id,breed\n1,b\n", {"path": "data/sub"}, "holds no table"),
        ("id,breed\n1,b\n", {"path": "data/sub/x.txt"}, r"x\.txt: is not CSV|has no row"),
        (
            "id,breed\n1,b\n",
            {"columns": {"side": "fold"}},
            r"columns\.side: no column 'fold'; expected one of breed, id",
        ),
    ],
)
def test_unusable_tables(tmp_path: Path, table: str, section: dict[str, object], message: str) -> None:
    touch(tmp_path / "data", ["sub/x.txt"])
    with pytest.raises(SourceError, match=message):
        run(tmp_path, table, "1.jpg", **section)


def test_which_of_several_tables(tmp_path: Path) -> None:
    touch(tmp_path / "data", ["a.csv", "b.json", "1.jpg"])
    with pytest.raises(SourceError, match=r"holds 2 tables: a\.csv, b\.json; expected one, or one named labels\.csv"):
        run_source(tmp_path, kind="table", path="data")
    found = run(tmp_path, "file,label\n1.jpg,cat\n")
    assert "of 3 tables labels.csv is taken" in found.told[0]


TEXT = "file,label,split\n" + "".join(
    f"{i}.jpg,{'cat' if i % 2 else 'dog'},{'val' if i > 6 else 'train'}\n" for i in range(8)
)


def test_a_table_is_opened_for_a_sample_its_encoding_one_look_at_all_rows_and_the_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []
    before = FolderShelf.open_table
    monkeypatch.setattr(FolderShelf, "open_table", lambda shelf, name: (opened.append(name), before(shelf, name))[1])
    found = run(tmp_path, TEXT, *(f"{i}.jpg" for i in range(8)), path="data/labels.csv")
    assert opened == ["labels.csv"] * 4
    assert [item.side or item.test_is_given for item in found.items] == [True] * 7 + ["test"]


@pytest.mark.parametrize("no_label", ["", "NA", "n/a ", " nan"])
def test_a_side_without_a_label_is_none_whichever_way_it_is_found(tmp_path: Path, no_label: str) -> None:
    rows = [{"file": f"{i}.jpg", "label": "cat" if i % 2 else "dog", "split": "train"} for i in range(8)]
    rows += [{"file": "8.jpg", "label": no_label, "split": "test"}]
    paths = [f"{i}.jpg" for i in range(9)]
    text = "file,label,split\n" + "".join(f"{','.join(row.values())}\n" for row in rows)
    by_look = run(tmp_path / "a", text, *paths)
    by_pass = run(
        tmp_path / "b",
        "".join(f"{json.dumps({**row, 'label': [row['label']]})}\n" for row in rows),
        *paths,
        name="t.jsonl",
    )
    for found in by_look, by_pass:
        assert {(item.side, item.test_is_given) for item in found.items} == {(None, False)}
        assert found.items[8].labels == ()


def test_an_absolute_path_in_the_folder_of_the_table_is_taken(tmp_path: Path) -> None:
    at = tmp_path / "data"
    table = f"path,prediction\n{at}/1.png,cat\n{at}/deep/2.png,dog\n{at}/../3.png,cat\n"
    found = run(tmp_path, table, "1.png", "Deep/2.png", "../3.png", columns={"image": "path", "label": "prediction"})
    assert [item[:2] for item in found.facts()] == [("1.png", ("cat",)), ("Deep/2.png", ("dog",))]
    assert found.codes() == [("labels.csv row 3", "unsafe_path")]


@pytest.mark.parametrize("above", ["../odd/", "/odd/"])
def test_a_table_that_leads_out_of_its_folder_is_told_so(tmp_path: Path, above: str) -> None:
    table = f"path,prediction\n{above}-rf.png,cat\n{above}2.png,dog\n"
    told = f"names images outside of its folder, such as '{above}-rf.png'; expected paths below it: those that lead out"
    with pytest.raises(SourceError, match=told):
        run(tmp_path, table, "1.png", columns={"image": "path", "label": "prediction"})


@pytest.mark.parametrize("folder", ["", "newp/"])
def test_a_name_that_is_no_utf8_is_found_by_its_escapes_in_every_folder(tmp_path: Path, folder: str) -> None:
    assert is_spelled_so(f"{folder}\udcff\udcfe.png", f"{folder}\\udcff\\udcfe.png")
    found = run(tmp_path, f"file,label\n{folder}\\udcff\\udcfe.png,cat\n", f"{folder}\udcff\udcfe.png")
    assert found.codes() == []
    assert [item[:2] for item in found.facts()] == [(f"{folder}\\udcff\\udcfe.png", ("cat",))]
