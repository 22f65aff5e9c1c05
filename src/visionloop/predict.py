"""Batch prediction: files, folders and globs through a predictor, and the answers as JSON lines or CSV."""

import contextlib
import csv
import glob
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from visionloop.errors import DiskError, ImageError, SourceError, shorten
from visionloop.ingest.paths.listing import list_images
from visionloop.ingest.paths.names import escape_name
from visionloop.predictor import Predictor
from visionloop.records import Prediction

REPORT_EVERY = 64


@dataclass(frozen=True)
class FilePrediction:
    """The answer for one file: a prediction, or the reason why there is none."""

    path: str
    prediction: Prediction | None
    error: str | None = None


def find_images(paths: Sequence[str], *, out: Path | None = None) -> list[Path]:
    """Return the files that are named, the images in folders that are named, and the matches of globs, in that order.

    In folders hidden files are passed over and links are followed, as `ingest` does.

    Raises:
        SourceError: a path does not exist, nothing matches, or `out` is no .jsonl or .csv.
    """
    if out is not None and out.suffix not in {".jsonl", ".csv"}:
        raise SourceError("--out", f"got {out.name!r}", "a file that ends in .jsonl or .csv")
    files: list[Path] = []
    for text in paths:
        path = Path(text).expanduser()
        if path.is_dir():
            files += [Path(one.path) for one in list_images(path, text)[0]]
        elif path.is_file():
            files.append(path)
        elif matches := sorted(glob.glob(str(path), recursive=True)):
            files += [Path(m) for m in matches if Path(m).is_file()]
        else:
            raise SourceError(text, "does not exist", "an image, a folder or a glob", "Check the path.")
    if not files:
        raise SourceError(shorten(list(paths)), "no image there", "image files")
    return list(dict.fromkeys(files))


def predict_files(
    predictor: Predictor,
    files: Sequence[Path],
    *,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[FilePrediction]:
    """Answer for files, in their order; a file that cannot be used gets its reason."""
    answers: list[FilePrediction] = []
    for path, answer in zip(files, predictor.predict_each(files), strict=True):
        if isinstance(answer, ImageError):
            answers.append(FilePrediction(escape_name(str(path)), None, f"{answer.found}; expected {answer.expected}"))
        else:
            answers.append(FilePrediction(escape_name(str(path)), answer))
        if len(answers) % REPORT_EVERY == 0 or len(answers) == len(files):
            on_progress(len(answers), len(files))
    return answers


def write_answers(answers: Sequence[FilePrediction], out: Path, predictor: Predictor) -> None:
    """Write the answers, whole or not at all. CSV: path, prediction, confidence, abstained, error, one column a class.

    Several labels are one text in `prediction`, divided by `|`; JSON lines have them as a list too.
    """
    staged = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with staged.open("w", newline="", encoding="utf-8") as file:
            if out.suffix == ".jsonl":
                _write_lines(answers, file, predictor.digest)
            else:
                _write_table(answers, file, predictor.card.classes)
        os.replace(staged, out)
    except OSError as exc:
        todo = "Name another file, or make room; then run it again."
        raise DiskError(f"--out {out}", f"cannot be written ({exc.strerror})", "a file", todo) from exc
    finally:
        with contextlib.suppress(OSError):
            staged.unlink(missing_ok=True)


def _write_lines(answers: Sequence[FilePrediction], file: TextIO, bundle: str) -> None:
    for a in answers:
        answer = a.prediction.to_json() if a.prediction else {}
        row = {"path": a.path, **answer, "error": a.error, "bundle": bundle}
        file.write(json.dumps(row, ensure_ascii=False) + "\n")


def _write_table(answers: Sequence[FilePrediction], file: TextIO, classes: Sequence[str]) -> None:
    writer = csv.writer(file)
    writer.writerow(["path", "prediction", "confidence", "abstained", "error", *(f"p_{c}" for c in classes)])
    for a in answers:
        p = a.prediction
        figures = [f"{p.probabilities[c]:.6f}" for c in classes] if p else [""] * len(classes)
        answer = [p.prediction, p.confidence, p.abstained or ""] if p else [""] * 3
        writer.writerow([a.path, *answer, a.error or "", *figures])
