"""The answers for files as a table: JSON lines, CSV, Parquet, or CSV in a competition's form."""

import csv
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from visionloop.errors import DiskError, SourceError
from visionloop.ingest.paths.names import escape_name
from visionloop.predict.files import FilePrediction
from visionloop.predictor import Predictor
from visionloop.records import FORMULA, encode_line
from visionloop.workfolder import check_place, write_through

ROWS_AT_ONCE = 512
# How a table is written, by the suffix of its name; `kaggle` is asked for by name.
SUFFIXES = {".jsonl": "jsonl", ".csv": "csv", ".parquet": "parquet"}
KAGGLE = "kaggle"


@dataclass(frozen=True)
class Table:
    """A table of answers to be written to `out`: as jsonl, csv, parquet, or csv in a competition's form (kaggle)."""

    out: Path
    form: str

    @classmethod
    def plan(cls, out: Path | None, form: str | None) -> "Table | None":
        """Choose the form by the name, or check the one that is asked for; None without a name.

        Raises:
            SourceError: the form does not fit. DiskError: no file can be written there.
        """
        if out is None:
            if form:
                raise SourceError("--format", "needs a file to write", "--out FILE.csv", "Pass --out.")
            return None
        by_suffix = SUFFIXES.get(out.suffix.lower())
        if by_suffix is None:
            raise SourceError("--out", f"got {out.name!r}", f"a file that ends in {', '.join(SUFFIXES)}")
        if form not in (None, KAGGLE):
            raise SourceError("--format", f"got {form!r}", f"{KAGGLE}; other forms go by the end of --out's name")
        if form == KAGGLE and by_suffix != "csv":
            raise SourceError("--out", f"got {out.name!r}", f"a .csv file, as --format {KAGGLE} is one")
        check_place(out, f"--out {out}")
        return cls(out, form or by_suffix)

    def describe(self, total: int, unusable: int) -> str:
        """Say how many rows there are, and what stands in those of files that could not be used."""
        rows = f"{total:,} row{'s' * (total != 1)}"
        if not unusable:
            return rows
        instead = "the same probability for every class" if self.form == KAGGLE else "the reason"
        return f"{rows}, {unusable:,} of them with {instead}"

    def write(self, answers: Iterable[FilePrediction], predictor: Predictor) -> None:
        """Write the answers, whole or not at all. One chunk of them is in memory.

        csv: path, prediction, confidence, error, one column a class. parquet: the same with the bundle. Several labels
        are one text in `prediction`, divided by `|`; jsonl and parquet have them as a list too. kaggle: the name
        without its suffix as `id`, and one column a class; a file that could not be used gets the same probability for
        every class, because a competition refuses a table without its row. An id stays as it is, also one like `=1+1`
        that a spreadsheet would take for a formula: a competition compares ids letter by letter. A path like it is
        written as `./=1+1`, which names the same file.

        Raises:
            DiskError: it cannot be written.
        """
        write = {"jsonl": _write_lines, "csv": _write_csv, KAGGLE: _write_kaggle, "parquet": _write_parquet}[self.form]
        try:
            write_through(self.out, lambda file: write(answers, file, predictor))
        except OSError as exc:
            todo = "Make room, then run it again: the answers are kept."
            raise DiskError(f"--out {self.out}", f"cannot be written ({exc.strerror})", "a file", todo) from exc


def make_id(path: str) -> str:
    """Return the id of an image in a competition: its name without folder and suffix."""
    return Path(path).stem


def check_ids(files: Sequence[Path]) -> None:
    seen: dict[str, Path] = {}
    for path in files:
        other = seen.setdefault(make_id(str(path)), path)
        if other != path:
            raise SourceError(
                f"--format {KAGGLE}",
                f"{escape_name(str(other))} and {escape_name(str(path))} have the same id {make_id(path.name)!r}",
                "names that differ without folder and suffix",
                "Name one folder, or write .csv or .jsonl, which hold the whole path.",
            )


def make_line(a: FilePrediction, bundle: str) -> dict[str, Any]:
    """Return an answer as it stands in .jsonl."""
    answer = a.prediction.to_json() if a.prediction else {}
    return {"path": a.path, **answer, **(a.video or {}), "error": a.error, "bundle": bundle}


def _write_lines(answers: Iterable[FilePrediction], file: BinaryIO, predictor: Predictor) -> None:
    for a in answers:
        file.write(encode_line(make_line(a, predictor.digest)).encode() + b"\n")


def _write_csv(answers: Iterable[FilePrediction], file: BinaryIO, predictor: Predictor) -> None:
    classes = predictor.card.classes
    header = ["path", "prediction", "confidence", "abstained", "error", "bundle", *(f"p_{c}" for c in classes)]
    _write_rows(file, header, (_make_row(a, classes, predictor.digest) for a in answers))


def _make_row(a: FilePrediction, classes: Sequence[str], bundle: str) -> list[Any]:
    p = a.prediction
    if p is None:
        return [_defuse_path(a.path), "", "", "", a.error, bundle, *[""] * len(classes)]
    shares = [f"{p.probabilities[c]:.6f}" for c in classes]
    return [_defuse_path(a.path), p.prediction, f"{p.confidence:.6f}", p.abstained or "", "", bundle, *shares]


def _defuse_path(path: str) -> str:
    """Keep a spreadsheet from running a path as a formula."""
    return f"./{path}" if path.startswith(FORMULA) else path


def _write_kaggle(answers: Iterable[FilePrediction], file: BinaryIO, predictor: Predictor) -> None:
    classes = predictor.card.classes
    unknown = dict.fromkeys(classes, 1 / len(classes))

    def make_row(a: FilePrediction) -> list[str]:
        p = a.prediction.probabilities if a.prediction else unknown
        return [make_id(a.path), *(f"{p[c]:.8g}" for c in classes)]

    _write_rows(file, ["id", *classes], (make_row(a) for a in answers))


def _write_rows(file: BinaryIO, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    text = io.TextIOWrapper(file, encoding="utf-8", newline="")
    writer = csv.writer(text)
    writer.writerow(header)
    writer.writerows(rows)
    text.detach()  # writes what it holds, and leaves the file open


def _write_parquet(answers: Iterable[FilePrediction], file: BinaryIO, predictor: Predictor) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    classes = predictor.card.classes
    several = predictor.card.task == "multilabel"
    fields = [("path", pa.string()), ("prediction", pa.string()), ("confidence", pa.float64())]
    fields += [("abstained", pa.string()), ("error", pa.string())]
    fields += [("labels", pa.list_(pa.string()))] if several else []
    fields += [("bundle", pa.string()), *((f"p_{c}", pa.float32()) for c in classes)]
    schema = pa.schema(fields)

    def make_row(a: FilePrediction) -> dict[str, Any]:
        row: dict[str, Any] = {"path": a.path, "error": a.error, "bundle": predictor.digest}
        if p := a.prediction:
            row |= {
                "prediction": p.prediction,
                "confidence": p.confidence,
                "labels": p.labels,
                "abstained": p.abstained,
            }
            row |= {f"p_{c}": p.probabilities[c] for c in classes}
        return row

    waiting: list[dict[str, Any]] = []
    with pq.ParquetWriter(file, schema) as writer:
        for answer in answers:
            waiting.append(make_row(answer))
            if len(waiting) == ROWS_AT_ONCE:
                writer.write_table(pa.Table.from_pylist(waiting, schema=schema))
                waiting.clear()
        if waiting:
            writer.write_table(pa.Table.from_pylist(waiting, schema=schema))
