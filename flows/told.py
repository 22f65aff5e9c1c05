"""What flows leave in Prefect: artifacts, events, and a page about a run that did not come to its end.

An artifact's key is that of a flow and a workspace. So the page of the last run stands there, and how the last one
failed stands beside it, under a key of its own: a success does not hide it, and it does not hide the verdict.

A run whose process is gone cannot say so. It bears the mark of its process as a tag, and the next run that starts, of
any flow of the workspace on that machine, closes it. On other machines the mark says nothing. There Prefect's own
heartbeat does: a run tells the server every three minutes that it lives, and one that missed six is closed by the next
run of any flow of that name. One is missed where the server has received one of another run, after it was due. So a
server that was away, and has heard nobody, closes nothing. Only times at which the server has received something are
compared, so no clock of a machine counts. A run that was closed by mistake (its machine could not reach the server, and
others could) goes on, and ends in Prefect as what it is.
"""

import base64
import contextlib
import socket
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any
from uuid import UUID

import httpx
from prefect import get_client
from prefect.artifacts import create_image_artifact, create_markdown_artifact
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.filters import (
    FlowRunFilter,
    FlowRunFilterId,
    FlowRunFilterState,
    FlowRunFilterStateType,
    FlowRunFilterTags,
)
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.events import emit_event
from prefect.events.filters import (
    EventFilter,
    EventNameFilter,
    EventOccurredFilter,
    EventOrder,
    EventResourceFilter,
)
from prefect.events.schemas.events import ReceivedEvent
from prefect.exceptions import ObjectNotFound, PrefectException
from prefect.logging.loggers import flow_run_logger
from prefect.settings import get_current_settings
from prefect.states import Cancelled, Crashed

from visionloop.errors import PipelineError, VisionLoopError
from visionloop.lifetime import is_gone, mark_process
from visionloop.params import load_params
from visionloop.secrets import mask
from visionloop.settings import PARAMS_FILE
from visionloop.words import describe_error
from visionloop.workspace import Workspace

TAG = "visionloop"
PROCESS_TAG = "process:"  # then how often the run was begun, and the mark of the process that did
OPEN_TYPES = [StateType.PENDING, StateType.RUNNING, StateType.CANCELLING]
STARTS_WITHIN = timedelta(minutes=10)  # what `visionloop schedule` has handed to a process of its machine
BEAT = "prefect.flow-run.heartbeat"
BEGINS = ["prefect.flow-run.Pending", "prefect.flow-run.Running"]
MISSED_BEATS = 6
EVENTS_READ = 50  # Prefect gives no more at a time
FAR = datetime(3000, 1, 1, tzinfo=UTC)
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


def make_tags(home: Path, number: int = 0) -> list[str]:
    """Return the tags of a run that this process has. `number`: so often it was begun."""
    return [TAG, _read_name(home), f"{PROCESS_TAG}{number}:{mark_process()}"]


def make_host_tag() -> str:
    """Return the tag that says on which machine a workspace is: only there it can be seen that it was moved."""
    return f"on {socket.gethostname()}"


def begin(flow: Any, flow_run: Any, state: Any) -> None:
    """Tag a run with the process that has it, and close those of its workspace whose process is gone."""
    logger = flow_run_logger(flow_run, flow)
    try:
        with get_client(sync_client=True) as client:
            run = client.read_flow_run(flow_run.id)
            home = Path(run.parameters["workspace"])
            tags = {tag for tag in run.tags if not tag.startswith(PROCESS_TAG)}
            client.update_flow_run(run.id, tags=sorted(tags.union(make_tags(home, run.run_count))))
            for line in close_left(client, home, now=datetime.now(UTC)):
                logger.info(line, extra={"told": True})
    except (httpx.HTTPError, PrefectException) as exc:  # a run must not fail for the sake of another one
        logger.warning("runs whose process is gone are not closed, the next run tries again: %s", exc)


def close_left(client: SyncPrefectClient, home: Path, *, now: datetime) -> list[str]:
    """Close the runs of a name that have no process any more; tell each in a line."""
    open_state = FlowRunFilterState(type=FlowRunFilterStateType(any_=OPEN_TYPES))
    ours = FlowRunFilter(tags=FlowRunFilterTags(all_=[TAG, _read_name(home)]), state=open_state)
    found = client.read_flow_runs(flow_run_filter=ours)
    left = [run for run in found if is_left(run, home, now) or is_silent(client, run)]
    return [f"closed in Prefect, its process was gone: run {run.id}" for run in left if _close(client, run.id)]


