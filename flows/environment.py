"""The environment of a flow that is run from the shell: settled before Prefect is imported, since that reads it."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from visionloop.errors import VisionLoopError
from visionloop.settings import apply_tool_environment, load_settings

PREFECT_DEFAULTS = {
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "90",
    "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL",  # our own lines are shown; all of them are in the log file
    "PREFECT_CLI_PROMPT": "false",
}


def enter_workspace_or_exit(argv: Sequence[str], description: str) -> None:
    """Read `--workspace`, make it the workspace of this process, and keep Prefect and other tools inside it.

    Without a workspace: one line on stderr and exit code 2.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--workspace", type=Path, help="a folder with a params.yaml; default: the one you are in")
    folder: Path | None = parser.parse_args(argv).workspace
    env = dict(os.environ)
    if folder is not None:
        env.pop("VISIONLOOP_HOME", None)  # what is named on the command line wins
    try:
        home = load_settings(env, folder or Path.cwd()).home
    except VisionLoopError as exc:
        print(f"error: {exc}", file=sys.stderr)
        sys.exit(exc.exit_code)
    os.environ["VISIONLOOP_HOME"] = str(home)
    apply_tool_environment(home)
    for name, value in PREFECT_DEFAULTS.items():
        os.environ.setdefault(name, value)
