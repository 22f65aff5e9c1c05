"""Each loss against its formula, worked out with numpy; mixed batches: their pixels and targets."""

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch.nn import functional

from visionloop.training.losses import (
    Mix,
    Objective,
    compute_loss,
    draw_mix,
    make_targets,
    mix_images,
    mix_targets,
    smooth_targets,
)

RNG = np.random.default_rng(0)
UNITS_NK = RNG.normal(0, 2, (7, 4))
CLASSES_N = np.array([0, 1, 2, 3, 0, 0, 2])
SEVERAL_NK = RNG.integers(0, 2, (7, 4))
IMAGES, ONE_HOT = torch.arange(3 * 4 * 6 * 3, dtype=torch.uint8).reshape(3, 4, 6, 3), torch.eye(3)
Z_N1, YES_N = RNG.normal(0, 2, (7, 1)), np.array([0, 1, 1, 0, 1, 0, 0])


def softmax(units_nk: NDArray[np.float64]) -> NDArray[np.float64]:
    exp = np.exp(units_nk - units_nk.max(axis=1, keepdims=True))
    return exp / exp.sum(axis=1, keepdims=True)


def compute(units: NDArray[np.float64], targets: NDArray[np.integer], objective: Objective) -> float:
    units_nu = torch.from_numpy(units)
    targets_nu = make_targets(torch.from_numpy(targets), objective.task, units.shape[1])
    return float(compute_loss(units_nu, targets_nu, objective))


def test_cross_entropy_of_one_class_is_the_mean_of_minus_log_p() -> None:
    expected = -np.log(softmax(UNITS_NK)[np.arange(7), CLASSES_N]).mean()
    assert compute(UNITS_NK, CLASSES_N, Objective("multiclass")) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("task", "z", "targets"), [("binary", Z_N1, YES_N), ("multilabel", UNITS_NK, SEVERAL_NK)])
def test_binary_cross_entropy_is_the_mean_over_units(
    task: str, z: NDArray[np.float64], targets: NDArray[np.integer]
) -> None:
    p, y = 1 / (1 + np.exp(-z)), targets.reshape(z.shape)
    expected = -(y * np.log(p) + (1 - y) * np.log(1 - p)).mean()
    assert compute(z, targets, Objective(task)) == pytest.approx(expected, rel=1e-5)


def test_focal_loss_is_that_of_lin_et_al() -> None:
    p = softmax(UNITS_NK)[np.arange(7), CLASSES_N]
    expected = -((1 - p) ** 2 * np.log(p)).mean()
    assert compute(UNITS_NK, CLASSES_N, Objective("multiclass", gamma=2)) == pytest.approx(expected, rel=1e-4)
    p_true = np.where(YES_N == 1, 1 / (1 + np.exp(-Z_N1[:, 0])), 1 / (1 + np.exp(Z_N1[:, 0])))
    expected = -((1 - p_true) ** 2 * np.log(p_true)).mean()
    assert compute(Z_N1, YES_N, Objective("binary", gamma=2)) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("task", ["binary", "multiclass", "multilabel"])
def test_focal_loss_leaves_little_of_easy_answers_and_most_of_hard_ones(task: str) -> None:
    targets = {"binary": np.array([1]), "multiclass": np.array([0]), "multilabel": np.array([[1, 0]])}[task]
    right = {"binary": [[4.0]], "multiclass": [[4.0, 0.0]], "multilabel": [[4.0, -4.0]]}[task]
    easy, hard = np.array(right), -np.array(right)
    plain, focal = Objective(task), Objective(task, gamma=2)
    assert compute(easy, targets, focal) < compute(easy, targets, plain) * 1e-3
    assert compute(hard, targets, focal) > compute(hard, targets, plain) * 0.95


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_gradient_is_finite_for_units_far_out(gamma: float) -> None:
    for task, targets in (("binary", torch.tensor([0, 1])), ("multiclass", torch.tensor([0, 1]))):
        units_nu = torch.tensor([[200.0, -200.0], [-200.0, 200.0]])
        units_nu = units_nu[:, :1] if task == "binary" else units_nu
        units_nu.requires_grad_()
        loss = compute_loss(units_nu, make_targets(targets, task, units_nu.shape[1]), Objective(task, gamma=gamma))
        loss.backward()
        assert torch.isfinite(loss)
        assert units_nu.grad is not None
        assert torch.isfinite(units_nu.grad).all()


def test_smoothing_of_one_class_is_that_of_torch() -> None:
    expected = functional.cross_entropy(
        torch.from_numpy(UNITS_NK).float(), torch.from_numpy(CLASSES_N), label_smoothing=0.1
    )
    ours = compute(UNITS_NK, CLASSES_N, Objective("multiclass", smoothing=0.1))
    assert ours == pytest.approx(float(expected), rel=1e-5)


def test_smoothing_of_yes_and_no_leaves_half_the_share_to_the_other() -> None:
    smoothed = smooth_targets(torch.tensor([[0.0], [1.0]]), "binary", 0.2)
    assert smoothed.flatten().tolist() == pytest.approx([0.1, 0.9])
    p = 1 / (1 + np.exp(-Z_N1[:, 0]))
    y = np.where(YES_N == 1, 0.9, 0.1)
    expected = -(y * np.log(p) + (1 - y) * np.log(1 - p)).mean()
    assert compute(Z_N1, YES_N, Objective("binary", smoothing=0.2)) == pytest.approx(expected, rel=1e-5)


