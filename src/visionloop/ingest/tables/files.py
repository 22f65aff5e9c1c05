"""Read CSV, text lists, Parquet, JSON and JSON lines row by row, within limits. Does not know what columns mean.

A row is a dict. A line that cannot be a row (too few cells, half a JSON object) does not end the table: it comes as
`{BAD_ROW: reason}`. An error of the whole file is a SourceError.
"""

import csv
import json
import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any, BinaryIO, Literal

from visionloop.errors import SourceError, describe_first_line, shorten
from visionloop.ingest.paths.names import IMAGE_SUFFIXES
from visionloop.ingest.tables.json_shapes import find_rows, name_kind
from visionloop.ingest.tables.text_lines import decode_lines, settle_encoding

TableKind = Literal["csv", "parquet", "json", "jsonl", "list"]

BAD_ROW = "\0bad row"
MAX_LIST_LINE = 10_000
MAX_JSON_BYTES = 256 << 20
MAX_COLUMNS = 10_000
MAX_ROWS = 50_000_000
BATCH_BYTES = 32 << 20
DELIMITERS = ",;\t|"
TEXT_KINDS = ("csv", "json", "jsonl", "list")
SUFFIXES: dict[str, TableKind] = {
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
    ".json": "json",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".txt": "list",
}
# What people keep labels in that is read by nothing here, and what to do.
FOREIGN_TABLES = {
    ".pdf": ("a PDF", "Take the images out (`pdfimages -all FILE.pdf images/`), and sort them into class folders."),
    **dict.fromkeys(
        (".xlsx", ".xls", ".xlsm", ".ods", ".numbers"),
        ("a spreadsheet", "In Excel: File > Save As > CSV UTF-8; then give that file."),
    ),
    **dict.fromkeys(
        (
            ".pkl",
            ".pickle",
            ".npy",
            ".npz",
            ".pt",
            ".mat",
            ".h5",
            ".hdf5",
            ".feather",
            ".arrow",
            ".tfrecord",
            ".rds",
            ".lmdb",
            ".pth",
        ),
        ("data of a program, which may run code or holds no names", "Save it as CSV: a column file, a column label."),
    ),
    **dict.fromkeys(
        (".xml", ".yaml", ".yml", ".sqlite", ".sqlite3", ".db", ".mdb"),
        ("not a table we read", "Save it as CSV: a column file, a column label. For a database use a source `sql`."),
    ),
}
SEP_LINE = re.compile(r'^"?sep=(.)"?\s*$', re.IGNORECASE)
_SUFFIX = rf"\.(?:{'|'.join(sorted(suffix[1:] for suffix in IMAGE_SUFFIXES))})"
LIST_LINE = re.compile(rf"^(?P<file>.*?{_SUFFIX})(?:(?:\s*[,;]\s*|\s+)(?P<label>.*\S))?\s*$", re.IGNORECASE)


def guess_table_kind(name: str) -> TableKind | None:
    """Return the kind of a table by the suffix of its file, or None."""
    return SUFFIXES.get(name[name.rfind(".") :].lower())


def read_rows(
    data: BinaryIO | Path,
    kind: TableKind,
    where: str,
    tell: Callable[[str], None] = lambda line: None,
    encoding: str | None = None,
) -> Iterator[dict[str, Any]]:
    """Yield the rows of a table, read as they are asked for. `data` is a file's path or an open binary stream.

    A CSV has a header and cells of text; all else has values of its own kinds. `encoding`: of the text; None: guessed.

    Raises:
        SourceError: the file cannot be read, is not of its kind, or is beyond the limits.
    """
    if isinstance(data, Path):
        try:
            with data.open("rb") as stream:
                yield from read_rows(stream, kind, where, tell, encoding)
        except OSError as exc:
            raise SourceError(where, f"cannot be read ({exc.strerror})", "a table", "Check the path.") from exc
        return
    if encoding is None and kind in TEXT_KINDS and data.seekable():
        encoding = settle_encoding(data, where, tell)
        data.seek(0)
    text = partial(decode_lines, data, where, tell, encoding)
    rows: Iterator[dict[str, Any]]
    if kind == "parquet":
        rows = _read_parquet(data, where)
    elif kind == "json":
        rows = _read_json(data, where, tell, encoding)
    else:
        rows = {"csv": _read_csv, "jsonl": _read_jsonl, "list": _read_list}[kind](text(), where)
    yield from islice(rows, MAX_ROWS)
    if next(rows, None) is not None:
        raise SourceError(where, f"has more than {MAX_ROWS:,} rows", "fewer", "Divide it into several sources.")


def _read_csv(lines: Iterator[str], where: str) -> Iterator[dict[str, Any]]:
    first = next((line for line in lines if line.strip()), None)
    named = SEP_LINE.match(first or "")  # Excel's own first line: it gives the delimiter
    if named:
        first = next((line for line in lines if line.strip()), None)
    if first is None:
        raise SourceError(where, "is empty", "a header and a row for each image", "Check the file.")
    delimiter = named[1] if named else _guess_delimiter(first)
    rows = csv.reader(chain([first], lines), delimiter=delimiter, strict=True)
    try:
        header = _check_header(next(rows), where)
        width = len(header)
        for cells in rows:
            if not any(cells):
                continue
            if len(cells) == width:
                yield dict(zip(header, cells))  # noqa: B905  (this is done a million times)
            else:
                yield {BAD_ROW: f"line {rows.line_num} has {len(cells)} cells; expected {width}"}
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
    if {"region_attributes", "file_attributes"} <= {*cells}:
        found = "is a CSV of VIA (VGG Image Annotator), which has a row for each region"
        raise SourceError(where, found, "one row for each image", "In VIA: Annotation > Export Annotations (as json).")
    header = [cell.strip() or f"column {place}" for place, cell in enumerate(cells, start=1)]
    if twice := sorted(
        {name[:80] for name in header if header.count(name) > 1} if len(set(header)) < len(header) else ()
    ):
        raise SourceError(where, f"has two columns named {shorten(twice)}", "a name for each", "Rename one.")
    return header


