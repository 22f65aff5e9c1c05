"""The flows as commands: retrain, schedule. Each becomes the script of its flow, which runs with Prefect."""

import os
import sys
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from visionloop.cli.app import app
from visionloop.errors import require_installed

PoolType = StrEnum("PoolType", ("process", "docker", "kubernetes"))
Folder = Annotated[
    Path | None, typer.Option("--workspace", metavar="DIR", help="Another workspace than the one you are in.")
]


@app.command()
def retrain(workspace: Folder = None) -> None:
    """Retrain with Prefect: ingest, train, judge, promote, ask; what is transient is tried again.

    The same steps as `visionloop start`, and the same exit codes: 0 done, 2 an error, 3 not promoted. Its run is in
    Prefect: in the one of `visionloop up`, at PREFECT_API_URL, or in one of its own that ends with it.

    Examples:

      visionloop retrain

      visionloop retrain --workspace ~/models/pets
    """
    _run_flow("retrain", workspace, {})


@app.command()
def schedule(
    workspace: Folder = None,
    *,
    pool: Annotated[
        str | None, typer.Option(metavar="NAME", help="Register for the workers of this work pool instead, and end.")
    ] = None,
    type: Annotated[PoolType | None, typer.Option(help="Of a pool that is made; the last two want --image.")] = None,
    image: Annotated[str | None, typer.Option(help="The image that a container of the pool runs.")] = None,
    flows: Annotated[str | None, typer.Option(metavar="DIR", help="Where the flows are for a worker.")] = None,
    replace: Annotated[
        bool, typer.Option("--replace", help="Take over from another workspace of the same name.")
    ] = False,
) -> None:
    """Run what is due by `schedule` and `triggers` of params.yaml, with the Prefect server at PREFECT_API_URL.

    Stays until Ctrl-C. `visionloop up` does this too, with a Prefect server of its own.

    Examples:

      PREFECT_API_URL=http://127.0.0.1:4200/api visionloop schedule

      PREFECT_API_URL=http://prefect:4200/api visionloop schedule --pool boxes --image registry/visionloop:1
    """
    given = {"--pool": pool, "--type": type, "--image": image, "--flows": flows}
    _run_flow("deploy", workspace, given, *(["--replace"] if replace else []))


def _run_flow(name: str, workspace: Path | None, given: Mapping[str, str | None], *switches: str) -> None:
    """Become the script of a flow. Its workspace has a Prefect that is up: then its run is shown there."""
    from visionloop.up.parts import find_flow

    require_installed("prefect")
    script = find_flow(name)
    if url := _find_prefect(workspace, os.environ):
        os.environ["PREFECT_API_URL"] = f"{url}/api"
    options = {"--workspace": str(workspace.expanduser()) if workspace else None, **given}
    words = [word for option, value in options.items() if value is not None for word in (option, str(value))]
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, str(script), *words, *switches])


def _find_prefect(folder: Path | None, env: Mapping[str, str]) -> str:
    """Return the address of the Prefect that `visionloop up` runs for the workspace, "" if none, or another is set."""
    from visionloop.errors import VisionLoopError
    from visionloop.settings import load_settings
    from visionloop.up.board import Board

    if env.get("PREFECT_API_URL"):
        return ""
    try:
        state = Board(load_settings(env, folder and folder.expanduser()).hidden_dir).read_live()
    except VisionLoopError:  # the script tells it
        return ""
    return state.get_url("prefect") if state else ""
