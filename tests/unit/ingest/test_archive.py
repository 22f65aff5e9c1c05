"""Zip archives as sources: laid out like folders or tables, read by several threads, changed under our hands."""

import io
import struct
import unicodedata
import zipfile
import zlib
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


def write_raw(home: Path, files: Mapping[str, bytes], system: int = 3, **bytes_for: bytes) -> None:
    """Write a zip whose names hold other bytes than Python would write: `AAA` stands for those of `AAA=...`."""
    with zipfile.ZipFile(home / "a.zip", "w") as archive:
        for name, data in files.items():
            info = zipfile.ZipInfo(name)
            info.create_system = system
            archive.writestr(info, data)
    data = (home / "a.zip").read_bytes()
    for name, raw in bytes_for.items():
        assert len(name) == len(raw)
        data = data.replace(name.encode(), raw)
    (home / "a.zip").write_bytes(data)


@pytest.mark.parametrize(
    ("names", "system"),
    [
        (("./cat/1.jpg", "./dog/1.jpg", "./"), 3),
        (("././cat/1.jpg", "dog/./1.jpg"), 3),
        (("cat\\1.jpg", "dog\\1.jpg", "cat\\"), 0),
        (("pets\\cat\\1.jpg", "pets\\dog\\1.jpg"), 3),
        (("cat\\1.jpg", "dog/1.jpg"), 0),
        (("cat//1.jpg", "dog/.//1.jpg", "dog//"), 3),
        ((".//cat/1.jpg", "dog///1.jpg"), 3),
    ],
)
def test_names_as_other_tools_write_them(tmp_path: Path, names: tuple[str, ...], system: int) -> None:
    write_raw(tmp_path, {name: b"" if name.endswith(("/", "\\")) else b"x" for name in names}, system)
    found = run_source(tmp_path, kind="archive", path="a.zip")
    assert [item.labels for item in found.items] == [("cat",), ("dog",)]
    assert [item.read(9) for item in found.items] == [b"x", b"x"]
    assert found.rejected == []


@pytest.mark.parametrize(
    "name", ["..\\evil.jpg", "C:\\evil.jpg", "./../evil.jpg", "a/./../../evil.jpg", "//a/x.jpg", "a//../../x.jpg"]
)
def test_names_that_lead_out_stay_refused(tmp_path: Path, name: str) -> None:
    write_raw(tmp_path, {"cat/1.jpg": b"x", "dog/1.jpg": b"x", name: b"x"}, system=0)
    (refused,) = run_source(tmp_path, kind="archive", path="a.zip").rejected
    assert (refused.code, refused.reason) == ("unsafe_path", "its name leaves the archive")


def write_names(home: Path, encoding: str, *words: str) -> None:
    """Write a zip with a folder for each word, whose names do not say that they are in this encoding."""
    raws = {f"{'Z' * len(word.encode(encoding))}{i}": word.encode(encoding) for i, word in enumerate(words)}
    holes = {hole: raw + hole[-1:].encode() for hole, raw in raws.items()}
    write_raw(home, {**{f"{hole}/1.jpg": b"1" for hole in holes}, "dog/1.jpg": b"2"}, **holes)


@pytest.mark.parametrize(
    ("words", "encoding"),
    [
        (("山",), "gbk"),
        (("été",), "cp1252"),
        (("山", "水", "汽车"), "gbk"),
        (("猫", "狗", "鸟"), "gbk"),
        (("犬", "猫", "自動車"), "shift_jis"),
        (("ねこ", "うさぎ"), "shift_jis"),
        (("собака", "кот", "лошадь"), "cp866"),
        (("Собака", "Кот", "Птица"), "cp1251"),
        (("고양이", "강아지", "새"), "euc_kr"),
        (("貓", "狗", "汽車"), "big5"),
        (("Müll", "Glas", "Körbe", "Bär"), "cp437"),
        (("éléphant", "forêt", "château", "hôtel"), "mac_roman"),
        (("żaba", "koń", "gęś", "jabłko"), "cp852"),
        (("猫", "Кошка", "café"), "utf-8"),
    ],
)
def test_encoding_of_names_is_guessed_and_told(tmp_path: Path, words: tuple[str, ...], encoding: str) -> None:
    write_names(tmp_path, encoding, *words)
    found = run_source(tmp_path, kind="archive", path="a.zip")
    names = {f"{word}{i}" for i, word in enumerate(words)}
    assert {item.labels[0] for item in found.items} == {*names, "dog"}
    told = [line for line in found.told if "names that are not UTF-8" in line]
    assert len(told) == (encoding != "utf-8")
    if told:
        assert f"are read as {encoding}, such as " in told[0]
        assert " in " in told[0].partition(" (")[2], "how others read it"
        assert told[0].endswith("; else `encoding` (--encoding)")


