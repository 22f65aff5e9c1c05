"""The temperature and the biases: found where they are known, kept only where they help, the same as scikit-learn's."""

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import brier_score_loss, log_loss

from visionloop.evaluation.calibration import (
    MIN_KEYS,
    MOST_SHARPNESS,
    Scale,
    compute_ece,
    compute_figures,
    fit_scale,
    make_targets,
    number_keys,
    solve_scale,
)


def draw(num_images: int, num_classes: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Logits whose softmax is true, and labels drawn by it."""
    rng = np.random.default_rng(seed)
    logits_nk = rng.normal(0, 2, (num_images, num_classes))
    label_n = (logits_nk + rng.gumbel(size=logits_nk.shape)).argmax(axis=1)
    return logits_nk, label_n


@pytest.mark.parametrize(("temperature", "num_classes"), [(3.0, 2), (3.0, 10), (0.5, 10)])
def test_temperature_is_found_when_it_is_known(temperature: float, num_classes: int) -> None:
    logits_nk, label_n = draw(4000, num_classes, seed=1)
    fit = fit_scale(logits_nk * temperature, label_n, np.arange(4000), with_biases=False)
    assert fit.kept == "temperature"
    assert fit.scale.temperature == pytest.approx(temperature, rel=0.06)
    assert fit.scale.bias_k is None
    assert fit.after["log_loss"] < fit.before["log_loss"]
    assert fit.after["ece"] < min(0.03, fit.before["ece"] / 2)
    assert fit.after["brier"] < fit.before["brier"]


def test_biases_are_found_when_the_training_believed_in_a_class_too_often() -> None:
    logits_nk, label_n = draw(4000, 3, seed=2)
    fit = fit_scale(logits_nk + np.array([2.0, 0.0, -1.0]), label_n, np.arange(4000), with_biases=True)
    assert fit.kept == "temperature and biases"
    assert fit.scale.bias_k is not None
    offsets = fit.scale.bias_k * fit.scale.temperature
    assert offsets - offsets[1] == pytest.approx([-2.0, 0.0, 1.0], abs=0.2)


def test_biases_of_several_labels_are_those_of_platt() -> None:
    rng = np.random.default_rng(3)
    logits_nk = rng.normal(0, 2, (6000, 3))
    truth_nk = rng.random(logits_nk.shape) < 1 / (1 + np.exp(-(logits_nk + np.array([1.0, 0.0, -2.0]))))
    fit = fit_scale(logits_nk * 2, truth_nk, np.arange(6000), with_biases=True)
    assert fit.scale.temperature == pytest.approx(2.0, rel=0.06)
    assert fit.scale.bias_k == pytest.approx([1.0, 0.0, -2.0], abs=0.15)


def test_a_binary_fit_with_a_bias_is_logistic_regression() -> None:
    logits_nk, label_n = draw(3000, 2, seed=4)
    logits_nk = np.column_stack([np.zeros(3000), (logits_nk[:, 1] - logits_nk[:, 0]) * 1.7 + 0.6])
    scale = solve_scale(logits_nk, make_targets(label_n, 2), several=False, with_biases=True)
    reference = LogisticRegression(C=1e6).fit(logits_nk[:, 1:], label_n)
    assert scale.bias_k is not None
    assert 1 / scale.temperature == pytest.approx(reference.coef_[0, 0], rel=0.01)
    assert scale.bias_k[1] - scale.bias_k[0] == pytest.approx(reference.intercept_[0], abs=0.01)


def test_nothing_is_kept_when_probabilities_are_true_already() -> None:
    # A temperature that was fitted to chance alone makes held-out images worse in most draws.
    kept = []
    for seed in range(40):
        logits_nk, label_n = draw(300, 4, seed)
        fit = fit_scale(logits_nk, label_n, np.arange(300), with_biases=True)
        kept.append(fit.kept)
        assert fit.after["log_loss"] <= fit.before["log_loss"]
        assert 0.75 < fit.scale.temperature < 1.3
    assert kept.count("nothing") >= 20
    assert kept.count("temperature and biases") <= 6


def test_biases_are_not_kept_when_the_side_is_too_small_for_them() -> None:
    logits_nk, label_n = draw(60, 12, seed=5)
    assert fit_scale(logits_nk, label_n, np.arange(60), with_biases=True).kept != "temperature and biases"


def test_images_of_one_film_are_in_one_fold() -> None:
    # Twenty frames a film, all right or all wrong by film: folds over frames would know the answers of each film.
    rng = np.random.default_rng(6)
    film_n = np.repeat(np.arange(8), 20)
    label_n = np.repeat(rng.integers(0, 2, 8), 20)
    fit = fit_scale(rng.normal(0, 1, (160, 2)), label_n, film_n, with_biases=True)
    assert fit.kept == "nothing"
    assert fit.why == "8 independent validation images are too few; 30 or more are needed"


@pytest.mark.parametrize("several", [False, True])
def test_a_flawless_side_leaves_the_confidence_about_as_it_is(several: bool) -> None:
    label_n = np.arange(98) % 2
    targets_nk = make_targets(label_n, 2)
    scale = solve_scale(np.where(targets_nk > 0, 4.0, -4.0), targets_nk, several=several, with_biases=False)
    assert 0.4 < scale.temperature < 1.0, "without a penalty it is 0.01"


def test_many_right_answers_do_not_make_the_temperature_too_large() -> None:
    # Right in 99 of 100 images, three times too sure. Smoothed targets would give 3.5.
    found = []
    for seed in range(20):
        rng = np.random.default_rng(seed)
        label_n = rng.integers(0, 2, 1500)
        margin_n = rng.normal(0, 2**0.5, 1500) + 3.3 * (2 * label_n - 1)  # log odds: 3.3 * margin
        logits_nk = np.column_stack([np.zeros(1500), 3 * 3.3 * margin_n])
        scale = solve_scale(logits_nk, make_targets(label_n, 2), several=False, with_biases=False)
        found.append(scale.temperature)
    assert np.mean(found) == pytest.approx(3.0, abs=0.25)


def test_hostile_logits_end_in_numbers() -> None:
    label_n = np.arange(60) % 3
    for logits_nk in (np.zeros((60, 3)), np.full((60, 3), 1e30), np.eye(3)[(label_n + 1) % 3] * 1e4):
        fit = fit_scale(logits_nk.astype(np.float32), label_n, np.arange(60), with_biases=True)
        assert 1 / MOST_SHARPNESS <= fit.scale.temperature <= MOST_SHARPNESS
        assert np.isfinite(fit.scale.apply(logits_nk, several=False)).all()


def test_too_few_images_are_left_alone() -> None:
    logits_nk, label_n = draw(MIN_KEYS - 1, 2, seed=7)
    fit = fit_scale(logits_nk * 5, label_n, np.arange(MIN_KEYS - 1), with_biases=False)
    assert (fit.kept, fit.scale, fit.before == fit.after) == ("nothing", Scale(), True)


def test_figures_are_those_of_scikit_learn() -> None:
    logits_nk, label_n = draw(200, 2, seed=8)
    probs_nk = Scale().apply(logits_nk, several=False)
    figures = compute_figures(probs_nk, make_targets(label_n, 2), several=False)
    assert figures["log_loss"] == pytest.approx(log_loss(label_n, probs_nk[:, 1].astype(float)), abs=1e-5)
    assert figures["brier"] == pytest.approx(brier_score_loss(label_n, probs_nk[:, 1]), abs=1e-6)
    logits_nk, label_n = draw(200, 5, seed=8)
    probs_nk = Scale().apply(logits_nk, several=False).astype(float)
    probs_nk /= probs_nk.sum(axis=1, keepdims=True)
    figures = compute_figures(probs_nk, make_targets(label_n, 5), several=False)
    assert figures["brier"] == pytest.approx(brier_score_loss(label_n, probs_nk, labels=range(5)), abs=1e-6)


def test_calibration_error_of_a_worked_example() -> None:
    # Four answers at 0.9, three right: gap 0.15. One at 0.3, right: gap 0.7. (4 x 0.15 + 0.7) / 5 = 0.26
    confidence_n, hits_n = np.array([0.9, 0.9, 0.9, 0.9, 0.3]), np.array([1.0, 1.0, 1.0, 0.0, 1.0])
    assert compute_ece(confidence_n, hits_n) == pytest.approx(0.26)
    assert compute_ece(np.array([1.0]), np.array([1.0])) == 0.0


def test_calibration_error_is_that_of_mapie() -> None:
    """MAPIE 1.6.0: expected_calibration_error(hits, confidence, num_bins=15, split_strategy="uniform")."""
    rng = np.random.default_rng(11)
    rng.beta(0.2, 0.6, 2000), rng.random(2000)
    label_n, score_n = rng.integers(0, 2, 500), rng.random(500)
    hits_n = (label_n == (score_n >= 0.5)).astype(float)
    assert compute_ece(np.maximum(score_n, 1 - score_n), hits_n) == pytest.approx(0.21643701975934418)


def test_keys_are_numbered_in_their_order() -> None:
    codes_n, number = number_keys(np.array([7, 3, 7, 1, 3]))
    assert (codes_n.tolist(), number) == ([0, 1, 0, 2, 1], 3)
