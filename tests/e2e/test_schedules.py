"""New images tell the next flow: against a real Prefect server, from a run of `ingest` to the word of the triggers."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from shapes import ROOT, ask_prefect, make_environment, make_workspace, run, start_deployment, visionloop, write_shapes
from visionloop.store import LocalStore
from visionloop.store.lease import make_claim, take_lease

LIMIT_S = 240
SECTIONS = """
ingest: {sources: [{kind: folder, path: PHOTOS}]}
schedule: {ingest: "0 1 1 1 *", monitor: "0 2 1 1 *", timezone: Europe/Berlin}
triggers: {new_images: 100000}
"""


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A workspace with images, and a folder with more of them as its source."""
    home = make_workspace(tmp_path / "nightly", number=12)
    more = write_shapes(tmp_path / "more", 6, seed=1)
    path = home / "params.yaml"
    path.write_text(path.read_text().replace("name: shapes", "name: nightly") + SECTIONS.replace("PHOTOS", str(more)))
    assert visionloop(home, "ingest", str(home.parent / "photos")).returncode == 0
    return home


@pytest.fixture
def served(home: Path, prefect_api: str) -> Iterator[subprocess.Popen[bytes]]:
    process = serve(home, prefect_api)
    yield process
    stop(process)


def serve(home: Path, prefect_api: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "flows/deploy.py", "--workspace", str(home)]
    env = make_environment(PREFECT_API_URL=prefect_api)
    with (home.parent / "deploy.log").open("a") as log:
        return subprocess.Popen(command, cwd=ROOT, env=env, stdout=log, stderr=log, start_new_session=True)


def stop(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGINT)
    try:
        process.wait(timeout=60)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def wait_for(find: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + LIMIT_S
    while not (found := find()):
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.5)
    return found


def list_ended(api: str, deployment: str, flow: str = "ingest") -> list[tuple[str, str]]:
    """The states that runs of a deployment have ended in, the oldest first."""
    names = {"deployments": {"name": {"any_": [deployment]}}, "flows": {"name": {"any_": [flow]}}}
    query = {**names, "sort": "EXPECTED_START_TIME_ASC"}
    runs = ask_prefect(api, "flow_runs/filter", query)
    ended = {"COMPLETED", "FAILED", "CRASHED", "CANCELLED"}
    return [(run_["state_name"], run_["state_type"]) for run_ in runs if run_["state_type"] in ended]


def find_engines(pid: int) -> list[psutil.Process]:
    """The processes of flows: also of one whose run has ended, for a moment."""
    found = []
    for one in psutil.Process(pid).children(recursive=True):
        with contextlib.suppress(psutil.Error):
            found += [one] if "prefect.engine" in " ".join(one.cmdline()) else []
    return found


def list_runs_under_way(api: str, deployment: str) -> list[str]:
    """The runs of a deployment that bear the mark of a process."""
    query = {"deployments": {"name": {"any_": [deployment]}}, "flow_runs": {"state": {"type": {"any_": ["RUNNING"]}}}}
    runs = ask_prefect(api, "flow_runs/filter", query)
    return [run_["id"] for run_ in runs if any(tag.startswith("process:1:") for tag in run_["tags"])]


def find_deployment(api: str, name: str) -> dict[str, Any] | None:
    found = ask_prefect(api, f"deployments/name/{name}")
    return dict(found) if found and found["status"] == "READY" else None