@pytest.mark.parametrize(
    ("word", "encoding"), [("猫", "gbk"), ("牛", "gbk"), ("狗狗", "gbk"), ("猫", "shift_jis"), ("řeka", "cp1250")]
)
def test_encoding_of_names_is_asked_for_and_the_answer_is_taken(tmp_path: Path, word: str, encoding: str) -> None:
    raw = word.encode(encoding)
    hole = "Z" * len(raw)
    write_raw(tmp_path, {f"{hole}/1.jpg": b"1", "dog/1.jpg": b"2"}, **{hole: raw})
    with pytest.raises(SourceError, match=rf"does not say the encoding of 1 .*{word}/1\.jpg in {encoding}") as caught:
        run_source(tmp_path, kind="archive", path="a.zip")
    assert f"`visionloop ingest {tmp_path}/a.zip --encoding {encoding}`" in str(caught.value)
    found = run_source(tmp_path, kind="archive", path="a.zip", encoding=encoding)
    assert {item.labels for item in found.items} == {(word,), ("dog",)}
    assert [item.read(1) for item in found.items if item.labels == (word,)] == [b"1"]


@pytest.mark.parametrize(("word", "encoding"), [("Müll", "cp437"), ("piñata", "cp437"), ("Katze_ß", "cp437")])
def test_names_of_dos_are_read_and_told(tmp_path: Path, word: str, encoding: str) -> None:
    raw = word.encode(encoding)
    hole = "Z" * len(raw)
    write_raw(tmp_path, {f"{hole}/1.jpg": b"1", "dog/1.jpg": b"2"}, **{hole: raw})
    found = run_source(tmp_path, kind="archive", path="a.zip")
    assert {item.labels for item in found.items} == {(word,), ("dog",)}
    assert f"names that are not UTF-8 are read as cp437, such as {word}/1.jpg (" in found.told[0]


@pytest.mark.parametrize("word", ["café", "cafe\u0301", "Кошка", "猫", "คน"])
def test_utf8_without_its_mark_is_read(tmp_path: Path, word: str) -> None:
    raw = word.encode()
    hole = "Z" * len(raw)
    write_raw(tmp_path, {f"{hole}/1.jpg": b"1", "dog/1.jpg": b"2"}, **{hole: raw})
    found = run_source(tmp_path, kind="archive", path="a.zip")
    assert {item.labels for item in found.items} == {(unicodedata.normalize("NFC", word),), ("dog",)}


@pytest.mark.parametrize(
    ("encoding", "message"),
    [
        ("klingon", r"'klingon' is no encoding"),
        ("hex", r"'hex' is no encoding"),
        ("ascii", "'ascii' fits not all names"),
    ],
)
def test_an_encoding_that_does_not_fit(tmp_path: Path, encoding: str, message: str) -> None:
    write_raw(tmp_path, {"ZZ/1.jpg": b"1", "dog/1.jpg": b"2"}, ZZ="狗".encode("gbk"))
    with pytest.raises(SourceError, match=message):
        run_source(tmp_path, kind="archive", path="a.zip", encoding=encoding)


