"""Killed in the middle of training: nothing lives on, and the same command goes on in the same run.

The tests are one story: each goes on where the one before ended.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import psutil
import pytest

from shapes import ROOT, find_run, make_environment, make_workspace, read_runs, retrain, set_train

EPOCHS = 15
End = Callable[[subprocess.Popen[str]], None]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace whose training is long enough to be killed several times."""
    return make_workspace(tmp_path_factory.mktemp("kills") / "ws", epochs=EPOCHS, number=100)


def start_until_it_trains(home: Path, **extra: str) -> subprocess.Popen[str]:
    """Start the flow in a process group of its own; return it when two more epochs are done, and training is held."""
    command = [sys.executable, "flows/retrain.py", "--workspace", str(home)]
    env = make_environment(**extra)
    process = subprocess.Popen(
        command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    assert process.stdout is not None
    seen, lines = 0, []
    for line in process.stdout:
        lines.append(line)
        seen += line.startswith("  epoch ")
        if seen == 2:
            find_child(process, "visionloop", "train").suspend()  # so that no machine is too slow to end it in time
            return process
    raise AssertionError("it ended before it was killed:\n" + "".join(lines))


def list_ours(home: Path) -> list[psutil.Process]:
    """Every living process that works on this workspace: flow, dvc, stage, Prefect's server, watcher."""
    found = []
    for process in psutil.process_iter():
        try:
            about = [*process.cmdline(), process.environ().get("VISIONLOOP_HOME", "")]
            if str(home) in about and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:
            continue
    return found


def assert_all_gone(home: Path, limit_s: float = 20) -> None:
    deadline = time.monotonic() + limit_s
    while (left := list_ours(home)) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert [p.cmdline() for p in left] == []


def read_run(home: Path) -> str:
    (record,) = (home / ".visionloop" / "work" / "train").glob("*/run.json")
    return str(json.loads(record.read_text())["run_id"])


def find_child(process: subprocess.Popen[str], *end: str) -> psutil.Process:
    """The process below this one whose command line ends so."""
    found = psutil.Process(process.pid).children(recursive=True)
    return next(child for child in found if child.cmdline()[-len(end) :] == list(end))


def kill_flow(process: subprocess.Popen[str]) -> None:
    process.kill()


def kill_dvc(process: subprocess.Popen[str]) -> None:
    find_child(process, "dvc", "repro", "--single-item", "train").kill()


def interrupt_group(process: subprocess.Popen[str]) -> None:
    os.killpg(process.pid, signal.SIGINT)


def terminate_group(process: subprocess.Popen[str]) -> None:
    os.killpg(process.pid, signal.SIGTERM)  # as `timeout` and a service manager do


def test_a_retrain_beside_another_is_refused_and_the_first_ends_at_sigterm(home: Path, prefect_api: str) -> None:
    process = start_until_it_trains(home, PREFECT_API_URL=prefect_api)
    try:
        for server in ({}, {"PREFECT_API_URL": prefect_api}):
            second = retrain(home, **server)
            assert second.returncode == 2
            assert second.stderr == (
                f"error: workspace {home}: process {process.pid} is retraining it; expected one retrain at a time. "
                "Wait for it, or stop it.\n"
            )
            assert "ingest" not in second.stdout
        query = {"sort": "START_TIME_DESC", "limit": 1}
        (run,) = httpx.post(f"{prefect_api}/flow_runs/filter", json=query, trust_env=False).json()
        assert (run["state_name"], run["state_type"], run["parameters"]["workspace"]) == (
            "Skipped",
            "CANCELLED",
            str(home),
        )
    finally:
        end_it(home, process, terminate_group, 143)


def test_a_killed_flow_leaves_nothing_and_the_same_run_goes_on(home: Path, prefect_api: str) -> None:
    """It has a Prefect server of its own, which must go too. Now and the time before it was in the same training."""
    run_id = read_run(home)
    check_ends(home, prefect_api, [(kill_flow, -signal.SIGKILL, {})])
    (found,) = [run for run in read_runs(home).values() if run.data.tags.get("visionloop.bundle")]
    assert found.info.run_id == run_id


@pytest.mark.long
def test_other_ends_leave_nothing_and_the_same_run_goes_on(home: Path, prefect_api: str) -> None:
    set_train(home, seed=1)  # another training
    check_ends(home, prefect_api, [(kill_dvc, 2, {"PREFECT_API_URL": prefect_api}), (interrupt_group, 130, {})])


def check_ends(home: Path, prefect_api: str, ends: list[tuple[End, int, dict[str, str]]]) -> None:
    """End a training in each of the ways, then let it go on to its end: in one MLflow run, with no epoch run twice."""
    run_ids = set()
    for end, code, extra in ends:
        process = start_until_it_trains(home, **extra)
        run_ids.add(read_run(home))
        end_it(home, process, end, code)
    assert len(run_ids) == 1, "one MLflow run, however often it was ended"
    done = retrain(home, PREFECT_API_URL=prefect_api)
    assert done.returncode == 0, done.stderr
    assert "  epoch   1/" not in done.stdout
    assert "WARNING" not in done.stdout
    log = max((home / ".visionloop" / "logs").iterdir())
    lines = log.read_text().splitlines()
    assert len(lines) == len(set(lines)) > 20, "each line once"
    assert sum("[1/9] ingest: new images into the store" in line for line in lines) == 1
    assert find_run(done.stdout) in run_ids


def end_it(home: Path, process: subprocess.Popen[str], end: End, code: int) -> None:
    """End a flow whose training is held, and see that nothing of it lives on."""
    training = find_child(process, "visionloop", "train")
    end(process)
    with contextlib.suppress(psutil.NoSuchProcess):
        training.resume()
    assert process.stdout is not None
    said = process.stdout.read()
    assert process.wait(timeout=60) == code, f"{end.__name__}: {said}"
    assert "Traceback" not in said
    assert "WARNING" not in said, "dvc tells of a killed process that held its locks"
    assert_all_gone(home)
