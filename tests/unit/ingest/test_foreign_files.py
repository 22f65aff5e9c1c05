"""What other tools write: read (VIA), or named with what to do (archives of arrays, PDF, WebDataset)."""

import io
import json
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from source_runs import Run, run_source, touch, type_advice
from visionloop.errors import SourceError
from visionloop.ingest.sources import SourceContext
from visionloop.ingest.sources.guess import guess_source

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
        (
            "train-000000.tar",
            r"train-000000\.tar looks like a WebDataset shard.*then `visionloop ingest .*/labels\.csv`",
        ),
        ("images.tar", r"Unpack images\.tar, or make a zip of it"),
    ],
)
def test_a_file_without_images_is_named_with_what_to_do(tmp_path: Path, name: str, message: str) -> None:
    touch(tmp_path / "data", [name])
    with pytest.raises(SourceError, match=message):
        run_source(tmp_path, kind="folder", path="data")


def write_tar(path: Path, files: Mapping[str, bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


@pytest.mark.parametrize("is_file", [False, True])
def test_the_advice_for_webdataset_shards_is_typed_and_works(tmp_path: Path, is_file: bool) -> None:
    place = tmp_path / "my shards"
    write_tar(place / "train-000000.tar", {"0001.jpg": b"a", "0001.cls": b"3", "x/2.PNG": b"b", "x/2.cls": b"11\n"})
    if not is_file:
        write_tar(place / "train-000001.tar", {"0001.jpg": b"c", "0001.cls": b"4"})  # the same key
    run = type_advice(tmp_path, place / "train-000000.tar" if is_file else place)
    assert run.error is None
    expected = [
        ("train-000000.tar/0001.jpg", ("3",), None),
        ("train-000000.tar/x/2.PNG", ("11",), None),
        ("train-000001.tar/0001.jpg", ("4",), None),
    ]
    assert sorted(run.facts()) == expected[: 2 if is_file else 3]
    assert run.codes() == []


@pytest.mark.parametrize("others", [[], ["README.md", ".gitattributes", "LICENSE.txt"]])
@pytest.mark.parametrize("folder", ["data", ""])
def test_a_clone_from_hugging_face_with_the_images_in_parquet(tmp_path: Path, others: list[str], folder: str) -> None:
    touch(tmp_path / "pets", others)
    (tmp_path / "pets" / "data").mkdir(parents=True)
    meta = {
        "huggingface": json.dumps({"info": {"features": {"label": {"names": ["cat", "dog"], "_type": "ClassLabel"}}}})
    }
    for number, side in enumerate(("train", "validation", "test")):
        image = {"bytes": b"image %d" % number, "path": f"{number}.jpg"}
        table = pa.table({"image": [image], "label": [number % 2]}).replace_schema_metadata(meta)
        pq.write_table(table, tmp_path / "pets" / "data" / f"{side}-00000-of-00001.parquet")
    found = Run()
    found.take(guess_source(str(tmp_path / "pets" / folder)), SourceContext(tmp_path, tmp_path, {}))
    assert found.error is None
    assert [(item.labels, item.side, item.read(9)) for item in found.items] == [
        (("cat",), "train", b"image 0"),
        (("cat",), "test", b"image 2"),
        (("dog",), "val", b"image 1"),
    ]
