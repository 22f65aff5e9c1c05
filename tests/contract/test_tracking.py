"""One suite over MLflow (SQLite) and the MLflow in memory that other tests use; then what only MLflow can get wrong."""

import errno
import json
import logging
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

from fakes import make_bundle, make_image
from memory_tracking import MemoryTracking
from visionloop.errors import DiskError, SettingsError, TrackingError
from visionloop.params.text import parse_yaml
from visionloop.records import Decision
from visionloop.tracking import DIGEST_TAG, MlflowTracking, Tracking
from visionloop.tracking_file import open_database
from visionloop.tracking_pages import UsedDataset, make_note, make_verdict_tags

NOWHERE = "0" * 32


@pytest.fixture(scope="module")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database with MLflow's tables: to make them takes seconds, so it is done once."""
    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    MlflowTracking(f"sqlite:///{path}", (path.parent / "artifacts").as_uri(), "other").get_champion()
    return path


@pytest.fixture
def mlflow(tmp_path: Path, empty_database: Path) -> MlflowTracking:
    shutil.copy(empty_database, tmp_path / "mlflow.db")
    return MlflowTracking(f"sqlite:///{tmp_path / 'mlflow.db'}", (tmp_path / "artifacts").as_uri(), "pets")


@pytest.fixture(params=["mlflow", "memory"])
def tracking(request: pytest.FixtureRequest) -> Tracking:
    return request.getfixturevalue("mlflow") if request.param == "mlflow" else MemoryTracking()


def open_run(tracking: Tracking, name: str = "first") -> str:
    return tracking.open_run(name, run_id=None, tags={"kind": name}, params={"lr": 0.5, "way": "scratch"})


def test_a_run_that_goes_on_is_the_same_one(tracking: Tracking) -> None:
    run_id = open_run(tracking)
    tracking.close_run(run_id, "KILLED")
    assert tracking.load_run(run_id).status == "KILLED"
    assert tracking.open_run("again", run_id=run_id, tags={}, params={}) == run_id
    run = tracking.load_run(run_id)
    assert (run.run_id, run.name, run.status) == (run_id, "first", "RUNNING")
    assert run.params == {"lr": "0.5", "way": "scratch"}
    assert run.tags["kind"] == "first"
    assert tracking.open_run("new", run_id=NOWHERE, tags={}, params={}) not in {run_id, NOWHERE}


def test_a_run_is_found_by_its_tag(tracking: Tracking) -> None:
    first, second = open_run(tracking), open_run(tracking, "second")
    tracking.set_tags(second, {"visionloop.key": "abc"})
    assert first != second
    assert tracking.find_tagged_run("visionloop.key", "abc") == second
    assert tracking.find_tagged_run("visionloop.key", "other") is None


def test_params_may_be_added_and_never_changed(tracking: Tracking) -> None:
    run_id = open_run(tracking)
    tracking.log_params(run_id, {"lr": 0.5, "epochs": 3})
    assert tracking.load_run(run_id).params == {"lr": "0.5", "way": "scratch", "epochs": "3"}
    with pytest.raises(TrackingError):
        tracking.log_params(run_id, {"lr": 0.25})


def test_figures_are_curves_and_the_last_of_a_step_counts(tracking: Tracking) -> None:
    run_id = open_run(tracking)
    for step, loss in ((0, 1.0), (1, 0.5), (2, 0.25)):
        tracking.log_metrics(run_id, {"val/loss": loss, "epoch": step + 1}, step=step)
    tracking.log_metrics(run_id, {"val/loss": 0.125}, step=2)
    assert tracking.load_run(run_id).metrics == {"val/loss": 0.125, "epoch": 3.0}
    assert tracking.load_curves(run_id, ["val/loss", "nothing"]) == {
        "val/loss": [(0, 1.0), (1, 0.5), (2, 0.125)],
        "nothing": [],
    }


