"""Watches what is served, on a schedule: what `visionloop monitor` does, with an artifact and events in Prefect."""

import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from prefect import flow
from prefect.states import Completed, State

import steps
import told
from visionloop.monitoring.alert import send_unsent
from visionloop.monitoring.judge import Verdict, describe_late, describe_verdict
from visionloop.monitoring.watch import find_missed, watch_window, write_copies
from visionloop.up.metrics import write_metrics
from visionloop.workspace import Workspace, open_workspace

DRIFT, QUALITY = "visionloop.drift", "visionloop.quality"  # also `.broken` and `.service`


@flow(name="monitor", **told.HOOKS)
def monitor(workspace: str, now: datetime | None = None) -> State[Any]:
    """Judge the last window; completed as Fine, Learning, Drift, Quality, Broken or Service. `now`: not by the clock.

    Windows that were missed since the last one that was judged come first. An alert of a window is told once as an
    event of Prefect, and sent to the webhook until that has it. Failed: the window was not judged.
    """
    opened, now = open_workspace(Path(workspace)), now or datetime.now(UTC)
    missed, left_out = find_missed(opened, now=now)
    for start in missed:
        late, _ = watch_window(opened, now=now, at=start)
        steps.say(describe_late(late))
        _tell_alert(opened, late)
    if left_out:
        steps.say(f"LOOK: {left_out} older windows were missed: `visionloop monitor --all` judges them too")
    verdict, is_new = watch_window(opened, now=now)
    path = write_copies(opened, verdict)
    lines = describe_verdict(verdict)
    for line in lines:
        steps.say(line)
    page = f"\nWith pictures: `{path}`\n" if path else ""
    told.keep_page("monitor", opened, verdict.verdict, lines, page)
    if is_new:
        _tell_alert(opened, verdict)
    for note in send_unsent(opened, os.environ, now=now):
        steps.say(f"note: {note}")
    write_metrics(opened, now=now)
    return Completed(name=verdict.verdict.capitalize(), message=f"window {verdict.window}: {name_alerts(verdict)}")


def _tell_alert(opened: Workspace, verdict: Verdict) -> None:
    if verdict.is_alert:
        told.tell_event(opened, f"visionloop.{verdict.verdict}", {"window": verdict.window, "p": verdict.p})


def name_alerts(verdict: Verdict) -> str:
    """Name the checks that alert."""
    return ", ".join(str(check["name"]) for check in verdict.list_alerts()) or "no alert"
