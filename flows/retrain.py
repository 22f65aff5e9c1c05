"""The main job: ingest, the stages of dvc.yaml, gate, register, promote, ask. From the shell or on a schedule.

    python flows/retrain.py [--workspace DIR]

From the shell no server is needed: Prefect starts one of its own for the run. Exit codes: 0 done, 2 an error, told in
one line, 3 not promoted. Where nothing has changed, the last verdict stands, with its exit code (0 or 3).
"""

import contextlib
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import environment

if __name__ == "__main__":
    environment.enter_workspace_or_exit(sys.argv[1:], "Retrain, judge and promote the model of a workspace.")

from prefect import flow
from prefect.artifacts import create_markdown_artifact
from prefect.states import Completed, State

import shell
import steps
from visionloop import pipeline
from visionloop.errors import BusyError
from visionloop.promotion.ledger import latest_decision, read_champion
from visionloop.records import Decision
from visionloop.words import Summary, describe_mlflow, describe_outcome, describe_unchanged, shorten_path
from visionloop.workspace import Workspace, lock_for_retrain, open_workspace

Result = TypeVar("Result")


class StepClock:
    """Announces the steps one by one, and keeps how long each took."""

    def __init__(self, total: int) -> None:
        self.total, self.seconds = total, dict[str, float]()

    def run(self, name: str, what: str, work: Callable[[], Result]) -> Result:
        """Announce a step, do it, and note its seconds."""
        steps.say(f"[{len(self.seconds) + 1}/{self.total}] {name}: {what}")
        started = time.perf_counter()
        result = work()
        self.seconds[name] = round(time.perf_counter() - started, 1)
        return result


@flow(name="retrain")
def retrain(workspace: str) -> State[Any]:
    """Bring the champion of a workspace up to date; the summary is the result, and an artifact in Prefect.

    While another retrain of the workspace is under way, whoever started it, this one ends as `Busy` and moves nothing.
    """
    shell.guard_own_server()
    opened = open_workspace(Path(workspace))
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(lock_for_retrain(opened.settings.home))
        except BusyError as exc:
            return end_as_busy(opened.name, exc)
        return bring_up_to_date(opened)


def end_as_busy(name: str, error: BusyError) -> State[Any]:
    """End a run that found another one at work: completed, so that nobody is alarmed, and without an artifact."""
    return Completed(name="Busy", message=str(error), data=Summary(name, "busy", str(error)))


def bring_up_to_date(opened: Workspace) -> State[Any]:
    """Do the steps one by one, as far as they lead."""
    home = str(opened.settings.home)
    stages = pipeline.read_stage_names(opened.settings.home)
    clock = StepClock(len(stages) + 5)
    dataset = clock.run("ingest", "new images into the store", lambda: steps.ingest(home))
    unchanged = find_unchanged(opened, dataset)
    if unchanged:
        steps.say(describe_unchanged(unchanged))
        return finish(summarise(opened, unchanged, "unchanged", clock))
    for stage in stages:
        clock.run(stage, "dvc stage", lambda stage=stage: steps.run_stage.with_options(name=stage)(home, stage))
    found = clock.run("gate", "candidate against champion", lambda: steps.gate(home))
    decision = Decision.from_json(found)
    if decision.verdict != "passed":
        return finish(summarise(opened, decision, decision.verdict, clock))
    clock.run("register", "bundle to the store and to MLflow", lambda: steps.register(home))
    why = f"passed the gate on dataset {dataset['version']} (decision {decision.number})"
    clock.run("promote", "ledger entry and alias", lambda: steps.promote(home, why))
    answers = clock.run("ask", "the served champion about held-out images", lambda: steps.ask(home))
    return finish(summarise(opened, decision, "promoted", clock, answers))


def find_unchanged(workspace: Workspace, dataset: dict[str, Any]) -> Decision | None:
    """Return the last decision if dataset, params, code and champion are still those that it left behind."""
    decision = latest_decision(workspace.store, workspace.name)
    champion = read_champion(workspace.store, workspace.name)
    state = pipeline.compute_state(workspace.settings.home, workspace.params, dataset["digest"])
    if decision is None or decision.state != state:
        return None
    left = decision.candidate if decision.verdict == "passed" else decision.champion
    return decision if left == (champion.bundle if champion else None) else None


def summarise(
    workspace: Workspace,
    decision: Decision,
    outcome: str,
    clock: StepClock,
    answers: list[dict[str, Any]] | None = None,
) -> Summary:
    """Put together what is told at the end."""
    champion = read_champion(workspace.store, workspace.name)
    is_old_news = outcome == "unchanged" and decision.verdict == "passed"
    return Summary(
        name=workspace.name,
        outcome=outcome,
        headline=describe_outcome(outcome, decision),
        dataset=decision.dataset,
        metrics=decision.metrics,
        verdict=decision.verdict,
        rules=[] if is_old_news else [rule.to_json() for rule in decision.rules],
        model={"version": champion.model_version, "bundle": champion.bundle} if champion else {},
        answers=answers or [],
        step_seconds=clock.seconds,
        commands=list_next_commands(workspace, has_champion=champion is not None),
    )


def list_next_commands(workspace: Workspace, *, has_champion: bool) -> dict[str, str]:
    """Return the commands to look further, as they can be pasted into this shell."""
    settings, here = workspace.settings, Path.cwd()
    report = settings.reports_dir / "report.html"
    look = describe_mlflow(settings.tracking_uri, settings.home, here, find_command("mlflow"))
    commands = {"compare runs": look}
    if report.is_file():
        commands["read the report"] = shorten_path(report, settings.home, here)
    if has_champion:
        enter = "" if settings.home == here else f"cd {settings.home} && "
        commands["serve the champion"] = f"{enter}{find_command('visionloop')} serve"
    return commands


def find_command(name: str) -> str:
    """Return how a command of this environment is called here: by its name, or by its path."""
    beside = Path(sys.executable).parent / name
    if shutil.which(name) or not beside.is_file():
        return name
    return str(beside.relative_to(Path.cwd()) if beside.is_relative_to(Path.cwd()) else beside)


def finish(summary: Summary) -> State[Any]:
    """Keep the summary as an artifact, and end the run: completed, by what came of it."""
    create_markdown_artifact(summary.to_markdown(), key="retrain", description=summary.headline)
    return Completed(name=summary.outcome.capitalize(), message=summary.headline, data=summary)


if __name__ == "__main__":
    sys.exit(shell.run(lambda home: retrain(home, return_state=True)))
