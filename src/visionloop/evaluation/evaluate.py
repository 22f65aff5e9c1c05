"""The stage `evaluate`: the candidate's answers on the test side, as they would be served, turned into reports/.

    metrics.json  predictions.csv  per_class.csv  figures/*.png  report.html

Same input, same bytes. Writes nothing else into reports/, and decides nothing: that is the gate's.
"""

import csv
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from visionloop.data.shards import Prepared, load_prepared
from visionloop.errors import DatasetError, shorten
from visionloop.evaluation.metrics import (
    ClassFigures,
    FloatArray,
    IntArray,
    compute_class_figures,
    compute_confusion,
    compute_metrics,
)
from visionloop.evaluation.plots import Mistake, draw_classes, draw_confidence, draw_confusion, draw_mistakes
from visionloop.evaluation.report import ReportFacts, make_report
from visionloop.evaluation.run_note import load_run_note
from visionloop.params import Params
from visionloop.predictor import Predictor, choose_classes
from visionloop.records import Card, Interval
from visionloop.settings import Settings
from visionloop.tracking import Tracking
from visionloop.workfolder import lock_work

BATCH_BYTES = 32 * 1024 * 1024
BATCH_IMAGES = 64
NUM_MISTAKES = 25
# metrics.json is moved last: where it is, the rest is.
OUTS = ("predictions.csv", "per_class.csv", "figures", "report.html", "metrics.json")

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Answers:
    """The model's answers on the test side, in the order of `rows_n` of the prepared data."""

    rows_n: IntArray
    labels_n: IntArray
    probs_nk: FloatArray
    chosen_n: IntArray

    @property
    def confidence_n(self) -> FloatArray:
        return self.probs_nk[np.arange(len(self.chosen_n)), self.chosen_n]

    @property
    def hits_n(self) -> np.ndarray[tuple[int, ...], np.dtype[np.bool_]]:
        return np.asarray(self.labels_n == self.chosen_n)


def evaluate(
    settings: Settings, params: Params, *, on_progress: Progress = lambda done, total: None
) -> dict[str, Interval]:
    """Judge models/candidate on the prepared test side; write reports/ and log it to the candidate's MLflow run.

    Raises:
        DatasetError: no test image, or the candidate was trained on other data.
        BundleError: the candidate is damaged, or answers differently here.
        TrackingError: MLflow cannot be reached; reports/ is complete by then.
    """
    prepared = load_prepared(settings.prepared_dir)
    predictor = Predictor.load(settings.candidate_dir)
    _check_fit(predictor.card, prepared)
    answers = _answer_test_side(predictor, prepared, on_progress)
    section = params.evaluate
    metrics = compute_metrics(
        answers.labels_n,
        answers.probs_nk,
        answers.chosen_n,
        prepared.classes,
        resamples=section.resamples,
        seed=section.seed,
    )
    with lock_work(settings.work_dir("evaluate"), predictor.digest) as work:
        shutil.rmtree(work)
        (work / "figures").mkdir(parents=True)
        _write_outs(work, predictor, prepared, answers, metrics)
        _move_outs(work, settings.reports_dir)
        shutil.rmtree(work)
    _log_to_run(settings, params.name, predictor.digest, metrics)
    return metrics


def _check_fit(card: Card, prepared: Prepared) -> None:
    """Refuse a candidate that learned from other data than what is prepared."""
    todo = "Run `visionloop train` again."
    if card.dataset.get("digest") != prepared.pin.digest:
        raise DatasetError(
            "models/candidate",
            f"was trained on dataset version {card.dataset.get('version')} ({str(card.dataset.get('digest'))[:12]})",
            f"version {prepared.pin.version} ({prepared.pin.digest[:12]}), as data/prepared is",
            todo,
        )
    if card.classes != prepared.classes:
        found, expected = shorten(card.classes), shorten(prepared.classes)
        raise DatasetError("models/candidate", f"knows the classes {found}", f"{expected}, as data/prepared has", todo)
    if (tuple(card.image_size), card.resize) != (prepared.size_hw, prepared.resize):
        found = f"takes {card.image_size[0]} x {card.image_size[1]} pixels by {card.resize}"
        expected = f"{prepared.size_hw[0]} x {prepared.size_hw[1]} by {prepared.resize}, as data/prepared is"
        raise DatasetError("models/candidate", found, expected, todo)


