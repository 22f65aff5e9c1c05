"""A flow from the shell: its lines on the terminal, the rest in a log file, an exit code, nothing left running."""

import contextlib
import logging
import os
import shutil
import signal
import sys
import time
import traceback
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

import httpx
from prefect import Flow, get_client
from prefect.flow_engine import run_flow
from prefect.logging.configuration import setup_logging
from prefect.states import State

import told
from visionloop.errors import BusyError, SettingsError, VisionLoopError
from visionloop.lifetime import stop_children, stop_with_us
from visionloop.secrets import mask
from visionloop.store.lease import wait_for_lease
from visionloop.up.board import Board, name_server
from visionloop.words import Summary, describe_error, make_refusal, render_summary
from visionloop.workspace import open_workspace

KEPT_LOGS = 30


def run(flow: Flow[..., State[Any]]) -> int:
    """Run a flow on the workspace of this process; return the exit code: 0, 2, 3, or 1 for a bug of ours."""
    home = Path(os.environ["VISIONLOOP_HOME"])
    log_path = _open_log(home / ".visionloop" / "logs")
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _stop)
    try:
        if not os.environ.get("PREFECT_API_URL"):  # the flow decides; but two servers of our own share one database
            workspace = open_workspace(home)
            wait_for_lease(workspace.store, workspace.name, only_here=True)
        print(f"{_describe_prefect()} for workspace {home} (log: {log_path.relative_to(home)}) ...", flush=True)
        state = _run_marked(flow, home)
        summary = state.result(raise_on_failure=not state.is_cancelled())  # that of a model which is not promoted
        if not isinstance(summary, Summary):  # skipped, or somebody stopped it
            print(f"error: {state.message or 'the run was cancelled in Prefect'}", file=sys.stderr)
            return BusyError.exit_code
        summary = replace(summary, commands=name_server(summary.commands, Board(home / ".visionloop")))
        print(render_summary(summary, shutil.get_terminal_size().columns if sys.stdout.isatty() else 140))
        if summary.is_not_promoted:
            raise make_refusal(summary.verdict, summary.rules, again=summary.outcome == "unchanged")
    except VisionLoopError as exc:
        print(describe_error(exc), file=sys.stderr)
        return exc.exit_code
    except Exception:
        traceback.print_exc()
        return 1
    return 0


def _run_marked(flow: Flow[..., State[Any]], home: Path) -> Any:
    """Run a flow, whose run bears the mark of this process from the first: what is killed at once can be closed."""
    if url := os.environ.get("PREFECT_API_URL"):
        check_server(url, "Start it, or unset PREFECT_API_URL: then one is started for this run.")
    with get_client(sync_client=True) as client:  # starts Prefect's own server where it is to
        _end_own_server_with_us()
        made = client.create_flow_run(flow, parameters={"workspace": str(home)}, tags=told.make_tags(home))
    return run_flow(flow, made, return_type="state")


def check_server(api_url: str | None, todo: str) -> None:
    """Raise SettingsError unless a Prefect server answers."""
    if not api_url:
        raise SettingsError("PREFECT_API_URL", "is not set", "the address of a Prefect server", todo)
    try:
        httpx.get(f"{api_url.rstrip('/')}/health", timeout=10).raise_for_status()
    except (httpx.HTTPError, httpx.InvalidURL) as exc:
        found = mask(f"{api_url} does not answer ({exc})")
        raise SettingsError("PREFECT_API_URL", found, "a Prefect server", todo) from exc


def _describe_prefect() -> str:
    """Tell which Prefect a run is shown in."""
    url = os.environ.get("PREFECT_API_URL", "")
    return f"with the Prefect at {mask(url.removesuffix('/api'))}" if url else "starting Prefect"


def _stop(number: int, frame: FrameType | None) -> None:
    """End at once on Ctrl-C or SIGTERM: Prefect's own server has got the signal too, no run can be closed in order."""
    print("stopped; the same command goes on from here", file=sys.stderr, flush=True)
    stop_children()
    os._exit(128 + number)


def guard_own_server() -> None:
    """Have Prefect's own server, a child of this process, stopped when this process is ended or killed."""
    if signal.getsignal(signal.SIGINT) is _stop:  # from the shell: Prefect has put its own handler in our place
        signal.signal(signal.SIGTERM, _stop)
    else:
        _end_own_server_with_us()


def _end_own_server_with_us() -> None:
    import psutil

    for child in psutil.Process().children():
        with contextlib.suppress(psutil.Error):
            if "prefect.server.api.server:create_app" in child.cmdline():
                stop_with_us(child.pid)


class _Told(logging.Handler):
    """Shows the lines that are meant for the person who waits."""

    def emit(self, record: logging.LogRecord) -> None:
        if getattr(record, "told", False):
            print(record.getMessage(), flush=True)


def _open_log(folder: Path) -> Path:
    """Send all that Prefect logs to a new file; keep the newest."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in sorted(folder.glob("retrain-*.log"))[:-KEPT_LOGS]:
        old.unlink()
    path = folder / f"retrain-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.log"
    setup_logging()
    to_file = logging.FileHandler(path)
    to_file.setFormatter(logging.Formatter("%(asctime)s %(levelname)-7s %(name)s: %(message)s"))
    for handler in (to_file, _Told()):
        logging.getLogger("prefect").addHandler(handler)  # what flows and tasks say comes here too
    return path
