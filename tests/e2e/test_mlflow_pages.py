"""A retrain on a real MLflow server: one run that holds the others, datasets, pictures, a version with its words."""

import json
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from shapes import make_environment, visionloop, visionloop_here

START_S = 120


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """An MLflow server on loopback, over SQLite, that keeps the artifacts itself."""
    folder = tmp_path_factory.mktemp("mlflow")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", url.rpartition(":")[2]]
    command += [
        "--backend-store-uri",
        f"sqlite:///{folder}/mlflow.db",
        "--artifacts-destination",
        str(folder / "files"),
    ]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen([*command, "--workers", "1"], env=make_environment(), stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + START_S
        while True:
            assert process.poll() is None, (folder / "log").read_text()
            try:
                urllib.request.urlopen(f"{url}/health", timeout=5)
                break
            except OSError:
                assert time.monotonic() < deadline, (folder / "log").read_text()
                time.sleep(0.3)
        yield url
    finally:
        process.terminate()
        process.wait(timeout=120)


@pytest.fixture(scope="module")
def home(server: str, copied: Path) -> Path:
    """A workspace that was retrained twice: by other params, then only judged again by another rule."""
    params = copied / "params.yaml"
    text = params.read_text().replace("3.0e-3", "2.9e-3").replace("gate: {", "gate: {rule: no_worse, margin: 0.99, ")
    params.write_text(text)
    done = visionloop(copied, "start", MLFLOW_TRACKING_URI=server)
    assert done.returncode == 0, done.stdout + done.stderr
    params.write_text(text.replace("margin: 0.99", "margin: 0.9"))
    done = visionloop(copied, "start", MLFLOW_TRACKING_URI=server)
    assert "is the champion of shapes itself; nothing moved" in done.stdout, done.stdout + done.stderr
    return copied


def list_runs(server: str) -> dict[str, list[Any]]:
    """The runs by kind, oldest first."""
    client = MlflowClient(server)
    experiment = client.get_experiment_by_name("shapes")
    runs = client.search_runs([experiment.experiment_id], order_by=["attributes.start_time ASC"])
    kinds: dict[str, list[Any]] = {}
    for run in runs:
        kinds.setdefault(run.data.tags.get("visionloop.kind", "train"), []).append(run)
    return kinds


def test_each_retrain_is_a_run_that_holds_its_training(home: Path, server: str) -> None:
    runs = list_runs(server)
    assert set(runs) == {"retrain", "train"}
    parents, trainings = runs["retrain"], runs["train"]
    assert [run.info.run_name for run in parents] == ["retrain-dataset2", "retrain-dataset2"]
    (training,) = trainings
    assert training.info.run_name == "small_cnn-scratch-dataset2"
    assert training.data.tags["mlflow.parentRunId"] == parents[0].info.run_id, "of the retrain that has trained it"
    tests = {key: value for key, value in training.data.metrics.items() if key.startswith("test/")}
    assert "test/accuracy" in tests
    for run in (*parents, training):
        assert run.info.status == "FINISHED"
        assert tests.items() <= run.data.metrics.items()
    decision = json.loads((home / "decisions" / "latest.json").read_text())
    verdicts = [parent.data.tags["visionloop.verdict"] for parent in parents]
    assert verdicts == ["passed", decision["verdict"]]
    assert visionloop_here(home, "runs", MLFLOW_TRACKING_URI=server).stdout.count("scratch") == 1, "trainings alone"


def test_dataset_and_source_are_filled_in_every_run(home: Path, server: str) -> None:
    pin = json.loads((home / "data" / "dataset.json").read_text())
    for run in [run for kind in list_runs(server).values() for run in kind]:
        (used,) = run.inputs.dataset_inputs
        assert (used.dataset.name, used.dataset.digest) == ("shapes version 2", pin["digest"][:36])
        uri = json.loads(used.dataset.source)["uri"]
        assert uri == f"{(home / '.visionloop' / 'store').as_uri()}/datasets/shapes/000002.json"
        assert run.data.tags["mlflow.source.name"].startswith("visionloop ")
        assert run.data.tags["mlflow.user"]


def test_every_run_says_in_words_what_it_is(home: Path, server: str) -> None:
    runs = list_runs(server)
    accuracy = runs["train"][0].data.metrics["test/accuracy"]
    words = [run.data.tags["mlflow.note.content"] for run in (*runs["train"], *runs["retrain"])]
    assert words[1].startswith(f"passed (decision 2): accuracy {accuracy:.4f}, champion 0.")
    assert words[1].endswith(" test images of shapes version 2")
    decision = json.loads((home / "decisions" / "latest.json").read_text())
    assert words[0].startswith(f"{decision['verdict']} (decision {decision['number']}): accuracy {accuracy:.4f}")
    assert words[2] == words[0]


def test_a_retrain_has_the_curves_of_its_training(home: Path, server: str) -> None:
    client, runs = MlflowClient(server), list_runs(server)
    (training,) = runs["train"]
    for run in runs["retrain"]:
        for name in ("val/loss", "val/accuracy", "train/loss"):
            ours, theirs = (client.get_metric_history(one.info.run_id, name) for one in (run, training))
            assert [(m.step, m.value) for m in ours] == [(m.step, m.value) for m in theirs]
            assert ours[0].step == 1, "epochs are counted from 1"
        assert [m.step for m in client.get_metric_history(run.info.run_id, "best/epoch")] == [0], "a bar, no curve"


def test_the_figures_of_a_training_are_pictures_on_its_page(home: Path, server: str) -> None:
    client = MlflowClient(server)
    for run in [run for kind in list_runs(server).values() for run in kind]:
        names = {Path(file.path).name.partition("+")[0] for file in client.list_artifacts(run.info.run_id, "images")}
        assert {path.stem for path in (home / "reports" / "figures").glob("*.png")} <= names
        assert "curve" in names
        assert run.data.tags["mlflow.loggedImages"] == "True"


def test_the_registered_version_is_described_and_has_a_signature(home: Path, server: str) -> None:
    client = MlflowClient(server)
    version = client.get_model_version("shapes", "1")
    run = list_runs(server)["train"][0]
    assert version.run_id == run.info.run_id
    accuracy = run.data.metrics["test/accuracy"]
    for words in (
        "**shapes**: binary, 2 classes (`disc, ring`), by `small_cnn`, way `scratch`",
        "(n, 32, 32, 3)",
        f"accuracy {accuracy:.4f}",
        "dataset shapes version 2 (",
        f"[run small_cnn-scratch-dataset2](#/experiments/{run.info.experiment_id}/runs/{run.info.run_id})",
        f"runs/{run.info.run_id}/artifacts/evaluation/report.html)",
    ):
        assert words in version.description, words
    report = client.download_artifacts(run.info.run_id, "evaluation/report.html")
    assert "<html" in Path(report).read_text()
    assert (version.tags["visionloop.backbone"], version.tags["visionloop.way"]) == ("small_cnn", "scratch")
    logged = client.get_logged_model(version.source.removeprefix("models:/"))
    assert ("test/accuracy", accuracy, "shapes version 2") in {(m.key, m.value, m.dataset_name) for m in logged.metrics}
