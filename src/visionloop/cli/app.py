"""The application: its commands, and the one place where an error becomes a line and an exit code."""

import os
import sys
from pathlib import Path

import typer

from visionloop.cli.context import describe_error, write_error_file
from visionloop.errors import VisionLoopError
from visionloop.lifetime import Terminated

app = typer.Typer(
    name="visionloop",
    help="Keeps an image classifier up to date: ingest, train, judge, promote, serve.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main() -> None:
    """Run the command line; exit 0 done, 2 an error with one line, 3 not promoted, 1 our bug with a traceback."""
    from visionloop.cli import (  # noqa: F401
        datasets,
        features,
        forget,
        ingest,
        models,
        rates,
        runs,
        serving,
        stages,
        store,
        tune,
        workspace,
    )

    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    try:
        app()
    except VisionLoopError as exc:
        write_error_file(exc, os.environ, Path.cwd())
        print(describe_error(exc), file=sys.stderr)
        sys.exit(exc.exit_code)
    except SystemExit as exc:  # typer makes one of Ctrl-C too, and SIGTERM comes the same way
        sys.exit(143 if _was_terminated(exc) else exc.code)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)


def _was_terminated(exc: BaseException | None) -> bool:
    while exc is not None and not isinstance(exc, Terminated):
        exc = exc.__cause__ or exc.__context__
    return exc is not None
