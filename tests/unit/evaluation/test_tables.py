"""The tables: flat figures for dvc, intervals beside them, classes in the order in which people count."""

import csv
import io
import json

import numpy as np

from visionloop.evaluation.answers import Answers
from visionloop.evaluation.metrics import ClassFigures, compute_class_figures
from visionloop.evaluation.tables import (
    Judged,
    make_class_table,
    make_intervals_json,
    make_metrics_json,
    make_prediction_table,
)
from visionloop.records import Interval, make_natural_key

METRICS = {"accuracy": Interval(0.9, 0.8, 0.95), "ece": Interval(0.1, None, None)}


def test_metrics_are_flat_numbers():
    found = json.loads(make_metrics_json(METRICS, 256, 16))
    assert found == {"accuracy": 0.9, "ece": 0.1, "num_test": 256, "num_groups": 16}
    assert "num_groups" not in json.loads(make_metrics_json(METRICS, 256, 256))


def test_metrics_fit_into_a_line_of_a_terminal():
    """As `dvc metrics show` lays them out: columns two apart, values with five digits."""
    binary = ("accuracy", "balanced_accuracy", "macro_f1", "micro_f1", "weighted_f1", "log_loss", "brier", "ece", "auc")
    metrics = dict.fromkeys((*binary, "pr_auc", "precision", "recall"), Interval(0.98765, 0.9, 1.0))
    names = list(json.loads(make_metrics_json(metrics, 256, 16)))
    assert names == ["accuracy", "macro_f1", "auc", "log_loss", "ece", "num_test", "num_groups"]
    assert len("  ".join(["reports/metrics.json", *(name.ljust(7) for name in names)])) <= 90


def test_intervals_hold_what_cannot_be_told_as_null():
    row = ClassFigures("a", None, Interval(0.5, 0.25, 0.75), Interval(0.5, None, None), 8)
    found = json.loads(make_intervals_json({"num_test": 8}, Judged(METRICS, [row], np.zeros((1, 1)))))
    assert found["num_test"] == 8
    assert found["metrics"]["ece"] == {"value": 0.1, "low": None, "high": None}
    assert found["classes"] == [
        {
            "name": "a",
            "support": 8,
            "precision": None,
            "recall": {"value": 0.5, "low": 0.25, "high": 0.75},
            "f1": {"value": 0.5, "low": None, "high": None},
        }
    ]


def test_classes_that_are_numbers_are_in_their_order_and_nothing_is_empty():
    labels_n = np.array([0] * 6 + [1] * 6)
    text = make_class_table(compute_class_figures(labels_n, labels_n, ("10", "2", "=x"), np.arange(12)))
    rows = list(csv.DictReader(io.StringIO(text)))
    assert [row["class"] for row in rows] == ["2", "10", "=x"]
    assert (rows[0]["f1"], rows[0]["support"], rows[0]["recall_low"]) == ("1.000000", "6", "0.609666")
    assert [rows[2][name] for name in ("precision", "recall", "f1", "support", "f1_low")] == ["", "", "", "0", ""]


def test_names_are_sorted_as_people_count():
    names = ["class 10", "b", "10", "class 2", "2", "007", "a", "", "-"]
    assert sorted(names, key=make_natural_key) == ["", "2", "007", "10", "-", "a", "b", "class 2", "class 10"]
    assert sorted(["9" * 5000, "1"], key=make_natural_key)[0] == "1"


def test_predictions_name_truth_and_answer():
    answers = Answers(
        np.array([0, 1]), np.array([[0.75, 0.25], [0.9, 0.1]]), np.array([0, 0]), ("a", "b"), np.arange(2)
    )
    assert make_prediction_table(["s1", "s2"], answers).splitlines() == [
        "sha256,actual,predicted,confidence",
        "s1,a,a,0.750000",
        "s2,b,a,0.900000",
    ]
