"""Deployments for work pools, as a real Prefect server keeps them; and two workspaces of one name at one server."""

import argparse
import importlib
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from shapes import ROOT, ask_prefect, run
from visionloop.errors import SettingsError

PARAMS = """
name: pooled
schedule: {retrain: "0 3 * * *", predict: "0 4 * * *", ingest: "0 5 * * *", timezone: Europe/Berlin}
triggers: {new_images: 5}
predict: {paths: [inbox]}
"""


@pytest.fixture
def home(tmp_path: Path) -> Path:
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "params.yaml").write_text(PARAMS)
    return tmp_path / "one"


@pytest.fixture
def module(prefect_api: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """flows/deploy.py in this process, with the real server."""
    from prefect.settings import PREFECT_API_URL, temporary_settings

    monkeypatch.syspath_prepend(str(ROOT / "flows"))
    monkeypatch.setenv("PREFECT_API_URL", prefect_api)
    with temporary_settings({PREFECT_API_URL: prefect_api}):
        yield importlib.import_module("deploy")


def deploy(module: ModuleType, home: Path, *argv: str) -> None:
    parser = argparse.ArgumentParser()
    module.environment.add_deploy_options(parser)
    module.deploy(home, parser.parse_args(argv))


def read(api: str, name: str) -> dict[str, Any]:
    return dict(ask_prefect(api, f"deployments/name/{name}") or {})


def list_deployments(api: str, tag: str = "pooled") -> list[tuple[str, str]]:
    query = {"deployments": {"tags": {"all_": [tag]}}}
    found = ask_prefect(api, "deployments/filter", query)
    return sorted((one["entrypoint"], one["parameters"]["workspace"]) for one in found)


def test_each_type_of_pool_gets_its_job_variables(
    module: ModuleType,
    home: Path,
    prefect_api: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://ann:secret@mlflow.example")
    monkeypatch.setenv("VISIONLOOP_STORE", str(home.parent / "store"))
    monkeypatch.setenv("AWS_DEFAULT_REGION", "eu-central-1")
    monkeypatch.setenv("RAY_ADDRESS", "ray://head:10001")
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "a-secret-token")
    deploy(module, home, "--pool", "boxes", "--image", "pets:3")
    said = capsys.readouterr().out
    assert "made the docker pool boxes\n" in said
    assert "note: MLFLOW_TRACKING_URI holds a password, so it is not kept in Prefect" in said
    assert said.endswith("a worker runs them: prefect worker start --pool boxes --type docker\n")
    found = read(prefect_api, "predict/pooled")
    variables = found["job_variables"]
    assert (found["work_pool_name"], variables["image"]) == ("boxes", "pets:3")
    assert variables["volumes"] == [f"{home}:{home}", f"{home.parent}/store:{home.parent}/store"]
    env = variables["env"]
    assert (env["VISIONLOOP_STORE"], env["AWS_DEFAULT_REGION"]) == (f"file://{home.parent}/store", "eu-central-1")
    assert (env["RAY_ADDRESS"], env["RAY_AUTH_MODE"]) == ("ray://head:10001", "token")
    assert env["TMPDIR"] == str(home / ".visionloop" / "tmp")
    assert not [value for value in env.values() if "secret" in value]
    step = {"prefect.deployments.steps.set_working_directory": {"directory": "/app/flows"}}
    assert (found["entrypoint"], found["pull_steps"]) == ("predict.py:predict", [step])
    (schedule,) = found["schedules"]
    assert (schedule["schedule"]["cron"], schedule["schedule"]["timezone"]) == ("0 4 * * *", "Europe/Berlin")
    pool = ask_prefect(prefect_api, "work_pools/boxes")
    assert {"image", "volumes", "networks"} <= set(pool["base_job_template"]["variables"]["properties"])

    deploy(module, home, "--pool", "pods", "--type", "kubernetes", "--image", "pets:4", "--flows", "/srv/flows")
    found = read(prefect_api, "retrain/pooled-if-due")
    assert set(found["job_variables"]) == {"image", "env"}
    assert found["parameters"] == {"workspace": str(home), "only_if_due": True}
    assert found["pull_steps"][0]["prefect.deployments.steps.set_working_directory"] == {"directory": "/srv/flows"}
    pool = ask_prefect(prefect_api, "work_pools/pods")
    assert (pool["type"], pool["base_job_template"]["job_configuration"]["job_manifest"]["kind"]) == (
        "kubernetes",
        "Job",
    )

    deploy(module, home, "--pool", "here")
    variables = read(prefect_api, "ingest/pooled")["job_variables"]
    assert (set(variables), variables["working_dir"]) == ({"env", "working_dir"}, str(ROOT / "flows"))
    for argv, told in (
        (["--pool", "here", "--type", "docker", "--image", "a"], "pool here: is of the type process; expected docker"),
        (["--pool", "here", "--image", "a"], "--image: got an image; expected none for a process pool"),
        (["--pool", "boxes"], "--image: got none; expected the image that the docker pool runs"),
    ):
        with pytest.raises(SettingsError) as caught:
            deploy(module, home, *argv)
        assert str(caught.value).startswith(told)


class Closed(BaseHTTPRequestHandler):
    """A Prefect server with a password that nobody has said."""

    def do_GET(self) -> None:
        self.send_response(200 if self.path == "/api/health" else 401)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_POST = do_GET

    def log_message(self, *_: object) -> None:
        pass


def test_a_wrong_password_of_prefect_is_told_by_its_name(
    module: ModuleType, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from prefect.settings import PREFECT_API_URL, temporary_settings

    with ThreadingHTTPServer(("127.0.0.1", 0), Closed) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/api"
        monkeypatch.setenv("PREFECT_API_URL", url)
        with temporary_settings({PREFECT_API_URL: url}), pytest.raises(SettingsError) as caught:
            deploy(module, home, "--pool", "here")
        server.shutdown()
    assert str(caught.value).startswith(
        "PREFECT_API_AUTH_STRING: the Prefect server does not take it; expected USER:PASSWORD, as its own "
    )


def test_a_workspace_does_not_take_the_deployments_of_another_one(
    module: ModuleType, home: Path, prefect_api: str, capsys: pytest.CaptureFixture[str]
) -> None:
    params = home / "params.yaml"
    params.write_text(params.read_text().replace("pooled", "twice"))
    other = Path(shutil.copytree(home, home.parent / "two"))
    deploy(module, home, "--pool", "pairs")
    before = list_deployments(prefect_api, "twice")
    assert before == sorted((f"{flow}.py:{flow}", str(home)) for flow in ("retrain", "predict", "ingest", "retrain"))
    with pytest.raises(SettingsError) as caught:
        deploy(module, other, "--pool", "pairs")
    assert str(caught.value) == (
        f"deployments of twice at this Prefect server: are those of the workspace {home}; expected those of {other}. "
        "Give one of them another `name` in params.yaml, or take over with --replace."
    )
    assert list_deployments(prefect_api, "twice") == before
    ids = read(prefect_api, "ingest/twice")["id"]
    deploy(module, other, "--pool", "pairs", "--replace")
    assert {home for _, home in list_deployments(prefect_api, "twice")} == {str(other)}
    assert read(prefect_api, "ingest/twice")["id"] != ids, "who still serves the old one gets none of its runs"

    moved = other.rename(home.parent / "three")
    (moved / "params.yaml").write_text(params.read_text().replace('ingest: "0 5 * * *", ', ""))
    capsys.readouterr()
    deploy(module, moved, "--pool", "pairs")
    assert f"removed ingest/twice of {other}\n" in capsys.readouterr().out
    assert list_deployments(prefect_api, "twice") == sorted(
        (f"{flow}.py:{flow}", str(moved)) for flow in ("retrain", "predict", "retrain")
    ), "what is not planned any more does not run"
    automations = ask_prefect(prefect_api, "automations/filter", {})
    assert sum("twice-if-due" in one["name"] for one in automations) == 1


WATCH = """
import sys
from pathlib import Path
sys.path[:0] = ["flows", "tests/support"]
import monitor
from watched import CLASSES, FIRST, at_end_of, make_watched

home = Path(sys.argv[1])
watched = make_watched(home / "watched")
rows = watched.write_day(0)
watched.keep(0, rows[:150], 0.5)
watched.write_rows(FIRST, rows)
watched.label(2, {row["request_id"]: CLASSES[row["prediction"] == CLASSES[0]] for row in rows[:60]})  # all are wrong
monitor.open_workspace = lambda home: watched.place
print(monitor.monitor(str(home), now=at_end_of(0), return_state=True).name)
"""


def test_poor_quality_starts_the_flow_that_asks_the_triggers(module: ModuleType, home: Path, prefect_api: str) -> None:
    """By its event, at a real server; nobody works for the pool, so the run waits."""
    params = home / "params.yaml"
    params.write_text('name: fake\nschedule: {monitor: "0 6 * * *"}\ntriggers: {quality_windows: 1}\n')
    deploy(module, home, "--pool", "watched")
    deployment = read(prefect_api, "retrain/fake-if-due")["id"]
    done = run(ROOT, sys.executable, "-c", WATCH, str(home), PREFECT_API_URL=prefect_api)
    assert done.stdout == "Quality\n", done.stderr
    query = {"deployments": {"id": {"any_": [deployment]}}}
    deadline = time.monotonic() + 100
    while not (found := ask_prefect(prefect_api, "flow_runs/filter", query)):
        assert time.monotonic() < deadline, "no run was started"
        time.sleep(0.3)
    (started,) = found
    assert (started["state_type"], started["parameters"]["only_if_due"]) == ("SCHEDULED", True)
    assert started["created_by"]["type"] == "AUTOMATION"