def _read_list(lines: Iterator[str], where: str) -> Iterator[dict[str, Any]]:
    """Yield the rows of a text file: `cat/1.jpg 0` on each line, without a header; with a header it is a CSV."""
    first = next((line for line in lines if line.strip()), "")
    if LIST_LINE.match(first.strip()) and not _split_list_line(first):
        found, todo = f"line 1 has more than a label behind the image: {first.strip()[-60:]!r}", "Save it as CSV."
        raise SourceError(where, found, "FILE LABEL, or a CSV with a header", todo)
    if not _split_list_line(first):
        yield from _read_csv(chain([first], lines), where)
        return
    for number, line in enumerate(chain([first], lines), start=1):
        if row := _split_list_line(line):
            yield row
        elif line.strip():
            yield {BAD_ROW: f"line {number} does not begin with an image's file; expected FILE LABEL"}


def _split_list_line(line: str) -> dict[str, Any] | None:
    """Return file and label of a line, or the file alone; None when the line does not begin with an image's name."""
    found = LIST_LINE.match(line.strip()) if len(line) < MAX_LIST_LINE else None
    label = (found and found["label"]) or ""
    if found is None or (len(label.split()) > 1 and label.replace(" ", "").isdecimal()) or LIST_LINE.match(label):
        return None  # several numbers, or a pair of images: not a label
    return {"file": found["file"], "label": label or None}


def _read_jsonl(lines: Iterator[str], where: str) -> Iterator[dict[str, Any]]:
    seen = False
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line, parse_constant=_no_constant)
        except (ValueError, RecursionError) as exc:
            value, reason = None, f"line {number} is not JSON ({_describe(exc)})"
        else:
            reason = f"line {number} holds a {name_kind(value)}; expected an object"
        if not isinstance(value, dict):
            if not seen:
                raise SourceError(where, reason, "a JSON object on each line", "Check the file.")
            value = {BAD_ROW: reason}
        seen = True
        yield value


def _read_json(
    stream: BinaryIO, where: str, tell: Callable[[str], None], encoding: str | None
) -> Iterator[dict[str, Any]]:
    data = stream.read(MAX_JSON_BYTES + 1)
    if len(data) > MAX_JSON_BYTES:
        raise SourceError(
            where, f"is larger than {MAX_JSON_BYTES >> 20} MiB", "a smaller file", "Save it as JSON lines or Parquet."
        )
    try:
        text = data if encoding in (None, "utf-8", "utf-16") else data.decode(encoding or "utf-8")
        value = json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError) as exc:
        raise SourceError(where, f"is not JSON ({_describe(exc)})", "a list of objects", "Check the file.") from exc
    for number, row in enumerate(find_rows(value, where, tell), start=1):
        yield row if isinstance(row, dict) else {BAD_ROW: f"row {number} is a {name_kind(row)}; expected an object"}


def _no_constant(name: str) -> None:
    """Read NaN and Infinity as None: they are no JSON, but pandas writes them."""


def _describe(exc: Exception) -> str:
    return "nested too deep" if isinstance(exc, RecursionError) else str(exc)[:120]


def _read_parquet(stream: BinaryIO, where: str) -> Iterator[dict[str, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(stream)
        if len(file.schema_arrow.names) > MAX_COLUMNS:
            raise SourceError(where, "has too many columns", f"at most {MAX_COLUMNS:,}", "Check the file.")
        names = _find_class_names(file.schema_arrow.metadata or {})
        for group in range(file.num_row_groups):
            facts = file.metadata.row_group(group)
            row_bytes = max(1, facts.total_byte_size // max(1, facts.num_rows))
            batch_rows = max(1, min(4096, BATCH_BYTES // row_bytes))
            for batch in file.iter_batches(batch_rows, row_groups=[group]):
                for row in batch.to_pylist():
                    yield {**row, **{key: _name_class(row.get(key), names[key]) for key in names}} if names else row
    except (pa.ArrowException, OSError, OverflowError, MemoryError) as exc:
        reason = describe_first_line(exc)
        raise SourceError(where, f"is not Parquet ({reason})", "a Parquet file", "Check the file.") from exc


def _find_class_names(metadata: Mapping[bytes, bytes]) -> dict[str, list[str]]:
    """Return the names of the classes by column, as Hugging Face's `datasets` writes them into the schema."""
    try:
        features = json.loads(metadata.get(b"huggingface", b"{}"))["info"]["features"]
        inner = {key: _get_inner(feature) for key, feature in features.items()}
        return {key: [*map(str, one["names"])] for key, one in inner.items() if one.get("_type") == "ClassLabel"}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}


def _get_inner(feature: Any) -> Mapping[str, Any]:
    """Return a feature, or the one inside a list of it."""
    if isinstance(feature, list) and len(feature) == 1:
        feature = feature[0]
    if isinstance(feature, dict) and isinstance(feature.get("feature"), dict):
        feature = feature["feature"]
    return feature if isinstance(feature, dict) else {}


def _name_class(value: Any, names: list[str]) -> Any:
    """Return the name of a class by its number; -1 is no label."""
    if isinstance(value, list):
        return [_name_class(one, names) for one in value]
    if isinstance(value, int) and not isinstance(value, bool) and -1 <= value < len(names):
        return names[value] if value >= 0 else None
    return value
