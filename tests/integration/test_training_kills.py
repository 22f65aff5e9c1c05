"""Killed at any moment of `visionloop train`: the same command goes on, in the same MLflow run, to the same bundle.

What a kill leaves of a checkpoint that is being written: tests/unit/training/test_checkpoints.py.
"""

import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from shapes import start_training
from trainings import Ear, Place, make_place, read_json
from visionloop.code_digests import compute_code_digests
from visionloop.settings import load_settings
from visionloop.store import open_store

EPOCHS = 6


@pytest.fixture
def place(tmp_path: Path) -> Place:
    counts = {"disc": (60, 12, 4), "ring": (60, 12, 4)}
    return make_place(tmp_path / "ws", counts=counts, max_epochs=EPOCHS).with_mlflow()


def kill_when(home: Path, there: Callable[[], Any], *, after_s: float = 0.0, limit_s: float = 300) -> None:
    """Start the command, and kill it when something is there."""
    process = start_training(home)
    deadline = time.monotonic() + limit_s
    try:
        while not there():
            assert process.poll() is None, f"it ended before it was killed: {process.communicate()[0]}"
            assert time.monotonic() < deadline
            time.sleep(0.002)
        time.sleep(after_s)
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=120)


def test_killed_in_an_epoch_and_while_the_bundle_is_made(place: Place) -> None:
    home, work = place.settings.home, place.settings.work_dir("train")

    def find(pattern: str) -> list[Path]:
        return list(work.glob(pattern))

    kill_when(home, lambda: find("*/checkpoints/epoch-00002-*.ckpt"), after_s=0.1)
    run_id = read_json(find("*/run.json")[0])["run_id"]
    assert len(find("*/checkpoints/*.ckpt")) >= 2
    kill_when(home, lambda: find("*/bundle/model.onnx*") or find("*/bundle/golden"))
    assert not place.settings.candidate_dir.exists()

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the killed ones had
    try:
        ear = Ear()
        code = compute_code()
        note = place.train(ear, code=code)
        whole = copy_without_work(place).train(code=code)
    finally:
        torch.set_num_threads(threads)
    assert ear.epochs == [], "all epochs were kept by the last of them"
    assert note.run_id == run_id
    assert note.bundle == whole.bundle
    client, experiment_id = place.tracking._connect()
    (run,) = client.search_runs([experiment_id])
    assert (run.info.run_id, run.info.status) == (run_id, "FINISHED")
    assert run.data.tags["visionloop.ended"] == "all epochs"
    steps = [metric.step for metric in client.get_metric_history(run_id, "val/loss")]
    assert sorted(set(steps)) == list(range(1, EPOCHS + 1))
    assert sorted(path.name for path in work.glob("*/*")) == ["bundle", "done.json", "run.json", "training"]


def compute_code() -> str:
    """The code's digest, as the command finds it: part of the input key."""
    return compute_code_digests()["train"]


def copy_without_work(place: Place) -> Place:
    """The same workspace elsewhere, in which nobody trained."""
    home = place.settings.home.with_name("other")
    shutil.copytree(place.settings.home, home, ignore=shutil.ignore_patterns("mlflow", "work"))
    settings = load_settings({}, home)
    return replace(place, settings=settings, store=open_store(settings.store_url)).with_mlflow()
