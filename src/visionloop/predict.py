"""Batch prediction: files, folders and globs through a predictor, and the answers as a table.

The answers for a table are kept in chunks until it is written, so that a run that was stopped goes on where it was.
"""

import contextlib
import csv
import fnmatch
import glob
import io
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from visionloop.data.contact_sheet import Panel, draw_prediction_sheet
from visionloop.data.fonts import number_names
from visionloop.data.inputs import load_input
from visionloop.errors import DiskError, ImageError, SourceError, shorten
from visionloop.ingest.paths.listing import list_files, list_images
from visionloop.ingest.paths.names import escape_name, is_passed
from visionloop.predictor import Predictor
from visionloop.records import Prediction, canonical_json, compute_digest
from visionloop.workfolder import lock_work, write_file, write_through

REPORT_EVERY = 64
CHUNK_IMAGES = 512
# How a table is written, by the suffix of its name; `kaggle` is asked for by name.
SUFFIXES = {".jsonl": "jsonl", ".csv": "csv", ".parquet": "parquet"}
KAGGLE = "kaggle"
SHEET_IMAGES, SHEET_BARS = 24, 10


@dataclass(frozen=True)
class FilePrediction:
    """The answer for one file: a prediction, or the reason why there is none."""

    path: str
    prediction: Prediction | None
    error: str | None = None