def test_a_name_in_the_unicode_field(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for name, text in (("Z/1.jpg", "猫/1.jpg"), ("Y/1.jpg", "犬/1.jpg")):
            info = zipfile.ZipInfo(name)
            raw = name.replace("Z", "\xff").replace("Y", "\xfe").encode("latin-1")
            field = b"\x01" + zlib.crc32(raw).to_bytes(4, "little") + text.encode()
            info.extra = struct.pack("<HH", 0x7075, len(field)) + field
            archive.writestr(info, b"x")
    data = (tmp_path / "a.zip").read_bytes().replace(b"Z/1", b"\xff/1").replace(b"Y/1", b"\xfe/1")
    (tmp_path / "a.zip").write_bytes(data)
    found = run_source(tmp_path, kind="archive", path="a.zip")
    assert {item.labels for item in found.items} == {("猫",), ("犬",)}
    assert [item.read(1) for item in found.items] == [b"x", b"x"]


def test_any_name_without_control_characters_is_a_name(tmp_path: Path) -> None:
    files = {"cat/Shot at 3.04\u202fPM.png": b"1", "dog/a\u00a0b\u200e.jpg": b"2", "dog/bad\x07.jpg": b"3"}
    found = run(tmp_path, files)
    assert [item.labels for item in found.items] == [("cat",), ("dog",)]
    assert [item.read(1) for item in found.items] == [b"1", b"2"]
    assert [code for _, code in found.codes()] == ["unsafe_path"]


def test_names_that_are_one_without_empty_parts_are_one_name(tmp_path: Path) -> None:
    found = run(tmp_path, {"cat//1.jpg": b"1", "cat/1.jpg": b"2", "dog/1.jpg": b"3"})
    assert found.facts() == [("dog/1.jpg", ("dog",), None)]
    assert found.codes() == [("cat/1.jpg", "duplicate_name")]


@pytest.mark.parametrize("end", ["\u2028", "\u2029", "\x85"])
def test_what_ends_a_line_elsewhere_ends_no_row_of_a_table(tmp_path: Path, end: str) -> None:
    table = f"file,label,note\n1.jpg,cat,a{end}b\n2{end}.jpg,dog,\n3.jpg,d{end}og,\n4.jpg,dog,\n"
    found = run(
        tmp_path, {"labels.csv": table.encode(), **dict.fromkeys(["1.jpg", f"2{end}.jpg", "3.jpg", "4.jpg"], b"x")}
    )
    assert found.facts() == [("1.jpg", ("cat",), None), ("4.jpg", ("dog",), None)]
    shown = f"2{ascii(end)[1:-1]}.jpg"
    assert found.codes() == [("labels.csv row 2", "unsafe_path"), ("3.jpg", "bad_label"), (shown, "unsafe_path")]


def test_a_zip_of_the_finder_with_more_entries_than_its_end_can_count(tmp_path: Path) -> None:
    number = 65_600
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for i in range(number):
            archive.writestr(zipfile.ZipInfo(f"{'cat' if i % 2 else 'dog'}/{i}.jpg"), b"")
    data = (tmp_path / "a.zip").read_bytes()
    place = data.rfind(b"PK\6\6")  # the zip64 end, which the Finder does not write
    size, offset = struct.unpack_from("<QQ", data, place + 40)
    end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, number & 0xFFFF, number & 0xFFFF, size, offset, 0)
    (tmp_path / "a.zip").write_bytes(data[:place] + end)
    assert len(run_source(tmp_path, kind="archive", path="a.zip").items) == number


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            ["../1.jpg", "../2.jpg"],
            r"no image is left of it, entries refused: 2: its name leaves the archive \(unsafe_path",
        ),
        (["data.zip"], r"it holds \.zip 1; .* a zip inside a zip has to be unpacked first"),
        (["a/1.jp2", "b/2.jp2"], r"it holds \.jp2 2"),
        (["__MACOSX/cat/._1.jpg", "__MACOSX/._cat"], r"it holds in __MACOSX 2; .* make the zip again, of the folder"),
        (["shards/train-000001.tar"], r"it holds \.tar 1"),
        (["train-000001.tar"], r"Unpack the zip first, into FOLDER\. train-000001\.tar looks like a WebDataset shard"),
    ],
)
def test_a_zip_of_which_nothing_is_left_says_why(tmp_path: Path, files: list[str], message: str) -> None:
    with pytest.raises(SourceError, match=message):
        run(tmp_path, dict.fromkeys(files, b"x"))


def test_a_table_in_each_split_folder_gives_labels_and_the_folder_the_side(tmp_path: Path) -> None:
    files = {f"{split}/{split}.jpg": split.encode() for split in ("train", "valid", "test")}
    files |= {
        f"{split}/_classes.csv": f"filename, cat, dog\n{split}.jpg, 1, 0\n".encode() for split in ("train", "test")
    }
    files["valid/_classes.csv"] = b"filename, cat, dog\nvalid.jpg, 0, 1\n"
    found = run(tmp_path, files)
    assert found.facts() == [
        ("test/test.jpg", ("cat",), "test"),
        ("train/train.jpg", ("cat",), "train"),
        ("valid/valid.jpg", ("dog",), "val"),
    ]
    assert [item.read(9) for item in found.items] == [b"test", b"train", b"valid"]


def test_class_folders_and_a_table_that_names_the_images(tmp_path: Path) -> None:
    images = {f"kind{i}/{i}{j}.jpg": b"1" for i in (1, 2) for j in (1, 2, 3)}
    rows = "".join(f"{i}{j}.jpg,{'nv' if j == 1 else 'mel'}\n" for i in (1, 2) for j in (1, 2, 3))
    files = {**images, "meta.csv": f"file,dx\n{rows}".encode()}
    with pytest.raises(
        SourceError, match=r"two ways: it holds class folders, and meta\.csv names 6 of 6 images in 6 rows"
    ) as e:
        run(tmp_path, files)
    assert f"`visionloop ingest {tmp_path}/a.zip --table meta.csv`" in str(e.value)
    assert f"`visionloop ingest {tmp_path}/a.zip --pattern '{{label}}/'`" in str(e.value)
    assert {i.labels for i in run(tmp_path, files, table="meta.csv").items} == {("nv",), ("mel",)}
    assert {i.labels for i in run(tmp_path, files, pattern="{label}/").items} == {("kind1",), ("kind2",)}
