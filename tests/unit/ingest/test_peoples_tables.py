"""Tables as people and tools write them: split columns, JSON of tools, text lists, encodings, names spelled otherwise.

The numbers are those of the cases that went wrong once; a case stands for its kind, so variants stand beside it.
"""

import json
import unicodedata
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from source_runs import COCO, TASKS, Run, run_source, touch
from visionloop.errors import ParamsError, SourceError
from visionloop.ingest.tables.choose import list_tables


def run(home: Path, table: str | bytes, *paths: str, name: str = "labels.csv", **section: Any) -> Run:
    """Write a table beside empty images, and read both: as the folder, or as the file if its kind is not looked for."""
    touch(home / "data", paths or [f"{i}.jpg" for i in range(1, 7)])
    (home / "data" / name).write_bytes(table.encode() if isinstance(table, str) else table)
    path = f"data/{name}" if name.endswith(".txt") else "data"
    return run_source(home, **{"kind": "table", "path": path, **section})


def labels(found: Run) -> dict[str, tuple[str, ...]]:
    return {item.origin.partition(":")[2]: item.labels for item in found.items}


def sides(found: Run) -> list[tuple[str, str | None]]:
    learn = {item.origin: item.test_is_given and item.side is None for item in found.items}
    return [(item.origin.partition(":")[2], "learn" if learn[item.origin] else item.side) for item in found.items]


# 23e, 23: split columns


@pytest.mark.parametrize(
    ("header", "words"),
    [
        ("split", ("train", "train", "test_2", "test", "UNASSIGNED")),
        ("split", ("Training", "train", "PublicTest", "PrivateTest", "unlabeled")),
        ("Usage", ("Training", "Training", "Test", "test set", "7")),
        ("data set", ("train", "train", "test", "test", "Extra")),
        ("official_split", ("train", "train", "id_test", "test", "excluded")),
        ("subset", ("trn", "tr", "tst", "test1", "?")),
    ],
)
def test_a_split_column_is_taken_and_rows_of_unknown_words_are_listed(
    tmp_path: Path, header: str, words: tuple[str, ...]
) -> None:
    rows = "".join(f"{i}.jpg,{'cat' if i % 2 else 'dog'},{word}\n" for i, word in enumerate(words, start=1))
    found = run(tmp_path, f"file,label,{header}\n{rows}", *(f"{i}.jpg" for i in range(1, 6)))
    assert sides(found) == [("1.jpg", "learn"), ("2.jpg", "learn"), ("3.jpg", "test"), ("4.jpg", "test")]
    assert found.codes() == [("5.jpg", "unknown_side")]
    assert f"column {header} says '{words[4]}'; expected train, val or test" in found.rejected[0].reason
    assert f"side = {header}" in found.told[0]


@pytest.mark.parametrize(
    ("header", "rows", "expected"),
    [
        ("is_valid", ("False", "False", "True", "True"), ["learn", "learn", "test", "test"]),
        ("is_test", ("0", "0", "1", "1"), ["learn", "learn", "test", "test"]),
        ("isTrain", ("yes", "yes", "no", "no"), ["learn", "learn", "test", "test"]),
        ("is_valid,is_test", ("0,0", "0,0", "1,0", "0,1"), ["train", "train", "val", "test"]),
        ("is_train,is_val,is_test", ("1,0,0", "1,0,0", "0,1,0", "0,0,1"), ["train", "train", "val", "test"]),
        ("is_training_image", ("1", "1.0", "0", ""), ["learn", "learn", "test", "test"]),
    ],
)
def test_columns_of_yes_and_no_are_sides(
    tmp_path: Path, header: str, rows: tuple[str, ...], expected: list[str]
) -> None:
    table = f"fname,labels,{header}\n" + "".join(f"{i}.jpg,{'ab'[i % 2]},{row}\n" for i, row in enumerate(rows, 1))
    found = run(tmp_path, table, *(f"{i}.jpg" for i in range(1, 5)))
    assert [side for _, side in sides(found)] == expected
    assert f"side = {', '.join(sorted(header.split(',')))}" in found.told[0]
    assert {item.labels for item in found.items} == {("a",), ("b",)}


