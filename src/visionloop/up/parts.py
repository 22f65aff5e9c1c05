"""The parts of the stack: the command of each, how one asks whether it is well, and what it waits for."""

import json
import signal
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.client import HTTPException
from pathlib import Path
from typing import Any

import visionloop
from visionloop.errors import SettingsError, VisionLoopError
from visionloop.params import Params, load_params
from visionloop.promotion.ledger import read_champion
from visionloop.records import compute_digest
from visionloop.secrets import mask
from visionloop.up.board import HOST
from visionloop.workspace import Workspace

PORTS = {"home": 8080, "mlflow": 5000, "prefect": 4200, "server": 8000}
ASK_S = 5.0
NO_SCHEDULE = "nothing is planned: params.yaml has no `schedule`"
NO_CHAMPION = "no champion yet: `visionloop start` makes one"


@dataclass(frozen=True)
class Part:
    """One part. Without a command it runs elsewhere, and is only asked.

    `hold` says why it cannot be started now, "" if it can; `fingerprint` what of params.yaml it depends on: with
    another one it is started anew. `is_vital`: without it nothing is up. `needs`: the part that must be ready first.
    """

    name: str
    title: str
    command: tuple[str, ...]
    is_well: Callable[[], bool]
    url: str = ""
    is_vital: bool = True
    needs: str = ""
    environment: Mapping[str, str] = field(default_factory=dict)
    stop_signal: int = signal.SIGTERM
    hold: Callable[[], str] = lambda: ""
    fingerprint: Callable[[], str] = lambda: ""


def make_parts(workspace: Workspace, ports: Mapping[str, int], prefect_url: str | None) -> list[Part]:
    """Return the parts in the order they are started. `prefect_url`: a Prefect that runs elsewhere."""
    home = workspace.settings.home
    page = _make_url(ports["home"])
    command = (sys.executable, "-m", "visionloop.up.home", str(ports["home"]))
    parts = [Part("home", "home page", command, lambda: ask(f"{page}/health") is not None, page)]
    api = prefect_url or f"{_make_url(ports['prefect'])}/api"
    parts += [_make_mlflow(workspace, ports["mlflow"]), _make_prefect(home, ports["prefect"], prefect_url)]
    parts += [_make_server(workspace, ports["server"]), _make_runner(workspace, api)]
    return parts


def make_mlflow_command(workspace: Workspace, port: int) -> tuple[str, ...]:
    """Return the command of an MLflow server over the SQLite file of a workspace."""
    settings = workspace.settings
    command = (sys.executable, "-m", "mlflow", "server", "--host", HOST, "--port", str(port), "--workers", "1")
    stores = ("--backend-store-uri", settings.tracking_uri, "--default-artifact-root", settings.artifact_root)
    return (*command, *stores, "--uvicorn-opts", "--no-access-log")  # it is asked every few seconds


MLFLOW_ENVIRONMENT = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}  # no queue of jobs: nothing here uses it


def find_runs_page(server: str, name: str) -> str:
    """Return the address of an experiment's runs on an MLflow server, not of its GenAI home."""
    answer = ask(f"{server}/api/2.0/mlflow/experiments/get-by-name?experiment_name={name}")
    number = answer["experiment"]["experiment_id"] if answer and "experiment" in answer else None
    return f"{server}/#/experiments{f'/{number}/runs?workflowType=machine_learning' if number else ''}"


def find_flow(name: str) -> Path:
    """Return the script of a flow: in the installed package, or in the clone. Raises SettingsError."""
    package = Path(visionloop.__file__).parent
    for folder in (package / "_flows", package.parents[1] / "flows"):
        if (folder / f"{name}.py").is_file():
            return folder / f"{name}.py"
    raise SettingsError("flows", "are not installed", "the scripts of this version", "Install visionloop again.")


def ask(url: str, body: Mapping[str, Any] | None = None, *, limit_s: float = ASK_S) -> Any:
    """Return what a server on this machine answers: JSON, or {} for another text; None: it does not, or an error.

    No proxy is asked.
    """
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"} if data else {})
    try:
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(request, timeout=limit_s) as answer:
            text = answer.read(4_000_000)
    except (OSError, ValueError, HTTPException):
        return None
    try:
        return json.loads(text)
    except ValueError:
        return {}


