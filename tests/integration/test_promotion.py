"""Two candidates from evaluation to rollback, against a real MLflow on SQLite, and against none."""

from dataclasses import replace
from types import SimpleNamespace

import pytest

from visionloop.errors import TrackingError
from visionloop.evaluation.evaluate import evaluate
from visionloop.promotion.decide import gate
from visionloop.promotion.ledger import latest_decision, read_champion, read_history
from visionloop.promotion.promote import compare_alias, mirror_alias, promote, register, rollback
from visionloop.tracking import MlflowTracking
from worlds import GOOD, POOR, make_world

NOW = "2026-02-03T04:05:06Z"
NOWHERE = "http://127.0.0.1:1"


@pytest.fixture(scope="module")
def loop(tmp_path_factory):
    """A workspace with a real tracking database."""
    home = tmp_path_factory.mktemp("loop")
    world = make_world(home, prepared=True)
    settings = replace(world.settings, tracking_uri=f"sqlite:///{home / 'mlflow.db'}")
    tracking = MlflowTracking(settings.tracking_uri, settings.artifact_root, "fake")
    world = replace(world, settings=settings, tracking=tracking)
    return SimpleNamespace(world=world, tracking=tracking)


def train(loop, seed):
    """Stand in for training: a bundle, its run, and the note that ties them."""
    run_id = loop.tracking.open_run(f"seed {seed}", run_id=None, tags={}, params={"seed": seed})
    loop.tracking.close_run(run_id)
    return loop.world.write_candidate(seed, note=run_id), run_id


def read_run(loop, run_id):
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=loop.tracking.uri)
    folders = [None, "evaluation", "evaluation/figures"]
    artifacts = {item.path for folder in folders for item in client.list_artifacts(run_id, folder) if not item.is_dir}
    return client.get_run(run_id).data, artifacts


def test_two_candidates_from_evaluation_to_rollback(loop):
    place, tracking = loop.world, loop.tracking
    poor, poor_run = train(loop, POOR)
    metrics = evaluate(place)
    data, artifacts = read_run(loop, poor_run)
    assert data.metrics["test/accuracy"] == pytest.approx(metrics["accuracy"].value)
    assert {k for k in data.metrics if k.startswith("test/")} == {f"test/{name}" for name in metrics}, "no bounds"
    assert artifacts >= {"evaluation/report.html", "evaluation/figures/confusion.png", "evaluation/metrics.json"}

    decision = gate(place, state={"dataset": "d"}, now=NOW)
    assert (decision.verdict, decision.run_id) == ("passed", poor_run)
    assert read_run(loop, poor_run)[0].tags["visionloop.verdict"] == "passed"
    # What is judged from the original bytes is what was judged from the prepared arrays.
    assert decision.metrics["accuracy"] == metrics["accuracy"].to_json()

    assert register(loop.world) == register(loop.world) == "1"
    assert promote(loop.world, by="ann", why="first", now=NOW).model_version == "1"
    assert tracking.get_champion() == "1"

    good, good_run = train(loop, GOOD)
    decision = gate(place, state={"dataset": "d"}, now=NOW)
    assert (decision.verdict, decision.champion, decision.number) == ("passed", poor, 2)
    assert register(loop.world) == "2"
    entry = promote(loop.world, by="ann", why="better", now=NOW)
    assert (entry.number, entry.previous, entry.run_id) == (2, poor, good_run)
    assert compare_alias(place) == ("2", "2")

    back = rollback(loop.world, to=None, by="bob", why="a bad feeling", now=NOW)
    assert (back.number, back.bundle, back.model_version) == (3, poor, "1")
    assert compare_alias(place) == ("1", "1")
    tracking.set_champion("2")
    assert compare_alias(place) == ("1", "2")
    assert mirror_alias(loop.world) == "1"
    assert compare_alias(place) == ("1", "1")
    assert [e.action for e in read_history(place.store, "fake")] == ["promote", "promote", "rollback"]
    assert read_champion(place.store, "fake") == back
    assert good != poor


def test_an_unreachable_mlflow_leaves_nothing_that_a_second_run_does_not_finish(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    world = make_world(tmp_path, prepared=True)
    away = MlflowTracking(NOWHERE, "unused", "fake")
    world.write_candidate(GOOD, note="run-of-a-lost-server")
    with pytest.raises(TrackingError, match=r"MLflow http://127\.0\.0\.1:1: cannot be used"):
        evaluate(world)
    assert (world.settings.reports_dir / "metrics.json").is_file()
    with pytest.raises(TrackingError):
        gate(world, state={}, now=NOW)
    assert latest_decision(world.store, "fake").verdict == "passed"
    with pytest.raises(TrackingError):
        register(replace(world, tracking=away))
    with pytest.raises(TrackingError):
        promote(replace(world, tracking=away), by="ann", why="", now=NOW)
    assert read_champion(world.store, "fake") is None

    local = replace(world.settings, tracking_uri=f"sqlite:///{tmp_path / 'mlflow.db'}")
    tracking = MlflowTracking(local.tracking_uri, local.artifact_root, "fake")
    assert register(replace(world, settings=local, tracking=tracking)) == "1"
    assert promote(replace(world, settings=local, tracking=tracking), by="ann", why="", now=NOW).number == 1
    assert latest_decision(world.store, "fake").number == 1
    assert tracking.get_champion() == "1"
