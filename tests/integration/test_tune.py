"""Tuning: the same suggestions for the same seed, also after a stop or a kill; failures stay alone; what is kept."""

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
from PIL import Image

from fakes import run_here
from trainings import Place, make_place, registered
from visionloop.cli.tune import describe_importance, describe_trials, draw, find_best_trial, keep
from visionloop.errors import BusyError, ParamsError, TrackingError, TrainingError
from visionloop.features.embed import embed
from visionloop.params import Params, make_params
from visionloop.training.fit import Trained
from visionloop.training.job import Job
from visionloop.training.study import Tuning, compute_importance, list_reports, open_tuning, suggest
from visionloop.training.tune import run_trials
from visionloop.training.watch import EpochReport, TrialReport, Watcher
from visionloop.workspace import connect

SPACE = {"learning_rate": {"low": 1e-4, "high": 1e-1, "log": True}, "batch_size": [8, 16, 48]}


class Audience(Watcher):
    """Keeps the trials; `act` may raise at the start of a trial or an epoch, as a stop there would."""

    def __init__(self, act: Callable[[int, int], None] = lambda trial, epoch: None) -> None:
        self.act, self.number = act, 0
        self.tried: list[Mapping[str, Any]] = []
        self.trials: list[TrialReport] = []
        self.lines: list[str] = []

    def tell(self, line: str) -> None:
        self.lines.append(line)

    def on_trial_start(self, number: int, total: int, values: Mapping[str, Any]) -> None:
        self.number = number
        self.tried.append(dict(values))
        self.act(number, 0)

    def on_epoch(self, report: EpochReport) -> None:
        self.act(self.number, report.epoch)

    def on_trial(self, report: TrialReport, total: int) -> None:
        self.trials.append(report)


@pytest.fixture(scope="module", autouse=True)
def tiny(one_thread: None) -> Iterator[None]:
    """A network that learns nothing much, in no time."""
    with registered():
        yield


