"""Lines of a text that is read in blocks: whole, in order, counted, and none too long, wherever a block ends."""

import io
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from visionloop.errors import SourceError
from visionloop.ingest.tables import text_lines
from visionloop.ingest.tables.files import read_rows
from visionloop.ingest.tables.text_lines import decode_lines, settle_encoding


@settings(max_examples=300)
@given(st.text("ab\n\r,\u2028\x85猫é", max_size=40), st.integers(1, 9), st.sampled_from([None, "utf-8", "utf-16"]))
def test_lines_are_those_of_the_text_wherever_blocks_end(text: str, block: int, encoding: str | None) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_lines, "BLOCK", block)
        lines = [*decode_lines(io.BytesIO(text.encode(encoding or "utf-8")), "t", lambda line: None, encoding)]
    assert lines == re.findall(r"[^\n]*\n|[^\n]+", text)


@pytest.mark.parametrize("block", [1, 7, 1 << 18])
@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"a\nb\n\nc\xe9d\ne\n", r"t line 4: is not utf-8, its `encoding`"),
        (b"a\nb\nc\0d\ne\n", r"t line 3: holds a NUL byte"),
        (b"a\n" + b"b" * 20 + b"\nc\n", "t: has a line of more than"),
        (b"a\n" + b"b" * 20, "t: has a line of more than"),
    ],
)
def test_a_bad_line_is_named_by_its_number(
    monkeypatch: pytest.MonkeyPatch, block: int, data: bytes, message: str
) -> None:
    monkeypatch.setattr(text_lines, "BLOCK", block)
    monkeypatch.setattr(text_lines, "MAX_LINE", 16)
    with pytest.raises(SourceError, match=message):
        list(decode_lines(io.BytesIO(data), "t", lambda line: None, "utf-8"))


@pytest.mark.parametrize("block", [1, 7, 1 << 18])
def test_the_first_line_that_is_not_utf8_has_its_number(monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr(text_lines, "BLOCK", block)
    told: list[str] = []
    data = "file,label\n1.jpg,dog\n2.jpg,café\n3.jpg,crème brûlée\n".encode("cp1252")
    assert settle_encoding(io.BytesIO(data), "t", told.append) == "cp1252"
    assert told[0].startswith("t: not UTF-8 from line 3 on, so taken as Windows-1252")


@pytest.mark.parametrize("block", [1, 5, 1 << 18])
def test_a_cell_of_several_lines_is_one_cell(monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr(text_lines, "BLOCK", block)
    rows = read_rows(
        io.BytesIO(b'file,note\r\n1.jpg,"a\nb\r\n\xe7\x8c\xab"\r\n2.jpg,c\r\n'), "csv", "t", encoding="utf-8"
    )
    assert [*rows] == [{"file": "1.jpg", "note": "a\nb\r\n猫"}, {"file": "2.jpg", "note": "c"}]
