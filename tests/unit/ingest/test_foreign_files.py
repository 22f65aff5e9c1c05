"""What other tools write: read (VIA), or named with what to do (archives of arrays, PDF, WebDataset)."""

import json
from pathlib import Path
from typing import Any

import pytest

from source_runs import run_source, touch
from visionloop.errors import SourceError

FILES = {
    "1.jpg99": {"filename": "1.jpg", "size": 99, "regions": [], "file_attributes": {"kind": "cat"}},
    "2.jpg98": {
        "filename": "2.jpg",
        "size": 98,
        "regions": [],
        "file_attributes": {"kind": {"dog": True, "cow": False}},
    },
}
REGIONS = {
    "1.jpg99": {"filename": "1.jpg", "regions": [{"region_attributes": {"type": "cat"}}] * 2, "file_attributes": {}},
    "2.jpg98": {
        "filename": "2.jpg",
        "regions": {"0": {"region_attributes": {"type": "dog"}, "shape_attributes": {}}},
        "file_attributes": {},
    },
    "3.jpg97": {"filename": "3.jpg", "regions": [], "file_attributes": {}},
}


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (FILES, [("cat",), ("dog",)]),
        (REGIONS, [("cat",), ("dog",), ()]),
        ({"_via_settings": {}, "_via_img_metadata": FILES, "_via_attributes": {}}, [("cat",), ("dog",)]),
    ],
)
def test_json_of_via_is_read(tmp_path: Path, value: Any, expected: list[Any]) -> None:
    touch(tmp_path, ["1.jpg", "2.jpg", "3.jpg"])
    (tmp_path / "via.json").write_text(json.dumps(value))
    found = run_source(tmp_path, kind="table", path="via.json")
    assert [item.labels for item in found.items] == expected
    assert any("VIA (VGG Image Annotator)" in line for line in found.told)


def test_csv_of_via_is_named(tmp_path: Path) -> None:
    touch(tmp_path, ["1.jpg"])
    header = "filename,file_size,file_attributes,region_count,region_id,region_shape_attributes,region_attributes"
    (tmp_path / "via.csv").write_text(f'{header}\n1.jpg,9,"{{}}",1,0,"{{}}","{{""type"":""cat""}}"\n')
    with pytest.raises(SourceError, match=r"is a CSV of VIA .*Export Annotations \(as json\)"):
        run_source(tmp_path, kind="table", path="via.csv")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("data.npz", r"data\.npz is data of a program"),
        ("train.h5", r"train\.h5 is data of a program"),
        ("train.tfrecord", r"train\.tfrecord is data of a program.*Save it as CSV"),
        ("images.db", r"images\.db is not a table we read.*source `sql`"),
        ("scan.PDF", r"scan\.PDF is a PDF\. Take the images out"),
        ("train-000000.tar", r"train-000000\.tar look like WebDataset shards.*visionloop datasets export FOLDER"),
        ("images.tar", r"Unpack images\.tar, or make a zip of it"),
    ],
)
def test_a_file_without_images_is_named_with_what_to_do(tmp_path: Path, name: str, message: str) -> None:
    touch(tmp_path / "data", [name])
    with pytest.raises(SourceError, match=message):
        run_source(tmp_path, kind="folder", path="data")