@dataclass(frozen=True)
class Table:
    """A table of answers to be written to `out`: as jsonl, csv, parquet, or csv in a competition's form (kaggle)."""

    out: Path
    form: str

    @classmethod
    def plan(cls, out: Path | None, form: str | None) -> "Table | None":
        """Choose the form by the name, or check the one that is asked for; None without a name. Raises SourceError."""
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
        if not out.parent.is_dir():
            raise SourceError(f"--out {out}", f"there is no folder {out.parent}", "one", "Make it, or check the path.")
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
        that a spreadsheet would take for a formula: a competition compares ids letter by letter.

        Raises:
            DiskError: it cannot be written.
        """
        write = {"jsonl": _write_lines, "csv": _write_csv, KAGGLE: _write_kaggle, "parquet": _write_parquet}[self.form]
        try:
            write_through(self.out, lambda file: write(answers, file, predictor))
        except OSError as exc:
            todo = "Name another file, or make room; then run it again."
            raise DiskError(f"--out {self.out}", f"cannot be written ({exc.strerror})", "a file", todo) from exc


def find_new(paths: Sequence[str], folder: Path) -> tuple[list[Path], Path]:
    """Return the images of `paths` that no table in a folder answers yet, and the next table: 000001.parquet, ...

    A table bears the time at which its run began (`mtime`): a file that has changed since is answered again.

    Raises:
        SourceError: a path does not exist, or a table is damaged.
    """
    answered: dict[str, int] = {}
    tables = sorted(one for one in folder.glob("*.parquet") if one.stem.isdigit())
    for table in tables:
        answered |= dict.fromkeys(_read_paths(table), table.stat().st_mtime_ns)
    files = [one for path in paths for one in find_images([path], may_be_none=True)]
    new = [one for one in files if answered.get(escape_name(str(one)), 0) < _read_change_ns(one)]
    return list(dict.fromkeys(new)), folder / f"{int(tables[-1].stem) + 1 if tables else 1:06d}.parquet"


def _read_change_ns(path: Path) -> int:
    """Return when a file was changed, or put where it is; 0 where it is gone again."""
    with contextlib.suppress(OSError):
        return path.stat().st_ctime_ns
    return 0


def _read_paths(table: Path) -> list[str]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return [str(one) for one in pq.read_table(table, columns=["path"])["path"].to_pylist()]
    except (pa.ArrowException, OSError, KeyError) as exc:
        todo = "Remove it: then its images are answered again."
        raise SourceError(str(table), "is damaged", "a table of answers", todo) from exc


def find_images(paths: Sequence[str], *, may_be_none: bool = False) -> list[Path]:
    """Return the files that are named, the images in folders that are named, and the matches of globs, in that order.

    In folders, and below the wildcards of a glob, hidden files and systems' own are passed over and links are followed,
    as `ingest` does.

    Raises:
        SourceError: a path does not exist, or nothing matches.
    """
    files: list[Path] = []
    for text in paths:
        path = Path(text).expanduser()
        if path.is_dir():
            files += [Path(one.path) for one in list_images(path, text)[0]]
        elif path.is_file():
            files.append(path)
        elif matches := _expand(path, text):
            files += matches
        elif not (may_be_none and glob.has_magic(text)):
            raise SourceError(text, "does not exist", "an image, a folder or a glob", "Check the path.")
    if not files and not may_be_none:
        raise SourceError(shorten(list(paths)), "no image there", "image files")
    return list(dict.fromkeys(files))


def _expand(pattern: Path, text: str) -> list[Path]:
    """Return the files that a glob stands for, sorted. Raises SourceError: a folder may not be read.

    `**` goes through folders as `ingest` does: `glob` would go round in a link that leads up, 40 times.
    """
    start = next((i for i, part in enumerate(pattern.parts) if glob.has_magic(part)), len(pattern.parts))
    root, wild = Path(*pattern.parts[:start]), pattern.parts[start:]
    if "**" in wild and root.is_dir():
        below = (found.relative for found in list_files(root, text) if _fits(found.relative.split("/"), wild))
    else:
        is_hidden_wanted = any(part.startswith(".") for part in wild)
        matches = glob.iglob(str(Path(*wild)), root_dir=root)
        below = (relative for relative in matches if is_hidden_wanted or not is_passed(Path(relative).as_posix()))
    return [file for file in sorted(root / relative for relative in below) if file.is_file()]


def _fits(parts: Sequence[str], wild: Sequence[str]) -> bool:
    """Say whether a path fits a glob, part by part; `**` is any number of folders, and at the end a file too."""
    if not wild or not parts:
        return not parts and all(part == "**" for part in wild)
    if wild[0] == "**":
        return _fits(parts, wild[1:]) or _fits(parts[1:], wild)
    return fnmatch.fnmatch(parts[0], wild[0]) and _fits(parts[1:], wild[1:])


def predict_files(
    predictor: Predictor,
    files: Sequence[Path],
    *,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Iterator[FilePrediction]:
    """Yield the answers for files, in their order; a file that cannot be used gets its reason."""
    answers = predictor.predict_each(files)
    for number, (path, answer) in enumerate(zip(files, answers, strict=True), start=1):
        if number % REPORT_EVERY == 0 or number == len(files):
            on_progress(number, len(files))
        if isinstance(answer, ImageError):
            yield FilePrediction(escape_name(str(path)), None, f"{answer.found}; expected {answer.expected}")
        else:
            yield FilePrediction(escape_name(str(path)), answer)


@contextlib.contextmanager
def predict_in_chunks(
    predictor: Predictor,
    files: Sequence[Path],
    table: Table,
    folder: Path,
    *,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
    tell: Callable[[str], None] = lambda line: None,
) -> Iterator["Chunks"]:
    """Answer for files and keep the answers in `folder` until the block ends without an error.

    A run for the same table with the same model and files (paths, sizes, times) takes up the chunks that are there.

    Raises:
        SourceError: for kaggle, two files have the same id. BusyError: another process writes the same table.
    """
    if table.form == KAGGLE:
        _check_ids(files)
    place = folder / compute_digest(str(table.out.absolute()))[:16]
    with lock_work(place, _compute_key(predictor, files)) as work:
        chunks = Chunks(work)
        starts = range(0, len(files), CHUNK_IMAGES)
        found = sum(chunks.has(start) for start in starts)
        if found:
            tell(f"{min(found * CHUNK_IMAGES, len(files)):,} of {len(files):,} were answered by a run that stopped")
        for start in starts:
            if not chunks.has(start):
                part = files[start : start + CHUNK_IMAGES]
                report = partial(_report, on_progress, start, len(files))
                chunks.keep(start, predict_files(predictor, part, on_progress=report))
        yield chunks
    shutil.rmtree(place, ignore_errors=True)


def _report(on_progress: Callable[[int, int], None], start: int, total: int, done: int, _: int) -> None:
    on_progress(start + done, total)


@dataclass(frozen=True)
class Chunks:
    """The answers so far, as JSON lines, one file a chunk."""

    folder: Path

    def has(self, start: int) -> bool:
        """Say whether the chunk that begins with this file is there."""
        return self._path(start).is_file()

    def keep(self, start: int, answers: Iterable[FilePrediction]) -> None:
        """Write a chunk, whole or not at all."""
        lines = [
            canonical_json([a.path, a.prediction.to_json() if a.prediction else None, a.error]) + b"\n" for a in answers
        ]
        write_file(self._path(start), b"".join(lines))

    def read(self) -> Iterator[FilePrediction]:
        """Yield all answers, in the order of the files."""
        for path in sorted(self.folder.glob("*.jsonl")):
            with path.open(encoding="utf-8", newline="\n") as file:
                for line in file:
                    name, answer, error = json.loads(line)
                    yield FilePrediction(name, Prediction.from_json(answer) if answer else None, error)

    def _path(self, start: int) -> Path:
        return self.folder / f"{start:012d}.jsonl"


def _compute_key(predictor: Predictor, files: Sequence[Path]) -> str:
    """Return the digest of the model and of the files: their names, sizes and times."""
    facts = []
    for path in files:
        with contextlib.suppress(OSError):
            found = path.stat()
            facts.append([escape_name(str(path)), found.st_size, found.st_mtime_ns])
    return compute_digest([predictor.digest, predictor.engine, facts])


def draw_sheet(predictor: Predictor, files: Sequence[Path], *, most: int = SHEET_IMAGES) -> bytes:
    """Draw some of the images, evenly spaced, with their answers and the likeliest classes as bars, as PNG.

    Where an image's folder is named as a class, that is taken for the truth: the title is then green or red.
    """
    number = min(most, len(files))
    chosen = [files[round(i * (len(files) - 1) / max(1, number - 1))] for i in range(number)]
    panels = []
    for path, answer in zip(chosen, predictor.predict_each(chosen), strict=True):
        if not isinstance(answer, ImageError):
            panels.append(_make_panel(predictor, path, answer))
    return draw_prediction_sheet(panels, f"{len(panels)} of {len(files):,} images, bundle {predictor.digest[:12]}")


def _make_panel(predictor: Predictor, path: Path, answer: Prediction) -> Panel:
    card, truth = predictor.card, path.parent.name
    shown = number_names(card.classes)
    ranked = sorted(answer.probabilities.items(), key=lambda pair: -pair[1])[:SHEET_BARS]
    known = truth if truth in card.classes else ""
    said = answer.labels if answer.labels is not None else (answer.prediction,)
    return Panel(
        image=load_input(path, str(path), size_hw=card.image_size, resize=card.resize, max_pixels=card.max_pixels),
        title=f"{' '.join(shown[one] for one in said) or 'no label'} {answer.confidence:.0%}"
        + (f" ({shown[known]})" if known else ""),
        bars=[(shown[name], share) for name, share in ranked],
        is_right=said == (known,) if known else None,
        truth=frozenset({shown.get(known, "")}),
        note=escape_name(path.name),
    )


def make_id(path: str) -> str:
    """Return the id of an image in a competition: its name without folder and suffix."""
    return Path(path).stem


def _check_ids(files: Sequence[Path]) -> None:
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


def _write_lines(answers: Iterable[FilePrediction], file: BinaryIO, predictor: Predictor) -> None:
    for a in answers:
        answer = a.prediction.to_json() if a.prediction else {}
        row = {"path": a.path, **answer, "error": a.error, "bundle": predictor.digest}
        file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")


def _write_csv(answers: Iterable[FilePrediction], file: BinaryIO, predictor: Predictor) -> None:
    classes = predictor.card.classes
    header = ["path", "prediction", "confidence", "abstained", "error", "bundle", *(f"p_{c}" for c in classes)]
    _write_rows(file, header, (_make_row(a, classes, predictor.digest) for a in answers))


def _make_row(a: FilePrediction, classes: Sequence[str], bundle: str) -> list[Any]:
    p = a.prediction
    if p is None:
        return [a.path, "", "", "", a.error, bundle, *[""] * len(classes)]
    shares = [f"{p.probabilities[c]:.6f}" for c in classes]
    return [a.path, p.prediction, f"{p.confidence:.6f}", p.abstained or "", "", bundle, *shares]


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
            if len(waiting) == CHUNK_IMAGES:
                writer.write_table(pa.Table.from_pylist(waiting, schema=schema))
                waiting.clear()
        if waiting:
            writer.write_table(pa.Table.from_pylist(waiting, schema=schema))
