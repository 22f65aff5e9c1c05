"""The environment of a flow that is run from the shell: settled before Prefect is imported, since that reads it."""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from visionloop.errors import VisionLoopError
from visionloop.lifetime import collect_seldom
from visionloop.params import load_params
from visionloop.settings import apply_tool_environment, load_settings
from visionloop.words import describe_error

PREFECT_DEFAULTS = {
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "90",
    "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL",  # our own lines are shown; all of them are in the log file
    "PREFECT_CLI_PROMPT": "false",
}


POOL_TYPES = ("process", "docker", "kubernetes")
IMAGE_FLOWS_DIR = "/app/flows"


def add_deploy_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `deploy.py`."""
    parser.add_argument("--pool", help="register for a work pool of this name, and end; it is made if it is not there")
    parser.add_argument("--type", choices=POOL_TYPES, help="of a pool that is made: process, or docker with --image")
    parser.add_argument("--image", help="the image that a container of the pool runs")
    parser.add_argument("--flows", help=f"where flows/ is for a worker; default: here, in an image {IMAGE_FLOWS_DIR}")
    parser.add_argument("--replace", action="store_true", help="take over from another workspace of the same name")


def enter_workspace_or_exit(
    argv: Sequence[str], description: str, add: Callable[[argparse.ArgumentParser], None] = lambda parser: None
) -> argparse.Namespace:
    """Read the options, make `--workspace` the one of this process, and keep Prefect and other tools inside it.

    `add` adds options to this one; all are returned.

    Without a workspace, or with a mistake in its params.yaml: one line on stderr and exit code 2.
    """
    collect_seldom()
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--workspace", type=Path, help="a folder with a params.yaml; default: the one you are in")
    add(parser)
    options = parser.parse_args(argv)
    try:
        settings = load_settings(os.environ, options.workspace)
        load_params(settings.params_path)  # a typo is told at once, not after Prefect has started
    except VisionLoopError as exc:
        print(describe_error(exc), file=sys.stderr)
        sys.exit(exc.exit_code)
    os.environ["VISIONLOOP_HOME"] = str(settings.home)
    apply_tool_environment(settings.home)
    for name, value in PREFECT_DEFAULTS.items():
        os.environ.setdefault(name, value)
    return options
