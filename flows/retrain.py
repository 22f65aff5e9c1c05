"""The main job: ingest, the stages of dvc.yaml, gate, register, promote, ask. From the shell or on a schedule.

    python flows/retrain.py [--workspace DIR]

From the shell no server is needed: Prefect starts one of its own for the run. Exit codes: 0 done, 2 an error, told in
one line, 3 not promoted. Where nothing has changed, the last verdict stands, with its exit code (0 or 3).
"""

import contextlib
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import environment

if __name__ == "__main__":
    environment.enter_workspace_or_exit(sys.argv[1:], "Retrain, judge and promote the model of a workspace.")

from prefect import flow, runtime
from prefect.artifacts import create_markdown_artifact
from prefect.states import Cancelled, Completed, State

import shell
import steps
from ingest import make_key, tell_event
from visionloop.errors import LeaseHeld, VisionLoopError
from visionloop.monitoring.due import decide_retrain
from visionloop.monitoring.triggers import RETRAIN
from visionloop.retrain import Scheduled, bring_up_to_date
from visionloop.words import Summary, describe_error
from visionloop.workspace import Workspace, get_user, open_workspace

PROMOTED = "visionloop.promoted"


@flow(name="retrain")
def retrain(workspace: str, only_if_due: bool = False, webhook: str = "") -> State[Any]:
    """Bring the champion of a workspace up to date; the summary is the result, and an artifact in Prefect.

    A run ends in one of three ways, each with its artifact: completed, named by what came of it (Promoted, Unchanged,
    Same, Refused, Inconclusive); Failed, with the error; or Skipped (cancelled), while another retrain of this name is
    under way, whoever started it and wherever. A run that is skipped moves nothing. One that is killed is closed, as
    crashed, by the next.

    `only_if_due`: the triggers of params.yaml decide first; a run that is not due is completed as NotDue. `webhook` is
    what a caller said, for the trigger of that name.
    """
    shell.guard_own_server()
    opened = open_workspace(Path(workspace))
    try:
        if only_if_due:
            decision = decide_retrain(opened, now=datetime.now(UTC), by=get_user(), webhook=webhook)
            steps.say(told := f"{decision.outcome}: {decision.why}")
            if decision.outcome != RETRAIN:
                return Completed(name="NotDue", message=told)
        summary = bring_up_to_date(
            opened,
            tell=steps.say,
            run_step=steps.run_step,
            ask=steps.ask,
            tell_more=steps.note,
            scheduled=Scheduled(str(runtime.flow_run.id), steps.close_died),
        )
    except LeaseHeld as exc:
        return end_as_skipped(opened, exc)
    except Exception as exc:
        keep_failure(opened, exc)
        raise
    if summary.outcome == "promoted":
        tell_event(opened, PROMOTED, {"bundle": summary.model["bundle"], "dataset": summary.dataset["version"]})
    return finish(summary, opened.settings.home)


def end_as_skipped(workspace: Workspace, error: LeaseHeld) -> State[Any]:
    """End a run that found another one at work. The verdict of the last retrain keeps its own artifact."""
    text = f"# {workspace.name}: skipped\n\nAnother retrain is under way: {error}\n"
    key = f"{make_key('retrain', workspace.name, workspace.settings.home)}-skipped"
    create_markdown_artifact(text, key=key, description=error.found)
    return Cancelled(name="Skipped", message=str(error))


def keep_failure(workspace: Workspace, error: Exception) -> None:
    """Keep what went wrong as an artifact: an error of ours in its own words, any other by its kind."""
    line = describe_error(error) if isinstance(error, VisionLoopError) else f"{type(error).__name__}: {error}"
    text = f"# {workspace.name}: failed\n\n{line}\n"
    key = make_key("retrain", workspace.name, workspace.settings.home)
    with contextlib.suppress(Exception):  # where Prefect is away too, the error that is told stays the first one
        create_markdown_artifact(text, key=key, description=line[:300])


def finish(summary: Summary, home: Path) -> State[Any]:
    """Keep the summary as an artifact, and end the run: completed, by what came of it."""
    key = make_key("retrain", summary.name, home)
    create_markdown_artifact(summary.to_markdown(), key=key, description=f"{home}: {summary.headline}")
    return Completed(name=summary.outcome.capitalize(), message=summary.headline, data=summary)


if __name__ == "__main__":
    sys.exit(shell.run(lambda home: retrain(home, return_state=True)))
