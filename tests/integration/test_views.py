"""What a run shows: figures of an epoch in MLflow, the confusion of its validation, TensorBoard, the curve."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from memory_tracking import MemoryTracking
from trainings import Ear, Place, make_place
from visionloop.training.ranks.world import World
from visionloop.training.views import make_views
from visionloop.training.views.steps import count_confusion
from visionloop.training.watch import StepReport, Watcher


class Audience(Ear):
    """An ear that also looks at pictures and steps."""

    wants_pictures = True

    def __init__(self, stop_at: int | None = None) -> None:
        super().__init__(stop_at)
        self.steps: list[StepReport] = []

    def on_step(self, report: StepReport) -> None:
        self.steps.append(report)


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Place:
    torch.set_num_threads(1)
    return make_place(
        tmp_path_factory.mktemp("views") / "ws", max_epochs=3, compute={"confusion_every": 2, "tensorboard": True}
    )


@pytest.fixture(scope="module")
def learned(shapes: Place, tmp_path_factory: pytest.TempPathFactory) -> tuple[Place, Audience, Path]:
    """A training with everything on."""
    audience, work = Audience(), tmp_path_factory.mktemp("learned")
    shapes.learn(audience, work=work)
    return shapes, audience, work


def test_every_epoch_has_its_speed_wait_and_gradient(learned: tuple[Place, Audience, Path]) -> None:
    place, audience, _ = learned
    metrics = place.tracking.only["metrics"]
    assert [metrics[step]["epoch"] for step in range(1, 4)] == [1, 2, 3], "a step is an epoch, from 1 on"
    for step in range(1, 4):
        figures = metrics[step]
        assert 0 < figures["train/grad_norm"] <= figures["train/grad_norm_max"]
        assert 0 <= figures["train/data_wait_ratio"] < 1
        assert figures["train/images_per_s"] == pytest.approx(48 / figures["train/epoch_s"])
        assert figures["val/epoch_s"] > 0
        assert figures["train/learning_rate"] >= 0
        assert "gpu/memory_gib" not in figures
    assert audience.epochs[1].images_per_s == metrics[2]["train/images_per_s"]


def test_the_best_epoch_is_in_the_run(learned: tuple[Place, Audience, Path]) -> None:
    place, audience, _ = learned
    best = min(audience.epochs, key=lambda report: report.metrics["val/loss"])
    figures = place.tracking.only["metrics"][0]
    assert figures["best/epoch"] == best.epoch
    assert figures["best/val_loss"] == best.metrics["val/loss"]
    assert figures["best/val_accuracy"] == best.metrics["val/accuracy"]


def test_pictures_of_the_run(learned: tuple[Place, Audience, Path]) -> None:
    place, _, work = learned
    artifacts = place.tracking.only["artifacts"]
    assert artifacts.count("figures/curve.png") == 1
    # Every second epoch, and the last one.
    assert [a for a in artifacts if "confusion" in a] == [f"figures/confusion/epoch-00{n}.png" for n in (2, 3)]
    assert {"figures/batch.png", "figures/augment.png"} <= set(artifacts)
    with Image.open(work / "training" / "curve.png") as image:
        assert image.width > 2 * image.height


def test_tensorboard_has_every_epoch_the_steps_the_pictures_and_the_parameters(
    learned: tuple[Place, Audience, Path],
) -> None:
    place, audience, _ = learned
    events = load_events(place)
    assert [(e.step, e.value) for e in events.Scalars("val/loss")] == [
        (6 * number + 5, pytest.approx(report.metrics["val/loss"])) for number, report in enumerate(audience.epochs)
    ]
    assert [e.step for e in events.Scalars("step/loss")] == list(range(18))
    assert {"batch", "augment"} <= set(events.Tags()["images"])
    assert "_hparams_/experiment" in events.summary_metadata


def load_events(place: Place) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (folder,) = (place.settings.hidden_dir / "tensorboard").iterdir()
    events = EventAccumulator(str(folder))
    events.Reload()
    return events


def test_a_resumed_run_goes_on_in_the_same_events_without_a_step_twice(tmp_path: Path) -> None:
    place = make_place(tmp_path / "ws", max_epochs=4, compute={"tensorboard": True})
    first = Audience(stop_at=2)
    with pytest.raises(KeyboardInterrupt):
        place.learn(first, work=tmp_path / "work")
    # What a killed epoch leaves: steps that the resumed run does again.
    from torch.utils.tensorboard import SummaryWriter

    (folder,) = (place.settings.hidden_dir / "tensorboard").iterdir()
    with SummaryWriter(str(folder)) as writer:
        for step in (12, 13, 14):
            writer.add_scalar("step/loss", 99.0, step)
    audience = Audience()
    place.learn(audience, work=tmp_path / "work")
    assert [report.epoch for report in audience.epochs] == [3, 4]
    events = load_events(place)
    losses = {e.step: e.value for e in events.Scalars("step/loss")}
    assert [e.step for e in events.Scalars("step/loss")] == list(range(24)), "no sawtooth"
    assert 99.0 not in losses.values()
    assert [e.value for e in events.Scalars("epoch")] == [1, 2, 3, 4]
    reports = [*first.epochs, *audience.epochs]
    best = min(reports, key=lambda report: report.metrics["val/loss"])
    assert place.tracking.only["metrics"][0]["best/epoch"] == best.epoch, "of all epochs"


def test_steps_are_told_a_few_times_a_second_with_the_loss_of_the_whole_batch(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("visionloop.training.views.steps.TELL_EVERY_S", 0.0)
    place = make_place(tmp_path / "ws", max_epochs=1, accumulate=2)
    audience = Audience()
    place.learn(audience, work=tmp_path / "work")
    train = [report for report in audience.steps if report.phase == "train"]
    assert [(r.step, r.num_steps) for r in train] == [(n + 1, len(train)) for n in range(len(train))]
    assert all(0 <= r.wait_ratio < 1 and r.images_per_s > 0 for r in train)
    loss = audience.epochs[0].metrics["train/loss"]
    assert np.mean([r.loss for r in train]) == pytest.approx(loss, rel=0.3), "not divided by what is accumulated"
    validation = [report for report in audience.steps if report.phase == "val"]
    assert validation
    assert all(np.isnan(r.loss) for r in validation)
    monkeypatch.setattr("visionloop.training.views.steps.TELL_EVERY_S", 60.0)
    quiet = Audience()
    place.learn(quiet, work=tmp_path / "again")
    assert quiet.steps == []


def test_only_the_first_rank_shows_anything_and_trials_no_pictures(shapes: Place, tmp_path: Path) -> None:
    job = shapes.make_job()
    assert make_views(replace(job, world=World(rank=1, size=2)), "run", tmp_path, ()) == []
    names = {type(view).__name__ for view in make_views(replace(job, watcher=Ear()), "run", tmp_path, ())}
    assert names == {"GradientView", "MemoryView", "StepView"}
    everything = [type(view).__name__ for view in make_views(replace(job, watcher=Watcher()), "run", tmp_path, ())]
    assert {"CurveView", "SampleView", "ConfusionView", "TensorBoardView"} <= set(everything)
    assert everything[-1] == "StepView"


def test_several_labels_have_a_picture_of_what_was_found(tmp_path: Path) -> None:
    from types import SimpleNamespace

    from visionloop.training.module import ClassifierModule
    from visionloop.training.views.steps import ConfusionView

    module = ClassifierModule.__new__(ClassifierModule)
    torch.nn.Module.__init__(module)
    module.val_units_nu = torch.tensor([[1.0, -1.0, 2.0], [-1.0, 1.0, -2.0]])
    module.val_targets = torch.tensor([[1, 1, 0], [0, 1, 0]], dtype=torch.uint8)
    tracking = MemoryTracking()
    run_id = tracking.open_run("run", run_id=None, tags={}, params={})
    params = SimpleNamespace(compute=SimpleNamespace(confusion_every=5))
    prepared = SimpleNamespace(classes=("a", "b", "c"))
    job: Any = SimpleNamespace(params=params, prepared=prepared, tracking=tracking)
    trainer: Any = SimpleNamespace(current_epoch=3, max_epochs=10)
    view = ConfusionView(job, run_id, tmp_path)
    view.on_validation_end(trainer, module)
    assert tracking.only["artifacts"] == [], "the fourth epoch of every fifth"
    trainer.current_epoch = 4
    view.on_validation_end(trainer, module)
    assert tracking.only["artifacts"] == ["figures/confusion/epoch-005.png"]
    with Image.open(tmp_path / "figures" / "confusion" / "epoch-005.png") as image:
        assert image.width > 400


def test_confusion_counts_actual_by_row() -> None:
    units_nk = torch.tensor([[2.0, 1.0, 0.0], [0.0, 3.0, 1.0], [5.0, 0.0, 0.0]])
    assert count_confusion(units_nk, torch.tensor([0, 2, 2]), 3).tolist() == [[1, 0, 0], [0, 0, 0], [1, 1, 0]]
    one_unit = torch.tensor([[-1.0], [2.0], [3.0]])
    assert count_confusion(one_unit, torch.tensor([0, 0, 1]), 2).tolist() == [[1, 1], [0, 1]]