def test_columns_of_yes_and_no_that_contradict_are_listed(tmp_path: Path) -> None:
    table = "file,label,is_valid,is_test\n1.jpg,a,1,1\n2.jpg,b,0,maybe\n3.jpg,a,0,0\n4.jpg,b,0,1\n"
    found = run(tmp_path, table, "1.jpg", "2.jpg", "3.jpg", "4.jpg", columns={"side": "is_test"})
    assert found.codes() == [("2.jpg", "unknown_side")]
    found = run(tmp_path / "b", table.replace("maybe", "0"), "1.jpg", "2.jpg", "3.jpg", "4.jpg")
    assert found.codes() == [("1.jpg", "unknown_side")]
    assert "say yes to two sides" in found.rejected[0].reason


def test_a_column_of_sides_by_its_values_alone(tmp_path: Path) -> None:
    found = run(
        tmp_path, "file,label,xyz\n1.jpg,cat,train\n2.jpg,dog,train\n3.jpg,cat,test\n", "1.jpg", "2.jpg", "3.jpg"
    )
    assert [side for _, side in sides(found)] == ["learn", "learn", "test"]


@pytest.mark.parametrize(
    ("header", "cells", "line"),
    [
        ("split", "123", "column split is not used as the split: '1', '2', '3' are not train, val or test"),
        ("partition", "abc", "column partition is not used as the split: 'a', 'b', 'c' are not train, val or test"),
        ("fold", "12\u0663", "column fold is not used as the split: '1', '2', '\\u0663' are not train, val or test"),
    ],
)
def test_a_split_column_that_is_not_taken_is_told(tmp_path: Path, header: str, cells: str, line: str) -> None:
    rows = "".join(f"{i}.jpg,cat,{cell},x{i}\n" for i, cell in enumerate(cells, start=1))
    found = run(tmp_path, f"file,label,{header},notes\n{rows}", "1.jpg", "2.jpg", "3.jpg")
    assert {side for _, side in sides(found)} == {None}
    told = [text.partition("labels.csv: ")[2] for text in found.told]
    assert line in told
    assert f"columns not used: {header}, notes" in told


def test_a_side_column_that_params_name_must_hold_sides(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"columns\.side: column 'fold' holds '1', '2'; expected train, val or test"):
        run(tmp_path, "file,label,fold\n1.jpg,cat,1\n2.jpg,cat,2\n", columns={"side": "fold"})


def test_every_column_is_named_also_when_params_name_some(tmp_path: Path) -> None:
    table = "file,label,width,height,by\n1.jpg,cat,3,4,me\n"
    found = run(tmp_path, table, "1.jpg", columns={"image": "file", "label": "label"})
    assert [line.partition("labels.csv: ")[2] for line in found.told] == ["columns not used: width, height, by"]
    many = ",".join(f"c{i}" for i in range(30))
    found = run(tmp_path / "b", f"file,label,{many}\n1.jpg,cat{',7' * 30}\n", "1.jpg")
    assert found.told[-1].endswith("c18, c19 and 10 more")


def test_labels_with_spaces_are_several_where_the_words_are_labels_too(tmp_path: Path) -> None:
    table = "fname,labels,is_valid\n1.jpg,horse person,False\n2.jpg,horse,False\n3.jpg,person,True\n"
    assert [*labels(run(tmp_path, table, several=True)).values()] == [("horse", "person"), ("horse",), ("person",)]
    breeds = "fname,labels\n1.jpg,golden retriever\n2.jpg,pug\n3.jpg,labrador retriever\n"
    assert labels(run(tmp_path / "b", breeds))["1.jpg"] == ("golden retriever",)


# 22: Parquet of Hugging Face


def write_parquet(path: Path, label: list[Any], feature: Any) -> None:
    table = pa.table({"image": [f"{i}.jpg" for i in range(1, len(label) + 1)], "label": label})
    meta = {"huggingface": json.dumps({"info": {"features": {"image": {"_type": "Image"}, "label": feature}}})}
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table.replace_schema_metadata(meta), path)


CLASSES = {"names": ["cat", "dog"], "_type": "ClassLabel"}


@pytest.mark.parametrize(
    ("cells", "feature", "expected"),
    [
        ([0, 1, -1], CLASSES, [("cat",), ("dog",), ()]),
        ([[0, 1], [], [1]], {"feature": CLASSES, "_type": "Sequence"}, [("cat", "dog"), (), ("dog",)]),
        ([[0], [1], [0]], {"feature": CLASSES, "length": -1, "_type": "List"}, [("cat",), ("dog",), ("cat",)]),
        ([[0], [1], [0]], [CLASSES], [("cat",), ("dog",), ("cat",)]),
        ([0, 1, 0], {"dtype": "int64", "_type": "Value"}, [("0",), ("1",), ("0",)]),
        ([0, 1, 2], CLASSES, [("cat",), ("dog",), ("2",)]),
    ],
)
def test_classes_of_hugging_faces_parquet_have_their_names(
    tmp_path: Path, cells: list[Any], feature: Any, expected: list[Any]
) -> None:
    touch(tmp_path / "data", ["1.jpg", "2.jpg", "3.jpg"])
    write_parquet(tmp_path / "data" / "train.parquet", cells, feature)
    assert [*labels(run_source(tmp_path, kind="table", path="data")).values()] == expected


