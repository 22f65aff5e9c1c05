"""The stage `evaluate`: runs the candidate on the test side, as the server would, and writes reports/.

    metrics.json  intervals.json  predictions.csv  per_class.csv  slices.csv  figures/*.png  report.html

Same input, same bytes. Writes nothing else into reports/, and decides nothing: the gate does that.

.visionloop/work/evaluate/<digest of the graph>/engines/   what the network gave, for the same one with another card
"""

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from visionloop.bundle import MODEL, load_run_note
from visionloop.confidence import describe_limit
from visionloop.data.fonts import number_names
from visionloop.data.shards import Prepared, load_prepared
from visionloop.errors import DatasetError, shorten
from visionloop.evaluation.answers import (
    Answers,
    compute_answer_metrics,
    compute_answered,
    compute_tables,
    find_worst,
    get_truth,
    join_names,
)
from visionloop.evaluation.baselines import compute_baselines, describe_baseline
from visionloop.evaluation.confidence_plots import describe_answered, draw_certainty
from visionloop.evaluation.label_metrics import count_labels
from visionloop.evaluation.metrics import ClassFigures
from visionloop.evaluation.plots import (
    Mistake,
    draw_classes,
    draw_confidence,
    draw_confusion,
    draw_mistakes,
    draw_outcomes,
)
from visionloop.evaluation.report import (
    Judged,
    ReportFacts,
    make_class_table,
    make_intervals_json,
    make_metrics_json,
    make_prediction_table,
    make_report,
    make_slice_table,
)
from visionloop.evaluation.resampling import IntArray, code_keys, count_keys, describe_images
from visionloop.evaluation.runtimes import KeptOutputs, RuntimeCheck, describe_runtimes, open_runtimes
from visionloop.evaluation.slices import MEASURES, compute_slice_figures, make_slices, measure_images
from visionloop.evaluation.thresholds import PLAIN, sweep_thresholds
from visionloop.params import Evaluate
from visionloop.predictor import FloatArray, Keep, Predictor
from visionloop.records import Card, ImageRecord, Interval, make_natural_key
from visionloop.workfolder import DONE, lock_work, write_file
from visionloop.workspace import Workspace

BATCH_BYTES = 32 * 1024 * 1024
BATCH_IMAGES = 64
NUM_MISTAKES = 25
MOST_GAP = 0.10  # between accuracy on val and on test, or at the card's threshold and at the best one
HIGH_AUC = 0.9
# metrics.json is moved last: if it is there, the others are too.
OUTS = ("predictions.csv", "per_class.csv", "slices.csv", "figures", "report.html", "intervals.json", "metrics.json")

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
    bundle = Predictor.load(settings.candidate_dir).bundle
    _check_fit(bundle.card, prepared)
    rows_n = _find_tests(prepared)
    with lock_work(settings.work_dir("evaluate"), bundle.files[MODEL]) as work:
        kept = KeptOutputs(work / "engines", tell)
        with kept.saving():
            predictor = Predictor(bundle, keep=kept.open)
            seen = _look(predictor, prepared, rows_n, on_progress, kept.open)
            judged = _judge(predictor, prepared, seen, workspace.params.evaluate)
        shutil.rmtree(work / "outs", ignore_errors=True)
        (work / "outs" / "figures").mkdir(parents=True)
        _write_outs(work / "outs", predictor, prepared, seen, judged)
        _move_outs(work / "outs", settings.reports_dir)
        shutil.rmtree(work / "outs")
        write_file(work / DONE, b"{}")
    card, answers, metrics = predictor.card, seen.answers, dict(judged.metrics)
    tell(f"on {describe_images(len(rows_n), count_keys(answers.key_n), 'test images')}{_describe_limit(workspace)}")
    lines = [describe_baseline(baseline, metrics["accuracy"].value) for baseline in judged.baselines]
    if line := describe_threshold(card, answers, metrics):
        lines = [line]  # the network is not what the baselines beat then
    for line in [describe_answered(card, metrics), *lines, *describe_runtimes(judged.runtimes)]:
        if line:
            tell(line)
    best = _log_to_run(workspace, predictor.digest, metrics)
    # The epochs' accuracy is that at 0.5: next to another threshold it says nothing of the sides.
    val = (
        best.get("best/val_accuracy") if {card.threshold, *(card.thresholds or {}).values()} <= {None, PLAIN} else None
    )
    if "accuracy" in metrics and (line := describe_gap(val, metrics["accuracy"].value)):
        tell(line)
    return metrics


def describe_threshold(card: Card, answers: Answers, metrics: Mapping[str, Interval]) -> str:
    """Return a line if a binary model tells the classes apart, and its threshold makes its answers wrong; else nothing.

    The other threshold is the best one for these very images, so it names the cause and is no value to take over.
    """
    auc, accuracy = metrics.get("auc"), metrics["accuracy"].value if "accuracy" in metrics else 0.0
    if card.threshold is None or auc is None or auc.value < HIGH_AUC:
        return ""
    truth_n = answers.labels == 1
    sweep = sweep_thresholds(answers.probs_nk[:, 1], truth_n)
    wrong_c = sweep.extra_c + sweep.missed_c
    best = int(wrong_c.argmin())
    reached = 1 - float(wrong_c[best]) / len(truth_n)
    if reached - accuracy <= MOST_GAP:
        return ""
    return (
        f"LOOK: accuracy is {accuracy:.3f} at the card's threshold of {card.classes[1]}, "
        f"{describe_limit(card.threshold)}, and would be {reached:.3f} at {describe_limit(float(sweep.cut_c[best]))} "
        f"(area under the curve {auc.value:.3f}): the threshold is the cause, not the network; see `train.threshold` "
        "in params.yaml"
    )


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


