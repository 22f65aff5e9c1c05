"""The stage `evaluate`: runs the candidate on the test side, as the server would, and writes reports/.

    metrics.json  predictions.csv  per_class.csv  figures/*.png  report.html

Same input, same bytes. Writes nothing else into reports/, and decides nothing: the gate does that.
"""

import csv
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from visionloop.bundle import load_run_note
from visionloop.data.shards import Prepared, load_prepared
from visionloop.errors import DatasetError, shorten
from visionloop.evaluation.answers import (
    Answers,
    compute_answer_metrics,
    compute_tables,
    find_worst,
    get_truth,
    join_names,
)
from visionloop.evaluation.fonts import number_names
from visionloop.evaluation.label_metrics import count_labels
from visionloop.evaluation.metrics import ClassFigures, IntArray
from visionloop.evaluation.plots import (
    Mistake,
    draw_classes,
    draw_confidence,
    draw_confusion,
    draw_mistakes,
    draw_outcomes,
)
from visionloop.evaluation.report import ReportFacts, make_report
from visionloop.predictor import Predictor
from visionloop.records import LABEL_SEPARATOR, Card, Interval
from visionloop.workfolder import lock_work
from visionloop.workspace import Workspace

BATCH_BYTES = 32 * 1024 * 1024
BATCH_IMAGES = 64
NUM_MISTAKES = 25
MOST_GAP = 0.10  # between accuracy on val and on test
# metrics.json is moved last: if it is there, the others are too.
OUTS = ("predictions.csv", "per_class.csv", "figures", "report.html", "metrics.json")

Progress = Callable[[int, int], None]


def evaluate(
    workspace: Workspace,
    *,
    on_progress: Progress = lambda done, total: None,
    tell: Callable[[str], None] = lambda line: None,
) -> dict[str, Interval]:
    """Judge models/candidate on the prepared test side; write reports/ and log it to the candidate's MLflow run.

    Raises:
        DatasetError: no test image, or the candidate was trained on other data.
        BundleError: the candidate is damaged, or answers differently here.
        TrackingError: MLflow cannot be reached; reports/ is complete by then.
    """
    settings = workspace.settings
    prepared = load_prepared(settings.prepared_dir)
    predictor = Predictor.load(settings.candidate_dir)
    _check_fit(predictor.card, prepared)
    rows_n = _find_tests(prepared)
    answers = _answer(predictor, prepared, rows_n, on_progress)
    metrics = compute_answer_metrics(answers, workspace.params.evaluate)
    with lock_work(settings.work_dir("evaluate"), predictor.digest) as work:
        shutil.rmtree(work)
        (work / "figures").mkdir(parents=True)
        _write_outs(work, predictor, prepared, rows_n, answers, metrics=metrics)
        _move_outs(work, settings.reports_dir)
        shutil.rmtree(work)
    tell(f"on {len(rows_n):,} test images{_describe_limit(workspace)}")
    best = _log_to_run(workspace, predictor.digest, metrics)
    if "accuracy" in metrics and (line := describe_gap(best.get("best/val_accuracy"), metrics["accuracy"].value)):
        tell(line)
    return metrics


def describe_gap(val: float | None, test: float) -> str:
    """Return a line if accuracy on val (of the best epoch) and on test are far apart; else nothing."""
    if val is None or abs(val - test) <= MOST_GAP:
        return ""
    return (
        f"LOOK: accuracy is {val:.3f} on val and {test:.3f} on test, {100 * abs(val - test):.0f} points apart: the "
        "sides differ (other cameras, days or films), or are small; see `visionloop datasets show`"
    )


def _describe_limit(workspace: Workspace) -> str:
    limit = workspace.params.prepare.limit
    return f" of the subset of prepare.limit ({limit:,}); the gate judges all test images" if limit else ""