def _make_url(port: int) -> str:
    return f"http://{HOST}:{port}"


def _make_mlflow(workspace: Workspace, port: int) -> Part:
    uri = workspace.settings.tracking_uri
    if not uri.startswith("sqlite:"):
        return Part("mlflow", "MLflow", (), lambda: ask(f"{uri}/health") is not None, mask(uri), is_vital=False)
    url = _make_url(port)
    command = make_mlflow_command(workspace, port)
    return Part(
        "mlflow", "MLflow", command, lambda: ask(f"{url}/health") is not None, url, environment=MLFLOW_ENVIRONMENT
    )


def _make_prefect(home: Path, port: int, elsewhere: str | None) -> Part:
    """Return Prefect's server, with a database that no other process opens."""
    if elsewhere:
        url = mask(elsewhere.removesuffix("/api"))
        return Part("prefect", "Prefect", (), lambda: ask(f"{elsewhere}/health") is not None, url, is_vital=False)
    url = _make_url(port)
    environment = {
        "PREFECT_HOME": str(home / ".visionloop" / "up" / "prefect"),
        "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
        "PREFECT_SERVER_UI_V2_ENABLED": "false",  # that page asks amplitude.com at each load, whatever is set
        "PREFECT_SERVER_UI_API_URL": f"{url}/api",
        "PREFECT_CLI_PROMPT": "false",
    }
    command = (sys.executable, "-m", "prefect", "server", "start", "--host", HOST, "--port", str(port))
    return Part(
        "prefect", "Prefect", command, lambda: ask(f"{url}/api/health") is not None, url, environment=environment
    )


def _make_server(workspace: Workspace, port: int) -> Part:
    url, home = _make_url(port), workspace.settings.home

    def hold() -> str:
        try:
            return "" if read_champion(workspace.store, workspace.name) else NO_CHAMPION
        except VisionLoopError as exc:
            return str(exc)

    return Part(
        "server",
        "server",
        (sys.executable, "-m", "visionloop", "serve", "--port", str(port)),
        lambda: ask(f"{url}/health/ready") is not None,
        url,
        is_vital=False,
        stop_signal=signal.SIGINT,  # after SIGTERM it answers on for a while, for a balancer
        hold=hold,
        fingerprint=lambda: _fingerprint(home, lambda params: params.serve.model_dump(mode="json")),
    )


def _make_runner(workspace: Workspace, api: str) -> Part:
    """Return what runs the deployments: `flows/deploy.py`."""
    home, tags = workspace.settings.home, ["visionloop", workspace.name]

    def read_plan(params: Params) -> dict[str, Any]:
        return {"schedule": params.schedule.model_dump(mode="json"), "triggers": list(params.triggers.names)}

    def hold() -> str:
        try:
            plan = read_plan(load_params(home / "params.yaml"))
        except VisionLoopError as exc:
            return str(exc)
        crons = [value for key, value in plan["schedule"].items() if key != "timezone"]
        return "" if any(crons) or plan["triggers"] else NO_SCHEDULE

    def is_well() -> bool:
        found = ask(f"{api}/deployments/filter", {"deployments": {"tags": {"all_": tags}}})
        return any(one.get("status") == "READY" for one in found or [])

    return Part(
        "runner",
        "runner",
        (sys.executable, str(find_flow("deploy")), "--workspace", str(home)),
        is_well,
        is_vital=False,
        needs="prefect",
        environment={"PREFECT_API_URL": api},
        stop_signal=signal.SIGINT,
        hold=hold,
        fingerprint=lambda: _fingerprint(home, read_plan),
    )


def _fingerprint(home: Path, choose: Callable[[Params], Any]) -> str:
    """Return the digest of a part of params.yaml; "" where the file is broken: then nothing is started anew."""
    try:
        return compute_digest(choose(load_params(home / "params.yaml")))
    except VisionLoopError:
        return ""
