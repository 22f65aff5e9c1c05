"""What is chosen about classes of different size, and the weights that follow."""

import json

import numpy as np
import pytest

from visionloop.training.imbalance import choose_imbalance, compute_row_weights, compute_weights


def make_labels(*counts: int) -> np.ndarray:
    return np.repeat(np.arange(len(counts)), counts)


@pytest.mark.parametrize(
    ("counts", "kind"),
    [((50, 50), "none"), ((59, 20), "none"), ((60, 20), "weights"), ((399, 20), "weights"), ((400, 20), "sampler")],
)
def test_auto_chooses_by_the_ratio_of_largest_to_smallest(counts: tuple[int, int], kind: str) -> None:
    plan = choose_imbalance(make_labels(*counts), ("cat", "dog"), "binary", "auto")
    assert plan.kind == kind
    assert plan.ratio == pytest.approx(counts[0] / counts[1])
    assert f"auto chose {kind}" in plan.sentence
    assert f"cat {counts[0]}, dog {counts[1]}" in plan.sentence


@pytest.mark.parametrize(("positives", "kind"), [(26, "none"), (25, "weights"), (5, "weights"), (4, "focal")])
def test_auto_of_several_labels_goes_by_images_without_to_images_with(positives: int, kind: str) -> None:
    targets = np.zeros((100, 2), np.uint8)
    targets[:50, 0] = 1
    targets[:positives, 1] = 1
    plan = choose_imbalance(targets, ("a", "b"), "multilabel", "auto")
    assert plan.kind == kind
    assert plan.row_weights_n is None
    assert plan.gamma == (2.0 if kind == "focal" else 0.0)


def test_what_is_wanted_is_done_whatever_the_counts() -> None:
    plan = choose_imbalance(make_labels(10, 10), ("a", "b"), "binary", "focal")
    assert (plan.kind, plan.gamma, plan.weights_2u) == ("focal", 2.0, None)
    assert "as asked for: focal" in plan.sentence
    none = choose_imbalance(make_labels(1000, 1), ("a", "b"), "binary", "none")
    assert (none.kind, none.gamma, none.weights_2u, none.row_weights_n) == ("none", 0.0, None, None)


def test_weights_are_inverse_to_the_counts_and_one_on_average() -> None:
    counts = np.array([60, 30, 10])
    no, yes = compute_weights(counts, 100, "multiclass")
    assert no == (1.0, 1.0, 1.0)
    assert yes == pytest.approx((100 / 180, 100 / 90, 100 / 30))
    assert np.dot(yes, counts) / 100 == pytest.approx(1)


def test_weights_of_two_classes_are_those_of_no_and_yes() -> None:
    assert compute_weights(np.array([75, 25]), 100, "binary") == (pytest.approx((2 / 3,)), pytest.approx((2.0,)))


def test_weights_of_several_labels_are_images_without_by_images_with() -> None:
    assert compute_weights(np.array([20, 50]), 100, "multilabel") == ((1.0, 1.0), (4.0, 1.0))


def test_rows_are_drawn_so_that_each_class_comes_alike() -> None:
    labels = make_labels(90, 9, 1)
    weights = compute_row_weights(labels, np.bincount(labels))
    assert weights.dtype == np.float64
    assert weights.mean() == pytest.approx(1)
    assert [weights[labels == k].sum() for k in range(3)] == pytest.approx([100 / 3] * 3)


def test_rows_of_several_labels_are_drawn_by_their_rarest() -> None:
    targets = np.array([[1, 0]] * 7 + [[1, 1]] + [[0, 0]], np.uint8)
    weights = compute_row_weights(targets, targets.sum(axis=0))
    assert weights[7] / weights[0] == pytest.approx(8)
    assert weights[8] == pytest.approx(weights[0])


def test_a_class_without_an_image_weighs_no_infinity() -> None:
    plan = choose_imbalance(make_labels(10, 0, 5), ("a", "b", "c"), "multiclass", "weights")
    assert plan.weights_2u is not None
    assert np.isfinite(plan.weights_2u).all()


def test_many_classes_are_told_by_the_largest_and_the_smallest() -> None:
    labels = make_labels(*range(10, 130))
    plan = choose_imbalance(labels, tuple(f"c{i:03d}" for i in range(120)), "multiclass", "auto")
    assert "c119 129, c118 128, c001 11, c000 10 (120 classes); ratio 12.9" in plan.sentence
    assert json.loads(plan.to_tags()["imbalance.counts"])["c119"] == 129
    assert plan.to_tags()["imbalance.chosen"] == "weights"
