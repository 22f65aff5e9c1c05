"""Metrics against scikit-learn, against naive code, and in edge cases."""

import numpy as np
import pytest
from sklearn import metrics as reference

from visionloop.evaluation.metrics import (
    compute_calibration_error,
    compute_class_figures,
    compute_confidence_bins,
    compute_confusion,
    compute_equal_bins,
    compute_log_losses,
    compute_macro_f1,
    compute_metrics,
)


def make_answers(num_images, num_classes, seed=0, skill=2.0):
    generator = np.random.default_rng(seed)
    labels_n = generator.integers(0, num_classes, num_images)
    logits_nk = generator.normal(size=(num_images, num_classes))
    logits_nk[np.arange(num_images), labels_n] += skill
    probs_nk = np.exp(logits_nk)
    probs_nk /= probs_nk.sum(axis=1, keepdims=True)
    return labels_n, probs_nk, probs_nk.argmax(axis=1)


@pytest.mark.parametrize("num_classes", [2, 3, 10])
def test_values_equal_scikit_learn(num_classes):
    labels_n, probs_nk, chosen_n = make_answers(300, num_classes)
    classes = [f"c{i}" for i in range(num_classes)]
    found = compute_metrics(labels_n, probs_nk, chosen_n, classes, np.arange(300), resamples=100, seed=0)
    expected = {
        "accuracy": reference.accuracy_score(labels_n, chosen_n),
        "balanced_accuracy": reference.balanced_accuracy_score(labels_n, chosen_n),
        "macro_f1": reference.f1_score(labels_n, chosen_n, average="macro"),
        "micro_f1": reference.f1_score(labels_n, chosen_n, average="micro"),
        "weighted_f1": reference.f1_score(labels_n, chosen_n, average="weighted"),
        "log_loss": reference.log_loss(labels_n, probs_nk),
        "brier": reference.brier_score_loss(labels_n, probs_nk, labels=range(num_classes), scale_by_half=False),
    }
    for k in (3, 5):
        if k < num_classes:
            expected[f"top_{k}"] = reference.top_k_accuracy_score(labels_n, probs_nk, k=k)
    if num_classes == 2:
        expected["auc"] = reference.roc_auc_score(labels_n, probs_nk[:, 1])
        expected["pr_auc"] = reference.average_precision_score(labels_n, probs_nk[:, 1])
        expected["precision"] = reference.precision_score(labels_n, chosen_n)
        expected["recall"] = reference.recall_score(labels_n, chosen_n)
    ece = found.pop("ece")
    assert (0 < ece.value < 0.5, ece.low, ece.high) == (True, None, None)
    assert {name: interval.value for name, interval in found.items()} == pytest.approx(expected, abs=1e-12)
    assert all(i.low < i.value < i.high for i in found.values())


def test_auc_counts_ties_half():
    labels_n, probs_nk, _ = make_answers(200, 2)
    coarse_nk = probs_nk.round(1)
    found = compute_metrics(labels_n, coarse_nk, coarse_nk.argmax(1), ("x", "y"), np.arange(200), resamples=100, seed=0)
    assert found["auc"].value == pytest.approx(reference.roc_auc_score(labels_n, coarse_nk[:, 1]), abs=1e-12)


def test_class_figures_equal_scikit_learn():
    labels_n, _, chosen_n = make_answers(150, 6, skill=0.5)
    chosen_n[chosen_n == 4] = 1
    confusion_kk = compute_confusion(labels_n, chosen_n, 6)
    found = compute_class_figures(labels_n, chosen_n, list("abcdef"), np.arange(150))
    columns = reference.precision_recall_fscore_support(labels_n, chosen_n, labels=range(6), zero_division=0)
    assert confusion_kk.tolist() == reference.confusion_matrix(labels_n, chosen_n).tolist()
    rows = np.array([(f.precision.value, f.recall.value, f.f1.value, f.support) for f in found if f.precision])
    np.testing.assert_allclose(rows, np.delete(np.transpose(columns), 4, axis=0), atol=1e-12)
    assert (found[4].precision, found[4].recall.value, found[4].f1.value) == (None, 0.0, 0.0)  # never given


