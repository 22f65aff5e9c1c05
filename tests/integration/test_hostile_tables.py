"""Tables that were made to harm: each is refused in the way that is expected, and writes nothing."""

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fakes import make_image
from source_runs import run_source
from visionloop.errors import SourceError

PHOTO = make_image(1)


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Path]:
    """A workspace; nothing may be written outside of it, nor into it."""
    (tmp_path / "ws").mkdir()
    yield tmp_path / "ws"
    assert {path.parent.name for path in tmp_path.rglob("*")} <= {tmp_path.name, "ws"}
    assert {path.stem for path in (tmp_path / "ws").iterdir()} == {"labels", "1"}


def parquet(**columns: Any) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns), buffer)
    return buffer.getvalue()


def broken_parquet() -> bytes:
    data = bytearray(parquet(file=["1.png"], label=["cat"]))
    data[20:-60] = b"\xff" * (len(data) - 80)
    return bytes(data)


TABLES: dict[str, tuple[str, bytes, str]] = {
    "nothing": ("csv", b"", "is empty"),
    "header only": ("csv", b"file,label\n", "has no row"),
    "only line ends": ("csv", b"\n\r\n\n", "is empty"),
    "NUL bytes": ("csv", b"file,label\n1.png,c\0t\n", "line 2: holds a NUL byte"),
    "UTF-16 without its mark": ("csv", "file,label\n1.png,cat\n".encode("utf-16-le"), "line 1: holds a NUL byte"),
    "UTF-16 cut in half": (
        "csv",
        "file,label\n1.png,cat\n".encode("utf-16")[:-1],
        "is not the UTF-16 that its mark says",
    ),
    "a line of 17 MiB": ("csv", b"file,label\n" + b"x" * (17 << 20), "has a line of more than 16 MiB"),
    "a cell of 200 kB": (
        "csv",
        b"file,label\n1.png," + b"x" * 200_000,
        r"line 2: is not CSV \(field larger than field limit",
    ),
    "quote that never ends": (
        "csv",
        b'file,label\n"1.png,cat\n' + b"2.png,dog\n" * 9,
        r"is not CSV \(unexpected end of data",
    ),
    "text after a quote": ("csv", b'file,label\n"1.png"x,cat\n', r"line 2: is not CSV"),
    "two columns of one name": ("csv", b"file,label,label\n1.png,cat,dog\n", "has two columns named label"),
    "a million columns": ("csv", b"," * 1_000_000 + b"\n", "has 1,000,001 columns; expected at most 10,000"),
    "two encodings": ("csv", b"file,label\n1.png,\xc3\xb6\n1.png,\xf6\n", "line 3: is not UTF-8, the lines before are"),
    "an image as a table": ("csv", PHOTO, "(NUL byte|not CSV|cannot tell)"),
    "deep JSON": ("json", b"[" * 200_000, r"is not JSON \(nested too deep"),
    "JSON of one number": ("json", b"7", "holds a number; expected a list of objects"),
    "JSON with two lists": ("json", b'{"a": [1], "b": [2]}', "is an object with 2 lists"),
    "a number of a million digits": (
        "json",
        b'[{"file": ' + b"9" * 1_000_000 + b"}]",
        r"is not JSON \(Exceeds the limit",
    ),
    "JSON lines that are none": ("jsonl", b"file,label\n1.png,cat\n", r"line 1 is not JSON"),
    "Parquet that is none": ("parquet", b"PAR1" + b"\xff" * 100 + b"PAR1", "is not Parquet"),
    "Parquet that breaks off": ("parquet", parquet(file=["1.png"], label=["cat"])[:-20], "is not Parquet"),
    "Parquet with a broken body": ("parquet", broken_parquet(), "is not Parquet"),
    "an image that is a list": (
        "parquet",
        parquet(file=[["1.png"]], label=["cat"]),
        "cannot tell which column is the image",
    ),
}
ROWS: dict[str, tuple[str, str]] = {
    "../../etc/passwd": ("unsafe_path", "leaves its folder"),
    "/etc/passwd": ("unsafe_path", "leaves its folder"),
    "file:///etc/passwd": ("unsafe_path", "leaves its folder"),
    "\\\\server\\share\\1.png": ("unsafe_path", "leaves its folder"),
    "C:\\Windows\\1.png": ("unsafe_path", "leaves its folder"),
    "=HYPERLINK('http://x.org')": ("row_without_image", "no image"),
    "|cat /etc/passwd": ("row_without_image", "no image"),
    "x" * 5000: ("unsafe_path", "leaves its folder"),
    "a\x1b[2J.png": ("unsafe_path", "leaves its folder"),
}


@pytest.mark.parametrize("case", TABLES)
def test_table_that_is_refused(home: Path, case: str) -> None:
    suffix, data, message = TABLES[case]
    (home / "1.png").write_bytes(PHOTO)
    (home / f"labels.{suffix}").write_bytes(data)
    with pytest.raises(SourceError, match=message) as caught:
        run_source(home, kind="table", path=f"labels.{suffix}")
    assert len(str(caught.value)) < 700


@pytest.mark.parametrize("cell", ROWS, ids=lambda cell: ascii(cell)[:30])
def test_row_that_is_refused_among_good_ones(home: Path, cell: str) -> None:
    code, reason = ROWS[cell]
    (home / "1.png").write_bytes(PHOTO)
    (home / "labels.csv").write_text(f'file,label\n1.png,cat\n"{cell}",cat\n', newline="")
    run = run_source(home, kind="table", path="labels.csv", columns={"image": "file"})
    assert run.facts() == [("1.png", ("cat",), None)]
    assert run.codes() == [("labels.csv row 2", code)]
    assert reason in run.rejected[0].reason
    assert run.rejected[0].reason.isprintable()