def test_a_verdict_is_the_description_of_a_run_and_a_persons_words_stay(tracking: Tracking) -> None:
    decision = Decision(
        name="pets",
        number=7,
        verdict="refused",
        candidate="c" * 64,
        champion="d" * 64,
        test_digest="",
        num_test=1234,
        rules=(),
        metrics={"accuracy": {"value": 0.91, "low": None, "high": None}},
        champion_metrics={"accuracy": {"value": 0.95, "low": None, "high": None}},
        state={},
        dataset={"name": "pets", "version": 4, "digest": "e" * 64},
        run_id=None,
        decided_at="2026-11-29T20:11:00Z",
    )
    run_id = tracking.open_run("first", run_id=None, tags=make_note("resnet18, way frozen"), params={})
    tracking.set_tags(run_id, make_verdict_tags(decision, tracking.load_run(run_id).tags))
    tags = tracking.load_run(run_id).tags
    words = "refused (decision 7): accuracy 0.9100, champion 0.9500, on 1,234 test images of pets version 4"
    assert (tags["mlflow.note.content"], tags["visionloop.verdict"]) == (words, "refused")
    tracking.set_tags(run_id, {"mlflow.note.content": "looked at all of them"})
    tracking.set_tags(run_id, make_verdict_tags(replace(decision, number=8), tracking.load_run(run_id).tags))
    tags = tracking.load_run(run_id).tags
    assert (tags["mlflow.note.content"], tags["visionloop.decision"]) == ("looked at all of them", "8")


def test_runs_come_newest_first_and_by_status(tracking: Tracking) -> None:
    assert list(tracking.iterate_runs()) == []
    ids = [open_run(tracking, name) for name in ("a", "b", "c")]
    tracking.close_run(ids[1])
    assert {run.run_id for run in tracking.iterate_runs()} == set(ids)
    starts = [run.started_at for run in tracking.iterate_runs()]
    assert starts == sorted(starts, reverse=True)
    (done,) = tracking.iterate_runs("FINISHED")
    assert (done.run_id, done.kind, done.seconds is not None) == (ids[1], "train", True)


def test_an_artifact_that_is_missing_is_named_and_not_tried_again(tracking: Tracking, tmp_path: Path) -> None:
    run_id = open_run(tracking)
    (tmp_path / "figures").mkdir()
    (tmp_path / "figures" / "a.png").write_bytes(b"x")
    tracking.log_artifact(run_id, tmp_path / "figures", "figures")
    tracking.log_artifact(run_id, tmp_path / "figures" / "a.png", "alone")
    with pytest.raises(DiskError, match=r"report\.html: cannot be used .*No such file or directory") as caught:
        tracking.log_artifact(run_id, tmp_path / "report.html", "evaluation")
    assert not caught.value.transient


def test_a_run_that_is_none(tracking: Tracking) -> None:
    open_run(tracking)
    calls: list[Callable[[], object]] = [
        lambda: tracking.load_run(NOWHERE),
        lambda: tracking.log_metrics(NOWHERE, {"a": 1.0}),
        lambda: tracking.set_tags(NOWHERE, {"a": "b"}),
        lambda: tracking.close_run(NOWHERE),
    ]
    for call in calls:
        with pytest.raises(TrackingError):
            call()


def test_the_run_of_a_bundle_is_found_by_its_tag(tracking: Tracking, tmp_path: Path) -> None:
    """A queued experiment trains in a copy of the workspace: its note of the run is not here."""
    make_bundle(tmp_path / "bundle", classes=("a", "b"))
    run_id = open_run(tracking)
    tracking.set_tags(run_id, {DIGEST_TAG: "d" * 64})
    assert tracking.register_onnx(None, tmp_path / "bundle" / "model.onnx", "d" * 64, {}) == "1"
    assert [run.run_id for run in tracking.iterate_runs()] == [run_id]


def test_a_bundle_is_one_version_and_the_alias_points_at_it(tracking: Tracking, tmp_path: Path) -> None:
    make_bundle(tmp_path / "bundle", classes=("a", "b"))
    model, run_id = tmp_path / "bundle" / "model.onnx", open_run(tracking)
    assert (tracking.find_version("d" * 64), tracking.get_champion()) == (None, None)
    assert tracking.register_onnx(run_id, model, "d" * 64, {"visionloop.decision": "1"}) == "1"
    assert tracking.register_onnx(run_id, model, "d" * 64, {"visionloop.decision": "2"}) == "1"
    assert [run.run_id for run in tracking.iterate_runs()] == [run_id]
    assert tracking.register_onnx(NOWHERE, model, "e" * 64, {}) == "2"
    (restored,) = [run for run in tracking.iterate_runs() if run.run_id != run_id]
    assert (restored.name, restored.kind, restored.status) == ("linear-dataset1", "restored", "FINISHED")
    assert (tracking.find_version("d" * 64), tracking.find_version("e" * 64)) == ("1", "2")
    tracking.set_champion("2")
    assert tracking.get_champion() == "2"
    with pytest.raises(TrackingError):
        tracking.set_champion("3")


