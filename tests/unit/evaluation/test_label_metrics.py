"""Figures of several labels an image, against scikit-learn and against plain loops."""

import warnings

import numpy as np
import pytest
from sklearn import metrics as reference

from visionloop.evaluation.label_metrics import (
    LabelCounts,
    compute_label_figures,
    compute_label_losses,
    compute_label_metrics,
    compute_swaps,
    count_labels,
    make_macro_f1,
)
from visionloop.evaluation.metrics import compute_confusion, compute_macro_f1

RESAMPLES, SEED = 60, 3


def make_answers(num_images: int, num_classes: int, *, skill: float = 1.0, seed: int = 0, digits: int = 9):
    """Targets with a third of the classes on, and probabilities that lean to them; `digits` makes ties."""
    generator = np.random.default_rng(seed)
    targets_nk = generator.random((num_images, num_classes)) < 0.33
    logits_nk = generator.normal(0, 1.5, targets_nk.shape) + skill * (2 * targets_nk - 1)
    probs_nk = (1 / (1 + np.exp(-logits_nk))).round(digits)
    return targets_nk, probs_nk, probs_nk >= 0.5


@pytest.mark.parametrize(("num_images", "num_classes", "digits"), [(300, 4, 9), (200, 3, 1), (40, 20, 9)])
def test_figures_are_those_of_scikit_learn(num_images, num_classes, digits):
    targets_nk, probs_nk, chosen_nk = make_answers(num_images, num_classes, digits=digits)
    found = compute_label_metrics(
        targets_nk, probs_nk, chosen_nk, np.arange(len(targets_nk)), resamples=RESAMPLES, seed=SEED
    )
    expected = {
        "accuracy": reference.accuracy_score(targets_nk, chosen_nk),
        "balanced_accuracy": reference.recall_score(targets_nk, chosen_nk, average="macro"),
        "macro_f1": reference.f1_score(targets_nk, chosen_nk, average="macro", zero_division=0.0),
        "micro_f1": reference.f1_score(targets_nk, chosen_nk, average="micro"),
        "weighted_f1": reference.f1_score(targets_nk, chosen_nk, average="weighted"),
        "map": reference.average_precision_score(targets_nk, probs_nk, average="macro"),
        "log_loss": np.mean([reference.log_loss(targets_nk[:, k], probs_nk[:, k]) for k in range(num_classes)]),
        "brier": np.mean([reference.brier_score_loss(targets_nk[:, k], probs_nk[:, k]) for k in range(num_classes)]),
    }
    assert list(found) == [*expected, "ece"]
    assert {name: i.value for name, i in found.items() if name != "ece"} == pytest.approx(expected, abs=1e-9)
    assert all(i.low < i.value < i.high for name, i in found.items() if name not in {"ece", "accuracy"})
    assert found["ece"].low is None


def test_intervals_do_not_depend_on_how_the_draws_are_cut(monkeypatch):
    answers = *make_answers(60, 3), np.arange(60)
    whole = compute_label_metrics(*answers, resamples=RESAMPLES, seed=SEED)
    monkeypatch.setattr("visionloop.evaluation.resampling.CHUNK_CELLS", 500)
    monkeypatch.setattr("visionloop.evaluation.counts.CHUNK_CELLS", 50)
    monkeypatch.setattr("visionloop.evaluation.ranking.MAX_CELLS", 300)
    cut = compute_label_metrics(*answers, resamples=RESAMPLES, seed=SEED)
    for name, interval in whole.items():
        assert cut[name].to_json() == pytest.approx(interval.to_json(), abs=1e-12), name


