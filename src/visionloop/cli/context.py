"""What commands share: the workspace's parts, progress on the terminal, and how an error is told."""

import contextlib
import json
import os
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from visionloop.errors import VisionLoopError
from visionloop.lifetime import GUARDIAN_VARIABLE, die_with_parents
from visionloop.settings import Settings, apply_tool_environment, load_settings

if TYPE_CHECKING:
    from visionloop.params import Params
    from visionloop.store import ObjectStore
    from visionloop.tracking import Tracking


@dataclass(frozen=True)
class Context:
    """One workspace, opened."""

    settings: Settings
    params: "Params"
    store: "ObjectStore"
    tracking: "Tracking"


def open_context(start: Path | None = None) -> Context:
    """Open the workspace at `start`, or around the current folder, and keep other tools inside it.

    Raises:
        SettingsError, ParamsError: there is no workspace, or its parameters are wrong.
    """
    from visionloop.params import load_params
    from visionloop.store import open_store
    from visionloop.tracking import Tracking

    settings = load_settings(os.environ, start or Path.cwd())
    apply_tool_environment(settings.home)
    warnings.filterwarnings("ignore", module=r"(mlflow|pytorch_lightning|lightning|torch|PIL)(\..*)?")
    params = load_params(settings.params_path)
    tracking = Tracking(settings.tracking_uri, settings.artifact_root, params.name)
    return Context(settings, params, open_store(settings.store_url), tracking)


def open_stage(stage: str) -> tuple[Context, str]:
    """Open the workspace for a stage: also die with whoever started it; return the context and the code's digest."""
    from visionloop.pipeline import compute_code_digests

    die_with_guardian()
    return open_context(), compute_code_digests().get(stage, "")


def die_with_guardian() -> None:
    """Under dvc or a flow, stop when they are gone; by hand, go on when the shell is closed."""
    if os.environ.get("DVC_STAGE") or os.environ.get(GUARDIAN_VARIABLE):
        die_with_parents()


def close_stage(context: Context, stage: str) -> None:
    """Say how the result of a stage run by hand is kept."""
    if not os.environ.get("DVC_STAGE"):
        print(f"run by hand: `dvc commit -f {stage}` keeps this result, `dvc repro` would make it again")


def get_now() -> str:
    """Return the time, UTC, ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def describe_error(error: VisionLoopError) -> str:
    """Return an error as one line."""
    return f"{'not promoted' if error.exit_code == 3 else 'error'}: {error}"


def write_error_file(error: VisionLoopError, env: Mapping[str, str], start: Path) -> None:
    """Leave the error where a flow finds it: through dvc the exit code is lost."""
    with contextlib.suppress(VisionLoopError, OSError):
        hidden = load_settings(env, start).hidden_dir
        hidden.mkdir(exist_ok=True)
        value = {
            "kind": type(error).__name__,
            "code": error.code,
            "line": str(error),
            "transient": error.transient,
            "where": error.where,
            "found": error.found,
            "expected": error.expected,
            "todo": error.todo,
        }
        (hidden / "error.json").write_text(json.dumps(value, indent=2) + "\n")


def make_progress(verb: str, unit: str) -> Callable[[int, int], None]:
    """Return a callback (done, total) that shows progress: in place on a terminal, else a line every few seconds.

    A total of 0 is one that is not known yet.
    """
    if not sys.stdout.isatty():
        return make_log_progress(verb, unit, lambda line: print(line, flush=True))

    def show(line: str) -> None:
        print(f"\r{line:<78}", end="", flush=True)

    in_place = make_log_progress(verb, unit, show, every_s=0.1)

    def show_and_end(done: int, total: int) -> None:
        in_place(done, total)
        if done >= total > 0:
            print(flush=True)

    return show_and_end


def make_log_progress(
    verb: str, unit: str, tell: Callable[[str], None], *, every_s: float = 3.0
) -> Callable[[int, int], None]:
    """Return a callback (done, total) that tells a line every few seconds, with the rate and the time left."""
    started = last = 0.0
    at_start = 0  # what was done before, by a run that was stopped, tells nothing of the rate

    def show(done: int, total: int) -> None:
        nonlocal started, last, at_start
        now = time.perf_counter()
        if not started:
            started = last = now
            at_start = done
        if (done < total or not total) and now - last < every_s:
            return
        last = now
        rate = (done - at_start) / max(now - started, 1e-9)
        left = f", {(total - done) / rate:.0f} s left" if done < total and rate > 0 else ""
        of_all = f" of {total:,}" if total else ""
        speed = f" ({rate:,.0f}/s{left})" if now - started > 0.01 else ""  # a rate of nothing at all is none
        tell(f"{verb} {done:,}{of_all} {unit}{speed}")

    return show
