"""Curves and pictures of a study: which epoch is best, where a value lies, the same bytes again, odd input."""

import io
import math
from collections.abc import Sequence

import pytest
from PIL import Image

from visionloop.params import Span
from visionloop.training.plots import draw_curve, draw_overlay, find_best
from visionloop.training.tune_plots import _list_ticks, _place, draw_history, draw_parallel
from visionloop.training.watch import EpochReport, TrialReport

SPACE = {
    "learning_rate": Span(low=1e-4, high=1e-2, log=True),
    "augment": ("none", None, "light"),
    "k": Span(low=1, high=5),
}


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
    wide, high = measure(draw_overlay(curves, ["val/loss", "val/accuracy"]))
    assert wide > high
    assert measure(draw_overlay(curves, ["val/loss"]))[0] < wide


def test_places_on_an_axis() -> None:
    assert _place(SPACE["learning_rate"], 1e-3) == pytest.approx(0.5)
    assert _place(SPACE["k"], 2) == 0.25
    assert _place(SPACE["augment"], None) == 0.5
    assert math.isnan(_place(SPACE["augment"], "strong"))
    assert math.isnan(_place(SPACE["k"], None))
    assert _place((8,), 8) == 0.0
    assert _list_ticks(SPACE["learning_rate"]) == [("0.0001", 0.0), ("0.001", pytest.approx(0.5)), ("0.01", 1.0)]
    assert [label for label, _ in _list_ticks(SPACE["augment"])] == ["none", "null", "light"]


def test_pictures_of_a_study_without_a_result_and_with_all_kinds() -> None:
    values = {"learning_rate": 1e-3, "augment": "none", "k": 2}
    failed = [make_trial(1, "failed", None, **values)]
    some = [*failed, make_trial(2, "pruned", 0.25, **values), make_trial(3, "done", 0.5, **values)]
    for reports in (failed, some, some[2:]):
        assert measure(draw_parallel(reports, SPACE, "val/accuracy"))[0] > 700
        assert measure(draw_history(reports, "val/accuracy"))[0] > 700
    assert draw_parallel(some, SPACE, "val/accuracy") != draw_parallel(failed, SPACE, "val/accuracy")
