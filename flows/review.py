"""Asks for labels, on a schedule: makes the next batch of images that are worth one, and tells people that it waits."""

import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from prefect import flow
from prefect.states import Completed, State

import steps
import told
from visionloop.data.answers import Batch, load_batches
from visionloop.errors import DatasetError
from visionloop.monitoring.alert import post_alert
from visionloop.monitoring.ask import ask, describe_reasons, measure_progress
from visionloop.workspace import Workspace, get_user, open_workspace

REVIEW = "visionloop.review"


@flow(name="review", **told.HOOKS)
def review(workspace: str) -> State[Any]:
    """Make the next batch, or find the open one; completed as Asked, StillOpen or NothingToAsk.

    A new batch is told once: an event, and the webhook of the section `monitor`.
    """
    opened = open_workspace(Path(workspace))
    known = {batch.number for batch in load_batches(opened.store, opened.name)}
    try:
        batch = ask(opened, now=datetime.now(UTC), by=get_user())
    except DatasetError as exc:
        if exc.where != f"review {opened.name}":  # the store, or a batch
            raise
        steps.say(str(exc))
        return Completed(name="NothingToAsk", message=exc.found)
    lines = describe_batch(opened, batch)
    for line in lines:
        steps.say(line)
    told.keep_page("review", opened, f"batch {batch.number}", lines)
    if batch.number in known:
        return Completed(name="StillOpen", message=lines[0])
    alert = {"name": opened.name, "batch": batch.number, "images": len(batch.images)}
    told.tell_event(opened, REVIEW, alert)
    if webhook := opened.params.monitor.webhook:
        text = f"{opened.name}: {lines[0]}. {lines[-1]}"
        if failure := post_alert(webhook, {"event": REVIEW, "text": text, **alert}, os.environ):
            steps.say(f"note: the alert was not sent: {failure.problem}")
    return Completed(name="Asked", message=lines[0])


def describe_batch(workspace: Workspace, batch: Batch) -> list[str]:
    """Tell how far a batch is, why its images were chosen, and how to answer."""
    progress = measure_progress(workspace, batch)
    wait = "image waits" if progress.num_images == 1 else "images wait"
    have = "has" if progress.num_answered == 1 else "have"
    return [
        f"batch {batch.number}: {progress.num_images} {wait} for a label, {progress.num_answered} {have} an answer",
        f"why: {describe_reasons(batch.images)}",
        "Answer on a page: `visionloop review --serve --by NAME`",
    ]
