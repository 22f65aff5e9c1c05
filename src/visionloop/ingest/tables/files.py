"""Read CSV, Parquet, JSON and JSON lines row by row, within limits. Knows nothing of what the columns mean.

A row is a dict. A line that cannot be a row (too few cells, half a JSON object) does not end the table: it comes as
`{BAD_ROW: reason}`. An error of the whole file is a SourceError.
"""

import codecs
import csv
import io
import json
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO, Literal

from visionloop.errors import SourceError, shorten

TableKind = Literal["csv", "parquet", "json", "jsonl"]

BAD_ROW = "\0bad row"
MAX_LINE = 16 << 20
MAX_JSON_BYTES = 256 << 20
MAX_COLUMNS = 10_000
MAX_ROWS = 50_000_000
BATCH_BYTES = 32 << 20
DELIMITERS = ",;\t|"
SUFFIXES: dict[str, TableKind] = {
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
    ".json": "json",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
}


def guess_table_kind(name: str) -> TableKind | None:
    """Return the kind of a table by the suffix of its file, or None."""
    return SUFFIXES.get(name[name.rfind(".") :].lower())


def read_rows(
    data: BinaryIO | Path, kind: TableKind, where: str, tell: Callable[[str], None] = lambda line: None
) -> Iterator[dict[str, Any]]:
    """Yield the rows of a table, read as they are asked for. `data` is a file's path or an open binary stream.

    A CSV has a header and cells of text; all else has values of its own kinds.

    Raises:
        SourceError: the file cannot be read, is not of its kind, or is beyond the limits.
    """
    if isinstance(data, Path):
        try:
            with data.open("rb") as stream:
                yield from read_rows(stream, kind, where, tell)
        except OSError as exc:
            raise SourceError(where, f"cannot be read ({exc.strerror})", "a table", "Check the path.") from exc
        return
    readers = {"csv": _read_csv, "jsonl": _read_jsonl, "json": _read_json, "parquet": _read_parquet}
    for number, row in enumerate(readers[kind](data, where, tell)):
        if number >= MAX_ROWS:
            raise SourceError(where, f"has more than {MAX_ROWS:,} rows", "fewer", "Divide it into several sources.")
        yield row


def _decode_lines(stream: BinaryIO, where: str, tell: Callable[[str], None]) -> Iterator[str]:
    """Yield lines of text with their ends: UTF-8, UTF-16 if a mark says so, else Latin-1 (told). Raises SourceError."""
    start = stream.read(4)
    head = io.BytesIO(start)
    if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        yield from _decode_utf16(head, stream, where)
        return
    head.seek(3 if start.startswith(codecs.BOM_UTF8) else 0)
    encoding, plain = "utf-8", True
    for number, line in enumerate(_split_lines(head.read(), stream, where), start=1):
        try:
            text = line.decode(encoding)
        except UnicodeDecodeError as exc:
            if not plain:
                raise SourceError(
                    f"{where} line {number}", "is not UTF-8, the lines before are", "UTF-8", "Save it as UTF-8."
                ) from exc
            tell(f"{where}: not UTF-8 from line {number} on, so taken as Latin-1; save it as UTF-8 to be sure")
            encoding, text = "latin-1", line.decode("latin-1")
        plain = plain and line.isascii()
        if "\0" in text:
            raise SourceError(f"{where} line {number}", "holds a NUL byte", "text in UTF-8", "Save it as UTF-8.")
        yield text


def _split_lines(start: bytes, stream: BinaryIO, where: str) -> Iterator[bytes]:
    """Yield lines of at most MAX_LINE bytes; `start` was read from the stream before. Raises SourceError."""
    *whole, rest = start.splitlines(keepends=True) or [b""]
    yield from whole
    if rest.endswith(b"\n"):
        yield rest
        rest = b""
    while line := rest + stream.readline(MAX_LINE + 1):
        if len(line) > MAX_LINE:
            raise SourceError(where, f"has a line of more than {MAX_LINE >> 20} MiB", "one row a line", "Divide it.")
        yield line
        rest = b""


def _decode_utf16(head: BinaryIO, stream: BinaryIO, where: str) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-16")()
    rest = ""
    try:
        for block in chain([head.read()], iter(lambda: stream.read(1 << 16), b"")):
            *lines, rest = (rest + decoder.decode(block)).split("\n")
            yield from (f"{line}\n" for line in lines)
            if len(rest) > MAX_LINE:
                raise SourceError(
                    where, f"has a line of more than {MAX_LINE >> 20} MiB", "one row a line", "Divide it."
                )
        rest += decoder.decode(b"", final=True)
    except UnicodeDecodeError as exc:
        raise SourceError(where, "is not the UTF-16 that its mark says", "UTF-8", "Save it as UTF-8.") from exc
    if rest:
        yield rest


