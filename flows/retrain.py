"""The main job: ingest, the stages of dvc.yaml, gate, register, promote, ask. From the shell or on a schedule.

    python flows/retrain.py [--workspace DIR]

From the shell no server is needed: Prefect starts one of its own for the run. Exit codes: 0 done, 2 an error, told in
one line, 3 not promoted. Where nothing has changed, the last verdict stands, with its exit code (0 or 3).
"""

import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import environment

if __name__ == "__main__":
    environment.enter_workspace_or_exit(sys.argv[1:], "Retrain, judge and promote the model of a workspace.")

from prefect import flow, runtime
from prefect.artifacts import create_markdown_artifact, create_table_artifact
from prefect.states import Cancelled, Completed, State

import shell
import steps
import told
from visionloop.errors import LeaseHeld
from visionloop.lifetime import end_process
from visionloop.monitoring.due import decide_retrain
from visionloop.monitoring.triggers import RETRAIN
from visionloop.promotion.ledger import latest_decision
from visionloop.records import Decision
from visionloop.retrain import Scheduled, bring_up_to_date
from visionloop.words import Summary, format_interval
from visionloop.workspace import Workspace, get_user, open_workspace

PROMOTED, PLOT = "visionloop.promoted", "confusion.png"


@flow(name="retrain", **told.HOOKS)
def retrain(workspace: str, only_if_due: bool = False, webhook: str = "") -> State[Any]:
    """Bring the champion of a workspace up to date; the summary is the result, and an artifact in Prefect.

    A run ends in one of these ways, each with its artifact: completed (Promoted, Unchanged, Same); not promoted, which
    Prefect shows as cancelled and not as green (Refused, Inconclusive, Waiting, or Unchanged where that still stands);
    Failed, with the error; or Skipped (cancelled too), while another retrain of this name is under way, whoever started
    it and wherever: it moves nothing. One that is killed is closed, as crashed, by the next run.

    `only_if_due`: the triggers of params.yaml decide first; a run that is not due is completed as NotDue. `webhook` is
    what a caller said, for the trigger of that name.
    """
    shell.guard_own_server()
    opened = open_workspace(Path(workspace))
    try:
        if only_if_due:
            decision = decide_retrain(opened, now=datetime.now(UTC), by=get_user(), webhook=webhook)
            steps.say(found := f"{decision.outcome}: {decision.why}")
            if decision.outcome != RETRAIN:
                return Completed(name="NotDue", message=found)
        summary = bring_up_to_date(
            opened,
            tell=steps.say,
            run_step=steps.run_step,
            ask=steps.ask,
            tell_more=steps.note,
            scheduled=Scheduled(str(runtime.flow_run.id), told.close_died),
        )
    except LeaseHeld as exc:
        told.keep_end("retrain", opened.settings.home, "skipped", f"Another retrain is under way: {exc}")
        return Cancelled(name="Skipped", message=str(exc))
    if summary.outcome == "promoted":
        bundle, dataset = summary.model["bundle"], summary.dataset["version"]
        told.tell_event(opened, PROMOTED, {"bundle": bundle, "dataset": dataset})
    return finish(summary, opened)


def finish(summary: Summary, workspace: Workspace) -> State[Any]:
    """Keep what came of it as artifacts, and end the run by its name. What was not promoted is no success."""
    settings = workspace.settings
    key = told.make_key("retrain", summary.name, settings.home)
    create_markdown_artifact(summary.to_markdown(), key=key, description=f"{settings.home}: {summary.headline}")
    decision = latest_decision(workspace.store, workspace.name)
    if decision is not None:
        create_table_artifact(make_table(decision), key=f"{key}-models", description=f"decision {decision.number}")
        told.keep_image("retrain", workspace, settings.reports_dir / "figures" / PLOT)
    end = Cancelled if summary.is_not_promoted else Completed
    return end(name=summary.outcome.capitalize(), message=summary.headline, data=summary)


def make_table(decision: Decision) -> list[dict[str, str]]:
    """Return the figures of the candidate beside those of the champion, which a first model has not."""
    candidate, champion = decision.metrics, decision.champion_metrics
    return [
        {
            "figure": name,
            "candidate": format_interval(candidate[name]) if name in candidate else "",
            "champion": format_interval(champion[name]) if name in champion else "",
        }
        for name in candidate | champion
    ]


if __name__ == "__main__":
    end_process(shell.run(retrain))
