"""`visionloop tune`: trials of other values for keys of `train`, on the same prepared data. No bundle is made.

.visionloop/work/tune/   the lock, and the checkpoints of the trial that runs
"""

import shutil
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import optuna
from optuna.trial import TrialState

from visionloop.errors import ParamsError, TrainingError
from visionloop.tracking import KIND_TAG, PARENT_TAG
from visionloop.tracking_pages import make_note, make_used_dataset
from visionloop.training.checks import TrainingData
from visionloop.training.fit import learn, make_job, translate_error
from visionloop.training.job import Call, Job
from visionloop.training.run import flatten_params, marking_failure
from visionloop.training.study import (
    FACTS,
    STATES,
    Tuning,
    Values,
    list_finished,
    list_reports,
    make_sampler,
    make_train,
    suggest,
)
from visionloop.training.views.steps import log_best
from visionloop.training.watch import EpochReport, StepReport, Watcher
from visionloop.workfolder import lock_work

GIVE_UP_AFTER = 5  # failed trials, when none went well


def run_trials(tuning: Tuning, trials: int) -> None:
    """Run trials until the study has so many that are finished. The same call goes on after a stop.

    Raises:
        BusyError: another process is at it.
        TrainingError: the first trials all failed.
        KeyboardInterrupt: it was stopped; the trial that ran begins anew next time.
    """
    settings, tracking = tuning.base.settings, tuning.base.tracking
    with lock_work(settings.work_dir("tune"), tuning.database.stem.rpartition("-")[2]) as work:
        _revive(tuning)
        if len(list_finished(tuning.study)) >= trials:
            return
        parent = _open_parent(tuning)
        with marking_failure(tuning.base, parent):
            while (number := len(list_finished(tuning.study))) < trials:
                tuning.study.sampler = make_sampler(tuning.params.tune.seed, number)
                _run_trial(tuning, work, parent, trials)
                _check_failures(tuning.study)
        tracking.close_run(parent)


def _revive(tuning: Tuning) -> None:
    """Mark trials that a killed process left as failed, and queue them again."""
    study = tuning.study
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        if facts := trial.user_attrs.get(FACTS):  # it had ended, and only the study was not told
            study.tell(trial.number, facts["value"], TrialState[facts["state"]])
            continue
        study.tell(trial.number, state=TrialState.FAIL)
        if run_id := trial.user_attrs.get("run_id"):
            tuning.base.tracking.close_run(run_id, "KILLED")
        if trial.params.keys() == tuning.params.tune.space.keys():
            study.enqueue_trial(trial.params)
            tuning.base.watcher.tell(f"trial {trial.number + 1} was stopped: it is run again")


def _open_parent(tuning: Tuning) -> str:
    """Open the MLflow run that holds the trials: the one of before, or a new one."""
    section, pin = tuning.params.tune, tuning.base.prepared.pin
    tags = {KIND_TAG: "tune", "visionloop.dataset_version": str(pin.version), "visionloop.study": tuning.database.name}
    flat = section.model_dump(mode="json", exclude={"space"})
    space = {f"space.{key}": value for key, value in section.model_dump(mode="json")["space"].items()}
    known = tuning.study.user_attrs.get("run_id")
    params = {f"tune.{key}": value for key, value in {**flat, **space}.items()}
    tags |= make_note(f"A search of {', '.join(section.space)} by {section.metric}; each trial is a run in it")
    run_id = tuning.base.tracking.open_run("tune", run_id=known, tags=tags, params=params)
    tuning.base.tracking.log_dataset(
        run_id, make_used_dataset(tuning.base.prepared.pin, tuning.base.store.url), "training"
    )
    tuning.study.set_user_attr("run_id", run_id)
    return run_id


def _run_trial(tuning: Tuning, work: Path, parent: str, total: int) -> None:
    """Ask for values, train with them, and tell the study what came of it."""
    study, started = tuning.study, time.perf_counter()
    trial = study.ask()
    values = suggest(trial, tuning.params.tune.space)
    finished = list_finished(study)
    watcher = _TrialWatcher(tuning, trial)
    tuning.base.watcher.on_trial_start(len(finished) + 1, total, values)
    twin = next((other for other in finished if other.user_attrs[FACTS]["values"] == values), None)
    if twin is not None:
        state, reason = twin.state, f"the same values as trial {1 + finished.index(twin)}"
        value = twin.value if twin.state is TrialState.COMPLETE else None
    else:
        state, reason = _train_trial(tuning, work / f"trial-{trial.number:04d}", parent, watcher, values)
        value = watcher.best if state is TrialState.COMPLETE else None
    facts = {
        "state": state.name,
        "value": value,
        "values": values,
        "reason": reason,
        "epochs": watcher.epochs,
        "best_seen": watcher.best,
        "seconds": round(time.perf_counter() - started, 2),
    }
    trial.set_user_attr(FACTS, facts)  # in one go: each costs a write to the disk
    study.tell(trial, value, state)
    tuning.base.watcher.on_trial(list_reports(tuning)[-1], total)