def test_parts_of_hugging_faces_parquet_are_one_table(tmp_path: Path) -> None:
    touch(tmp_path / "data", ["1.jpg", "2.jpg", "3.jpg"])
    names = ("train-00000-of-00002.parquet", "train-00001-of-00002.parquet", "validation-00000-of-00001-0a1b.parquet")
    for number, name in enumerate(names, start=1):
        table = pa.table({"image": [{"bytes": bytes([number]), "path": None}], "label": [number % 2]})
        meta = {"huggingface": json.dumps({"info": {"features": {"label": CLASSES}}})}
        pq.write_table(table.replace_schema_metadata(meta), tmp_path / "data" / name)
    found = run_source(tmp_path, kind="table", path="data")
    assert sides(found) == [
        (f"{names[0]} row 1", "learn"),
        (f"{names[1]} row 1", "learn"),
        (f"{names[2]} row 1", "test"),
    ]
    assert [(item.labels, item.read(9)) for item in found.items] == [
        (("dog",), b"\x01"),
        (("cat",), b"\x02"),
        (("dog",), b"\x03"),
    ]
    assert "3 parts of one table" in found.told[0]


def test_metadata_that_is_broken_costs_only_the_names(tmp_path: Path) -> None:
    touch(tmp_path / "data", ["1.jpg"])
    table = pa.table({"image": ["1.jpg"], "label": [0]})
    for meta in ("{", "[]", '{"info": {"features": {"label": {"names": 3, "_type": "ClassLabel"}}}}'):
        pq.write_table(table.replace_schema_metadata({"huggingface": meta}), tmp_path / "data" / "t.parquet")
        assert labels(run_source(tmp_path, kind="table", path="data")) == {"1.jpg": ("0",)}


# 42, 21, O2: references


@pytest.mark.parametrize(
    ("file", "reference", "told"),
    [
        ("IMG_1.jpg", "IMG_1.JPG", True),
        ("IMG_1.JPG", "img_1.jpg", True),
        ("IMG_1.jpg", "IMG_1.jpeg", True),
        ("Cat/IMG_1.jpg", "cat/IMG_1.jpg", True),
        ("Bild 1.png", "Bild\u202f1.png", True),
        ("a\u202fPM.png", "a\u202fPM.png", False),
        ("a\u00a0b.png", "a\u00a0b.png", False),
        (unicodedata.normalize("NFD", "café.jpg"), "café.jpg", False),
        ("café.jpg", unicodedata.normalize("NFD", "café.jpg"), False),
        (unicodedata.normalize("NFD", "é/が.jpg"), unicodedata.normalize("NFC", "é/が"), False),
        ("狗\u200d1.jpg", "狗\u200d1.jpg", False),
    ],
)
def test_references_are_found_however_they_are_spelled(tmp_path: Path, file: str, reference: str, told: bool) -> None:
    found = run(tmp_path, f"file,label\n{reference},cat\nother.jpg,dog\n", file, "other.jpg")
    assert len(found.items) == 2
    assert not found.rejected
    assert (
        any("rows that spell their image otherwise (case, spaces, suffix): 1, as " in line for line in found.told)
        is told
    )


def test_the_exact_name_wins_and_two_other_spellings_are_ambiguous(tmp_path: Path) -> None:
    found = run(tmp_path, "file,label\na.JPG,cat\na.jpg,dog\nA.jpg,cat\n", "a.JPG", "a.jpg")
    assert labels(found) == {"a.JPG": ("cat",), "a.jpg": ("dog",)}
    assert found.codes() == [("labels.csv row 3", "ambiguous")]


@pytest.mark.parametrize("name", ["a\x1b[2J.jpg", "a\x00.jpg", "a\x7f.jpg", "a\u0085.jpg", "a\u2028.jpg"])
def test_control_characters_are_no_name(tmp_path: Path, name: str) -> None:
    found = run(tmp_path, json.dumps([{"file": "1.jpg", "label": "c"}, {"file": name, "label": "c"}]), name="t.json")
    assert found.codes()[0] == ("t.json row 2", "unsafe_path")


