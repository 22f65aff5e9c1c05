"""Trainings that are stopped, run out of memory, or diverge: what is kept, what is said, and that nothing changes."""

import gc
import os
import signal
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from trainings import Ear, Place, make_place, read_json, registered, same_weights
from visionloop.data.shards import load_prepared
from visionloop.errors import DatasetError, TrainingError
from visionloop.training import run
from visionloop.training.checkpoints import (
    FOLDER,
    CheckpointFiles,
    SavedEpoch,
    find_checkpoint,
    list_checkpoints,
    load_saved,
    parse_name,
)
from visionloop.training.watch import EpochReport

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return make_place(tmp_path_factory.mktemp("shapes") / "ws")


@pytest.fixture
def work(tmp_path: Path) -> Path:
    return tmp_path / "work"


def test_on_all_stops_by_training_figures_without_validation(shapes: Place, work: Path) -> None:
    place = shapes.with_train(on="all", monitor="train/accuracy", patience=2, max_epochs=30, learning_rate=1e-2)
    ear = Ear()
    outcome = place.learn(ear, work=work)
    assert len(place.make_job().train_rows) == 64, "training and validation side"
    assert outcome.reason == "early stopping"
    assert outcome.num_epochs == outcome.best_epoch + 2 == len(ear.epochs) < 30
    assert outcome.metrics["train/accuracy"] == max(report.metrics["train/accuracy"] for report in ear.epochs)
    assert not any(name.startswith("val/") for report in ear.epochs for name in report.metrics)


def test_stopped_twice_gives_the_same_weights_and_the_whole_history(shapes: Place, tmp_path: Path, work: Path) -> None:
    whole = shapes.learn(work=tmp_path / "whole")
    for epoch in (1, 3):
        with pytest.raises(KeyboardInterrupt):
            shapes.learn(Ear(stop_at=epoch), work=work)
        found = find_checkpoint(work / "checkpoints")
        assert found is not None
        assert parse_name(found.name)[0] == epoch, (
            "the checkpoint of an epoch is on the disk when its report ends the training"
        )
    ear = Ear()
    again = shapes.learn(ear, work=work)
    assert ear.lines[-1] == "going on from epoch 4: 3 are kept"
    assert [report.epoch for report in ear.epochs] == [4]
    assert [report.epoch for report in load_saved(list_checkpoints(work / FOLDER)[0]).history] == [1, 2, 3, 4]
    assert same_weights(again, whole)
    assert (again.reason, again.num_epochs, again.metrics) == (whole.reason, whole.num_epochs, whole.metrics)