def test_datasets_and_pictures_are_logged_for_a_run_that_exists(tracking: Tracking, tmp_path: Path) -> None:
    (tmp_path / "confusion.png").write_bytes(make_image(1))
    used, run_id = UsedDataset("pets", 3, "d" * 64, "s3://store/datasets/pets/000003.json", 12, 2), open_run(tracking)
    for _ in range(2):
        tracking.log_dataset(run_id, used, "training")
    tracking.log_images(run_id, [tmp_path / "confusion.png"])
    with pytest.raises(TrackingError):
        tracking.log_dataset(NOWHERE, used, "training")
    with pytest.raises(TrackingError):
        tracking.log_images(NOWHERE, [tmp_path / "confusion.png"])


def test_mlflow_has_columns_for_source_and_dataset_and_shows_pictures(mlflow: MlflowTracking, tmp_path: Path) -> None:
    from mlflow import MlflowClient

    commit = {"visionloop.git_commit": "c" * 40 + "-dirty"}
    named = MlflowTracking(mlflow.uri, mlflow.artifact_root, "pets", user="ada")
    run_id = named.open_run("a", run_id=None, tags=commit, params={})
    (tmp_path / "confusion.png").write_bytes(make_image(1))
    for address in ("s3://store/datasets/pets/000003.json", "file:///s/datasets/pets/000003.json"):
        named.log_dataset(run_id, UsedDataset("pets", 3, "d" * 64, address, 12, 2), "training")
    named.log_images(run_id, [tmp_path / "confusion.png"])
    client = MlflowClient(mlflow.uri)
    run = client.get_run(run_id)
    assert {key: value for key, value in run.data.tags.items() if key.startswith("mlflow.")} == {
        "mlflow.runName": "a",
        "mlflow.user": "ada",
        "mlflow.source.name": "visionloop train",
        "mlflow.source.type": "LOCAL",
        "mlflow.source.git.commit": "c" * 40,
        "mlflow.loggedImages": "True",
    }
    (one,) = run.inputs.dataset_inputs
    assert (one.dataset.name, one.dataset.digest, one.dataset.source_type) == ("pets version 3", "d" * 36, "s3")
    assert json.loads(one.dataset.profile) == {"num_images": 12, "num_classes": 2, "digest": "d" * 64}
    assert [(tag.key, tag.value) for tag in one.tags] == [("mlflow.data.context", "training")]
    pictures = sorted(Path(file.path).suffix for file in client.list_artifacts(run_id, "images"))
    assert pictures == [".png", ".webp"], "the picture, and a small one for the page"
    assert all("/confusion+step+0+" in file.path for file in client.list_artifacts(run_id, "images"))


