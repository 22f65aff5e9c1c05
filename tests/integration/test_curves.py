"""Curves and pictures of a study: which epoch is best, where a value lies, the same bytes again, odd input."""

import io
import math
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import optuna
import pytest
from matplotlib import pyplot
from optuna.distributions import CategoricalDistribution, FloatDistribution
from optuna.trial import TrialState, create_trial
from PIL import Image

from visionloop.params import make_params
from visionloop.training import plots
from visionloop.training.plots import draw_curve, draw_overlay, find_best
from visionloop.training.study import Tuning, draw_history, draw_parallel
from visionloop.training.watch import EpochReport, TrialReport


def make_reports(losses: Sequence[float], monitor: str = "val/loss") -> list[EpochReport]:
    return [
        EpochReport(n, len(losses), {"train/loss": v, "val/loss": v, "val/accuracy": 1 - v}, 1, 1, monitor, 0, 0, 5, 0)
        for n, v in enumerate(losses, start=1)
    ]


def make_trial(number: int, state: str, value: float | None, **values: object) -> TrialReport:
    return TrialReport(number, state, "val/accuracy", value, value, state == "done", values, 1, 1.0, "")


def measure(png: bytes) -> tuple[int, int]:
    with Image.open(io.BytesIO(png)) as image:
        return image.size


def test_best_epoch_is_the_first_of_equals_and_never_nan() -> None:
    assert find_best(make_reports([0.5, 0.25, 0.25, 0.75])).epoch == 2
    assert find_best(make_reports([0.5, 0.25, 0.75], "val/accuracy")).epoch == 2
    assert find_best(make_reports([math.nan, 0.25])).epoch == 2
    assert find_best(make_reports([math.nan, math.nan])).epoch == 1


@pytest.mark.parametrize("losses", [[0.5], [math.nan, 0.0, -1.0], [0.5] * 300])
def test_curve_is_the_same_size_for_one_epoch_and_for_many(losses: list[float]) -> None:
    reports = make_reports(losses)
    assert measure(draw_curve(reports)) == (1210, 396)
    assert draw_curve(reports[:2]) == draw_curve(reports[:2])


def test_overlay_takes_runs_of_different_lengths_and_figures() -> None:
    curves = {"a": {"val/loss": [(1, 0.5), (2, 0.25)]}, "b": {"val/accuracy": [(1, 0.5)]}}
    wide, high = measure(draw_overlay(curves, [["val/loss"], ["val/accuracy"]]))
    assert wide > high
    assert measure(draw_overlay(curves, [["val/loss"]]))[0] < wide


def test_figures_that_share_an_axis_are_linear_and_a_run_keeps_its_colour(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[tuple[str, str, str, str]] = []

    def draw(axes: Any, *values: Any, label: str, color: str, style: str) -> None:
        drawn.append((axes.get_title(loc="left") or axes.get_title(), axes.get_yscale(), f"{label} {style}", color))
        axes.plot(*values, label=label)

    monkeypatch.setattr(plots, "_draw_line", draw)
    steep = [(1, 0.01), (2, 0.9)]
    curves = {"a": {"val/accuracy": steep, "val/f1": steep}, "b": {"val/accuracy": steep, "val/loss": steep}}
    draw_overlay(curves, [["val/loss"], ["val/accuracy", "val/f1"]])
    assert [(scale, line) for _, scale, line, _ in drawn] == [
        ("log", "b -"),
        ("linear", "a -"),
        ("linear", "a --"),
        ("linear", "b -"),
    ]
    assert drawn[1][0] == "val/accuracy (solid), val/f1 (dashed)"
    assert drawn[0][3] == drawn[3][3] != drawn[1][3], "the same colour in every panel"


def make_tuning(number: int) -> Tuning:
    """A study of some trials with a result, and one that failed."""
    study = optuna.create_study(direction="maximize")
    choices = ("none", None)
    rates = FloatDistribution(1e-4, 1e-2, log=True)
    dists = {"learning_rate": rates, "augment": CategoricalDistribution(choices)}
    for value in range(number):
        params = {"learning_rate": 10.0 ** (value - 4), "augment": choices[value % 2]}
        facts = {"facts": {}}
        study.add_trial(create_trial(value=value / 4, params=params, distributions=dists, user_attrs=facts))
    study.add_trial(create_trial(state=TrialState.FAIL, user_attrs={"facts": {}}))
    params = make_params({"name": "shapes", "tune": {"space": {"learning_rate": [1e-4, 1e-2], "augment": ["none"]}}})
    return Tuning(SimpleNamespace(params=params), study, Path("study.db"), {})  # type: ignore[arg-type]


def test_the_parallel_picture_is_drawn_with_and_without_a_result() -> None:
    pictures = {number: draw_parallel(make_tuning(number)) for number in (0, 1, 3)}
    assert all(measure(png)[0] > 500 for png in pictures.values())
    assert len(set(pictures.values())) == 3
    assert pictures[3] == draw_parallel(make_tuning(3))
    assert pyplot.get_fignums() == [], "no figure stays in memory"


def test_the_history_is_drawn_without_a_result_and_with_all_kinds() -> None:
    failed = [make_trial(1, "failed", None)]
    some = [*failed, make_trial(2, "pruned", 0.25), make_trial(3, "done", 0.5)]
    pictures = [draw_history(reports, "val/accuracy") for reports in (failed, some, some[2:])]
    assert all(measure(png)[0] > 700 for png in pictures)
    assert len(set(pictures)) == 3