@pytest.mark.long
def test_new_images_start_the_flow_that_asks_the_triggers(
    home: Path, prefect_api: str, served: subprocess.Popen[bytes]
) -> None:
    deployment = wait_for(lambda: served.poll() or find_deployment(prefect_api, "ingest/nightly"))
    (schedule,) = deployment["schedules"]
    assert (schedule["schedule"]["cron"], schedule["schedule"]["timezone"]) == ("0 1 1 1 *", "Europe/Berlin")
    wait_for(lambda: find_deployment(prefect_api, "retrain/nightly-if-due"))
    watching = wait_for(lambda: find_deployment(prefect_api, "monitor/nightly"))
    assert served.poll() is None

    start_deployment(prefect_api, watching["id"])
    start_deployment(prefect_api, deployment["id"])
    assert wait_for(lambda: list_ended(prefect_api, "nightly")) == [("NewData", "COMPLETED")]
    assert wait_for(lambda: list_ended(prefect_api, "nightly-if-due", "retrain")) == [("NotDue", "COMPLETED")]
    (decision,) = json.loads(visionloop(home, "triggers", "history", "--json").stdout)["decisions"]
    assert (decision["outcome"], decision["dataset"]) == ("no", 2)
    assert decision["looks"][0]["found"] == "36 new images with labels"
    assert list((home / ".visionloop" / "store").glob("ledger/*")) == []
    assert wait_for(lambda: list_ended(prefect_api, "nightly", "monitor")) == [("Failed", "FAILED")], "no champion"

    with take_lease(LocalStore(home / ".visionloop" / "store"), "nightly", make_claim("ann", "03:00")):
        start_deployment(prefect_api, deployment["id"])
        states = wait_for(lambda: list_ended(prefect_api, "nightly")[1:])
    assert states == [("Skipped", "CANCELLED")], "while a retrain is under way"
    store = home / ".visionloop" / "store"
    store.rename(home / "away")
    start_deployment(prefect_api, deployment["id"])
    assert wait_for(lambda: list_ended(prefect_api, "nightly")[2:]) == [("Failed", "FAILED")]
    assert not store.exists(), "a store that is not mounted gets no lease"
    (home / "away").rename(store)
    start_deployment(prefect_api, deployment["id"])
    assert wait_for(lambda: list_ended(prefect_api, "nightly")[3:]) == [("NothingNew", "COMPLETED")]
    assert len(list_ended(prefect_api, "nightly-if-due", "retrain")) == 1, "no event without new images"

    wait_for(lambda: not find_engines(served.pid))
    with take_lease(LocalStore(store), "nightly", make_claim("ann", "03:00", ttl_s=600.0)):  # it beats each 100 s
        start_deployment(prefect_api, deployment["id"])
        wait_for(lambda: find_engines(served.pid))[0].kill()
        assert wait_for(lambda: list_ended(prefect_api, "nightly")[4:]) == [("Crashed", "CRASHED")]
    query = {"artifacts": {"key": {"like_": "ingest-nightly-%-crashed"}}}
    (page,) = wait_for(lambda: ask_prefect(prefect_api, "artifacts/filter", query))
    assert page["data"].startswith("# nightly: ingest crashed\n\n")
    assert f" in the workspace `{home}`." in page["data"]

    with take_lease(LocalStore(store), "nightly", make_claim("ann", "03:00", ttl_s=600.0)):
        start_deployment(prefect_api, deployment["id"])
        (left,) = wait_for(lambda: list_runs_under_way(prefect_api, "nightly"))
        engines = find_engines(served.pid)
        for process in (psutil.Process(served.pid), *engines):  # as when a machine is switched off: nobody tells of it
            process.kill()
        again = serve(home, prefect_api)
        try:
            line = f"closed in Prefect, its process was gone: run {left}\n"
            wait_for(lambda: line in (home.parent / "deploy.log").read_text())
        finally:
            stop(again)
    assert list_ended(prefect_api, "nightly")[5:] == [("Crashed", "CRASHED")]


def test_what_cannot_be_planned_names_its_field(tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_text('name: pets\nschedule: {triggers: "0 * * * *", retrain: "0 3 * * *"}\n')
    done = run(ROOT, sys.executable, "flows/deploy.py", "--workspace", str(tmp_path))
    assert (done.returncode, done.stdout) == (2, "")
    told = "error: params.yaml triggers: sets none; expected one for schedule.triggers to ask. See docs/loop.md.\n"
    assert done.stderr == told
