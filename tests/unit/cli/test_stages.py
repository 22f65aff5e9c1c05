"""What `train` says at the end: the best epoch, and how to open what there is."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from memory_tracking import MemoryTracking
from visionloop.cli.stages import describe_best, describe_training
from visionloop.params import make_params
from visionloop.records import RunNote
from visionloop.settings import load_settings

RUN = f"{1:032x}"
BEST = {"best/epoch": 9.0, "best/val_loss": 0.25, "best/val_accuracy": 0.875, "best/val_f1": 0.8, "val/loss": 0.5}


def make_context(home: Path, uri: str, *, tensorboard: bool = False) -> Any:
    (home / "params.yaml").write_text("name: pets\n")
    tracking = MemoryTracking(uri)
    assert tracking.open_run("resnet18-dataset3", run_id=None, tags={}, params={}) == RUN
    tracking.log_metrics(RUN, BEST)
    params = make_params({"name": "pets", "compute": {"tensorboard": tensorboard}})
    return SimpleNamespace(settings=load_settings({}, home), params=params, name=params.name, tracking=tracking)


def test_best_epoch_begins_with_the_monitored_figure() -> None:
    assert describe_best(BEST, "val/loss") == "epoch 9  val/loss 0.2500  val/accuracy 0.8750  val/f1 0.8000"
    assert describe_best(BEST, "val/f1").startswith("epoch 9  val/f1 0.8000  val/loss")
    assert describe_best({"val/loss": 0.5}, "val/loss") == ""


def test_everything_has_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    context = make_context(tmp_path, f"sqlite:///{tmp_path}/.visionloop/mlflow/mlflow.db", tensorboard=True)
    (context.settings.hidden_dir / "tensorboard").mkdir(parents=True)
    (context.settings.reports_dir / "training").mkdir(parents=True)
    (context.settings.reports_dir / "training" / "curve.png").write_bytes(b"")
    note = RunNote("b" * 64, RUN, None, "now", 1.0, {"validated_on": "test"})
    lines = describe_training(context, note, 75.0)
    assert lines == [
        "trained resnet18 (scratch)",
        "an experiment (ingest.split.method: random): every epoch was judged on the test side",
        "  best         epoch 9  val/loss 0.2500  val/accuracy 0.8750  val/f1 0.8000",
        "  curve        reports/training/curve.png",
        "  MLflow       visionloop ui",
        "               experiment pets, run resnet18-dataset3",
        "  TensorBoard  tensorboard --logdir .visionloop/tensorboard",
        f"models/candidate is bundle {'b' * 12}, MLflow run {RUN}, 1 min 15 s",
    ]
    assert all(len(line) <= 100 for line in lines)
    (context.settings.hidden_dir / "tensorboard").rmdir()
    assert not [line for line in describe_training(context, note, 75.0) if "TensorBoard" in line], "nothing to show"


def test_a_password_of_a_server_is_not_shown(tmp_path: Path) -> None:
    context = make_context(tmp_path, "https://me:secret@mlflow.example.com")
    text = "\n".join(describe_training(context, RunNote("b" * 64, RUN, None, "now"), 1.0))
    assert "https://***@mlflow.example.com" in text
    assert "secret" not in text
    assert "curve" not in text
