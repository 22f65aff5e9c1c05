"""What columns mean: named, guessed and told, and what their cells become."""

import io
from dataclasses import asdict
from datetime import UTC, date, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from visionloop.errors import ImageError, SourceError
from visionloop.ingest.paths.listing import ImageFolder
from visionloop.ingest.tables.cells import parse_time, to_text
from visionloop.ingest.tables.files import TableKind, guess_table_kind
from visionloop.ingest.tables.rows import BAD_ROW, RowPlan, plan_columns, read_rows
from visionloop.params import Columns


def read(data: bytes, kind: TableKind = "csv") -> tuple[list[dict[str, Any]], list[str]]:
    told: list[str] = []
    return list(read_rows(io.BytesIO(data), kind, "labels", told.append)), told


def plan(*rows: dict[str, Any], **columns: Any) -> tuple[RowPlan, list[str]]:
    told: list[str] = []
    return plan_columns(Columns(**columns), rows, "source x", told.append), told


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"id": "ab12", "breed": "pug"}, {"image": "id", "labels": ("breed",)}),
        ({"": "", "file": "a.jpg", "label": 3}, {"image": "file", "labels": ("label",)}),
        ({"column 1": "0", "image_id": "a", "rust": "1", "scab": "0"}, {"labels": ("rust", "scab"), "one_hot": True}),
        ({"path": "a.jpg", "tags": "x|y"}, {"labels": ("tags",), "separator": None}),
        ({"a": "photos/1.png", "b": "cat"}, {"image": "a", "labels": ("b",)}),
        ({"id": 7, "url": "https://x.org/1", "category": "c"}, {"image": "url", "labels": ("category",)}),
        ({"image": {"bytes": b"x", "path": "a.jpg"}, "label": 1}, {"image": "image.bytes", "labels": ("label",)}),
        ({"file": {"url": "http://x/1.jpg"}, "info": {"class": "c"}}, {"image": "file.url", "labels": ("info.class",)}),
        ({"Image Path": "1.jpg", "Class": "c", "Split": "Training"}, {"image": "Image Path", "side": "Split"}),
        ({"img": "1.jpg", "y": 1, "patient_id": "p", "date": "2024-05-01"}, {"group": "patient_id", "time": "date"}),
        ({"img": "1.jpg", "y": 1, "time": 12.5}, {"time": None}),
        ({"img": "1.jpg", "y": 1, "set": "A"}, {"side": None}),
        ({"path": "1.jpg"}, {"image": "path", "labels": ()}),
    ],
)
def test_columns_are_guessed_and_told(row: dict[str, Any], expected: dict[str, Any]) -> None:
    found, told = plan(row)
    assert {key: getattr(found, key) for key in expected} == expected
    assert told[0].startswith("source x: columns guessed: image = ")
    assert all(str(name) in told[0] for name in found.labels)


def test_named_columns_are_taken_and_not_told() -> None:
    row = {"a": "x", "b": "y", "c": "train", "d": "g", "e": "2024-01-01"}
    found, told = plan(row, image="a", label="b", side="c", group="d", time="e")
    assert (found, told) == (RowPlan("a", ("b",), False, "c", "d", "e"), [])


@pytest.mark.parametrize(
    ("rows", "columns", "message"),
    [
        (
            [{"id": "a", "breed": "b"}],
            {"label": "bred"},
            r"columns\.label: no column 'bred'; expected one of breed, id",
        ),
        ([{"x": 0.5, "y": "b"}], {}, r"cannot tell which column is the image's path, URL or bytes: x, y"),
        ([{"id": "a", "x": "b", "z": "c"}], {}, r"which column is the label: id, x, z.*Name it in .*columns\.label"),
        ([{"a.jpg": "b.jpg", "cat": "dog"}], {}, "has an image where a column's name should be; expected a header"),
        ([], {}, "has no row"),
        ([{BAD_ROW: "line 2 has 3 cells"}], {}, "line 2 has 3 cells"),
    ],
)
def test_columns_that_cannot_be_told_apart(rows: list[dict[str, Any]], columns: dict[str, Any], message: str) -> None:
    with pytest.raises(SourceError, match=message):
        plan(*rows, **columns)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        *[("cat", ("cat",)), (3, ("3",)), (3.0, ("3",)), (Decimal("3.00"), ("3",)), (2.5, ("2.5",)), (True, ("true",))],
        *[(None, ()), ("  ", ()), (float("nan"), ()), (["a", "b", "a"], ("a", "b")), (" cat ", ("cat",))],
    ],
)
def test_labels_are_text(value: Any, expected: tuple[str, ...]) -> None:
    assert RowPlan("i", ("l",)).read_labels({"l": value}) == expected


def test_labels_of_several_kinds() -> None:
    assert RowPlan("i", ("l",), separator=" ").read_labels({"l": "scab  rust scab"}) == ("scab", "rust")
    one_hot = RowPlan("i", ("a", "b", "c"), one_hot=True)
    assert one_hot.read_labels({"a": "1", "b": 1.0, "c": "0"}) == ("a", "b")
    assert one_hot.read_labels({"a": True, "b": "false"}) == ("a",)
    with pytest.raises(ImageError, match="column a: holds '2'; expected 1 or 0"):
        one_hot.read_labels({"a": "2"})


