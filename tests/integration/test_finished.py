"""A training that is finished stays finished: whatever fails after its last epoch, the next run takes its bundle."""

import errno
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from memory_tracking import MemoryTracking
from shapes import visionloop
from trainings import Ear, Place, make_place, read_json
from visionloop.bundle import load_bundle
from visionloop.errors import DiskError, TrackingError
from visionloop.training import fit

SAID = "this training is finished already"


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return make_place(tmp_path / "ws", counts={"disc": (6, 2, 2), "ring": (6, 2, 2)}, max_epochs=2)


def take(place: Place) -> tuple[Any, Ear]:
    """Train, which must run no epoch; return the note and what was told."""
    ear = Ear()
    note = place.train(ear)
    assert ear.epochs == []
    assert ear.said(SAID)
    assert load_bundle(place.settings.candidate_dir).digest == note.bundle
    assert (place.settings.runs_dir / f"{note.bundle}.json").is_file()
    assert place.tracking.only["status"] == "FINISHED", "one run, and closed"
    return note, ear


def test_what_is_finished_is_taken_when_dvc_has_deleted_its_out(place: Place) -> None:
    """So it is when dvc was killed while it hashed the bundle: it knows nothing of it, and runs the stage again."""
    note = place.train()
    shutil.rmtree(place.settings.candidate_dir)
    assert take(place)[0] == note
    assert take(place)[0] == note, "also when it is still there"


def test_a_kill_before_the_bundle_is_in_its_place_costs_no_epoch(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    def kill(work: Path, target: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(fit, "replace_folder", kill)
        with pytest.raises(KeyboardInterrupt):
            place.train()
    assert not place.settings.candidate_dir.exists()
    assert place.tracking.only["status"] == "RUNNING"
    take(place)


class Closing(MemoryTracking):
    """An MLflow that is away when a run is to be closed."""

    is_away = True

    def close_run(self, run_id: str, status: str = "FINISHED") -> None:
        if self.is_away:
            raise TrackingError("MLflow", "cannot be used (connection refused)")
        super().close_run(run_id, status)


def test_an_mlflow_that_fails_at_the_end_loses_nothing(place: Place) -> None:
    tracking = Closing()
    place = replace(place, tracking=tracking)
    with pytest.raises(TrackingError, match="connection refused"):
        place.train()
    digest = load_bundle(place.settings.candidate_dir).digest
    shutil.rmtree(place.settings.candidate_dir)  # as dvc does before it runs the stage again
    tracking.down = True
    with pytest.raises(TrackingError, match="connection refused"):
        place.train()
    tracking.down = tracking.is_away = False
    assert take(place)[0].bundle == digest


def test_a_bundle_that_was_damaged_since_is_made_again(place: Place) -> None:
    note = place.train()
    (folder,) = place.settings.work_dir("train").glob("*/bundle")
    (folder / "card.json").write_text("{}")
    ear = Ear()
    again = place.train(ear)
    assert again.bundle == note.bundle
    assert [report.epoch for report in ear.epochs] == [1, 2]
    assert not ear.said(SAID)


def test_an_mlflow_that_does_not_know_the_run_gets_a_training_of_its_own(place: Place) -> None:
    place.train()
    other = replace(place, tracking=MemoryTracking())
    ear = Ear()
    other.train(ear)
    assert len(ear.epochs) == 2
    assert other.tracking.only["status"] == "FINISHED"


def test_other_inputs_are_another_training_and_the_finished_one_goes(place: Place) -> None:
    first = place.train()
    (before,) = place.settings.work_dir("train").glob("*/done.json")
    ear = Ear()
    second = place.with_train(seed=1).train(ear)
    assert len(ear.epochs) == 2
    (after,) = place.settings.work_dir("train").glob("*/done.json")
    assert not before.exists()
    assert (first.bundle == second.bundle, read_json(after)["bundle"]) == (False, second.bundle)


def test_a_full_disk_at_the_start_is_one_line(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **options: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "run.json")

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(DiskError) as caught:
        place.train()
    assert str(caught.value) == (
        "run.json: cannot be written (No space left on device); expected a disk with free space. Free some; the same "
        "command goes on from the last finished epoch."
    )


@pytest.mark.parametrize(
    ("key", "value", "line"),
    [
        ("backbone", "resnet81", "train.backbone: got 'resnet81'; expected a known backbone; near: resnet18, "),
        ("weights", "no.pth", "no.pth does not exist; expected none, default or a file."),
        ("monitor", "val/acuracy", "train.monitor: got 'val/acuracy', which no epoch of a binary training"),
        ("neighbours", {"k": 13}, "train.neighbours.k: got 13 with 12 training images; expected at most 12."),
    ],
)
def test_a_typo_is_told_before_torch_is_loaded_and_leaves_no_run(place: Place, key: str, value: Any, line: str) -> None:
    import yaml

    path = place.settings.params_path
    values = yaml.safe_load(path.read_text())
    values["train"] |= {key: value, **({"way": "knn"} if key == "neighbours" else {})}
    path.write_text(yaml.safe_dump(values))
    done = visionloop(place.settings.home, "train")
    assert done.returncode == 2
    assert line in done.stderr
    assert done.stderr.count("\n") == 1
    assert "loading torch" not in done.stdout
    assert not (place.settings.hidden_dir / "mlflow").exists()
