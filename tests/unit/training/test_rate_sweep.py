"""What is read off a sweep: the smooth curve, the steepest place, no suggestion where there is none."""

import io

import numpy as np
import pytest
from PIL import Image

from visionloop.training.rate_finder import draw_sweep, find_fall, make_rates, make_sweep, smooth_losses, suggest_rate

RATES = make_rates(1e-6, 1.0, 121)  # 20 steps a decade
STEEPEST = 1e-3


def make_losses(noise: float = 0.0) -> np.ndarray:
    """A loss that falls as a logistic curve around 1e-3, and explodes from 0.1 on."""
    place = np.log10(RATES / STEEPEST)
    losses = 0.2 + 2 / (1 + np.exp(4 * place)) + np.exp(np.clip(8 * (np.log10(RATES) + 0.8), None, 5))
    return losses + np.random.default_rng(0).normal(0, noise, len(RATES))


def test_rates_grow_by_the_same_multiple() -> None:
    assert RATES[0] == pytest.approx(1e-6)
    assert RATES[-1] == pytest.approx(1.0)
    assert RATES[1:] / RATES[:-1] == pytest.approx(np.full(120, 10**0.05))


def test_suggestion_is_where_the_loss_falls_most_steeply() -> None:
    assert suggest_rate(RATES, make_losses()) == pytest.approx(STEEPEST, rel=0.02)
    noisy = make_sweep(RATES, make_losses(0.1), num_steps=len(RATES)).suggestion
    assert noisy is not None
    assert abs(np.log10(noisy / STEEPEST)) < 0.3


@pytest.mark.parametrize("steepest", [4e-4, 8e-3])
@pytest.mark.parametrize("steepness", [2, 4, 8])
def test_suggestion_is_in_the_valley_whatever_the_noise(steepest: float, steepness: float) -> None:
    """Noise as measured on photos, in shares of the fall: 0.005 before it, 0.02 in it, 0.08 at the bottom, then more.

    A fall takes 2, 1 or half a decade from 3/4 to 1/4: gentler and steeper than those of the networks that were tried.
    """
    rates = make_rates(1e-6, 1.0, 100)
    place = np.log10(rates / steepest)
    left = 1 / (1 + np.exp(steepness * place))
    exploding = 0.05 * np.exp(np.clip(8 * (place - 1.8), None, 4))
    noise = np.select([left > 0.9, left > 0.3], [0.005, 0.02], 0.08) * 0.5
    for seed in range(100):
        rng = np.random.default_rng(seed)
        losses = 0.3 + 0.5 * left + rng.normal(0, noise) + exploding * rng.uniform(0.2, 1.8, 100)
        suggestion = make_sweep(rates, losses, num_steps=100).suggestion
        assert suggestion is not None
        assert abs(np.log10(suggestion / steepest)) < np.log10(3), seed


def test_a_fall_behind_an_explosion_does_not_count() -> None:
    losses = make_losses()
    losses[115:] = [200, 180, 100, 20, 5, 1]
    assert suggest_rate(RATES, losses) == pytest.approx(STEEPEST, rel=0.02)


def test_a_steeper_but_smaller_fall_after_a_rise_does_not_count() -> None:
    losses = make_losses()
    losses[100:] = np.r_[np.linspace(0.3, 0.9, 12), np.linspace(0.8, 0.1, 9)]
    assert find_fall(losses)[1] < 100
    assert suggest_rate(RATES, losses) == pytest.approx(STEEPEST, rel=0.02)


def test_a_rise_before_the_fall_is_left_out() -> None:
    losses = np.r_[np.linspace(2.1, 1.9, 10), np.linspace(1.9, 2.2, 11), make_losses()[21:]]
    assert suggest_rate(RATES, losses) == pytest.approx(STEEPEST, rel=0.02)


@pytest.mark.parametrize(
    "losses",
    [np.full(121, 0.7), np.linspace(0.7, 9, 121), np.linspace(0.7, 0.695, 121), np.array([0.7, 0.1])],
    ids=["flat", "rising", "noise", "short"],
)
def test_no_rate_is_suggested_where_the_loss_falls_nowhere(losses: np.ndarray) -> None:
    assert suggest_rate(RATES[: len(losses)], losses) is None


def test_smoothing_does_not_lag_and_keeps_the_length() -> None:
    step = np.r_[np.ones(50), np.zeros(51)]
    smooth = smooth_losses(step, 2.5)
    assert len(smooth) == 101
    assert smooth[50] + smooth[49] == pytest.approx(1), "the middle of the step is where it was"
    assert smooth[[0, 100]] == pytest.approx([1, 0])


def test_the_figure_is_a_png_for_any_sweep() -> None:
    for losses in (make_losses(0.05), np.full(121, 0.7), np.array([1.0])):
        sweep = make_sweep(RATES[: len(losses)], losses, num_steps=121)
        with Image.open(io.BytesIO(draw_sweep(sweep, 1e-3))) as image:
            assert (image.format, image.size) == ("PNG", (792, 462))
