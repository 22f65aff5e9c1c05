"""The runs in MLflow: what is said of each, in `visionloop runs` and in Python alike, and the one of a retrain."""

import contextlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from visionloop.errors import LeaseLost, VisionLoopError
from visionloop.records import Decision, Pin, compute_digest
from visionloop.tracking import DIGEST_TAG, KIND_TAG, PARENT_TAG, RETRAIN_TAG, Run, copy_figures
from visionloop.tracking_pages import make_note, make_used_dataset, make_verdict_tags
from visionloop.workfolder import DONE, is_broken_off, list_work
from visionloop.workspace import Workspace

CURVES = ("train/loss", "train/accuracy", "val/loss", "val/accuracy", "val/f1", "val/map")


@dataclass(frozen=True)
class Marks:
    """The bundles of the champion and of the candidate, by digest; None where there is none.

    `problem`: why nobody can say which the champion is.
    """

    champion: str | None
    candidate: str | None
    problem: VisionLoopError | None = None

    def of(self, run: Run) -> str:
        """Return `champion`, `candidate`, both or nothing."""
        bundle = run.tags.get(DIGEST_TAG)
        marks = {"champion": self.champion, "candidate": self.candidate}
        return " ".join(name for name, digest in marks.items() if bundle and digest == bundle)


COLUMNS: dict[str, Callable[[Run], Any]] = {
    "started": lambda run: run.started_at,
    "run": lambda run: run.run_id,
    "way": lambda run: run.params.get("train.way"),
    "backbone": lambda run: run.params.get("train.backbone"),
    "data": lambda run: to_number(run.tags.get("visionloop.dataset_version")),
    "epochs": lambda run: run.metrics.get("epoch"),
    "val accuracy": lambda run: get_best(run, "val/accuracy"),
    "val loss": lambda run: get_best(run, "val/loss"),
    "test accuracy": lambda run: run.metrics.get("test/accuracy"),
    "time": lambda run: run.seconds,
    "status": lambda run: run.status,
}


def read_marks(workspace: Workspace) -> Marks:
    """Find out which bundles are champion (by the ledger) and candidate; an unreadable candidate is none."""
    from visionloop.bundle import load_bundle
    from visionloop.data.known_store import check_entry
    from visionloop.promotion.ledger import read_champion

    champion = candidate = problem = None
    try:
        check_entry(workspace)  # an empty folder in the store's place has no champion
        entry = read_champion(workspace.store, workspace.name)
        champion = entry.bundle if entry else None
    except VisionLoopError as exc:
        problem = exc
    with contextlib.suppress(VisionLoopError):
        candidate = load_bundle(workspace.settings.candidate_dir).digest
    return Marks(champion, candidate, problem)


def find_stopped(workspace: Workspace) -> set[str]:
    """Return the runs of this workspace's trainings that were broken off: MLflow does not know that they run no more.

    Of a training on another machine nobody can say it here.
    """
    work = workspace.settings.work_dir("train")
    if not is_broken_off(work):
        return set()
    open_work = [work / name for name in list_work(work) if not (work / name / DONE).is_file()]
    found = set()
    for one in open_work:
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            found.add(str(json.loads((one / "run.json").read_bytes())["run_id"]))
    return found


def get_best(run: Run, name: str) -> float | None:
    """Return a figure of the run's best epoch; of its last one while it runs, or if it was killed."""
    return run.metrics.get(f"best/{name.replace('/', '_')}", run.metrics.get(name))


def to_number(text: str | None) -> int | None:
    """Return a tag as a number; None where it is none."""
    return int(text) if text and text.isdecimal() else None


@contextlib.contextmanager
def as_one_run(workspace: Workspace, dataset: dict[str, Any]) -> Iterator[str | None]:
    """Hold the MLflow run that those of this retrain are nested under; yield its id, None while MLflow is away.

    A retrain that was stopped goes on in the same one. MLflow is not needed here: the training tells what is wrong.
    """
    from visionloop import pipeline

    tracking, pin = workspace.tracking, Pin.from_json(dataset)
    used = make_used_dataset(pin, workspace.store.url)
    key = compute_digest(pipeline.compute_state(workspace.settings.home, workspace.params, pin.digest))
    tags = {KIND_TAG: "retrain", RETRAIN_TAG: key, "visionloop.dataset_version": str(pin.version)}
    tags |= make_note(f"A retrain on {used.describe()}")
    run_id: str | None = None
    status: str | None = "FAILED"
    with contextlib.suppress(VisionLoopError):
        known = tracking.find_tagged_run(RETRAIN_TAG, key)
        run_id = tracking.open_run(f"retrain-dataset{pin.version}", run_id=known, tags=tags, params={})
        tracking.log_dataset(run_id, used, "training")
    try:
        yield run_id
        status = "FINISHED"
    except LeaseLost:
        status = None  # who has taken over goes on in the same run, or has closed it
        raise
    except KeyboardInterrupt:  # Ctrl-C or SIGTERM: as the training's own run
        status = "KILLED"
        raise
    finally:
        if run_id and status:
            with contextlib.suppress(VisionLoopError):
                if status == "FINISHED":  # or the candidate may be that of a retrain before
                    _show_training(workspace, run_id)
                tracking.close_run(run_id, status)


def _show_training(workspace: Workspace, parent: str) -> None:
    """Copy what the candidate's training shows to the run of the retrain, and nest it there if it is in none.

    MLflow's page of all runs shows those of retrains alone, until a person opens one.
    """
    from visionloop.bundle import load_run_note

    tracking, candidate = workspace.tracking, read_marks(workspace).candidate
    note = load_run_note(workspace.settings.runs_dir, candidate) if candidate else None
    if note is None:
        return
    run = tracking.load_run(note.run_id)
    tracking.log_metrics(parent, {k: v for k, v in run.metrics.items() if k.startswith(("test/", "best/"))})
    copy_figures(tracking, note.run_id, parent, CURVES)
    reports = workspace.settings.reports_dir
    tracking.log_images(parent, sorted([*reports.glob("training/*.png"), *reports.glob("figures/*.png")]))
    if PARENT_TAG not in run.tags:  # it was finished before
        tracking.set_tags(run.run_id, {PARENT_TAG: parent})


def note_verdict(workspace: Workspace, parent: str | None, decision: Decision) -> None:
    """Tag the run of the retrain with what the gate said, as that of the training is."""
    if parent:
        with contextlib.suppress(VisionLoopError):
            known = workspace.tracking.load_run(parent).tags
            workspace.tracking.set_tags(parent, make_verdict_tags(decision, known))


def close_left_runs(workspace: Workspace) -> list[str]:
    """Close what retrains have left running in MLflow; return the names. One that goes on is opened again."""
    running = list(workspace.tracking.iterate_runs("RUNNING"))
    parents = {run.run_id for run in running if RETRAIN_TAG in run.tags}
    died = [run for run in running if run.run_id in parents or run.tags.get(PARENT_TAG) in parents]
    for run in died:
        workspace.tracking.close_run(run.run_id, "KILLED")
    return [run.name for run in died]