@pytest.fixture(autouse=True)
def formula(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the place of learning, epochs whose figures follow from the values by a formula; but for tests that train."""
    if "trains" not in request.fixturenames:
        monkeypatch.setattr("visionloop.training.tune.learn", follow_formula)


@pytest.fixture
def trains() -> None:
    """Asked for by tests that really train."""


def follow_formula(job: Job, work: Path, run_id: str) -> Trained:
    """Report epochs: accuracy rises to its best at a rate of 0.01, and falls again in the last epoch."""
    section, metrics = job.params.train, {}
    for epoch in range(1, section.max_epochs + 1):
        reached = epoch if epoch < section.max_epochs else epoch - 1.5
        accuracy = 1 / (1 + abs(math.log10(section.learning_rate) + 2)) - 0.2 / reached - section.batch_size / 1000
        metrics = {"val/accuracy": accuracy, "val/loss": 1 - accuracy}
        job.tracking.log_metrics(run_id, metrics, step=epoch - 1)
        report = EpochReport(epoch, section.max_epochs, metrics, 1.0, 1.0, "val/loss", 0.0, 0, 5, 0.0)
        job.watcher.on_epoch(report)
    return Trained(torch.nn.Identity(), "all epochs", 1, section.max_epochs, metrics)


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return make_place(tmp_path / "ws", backbone="tiny", max_epochs=2)


def make_tune_params(params: Params, **tune: Any) -> Params:
    value = params.model_dump(mode="json", exclude={"ingest", "tune"})
    return make_params({**value, "tune": {"space": SPACE, "trials": 4, **tune}})


def tune(place: Place, watcher: Watcher | None = None, **section: Any) -> Tuning:
    """Run a study to its end, or to whatever the watcher raises."""
    params = make_tune_params(place.params, **section)
    opened = open_tuning(
        connect(place.settings, params, store=place.store, tracking=place.tracking), watcher=watcher or Audience()
    )
    run_trials(opened, params.tune.trials)
    return opened


def strip(reports: list[TrialReport]) -> list[TrialReport]:
    return [replace(report, seconds=0.0) for report in reports]


def test_the_command_says_the_result_alone_when_it_is_asked_to(
    place: Place, trains: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    opened = connect(place.settings, make_tune_params(place.params), store=place.store, tracking=place.tracking)
    monkeypatch.setattr("visionloop.workspace.open_workspace", lambda: opened)
    assert run_here(monkeypatch, "tune", "--quiet") == 0
    quiet = capsys.readouterr().out
    assert quiet.startswith("4 trials in ")
    assert "next: " not in quiet
    assert run_here(monkeypatch, "tune", "--show") == 0
    told = capsys.readouterr().out
    assert told == quiet + "next: `visionloop tune --show --save` writes them there\n"
    assert run_here(monkeypatch, "tune", "--show", "--json") == 0
    assert [one["number"] for one in json.loads(capsys.readouterr().out)["trials"]] == [1, 2, 3, 4]


def test_trials_are_runs_below_one_and_the_best_is_found(place: Place, trains: None) -> None:
    audience = Audience()
    tuning = tune(place, audience)
    reports = list_reports(tuning)
    assert [r.number for r in audience.trials] == [1, 2, 3, 4]
    assert audience.trials == reports
    best = find_best_trial(reports)
    assert best is not None
    done = [r.value for r in reports if r.state == "done" and r.value is not None]
    assert best.value == max(done) == reports[-1].best
    parent, *trials = place.tracking.runs.items()
    assert parent[1]["tags"]["visionloop.kind"] == "tune"
    assert parent[1]["status"] == "FINISHED"
    assert len(trials) == len([r for r in reports if not r.reason.startswith("the same")])
    for _, run in trials:
        assert run["tags"]["mlflow.parentRunId"] == parent[0]
        assert run["tags"]["visionloop.kind"] == "trial"
        assert run["status"] == "FINISHED"
    first = trials[0][1]
    assert first["params"]["train.learning_rate"] == str(reports[0].values["learning_rate"])
    assert first["params"]["train.backbone"] == "tiny"
    values = [figures["val/accuracy"] for figures in first["metrics"].values() if "val/accuracy" in figures]
    assert reports[0].value == max(values), "of the best epoch, not the last"
    assert not place.settings.candidate_dir.exists()
    assert not list(place.settings.work_dir("tune").rglob("*.ckpt"))


def test_same_seed_gives_the_same_study_and_another_seed_another(place: Place, tmp_path: Path) -> None:
    ours = list_reports(tune(place))
    other = make_place(tmp_path / "other", backbone="tiny", max_epochs=2)
    assert strip(list_reports(tune(other))) == strip(ours)
    assert [r.values for r in list_reports(tune(other, seed=1))] != [r.values for r in ours]


@pytest.mark.parametrize("moment", [(3, 0), (3, 1)], ids=["before-it-trains", "within"])
def test_a_stopped_study_goes_on_as_if_it_had_not_been(place: Place, tmp_path: Path, moment: tuple[int, int]) -> None:
    whole = make_place(tmp_path / "whole", backbone="tiny", max_epochs=2)
    expected = strip(list_reports(tune(whole)))

    def stop(*at: int) -> None:
        if at == moment:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tune(place, Audience(stop))
    (parent, *_) = place.tracking.runs
    assert place.tracking.runs[parent]["status"] == "KILLED"
    audience = Audience()
    tuning = tune(place, audience)
    assert strip(list_reports(tuning)) == expected
    assert len(audience.trials) == 2, "those that were finished are not run again"
    assert "trial 3 was stopped: it is run again" in audience.lines
    parents = [i for i, run in place.tracking.runs.items() if run["tags"]["visionloop.kind"] == "tune"]
    assert parents == [parent], "the same run goes on"
    assert all(run["status"] in {"FINISHED", "KILLED"} for run in place.tracking.runs.values())


def test_a_trial_of_a_killed_process_is_marked_and_run_again(place: Place) -> None:
    # What SIGKILL leaves: a trial that runs, its run open, nothing told to anyone.
    params = make_tune_params(place.params)
    tuning = open_tuning(
        connect(place.settings, params, store=place.store, tracking=place.tracking), watcher=Audience()
    )
    tuning.study.sampler = optuna.samplers.RandomSampler(seed=99)
    trial = tuning.study.ask()
    values = suggest(trial, params.tune.space)
    run_id = place.tracking.open_run("trial-001", run_id=None, tags={"visionloop.kind": "trial"}, params={})
    trial.set_user_attr("run_id", run_id)
    audience = Audience()
    finished = list_reports(tune(place, audience))
    assert audience.tried[0] == values
    assert len(finished) == 4, "the killed one does not count"
    assert place.tracking.runs[run_id]["status"] == "KILLED"


def test_more_trials_later_and_none_left_to_do(place: Place) -> None:
    tune(place, trials=2)
    audience = Audience()
    tune(place, audience, trials=3)
    assert [r.number for r in audience.trials] == [3]
    again = Audience()
    tune(place, again, trials=3)
    assert again.tried == []


def test_a_failing_trial_fails_alone(place: Place) -> None:
    def break_second(trial: int, epoch: int) -> None:
        if (trial, epoch) == (2, 1):
            raise TrainingError("train", "the loss is not finite")

    reports = list_reports(tune(place, Audience(break_second)))
    assert [r.state == "failed" for r in reports] == [False, True, False, False]
    assert reports[1].reason == "train: the loss is not finite."
    failed = [run for run in place.tracking.runs.values() if run["status"] == "FAILED"]
    assert len(failed) == 1
    assert "not finite" in failed[0]["tags"]["visionloop.ended"]
    assert any("failed, 2: train: the loss" in line for line in describe_trials(reports))


def test_values_that_do_not_fit_each_other_fail_alone(place: Place) -> None:
    space = {"way": ["scratch", "finetune"], "learning_rate": [0.001, 0.01]}
    reports = list_reports(tune(place, space=space, trials=8))
    ways = {r.values["way"]: r.state for r in reports}
    assert ways == {"scratch": "done", "finetune": "failed"}
    reasons = [r.reason for r in reports if r.state == "failed"]
    assert any("with `way: finetune`" in reason for reason in reasons)


def test_when_all_fail_it_stops_and_says_with_what(place: Place) -> None:
    def break_all(trial: int, epoch: int) -> None:
        if epoch:
            raise RuntimeError("a kernel failed")

    with pytest.raises(TrainingError, match=r"tune: the first 5 trials failed, the last with: .*a kernel failed"):
        tune(place, Audience(break_all), trials=20)


def test_an_unreachable_mlflow_is_not_the_trial_s_fault(place: Place) -> None:
    def lose(trial: int, epoch: int) -> None:
        if (trial, epoch) == (2, 1):
            raise TrackingError("MLflow", "cannot be used")

    with pytest.raises(TrackingError):
        tune(place, Audience(lose))
    assert [r.state for r in list_reports(tune(place))] != [], "the same call goes on"
    assert all(r.state != "failed" for r in list_reports(tune(place)))


def test_the_same_values_are_not_trained_twice(place: Place) -> None:
    audience = Audience()
    reports = list_reports(tune(place, audience, space={"batch_size": [8, 16]}, trials=6))
    trained = [r for r in reports if not r.reason.startswith("the same values as trial")]
    assert len(trained) == len({r.values["batch_size"] for r in reports}) <= 2
    again = next(r for r in reports if r.reason)
    twin = reports[int(again.reason.rpartition(" ")[2]) - 1]
    assert (again.values, again.value) == (twin.values, twin.value)
    runs = [run for run in place.tracking.runs.values() if run["tags"]["visionloop.kind"] == "trial"]
    assert len(runs) == len(trained)


def test_a_trial_that_falls_behind_is_pruned(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optuna.Trial, "should_prune", lambda self: self.number == 1)
    params = replace(place, params=place.with_train(max_epochs=4).params)
    reports = list_reports(tune(params, trials=3))
    assert [r.state for r in reports] == ["done", "pruned", "done"]
    assert (reports[1].epochs, reports[1].reason) == (1, "pruned after epoch 1")
    assert reports[1].value is not None
    assert not reports[1].is_best


@pytest.mark.parametrize("kind", ["none", "median", "hyperband"])
def test_pruners_get_the_epochs(place: Place, kind: str) -> None:
    tuning = tune(place, prune=kind, trials=2)
    done = [t for t in tuning.study.get_trials() if t.state.name == "COMPLETE"]
    assert sorted(done[0].intermediate_values) == [1, 2]


def test_losses_are_to_fall(place: Place) -> None:
    reports = list_reports(tune(place, metric="val/loss"))
    values = [r.value for r in reports if r.state == "done" and r.value is not None]
    best = find_best_trial(reports)
    assert best is not None
    assert best.value == min(values)


@pytest.mark.parametrize(
    ("train", "section", "line"),
    [
        ({"on": "all", "monitor": "train/loss"}, {}, "params.yaml train.on: got 'all'"),
        ({"way": "frozen"}, {"space": {"backbone": ["tiny", "small_cnn"]}}, "params.yaml tune.space.backbone"),
        (
            {"way": "frozen", "solver": "lbfgs"},
            {},
            "params.yaml tune.space.batch_size: changes nothing with train.solver: lbfgs; expected keys that such",
        ),
        (
            {},
            {"metric": "val/accurracy"},
            "params.yaml tune.metric: got 'val/accurracy', which no epoch has; expected one of val/loss",
        ),
    ],
)
def test_what_cannot_be_tuned_is_said_before_the_first_trial(
    place: Place, train: dict[str, Any], section: dict[str, Any], line: str
) -> None:
    with pytest.raises(ParamsError) as caught:
        tune(place.with_train(**train), **section)
    assert line in str(caught.value)
    assert place.tracking.runs == {}


@pytest.mark.parametrize(
    ("space", "needed", "epochs"),
    [({"learning_rate": [0.01, 0.1]}, {"solver": "epochs"}, 2), ({"C": [0.01, 1.0]}, {}, 1)],
)
def test_heads_on_embeddings_are_tuned_by_what_they_learn_by(
    place: Place, space: dict[str, Any], needed: dict[str, str], epochs: int, trains: None
) -> None:
    place, audience = place.with_train(way="frozen", backbone="small_cnn"), Audience()
    embed(place)
    tuning = tune(place, audience, space=space, trials=1)
    assert [(report.state, report.epochs) for report in list_reports(tuning)] == [("done", epochs)]
    assert tuning.needed == needed
    told = "heads on embeddings learn by epochs (train.solver: epochs), as tune.space has keys of steps"
    assert (told in audience.lines) == bool(needed)


def test_a_damaged_database_is_one_line(place: Place) -> None:
    database = tune(place, trials=1).database
    database.write_bytes(b"no database at all" * 100)
    with pytest.raises(TrainingError, match=r"study .*\.db: cannot be read .*Delete it"):
        tune(place, trials=2)


def test_two_at_once_are_refused(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("visionloop.workfolder.LOCK_WAIT_S", 0.0)

    def begin_another(trial: int, epoch: int) -> None:
        if not epoch:
            tune(place)

    with pytest.raises(BusyError):
        tune(place, Audience(begin_another))


def test_other_data_or_values_are_another_study(place: Place) -> None:
    params = make_tune_params(place.params)

    def locate(params: Params) -> str:
        return open_tuning(
            connect(place.settings, params, store=place.store, tracking=place.tracking), watcher=Audience()
        ).database.name

    name = locate(params)
    assert locate(make_tune_params(place.params, trials=99)) == name
    assert locate(make_tune_params(place.with_train(learning_rate=0.5).params)) == name, "it is in the space"
    assert locate(make_tune_params(place.with_train(weight_decay=0.5).params)) != name
    assert locate(make_tune_params(place.params, space={"batch_size": [8]})) != name


def test_what_a_study_came_to(place: Place) -> None:
    tuning = tune(place, trials=10)
    reports = list_reports(tuning)
    lines = describe_trials(reports)
    assert lines[0].startswith("10 trials in ")
    best = find_best_trial(reports)
    assert best is not None
    shown = next(line for line in lines if line.split()[:1] == [str(best.number)])
    assert f"{best.value:.4f}" in shown
    shares = compute_importance(tuning)
    assert not shares or sum(shares.values()) == pytest.approx(1)
    assert len(describe_importance(tuning)) == (1 + len(shares) if shares else 0)
    for path in draw(tuning, reports, logged=True):
        with Image.open(path) as image:
            assert image.width > image.height
    (parent,) = [run for run in place.tracking.runs.values() if run["tags"]["visionloop.kind"] == "tune"]
    assert sorted(parent["artifacts"]) == sorted(f"figures/{p.name}" for p in draw(tuning, reports, logged=False))
    assert parent["metrics"][0] == {"best/val_accuracy": best.value, "trials": 10}


def test_the_best_values_are_written_into_params_yaml(place: Place) -> None:
    tuning = tune(place, trials=2, space={"neighbours.k": [3], "weight_decay": [1e-05], "clip_norm": [None]})
    best = find_best_trial(list_reports(tuning))
    assert best is not None
    path = place.settings.params_path
    path.write_text("# kept\nname: shapes\ntrain:\n  backbone: small_cnn\n")
    said = keep(path, best, save=False)
    assert said[1:] == ["train:", "  clip_norm: null", "  neighbours:", "    k: 3", "  weight_decay: 1.0e-05"]
    assert "is in" not in keep(path, best, save=True)[0]
    text = path.read_text()
    assert text.startswith("# kept\nname: shapes")
    assert "  weight_decay: 1.0e-05\n" in text
    assert "  neighbours:\n    k: 3\n" in text
