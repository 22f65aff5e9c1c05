"""The report: one self-contained page, in which names are never executed."""

import csv
import io
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest

from fakes import make_card
from visionloop.evaluation.answers import Answers
from visionloop.evaluation.baselines import Baseline
from visionloop.evaluation.label_metrics import compute_label_figures, compute_swaps
from visionloop.evaluation.metrics import ClassFigures, compute_class_figures
from visionloop.evaluation.report import (
    Judged,
    ReportFacts,
    make_class_table,
    make_intervals_json,
    make_metrics_json,
    make_prediction_table,
    make_report,
)
from visionloop.evaluation.runtimes import RuntimeCheck
from visionloop.evaluation.slices import SliceFigures
from visionloop.records import Interval, Pin, make_natural_key

CLASSES = ("<script>alert(1)</script>", 'b" onload="x', "c")
CONFUSION = np.array([[8, 2, 0], [0, 10, 0], [1, 0, 4]])
LABELS, CHOSEN = np.repeat(np.argwhere(CONFUSION >= 0), CONFUSION.ravel(), axis=0).T


class Tags(HTMLParser):
    def __init__(self):
        super().__init__()
        self.stack, self.seen, self.attributes = [], [], []

    def handle_starttag(self, tag, attrs):
        self.seen.append(tag)
        self.attributes += attrs
        if tag not in {"meta", "img"}:
            self.stack.append(tag)

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag


@pytest.fixture
def facts() -> ReportFacts:
    return ReportFacts(
        card=replace(make_card(CLASSES, (32, 48)), params={"backbone": "small_cnn", "seed": 3}),
        bundle_digest="ab" * 32,
        pin=Pin("digits", 4, "cd" * 32, 1797, CLASSES),
        images="25 test images in 5 groups",
        judged=Judged(
            metrics={"accuracy": Interval(0.88, 0.70, 0.9584), "log_loss": Interval(0.5, 0.25, 0.75)},
            class_figures=compute_class_figures(LABELS, CHOSEN, CLASSES, np.arange(25)),
            confusion_kk=CONFUSION,
        ),
        figures={"confusion": b"png one", "mistakes": b"png two"},
    )


def test_a_setting_that_is_not_set_is_a_dash(facts: ReportFacts) -> None:
    page = make_report(replace(facts, card=replace(facts.card, params={"train": {"freeze": None}})))
    assert '<td>train.freeze</td><td class="value">-</td>' in page


def change(facts: ReportFacts, **judged: Any) -> str:
    return make_report(replace(facts, judged=replace(facts.judged, **judged)))


def test_page_is_whole_and_names_cannot_break_out(facts):
    tags = Tags()
    page = make_report(facts)
    tags.feed(page)
    assert tags.stack == []
    assert "script" not in tags.seen
    assert not [name for name, _ in tags.attributes if name.startswith("on")]
    assert "&lt;script&gt;alert(1)" in page


def test_page_loads_nothing_from_anywhere(facts):
    tags = Tags()
    page = make_report(facts)
    tags.feed(page)
    sources = [value for name, value in tags.attributes if name in {"src", "href"}]
    assert sources == ["data:image/png;base64,cG5nIG9uZQ==", "data:image/png;base64,cG5nIHR3bw=="]
    assert not re.search(r"https?:|url\(|@import", page)
    assert "prefers-color-scheme: dark" in page


def test_page_says_figures_intervals_and_digests(facts):
    page = make_report(facts)
    for text in ("88.0 %", "70.0 % … 95.8 %", "0.500", "0.250 … 0.750", "ab" * 32, "cd" * 32, "small_cnn", "32 x 48"):
        assert text in page


def test_confusions_come_most_frequent_first(facts):
    page = make_report(facts)
    table = page[page.index("Most frequent confusions") : page.index("<h2>Classes")]
    assert re.findall(r"<td>(\d+)</td>", table) == ["2", "1"]
    assert "20.0 %" in table


