"""What flows leave in Prefect: artifacts, events, and a page about a run that did not come to its end.

An artifact's key is that of a flow and a workspace. So the page of the last run stands there, and how the last one
failed stands beside it, under a key of its own: a success does not hide it, and it does not hide the verdict.
"""

import base64
import contextlib
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

from prefect.artifacts import create_image_artifact, create_markdown_artifact
from prefect.events import emit_event

from visionloop.errors import VisionLoopError
from visionloop.params import load_params
from visionloop.secrets import mask
from visionloop.settings import PARAMS_FILE
from visionloop.words import describe_error
from visionloop.workspace import Workspace

MOST_IMAGE_BYTES = 300_000
SHOWN_CHARS = 300
TODO = {
    "failed": "Mend what it says, and run it again: it goes on where it was.",
    "crashed": (
        "Its process is gone: killed, out of memory, or its machine or container was stopped. Nothing is half done: the"
        " next run takes over, and an unfinished training goes on from its last checkpoint."
    ),
    "cancelled": "Somebody stopped it. Nothing is half done: the next run goes on where it was.",
}


def tell_event(workspace: Workspace, event: str, payload: dict[str, Any]) -> None:
    """Tell Prefect's server what happened to a name: its automations, and deployments with a trigger, start by it."""
    emit_event(event=event, resource={"prefect.resource.id": make_resource(workspace.name)}, payload=payload)


def make_resource(name: str) -> str:
    """Return what Prefect calls the loop of a name in its events."""
    return f"visionloop.{name}"


def make_key(flow: str, name: str, home: Path) -> str:
    """Return the key of a flow's artifact: each workspace has its own, also of two that bear one name."""
    return f"{flow}-{name}-{sha256(str(home).encode()).hexdigest()[:6]}"


def keep_page(flow: str, workspace: Workspace, title: str, lines: Sequence[str], more: str = "") -> None:
    """Keep lines as the page of a flow. They are shown as they are: a name that somebody chose cannot end the block."""
    text = "\n".join(lines).replace("`", "'")
    page = f"# {workspace.name}: {title}\n\n```\n{text}\n```\n{more}"
    create_markdown_artifact(page, key=make_key(flow, workspace.name, workspace.settings.home), description=lines[0])


def keep_image(flow: str, workspace: Workspace, path: Path) -> None:
    """Keep a picture (PNG) as an artifact, with its bytes: Prefect's pages can reach no file. None that is large."""
    if not path.is_file() or path.stat().st_size > MOST_IMAGE_BYTES:
        return
    address = f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"
    key = f"{make_key(flow, workspace.name, workspace.settings.home)}-{path.stem.replace('_', '-')}"
    create_image_artifact(address, key=key, description=f"{workspace.name}: {path.stem}")


def keep_end(flow: str, home: Path, end: str, what: str, run: str = "") -> None:
    """Keep how a run ended that did not come to its end, and what to do: skipped, failed, crashed or cancelled."""
    name, todo = _read_name(home), TODO.get(end, "")
    named = f"\n\nRun `{run}` of the flow `{flow}` in the workspace `{home}`." if run else ""
    text = f"# {name}: {flow} {end}\n\n{what}\n\n{todo}{named}\n"
    create_markdown_artifact(text, key=f"{make_key(flow, name, home)}-{end}", description=what[:SHOWN_CHARS])


def keep_failed(flow: Any, flow_run: Any, state: Any) -> None:
    """Tell of a flow that failed: an error of ours in its own words, any other by its kind; no login of any address."""
    error = state.result(raise_on_failure=False)
    line = describe_error(error) if isinstance(error, VisionLoopError) else f"{type(error).__name__}: {error}"
    _keep_run(flow, flow_run, "failed", mask(line))


def keep_crashed(flow: Any, flow_run: Any, state: Any) -> None:
    """Tell of a flow whose process has died, as far as Prefect knows of it: from a worker, or from what serves it."""
    _keep_run(flow, flow_run, "crashed", state.message or "It did not come to its end.")


def keep_cancelled(flow: Any, flow_run: Any, state: Any) -> None:
    """Tell of a flow that somebody has stopped."""
    _keep_run(flow, flow_run, "cancelled", state.message or "It was cancelled.")


HOOKS: dict[str, Any] = {
    "on_failure": [keep_failed],
    "on_crashed": [keep_crashed],
    "on_cancellation": [keep_cancelled],
}


def _keep_run(flow: Any, flow_run: Any, end: str, what: str) -> None:
    with contextlib.suppress(Exception):  # where Prefect is away too, the error that is told stays the first one
        home = Path(flow_run.parameters["workspace"])
        keep_end(flow.name, home, end, what, f"{flow_run.name} ({flow_run.id})")


def _read_name(home: Path) -> str:
    """Return the name of a workspace; where its params.yaml is what is wrong, that of its folder."""
    try:
        return load_params(home / PARAMS_FILE).name
    except VisionLoopError:
        return "".join(c if c.isalnum() else "-" for c in home.name.lower()).strip("-") or "workspace"