def test_intervals_follow_the_films():
    targets_nk, probs_nk, chosen_nk = make_answers(40, 3, seed=1)
    targets_nk, probs_nk, chosen_nk = (part.repeat(6, axis=0) for part in (targets_nk, probs_nk, chosen_nk))
    films = compute_label_metrics(targets_nk, probs_nk, chosen_nk, np.arange(240) // 6, resamples=200, seed=0)
    frames = compute_label_metrics(targets_nk, probs_nk, chosen_nk, np.arange(240), resamples=200, seed=0)
    for name, interval in films.items():
        if name != "ece":
            assert interval.value == pytest.approx(frames[name].value)
            assert interval.high - interval.low > 1.8 * (frames[name].high - frames[name].low), name


def test_with_one_label_an_image_all_is_as_with_classes():
    generator = np.random.default_rng(0)
    labels_n, chosen_n = generator.integers(0, 4, 200), generator.integers(0, 4, 200)
    targets_nk, chosen_nk = np.eye(5, dtype=bool)[labels_n], np.eye(5, dtype=bool)[chosen_n]
    rows_rn = np.random.default_rng(0).integers(0, 200, (20, 200))
    single_r = compute_macro_f1(labels_n[rows_rn], chosen_n[rows_rn], 5)
    np.testing.assert_allclose(make_macro_f1(targets_nk, chosen_nk)(rows_rn), single_r, rtol=1e-12)
    np.testing.assert_array_equal(compute_swaps(targets_nk, chosen_nk), compute_confusion(labels_n, chosen_n, 5))


def test_classes_that_do_not_occur_count_nowhere_and_warn_of_nothing():
    targets_nk, probs_nk, chosen_nk = make_answers(100, 3)
    targets_nk[:, 2] = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = compute_label_metrics(
            targets_nk, probs_nk, chosen_nk, np.arange(len(targets_nk)), resamples=RESAMPLES, seed=SEED
        )
    expected = reference.average_precision_score(targets_nk[:, :2], probs_nk[:, :2], average="macro")
    assert found["map"].value == pytest.approx(expected)
    f1 = reference.f1_score(targets_nk[:, :2], chosen_nk[:, :2], average="macro")
    assert found["macro_f1"].value == pytest.approx(f1)
    figures = compute_label_figures(targets_nk, probs_nk, chosen_nk, ["a", "b", "c"], np.arange(100))
    assert (figures[2].support, figures[2].recall, figures[2].f1, figures[2].average_precision) == (0, None, None, None)
    assert figures[2].precision.value == 0.0


def test_negatives_alone_have_figures_all_the_same():
    targets_nk = np.zeros((4, 2), bool)
    probs_nk = np.array([[0.1, 0.2], [0.3, 0.6], [0.0, 0.0], [0.2, 0.4]])
    found = compute_label_metrics(
        targets_nk, probs_nk, probs_nk >= 0.5, np.arange(len(targets_nk)), resamples=RESAMPLES, seed=SEED
    )
    assert list(found) == [
        *("accuracy", "balanced_accuracy", "macro_f1", "micro_f1", "weighted_f1"),
        *("log_loss", "brier", "ece"),
    ]
    assert found["macro_f1"].low is None
    assert (found["accuracy"].value, found["macro_f1"].value, found["micro_f1"].value) == (0.75, 0.0, 0.0)


def test_a_certain_and_wrong_label_costs_36_nats():
    losses_nk = compute_label_losses(np.array([[True, False]]), np.array([[0.0, 1.0]], np.float32))
    assert losses_nk == pytest.approx(np.array([[36.0436, 36.0436]]), abs=1e-3)


def test_figures_of_each_class_are_those_of_scikit_learn():
    targets_nk, probs_nk, chosen_nk = make_answers(150, 5, digits=2)
    found = compute_label_figures(targets_nk, probs_nk, chosen_nk, list("abcde"), np.arange(150))
    columns = reference.precision_recall_fscore_support(targets_nk, chosen_nk, zero_division=0.0)
    averages = reference.average_precision_score(targets_nk, probs_nk, average=None)
    for k, one in enumerate(found):
        assert (one.name, one.support) == ("abcde"[k], columns[3][k])
        values = [one.precision.value, one.recall.value, one.f1.value, one.average_precision]
        assert values == pytest.approx([*(column[k] for column in columns[:3]), averages[k]])


def test_what_is_missed_and_what_is_said_instead():
    # Of (a, b, c): a and b are there, a and c said; c is there, nothing said; nothing is there, a said; b and b.
    targets_nk = np.array([[1, 1, 0], [0, 0, 1], [0, 0, 0], [0, 1, 0]], bool)
    chosen_nk = np.array([[1, 0, 1], [0, 0, 0], [1, 0, 0], [0, 1, 0]], bool)
    assert compute_swaps(targets_nk, chosen_nk).tolist() == [[1, 0, 0], [0, 1, 1], [0, 0, 0]]
    assert count_labels(targets_nk, chosen_nk, "abc") == [
        LabelCounts("a", found=1, missed=0, extra=1),
        LabelCounts("b", found=1, missed=1, extra=0),
        LabelCounts("c", found=0, missed=1, extra=1),
    ]