@pytest.mark.parametrize("label", ["x" * 257, "two\nlines", "\ud800", "a\x00", {"a": 1}, [["a"]]])
def test_unusable_labels_are_refused(label: Any) -> None:
    with pytest.raises(ImageError) as caught:
        RowPlan("i", ("l",)).read_labels({"l": label})
    assert caught.value.reason_code in ("bad_label", "bad_row")


def test_other_cells() -> None:
    found = RowPlan("i", (), False, "s", "g", "t")
    row = {"i": " a.jpg ", "s": " Valid", "g": 12.0, "t": "2024:05:01 10:00:00"}
    assert (found.read_image(row), found.read_side(row), found.read_group(row)) == ("a.jpg", "val", "12")
    assert found.read_time(row) == "2024-05-01T10:00:00+00:00"
    assert (found.read_image({}), found.read_side({"s": "nan"}), found.read_group({}), found.read_time({})) == (
        None,
    ) * 4
    with pytest.raises(ImageError, match="column s says 'fold 3'; expected train, val or test"):
        found.read_side({"s": "fold 3"})
    assert found.read_image({"i": memoryview(b"abc")}) == b"abc"
    assert found.read_image({"i": {"bytes": None, "path": "x.jpg"}}) == "x.jpg"


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("2024-05-01", "2024-05-01T00:00:00+00:00"),
        ("2024-05-01T10:00:00+02:00", "2024-05-01T08:00:00+00:00"),
        ("2024-05-01T10:00:00Z", "2024-05-01T10:00:00+00:00"),
        (1714557600, "2024-05-01T10:00:00+00:00"),
        (1714557600000, "2024-05-01T10:00:00+00:00"),
        (date(2024, 5, 1), "2024-05-01T00:00:00+00:00"),
        (datetime(2024, 5, 1, tzinfo=UTC), "2024-05-01T00:00:00+00:00"),
        ("yesterday", None),
        ("20240501", None),
        (1e300, None),
        (float("nan"), None),
        (True, None),
        ([], None),
    ],
)
def test_times(value: Any, expected: str | None) -> None:
    assert parse_time(value) == expected


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"id,breed\r\na,b\r\n", [{"id": "a", "breed": "b"}]),
        (b"\xef\xbb\xbfid;breed\na,1;b\n", [{"id": "a,1", "breed": "b"}]),
        (b"id\tbreed\na\tb", [{"id": "a", "breed": "b"}]),
        ("id,breed\na,b\u00f6\n".encode("utf-16"), [{"id": "a", "breed": "b\u00f6"}]),
        (b'\n\n"id","breed"\n"a","two\nlines"\n\n', [{"id": "a", "breed": "two\nlines"}]),
        (b",breed\n0,b\n", [{"column 1": "0", "breed": "b"}]),
        (
            b"id,breed\na\nb,c,d\ne,f\n",
            [
                {BAD_ROW: "line 2 has 1 cells; expected 2"},
                {BAD_ROW: "line 3 has 3 cells; expected 2"},
                {"id": "e", "breed": "f"},
            ],
        ),
        (b"id,breed\n=cmd|' /C calc'!A0,b\n", [{"id": "=cmd|' /C calc'!A0", "breed": "b"}]),
        (b"id\n", []),
    ],
)
def test_csv(data: bytes, expected: list[dict[str, str]]) -> None:
    assert read(data) == (expected, [])


@pytest.mark.parametrize("label", ["b\u00f6", "d\u2019or \u2013 5 \u20ac", "\u201cna\u00efve\u201d\u2026"])
def test_csv_of_windows_is_told(label: str) -> None:
    rows, told = read(b"id,breed\na,b\n" + f"c,{label}\n".encode("cp1252"))
    assert rows[1] == {"id": "c", "breed": label}
    assert len(told) == 1
    assert told[0].startswith(f"labels: not UTF-8 from line 3 on, so taken as Windows-1252, as in 'c,{label}' (c,")
    assert told[0].endswith("; save it as UTF-8 or name its `encoding` to be sure (--encoding)")


@pytest.mark.parametrize(
    ("text", "encoding"),
    [("\u72ac\u732b", "shift_jis"), ("\u72d7\u732b", "gbk"), ("\u043a\u043e\u0442\u044b", "cp1251")],
)
def test_csv_in_another_writing_is_guessed_where_nobody_can_be_asked(text: str, encoding: str) -> None:
    data = f"id,breed\na,{text}\n".encode(encoding)
    rows, told = read(data)
    assert rows == [{"id": "a", "breed": text}]
    assert f"so taken as {encoding}, as in 'a,{text}'" in told[0]
    assert list(read_rows(io.BytesIO(data), "csv", "labels", encoding=encoding)) == rows


