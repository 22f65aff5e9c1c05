"""Watches what is served, on a schedule: what `visionloop monitor` does, with an artifact and events in Prefect."""

import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from prefect import flow
from prefect.states import Completed, State

import steps
import told
from visionloop.monitoring.alert import send_alert
from visionloop.monitoring.judge import Verdict, describe_verdict
from visionloop.monitoring.watch import watch_window, write_copies
from visionloop.workspace import open_workspace

DRIFT, QUALITY = "visionloop.drift", "visionloop.quality"  # also `.broken` and `.service`


@flow(name="monitor", **told.HOOKS)
def monitor(workspace: str, now: datetime | None = None) -> State[Any]:
    """Judge the last window; completed as Fine, Learning, Drift, Quality, Broken or Service. `now`: not by the clock.

    An alert of a window is sent once, as an event of Prefect and to the webhook. Failed: the window was not judged.
    """
    opened = open_workspace(Path(workspace))
    verdict, is_new = watch_window(opened, now=now or datetime.now(UTC))
    path = write_copies(opened, verdict)
    lines = describe_verdict(verdict)
    for line in lines:
        steps.say(line)
    page = f"\nWith pictures: `{path}`\n" if path else ""
    told.keep_page("monitor", opened, verdict.verdict, lines, page)
    if is_new and verdict.is_alert:
        told.tell_event(opened, f"visionloop.{verdict.verdict}", {"window": verdict.window, "p": verdict.p})
        webhook = opened.params.monitor.webhook
        if webhook and (problem := send_alert(webhook, verdict, os.environ)):
            steps.say(f"note: {problem}")
    return Completed(name=verdict.verdict.capitalize(), message=f"window {verdict.window}: {name_alerts(verdict)}")


def name_alerts(verdict: Verdict) -> str:
    """Name the checks that alert."""
    return ", ".join(str(check["name"]) for check in verdict.list_alerts()) or "no alert"