@dataclass(frozen=True)
class _Seen:
    """What one pass over the test images gives: answers, embeddings (n, d), measures (n,), and other runtimes."""

    rows_n: IntArray
    answers: Answers
    records: list[ImageRecord]
    embedding_nd: FloatArray
    measures: dict[str, NDArray[np.float64]]
    runtimes: list[RuntimeCheck]


def _look(predictor: Predictor, prepared: Prepared, rows_n: IntArray, on_progress: Progress, keep: Keep) -> _Seen:
    """Run the model on some rows, in batches of limited memory, here and in the other runtimes."""
    size = max(1, min(BATCH_IMAGES, BATCH_BYTES // (prepared.size_hw[0] * prepared.size_hw[1] * 3)))
    records = prepared.load_records(rows_n)
    runtimes = open_runtimes(predictor, keep)
    theirs: list[list[FloatArray]] = [[] for _ in runtimes]
    outputs, measures = [], []
    for start in range(0, len(rows_n), size):
        images_nhwc = prepared.read(rows_n[start : start + size])
        outputs.append(predictor.run(images_nhwc))
        measures.append(measure_images(images_nhwc))
        for runtime, parts in zip(runtimes, theirs, strict=True):
            parts.extend(runtime.compare(images_nhwc, outputs[-1], predictor))
        on_progress(min(start + size, len(rows_n)), len(rows_n))
    probs_nk = np.concatenate([part.probs_nk for part in outputs])
    answers = Answers(
        get_truth(prepared, rows_n),
        probs_nk.astype(np.float64),
        predictor.choose(probs_nk),
        prepared.classes,
        code_keys([record.key for record in records]),
        None if predictor.card.abstain is None else np.concatenate([part.abstained_n for part in outputs]),
    )
    for runtime, parts in zip(runtimes, theirs, strict=True):
        if parts:
            runtime.judge(np.concatenate(parts), probs_nk, answers.labels, prepared.classes)
    joined = {name: np.concatenate([part[name] for part in measures]) for name in MEASURES}
    return _Seen(rows_n, answers, records, np.concatenate([part.embedding_nd for part in outputs]), joined, runtimes)


def _judge(predictor: Predictor, prepared: Prepared, seen: _Seen, section: Evaluate) -> Judged:
    """Compute all that the reports say."""
    answers, limit = seen.answers, section.baseline_images
    confusion_kk, class_figures = compute_tables(answers)
    return Judged(
        metrics={**compute_answer_metrics(answers, section), **compute_answered(answers)},
        class_figures=class_figures,
        confusion_kk=confusion_kk,
        slices=compute_slice_figures(make_slices(seen.records, seen.measures), answers.hits_n, answers.key_n),
        baselines=compute_baselines(predictor, prepared, answers, seen.embedding_nd, limit=limit),
        runtimes=seen.runtimes,
    )


def _write_outs(folder: Path, predictor: Predictor, prepared: Prepared, seen: _Seen, judged: Judged) -> None:
    rows_n, answers = seen.rows_n, seen.answers
    figures = _draw_figures(prepared, rows_n, answers, judged.confusion_kk, judged.class_figures)
    figures |= draw_certainty(predictor.bundle, answers)
    for name, png in figures.items():
        (folder / "figures" / f"{name}.png").write_bytes(png)
    num_keys = count_keys(answers.key_n)
    images = describe_images(len(rows_n), num_keys, "test images")
    report = ReportFacts(predictor.card, predictor.digest, prepared.pin, images, judged, figures)
    facts = {
        "bundle": predictor.digest,
        "dataset": prepared.pin.digest,
        "num_test": len(rows_n),
        "num_groups": num_keys,
    }
    texts = {
        "metrics.json": make_metrics_json(judged.metrics, len(rows_n), num_keys),
        "intervals.json": make_intervals_json(facts, judged),
        "predictions.csv": make_prediction_table([prepared.sha256_n[row] for row in rows_n], answers),
        "per_class.csv": make_class_table(judged.class_figures),
        "slices.csv": make_slice_table(judged.slices),
        "report.html": make_report(report),
    }
    for name, text in texts.items():
        (folder / name).write_bytes(text.encode())


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
        order_k = sorted(range(len(names)), key=lambda k: make_natural_key(prepared.classes[k]))
        first = {"confusion": draw_confusion(confusion_kk[np.ix_(order_k, order_k)], [names[k] for k in order_k])}
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
    # Without the bounds, which intervals.json has: MLflow draws a chart of each figure, before those of the epochs.
    tracking.log_metrics(note.run_id, {f"test/{metric}": interval.value for metric, interval in metrics.items()})
    tracking.log_artifact(note.run_id, settings.reports_dir / "figures", "evaluation/figures")
    tracking.log_images(note.run_id, sorted((settings.reports_dir / "figures").glob("*.png")))
    for file in ("report.html", "metrics.json", "intervals.json", "per_class.csv", "slices.csv"):
        tracking.log_artifact(note.run_id, settings.reports_dir / file, "evaluation")
    return tracking.load_run(note.run_id).metrics