def test_macro_f1_leaves_out_classes_that_do_not_occur():
    labels_n, chosen_n = np.array([0, 0, 1, 1]), np.array([0, 2, 1, 1])
    expected = reference.f1_score(labels_n, chosen_n, labels=[0, 1], average="macro")
    assert compute_macro_f1(labels_n, chosen_n, 5)[0] == pytest.approx(expected)
    assert expected == pytest.approx((2 / 3 + 1) / 2)


def test_perfect_answers_give_finite_figures():
    labels_n = np.array([0, 1, 1, 0])
    found = compute_metrics(labels_n, np.eye(2)[labels_n], labels_n, ("x", "y"), np.arange(4), resamples=100, seed=0)
    values = {name: i.value for name, i in found.items()}
    assert values == pytest.approx({name: float(name not in {"log_loss", "brier", "ece"}) for name in values})
    assert found["accuracy"].low == pytest.approx(0.510109, abs=1e-6)


def test_no_figure_of_a_flawless_test_is_100_to_100():
    labels_n = np.arange(26) % 2
    answers = labels_n, np.eye(2)[labels_n], labels_n, ("x", "y")
    found = compute_metrics(*answers, np.arange(26), resamples=100, seed=0)
    shares = {name: i for name, i in found.items() if name not in {"log_loss", "brier", "ece"}}
    assert len(shares) == 9
    assert all(i.value == 1.0 == i.high and 0.6 < i.low < 0.95 for i in shares.values()), shares
    assert found["macro_f1"].low == pytest.approx(0.025 ** (1 / 26))
    films = compute_metrics(*answers, np.arange(26) // 4 * 2 + labels_n, resamples=100, seed=0)
    assert all(films[name].low < i.low for name, i in shares.items())


def test_a_certain_and_wrong_answer_costs_36_nats():
    assert compute_log_losses(np.array([0]), np.array([[0.0, 1.0]])) == pytest.approx(36.0436, abs=1e-3)


def test_one_class_in_the_labels_leaves_out_auc():
    labels_n, chosen_n = np.zeros(5, int), np.array([0, 0, 0, 0, 1])
    found = compute_metrics(labels_n, np.full((5, 2), 0.5), chosen_n, ("x", "y"), np.arange(5), resamples=100, seed=0)
    assert "auc" not in found
    assert (found["precision"].value, found["recall"].value, found["recall"].high) == (0.0, 0.0, 1.0)


def test_bins_hold_every_answer_once():
    confidence_n = np.array([0.0, 0.05, 0.55, 0.58, 1.0])
    bins = compute_confidence_bins(confidence_n, np.array([False, False, True, False, True]))
    assert [(b.low, b.count, round(b.confidence, 3), b.accuracy) for b in bins] == [
        (0.0, 2, 0.025, 0.0),
        (0.5, 2, 0.565, 0.5),
        (0.9, 1, 1.0, 1.0),
    ]
    assert compute_calibration_error(bins) == pytest.approx((2 * 0.025 + 2 * 0.065 + 0) / 5)


def test_equal_bins_hold_equally_many_images_and_keep_equal_confidences_together() -> None:
    confidence = np.array([0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.97, 0.99])
    hits = np.array([False, True, True, False, True, True, True, True])
    bins = compute_equal_bins(confidence, hits, num_bins=4)
    assert [b.count for b in bins] == [2, 2, 2, 2]
    assert [b.accuracy for b in bins] == [0.5, 0.5, 1.0, 1.0]
    assert bins[0].confidence == pytest.approx(0.55)
    assert [b.count for b in compute_equal_bins(np.ones(20), np.ones(20, bool))] == [20]
    assert [b.count for b in compute_equal_bins(np.array([0.3]), np.array([True]))] == [1]
    assert sum(b.count for b in compute_equal_bins(np.repeat([0.2, 0.9], [3, 17]), np.ones(20, bool))) == 20
