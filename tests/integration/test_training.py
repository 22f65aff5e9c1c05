"""Training for real: a bundle, a run in MLflow, the same bytes again, going on after a kill, clear refusals."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shapes import find_bundle, find_run, make_workspace, visionloop, visionloop_here
from visionloop.bundle import load_bundle
from visionloop.errors import VisionLoopError
from visionloop.params import load_params
from visionloop.predictor import Predictor
from visionloop.settings import load_settings
from visionloop.tracking import MlflowTracking
from visionloop.training.checks import check_training
from visionloop.training.fit import train
from visionloop.training.job import Call
from visionloop.workspace import connect

EPOCHS = 5


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace with prepared shapes; tests work on copies."""
    home = make_workspace(tmp_path_factory.mktemp("prepared") / "ws", epochs=EPOCHS)
    with (home / "params.yaml").open("a") as params:
        params.write("\ningest: {max_pixels: 70000000}\n")
    assert visionloop_here(home, "prepare").returncode == 0
    return home


@pytest.fixture
def home(prepared: Path, tmp_path: Path) -> Path:
    shutil.copytree(prepared, tmp_path / "ws")
    return tmp_path / "ws"


@pytest.fixture(scope="module")
def trained(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A workspace that was trained without interruption, and what training said."""
    home = tmp_path_factory.mktemp("trained") / "ws"
    shutil.copytree(prepared, home)
    done = visionloop(home, "train")
    assert done.returncode == 0, done.stderr
    return home, done.stdout


def load_run(home: Path, run_id: str) -> Any:
    settings = load_settings({}, home)
    tracking = MlflowTracking(settings.tracking_uri, settings.artifact_root, "shapes")
    client, experiment_id = tracking._connect()
    runs = client.search_runs([experiment_id])
    assert [r.info.run_id for r in runs] == [run_id], "one run, however often it was started"
    return runs[0], client.get_metric_history(run_id, "val/accuracy"), client.list_artifacts(run_id, "figures")


def train_here(home: Path, **env: str) -> None:
    """Train in this process, which has loaded torch already."""
    settings = load_settings(env, home)
    workspace = connect(settings, load_params(settings.params_path))
    train(workspace, check_training(workspace), Call(now="2026-01-01T00:00:00+00:00"))


def refuse_here(home: Path, **env: str) -> str:
    """Return the line of the error that a training ends with."""
    with pytest.raises(VisionLoopError) as caught:
        train_here(home, **env)
    assert caught.value.exit_code == 2
    return str(caught.value)


def test_bundle_is_whole_and_binary(trained: tuple[Path, str]) -> None:
    home, _ = trained
    predictor = Predictor.load(home / "models" / "candidate")
    card = predictor.card
    assert (card.task, card.classes, card.threshold, card.image_size) == ("binary", ("disc", "ring"), 0.5, (32, 32))
    assert card.dataset["digest"] == json.loads((home / "data" / "dataset.json").read_text())["digest"]
    assert 0 <= card.parity < 1e-4
    assert card.max_pixels == load_params(home / "params.yaml").ingest.max_pixels == 70_000_000
    outputs = predictor.run(np.zeros((3, 32, 32, 3), np.uint8))
    assert outputs.logits_nk.shape == (3, 2)
    assert (outputs.logits_nk[:, 0] == 0).all(), "a single unit z is exported as [0, z]"
    with np.load(home / "models" / "candidate" / "reference.npz", allow_pickle=False) as reference:
        assert reference["embedding_nd"].shape == (len(reference["label_n"]), 64)


def test_bundle_carries_no_path_of_this_machine(trained: tuple[Path, str]) -> None:
    home, _ = trained
    for path in (home / "models" / "candidate").rglob("*"):
        if path.is_file():
            data = path.read_bytes()
            assert str(home).encode() not in data
            assert b"site-packages" not in data, path.name


def test_run_in_mlflow_has_params_metrics_and_tags(trained: tuple[Path, str]) -> None:
    home, said = trained
    run, accuracy, figures = load_run(home, find_run(said))
    assert run.info.status == "FINISHED"
    assert run.data.params["train.backbone"] == "small_cnn"
    assert run.data.tags["visionloop.bundle"].startswith(find_bundle(said))
    assert len(run.data.tags["visionloop.dataset_digest"]) == 64
    assert [m.step for m in accuracy] == list(range(1, EPOCHS + 1))
    assert {"train/loss", "val/loss", "val/f1", "train/images_per_s"} <= set(run.data.metrics)
    assert "figures/curve.png" in [f.path for f in figures]
    assert run.data.tags["visionloop.ended"] == "all epochs"
    assert run.data.tags["visionloop.code"] != "none"
    assert run.data.params["task"] == "binary"
    assert run.data.params["train.neighbours.k"] == "5"
    assert {"prepare.image_size", "embed.batch_size"} <= set(run.data.params)


def test_training_twice_gives_the_same_bytes(one_thread: None, trained: tuple[Path, str], home: Path) -> None:
    """Here and in the process of the command."""
    train_here(home)
    ours, theirs = (load_bundle(h / "models" / "candidate") for h in (home, trained[0]))
    assert ours.files == theirs.files


@pytest.mark.parametrize(
    ("old", "new", "line"),
    [
        (
            "small_cnn",
            "resnet81",
            "train.backbone: got 'resnet81'; expected a known backbone; near: resnet18",
        ),
        ("small_cnn", "resnet18, weights: no.pth", "no.pth does not exist; expected none, default or a file."),
        (
            "small_cnn",
            "small_cnn, weights: params.yaml",
            "params.yaml cannot be read as weights (",
        ),
    ],
    ids=["backbone", "missing-weights", "no-weights"],
)
def test_what_cannot_be_trained_is_one_line(home: Path, old: str, new: str, line: str) -> None:
    path = home / "params.yaml"
    path.write_text(path.read_text().replace(old, new))
    refusal = refuse_here(home)
    assert line in refusal
    assert "\n" not in refusal
    assert not (home / "models" / "candidate").exists()


def test_unreachable_mlflow(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    refusal = refuse_here(home, MLFLOW_TRACKING_URI="http://127.0.0.1:9")
    assert refusal.startswith("MLflow http://127.0.0.1:9: cannot be used")
    assert "\n" not in refusal
