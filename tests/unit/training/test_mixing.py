"""Mixed batches: their pixels and targets, and what they depend on."""

import numpy as np
import pytest
import torch

from visionloop.training.losses import Mix, draw_mix, mix_images, mix_targets

IMAGES = torch.arange(3 * 4 * 6 * 3, dtype=torch.uint8).reshape(3, 4, 6, 3)
TARGETS = torch.eye(3)


def test_mixup_is_a_weighted_sum_of_pixels_and_of_targets() -> None:
    mix = Mix((1, 2, 0), 0.25)
    mixed = mix_images(IMAGES, mix)
    assert mixed.dtype == torch.float32
    expected = 0.25 * IMAGES.float() + 0.75 * IMAGES.float()[[1, 2, 0]]
    assert torch.allclose(mixed, expected)
    assert torch.allclose(mix_targets(TARGETS, mix)[0], torch.tensor([0.25, 0.75, 0.0]))


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
        assert torch.allclose(mix_targets(TARGETS, mix).sum(dim=1), torch.ones(3))
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
