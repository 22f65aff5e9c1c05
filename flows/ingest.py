"""New images into the dataset, on a schedule of their own; the event `visionloop.dataset.new` starts the next flow.

A retrain ingests first anyway. This flow is for sources that are to be read more often than models are trained.
"""

from hashlib import sha256
from pathlib import Path
from typing import Any

from prefect import flow, runtime
from prefect.events import emit_event
from prefect.states import Cancelled, Completed, State

import steps
from visionloop import retrain
from visionloop.data.manifest import latest_version
from visionloop.errors import LeaseHeld
from visionloop.workspace import Workspace, open_workspace

NEW_DATASET = "visionloop.dataset.new"


@flow(name="ingest")
def ingest(workspace: str) -> State[Any]:
    """Pull the declared sources; completed as NewData or NothingNew, or Skipped while a retrain is under way.

    Under the lease of a retrain: a dataset that moves under a training would make its stages void.
    """
    opened = open_workspace(Path(workspace))
    lease = retrain.try_to_take_lease(opened, steps.say, str(runtime.flow_run.id))
    if isinstance(lease, LeaseHeld):
        return Cancelled(name="Skipped", message=str(lease))
    with lease:
        before = latest_version(opened.store, opened.name)
        pin = steps.run_step("ingest", lambda: retrain.ingest(workspace, steps.say))
    if before and before.digest == pin["digest"]:
        return Completed(name="NothingNew", message=f"dataset {opened.name} stays at version {pin['version']}")
    tell_event(opened, NEW_DATASET, {"version": pin["version"], "images": pin["num_images"]})
    return Completed(name="NewData", message=f"dataset {opened.name} is at version {pin['version']}")


def tell_event(workspace: Workspace, event: str, payload: dict[str, Any]) -> None:
    """Tell Prefect's server what happened to a name: its automations, and deployments with a trigger, start by it."""
    emit_event(event=event, resource={"prefect.resource.id": make_resource(workspace.name)}, payload=payload)


def make_key(flow: str, name: str, home: Path) -> str:
    """Return the key of a flow's artifact: each workspace has its own, also of two that bear one name."""
    return f"{flow}-{name}-{sha256(str(home).encode()).hexdigest()[:6]}"


def make_resource(name: str) -> str:
    """Return what Prefect calls the loop of a name in its events."""
    return f"visionloop.{name}"