@pytest.mark.parametrize(
    ("data", "label"),
    [
        (b"sep=;\r\nid;breed\r\na;b,c\r\n", "b,c"),
        (b'\xef\xbb\xbf"sep=;"\nid;breed\na;b\n', "b"),
        ("SEP=\t\nid\tbreed, of dog\na\tb\n".replace(", of dog", "").encode("utf-16"), "b"),
        (b"sep=|\n\nid|breed\na|b\n", "b"),
    ],
)
def test_excels_line_with_the_separator_is_skipped(data: bytes, label: str) -> None:
    assert read(data) == ([{"id": "a", "breed": label}], [])


def test_json_and_json_lines() -> None:
    row = {"image": {"url": "x"}, "labels": ["a"]}
    text = b'{"image": {"url": "x"}, "labels": ["a"]}'
    assert read(b"[" + text + b"]", "json") == ([row], [])
    assert read(b'{"v": 1, "items": [' + text + b', 3], "none": []}', "json") == (
        [row, {BAD_ROW: "row 2 is a number; expected an object"}],
        ["labels: rows taken from 'items'"],
    )
    assert read(text + b"\n\n" + text + b'\n{"image": \n[]', "jsonl")[0] == [
        row,
        row,
        {BAD_ROW: "line 4 is not JSON (Expecting value: line 2 column 1 (char 11))"},
        {BAD_ROW: "line 5 holds a list; expected an object"},
    ]
    assert read(b'{"a": NaN}', "jsonl")[0] == [{"a": None}]


def test_parquet(tmp_path: Path) -> None:
    pq.write_table(
        pa.table({"image": [{"bytes": b"x", "path": "a"}] * 5, "label": [1, 2, 3, 4, None]}),
        tmp_path / "t.parquet",
        row_group_size=2,
    )
    rows = list(read_rows(tmp_path / "t.parquet", "parquet", "labels"))
    assert [row["label"] for row in rows] == [1, 2, 3, 4, None]
    assert rows[0]["image"] == {"bytes": b"x", "path": "a"}


def test_a_table_is_read_as_it_is_asked_for() -> None:
    class Endless(io.RawIOBase):
        def readable(self) -> bool:
            return True

        def readinto(self, buffer: Any) -> int:
            line = b"a.jpg,cat\n"
            buffer[: len(line)] = line
            return len(line)

    rows = read_rows(io.BufferedReader(Endless()), "csv", "labels")
    assert [next(rows) for _ in range(1000)][-1] == {"a.jpg": "a.jpg", "cat": "cat"}


def test_kinds_by_suffix() -> None:
    names = ("a.CSV", "a.tsv", "a.parquet", "a.json", "a.jsonl", "a.ndjson", "a.txt", "csv")
    kinds = ["csv", "csv", "parquet", "json", "jsonl", "jsonl", "list", None]
    assert [guess_table_kind(name) for name in names] == kinds


def test_whole_numbers_beyond_a_double_stay_as_they_are() -> None:
    assert [to_text(v) for v in (1e300, float("inf"), 10**20)] == ["1e+300", "inf", "1" + "0" * 20]


@pytest.mark.parametrize(
    "reference",
    ["../a.jpg", "/etc/passwd", "C:\\a.jpg", "~/a.jpg", "file:///a", "a\0.jpg", "..\\a.jpg", "", "b/../../a"],
)
def test_references_stay_below_their_folder(tmp_path: Path, reference: str) -> None:
    with pytest.raises(ImageError, match="leaves its folder; expected a path below it") as caught:
        ImageFolder(tmp_path).find(reference)
    assert caught.value.reason_code == "unsafe_path"


def test_references_are_found_by_path_stem_and_name(tmp_path: Path) -> None:
    for name in ("a.jpg", "sub/b.PNG", "sub/c.jpg", "other/c.jpg", "notes.txt", "noend"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    (tmp_path / "out.jpg").symlink_to("/etc/hostname")
    folder = ImageFolder(tmp_path)
    found = {
        ref: folder.find(ref)
        for ref in ("a", "./a.jpg", "sub\\b.PNG", "sub/b", "b", "b.PNG", "noend", "sub/c", "notes", "d")
    }
    assert {ref: path.name if path else None for ref, path in found.items()} == {
        **{"a": "a.jpg", "./a.jpg": "a.jpg", "sub\\b.PNG": "b.PNG", "sub/b": "b.PNG", "b": "b.PNG", "b.PNG": "b.PNG"},
        **{"noend": "noend", "sub/c": "c.jpg", "notes": None, "d": None},
    }
    with pytest.raises(ImageError, match=r"reference c: fits 2 files: other/c\.jpg, sub/c\.jpg; expected one file"):
        folder.find("c")
    with pytest.raises(ImageError, match="is a link that leaves its folder"):
        folder.find("out")


def test_a_plan_that_has_read_rows_is_stored_in_a_cursor_as_before() -> None:
    found = RowPlan("file", ("label",), side="split")
    before = asdict(found)
    assert (found.read_labels({"label": "cat"}), found.read_side({"split": "dev"})) == (("cat",), "val")
    assert asdict(found) == before
    assert (found.read_labels({"label": "cat"}), found.read_side({"split": "dev"})) == (("cat",), "val")