def test_labels_are_written_alike(tmp_path: Path) -> None:
    cells = ["1.0", "1", "True", "TRUE", "true", "1.5", "007", unicodedata.normalize("NFD", "café"), "café"]
    table = "file,label\n" + "".join(f"{i}.jpg,{cell}\n" for i, cell in enumerate(cells))
    found = run(tmp_path, table, *(f"{i}.jpg" for i in range(len(cells))))
    assert [item.labels[0] for item in found.items] == [*"11", "true", "true", "true", "1.5", "007", "café", "café"]


# 54/O15: other shapes


CAT_DOG = {"1.jpg": ("cat",), "2.jpg": ("dog",)}


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ({"1.jpg": "cat", "2.jpg": "dog"}, CAT_DOG),
        ({"1.jpg": {"label": "cat", "by": "me"}, "2.jpg": {"label": "dog"}}, CAT_DOG),
        ({"1.jpg": ["cat", "dog"], "2.jpg": []}, {"1.jpg": ("cat", "dog"), "2.jpg": ()}),
        ({"cat": ["1.jpg"], "dog": ["2.jpg"], "cow": []}, CAT_DOG),
        ({"version": 1, "samples": {"1.jpg": "cat"}, "data": [{"file": "1.jpg", "label": "cat"}]}, {"1.jpg": ("cat",)}),
        (COCO, {"1.jpg": ("cat", "dog"), "2.jpg": ("dog",), "3.jpg": ()}),
        (TASKS, {"1.jpg": ("cat",), "2.jpg": ("dog",), "3.jpg": ()}),
        ([{"image": "/data/upload/1.jpg", "id": 1, "choice": "cat", "annotator": 1, "lead_time": 2.5},
          {"image": "/data/upload/2.jpg", "id": 2, "choice": {"choices": ["cat", "dog"]}, "annotator": 1}],
         {"1.jpg": ("cat",), "2.jpg": ("cat", "dog")}),
    ],
)  # fmt: skip
def test_shapes_of_json(tmp_path: Path, value: Any, expected: dict[str, Any]) -> None:
    found = run(tmp_path, json.dumps(value), "1.jpg", "2.jpg", "3.jpg", name="labels.json")
    assert labels(found) == expected
    assert {code for _, code in found.codes()} <= {"image_without_row"}


@pytest.mark.parametrize(
    "value",
    [
        {"train": [{"file": "1.jpg", "label": "cat"}], "test": [{"file": "2.jpg", "label": "dog"}]},
        {"training": {"1.jpg": "cat"}, "validation": {"2.jpg": "dog"}, "name": "pets"},
        {
            "numTraining": 1,
            "training": [{"image": "1.jpg", "label": "cat"}],
            "test": [{"image": "2.jpg", "label": "dog"}],
        },
    ],
)
def test_sides_of_json(tmp_path: Path, value: Any) -> None:
    found = run(tmp_path, json.dumps(value), "1.jpg", "2.jpg", name="dataset_json.json")
    assert labels(found) == CAT_DOG
    assert [side for _, side in sides(found)] == ["learn", "test"]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"train": ["1.jpg"], "test": ["2.jpg"]}, "lists images for each side, but not their labels"),
        ({"a": [1], "b": [2]}, r"is an object with 2 lists: a, b; expected a list of objects.*Save it as JSON lines"),
        ({"a": 1}, "is an object with 0 lists: none"),
        (
            {**COCO, "annotations": [{"image_id": 1, "caption": "a cat"}]},
            "is COCO whose annotations have no category_id",
        ),
        (7, "holds a number"),
    ],
)
def test_json_that_says_no_labels(tmp_path: Path, value: Any, message: str) -> None:
    with pytest.raises(SourceError, match=message):
        run(tmp_path, json.dumps(value), name="labels.json")


@pytest.mark.parametrize(
    "text",
    [
        "1.jpg cat\n2.jpg dog\n",
        "1.jpg\tcat\r\n\r\n2.jpg\tdog\r\n",
        "./1.jpg, cat\n./2.jpg, dog",
        "file;label\n1.jpg;cat\n2.jpg;dog\n",
        "file\tlabel\n1.jpg\tcat\n2.jpg\tdog\n",
    ],
)
def test_text_lists(tmp_path: Path, text: str) -> None:
    found = run(tmp_path, text, "1.jpg", "2.jpg", name="train.txt")
    assert labels(found) == CAT_DOG
    found = run(tmp_path / "b", "my cat 1.jpg 0\n# note\n", "my cat 1.jpg", name="train.txt")
    assert labels(found) == {"my cat 1.jpg": ("0",)}
    assert found.codes() == [("train.txt row 2", "bad_row")]


