"""Put the schedule into force: serves `retrain` as a Prefect deployment with the cron of params.yaml.

    prefect server start                       # once, somewhere; PREFECT_API_URL names it
    python flows/deploy.py [--workspace DIR]   # stays, and runs what is due

One retrain of a name at a time: a run that comes due while one is under way ends as `Skipped`. A lease in the store
decides, not a limit of Prefect: that one is in the memory of its server, which a restart loses.
"""

import os
import sys
from pathlib import Path

import environment

if __name__ == "__main__":
    environment.enter_workspace_or_exit(sys.argv[1:], "Serve the scheduled retraining of a workspace.")

import httpx
from prefect.schedules import Cron

from retrain import retrain
from visionloop.errors import SettingsError, VisionLoopError
from visionloop.lifetime import stop_children
from visionloop.params import load_params
from visionloop.settings import PARAMS_FILE
from visionloop.words import describe_error


def check_server(api_url: str | None) -> None:
    """Raise SettingsError unless a Prefect server answers: without one nothing keeps the time."""
    todo = "Run `prefect server start`, and set PREFECT_API_URL=http://127.0.0.1:4200/api."
    if not api_url:
        raise SettingsError("PREFECT_API_URL", "is not set", "the address of a Prefect server", todo)
    try:
        httpx.get(f"{api_url.rstrip('/')}/health", timeout=10).raise_for_status()
    except (httpx.HTTPError, httpx.InvalidURL) as exc:
        raise SettingsError("PREFECT_API_URL", f"{api_url} does not answer ({exc})", "a Prefect server", todo) from exc


def deploy(home: Path) -> None:
    """Serve the deployment `retrain/<name>` until stopped. Raises SettingsError, ParamsError."""
    params = load_params(home / PARAMS_FILE)
    if params.schedule.retrain is None:
        raise SettingsError("params.yaml schedule.retrain", "is not set", 'a cron expression like "0 3 * * *"')
    check_server(os.environ.get("PREFECT_API_URL"))
    when = f"{params.schedule.retrain!r} ({params.schedule.timezone})"
    print(f"serving retrain/{params.name} of {home} at {when}; Ctrl-C stops", flush=True)
    retrain.serve(
        name=params.name,
        schedule=Cron(params.schedule.retrain, timezone=params.schedule.timezone),
        parameters={"workspace": str(home)},
        description=f"Retrains {params.name} in {home}",
        tags=["visionloop", params.name],
        print_starting_message=False,
    )


if __name__ == "__main__":
    try:
        deploy(Path(os.environ["VISIONLOOP_HOME"]))
    except VisionLoopError as exc:
        print(describe_error(exc), file=sys.stderr)
        sys.exit(exc.exit_code)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
    finally:
        stop_children()
