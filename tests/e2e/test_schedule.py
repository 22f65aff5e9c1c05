"""The schedule, against a real Prefect server: scheduled, picked up, run, finished."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
from shapes import ROOT, make_environment, make_workspace, run

LIMIT_S = 200


def deploy(home: Path, **extra: str) -> subprocess.CompletedProcess[str]:
    return run(ROOT, sys.executable, "flows/deploy.py", "--workspace", str(home), **extra)


def wait_for_finished_run(api: str, process: subprocess.Popen[str]) -> dict[str, Any]:
    """Return the first run of the deployment that has ended."""
    deadline = time.monotonic() + LIMIT_S
    query = {"deployments": {"name": {"any_": ["shapes"]}}, "sort": "EXPECTED_START_TIME_ASC"}
    while time.monotonic() < deadline:
        assert process.poll() is None, "deploy.py ended"
        runs = httpx.post(f"{api}/flow_runs/filter", json=query, trust_env=False).json()
        ended = [r for r in runs if r["state_type"] in {"COMPLETED", "FAILED", "CRASHED"}]
        if ended:
            return dict(ended[0])
        time.sleep(1)
    raise AssertionError(f"no run ended within {LIMIT_S} s: {[r['state_name'] for r in runs]}")


def test_a_run_that_is_due_is_picked_up_and_promotes(tmp_path: Path, prefect_api: str) -> None:
    home = make_workspace(tmp_path / "ws", number=40)
    path = home / "params.yaml"
    path.write_text(path.read_text() + 'schedule: {retrain: "* * * * *"}\n')
    env = make_environment(PREFECT_API_URL=prefect_api)
    command = [sys.executable, "flows/deploy.py", "--workspace", str(home)]
    log = (tmp_path / "deploy.log").open("w")
    process = subprocess.Popen(
        command, cwd=ROOT, env=env, stdout=log, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    try:
        ended = wait_for_finished_run(prefect_api, process)
        os.killpg(process.pid, signal.SIGINT)  # Ctrl-C; the run of the next minute may be under way by now
        process.wait(timeout=120)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        log.close()
    said = (tmp_path / "deploy.log").read_text()
    assert (ended["state_name"], ended["auto_scheduled"]) == ("Promoted", True), said
    assert ended["parameters"] == {"workspace": str(home)}
    (entry,) = (home / ".visionloop" / "store" / "ledger").rglob("*.json")
    assert json.loads(entry.read_text())["dataset"]["version"] == 1
    assert "serving retrain/shapes" in said
    assert_limited(prefect_api)
    assert_artifact(prefect_api)


def assert_limited(api: str) -> None:
    """One run at a time: what comes due meanwhile is cancelled."""
    found = httpx.get(f"{api}/deployments/name/retrain/shapes", trust_env=False).json()
    assert found["global_concurrency_limit"]["limit"] == 1
    assert found["concurrency_options"]["collision_strategy"] == "CANCEL_NEW"


def assert_artifact(api: str) -> None:
    query = {"artifacts": {"key": {"any_": ["retrain"]}}}
    texts = [a["data"] for a in httpx.post(f"{api}/artifacts/filter", json=query, trust_env=False).json()]
    assert any(text.startswith("# shapes: shapes has a new champion") for text in texts)


def test_what_cannot_be_scheduled_is_one_line(tmp_path: Path) -> None:
    home = make_workspace(tmp_path / "ws", number=5)
    done = deploy(home)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert 'schedule.retrain: is not set; expected a cron expression like "0 3 * * *".' in done.stderr
    path = home / "params.yaml"
    path.write_text(path.read_text() + 'schedule: {retrain: "0 3 * * *"}\n')
    done = deploy(home)
    assert done.returncode == 2
    assert "PREFECT_API_URL: is not set; expected the address of a Prefect server." in done.stderr
    done = deploy(home, PREFECT_API_URL="http://127.0.0.1:9/api")
    assert done.returncode == 2
    assert "http://127.0.0.1:9/api does not answer" in done.stderr
