"""Steps by a clock that we turn: rate, wait for data, and how often they are told."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from visionloop.training.ranks.world import World
from visionloop.training.views.steps import StepView, read_loss
from visionloop.training.watch import StepReport, Watcher


class Ear(Watcher):
    def __init__(self) -> None:
        self.steps: list[StepReport] = []

    def on_step(self, report: StepReport) -> None:
        self.steps.append(report)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Any:
    times = SimpleNamespace(now=50.0)
    monkeypatch.setattr("visionloop.training.views.steps.time.perf_counter", lambda: times.now)
    return times


TRAINER: Any = SimpleNamespace(
    num_training_batches=4, num_val_batches=[2], current_epoch=6, max_epochs=10, accumulate_grad_batches=1
)
BATCH = SimpleNamespace(rows_n=torch.arange(8))


def run_epoch(view: StepView, clock: Any, *, wait_s: float, step_s: float) -> None:
    module: Any = None
    view.on_train_epoch_start(TRAINER, module)
    for i in range(4):
        clock.now += wait_s
        view.on_train_batch_start(TRAINER, module, BATCH, i)
        clock.now += step_s
        view.on_train_batch_end(TRAINER, module, {"loss": torch.tensor(0.5)}, BATCH, i)
    view.on_validation_start(TRAINER, module)
    clock.now += 3.0
    view.on_validation_end(TRAINER, module)


def make_view(ear: Ear, size: int = 1) -> StepView:
    job: Any = SimpleNamespace(watcher=ear, world=World(size=size))
    return StepView(job)


def test_wait_and_speed_of_an_epoch(clock: Any) -> None:
    view = make_view(Ear())
    run_epoch(view, clock, wait_s=0.25, step_s=0.75)
    figures = view.read_epoch(TRAINER)
    assert figures == {
        "epoch": 7,
        "train/images_per_s": 8.0,
        "train/data_wait_ratio": 0.25,
        "train/epoch_s": 4.0,
        "val/epoch_s": 3.0,
    }
    run_epoch(view, clock, wait_s=0.0, step_s=0.5)
    assert view.read_epoch(TRAINER)["train/data_wait_ratio"] == 0, "each epoch counts anew"


def test_images_are_those_of_all_ranks(clock: Any) -> None:
    view = make_view(Ear(), size=4)
    run_epoch(view, clock, wait_s=0.0, step_s=1.0)
    assert view.read_epoch(TRAINER)["train/images_per_s"] == 32.0


def test_steps_are_told_four_times_a_second_at_most(clock: Any) -> None:
    ear = Ear()
    run_epoch(make_view(ear), clock, wait_s=0.0, step_s=0.1)
    assert [report.step for report in ear.steps] == [3], "0.3 s into the epoch"
    ear = Ear()
    run_epoch(make_view(ear), clock, wait_s=0.0, step_s=1.0)
    assert [(r.epoch, r.max_epochs, r.step, r.num_steps, r.loss) for r in ear.steps] == [
        (7, 10, step, 4, 0.5) for step in (1, 2, 3, 4)
    ]
    assert [r.images_per_s for r in ear.steps] == pytest.approx([8.0] * 4)


def test_without_validation_there_is_no_time_of_it(clock: Any) -> None:
    view = make_view(Ear())
    module: Any = None
    view.on_train_epoch_start(TRAINER, module)
    assert "val/epoch_s" not in view.read_epoch(TRAINER)


def test_loss_is_of_the_whole_batch_when_batches_are_accumulated() -> None:
    trainer: Any = SimpleNamespace(accumulate_grad_batches=4)
    assert read_loss(trainer, {"loss": torch.tensor(0.25)}) == 1.0
    assert read_loss(trainer, torch.tensor(0.25)) == 1.0
    assert read_loss(trainer, None) != read_loss(trainer, None), "NaN"