def test_a_registered_version_says_what_goes_in_and_comes_out(mlflow: MlflowTracking, tmp_path: Path) -> None:
    from mlflow import MlflowClient

    make_bundle(tmp_path / "bundle", classes=("a", "[b](http://evil) `<img src=x>`\n# c"))
    run_id = open_run(mlflow, "cnn-frozen-dataset1")
    mlflow.log_metrics(run_id, {"test/accuracy": 0.75, "test/accuracy_low": 0.7, "val/loss": 1.0})
    used = UsedDataset("fake", 1, "0" * 64, "s3://store/datasets/fake/000001.json")
    mlflow.log_dataset(run_id, used, "training")
    model = tmp_path / "bundle" / "model.onnx"
    assert mlflow.register_onnx(run_id, model, "d" * 64, {"visionloop.decision": "1"}) == "1"
    client = MlflowClient(mlflow.uri)
    version = client.get_model_version("pets", "1")
    assert version.tags == {
        "visionloop.bundle": "d" * 64,
        "visionloop.decision": "1",
        "visionloop.task": "binary",
        "visionloop.backbone": "linear",
    }
    page = f"#/experiments/{client.get_run(run_id).info.experiment_id}/runs/{run_id}"
    assert version.description.split("\n\n") == [
        "**fake**: binary, 2 classes (`[b](http://evil) <img src=x> # c, a`), by `linear`",
        "**Goes in**: `images`, uint8, (n, 32, 32, 3): RGB by `squash`. It scales them itself.",
        "**Comes out**: `logits`, float32, (n, 2), in the order of the classes: softmax(logits) are the probabilities, "
        "`[b](http://evil) <img src=x> # c` from 0.5 on. `embedding`, float32: a vector for each image.",
        "**On its test side**: accuracy 0.7500",
        "**From**: dataset fake version 1 (`000000000000`) at `s3://store/datasets/fake/000001.json`, "
        f"[run cnn-frozen-dataset1]({page}), [report]({page}/artifacts/evaluation/report.html)",
        f"**Bundle** `{'d' * 64}`: all that serves it is in the store under this digest.",
    ]
    logged = client.get_logged_model(version.model_id or version.source.removeprefix("models:/"))
    signature = read_signature(logged.artifact_location)
    assert [(spec["name"], spec["tensor-spec"]) for spec in signature["inputs"]] == [
        ("images", {"dtype": "uint8", "shape": [-1, 32, 32, 3]})
    ]
    assert [(spec["name"], spec["tensor-spec"]["shape"]) for spec in signature["outputs"]] == [
        ("logits", [-1, 2]),
        ("embedding", [-1, 48]),
    ]
    figures = [(m.key, m.value, m.dataset_name, m.dataset_digest) for m in logged.metrics if m.dataset_name]
    of_test = ("fake version 1", "0" * 36)
    assert sorted(figures) == [("test/accuracy", 0.75, *of_test), ("test/accuracy_low", 0.7, *of_test)]


def read_signature(location: str) -> dict[str, Any]:
    text = Path(unquote(urlsplit(location).path), "MLmodel").read_text()
    signature = parse_yaml(text)["signature"]
    return {side: json.loads(signature[side]) for side in ("inputs", "outputs")}


def test_a_bundle_of_an_unknown_training_gets_a_run_with_its_name_and_params(
    tracking: Tracking, tmp_path: Path
) -> None:
    make_bundle(tmp_path / "bundle", classes=("a", "b"))
    card = json.loads((tmp_path / "bundle" / "card.json").read_text())
    card["params"] = {"train": {"way": "frozen", "seed": 3}}
    (tmp_path / "bundle" / "card.json").write_text(json.dumps(card))
    assert tracking.register_onnx(None, tmp_path / "bundle" / "model.onnx", "d" * 64, {}) == "1"
    (run,) = tracking.iterate_runs()
    assert (run.name, run.kind, run.params) == ("linear-frozen-dataset1", "restored", run.params)
    assert run.params == {"train.way": "frozen", "train.seed": "3"}
    (tmp_path / "bundle" / "card.json").write_text("{")
    assert tracking.register_onnx(None, tmp_path / "bundle" / "model.onnx", "e" * 64, {}) == "2"
    assert {run.name for run in tracking.iterate_runs()} == {"linear-frozen-dataset1", "restored"}