def _check_fit(card: Card, prepared: Prepared) -> None:
    """Refuse a candidate that was trained on other data than the prepared one."""
    todo = "Run `visionloop train` again."
    if card.dataset.get("digest") != prepared.pin.digest:
        raise DatasetError(
            "models/candidate",
            f"was trained on dataset version {card.dataset.get('version')} ({str(card.dataset.get('digest'))[:12]})",
            f"version {prepared.pin.version} ({prepared.pin.digest[:12]}), as data/prepared is",
            todo,
        )
    if card.task != prepared.task:
        raise DatasetError("models/candidate", f"is {card.task}", f"{prepared.task}, as data/prepared is", todo)
    if card.classes != prepared.classes:
        found, expected = shorten(card.classes), shorten(prepared.classes)
        raise DatasetError("models/candidate", f"knows the classes {found}", f"{expected}, as data/prepared has", todo)
    if (tuple(card.image_size), card.resize) != (prepared.size_hw, prepared.resize):
        found = f"takes {card.image_size[0]} x {card.image_size[1]} pixels by {card.resize}"
        expected = f"{prepared.size_hw[0]} x {prepared.size_hw[1]} by {prepared.resize}, as data/prepared is"
        raise DatasetError("models/candidate", found, expected, todo)


def _find_tests(prepared: Prepared) -> IntArray:
    rows_n = prepared.rows("test")
    if not len(rows_n):
        where = f"dataset {prepared.pin.name} version {prepared.pin.version}"
        raise DatasetError(
            where, "has no test image", "a test side", "Ingest more images, then run `visionloop prepare`."
        )
    return rows_n


