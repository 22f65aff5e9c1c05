"""Baselines: what they answer, and what is said of a network that does not beat them."""

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler

from arrays import make_prepared
from visionloop.evaluation.answers import Answers
from visionloop.evaluation.baselines import (
    MAJORITY,
    Baseline,
    choose_train_rows,
    describe_baseline,
    fit_linear,
    make_baseline,
    vote,
)
from visionloop.evaluation.metrics import compute_share
from visionloop.params.gate import Gate
from visionloop.promotion.limits import check_baseline
from visionloop.records import Interval


def make_clouds(number, seed=0):
    generator = np.random.default_rng(seed)
    label_n = np.arange(number) % 3
    return generator.normal(0, 1, (number, 8)).astype(np.float32) + 1.2 * np.eye(3, 8, dtype=np.float32)[
        label_n
    ], label_n


def test_heads_answer_as_scikit_learn():
    table_nd, label_n = make_clouds(90)
    query_md, _ = make_clouds(40, seed=1)
    targets_nk = np.eye(3, dtype=np.uint8)[label_n]
    neighbours = KNeighborsClassifier(10, weights="distance", metric="cosine").fit(table_nd, label_n)
    assert vote(table_nd, targets_nk, query_md) == pytest.approx(neighbours.predict_proba(query_md), abs=1e-4)
    scaler = StandardScaler().fit(table_nd)
    for k in range(3):
        head = LogisticRegression().fit(scaler.transform(table_nd), label_n == k)
        expected = head.predict_proba(scaler.transform(query_md))[:, 1]
        assert fit_linear(table_nd, targets_nk, query_md)[:, k] == pytest.approx(expected, abs=1e-3)


def test_a_class_that_all_or_no_images_have_stops_no_head():
    table_nd, label_n = make_clouds(30)
    targets_nk = np.stack([np.ones(30), np.zeros(30), label_n == 1], axis=1).astype(np.uint8)
    probs_mk = fit_linear(table_nd * [1, 1, 1, 1, 1, 1, 1, 0], targets_nk, table_nd)
    assert probs_mk[:, :2].tolist() == [[1.0, 0.0]] * 30
    assert ((probs_mk[:, 2] > 0) & (probs_mk[:, 2] < 1)).all()


@pytest.mark.parametrize(
    ("network", "baseline", "verdict"),
    [(95, 50, "beaten"), (52, 50, "unclear"), (50, 50, "unclear"), (40, 80, "better")],
)
def test_a_baseline_is_beaten_only_by_the_whole_interval(network, baseline, verdict):
    labels_n = np.zeros(100, np.int64)
    chosen_n = (np.arange(100) >= network).astype(np.int64)
    answers = Answers(labels_n, np.full((100, 2), 0.5), chosen_n, ("a", "b"), np.arange(100))
    said_mk = np.eye(2, dtype=bool)[(np.arange(100) % 100 >= baseline).astype(int)]
    found = make_baseline("majority class", said_mk, answers)
    assert (found.verdict, found.accuracy.value) == (verdict, baseline / 100)
    assert found.gain.value == pytest.approx((network - baseline) / 100)
    line = describe_baseline(found, network / 100)
    assert bool(line) == (verdict != "beaten")
    if line:
        assert f"{network:.1f} % against {baseline:.1f} %" in line
        assert line.endswith("too few test images to say that it has learned" if network > baseline else "learned")
        assert ("nothing was learned" in line) == (network <= baseline)


@pytest.mark.parametrize(("right", "passed"), [(9, True), (8, None), (6, None), (0, False)])
def test_the_most_frequent_class_is_held_against_as_the_gate_does(right, passed):
    labels_n = (np.arange(10) + 1) % 2
    chosen_n = np.where(np.arange(10) < right, labels_n, 1 - labels_n)
    answers = Answers(labels_n, np.full((10, 2), 0.5), chosen_n, ("a", "b"), np.arange(10))
    found = make_baseline(MAJORITY, np.eye(2, dtype=bool)[np.zeros(10, int)], answers)
    accuracy = compute_share(answers.hits_n, answers.key_n)
    assert check_baseline(accuracy, found.accuracy.value, "always 'a'", Gate()).passed is passed
    assert bool(describe_baseline(found, accuracy.value)) == (passed is not True)


def test_equal_answers_may_still_hide_a_difference():
    labels_n = np.zeros(30, np.int64)
    answers = Answers(labels_n, np.full((30, 2), 0.5), labels_n, ("a", "b"), np.arange(30) // 2)
    found = make_baseline("neighbours", np.eye(2, dtype=bool)[labels_n], answers)
    assert (found.gain.low, found.gain.value, found.gain.high) == pytest.approx((-0.2039, 0, 0.2039), abs=1e-4)


def test_a_simple_head_is_named_only_where_it_is_ahead():
    behind = Baseline("neighbours", Interval(0.8, 0.7, 0.9), Interval(-0.12, -0.2, -0.06))
    assert describe_baseline(behind, 0.68) == (
        "LOOK: a simple head (neighbours) on the network's own embeddings is better: 68.0 % against 80.0 %"
    )
    even = Baseline("neighbours", Interval(0.8, 0.7, 0.9), Interval(-0.02, -0.1, 0.06))
    assert describe_baseline(even, 0.78) == (
        "a simple head (neighbours) on the network's own embeddings is as good: 78.0 % against 80.0 %"
    )
    ahead = Baseline("neighbours", Interval(0.8, 0.7, 0.9), Interval(0.02, -0.1, 0.16))
    assert describe_baseline(ahead, 0.82) == ""


@pytest.mark.parametrize(("limit", "number"), [(0, 0), (9, 8), (1000, 20), (3, 4)])
def test_training_images_are_of_every_class(tmp_path, limit, number):
    prepared = make_prepared(tmp_path)
    rows_n = choose_train_rows(prepared, limit)
    train_n = prepared.rows("train")
    assert len(rows_n) == number
    assert set(rows_n) <= set(train_n)
    if limit:
        assert set(prepared.label_n[rows_n]) == set(prepared.label_n[train_n])
        assert (np.diff(rows_n) > 0).all()