def test_weights_multiply_each_image_by_that_of_its_class() -> None:
    weights = (1.0, 1.0, 1.0, 1.0), (0.5, 2.0, 3.0, 4.0)
    loss_n = -np.log(softmax(UNITS_NK)[np.arange(7), CLASSES_N])
    expected = (np.array(weights[1])[CLASSES_N] * loss_n).mean()
    objective = Objective("multiclass", weights_2u=weights)
    assert compute(UNITS_NK, CLASSES_N, objective) == pytest.approx(expected, rel=1e-5)


def test_weights_of_several_labels_are_torchs_pos_weight() -> None:
    pos_weight = torch.tensor([1.0, 2.0, 3.0, 4.0])
    expected = functional.binary_cross_entropy_with_logits(
        torch.from_numpy(UNITS_NK).float(), torch.from_numpy(SEVERAL_NK).float(), pos_weight=pos_weight
    )
    objective = Objective("multilabel", weights_2u=((1.0,) * 4, (1.0, 2.0, 3.0, 4.0)))
    assert compute(UNITS_NK, SEVERAL_NK, objective) == pytest.approx(float(expected), rel=1e-5)


def test_weights_of_two_classes_weigh_no_and_yes() -> None:
    p = 1 / (1 + np.exp(-Z_N1[:, 0]))
    expected = -np.where(YES_N == 1, 5.0 * np.log(p), 0.25 * np.log(1 - p)).mean()
    objective = Objective("binary", weights_2u=((0.25,), (5.0,)))
    assert compute(Z_N1, YES_N, objective) == pytest.approx(expected, rel=1e-5)


def test_soft_targets_are_the_mean_of_both_losses() -> None:
    units = torch.tensor([[1.0, -2.0, 0.5]])
    first, second = torch.tensor([[1.0, 0, 0]]), torch.tensor([[0, 0, 1.0]])
    objective = Objective("multiclass", smoothing=0.1)
    mixed = compute_loss(units, 0.3 * first + 0.7 * second, objective)
    parts = 0.3 * compute_loss(units, first, objective) + 0.7 * compute_loss(units, second, objective)
    assert float(mixed) == pytest.approx(float(parts), rel=1e-5)


def test_units_of_half_precision_give_a_loss_in_float32() -> None:
    units = torch.tensor([[1.0, -2.0]], dtype=torch.bfloat16)
    assert compute_loss(units, torch.tensor([[1.0, 0.0]]), Objective("multiclass")).dtype == torch.float32


def test_mixup_is_a_weighted_sum_of_pixels_and_of_targets() -> None:
    mix = Mix((1, 2, 0), 0.25)
    mixed = mix_images(IMAGES, mix)
    assert mixed.dtype == torch.float32
    expected = 0.25 * IMAGES.float() + 0.75 * IMAGES.float()[[1, 2, 0]]
    assert torch.allclose(mixed, expected)
    assert torch.allclose(mix_targets(ONE_HOT, mix)[0], torch.tensor([0.25, 0.75, 0.0]))


def test_cutmix_puts_a_box_of_the_partner_into_each_image() -> None:
    mix = Mix((1, 2, 0), 1 - 6 / 24, (1, 3, 2, 5))
    before = IMAGES.clone()
    mixed = mix_images(IMAGES, mix)
    assert mixed.dtype == torch.uint8
    inside = torch.zeros(4, 6, dtype=torch.bool)
    inside[1:3, 2:5] = True
    assert torch.equal(mixed[0][inside], IMAGES[1][inside])
    assert torch.equal(mixed[0][~inside], IMAGES[0][~inside])
    assert torch.equal(IMAGES, before), "the batch itself stays as it was"


def test_a_share_of_cutmix_is_the_area_that_is_left() -> None:
    for seed in range(50):
        mix = draw_mix(np.random.default_rng(seed), (4, 20, 30), mixup=0.0, cutmix=1.0)
        assert mix.box is not None
        top, bottom, left, right = mix.box
        assert 0 <= top <= bottom <= 20
        assert 0 <= left <= right <= 30
        assert mix.share == pytest.approx(1 - (bottom - top) * (right - left) / 600)


def test_targets_stay_distributions() -> None:
    for seed in range(20):
        mix = draw_mix(np.random.default_rng(seed), (3, 4, 6), mixup=0.4, cutmix=1.0)
        assert torch.allclose(mix_targets(ONE_HOT, mix).sum(dim=1), torch.ones(3))
        assert sorted(mix.partner_n) == [0, 1, 2]


def test_with_both_either_is_drawn() -> None:
    kinds = [draw_mix(np.random.default_rng(s), (2, 8, 8), mixup=1.0, cutmix=1.0).box is not None for s in range(400)]
    assert 150 < sum(kinds) < 250
    alone = [draw_mix(np.random.default_rng(s), (2, 8, 8), mixup=1.0, cutmix=0.0).box for s in range(20)]
    assert alone == [None] * 20


def test_shares_of_mixup_follow_the_beta_distribution() -> None:
    shares = [draw_mix(np.random.default_rng(s), (2, 8, 8), mixup=0.2, cutmix=0.0).share for s in range(2000)]
    assert np.mean(shares) == pytest.approx(0.5, abs=0.03)
    assert np.var(shares) == pytest.approx(0.25 / 1.4, rel=0.08)


def test_equal_seeds_draw_equal_mixes() -> None:
    first, again = (draw_mix(np.random.default_rng([7, 3, 1, 0]), (5, 8, 8), mixup=1, cutmix=1) for _ in range(2))
    assert first == again
    assert first != draw_mix(np.random.default_rng([7, 3, 2, 0]), (5, 8, 8), mixup=1, cutmix=1)