def _train_trial(
    tuning: Tuning, work: Path, parent: str, watcher: "_TrialWatcher", values: Values
) -> tuple[TrialState, str]:
    """Train with these values in a run and a folder of their own; return how it ended, and why if it went wrong."""
    tracking, trial = tuning.base.tracking, watcher.trial
    flat = {f"train.{key}": value for key, value in values.items()}
    version = tuning.base.prepared.pin.version
    tags = {KIND_TAG: "trial", PARENT_TAG: parent, "visionloop.dataset_version": str(version)}
    tags |= make_note(", ".join(f"{key} {value}" for key, value in values.items()))
    run_id = tracking.open_run(f"trial-{trial.number + 1:03d}", run_id=None, tags=tags, params=flat)
    tracking.log_dataset(run_id, make_used_dataset(tuning.base.prepared.pin, tuning.base.store.url), "training")
    trial.set_user_attr("run_id", run_id)
    ended = (TrialState.FAIL, "")
    with marking_failure(tuning.base, run_id):
        try:
            job = _make_trial_job(tuning, watcher, values)
            tracking.log_params(run_id, flatten_params(job))
            watcher.outcome = learn(job, work, run_id).metrics
            if watcher.best is None:
                raise TrainingError("trial", f"no finite {tuning.params.tune.metric}", "one after the first epoch")
            ended = (TrialState.COMPLETE, "")
        except optuna.TrialPruned:
            ended = (TrialState.PRUNED, f"pruned after epoch {watcher.epochs}")
        except (TrainingError, ParamsError, RuntimeError, MemoryError) as exc:
            error = translate_error(exc)
            if not isinstance(error, TrainingError | ParamsError | MemoryError):
                raise
            ended = (TrialState.FAIL, str(error))
        finally:
            shutil.rmtree(work, ignore_errors=True)
        if watcher.reports:
            log_best(tracking, run_id, watcher.reports)
        tracking.set_tags(run_id, {"visionloop.ended": ended[1] or "done", "visionloop.trial": STATES[ended[0]]})
    tracking.close_run(run_id, "FAILED" if ended[0] is TrialState.FAIL else "FINISHED")
    return ended


def _make_trial_job(tuning: Tuning, watcher: "_TrialWatcher", values: Values) -> Job:
    """Return the job of a trial. Raises ParamsError, TrainingError, DatasetError."""
    base = tuning.base
    params = base.params.model_copy(update={"train": make_train(base.params.train, values)})
    data = TrainingData(base.prepared, base.validated_on)
    return make_job(replace(base, params=params), data, Call(code_digest="tune", watcher=watcher))


def _check_failures(study: optuna.Study) -> None:
    finished = list_finished(study)
    if len(finished) >= GIVE_UP_AFTER and all(trial.state is TrialState.FAIL for trial in finished):
        raise TrainingError(
            "tune",
            f"the first {len(finished)} trials failed, the last with: {finished[-1].user_attrs[FACTS]['reason']}",
            "some to go well",
            "Change tune.space, or see that `visionloop train` works.",
        )


class _TrialWatcher(Watcher):
    """Reports the metric of a trial's epochs to the study, and ends the trial if it is to be pruned."""

    wants_pictures = False

    def __init__(self, tuning: Tuning, trial: optuna.Trial) -> None:
        self.tuning, self.trial = tuning, trial
        self.reports: list[EpochReport] = []
        self.outcome: Mapping[str, float] = {}

    @property
    def epochs(self) -> int:
        """How many epochs were finished."""
        return len(self.reports)

    @property
    def best(self) -> float | None:
        """The best value of the metric; of a way without epochs, the one it ended with."""
        metric = self.tuning.params.tune.metric
        values = [report.metrics[metric] for report in self.reports if metric in report.metrics]
        values = values or [value for name, value in self.outcome.items() if name == metric]
        falls = self.tuning.study.direction is optuna.study.StudyDirection.MINIMIZE
        return (min if falls else max)(values, default=None)

    def tell(self, line: str) -> None:
        """Say nothing: what is chosen by itself is told once, by `visionloop train`."""

    def on_step(self, report: StepReport) -> None:
        self.tuning.base.watcher.on_step(report)

    def on_epoch(self, report: EpochReport) -> None:
        self.reports.append(report)
        self.tuning.base.watcher.on_epoch(report)
        value = report.metrics.get(self.tuning.params.tune.metric)
        if value is not None:
            self.trial.report(value, report.epoch)
            if report.epoch < report.max_epochs and self.trial.should_prune():
                raise optuna.TrialPruned
