"""What a sweep over learning rates says: a smooth curve, the rate where it falls most steeply, a picture. Pure.

Dimensions: s steps of the sweep.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from visionloop.evaluation.plots import BLUE, GREEN, MUTED, PALE_BLUE, open_figure

WIDTH_RATIO = 1 / 40  # of the sweep: how far the smoothing reaches
RISE_RATIO = 0.1  # of the whole fall: more is not noise
LEAST_FALL = 0.02  # of the loss at the start: less is noise


@dataclass(frozen=True)
class Sweep:
    """The loss at each rate, and as a smooth curve. `suggestion` is None where it fell nowhere clearly."""

    rates_s: NDArray[np.float64]
    losses_s: NDArray[np.float64]
    smooth_s: NDArray[np.float64]
    suggestion: float | None


def make_sweep(rates_s: NDArray[np.float64], losses_s: NDArray[np.float64], *, num_steps: int) -> Sweep:
    """Smooth the losses of a sweep that was to have `num_steps`, and suggest a rate."""
    smooth_s = smooth_losses(losses_s, max(1.0, num_steps * WIDTH_RATIO))
    return Sweep(rates_s, losses_s, smooth_s, suggest_rate(rates_s, smooth_s))


def make_rates(low: float, high: float, steps: int) -> NDArray[np.float64]:
    """Return `steps` rates from low to high, each the same multiple of the one before."""
    return np.geomspace(low, high, steps)


def smooth_losses(losses_s: NDArray[np.float64], width: float) -> NDArray[np.float64]:
    """Return the losses under a Gaussian window of `width` steps; the ends are carried on.

    A running mean would do, but lags behind: it would move the steepest place to larger rates.
    """
    reach = max(1, round(3 * width))
    window = np.exp(-0.5 * (np.arange(-reach, reach + 1) / width) ** 2)
    padded = np.pad(losses_s, reach, mode="edge")
    return np.asarray(np.convolve(padded, window / window.sum(), mode="valid"))


def suggest_rate(rates_s: NDArray[np.float64], smooth_s: NDArray[np.float64]) -> float | None:
    """Return the rate at which the loss falls most steeply over log(rate), to two digits; None if it falls nowhere."""
    start, end = find_fall(smooth_s)
    if end - start < 2 or smooth_s[0] - smooth_s[end] < LEAST_FALL * abs(smooth_s[0]):
        return None
    slope_s = np.gradient(smooth_s[start : end + 1], np.log(rates_s[start : end + 1]))
    return float(f"{rates_s[start + int(np.argmin(slope_s))]:.1e}")


def find_fall(smooth_s: NDArray[np.float64]) -> tuple[int, int]:
    """Return the first and the last step of the greatest fall below the loss at the start; the first of equals.

    A rise of a tenth of all there is to fall ends a fall: a network may break at a high rate, and then fall back more
    steeply than it had ever learned.
    """
    below_s = np.minimum(smooth_s, smooth_s[0])
    tolerance = RISE_RATIO * (below_s[0] - below_s.min())
    best, high, low = (0, 0), 0, 0
    for step, loss in enumerate(below_s):
        if loss > below_s[low] + tolerance or loss > below_s[high]:
            high = low = step
        elif loss < below_s[low]:
            low = step
        if below_s[high] - below_s[low] > below_s[best[0]] - below_s[best[1]]:
            best = high, low
    return best


def draw_sweep(sweep: Sweep, current: float) -> bytes:
    """Return the PNG of a sweep: loss against rate, the suggestion and the present rate marked."""
    from matplotlib.ticker import NullFormatter

    with open_figure(7.2, 4.2) as (figure, sink):
        axes = figure.subplots()
        axes.plot(sweep.rates_s, sweep.losses_s, color=PALE_BLUE, linewidth=1, label="each step")
        axes.plot(sweep.rates_s, sweep.smooth_s, color=BLUE, linewidth=2, label="smoothed")
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(lambda rate, _: f"{rate:g}")  # matplotlib's own is a formula
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_ylim(*_choose_range(sweep))
        if sweep.rates_s[0] <= current <= sweep.rates_s[-1]:
            axes.axvline(current, color=MUTED, linewidth=1, linestyle=(0, (3, 3)), label=f"now {current:g}")
        if sweep.suggestion is not None:
            place = int(np.argmin(np.abs(np.log(sweep.rates_s / sweep.suggestion))))
            point = sweep.smooth_s[place]
            axes.plot(
                [sweep.suggestion], [point], "o", color=GREEN, markersize=9, label=f"suggested {sweep.suggestion:g}"
            )
        axes.set_title("Loss at each learning rate")
        axes.set_xlabel("learning rate (of the head)")
        axes.set_ylabel("training loss")
        axes.grid(visible=True, which="major")
        axes.legend(frameon=False)
    return sink.getvalue()


def _choose_range(sweep: Sweep) -> tuple[float, float]:
    """Return what of the losses is shown: what explodes at the end would press all else flat."""
    calm_s = sweep.losses_s[: find_fall(sweep.smooth_s)[1] + 1]
    low, high = float(calm_s.min()), float(calm_s.max())
    margin = 0.1 * max(high - low, 0.01 * abs(high), 1e-6)
    return low - margin, high + 3 * margin
