"""Put the schedule into force: the flows as Prefect deployments, with the crons and triggers of params.yaml.

    prefect server start                       # once, somewhere; PREFECT_API_URL names it
    python flows/deploy.py [--workspace DIR]   # stays, and runs what is due, in processes of this machine
    python flows/deploy.py --pool NAME         # ends; the workers of a work pool run what is due

A pool is of the type process, docker or kubernetes (`--type`); one that is not there is made. Nothing is built: in a
container the flows of `--image` run. The workspace and a store in a folder must be at the same paths there.

One retrain of a name at a time: a run that comes due while one is under way ends as `Skipped`. A lease in the store
decides, not a limit of Prefect: that one is in the memory of its server, which a restart loses.
"""

import argparse
import os
import sys
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import environment

if __name__ == "__main__":
    options = environment.enter_workspace_or_exit(
        sys.argv[1:], "Deploy the scheduled flows of a workspace to Prefect.", environment.add_deploy_options
    )

import httpx
from prefect import get_client, serve
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.client.schemas.filters import DeploymentFilter, DeploymentFilterTags
from prefect.client.schemas.objects import WorkPool
from prefect.client.schemas.responses import DeploymentResponse
from prefect.deployments.runner import RunnerDeployment
from prefect.events import DeploymentEventTrigger
from prefect.exceptions import ObjectNotFound, PrefectException
from prefect.runner.storage import LocalStorage
from prefect.schedules import Cron, Schedule

from ingest import NEW_DATASET, ingest
from monitor import DRIFT, QUALITY, monitor
from predict import predict
from retrain import retrain
from review import review
from shell import check_server
from told import TAG, close_left, make_host_tag, make_resource
from visionloop.errors import SettingsError, VisionLoopError
from visionloop.lifetime import stop_children
from visionloop.params import Params, load_params
from visionloop.secrets import mask
from visionloop.settings import PARAMS_FILE, load_settings, tool_environment
from visionloop.words import describe_error

FLOWS_DIR = Path(__file__).resolve().parent
PASSED_ON = (
    *("VISIONLOOP_CHECKPOINTS", "VISIONLOOP_LOADER_WORKERS", "AWS_ENDPOINT_URL", "AWS_DEFAULT_REGION"),
    *("RAY_ADDRESS", "RAY_AUTH_MODE"),
)


def deploy(home: Path, options: argparse.Namespace) -> None:
    """Register the deployments of a workspace, or serve them until stopped. Raises SettingsError, ParamsError."""
    params = load_params(home / PARAMS_FILE)
    schedule = params.schedule
    if not any(cron for _, cron in list_flows(params)) and not params.triggers.names:
        raise SettingsError("params.yaml schedule.retrain", "is not set", 'a cron expression like "0 3 * * *"')
    if schedule.triggers and not params.triggers.names:
        raise SettingsError(
            "params.yaml triggers", "sets none", "one for schedule.triggers to ask", "See docs/loop.md."
        )
    check_server(
        os.environ.get("PREFECT_API_URL"),
        "`visionloop up` does this with its own server. Or set PREFECT_API_URL to that of `prefect server start`.",
    )
    deployments = make_deployments(home, params)
    told = ", ".join(f"{one.flow_name}/{one.name}" for one in deployments)
    try:
        with get_client(sync_client=True) as client:
            others = find_others(client, home, params.name, deployments, replace=options.replace)
            place = make_place(client, home, options) if options.pool else None
            for told_as, other in others.items():
                client.delete_resource_owned_automations(f"prefect.deployment.{other.id}")
                client.delete_deployment(other.id)  # and a process that still serves it gets none of its runs
                print(f"removed {told_as} of {other.parameters.get('workspace')}")
            for line in close_left(client, home, now=datetime.now(UTC)):
                print(line)
    except (httpx.HTTPError, PrefectException) as exc:
        if isinstance(exc, httpx.HTTPStatusError) and exc.response.status_code == httpx.codes.UNAUTHORIZED:
            expected = "USER:PASSWORD, as its own PREFECT_SERVER_API_AUTH_STRING"
            raise SettingsError("PREFECT_API_AUTH_STRING", "the Prefect server does not take it", expected) from exc
        raise SettingsError("PREFECT_API_URL", f"the Prefect server refuses ({exc})", "an answer") from exc
    of = f"of {home} (clock of {schedule.timezone})"
    if place is None:
        print(f"serving {told} {of}; Ctrl-C stops", flush=True)
        serve(*deployments, print_starting_message=False)
        return
    for one in deployments:
        place.register(one)
    print(f"registered {told} {of} for the {place.type} pool {place.pool}")
    print(f"a worker runs them: prefect worker start --pool {place.pool} --type {place.type}")


def list_flows(params: Params) -> list[tuple[object, str | None]]:
    """Return the flows that have a schedule of their own, each with its cron expression."""
    schedule = params.schedule
    return [
        (retrain, schedule.retrain),
        (ingest, schedule.ingest),
        (monitor, schedule.monitor),
        (predict, schedule.predict),
        (review, schedule.review),
    ]