def _answer_test_side(predictor: Predictor, prepared: Prepared, on_progress: Progress) -> Answers:
    """Run the model over the test side, so many images at a time that memory stays flat."""
    rows_n = prepared.rows("test")
    if not len(rows_n):
        where = f"dataset {prepared.pin.name} version {prepared.pin.version}"
        raise DatasetError(
            where, "has no test image", "a test side", "Ingest more images, then run `visionloop prepare`."
        )
    size = max(1, min(BATCH_IMAGES, BATCH_BYTES // (prepared.size_hw[0] * prepared.size_hw[1] * 3)))
    parts = []
    for start in range(0, len(rows_n), size):
        images_nhwc = prepared.read(rows_n[start : start + size])
        parts.append(predictor.run(images_nhwc).probs_nk)
        on_progress(min(start + size, len(rows_n)), len(rows_n))
    probs_nk = np.concatenate(parts)
    chosen_n = choose_classes(probs_nk, predictor.card.threshold)
    return Answers(rows_n, prepared.label_n[rows_n], probs_nk.astype(np.float64), chosen_n)


def _write_outs(
    folder: Path, predictor: Predictor, prepared: Prepared, answers: Answers, metrics: dict[str, Interval]
) -> None:
    confusion_kk = compute_confusion(answers.labels_n, answers.chosen_n, len(prepared.classes))
    class_figures = compute_class_figures(confusion_kk, prepared.classes)
    num_test, num_wrong = len(answers.hits_n), int((~answers.hits_n).sum())
    mistakes = _find_mistakes(prepared, answers)
    figures = {
        "confusion": draw_confusion(confusion_kk, prepared.classes),
        "per_class": draw_classes(class_figures),
        "confidence": draw_confidence(answers.confidence_n, answers.hits_n),
        "mistakes": draw_mistakes(mistakes, num_wrong, num_test),
    }
    for name, png in figures.items():
        (folder / "figures" / f"{name}.png").write_bytes(png)
    facts = ReportFacts(
        predictor.card, predictor.digest, prepared.pin, num_test, metrics, class_figures, confusion_kk, figures
    )
    (folder / "report.html").write_text(make_report(facts), encoding="utf-8")
    summary = {
        **{name: interval.to_json() for name, interval in metrics.items()},
        "num_test": num_test,
        "bundle": predictor.digest,
        "dataset": prepared.pin.digest,
    }
    (folder / "metrics.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    _write_predictions(folder / "predictions.csv", prepared, answers)
    _write_class_figures(folder / "per_class.csv", class_figures)


def _find_mistakes(prepared: Prepared, answers: Answers) -> list[Mistake]:
    """Return the wrong answers that gave the true class the least probability, worst first."""
    true_n = answers.probs_nk[np.arange(len(answers.labels_n)), answers.labels_n]
    wrong_n = np.flatnonzero(~answers.hits_n)
    worst_n = wrong_n[np.argsort(true_n[wrong_n], kind="stable")][:NUM_MISTAKES]
    images_nhwc = prepared.read(answers.rows_n[worst_n])
    return [
        Mistake(
            image_hwc=images_nhwc[i],
            actual=prepared.classes[answers.labels_n[n]],
            predicted=prepared.classes[answers.chosen_n[n]],
            confidence=float(answers.confidence_n[n]),
        )
        for i, n in enumerate(worst_n)
    ]


def _write_predictions(path: Path, prepared: Prepared, answers: Answers) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["sha256", "actual", "predicted", "confidence"])
        for row, label, chosen, confidence in zip(
            answers.rows_n, answers.labels_n, answers.chosen_n, answers.confidence_n, strict=True
        ):
            names = prepared.classes[label], prepared.classes[chosen]
            writer.writerow([prepared.sha256_n[row], *names, f"{confidence:.6f}"])


def _write_class_figures(path: Path, class_figures: list[ClassFigures]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["class", "precision", "recall", "f1", "support"])
        for row in class_figures:
            name, *ratios, support = asdict(row).values()
            writer.writerow([name, *(f"{ratio:.6f}" for ratio in ratios), support])


def _move_outs(work: Path, reports_dir: Path) -> None:
    """Put each out in place of the last one; other files in reports/ stay."""
    reports_dir.mkdir(parents=True, exist_ok=True)
    for name in OUTS:
        target = reports_dir / name
        if target.is_dir() and not target.is_symlink():
            shutil.rmtree(target)
        elif target.is_symlink():
            target.unlink()
        os.replace(work / name, target)


def _log_to_run(settings: Settings, name: str, bundle_digest: str, metrics: dict[str, Interval]) -> None:
    """Add the figures and the report to the run that trained this bundle, if this workspace knows it."""
    note = load_run_note(settings.runs_dir, bundle_digest)
    if note is None:
        return
    tracking = Tracking(settings.tracking_uri, settings.artifact_root, name)
    values = {f"test/{metric}": interval.value for metric, interval in metrics.items()}
    for bound in ("low", "high"):
        values |= {f"test/{metric}_{bound}": getattr(interval, bound) for metric, interval in metrics.items()}
    tracking.log_metrics(note.run_id, values)
    tracking.log_artifact(note.run_id, settings.reports_dir / "figures", "evaluation/figures")
    for file in ("report.html", "metrics.json", "per_class.csv"):
        tracking.log_artifact(note.run_id, settings.reports_dir / file, "evaluation")