def is_silent(client: SyncPrefectClient, run: FlowRun) -> bool:
    """Say whether a run, of any machine, has missed so many heartbeats that its process must be gone.

    Each that is missed has its proof: a heartbeat of another run, which the server has received in its place, one
    interval or more after the proof before. A run that lives is heard within an interval after a server is back.
    Of one that has begun (again) since its last heartbeat, or that never had one, nothing is known: False.
    """
    every_s = get_current_settings().flows.heartbeat_frequency
    if run.state is None or run.state.is_pending() or every_s is None:
        return False
    own = EventResourceFilter(id=[f"prefect.flow-run.{run.id}"])
    events = read_events(client, resource=own, event=EventNameFilter(name=[BEAT, *BEGINS]))
    last = max(events, key=lambda event: event.received, default=None)
    if last is None or last.event != BEAT:
        return False
    interval = max(timedelta(seconds=every_s), _read_interval(events))
    due = last.received + 1.5 * interval
    for _ in range(MISSED_BEATS):
        others = read_events(client, since=due, order=EventOrder.ASC, event=EventNameFilter(name=[BEAT]))
        proof = min((one.received for one in others if one.received >= due), default=None)
        if proof is None:
            return False
        due = proof + interval
    return True


def _read_interval(events: Sequence[ReceivedEvent]) -> timedelta:
    """Return how far apart the heartbeats of a run are, by its own clock: its machine may be set otherwise."""
    told = sorted(event.occurred for event in events if event.event == BEAT)
    return median([after - before for before, after in pairwise(told)] or [timedelta()])


def read_events(client: SyncPrefectClient, since: datetime | None = None, **which: Any) -> list[ReceivedEvent]:
    """Return at most 50 events of some kind, by default the newest. No clock hides one: that of its machine may be off.

    Those that have occurred in an outage come later than they say, so `since` alone is no proof of `received`.
    """
    occurred = {"until": FAR, **({"since": since} if since else {})}
    asked = EventFilter(occurred=EventOccurredFilter.model_validate(occurred), **which)
    return client.read_events(asked, limit=EVENTS_READ).events


def is_left(run: FlowRun, home: Path, now: datetime) -> bool:
    """Say whether it is sure that an open run of a workspace has no process: that one is gone, or never came.

    A run of a deployment that is started again bears the mark of the process before until the new one puts its own.
    """
    if run.parameters.get("workspace") != str(home) or run.state is None:
        return False
    marks = [tag.removeprefix(PROCESS_TAG) for tag in run.tags if tag.startswith(PROCESS_TAG)]
    if marks:
        number, _, mark = marks[0].partition(":")
        is_its_own = run.deployment_id is None or (number == str(run.run_count) and not run.state.is_pending())
        return is_its_own and is_gone(mark)
    is_served_here = run.deployment_id is not None and not run.work_pool_name and make_host_tag() in run.tags
    return is_served_here and run.state.is_pending() and now - run.state.timestamp > STARTS_WITHIN


def close_died(run_id: str) -> bool:
    """Close a run of Prefect whose process is gone, and its tasks, as crashed; False: it was closed, or is not there.

    Raises:
        PipelineError: Prefect does not do it.
    """
    try:
        with get_client(sync_client=True) as client:
            return _close(client, UUID(run_id))
    except ValueError:
        return False
    except (httpx.HTTPError, PrefectException) as exc:
        todo = "The next retrain tries again."
        raise PipelineError(f"Prefect run {run_id}", f"is not closed ({exc})", "an answer", todo) from exc


def _close(client: SyncPrefectClient, run_id: UUID) -> bool:
    """Close a run, unless it has come to an end before its process went. What somebody has cancelled ends as that."""
    why = "its process was gone; closed by the next run"
    try:
        run = client.read_flow_run(run_id)
        if run.state is None or run.state.is_final():
            return False
        is_cancelled = run.state.is_cancelling()
        end = Cancelled(message=why) if is_cancelled else Crashed(message=why)
        for one in client.read_task_runs(flow_run_filter=FlowRunFilter(id=FlowRunFilterId(any_=[run.id]))):
            if one.state is None or not one.state.is_final():
                client.set_task_run_state(one.id, end, force=True)
        client.set_flow_run_state(run.id, end, force=True)
        keep = keep_cancelled if is_cancelled else keep_crashed
        keep(client.read_flow(run.flow_id), run, end)
    except ObjectNotFound:
        return False
    return True


HOOKS: dict[str, Any] = {
    "on_running": [begin],
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
