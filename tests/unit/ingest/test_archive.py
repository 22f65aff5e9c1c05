"""Zip archives as sources: laid out like folders or tables, read by several threads, changed under our hands."""

import io
import zipfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from source_runs import Run, run_source
from visionloop.errors import ImageError, SourceError

KAGGLE = {"labels.csv": b"id,breed\nb2,pug\ngone,pug\na1,beagle\n", "sample_submission.csv": b"id,pug\nt1,1\n"}
IMAGES = {"train/a1.jpg": b"a", "train/b2.jpg": b"b", "train/zz.jpg": b"z", "test/t1.jpg": b"t"}


def write(path: Path, files: Mapping[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> None:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in files.items():
            archive.writestr(name, data)


def run(home: Path, files: Mapping[str, bytes], **section: object) -> Run:
    write(home / "a.zip", files)
    return run_source(home, **{"kind": "archive", "path": "a.zip", **section})


def test_class_folders_below_the_archives_own_folder(tmp_path: Path) -> None:
    files = {
        "pets/": b"",
        "pets/dog/1.jpg": b"d",
        "pets/cat/1.jpg": b"c",
        "__MACOSX/pets/._1.jpg": b"x",
        "pets/.x.jpg": b"",
    }
    found = run(tmp_path, files)
    assert found.facts() == [("pets/cat/1.jpg", ("cat",), None), ("pets/dog/1.jpg", ("dog",), None)]
    assert [item.read(1) for item in found.items] == [b"c", b"d"]
    assert "all images are inside pets/, so this name is not taken for a class" in found.told[0]
    assert found.told[1].endswith("files passed over: hidden 1; in __MACOSX 1")
    assert found.rejected == []


def test_split_folders_and_patterns_as_in_a_folder(tmp_path: Path) -> None:
    splits = run(tmp_path, {"train/cat/1.jpg": b"1", "train/dog/2.jpg": b"2", "test/dog/3.jpg": b"3"})
    assert [(i.labels, i.side) for i in splits.items] == [(("dog",), "test"), (("cat",), None), (("dog",), None)]
    flat = run(tmp_path, {"cat-1.jpg": b"1", "dog-2.jpg": b"2"}, pattern="{label}-*")
    assert [i.labels for i in flat.items] == [("cat",), ("dog",)]
    one_class = run(tmp_path, {"cat/1.jpg": b"1"})
    assert [i.labels for i in one_class.items] == [("cat",)]


@pytest.mark.parametrize("prefix", ["", "dog-breeds/"])
@pytest.mark.parametrize("named", [False, True])
def test_table_and_its_images(tmp_path: Path, prefix: str, named: bool) -> None:
    files = {prefix + name: data for name, data in {**KAGGLE, **IMAGES}.items()}
    found = run(tmp_path, files, **({"table": f"{prefix}labels.csv"} if named else {}))
    assert found.facts() == [
        ("train/b2.jpg", ("pug",), None),
        ("train/a1.jpg", ("beagle",), None),
        ("test/t1.jpg", (), None),
    ]
    assert [item.read(9) for item in found.items] == [b"b", b"a", b"t"]
    assert found.codes() == [("labels.csv row 2", "row_without_image"), ("train/zz.jpg", "image_without_row")]


def test_parquet_table_elsewhere_than_its_images(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    pq.write_table(pa.table({"file": ["x/1.jpg"], "label": ["cat"]}), buffer)
    found = run(
        tmp_path, {"meta/t.parquet": buffer.getvalue(), "pics/x/1.jpg": b"1"}, table="meta/t.parquet", images="pics"
    )
    assert found.facts() == [("pics/x/1.jpg", ("cat",), None)]


def test_names_in_other_encodings(tmp_path: Path) -> None:
    write(tmp_path / "a.zip", {"c\u00e4t/1.jpg": b"1", "dog_o/1.jpg": b"2"})
    data = (tmp_path / "a.zip").read_bytes().replace(b"dog_o", b"dog\x94o")  # code page 437, no flag
    (tmp_path / "a.zip").write_bytes(data)
    found = run_source(tmp_path, kind="archive", path="a.zip")
    assert {i.labels for i in found.items} == {("c\u00e4t",), ("dog\u00f6o",)}


def test_zip64_and_data_descriptors(tmp_path: Path) -> None:
    buffer = io.BytesIO()

    class Stream(io.RawIOBase):  # cannot seek: sizes follow the data, as `zip -` writes them
        def writable(self) -> bool:
            return True

        def write(self, data: bytes) -> int:  # type: ignore[override]
            return buffer.write(data)

    with zipfile.ZipFile(Stream(), "w", zipfile.ZIP_DEFLATED) as archive:  # type: ignore[arg-type]
        for name in ("cat/1.jpg", "dog/1.jpg"):
            with archive.open(name, "w", force_zip64=True) as entry:
                entry.write(name.encode() * 1000)
    (tmp_path / "a.zip").write_bytes(buffer.getvalue())
    found = run_source(tmp_path, kind="archive", path="a.zip")
    assert [item.read(10_000) for item in found.items] == [b"cat/1.jpg" * 1000, b"dog/1.jpg" * 1000]


def test_entries_are_read_by_several_threads(tmp_path: Path) -> None:
    files = {f"{'cat' if i % 2 else 'dog'}/{i}.jpg": bytes([i % 256]) * (i * 100) for i in range(200)}
    found = run(tmp_path, files)
    with ThreadPoolExecutor(8) as pool:
        data = list(pool.map(lambda item: item.read(50_000), found.items))
    assert {i.origin.partition(":")[2]: d for i, d in zip(found.items, data, strict=True)} == files


def test_sizes_and_changes_are_noticed(tmp_path: Path) -> None:
    found = run(tmp_path, {"cat/1.jpg": b"12345", "dog/1.jpg": b"1"})
    with pytest.raises(ImageError, match="is too large; expected at most 4 bytes"):
        found.items[0].read(4)
    write(tmp_path / "a.zip", {"cat/1.jpg": b"54321", "dog/1.jpg": b"12"})
    with pytest.raises(ImageError, match="is in an archive that has changed meanwhile"):
        found.items[0].read(5)
    (tmp_path / "a.zip").unlink()
    with pytest.raises(ImageError, match="is in an archive that cannot be opened"):
        found.items[0].read(5)


def test_header_that_reaches_into_the_next_entry(tmp_path: Path) -> None:
    write(tmp_path / "a.zip", {"cat/1.jpg": b"12345", "dog/1.jpg": b"1"}, zipfile.ZIP_STORED)
    data = bytearray((tmp_path / "a.zip").read_bytes())
    data[28:30] = (44).to_bytes(2, "little")  # the length of the extra field: data would begin inside the second entry
    (tmp_path / "a.zip").write_bytes(data)
    found = run_source(tmp_path, kind="archive", path="a.zip")
    with pytest.raises(ImageError, match=r"cat/1\.jpg: reaches into the next entry; expected a whole entry"):
        found.items[0].read(5)
    assert found.items[1].read(5) == b"1"


def test_stamps_are_those_of_the_archive_and_the_place(tmp_path: Path) -> None:
    first = run(tmp_path, {"cat/1.jpg": b"1", "dog/1.jpg": b"1"})
    again = run_source(tmp_path, kind="archive", path="a.zip")
    assert [i.stamp for i in first.items] == [i.stamp for i in again.items]
    assert len({i.stamp for i in first.items}) == 2


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"path": "none.zip"}, r"none\.zip: does not exist; expected a zip archive"),
        ({"path": "."}, "is no regular file; expected a zip archive"),
        ({"table": "labels.csv"}, "has no entry 'labels.csv'; expected the path of the table inside"),
        ({"pattern": "{label}_*"}, "no file fits the pattern"),
    ],
)
def test_unusable_archives(tmp_path: Path, section: dict[str, object], message: str) -> None:
    with pytest.raises(SourceError, match=message):
        run(tmp_path, {"cat/1.jpg": b"1"}, **section)


def test_broken_table_in_an_archive(tmp_path: Path) -> None:
    write(tmp_path / "a.zip", {**KAGGLE, **IMAGES}, zipfile.ZIP_STORED)
    data = (tmp_path / "a.zip").read_bytes().replace(b"b2,pug", b"b2,cat", 1)
    (tmp_path / "a.zip").write_bytes(data)
    with pytest.raises(SourceError, match=r"labels\.csv: does not have the size or the checksum that"):
        run_source(tmp_path, kind="archive", path="a.zip")
