"""New images into the dataset, on a schedule of their own; the event `visionloop.dataset.new` starts the next flow.

A retrain ingests first anyway. This flow is for sources that are to be read more often than models are trained.
"""

from pathlib import Path
from typing import Any

from prefect import flow, runtime
from prefect.states import Cancelled, Completed, State

import steps
import told
from visionloop import retrain
from visionloop.data.manifest import latest_version
from visionloop.errors import LeaseHeld
from visionloop.workspace import open_workspace

NEW_DATASET = "visionloop.dataset.new"


@flow(name="ingest", **told.HOOKS)
def ingest(workspace: str) -> State[Any]:
    """Pull the declared sources; completed as NewData or NothingNew, or Skipped while a retrain is under way.

    Under the lease of a retrain: a dataset that moves under a training would make its stages void.
    """
    opened = open_workspace(Path(workspace))
    lease = retrain.try_to_take_lease(opened, steps.say, str(runtime.flow_run.id))
    if isinstance(lease, LeaseHeld):
        told.keep_end("ingest", opened.settings.home, "skipped", str(lease))
        return Cancelled(name="Skipped", message=str(lease))
    with lease:
        before = latest_version(opened.store, opened.name)
        pin = steps.run_step("ingest", lambda: retrain.ingest(workspace, steps.say))
    is_new = before is None or before.digest != pin["digest"]
    line = f"dataset {opened.name} {'is' if is_new else 'stays'} at version {pin['version']}"
    told.keep_page("ingest", opened, "new images" if is_new else "nothing new", [line, f"{pin['num_images']:,} images"])
    if not is_new:
        return Completed(name="NothingNew", message=line)
    told.tell_event(opened, NEW_DATASET, {"version": pin["version"], "images": pin["num_images"]})
    return Completed(name="NewData", message=line)