def test_a_damaged_checkpoint_is_said_and_changes_nothing(shapes: Place, tmp_path: Path, work: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        shapes.learn(Ear(stop_at=3), work=work)
    (path,) = (work / "checkpoints").glob("epoch-00003-*.ckpt")
    path.write_bytes(path.read_bytes()[:-100] + bytes(100))
    ear = Ear()
    again = shapes.learn(ear, work=work)
    assert ear.said("the checkpoint of epoch 3 is damaged: the one before is used")
    assert ear.said("going on from epoch 3: 2 are kept")
    assert same_weights(again, shapes.learn(work=tmp_path / "whole"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_keeps_the_finished_epochs_and_says_how_to_go_on(shapes: Place, number: signal.Signals) -> None:
    class Signals(Ear):
        def on_epoch(self, report: EpochReport) -> None:
            super().on_epoch(report)
            if report.epoch == 2:
                os.kill(os.getpid(), number)

    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    ear = Signals()
    with pytest.raises(KeyboardInterrupt) as caught:
        shapes.with_train(seed=int(number)).train(ear)
    assert type(caught.value).__name__ == ("Terminated" if number == signal.SIGTERM else "KeyboardInterrupt")
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
    assert ear.lines[-1] == "stopped in epoch 3; the same command goes on from epoch 3 (2 are kept)"
    run = list(shapes.tracking.runs.values())[-1]
    assert (run["status"], run["tags"]["visionloop.ended"]) == ("KILLED", "stopped")
    assert not shapes.settings.candidate_dir.exists()


def cannot_take(number: int, error: Exception) -> Any:
    def fault(features_nd: Tensor, images_nchw: Tensor, is_training: bool) -> Tensor:
        if len(images_nchw) > number:
            raise error
        return features_nd

    return fault


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory: you tried to"),
    ],
    ids=["gpu", "cpu"],
)
def test_out_of_memory_halves_the_batch_and_keeps_the_step(shapes: Place, work: Path, error: Exception) -> None:
    with registered(cannot_take(3, error)) as name:
        ear = Ear()
        outcome = shapes.with_train(backbone=name, max_epochs=3).learn(ear, work=work)
    assert outcome.reason == "all epochs"
    assert [line for line in ear.lines if "memory" in line] == [
        "out of memory with 8 images at a time: going on with 4, 2 parts to a step of 8 as before",
        "out of memory with 4 images at a time: going on with 2, 4 parts to a step of 8 as before",
    ]
    assert shapes.tracking.runs[f"{1:032x}"]["tags"]["visionloop.batch_in_memory"] == "2"
    assert read_json(work / "memory.json") == {"batch_in_memory": 2}
    with registered(cannot_take(3, error)) as name:
        ear = Ear()
        shapes.with_train(backbone=name, max_epochs=4).learn(ear, work=work)
    assert not ear.said("out of memory"), "the next process begins with the size that fits"


def test_less_memory_for_the_same_steps_gives_the_same_network(shapes: Place, tmp_path: Path) -> None:
    """The network has no batch norm: so four parts of two images are a step of eight."""
    with registered() as name:
        whole = shapes.with_train(backbone=name, max_epochs=2).learn(work=tmp_path / "whole")
    batches: list[int] = []

    def fault(features_nd: Tensor, images_nchw: Tensor, is_training: bool) -> Tensor:
        batches.append(len(images_nchw))
        if len(images_nchw) > 2 and len(batches) > 4:  # when some steps were taken already
            raise MemoryError
        return features_nd

    with registered(fault) as name:
        parts = shapes.with_train(backbone=name, max_epochs=2).learn(work=tmp_path / "parts")
    ours, theirs = parts.classifier.state_dict(), whole.classifier.state_dict()
    assert all(torch.allclose(ours[key], theirs[key], atol=1e-4) for key in ours)


def test_out_of_memory_in_a_later_epoch_goes_on_from_the_last_finished_one(shapes: Place, work: Path) -> None:
    ear = Ear()

    def fault(features_nd: Tensor, images_nchw: Tensor, is_training: bool) -> Tensor:
        if len(ear.epochs) == 2 and len(images_nchw) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return features_nd

    with registered(fault) as name:
        shapes.with_train(backbone=name).learn(ear, work=work)
    assert [report.epoch for report in ear.epochs] == [1, 2, 3, 4]
    assert ear.said("going on from epoch 3: 2 are kept")


def test_no_memory_for_one_image_is_one_clear_error(shapes: Place, work: Path) -> None:
    def fault(features_nd: Tensor, images_nchw: Tensor, is_training: bool) -> Tensor:
        if not images_nchw.is_meta:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return features_nd

    with registered(fault) as name, pytest.raises(TrainingError, match="not even one image at a time fits into memory"):
        shapes.with_train(backbone=name).learn(work=work)


def test_memory_of_the_failed_attempt_is_released(shapes: Place, work: Path) -> None:
    held: list[weakref.ref[Tensor]] = []
    alive: list[int] = []

    def fault(features_nd: Tensor, images_nchw: Tensor, is_training: bool) -> Tensor:
        if len(images_nchw) > 4:
            big = torch.zeros(1000) + features_nd.sum()
            held.append(weakref.ref(big))
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 byte")
        alive.append(sum(ref() is not None for ref in held))
        return features_nd

    with registered(fault) as name:
        shapes.with_train(backbone=name, max_epochs=1).learn(work=work)
    gc.collect()
    assert len(held) == 1
    assert set(alive) == {0}


def test_a_loss_that_is_not_finite_stops_at_once_and_keeps_the_batch(shapes: Place, work: Path) -> None:
    ear = Ear()
    calls: list[int] = []

    def fault(features_nd: Tensor, images_nchw: Tensor, is_training: bool) -> Tensor:
        if is_training and len(ear.epochs) == 1:
            calls.append(1)
            if len(calls) == 3:
                return features_nd * float("nan")
        return features_nd

    with registered(fault) as name:
        place = shapes.with_train(backbone=name, learning_rate=2e-3, schedule="constant")
        with pytest.raises(TrainingError) as caught:
            place.learn(ear, work=work)
    line = str(caught.value)
    assert line.startswith(
        "train epoch 2, step 3: the loss is nan at learning rate 0.002; its batch is in .visionloop/"
    )
    assert "Lower train.learning_rate, set train.clip_norm, try train.precision: fp32, and look at the images" in line
    folder = place.settings.hidden_dir / "failed" / f"{1:032x}"
    facts = read_json(folder / "batch.json")
    assert (facts["epoch"], facts["step"], facts["found"]) == (2, 3, "loss nan")
    with np.load(folder / "batch.npz", allow_pickle=False) as batch:
        assert batch["inputs"].shape == (8, 32, 32, 3)
        assert batch["inputs"].dtype == np.uint8
        prepared = load_prepared(place.settings.prepared_dir)
        assert (batch["inputs"] == prepared.read(batch["rows_n"])).all()
        assert (batch["targets"] == prepared.label_n[batch["rows_n"]]).all()
        assert [sha.decode() for sha in batch["sha256_n"]] == [image["sha256"] for image in facts["images"]]
    assert (folder / "batch.png").read_bytes()[:4] == b"\x89PNG"
    artifacts = shapes.tracking.runs[f"{1:032x}"]["artifacts"]
    assert {"failed/batch.json", "failed/batch.npz", "failed/batch.png"} <= set(artifacts)
    found = find_checkpoint(work / "checkpoints")
    assert found is not None
    assert parse_name(found.name)[0] == 1, "nothing of the epoch that went wrong is gone on with"


def test_gradients_that_are_not_finite_stop_before_they_reach_the_weights(shapes: Place, work: Path) -> None:
    def fault(features_nd: Tensor, images_nchw: Tensor, is_training: bool) -> Tensor:
        # The slope of a root at 0 is infinite, and 0 times that is no number: the loss itself is finite.
        return features_nd + torch.sqrt(features_nd * 0) if is_training else features_nd

    with (
        registered(fault) as name,
        pytest.raises(TrainingError, match=r"epoch 1, step 1: the norm of the gradients is nan"),
    ):
        shapes.with_train(backbone=name).learn(work=work)


def test_a_huge_learning_rate_is_told_as_such(shapes: Place, work: Path) -> None:
    place = shapes.with_train(learning_rate=9.9, weight_decay=1e38)
    with pytest.raises(TrainingError, match=r"at learning rate .*Lower train\.learning_rate"):
        place.learn(work=work)
    assert find_checkpoint(work / "checkpoints") is None


def test_weights_that_are_not_finite_make_no_checkpoint(tmp_path: Path) -> None:
    state = {"ok": torch.ones(3), "number": torch.tensor(1), "bad": torch.tensor([1.0, float("inf")])}
    files = CheckpointFiles(tmp_path)
    with files.closing(), pytest.raises(TrainingError, match=r"epoch 7: 1 tensors .* NaN or infinity \(bad first\)"):
        files.save_checkpoint({"state_dict": state}, "", SavedEpoch(7, 7, None, ()))
    assert list(tmp_path.iterdir()) == []


def test_a_kill_while_the_run_is_made_leaves_no_second_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = make_place(tmp_path / "ws", counts={"disc": (4, 2, 0), "ring": (4, 2, 0)})

    def kill(work: Path, run_id: str, token: str) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(run, "remember_run", kill)
        with pytest.raises(KeyboardInterrupt):
            place.train()
    with pytest.raises(KeyboardInterrupt):
        place.train(Ear(stop_at=1))
    params = place.tracking.only["params"]
    assert (params["task"], params["train.neighbours.k"], params["prepare.image_size"]) == ("binary", "5", "32")


def test_one_image_a_class_and_one_epoch_train(tmp_path: Path) -> None:
    place = make_place(tmp_path / "ws", counts={"disc": (1, 1, 0), "ring": (1, 1, 0)}, max_epochs=1)
    outcome = place.learn()
    assert (outcome.num_epochs, outcome.best_epoch, outcome.reason) == (1, 1, "all epochs")
    assert np.isfinite(outcome.metrics["val/loss"])


def test_batches_of_one_image_say_what_batch_norm_needs(tmp_path: Path) -> None:
    place = make_place(
        tmp_path / "ws", counts={"disc": (1, 1, 0), "ring": (1, 1, 0)}, backbone="resnet18", batch_size=1
    )
    with pytest.raises(TrainingError, match=r"batch norm, which needs two values or more; .*Raise train\.batch_size"):
        place.train()
    assert place.tracking.only["status"] == "FAILED"
    assert "batch norm" in place.tracking.only["tags"]["visionloop.ended"]


def test_labels_of_the_validation_side_alone_are_named_with_where_they_are(tmp_path: Path) -> None:
    counts = {"disc": (4, 2, 2), "ring": (4, 2, 2), "bar": (0, 3, 2)}
    place = make_place(tmp_path / "ws", counts=counts)
    with pytest.raises(DatasetError, match=r"no training image of bar, of which the other sides have 5; expected one"):
        place.train()
    assert place.tracking.runs == {}


def test_a_size_that_the_backbone_cannot_take_is_one_line(tmp_path: Path) -> None:
    place = make_place(tmp_path / "ws", counts={"disc": (2, 1, 0), "ring": (2, 1, 0)}, backbone="alexnet")
    with pytest.raises(TrainingError, match=r"prepare\.image_size: alexnet cannot take images of 32 x 32"):
        place.train()
