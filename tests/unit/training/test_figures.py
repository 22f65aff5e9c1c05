"""An epoch's figures against hand-made answers, and the check of what is monitored."""

import math

import pytest
import torch

from visionloop.errors import ParamsError
from visionloop.params import Train
from visionloop.training.checks import check_monitor, list_figures
from visionloop.training.losses import compute_figures, count_right


def test_figures_of_one_class() -> None:
    units_nk = torch.tensor([[2.0, 0, 0], [0, 2.0, 0], [0, 2.0, 0], [0, 0, 2.0]])
    figures = compute_figures(units_nk, torch.tensor([0, 1, 2, 2]), "multiclass")
    right, wrong = -math.log(math.e**2 / (math.e**2 + 2)), -math.log(1 / (math.e**2 + 2))
    assert figures["val/loss"] == pytest.approx((3 * right + wrong) / 4)
    assert figures["val/accuracy"] == 0.75
    assert figures["val/f1"] == pytest.approx((1 + 2 / 3 + 2 / 3) / 3)
    assert set(figures) == {"val/loss", "val/accuracy", "val/f1"}


def test_figures_of_two_classes_go_by_the_sign_of_the_unit() -> None:
    figures = compute_figures(torch.tensor([[3.0], [-1.0], [0.5], [-2.0]]), torch.tensor([1, 0, 0, 0]), "binary")
    assert figures["val/accuracy"] == 0.75
    assert figures["val/f1"] == pytest.approx((0.8 + 2 / 3) / 2)
    expected = [math.log1p(math.exp(z)) for z in (-3.0, -1.0, 0.5, -2.0)]
    assert figures["val/loss"] == pytest.approx(sum(expected) / 4)


def test_figures_of_several_labels() -> None:
    units_nk = torch.tensor([[1.0, -1, -5], [1.0, 1, -5], [-1.0, 1, -5], [-1.0, -2, -5]])
    targets_nk = torch.tensor([[1, 0, 0], [1, 0, 0], [0, 1, 0], [0, 1, 0]], dtype=torch.uint8)
    figures = compute_figures(units_nk, targets_nk, "multilabel")
    assert figures["val/accuracy"] == 0.5, "the second has one label too many, the last one too few"
    assert figures["val/f1"] == pytest.approx((1 + 0.5) / 2), "of the classes that occur"
    # Class 1 is ranked 1, 1, -1, -2: one of its two images among the first two, the other the last of four.
    assert figures["val/map"] == pytest.approx((1 + (0.5 * 0.5 + 0.5 * 0.5)) / 2)
    assert int(count_right(units_nk, targets_nk, "multilabel")) == 2


def test_average_precision_of_no_positive_is_zero_and_of_nan_is_nan() -> None:
    nothing = torch.zeros(2, 2, dtype=torch.uint8)
    assert compute_figures(torch.zeros(2, 2), nothing, "multilabel")["val/map"] == 0
    assert math.isnan(compute_figures(torch.full((2, 2), math.nan), nothing, "multilabel")["val/map"])


def test_what_can_be_monitored() -> None:
    assert list_figures("multiclass", "train") == (
        "train/loss",
        "train/accuracy",
        "val/loss",
        "val/accuracy",
        "val/f1",
    )
    assert list_figures("multilabel", "train")[-1] == "val/map"
    assert list_figures("binary", "all") == ("train/loss", "train/accuracy")


@pytest.mark.parametrize(
    ("section", "task", "line"),
    [
        (
            Train(monitor="val/accuarcy"),
            "binary",
            "params.yaml train.monitor: got 'val/accuarcy', which no epoch of a binary training (on: train) has; "
            "expected one of train/loss, train/accuracy, val/loss, val/accuracy, val/f1; near: val/accuracy. "
            "Edit the file.",
        ),
        (Train(monitor="val/map"), "multiclass", "got 'val/map', which no epoch of a multiclass training"),
        (Train(on="all", monitor="train/f1"), "binary", "(on: all) has; expected one of train/loss, train/accuracy"),
    ],
)
def test_a_monitor_that_no_epoch_has_is_named_with_those_that_are(section: Train, task: str, line: str) -> None:
    with pytest.raises(ParamsError) as caught:
        check_monitor(section, task)
    assert line in str(caught.value)


def test_every_figure_that_is_listed_can_be_monitored() -> None:
    for task in ("binary", "multiclass", "multilabel"):
        for name in list_figures(task, "train"):
            check_monitor(Train(monitor=name), task)
