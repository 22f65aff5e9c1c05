"""The tables of an evaluation as JSON and CSV texts. Makes texts only; classes are in the order in which people count.

metrics.json    the figures that people compare, one number each: as wide as a terminal in `dvc metrics show`
intervals.json  all figures, with their intervals, and those of each class
per_class.csv  predictions.csv
"""

import csv
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from visionloop.evaluation.answers import Answers
from visionloop.evaluation.baselines import Baseline
from visionloop.evaluation.metrics import ClassFigures
from visionloop.evaluation.resampling import IntArray
from visionloop.evaluation.runtimes import RuntimeCheck
from visionloop.evaluation.slices import SliceFigures
from visionloop.records import LABEL_SEPARATOR, Interval, make_natural_key

SHARES = ("precision", "recall", "f1")
COMPARED = ("accuracy", "macro_f1", "map", "auc", "log_loss", "ece", "answered", "answered_accuracy")


def sort_classes(class_figures: Sequence[ClassFigures]) -> list[ClassFigures]:
    """Return the classes as people count: 2 before 10."""
    return sorted(class_figures, key=lambda row: make_natural_key(row.name))


def make_metrics_json(metrics: Mapping[str, Interval], num_images: int, num_keys: int) -> str:
    """Return metrics.json: a flat object of a few numbers. `num_groups` is in it where images belong together."""
    values = {name: metrics[name].value for name in COMPARED if name in metrics}
    groups = {"num_groups": num_keys} if num_keys < num_images else {}
    return _encode({**values, "num_test": num_images, **groups})


@dataclass(frozen=True)
class Judged:
    """All that an evaluation found. `confusion_kk` has actual classes as rows (for multilabel: `compute_swaps`)."""

    metrics: Mapping[str, Interval]
    class_figures: Sequence[ClassFigures]
    confusion_kk: IntArray
    slices: Sequence[SliceFigures] = ()
    baselines: Sequence[Baseline] = ()
    runtimes: Sequence[RuntimeCheck] = ()


def make_intervals_json(facts: Mapping[str, Any], judged: Judged) -> str:
    """Return intervals.json. `facts`, JSON values, come first."""
    value = {
        **facts,
        "metrics": {name: interval.to_json() for name, interval in judged.metrics.items()},
        "classes": [_describe_class(row) for row in sort_classes(judged.class_figures)],
        "slices": [asdict(row) for row in judged.slices],
        "baselines": [{**asdict(row), "verdict": row.verdict} for row in judged.baselines],
        "runtimes": [row.to_json() for row in judged.runtimes],
    }
    return _encode(value)


def _describe_class(row: ClassFigures) -> dict[str, Any]:
    shares = {name: share.to_json() if (share := getattr(row, name)) else None for name in SHARES}
    more = {} if row.average_precision is None else {"average_precision": row.average_precision}
    return {"name": row.name, "support": row.support, **shares, **more}


def make_class_table(class_figures: Sequence[ClassFigures]) -> str:
    """Return per_class.csv. What a class has no figure of is empty."""
    is_several = any(row.average_precision is not None for row in class_figures)
    bounds = [f"{name}_{bound}" for name in SHARES for bound in ("low", "high")]
    head = ["class", *SHARES, "support", *["average_precision"][:is_several], *bounds]
    rows = []
    for row in sort_classes(class_figures):
        shares = [getattr(row, name) for name in SHARES]
        values = [share.value if share else None for share in shares]
        limits = [limit for share in shares for limit in ((share.low, share.high) if share else (None, None))]
        rows.append([row.name, *values, row.support, *[row.average_precision][:is_several], *limits])
    return _write_table(head, rows)


def make_slice_table(slices: Sequence[SliceFigures]) -> str:
    """Return slices.csv, the lowest accuracy first."""
    rows = [[s.name, s.num_images, s.num_keys, s.accuracy.value, s.accuracy.low, s.accuracy.high] for s in slices]
    return _write_table(["slice", "images", "groups", "accuracy", "accuracy_low", "accuracy_high"], rows)


def make_prediction_table(sha256_n: Sequence[str], answers: Answers) -> str:
    """Return predictions.csv: one row for each image. Several labels are joined by `|`."""
    columns = zip(sha256_n, answers.name_labels(), answers.name_chosen(), answers.confidence_n, strict=True)
    rows = [[sha256, *map(LABEL_SEPARATOR.join, names), float(confidence)] for sha256, *names, confidence in columns]
    return _write_table(["sha256", "actual", "predicted", "confidence"], rows)


def _write_table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return a table as CSV: numbers with six places, None as nothing."""
    sink = io.StringIO()
    writer = csv.writer(sink, lineterminator="\n")
    writer.writerow(head)
    writer.writerows([f"{value:.6f}" if isinstance(value, float) else value for value in row] for row in rows)
    return sink.getvalue()


def _encode(value: Mapping[str, Any]) -> str:
    return json.dumps(value, indent=2, allow_nan=False) + "\n"