def make_deployments(home: Path, params: Params) -> list[RunnerDeployment]:
    """Return the deployments that params.yaml asks for: `FLOW/NAME` for each flow, and `retrain/NAME-if-due`.

    The last one asks the triggers first. It also runs when a flow has told of a new dataset version, or of drift or an
    accuracy that is too low.
    """
    schedule = params.schedule
    facts = {"description": f"{params.name} in {home}", "tags": [TAG, params.name, make_host_tag()]}

    def plan(cron: str | None) -> Schedule | None:
        return Cron(cron, timezone=schedule.timezone) if cron else None

    given = {"workspace": str(home)}
    found = [
        one.to_deployment(params.name, schedule=plan(cron), parameters=given, **facts)
        for one, cron in list_flows(params)
        if cron
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


def find_others(
    client: SyncPrefectClient, home: Path, name: str, deployments: list[RunnerDeployment], *, replace: bool
) -> dict[str, DeploymentResponse]:
    """Return the deployments of this name that are not wanted any more, those of a workspace that moved among them.

    Raises:
        SettingsError: they are of another workspace, and `replace` is not said.
    """
    tags = DeploymentFilter(tags=DeploymentFilterTags(all_=[TAG, name]))
    wanted = {(one.flow_name, one.name) for one in deployments}
    others = {}
    for found in client.read_deployments(deployment_filter=tags):
        other = str(found.parameters.get("workspace", "an unknown workspace"))
        is_gone = make_host_tag() in found.tags and not (Path(other) / PARAMS_FILE).is_file()
        if other != str(home) and not (replace or is_gone):
            todo = f"Give one of them another `name` in {PARAMS_FILE}, or take over with --replace."
            where = f"deployments of {name} at this Prefect server"
            raise SettingsError(where, f"are those of the workspace {other}", f"those of {home}", todo)
        key = client.read_flow(found.flow_id).name, found.name
        if other != str(home) or key not in wanted:
            others["/".join(key)] = found
    return others


@dataclass(frozen=True)
class Place:
    """A work pool, and what its workers are told: where the flows are, and the job variables of its type."""

    pool: str
    type: str
    flows_dir: str
    variables: dict[str, object]

    def register(self, deployment: RunnerDeployment) -> None:
        """Register a deployment for the workers of the pool. Raises SettingsError."""
        deployment.storage = LocalStorage(self.flows_dir)
        deployment.entrypoint = f"{deployment.flow_name}.py:{deployment.flow_name}"
        deployment.job_variables = dict(self.variables)
        try:
            deployment.apply(work_pool_name=self.pool)
        except (RuntimeError, httpx.HTTPError, PrefectException) as exc:
            raise SettingsError(f"pool {self.pool}", f"does not take it ({exc})", "a pool that does") from exc


def make_place(client: SyncPrefectClient, home: Path, options: argparse.Namespace) -> Place:
    """Find the work pool or make it, and return what its workers are to be told. Raises SettingsError."""
    wanted = options.type or ("docker" if options.image else "process")
    try:
        pool = client.read_work_pool(options.pool)
    except ObjectNotFound:
        pool = make_pool(client, options.pool, wanted)
    if pool.type not in environment.POOL_TYPES or options.type not in (None, pool.type):
        expected = options.type or f"one of {', '.join(environment.POOL_TYPES)}"
        raise SettingsError(f"pool {options.pool}", f"is of the type {pool.type}", expected, "Name another pool.")
    is_process = pool.type == "process"
    if is_process == bool(options.image):
        found = "got an image" if is_process else "got none"
        expected = "none for a process pool" if is_process else f"the image that the {pool.type} pool runs"
        raise SettingsError("--image", found, expected)
    flows_dir = options.flows or (str(FLOWS_DIR) if is_process else environment.IMAGE_FLOWS_DIR)
    variables: dict[str, object] = {"env": make_job_environment(home)}
    if is_process:
        variables["working_dir"] = flows_dir
    else:
        variables["image"] = options.image
    if pool.type == "docker":
        variables["volumes"] = [f"{folder}:{folder}" for folder in list_folders(home)]
    return Place(options.pool, pool.type, flows_dir, variables)


def make_pool(client: SyncPrefectClient, name: str, type: str) -> WorkPool:
    """Make a work pool as `prefect work-pool create` does: its template of jobs is the one that the server knows."""
    collections = client.request("GET", "/collections/views/aggregate-worker-metadata").raise_for_status().json()
    templates = {worker["type"]: worker for workers in collections.values() for worker in workers.values()}
    template = templates.get(type, {}).get("default_base_job_configuration", {})
    print(f"made the {type} pool {name}")
    return client.create_work_pool(WorkPoolCreate(name=name, type=type, base_job_template=template))


def make_job_environment(home: Path) -> dict[str, str]:
    """Return the variables of a job: the same store and MLflow as here, and tools that stay in the workspace.

    What holds a password is not put into Prefect's database: the worker, or the pod, has it in its own environment.
    """
    settings = load_settings(os.environ, home)
    places = {"VISIONLOOP_STORE": settings.store_url, "MLFLOW_TRACKING_URI": settings.tracking_uri}
    found = {**places, **{name: os.environ[name] for name in PASSED_ON if os.environ.get(name)}}
    for name in [name for name, value in found.items() if mask(value) != value]:
        print(f"note: {name} holds a password, so it is not kept in Prefect; set it where the worker runs")
        del found[name]
    return {**tool_environment(home), **found}


def list_folders(home: Path) -> list[Path]:
    """Return the folders of this machine that a container needs: the workspace, and a store that is elsewhere."""
    store = load_settings(os.environ, home).store_url
    folder = Path(store.removeprefix("file://"))
    is_elsewhere = store.startswith("file://") and not folder.is_relative_to(home)
    return [home, folder] if is_elsewhere else [home]


if __name__ == "__main__":
    try:
        deploy(Path(os.environ["VISIONLOOP_HOME"]), options)
    except VisionLoopError as exc:
        print(describe_error(exc), file=sys.stderr)
        sys.exit(exc.exit_code)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
    finally:
        stop_children()