def _read_csv(stream: BinaryIO, where: str, tell: Callable[[str], None]) -> Iterator[dict[str, Any]]:
    lines = _decode_lines(stream, where, tell)
    first = next((line for line in lines if line.strip()), None)
    if first is None:
        raise SourceError(where, "is empty", "a header and a row for each image", "Check the file.")
    delimiter = _guess_delimiter(first)
    rows = csv.reader(chain([first], lines), delimiter=delimiter, strict=True)
    try:
        header = _check_header(next(rows), where)
        for cells in rows:
            if not any(cells):
                continue
            if len(cells) != len(header):
                yield {BAD_ROW: f"line {rows.line_num} has {len(cells)} cells; expected {len(header)}"}
            else:
                yield dict(zip(header, cells, strict=True))
    except csv.Error as exc:
        raise SourceError(
            f"{where} line {rows.line_num}",
            f"is not CSV ({exc})",
            f"cells of at most {csv.field_size_limit():,} characters, each quote closed",
            "Edit the line.",
        ) from exc


def _guess_delimiter(header: str) -> str:
    """Return the delimiter that divides the header into most cells, quoted text left out."""
    outside = "".join(header.split('"')[::2])
    return max(DELIMITERS, key=outside.count)


def _check_header(cells: list[str], where: str) -> list[str]:
    """Return the names of the columns; one without a name is called by its place. Raises SourceError."""
    if len(cells) > MAX_COLUMNS:
        raise SourceError(where, f"has {len(cells):,} columns", f"at most {MAX_COLUMNS:,}", "Check the delimiter.")
    header = [cell.strip() or f"column {place}" for place, cell in enumerate(cells, start=1)]
    if twice := sorted(
        {name[:80] for name in header if header.count(name) > 1} if len(set(header)) < len(header) else ()
    ):
        raise SourceError(where, f"has two columns named {shorten(twice)}", "a name for each", "Rename one.")
    return header


def _read_jsonl(stream: BinaryIO, where: str, tell: Callable[[str], None]) -> Iterator[dict[str, Any]]:
    seen = False
    for number, line in enumerate(_decode_lines(stream, where, tell), start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line, parse_constant=_no_constant)
        except (ValueError, RecursionError) as exc:
            value, reason = None, f"line {number} is not JSON ({_describe(exc)})"
        else:
            reason = f"line {number} holds a {_name_kind(value)}; expected an object"
        if not isinstance(value, dict):
            if not seen:
                raise SourceError(where, reason, "a JSON object on each line", "Check the file.")
            value = {BAD_ROW: reason}
        seen = True
        yield value


def _read_json(stream: BinaryIO, where: str, tell: Callable[[str], None]) -> Iterator[dict[str, Any]]:
    data = stream.read(MAX_JSON_BYTES + 1)
    if len(data) > MAX_JSON_BYTES:
        raise SourceError(
            where, f"is larger than {MAX_JSON_BYTES >> 20} MiB", "a smaller file", "Save it as JSON lines or Parquet."
        )
    try:
        value = json.loads(data, parse_constant=_no_constant)
    except (ValueError, RecursionError) as exc:
        raise SourceError(where, f"is not JSON ({_describe(exc)})", "a list of objects", "Check the file.") from exc
    if isinstance(value, dict):
        lists = {key: part for key, part in value.items() if isinstance(part, list) and part}
        if len(lists) != 1:
            found = f"is an object with {len(lists)} lists"
            raise SourceError(where, found, "a list of objects, or an object that holds one", "Save it as JSON lines.")
        key, value = lists.popitem()
        tell(f"{where}: rows taken from {key[:80]!r}")
    if not isinstance(value, list):
        raise SourceError(where, f"holds a {_name_kind(value)}", "a list of objects", "Check the file.")
    for number, row in enumerate(value, start=1):
        yield row if isinstance(row, dict) else {BAD_ROW: f"row {number} is a {_name_kind(row)}; expected an object"}


def _no_constant(name: str) -> None:
    """Read NaN and Infinity as None: they are no JSON, but pandas writes them."""


def _describe(exc: Exception) -> str:
    return "nested too deep" if isinstance(exc, RecursionError) else str(exc)[:120]


def _name_kind(value: object) -> str:
    names = {dict: "object", list: "list", str: "text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "number")


def _read_parquet(stream: BinaryIO, where: str, tell: Callable[[str], None]) -> Iterator[dict[str, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(stream)
        if len(file.schema_arrow.names) > MAX_COLUMNS:
            raise SourceError(where, "has too many columns", f"at most {MAX_COLUMNS:,}", "Check the file.")
        for group in range(file.num_row_groups):
            facts = file.metadata.row_group(group)
            row_bytes = max(1, facts.total_byte_size // max(1, facts.num_rows))
            batch_rows = max(1, min(4096, BATCH_BYTES // row_bytes))
            for batch in file.iter_batches(batch_rows, row_groups=[group]):
                yield from batch.to_pylist()
    except (pa.ArrowException, OSError, OverflowError, MemoryError) as exc:
        reason = str(exc).splitlines()[0][:160] if str(exc) else type(exc).__name__
        raise SourceError(where, f"is not Parquet ({reason})", "a Parquet file", "Check the file.") from exc