def _answer(predictor: Predictor, prepared: Prepared, rows_n: IntArray, on_progress: Progress) -> Answers:
    """Run the model on some rows, in batches of limited memory."""
    size = max(1, min(BATCH_IMAGES, BATCH_BYTES // (prepared.size_hw[0] * prepared.size_hw[1] * 3)))
    parts = []
    for start in range(0, len(rows_n), size):
        images_nhwc = prepared.read(rows_n[start : start + size])
        parts.append(predictor.run(images_nhwc).probs_nk)
        on_progress(min(start + size, len(rows_n)), len(rows_n))
    probs_nk = np.concatenate(parts)
    chosen = predictor.choose(probs_nk)
    return Answers(get_truth(prepared, rows_n), probs_nk.astype(np.float64), chosen, prepared.classes)


def _write_outs(
    folder: Path,
    predictor: Predictor,
    prepared: Prepared,
    rows_n: IntArray,
    answers: Answers,
    *,
    metrics: dict[str, Interval],
) -> None:
    confusion_kk, class_figures = compute_tables(answers)
    figures = _draw_figures(prepared, rows_n, answers, confusion_kk, class_figures)
    for name, png in figures.items():
        (folder / "figures" / f"{name}.png").write_bytes(png)
    facts = ReportFacts(
        predictor.card, predictor.digest, prepared.pin, len(rows_n), metrics, class_figures, confusion_kk, figures
    )
    (folder / "report.html").write_text(make_report(facts), encoding="utf-8")
    summary = {
        **{name: interval.to_json() for name, interval in metrics.items()},
        "num_test": len(rows_n),
        "bundle": predictor.digest,
        "dataset": prepared.pin.digest,
    }
    (folder / "metrics.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    _write_predictions(folder / "predictions.csv", [prepared.sha256_n[row] for row in rows_n], answers)
    _write_class_figures(folder / "per_class.csv", class_figures)


def _draw_figures(
    prepared: Prepared,
    rows_n: IntArray,
    answers: Answers,
    confusion_kk: IntArray,
    class_figures: Sequence[ClassFigures],
) -> dict[str, bytes]:
    """Draw the figures. With several labels each class has bars instead of a confusion matrix."""
    shown = number_names(prepared.classes)
    class_figures = [replace(row, name=shown[row.name]) for row in class_figures]
    names = [shown[name] for name in prepared.classes]
    if answers.is_several:
        targets_nk, chosen_nk = answers.labels.astype(bool), answers.chosen.astype(bool)
        first = {"outcomes": draw_outcomes(count_labels(targets_nk, chosen_nk, names))}
    else:
        first = {"confusion": draw_confusion(confusion_kk, names)}
    num_wrong = int((~answers.hits_n).sum())
    return {
        **first,
        "per_class": draw_classes(class_figures),
        "confidence": draw_confidence(answers.confidence_n, answers.hits_n),
        "mistakes": draw_mistakes(_find_mistakes(prepared, rows_n, answers), num_wrong, len(rows_n)),
    }


def _find_mistakes(prepared: Prepared, rows_n: IntArray, answers: Answers) -> list[Mistake]:
    """Return the wrong answers that gave the truth the least probability, worst first."""
    worst_n = find_worst(answers, NUM_MISTAKES)
    images_nhwc = prepared.read(rows_n[worst_n])
    actual, predicted = answers.name_labels(), answers.name_chosen()
    shown = number_names(prepared.classes)
    return [
        Mistake(
            image_hwc=images_nhwc[i],
            actual=join_names([shown[name] for name in actual[n]]),
            predicted=join_names([shown[name] for name in predicted[n]]),
            confidence=float(answers.confidence_n[n]),
            verb="has" if answers.is_several else "is",
        )
        for i, n in enumerate(worst_n)
    ]


def _write_predictions(path: Path, sha256_n: Sequence[str], answers: Answers) -> None:
    """Write one row for each image. Several labels are joined by `|`."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["sha256", "actual", "predicted", "confidence"])
        rows = zip(sha256_n, answers.name_labels(), answers.name_chosen(), answers.confidence_n, strict=True)
        for sha256, *names, confidence in rows:
            writer.writerow([sha256, *map(LABEL_SEPARATOR.join, names), f"{confidence:.6f}"])


def _write_class_figures(path: Path, class_figures: Sequence[ClassFigures]) -> None:
    is_several = any(row.average_precision is not None for row in class_figures)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["class", "precision", "recall", "f1", "support", *["average_precision"][:is_several]])
        for row in class_figures:
            ratios = [f"{ratio:.6f}" for ratio in (row.precision, row.recall, row.f1)]
            more = [f"{row.average_precision:.6f}"] if row.average_precision is not None else []
            writer.writerow([row.name, *ratios, row.support, *more])


def _move_outs(work: Path, reports_dir: Path) -> None:
    """Replace each output in reports/. Other files there stay."""
    reports_dir.mkdir(parents=True, exist_ok=True)
    for name in OUTS:
        target = reports_dir / name
        if target.is_dir() and not target.is_symlink():
            shutil.rmtree(target)
        elif target.is_symlink():
            target.unlink()
        os.replace(work / name, target)


def _log_to_run(workspace: Workspace, bundle_digest: str, metrics: dict[str, Interval]) -> Mapping[str, float]:
    """Add the figures and the report to the run that trained this bundle; return its figures, if it is known here."""
    settings = workspace.settings
    note = load_run_note(settings.runs_dir, bundle_digest)
    if note is None:
        return {}
    tracking = workspace.tracking
    values = {f"test/{metric}": interval.value for metric, interval in metrics.items()}
    for bound in ("low", "high"):
        values |= {f"test/{metric}_{bound}": getattr(interval, bound) for metric, interval in metrics.items()}
    tracking.log_metrics(note.run_id, values)
    tracking.log_artifact(note.run_id, settings.reports_dir / "figures", "evaluation/figures")
    tracking.log_images(note.run_id, sorted((settings.reports_dir / "figures").glob("*.png")))
    for file in ("report.html", "metrics.json", "per_class.csv"):
        tracking.log_artifact(note.run_id, settings.reports_dir / file, "evaluation")
    return tracking.load_run(note.run_id).metrics
