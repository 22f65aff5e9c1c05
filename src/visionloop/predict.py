"""Batch prediction: files, folders and globs through a predictor, and the answers as JSON lines or CSV."""

import csv
import glob
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from visionloop.bundle import download_bundle
from visionloop.errors import ImageError, PromotionError, SourceError, shorten
from visionloop.ingest.paths.listing import IMAGE_SUFFIXES
from visionloop.parallel import map_parallel
from visionloop.predictor import Predictor
from visionloop.promotion.ledger import read_champion
from visionloop.records import Prediction
from visionloop.workspace import Workspace

BATCH = 64


@dataclass(frozen=True)
class FilePrediction:
    """The answer for one file: a prediction, or the reason why there is none."""

    path: str
    prediction: Prediction | None
    error: str | None = None


def find_images(paths: Sequence[str], *, out: Path | None = None) -> list[Path]:
    """Return the files that are named, the images in folders that are named, and the matches of globs, in that order.

    Raises:
        SourceError: a path does not exist, nothing matches, or `out` is no .jsonl or .csv.
    """
    if out is not None and out.suffix not in {".jsonl", ".csv"}:
        raise SourceError("--out", f"got {out.name!r}", "a file that ends in .jsonl or .csv")
    files: list[Path] = []
    for text in paths:
        path = Path(text).expanduser()
        if path.is_dir():
            files += sorted(p for p in path.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file())
        elif path.is_file():
            files.append(path)
        elif matches := sorted(glob.glob(str(path), recursive=True)):
            files += [Path(m) for m in matches if Path(m).is_file()]
        else:
            raise SourceError(text, "does not exist", "an image, a folder or a glob", "Check the path.")
    if not files:
        raise SourceError(shorten(list(paths)), "no image there", "JPEG, PNG or WebP files")
    return list(dict.fromkeys(files))


def load_champion(workspace: Workspace) -> Predictor:
    """Fetch the champion's bundle, check it and load it.

    Raises:
        PromotionError: there is no champion yet.
        BundleError: its bundle is damaged.
    """
    entry = read_champion(workspace.store, workspace.name)
    if entry is None:
        raise PromotionError(
            f"ledger {workspace.name}",
            "has no champion",
            "a promoted model",
            "Run `python flows/retrain.py`, or name a bundle with --bundle.",
        )
    bundle = download_bundle(workspace.store, entry.bundle, workspace.settings.hidden_dir / "bundles")
    return Predictor.load(bundle.folder, expected_digest=entry.bundle)


def predict_files(
    predictor: Predictor,
    files: Sequence[Path],
    *,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[FilePrediction]:
    """Answer for files, a batch at a time, in their order; a file that cannot be used gets its reason."""
    answers: list[FilePrediction] = []
    for start in range(0, len(files), BATCH):
        batch = files[start : start + BATCH]
        decoded = list(map_parallel(lambda path: _decode(predictor, path), batch))
        arrays = [d for d in decoded if isinstance(d, np.ndarray)]
        predictions = iter(predictor.answer(predictor.run_batches(np.stack(arrays))) if arrays else [])
        for path, one in zip(batch, decoded, strict=True):
            good = isinstance(one, np.ndarray)
            answers.append(
                FilePrediction(str(path), next(predictions)) if good else FilePrediction(str(path), None, str(one))
            )
        on_progress(len(answers), len(files))
    return answers


def write_answers(answers: Sequence[FilePrediction], out: Path, predictor: Predictor) -> None:
    """Write the answers, whole or not at all. CSV: path, prediction, confidence, error, one column a class.

    Several labels are one text in `prediction`, divided by `|`; JSON lines have them as a list too.
    """
    classes = predictor.card.classes
    staged = out.with_name(f".{out.name}.{os.getpid()}")
    out.parent.mkdir(parents=True, exist_ok=True)
    with staged.open("w", newline="", encoding="utf-8") as file:
        if out.suffix == ".jsonl":
            for a in answers:
                answer = a.prediction.to_json() if a.prediction else {}
                row = {"path": a.path, **answer, "error": a.error, "bundle": predictor.digest}
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
        else:
            writer = csv.writer(file)
            writer.writerow(["path", "prediction", "confidence", "error", *(f"p_{c}" for c in classes)])
            for a in answers:
                p = a.prediction
                figures = [f"{p.probabilities[c]:.6f}" for c in classes] if p else [""] * len(classes)
                writer.writerow([a.path, p.prediction if p else "", p.confidence if p else "", a.error or "", *figures])
    os.replace(staged, out)


def _decode(predictor: Predictor, path: Path) -> np.ndarray | str:
    try:
        return predictor.decode(path.read_bytes(), path.name)
    except ImageError as exc:
        return f"{exc.found}; expected {exc.expected}"
    except OSError as exc:
        return f"cannot be read ({exc.strerror})"
