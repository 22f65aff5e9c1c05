"""The main job: ingest, the stages of dvc.yaml, gate, register, promote, ask. From the shell or on a schedule.

    python flows/retrain.py [--workspace DIR]

From the shell no server is needed: Prefect starts one of its own for the run. Exit codes: 0 done, 2 an error, told in
one line, 3 not promoted. Where nothing has changed, the last verdict stands, with its exit code (0 or 3).
"""

import contextlib
import sys
from hashlib import sha256
from pathlib import Path
from typing import Any

import environment

if __name__ == "__main__":
    environment.enter_workspace_or_exit(sys.argv[1:], "Retrain, judge and promote the model of a workspace.")

from prefect import flow
from prefect.artifacts import create_markdown_artifact
from prefect.states import Completed, State

import shell
import steps
from visionloop.errors import BusyError
from visionloop.retrain import bring_up_to_date
from visionloop.words import Summary
from visionloop.workspace import lock_for_retrain, open_workspace


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
        summary = bring_up_to_date(opened, tell=steps.say, run_step=steps.run_step, ask=steps.ask, tell_more=steps.note)
        return finish(summary, opened.settings.home)


def end_as_busy(name: str, error: BusyError) -> State[Any]:
    """End a run that found another one at work: completed, so that nobody is alarmed, and without an artifact."""
    return Completed(name="Busy", message=str(error), data=Summary(name, "busy", str(error)))


def finish(summary: Summary, home: Path) -> State[Any]:
    """Keep the summary as an artifact, and end the run: completed, by what came of it.

    Each workspace has an artifact of its own, also of two that bear one name.
    """
    key = f"retrain-{summary.name}-{sha256(str(home).encode()).hexdigest()[:6]}"
    create_markdown_artifact(summary.to_markdown(), key=key, description=f"{home}: {summary.headline}")
    return Completed(name=summary.outcome.capitalize(), message=summary.headline, data=summary)


if __name__ == "__main__":
    sys.exit(shell.run(lambda home: retrain(home, return_state=True)))
