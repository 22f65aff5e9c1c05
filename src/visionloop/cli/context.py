"""What commands share: the workspace's parts, progress on the terminal, and how an error is told."""

import contextlib
import json
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from visionloop.errors import VisionLoopError
from visionloop.lifetime import GUARDIAN_VARIABLE, die_with_parents
from visionloop.settings import load_settings
from visionloop.words import make_log_progress
from visionloop.workspace import Context, open_context


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