@pytest.mark.parametrize("kind", ["mlflow", "memory"])
def test_a_server_that_does_not_answer_may_be_tried_again(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    away: Tracking = MlflowTracking("http://me:secret@127.0.0.1:1", "", "pets")
    if kind == "memory":
        away = MemoryTracking("http://***@127.0.0.1:1")
        away.down = True
    with pytest.raises(TrackingError, match=r"MLflow http://\*\*\*@127\.0\.0\.1:1: cannot be used") as caught:
        open_run(away)
    assert caught.value.transient
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("names", [(), ("a.png",), ("a.png", None, "/disk/artifacts/a.png")])
def test_a_full_disk_is_no_matter_of_the_network(
    mlflow: MlflowTracking, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, names: tuple[str | None, ...]
) -> None:
    from mlflow.store.artifact.local_artifact_repo import LocalArtifactRepository

    run_id, full = open_run(mlflow), OSError(errno.ENOSPC, "No space left on device", *names)

    def fail(*args: object) -> None:
        raise full

    monkeypatch.setattr(LocalArtifactRepository, "log_artifact", fail)
    with pytest.raises(DiskError, match=r"cannot be used for MLflow sqlite.* \(No space left on device\)") as caught:
        mlflow.log_artifact(run_id, tmp_path / "a.png", "figures")
    assert not caught.value.transient
    assert caught.value.where == (names[-1] if names else str(tmp_path / "mlflow.db"))


@pytest.mark.parametrize("error", [OSError(errno.ENETUNREACH, "Network is unreachable"), TimeoutError("too late")])
def test_a_network_that_is_away_may_come_back(
    mlflow: MlflowTracking, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: OSError
) -> None:
    from mlflow.store.artifact.local_artifact_repo import LocalArtifactRepository

    def fail(*args: object) -> None:
        raise error

    run_id = open_run(mlflow)
    monkeypatch.setattr(LocalArtifactRepository, "log_artifact", fail)
    with pytest.raises(TrackingError) as caught:
        mlflow.log_artifact(run_id, tmp_path / "a.png", "figures")
    assert caught.value.transient


def test_a_database_that_is_damaged_or_cannot_be_opened_is_named(tmp_path: Path, empty_database: Path) -> None:
    damaged = tmp_path / "damaged.db"
    damaged.write_bytes(b"no database" * 1000)
    (tmp_path / "folder.db").mkdir()
    for path in (damaged, tmp_path / "folder.db"):
        with pytest.raises(DiskError, match=rf"^{path}: cannot be used for MLflow sqlite:///{path} \(.+\); expected a"):
            open_run(MlflowTracking(f"sqlite:///{path}", (tmp_path / "artifacts").as_uri(), "pets"))


def test_a_full_database_is_named(mlflow: MlflowTracking) -> None:
    from sqlalchemy import event
    from sqlalchemy.engine import Engine

    def limit(connection: object, record: object, proxy: object) -> None:
        connection.execute("PRAGMA max_page_count = 1")  # type: ignore[attr-defined]

    run_id = open_run(mlflow)
    event.listen(Engine, "checkout", limit)
    try:
        with pytest.raises(DiskError, match=r"mlflow\.db: cannot be used .*database or disk is full"):
            for number in range(200):
                mlflow.set_tags(run_id, {f"tag{number}": "x" * 4000})
    finally:
        event.remove(Engine, "checkout", limit)


def test_an_experiment_that_was_deleted_in_mlflow_can_be_restored(mlflow: MlflowTracking) -> None:
    from mlflow import MlflowClient

    open_run(mlflow)
    client = MlflowClient(mlflow.uri)
    number = client.get_experiment_by_name("pets").experiment_id
    client.delete_experiment(number)
    fresh = MlflowTracking(mlflow.uri, mlflow.artifact_root, "pets")
    with pytest.raises(SettingsError, match=rf"`mlflow experiments restore --experiment-id {number}`") as caught:
        open_run(fresh)
    assert not caught.value.transient
    client.restore_experiment(number)
    assert open_run(fresh)


def test_looking_makes_no_database(tmp_path: Path) -> None:
    tracking = MlflowTracking(f"sqlite:///{tmp_path / 'ws' / 'mlflow.db'}", "", "pets")
    assert list(tracking.iterate_runs()) == []
    assert not (tmp_path / "ws").exists()


def test_a_registered_model_leaves_no_address_in_the_environment(
    mlflow: MlflowTracking, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next workspace that this process opens would take it for its own."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("MLFLOW_EXPERIMENT_ID", "7")
    make_bundle(tmp_path / "bundle", classes=("a", "b"))
    mlflow.register_onnx(None, tmp_path / "bundle" / "model.onnx", "d" * 64, {})
    assert "MLFLOW_TRACKING_URI" not in os.environ
    assert os.environ["MLFLOW_EXPERIMENT_ID"] == "7"


def test_a_failure_of_the_database_is_raised_and_not_logged_with_a_traceback(tmp_path: Path) -> None:
    open_database(tmp_path / "mlflow.db", "artifacts")
    from mlflow.store.db import utils

    assert utils._logger.name == "mlflow.store.db.utils"
    assert not utils._logger.isEnabledFor(logging.ERROR)