def test_text_lists_without_labels_are_told_and_of_several_numbers_refused(tmp_path: Path) -> None:
    found = run(tmp_path, "1.jpg\n2.jpg\n", "1.jpg", "2.jpg", name="train.txt")
    assert labels(found) == {"1.jpg": (), "2.jpg": ()}
    with pytest.raises(
        SourceError, match=r"line 1 has more than a label behind the image: '1\.jpg 0 1 1'; expected FILE"
    ):
        run(tmp_path, "1.jpg 0 1 1\n", name="list.txt")


def test_label_studio_csv(tmp_path: Path) -> None:
    table = (
        "annotation_id,annotator,choice,created_at,id,image,lead_time,updated_at\n"
        "1,1,cat,2024-01-01T00:00:00Z,1,/data/upload/8/1.jpg,2.5,2024-01-01T00:00:00Z\n"
        '2,1,"{""choices"":[""cat"",""dog""]}",2024-01-01T00:00:00Z,2,/data/upload/8/2.jpg,2,2024-01-01T00:00:00Z\n'
    )
    found = run(tmp_path, table, "8/1.jpg", "8/2.jpg")
    assert labels(found) == {"8/1.jpg": ("cat",), "8/2.jpg": ("cat", "dog")}


def test_lists_of_labels_as_text(tmp_path: Path) -> None:
    table = 'file,label\n1.jpg,"[\'cat\', \'dog\']"\n2.jpg,"[""dog""]"\n3.jpg,[x\n'
    assert labels(run(tmp_path, table)) == {"1.jpg": ("cat", "dog"), "2.jpg": ("dog",), "3.jpg": ("[x",)}


def test_roboflows_classes_csv(tmp_path: Path) -> None:
    table = "filename, cat, dog, Unlabeled\n1.jpg, 1, 0, 0\n2.jpg, 0, 1, 0\n3.jpg, 0, 0, 1\n"
    found = run(tmp_path, table, "1.jpg", "2.jpg", "3.jpg", name="_classes.csv")
    assert labels(found) == {**CAT_DOG, "3.jpg": ()}
    assert "columns not used: Unlabeled" in found.told[1]


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("labels.xlsx", r"If the \.xlsx holds the labels, save it as CSV"),
        ("sub/labels.ods", r"If the \.ods holds the labels, save it as CSV"),
        ("train.txt", r"If a \.txt lists FILE LABEL on each line, give its path"),
    ],
)
def test_labels_in_other_files_beside_flat_images_are_named(tmp_path: Path, name: str, hint: str) -> None:
    touch(tmp_path / "data", ["a.jpg", "b.jpg", name])
    with pytest.raises(SourceError, match=hint):
        run_source(tmp_path, kind="folder", path="data")


def test_encoding_of_a_table_is_a_setting(tmp_path: Path) -> None:
    data = "file,label\n1.jpg,собака\n2.jpg,кот\n".encode("cp1251")
    assert labels(run(tmp_path, data, "1.jpg", "2.jpg", encoding="cp1251"))["2.jpg"] == ("кот",)
    found = run(tmp_path, data)
    assert labels(found)["2.jpg"] == ("кот",)
    assert "not UTF-8 from line 2 on, so taken as cp1251, as in '1.jpg,собака' (1.jpg," in found.told[0]
    with pytest.raises(SourceError, match="is not utf-8, its `encoding`"):
        run(tmp_path, data, encoding="utf-8")
    with pytest.raises(ParamsError, match="the name of an encoding, such as utf-8"):
        run(tmp_path, data, encoding="base64")


# O8: what lies beside images


@pytest.mark.parametrize(
    "names",
    [
        ["a.jpg", "a.jpg.json"],
        ["a.jpg", "a.json"],
        ["a.jpg", "a.jpg.supplemental-metadata.json"],
        ["a.jpg", "a.jpg.suppl.json", "dataset_info.json", "sample_submission.csv", "train.txt", ".x.csv"],
        ["gone.jpg.json"],
    ],
)
def test_sidecars_are_no_tables(names: list[str]) -> None:
    assert list_tables(names) == []
    assert list_tables([*names, "labels.csv", "a.csv.json"]) == ["a.csv.json", "labels.csv"] or "a.jpg" in names
    assert "labels.csv" in list_tables([*names, "labels.csv"])
