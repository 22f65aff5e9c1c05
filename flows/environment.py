"""The environment of a flow that is run from the shell: settled before Prefect is imported, since that reads it."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from visionloop.errors import VisionLoopError
from visionloop.params import load_params
from visionloop.settings import apply_tool_environment, load_settings
from visionloop.words import describe_error

PREFECT_DEFAULTS = {
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "90",
    "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL",  # our own lines are shown; all of them are in the log file
    "PREFECT_CLI_PROMPT": "false",
}


def enter_workspace_or_exit(argv: Sequence[str], description: str) -> None:
    """Read `--workspace`, make it the workspace of this process, and keep Prefect and other tools inside it.

    Without a workspace, or with a mistake in its params.yaml: one line on stderr and exit code 2.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--workspace", type=Path, help="a folder with a params.yaml; default: the one you are in")
    folder: Path | None = parser.parse_args(argv).workspace
    try:
        settings = load_settings(os.environ, folder)
        load_params(settings.params_path)  # a typo is told at once, not after Prefect has started
    except VisionLoopError as exc:
        print(describe_error(exc), file=sys.stderr)
        sys.exit(exc.exit_code)
    os.environ["VISIONLOOP_HOME"] = str(settings.home)
    apply_tool_environment(settings.home)
    for name, value in PREFECT_DEFAULTS.items():
        os.environ.setdefault(name, value)