def test_classes_come_worst_first(facts):
    page = make_report(facts)
    table = page[page.index("<h2>Classes") :]
    f1 = [figures.f1.value for figures in facts.judged.class_figures]
    assert sorted(range(3), key=f1.__getitem__) == [0, 2, 1]
    places = [table.index(f"<td>{start}") for start in ("&lt;script", "c</td>", "b&quot;")]
    assert places == sorted(places)


def test_what_cannot_be_told_is_no_number(facts):
    none = ClassFigures("nobody", None, None, None, 0)
    metrics = {"macro_f1": Interval(0.5, None, None), "ece": Interval(0.1, None, None)}
    page = change(facts, class_figures=[*facts.judged.class_figures, none], metrics=metrics)
    assert "<td>nobody</td><td>&ndash;</td><td>&ndash;</td><td>&ndash;</td><td>0</td>" in page
    assert "<b>50.0 %</b><span>too few images</span>" in page
    assert "<b>0.100</b><span>no interval</span>" in page
    assert "3 classes, 25 test images in 5 groups of dataset version 4" in page


def test_classes_have_intervals_and_numbers_are_in_their_order(facts):
    same = [replace(facts.judged.class_figures[2], name=name) for name in ("10", "2", "9")]
    page = change(facts, class_figures=same)
    table = page[page.index("<h2>Classes") :]
    assert re.findall(r"<td>(\d+)</td><td class", table) == ["2", "9", "10"]
    assert "80.0 % <small>38 … 96</small>" in table  # recall: 4 of 5


def test_slices_baselines_and_runtimes_are_told(facts):
    page = change(
        facts,
        slices=[SliceFigures("source=<b>", 40, 5, Interval(0.5, 0.25, 0.75))],
        baselines=[Baseline("majority class", Interval(0.4, 0.2, 0.6), Interval(0.48, -0.1, 0.9))],
        runtimes=[RuntimeCheck("openvino fp32", None)],
    )
    assert "<td>source=&lt;b&gt;</td>" in page
    assert "50.0 % <small>25 … 75</small></td><td>40</td><td>5</td>" in page
    assert "<td>+48.0 points (-10.0 … +90.0)</td><td>no clear difference</td>" in page
    assert "<td>does not load</td>" in page
    assert "Slices" not in make_report(facts)
    Tags().feed(page)


def test_same_facts_give_same_bytes(facts):
    assert make_report(facts) == make_report(facts)


def test_several_labels_are_told_as_such(facts):
    targets_nk = np.array([[1, 1, 0], [0, 1, 0], [0, 0, 1]], bool)
    chosen_nk = np.array([[1, 0, 1], [0, 1, 0], [0, 0, 1]], bool)
    card = replace(facts.card, task="multilabel", thresholds={**dict.fromkeys(CLASSES, 0.5), "c": 0.25})
    judged = Judged(
        metrics={"accuracy": Interval(0.5, 0.4, 0.6), "map": Interval(0.7, 0.6, 0.8)},
        class_figures=compute_label_figures(targets_nk, targets_nk / 2, chosen_nk, CLASSES, np.arange(3)),
        confusion_kk=compute_swaps(targets_nk, chosen_nk),
    )
    page = make_report(replace(facts, card=card, judged=judged, figures={"outcomes": b"png"}))
    assert "Accuracy (exact match)" in page
    assert "Mean average precision</span><b>70.0 %" in page
    assert '<td>b&quot; onload=&quot;x</td><td class="text">c</td><td>1</td>' in page  # missed, said instead
    assert "<th>average precision</th>" in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt; 0.500, b&quot; onload=&quot;x 0.500, c 0.250" in page
    Tags().feed(page)


def test_parameters_are_named_as_in_the_file(facts):
    sections = {"train": {"backbone": "small_cnn", "neighbours": {"k": 5}}, "prepare": {"limit": None}}
    card = replace(facts.card, params=sections, network={"backbone": "small_cnn"})
    page = make_report(replace(facts, card=card))
    for key, value in (("train.backbone", "small_cnn"), ("train.neighbours.k", "5"), ("prepare.limit", "-")):
        assert f'<td>{key}</td><td class="value">{value}</td>' in page
    assert "dataset version 4, small_cnn</p>" in page


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
