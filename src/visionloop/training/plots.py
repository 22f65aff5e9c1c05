"""The training curve, for the run's artifacts and the workspace: losses, figures and learning rate over the epochs."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from visionloop.evaluation.plots import BLUE, GREEN, MUTED, RED, open_figure
from visionloop.training.watch import EpochReport

SHOWN = "training"  # the folder of the curve, of the work folder and of reports/
LOG_SCALE_FROM = 20  # the largest over the smallest value, from which on a logarithm shows more
DOTS_UP_TO = 40
RATE = "Learning rate"
DASHES = {"solid": "-", "dashed": "--", "dotted": ":"}
COLORS = {"train": BLUE, "val": RED}
HUES = (RED, GREEN, "#8a5cd6", "#c98a1b", "#2b9bb3", "#b0467f")
NOT_SHARES = ("loss", "learning_rate", "grad_norm", "_s", "_per_s", "_ratio", "memory_gib")


def write_curve(reports: Sequence[EpochReport], path: Path) -> None:
    """Draw losses, figures and learning rate over the epochs into a PNG, with the best epoch marked."""
    path.write_bytes(draw_curve(reports))


def draw_curve(reports: Sequence[EpochReport]) -> bytes:
    """Return the PNG of a training; figures that some epochs do not have are gaps. `reports` is not empty."""
    names = sorted({name for report in reports for name in report.metrics})
    losses = [name for name in names if name.endswith("/loss")]
    shares = [name for name in names if not name.endswith(NOT_SHARES)]
    rates = [name for name in names if name.endswith("learning_rate")]
    best = find_best(reports)
    with open_figure(11, 3.6) as (figure, sink):
        panels = figure.subplots(1, 3, width_ratios=(4, 4, 3))
        _draw_panel(panels[0], "Loss", reports, losses, {n: COLORS.get(n.partition("/")[0], MUTED) for n in losses})
        _draw_panel(panels[1], "Figures", reports, shares, dict(zip(shares, _pick_hues(shares), strict=True)))
        _draw_panel(panels[2], RATE, reports, rates, dict.fromkeys(rates, MUTED))
        for axes in panels:
            axes.axvline(best.epoch, color=GREEN, linewidth=1, linestyle=(0, (3, 3)), zorder=1)
        shown = best.metrics.get(best.monitor, math.nan)
        figure.supxlabel(
            f"epoch   (dashed: the best one, {best.epoch}, {best.monitor} {shown:.4g})", color=MUTED, size=9
        )
    return sink.getvalue()


def find_best(reports: Sequence[EpochReport]) -> EpochReport:
    """Return the epoch with the best monitored figure, the first of equals. `reports` is not empty."""
    monitor = reports[-1].monitor
    sign = 1 if monitor.endswith("loss") else -1

    def rank(report: EpochReport) -> float:
        value = report.metrics.get(monitor, math.nan)
        return sign * value if math.isfinite(value) else math.inf

    return min(reports, key=rank)


def draw_overlay(
    curves: Mapping[str, Mapping[str, Sequence[tuple[int, float]]]], panels_keys: Sequence[Sequence[str]]
) -> bytes:
    """Draw panels of figures that share an axis, with a colour a run: `curves[run][key]` holds (epoch, value).

    Epochs count from 1. The first figure of a panel is drawn solid, the next dashed, then dotted.
    """
    columns = 2 if len(panels_keys) in {2, 4} else min(len(panels_keys), 3)
    rows = -(-len(panels_keys) // columns)
    colors = dict(zip(curves, _cycle(len(curves)), strict=True))
    with open_figure(1 + 3.9 * columns, 0.7 + 3.0 * rows) as (figure, sink):
        panels = figure.subplots(rows, columns, squeeze=False).ravel()
        for axes, keys in zip(panels, panels_keys, strict=False):
            styles = dict(zip(keys, DASHES, strict=False))
            title = ", ".join(f"{key} ({styles[key]})" if len(keys) > 1 else key for key in keys)
            lines = [(run, key, curve[key]) for run, curve in curves.items() for key in keys if curve.get(key)]
            _style(axes, title, [value for _, _, points in lines for _, value in points])
            for run, key, points in lines:
                _draw_line(
                    axes,
                    [epoch for epoch, _ in points],
                    [value for _, value in points],
                    label=run,
                    color=colors[run],
                    style=DASHES[styles[key]],
                )
            axes.set_xlabel("epoch")
        for axes in panels[len(panels_keys) :]:
            axes.axis("off")
        handles: dict[str, Any] = {}
        for axes in panels:
            for line, run in zip(*axes.get_legend_handles_labels(), strict=True):
                handles.setdefault(run, line)  # the first line of a run is solid
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=columns, frameon=False)
    return sink.getvalue()


def _draw_panel(
    axes: Any, title: str, reports: Sequence[EpochReport], names: Sequence[str], colors: Mapping[str, str]
) -> None:
    values = {name: [report.metrics.get(name, math.nan) for report in reports] for name in names}
    _style(axes, title, [value for series in values.values() for value in series])
    for name, series in values.items():
        _draw_line(axes, [report.epoch for report in reports], series, label=name, color=colors[name])
    if len(names) > 1:
        axes.legend(frameon=False, fontsize=8)


def _draw_line(
    axes: Any, epochs: Sequence[int], values: Sequence[float], *, label: str, color: str, style: str = "-"
) -> None:
    dots = {"marker": "o", "markersize": 3} if len(epochs) <= DOTS_UP_TO else {}
    axes.plot(epochs, values, color=color, linestyle=style, linewidth=1.5, label=label, **dots)


def _style(axes: Any, title: str, values: Sequence[float]) -> None:
    """Title, grid, whole epochs, and a logarithmic scale for a loss that goes over more than a decade or so."""
    from matplotlib.ticker import MaxNLocator

    axes.set_title(title)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True, min_n_ticks=1))
    axes.grid()
    seen = [value for value in values if math.isfinite(value)]
    if "loss" in title.lower() and seen and min(seen) > 0 and max(seen) / min(seen) > LOG_SCALE_FROM:
        set_log_scale(axes.yaxis)


def set_log_scale(axis: Any) -> None:
    """Make an axis logarithmic, with plain numbers at 1, 2 and 5 (names are never parsed as formulas in our style)."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.axes.set_yscale("log") if axis.axis_name == "y" else axis.axes.set_xscale("log")
    axis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=8))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def _pick_hues(names: Sequence[str]) -> list[str]:
    """Return a colour a name: blue for the training side, others for validation."""
    others = iter(_cycle(len(names)))
    return [BLUE if name.startswith("train/") else next(others) for name in names]


def _cycle(number: int) -> list[str]:
    palette = (*HUES, BLUE, MUTED)
    return [palette[i % len(palette)] for i in range(number)]
