"""Put the schedule into force: serves the flows as Prefect deployments, with the crons and triggers of params.yaml.

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
from prefect import serve
from prefect.deployments.runner import RunnerDeployment
from prefect.events import DeploymentEventTrigger
from prefect.schedules import Cron, Schedule

from ingest import NEW_DATASET, ingest, make_resource
from monitor import DRIFT, QUALITY, monitor
from retrain import retrain
from visionloop.errors import SettingsError, VisionLoopError
from visionloop.lifetime import stop_children
from visionloop.params import Params, load_params
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
    """Serve the deployments of a workspace until stopped. Raises SettingsError, ParamsError."""
    params = load_params(home / PARAMS_FILE)
    schedule = params.schedule
    if not (schedule.retrain or schedule.ingest or schedule.monitor or params.triggers.names):
        raise SettingsError("params.yaml schedule.retrain", "is not set", 'a cron expression like "0 3 * * *"')
    if schedule.triggers and not params.triggers.names:
        raise SettingsError(
            "params.yaml triggers", "sets none", "one for schedule.triggers to ask", "See docs/loop.md."
        )
    check_server(os.environ.get("PREFECT_API_URL"))
    deployments = make_deployments(home, params)
    told = ", ".join(f"{one.flow_name}/{one.name}" for one in deployments)
    print(f"serving {told} of {home} (clock of {schedule.timezone}); Ctrl-C stops", flush=True)
    serve(*deployments, print_starting_message=False)


def make_deployments(home: Path, params: Params) -> list[RunnerDeployment]:
    """Return the deployments that params.yaml asks for: `retrain`, `ingest`, `monitor/NAME`, `retrain/NAME-if-due`.

    The last one asks the triggers first. It also runs when a flow has told of a new dataset version, or of drift or an
    accuracy that is too low.
    """
    schedule = params.schedule
    facts = {"description": f"{params.name} in {home}", "tags": ["visionloop", params.name]}

    def plan(cron: str | None) -> Schedule | None:
        return Cron(cron, timezone=schedule.timezone) if cron else None

    given = {"workspace": str(home)}
    flows = ((retrain, schedule.retrain), (ingest, schedule.ingest), (monitor, schedule.monitor))
    found = [
        one.to_deployment(params.name, schedule=plan(cron), parameters=given, **facts) for one, cron in flows if cron
    ]
    if params.triggers.names:
        match = {"prefect.resource.id": make_resource(params.name)}
        found.append(
            retrain.to_deployment(
                f"{params.name}-if-due",
                schedule=plan(schedule.triggers),
                parameters={**given, "only_if_due": True},
                triggers=[DeploymentEventTrigger(expect={NEW_DATASET, DRIFT, QUALITY}, match=match)],
                **facts,
            )
        )
    return found


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
