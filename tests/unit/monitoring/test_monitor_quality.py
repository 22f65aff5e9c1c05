"""Accuracy from late and weighted labels, from the confidence, and which class grew."""

import numpy as np
import pytest

from visionloop.monitoring.quality import (
    compute_class_shares,
    compute_expected_accuracy,
    compute_labelled_accuracy,
    estimate_shares,
)


def make_month(rng: np.random.Generator, block: int, *, number: int = 2400) -> dict[str, np.ndarray]:
    """Return a month whose confidence is calibrated. Unsure images are all kept, of the others 3 %; labels are late."""
    block_n = np.arange(number) // block
    along_n = rng.normal(0, 0.8, block_n.max() + 1)[block_n] if block > 1 else 0.0
    z_n = rng.normal(1.6, 1.2, number) + along_n
    confidence_n = 1 / (1 + np.exp(-np.abs(z_n) - 0.3))
    is_unsure = confidence_n < 0.75
    probability_n = np.where(is_unsure, 1.0, 0.03)
    kept_n = rng.random(number) < probability_n
    return {
        "hit_n": rng.random(number) < confidence_n,
        "labelled_n": kept_n & (rng.random(number) < np.where(is_unsure, 0.5, 0.8)),
        "probability_n": np.where(kept_n, probability_n, np.nan),
        "reason_n": np.where(is_unsure, "confidence", "random"),
        "block_n": block_n,
        "confidence_n": confidence_n,
    }


@pytest.mark.parametrize(("block", "number", "width"), [(1, 2400, 0.19), (16, 2400, 0.22), (1, 800, 0.32)])
def test_true_accuracy_is_inside_the_interval_in_200_months(block: int, number: int, width: float) -> None:
    rng, inside, promised, widths = np.random.default_rng(block), 0, 0, []
    for _ in range(200):
        month = make_month(rng, block, number=number)
        confidence_n = month.pop("confidence_n")
        found = compute_labelled_accuracy(**month)
        true = month["hit_n"].mean()
        assert found.accuracy is not None
        inside += found.accuracy.low <= true <= found.accuracy.high
        widths.append(found.accuracy.high - found.accuracy.low)
        promised += abs(compute_expected_accuracy(confidence_n, month["block_n"]).value - true) <= 0.02
    assert inside / 200 >= 0.93
    # Of 800 images the true share itself is off by 1.3 points (one standard error).
    assert promised / 200 >= (0.98 if number == 2400 else 0.8)
    assert np.mean(widths) < width


def test_plain_share_of_the_labels_would_be_far_off() -> None:
    month = make_month(np.random.default_rng(0), 1)
    true, asked = month["hit_n"].mean(), month["hit_n"][month["labelled_n"]].mean()
    assert true - asked > 0.08


def test_labels_stand_for_what_they_were_drawn_from() -> None:
    """The example of the docstring, ten times as many: of 980 sure images 2 % are kept, of 20 unsure ones all."""
    found = compute_labelled_accuracy(
        hit_n=np.r_[np.ones(20, bool), np.zeros(20, bool)],
        labelled_n=np.ones(40, bool),
        probability_n=np.r_[np.full(20, 0.02), np.ones(20)],
        reason_n=["random"] * 20 + ["confidence"] * 20,
        block_n=np.arange(40),
    )
    assert found.accuracy is not None
    assert found.accuracy.value == pytest.approx(1000 / 1020)
    assert found.covered == pytest.approx(1.0)


def test_labels_of_one_reason_stand_for_all_that_were_kept_for_it() -> None:
    """Of 40 sure images, 2 % of all, and of 60 unsure ones a third is labelled so far: each counts three times."""
    found = compute_labelled_accuracy(
        hit_n=np.r_[np.ones(40, bool), np.zeros(60, bool)],
        labelled_n=np.r_[np.ones(40, bool), np.ones(20, bool), np.zeros(40, bool)],
        probability_n=np.r_[np.full(40, 0.5), np.ones(60)],
        reason_n=["random"] * 40 + ["confidence"] * 60,
        block_n=np.arange(100),
    )
    assert found.accuracy is not None
    assert found.num_labels == 60
    assert found.accuracy.value == pytest.approx(80 / 140)


def test_labels_that_came_for_unsure_images_only_cover_little() -> None:
    found = compute_labelled_accuracy(
        hit_n=np.zeros(80, bool),
        labelled_n=np.r_[np.zeros(40, bool), np.ones(40, bool)],
        probability_n=np.r_[np.full(40, 0.02), np.ones(40)],
        reason_n=["random"] * 40 + ["confidence"] * 40,
        block_n=np.arange(80),
    )
    assert found.covered == pytest.approx(40 / 2040)


def test_labels_without_a_known_probability_are_counted_and_not_used() -> None:
    nothing = compute_labelled_accuracy(
        np.ones(50, bool), np.ones(50, bool), np.r_[np.full(40, np.nan), np.zeros(10)], [""] * 50, np.arange(50)
    )
    assert (nothing.accuracy, nothing.num_labels, nothing.num_unweighted, nothing.covered) == (None, 0, 50, 0.0)
    empty = np.zeros(0)
    found = compute_labelled_accuracy(empty.astype(bool), empty.astype(bool), empty, [], empty.astype(np.int64))
    assert (found.accuracy, found.num_labels) == (None, 0)


def test_all_right_labels_are_no_certainty() -> None:
    found = compute_labelled_accuracy(
        np.ones(60, bool), np.ones(60, bool), np.full(60, 0.1), ["random"] * 60, np.arange(60)
    )
    assert found.accuracy is not None
    assert found.accuracy.value == 1.0
    assert found.accuracy.low == pytest.approx(0.94, abs=0.01)  # Wilson, 60 of 60
    assert found.accuracy.high == 1.0


def test_shares_are_corrected_by_the_known_mistakes() -> None:
    """The example of the docstring: 10 % of the cats are taken for dogs. 45 of 100 answers are cat: 50 are cats."""
    shares = estimate_shares(np.array([[90.0, 10.0], [0.0, 100.0]]), np.array([[45.0, 55.0]]))
    assert shares[0] == pytest.approx([0.5, 0.5], abs=1e-4)
    unknown = estimate_shares(np.array([[5.0, 0.0], [0.0, 0.0]]), np.array([[1.0, 3.0]]))
    assert unknown[0] == pytest.approx([0.25, 0.75], abs=1e-4)


def test_class_that_grew_comes_first_and_its_interval_covers() -> None:
    rng, names = np.random.default_rng(0), ("ant", "bee", "cat")
    confusion_kk = np.array([[90, 10, 0], [0, 100, 0], [5, 0, 95]])
    share_kk = confusion_kk / confusion_kk.sum(axis=1, keepdims=True)
    true_k, inside = np.array([0.2, 0.3, 0.5]), 0

    def answer(number: int, shares_k: np.ndarray) -> np.ndarray:
        true_n = rng.choice(3, number, p=shares_k)
        return np.eye(3, dtype=bool)[[rng.choice(3, p=share_kk[k]) for k in true_n]]

    reference_nk = answer(2000, np.full(3, 1 / 3))
    for _ in range(30):
        shares = compute_class_shares(names, confusion_kk, reference_nk, answer(400, true_k), np.arange(400))
        assert (shares[0].name, shares[0].grew) == ("cat", True)
        assert not shares[-1].grew
        found = {one.name: one.now for one in shares}
        inside += sum(found[n].low <= true_k[k] <= found[n].high for k, n in enumerate(names))
    assert inside / 90 >= 0.9
