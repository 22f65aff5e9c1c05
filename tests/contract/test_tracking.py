"""One suite over MLflow (SQLite) and the MLflow in memory that other tests use; then what only MLflow can get wrong."""

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from fakes import make_bundle
from memory_tracking import MemoryTracking
from visionloop.errors import DiskError, SettingsError, TrackingError
from visionloop.tracking import DIGEST_TAG, MlflowTracking, Tracking

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
    assert (restored.name, restored.kind, restored.status) == ("restored", "restored", "FINISHED")
    assert (tracking.find_version("d" * 64), tracking.find_version("e" * 64)) == ("1", "2")
    tracking.set_champion("2")
    assert tracking.get_champion() == "2"
    with pytest.raises(TrackingError):
        tracking.set_champion("3")


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
