"""What a study of `tune` came to, as pictures: which values led to which results, and how the best one was found."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from visionloop.evaluation.plots import BLUE, INK, MUTED, RED, open_figure
from visionloop.params import Span
from visionloop.training.watch import TrialReport

PALE, FAINT = "#d5e3fa", "#cfd4dc"
LABEL_CHARS = 14


def draw_parallel(reports: Sequence[TrialReport], space: Mapping[str, Any], metric: str) -> bytes:
    """Draw each trial as a line through its values to its result: the better the darker, the best one red.

    Trials without a result are grey and end before the last axis.
    """
    keys = sorted(space)
    done = [report for report in reports if report.state == "done" and report.value is not None]
    results = [float(report.value) for report in done if report.value is not None]
    low, high = min(results, default=0.0), max(results, default=1.0)
    best = max((report for report in done if report.is_best), key=lambda r: r.number, default=None)
    falls = metric.endswith("loss")
    with open_figure(2.2 + 1.75 * len(keys), 4.6) as (figure, sink):
        axes = figure.add_subplot()
        for report in sorted(reports, key=lambda r: (r is best, r.state == "done", r.number)):
            places = [_place(space[key], report.values.get(key)) for key in keys]
            if report.state != "done" or report.value is None:
                axes.plot(range(len(keys)), places, color=FAINT, linewidth=1, zorder=1)
                continue
            ratio = (report.value - low) / (high - low) if high > low else 1.0
            shade = _mix(PALE, BLUE, 1 - ratio if falls else ratio)
            style = {"color": RED, "linewidth": 2.2, "zorder": 4} if report is best else {"color": shade, "zorder": 2}
            axes.plot(range(len(keys) + 1), [*places, ratio], **style)
        for column, key in enumerate(keys):
            _draw_scale(axes, column, _list_ticks(space[key]))
        middle = (low + high) / 2
        _draw_scale(axes, len(keys), [(f"{v:.4g}", p) for v, p in ((low, 0.0), (middle, 0.5), (high, 1.0))])
        axes.set_xticks(range(len(keys) + 1), [*(_cut(key) for key in keys), metric], color=INK)
        axes.set_yticks([])
        axes.set(xlim=(-0.15, len(keys) + 0.45), ylim=(-0.06, 1.06))
        axes.spines[:].set_visible(False)
        title = f"{len(done)} trials" + (f"; the best, {best.number}, in red" if best else "")
        axes.set_title(title)
    return sink.getvalue()


def draw_history(reports: Sequence[TrialReport], metric: str) -> bytes:
    """Draw the result of every trial and the best so far; pruned ones hollow, where they were left."""
    from matplotlib.ticker import MaxNLocator

    with open_figure(7.6, 3.8) as (figure, sink):
        axes = figure.add_subplot()
        for state, style in (("done", {"facecolor": BLUE}), ("pruned", {"facecolor": "white", "edgecolor": MUTED})):
            shown = [(r.number, r.value) for r in reports if r.state == state and r.value is not None]
            if shown:
                axes.scatter(*zip(*shown, strict=True), s=22, label=state, zorder=3, **style)
        if failed := [r.number for r in reports if r.state == "failed"]:
            axes.plot(
                failed, [0.02] * len(failed), "x", color=RED, transform=axes.get_xaxis_transform(), label="failed"
            )
        if best := [(r.number, r.best) for r in reports if r.best is not None]:
            axes.step(*zip(*best, strict=True), where="post", color=RED, linewidth=1.5, label="best so far")
        axes.set(xlabel="trial", ylabel=metric)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.grid()
        axes.legend(frameon=False)
        axes.set_title(f"{len(reports)} trials")
    return sink.getvalue()


def _place(choices: Any, value: Any) -> float:
    """Return where a value is on its axis, 0 to 1; NaN for none."""
    if not isinstance(choices, Span):
        return choices.index(value) / max(len(choices) - 1, 1) if value in choices else math.nan
    if value is None:
        return math.nan
    low, high, at = ((math.log(v) if choices.log else float(v)) for v in (choices.low, choices.high, value))
    return (at - low) / (high - low)


def _list_ticks(choices: Any) -> list[tuple[str, float]]:
    """Return what is written beside an axis: all choices, or the ends and the middle of a range."""
    if not isinstance(choices, Span):
        return [(_cut("null" if value is None else str(value)), _place(choices, value)) for value in choices]
    middle = math.sqrt(choices.low * choices.high) if choices.log else (choices.low + choices.high) / 2
    return [(f"{value:.3g}", _place(choices, value)) for value in (choices.low, middle, choices.high)]


def _draw_scale(axes: Any, column: int, ticks: Sequence[tuple[str, float]]) -> None:
    axes.plot([column, column], [0, 1], color=MUTED, linewidth=1, zorder=5)
    box = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1.2}
    for label, place in ticks:
        axes.plot([column, column + 0.03], [place, place], color=MUTED, linewidth=1, zorder=5)
        axes.text(column + 0.06, place, label, va="center", fontsize=8, color=INK, bbox=box, zorder=6)


def _mix(first: str, second: str, ratio: float) -> tuple[float, ...]:
    from matplotlib.colors import to_rgb

    pairs = zip(to_rgb(first), to_rgb(second), strict=True)
    return tuple((1 - ratio) * one + ratio * other for one, other in pairs)


def _cut(text: str) -> str:
    return text if len(text) <= LABEL_CHARS else f"{text[: LABEL_CHARS - 1]}…"
