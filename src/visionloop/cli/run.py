"""The entry point: loads the commands, runs one, and turns an error into one line and an exit code."""

import contextlib
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import NoReturn

from visionloop.cli.app import app
from visionloop.errors import FULL, DiskError, VisionLoopError, find_missing_extra, make_full_disk_error
from visionloop.lifetime import Terminated, collect_seldom, end_process
from visionloop.settings import load_settings
from visionloop.words import describe_error


def run_process() -> NoReturn:
    """Run the command line as all that this process does."""
    collect_seldom()
    try:
        main()
    except SystemExit as exc:
        if not isinstance(exc.code, int | None):
            raise  # a text, which Python writes to stderr
        end_process(exc.code or 0)
    end_process(0)


def main() -> None:
    """Run the command line; exit 0 done, 2 an error with one line, 3 not promoted, 1 our bug with a traceback."""
    from visionloop.cli import (  # noqa: F401
        datasets,
        features,
        forget,
        ingest,
        models,
        monitoring,
        predict,
        predictions,
        review,
        runs,
        serving,
        shadow,
        stages,
        tune,
        up,
        workspace,
    )

    sys.stdout.reconfigure(line_buffering=True, errors="replace")  # type: ignore[union-attr]
    try:
        app()
    except VisionLoopError as exc:
        _end_with(exc)
    except ImportError as exc:
        if (missing := find_missing_extra(exc)) is None:
            raise
        _end_with(missing)
    except SystemExit as exc:  # typer makes one of Ctrl-C too, and SIGTERM comes the same way
        sys.exit(143 if _was_terminated(exc) else exc.code)
    except BrokenPipeError:
        _drop_output()
        sys.exit(0)
    except OSError as exc:
        if exc.errno not in FULL:
            raise
        if exc.filename is None and (failure := _find_full_output()):
            _drop_output()
            _end_with(failure)
        path = Path(exc.filename or Path.cwd()).absolute()
        folder = next(one for one in (path, *path.parents) if one.is_dir())
        _end_with(make_full_disk_error(exc.filename or "a file", str(folder)))


def _drop_output() -> None:
    """Let what waits for stdout, which takes nothing more, be written to nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _find_full_output() -> DiskError | None:
    """Return why stdout takes nothing; None: it does, and a line feed was written to it."""
    try:
        sys.stdout.flush()
        os.write(sys.stdout.fileno(), b"\n")
    except OSError as exc:
        return DiskError("stdout", f"cannot be written ({exc.strerror})", "free space", "Make room; run it again.")
    return None


def _end_with(error: VisionLoopError) -> NoReturn:
    write_error_file(error, os.environ)
    print(describe_error(error), file=sys.stderr)
    sys.exit(error.exit_code)


def _was_terminated(exc: BaseException | None) -> bool:
    while exc is not None and not isinstance(exc, Terminated):
        exc = exc.__cause__ or exc.__context__
    return exc is not None


def write_error_file(error: VisionLoopError, env: Mapping[str, str]) -> None:
    """Leave the error where a flow finds it: through dvc the exit code is lost."""
    with contextlib.suppress(VisionLoopError, OSError):
        hidden = load_settings(env).hidden_dir
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
