"""Killed in the middle of training: nothing lives on, and the same command goes on in the same run."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING
from uuid import uuid4

import psutil
import pytest

from shapes import (
    ROOT,
    ask_prefect,
    find_flow_run,
    find_run,
    make_environment,
    make_workspace,
    retrain,
    run,
    set_train,
    visionloop,
)
from visionloop.params import load_params
from visionloop.store.lease import Claim

if TYPE_CHECKING:
    from conftest import PrefectServer

EPOCHS = 20
End = Callable[[subprocess.Popen[str]], None]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace whose training is long enough to be killed several times."""
    return make_workspace(tmp_path_factory.mktemp("kills") / "ws", epochs=EPOCHS, number=100)


def start_flow(home: Path, **extra: str) -> subprocess.Popen[str]:
    """Start the flow in a process group of its own."""
    command = [sys.executable, "flows/retrain.py", "--workspace", str(home)]
    env = make_environment(**extra)
    return subprocess.Popen(
        command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def start_until_it_trains(home: Path, **extra: str) -> subprocess.Popen[str]:
    """Start the flow; return it when two more epochs are done."""
    process = start_flow(home, **extra)
    assert process.stdout is not None
    seen, lines = 0, []
    for line in process.stdout:
        lines.append(line)
        seen += line.startswith("  epoch ")
        if seen == 2:
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


def assert_all_gone(home: Path, limit_s: float = 90) -> None:
    deadline = time.monotonic() + limit_s
    while (left := list_ours(home)) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert [p.cmdline() for p in left] == []


def read_run(home: Path) -> str:
    (record,) = (home / ".visionloop" / "work" / "train").glob("*/run.json")
    return str(json.loads(record.read_text())["run_id"])


def find_child(process: subprocess.Popen[str], word: str) -> psutil.Process:
    return next(c for c in psutil.Process(process.pid).children(recursive=True) if word in " ".join(c.cmdline()))


def kill_flow(process: subprocess.Popen[str]) -> None:
    process.kill()


def kill_dvc(process: subprocess.Popen[str]) -> None:
    find_child(process, "dvc repro").kill()


def take_over(process: subprocess.Popen[str]) -> None:
    """Another machine has taken this one for dead. Its claim ends, so that nobody waits for it."""
    home = Path(str(psutil.Process(process.pid).cmdline()[-1]))
    claims = home / ".visionloop" / "store" / "leases" / load_params(home / "params.yaml").name
    (claims / "000099.json").write_text(json.dumps({**Claim(99, token="other", who="eve").to_json(), "ended": True}))


def interrupt_group(process: subprocess.Popen[str]) -> None:
    os.killpg(process.pid, signal.SIGINT)


def terminate_group(process: subprocess.Popen[str]) -> None:
    os.killpg(process.pid, signal.SIGTERM)


def test_a_killed_flow_leaves_nothing_and_the_same_run_goes_on(home: Path, prefect_api: str) -> None:
    """It has a Prefect server of its own, which must go too."""
    check_ends(home, prefect_api, [(kill_flow, -signal.SIGKILL, {})])


@pytest.mark.long
def test_other_ends_leave_nothing_and_the_same_run_goes_on(home: Path, prefect_api: str) -> None:
    set_train(home, seed=1)  # another training, with no champion that it would have to beat
    rename(home, "ends")
    server = {"PREFECT_API_URL": prefect_api}
    check_ends(home, prefect_api, [(kill_dvc, 2, server), (interrupt_group, 130, {}), (take_over, 2, server)])


def rename(home: Path, name: str) -> None:
    """Begin anew under another name, with the same photos: these tests share a workspace, in any order."""
    path = home / "params.yaml"
    path.write_text(re.sub("name: \\w+", f"name: {name}", path.read_text()))
    assert visionloop(home, "ingest", str(home.parent / "photos")).returncode == 0


def check_ends(home: Path, prefect_api: str, ends: list[tuple[End, int, dict[str, str]]]) -> None:
    """End a training in each of the ways, then let it go on to its end: in one MLflow run, with no epoch run twice."""
    run_ids = set()
    for end, code, extra in ends:
        process = start_until_it_trains(home, **extra)
        run_ids.add(read_run(home))
        end(process)
        assert process.stdout is not None
        said = process.stdout.read()
        assert process.wait(timeout=180) == code, f"{end.__name__}: {said}"
        assert "Traceback" not in said
        assert "WARNING" not in said, "dvc tells of a killed process that held its locks"
        assert_all_gone(home)
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
    name = load_params(home / "params.yaml").name
    entry = json.loads((home / ".visionloop" / "store" / "ledger" / name / "000001.json").read_text())
    wait_for_event(prefect_api, "visionloop.promoted", f"visionloop.{name}", entry["bundle"])


def wait_for_event(api: str, name: str, resource: str, bundle: str) -> None:
    """Wait until Prefect's server has this event; workspaces of other tests have told the same one."""
    query = {"filter": {"event": {"name": [name]}, "resource": {"id": [resource]}}}
    deadline = time.monotonic() + 100
    while True:
        found = ask_prefect(api, "events/filter", query)
        if any(one["payload"]["bundle"] == bundle for one in found["events"]):
            return
        assert time.monotonic() < deadline, found
        time.sleep(0.3)


RUNS = """
import os, sys, time
from pathlib import Path
sys.path.insert(0, "flows")
import told
from prefect import flow, get_client, runtime, task
from prefect.states import Crashed
home = Path(sys.argv[1])
"""
DIE = (
    RUNS
    + """
@flow(**told.HOOKS)
def die(workspace: str) -> None:
    print(runtime.flow_run.id, flush=True)
    task(lambda: (time.sleep(3), os._exit(9)), name="the step")()  # Prefect learns of a task by events, a bit later

with get_client(sync_client=True) as client:
    for number in ("", "9"):  # never begun: one as this process makes it, one of another machine
        tags = [tag.replace(".", f".{number}") for tag in told.make_tags(home)]
        print(client.create_flow_run(die, parameters={"workspace": str(home)}, tags=tags).id, flush=True)
die(str(home))
"""
)
NEXT = (
    RUNS
    + """
@flow(name="die", **told.HOOKS)
def come_next(workspace: str) -> None:
    with get_client(sync_client=True) as client:
        print(runtime.flow_run.id, client.read_flow_run(runtime.flow_run.id).state.name, flush=True)
        client.set_flow_run_state(runtime.flow_run.id, Crashed(), force=True)  # by mistake: it goes on

come_next(str(home))
print([told.close_died(run) for run in sys.argv[2:]])
"""
)


def test_runs_of_prefect_whose_process_is_gone_are_closed_by_the_next_one(tmp_path: Path, prefect_api: str) -> None:
    """One in mid-task with its task, and one that was made and never begun; none of another machine, nor a living one.

    By its number a run is closed once. A run that this Prefect does not know is no error, a Prefect that is away is.
    """
    server = {"PREFECT_API_URL": prefect_api}
    (tmp_path / "params.yaml").write_text("name: left\n")
    died = run(ROOT, sys.executable, "-c", DIE, str(tmp_path), **server)
    assert died.returncode == 9, died.stderr
    made, foreign, begun = died.stdout.split()[:3]
    states = [list_states(prefect_api, "flow_runs", one)[0] for one in (made, foreign, begun)]
    assert states == [("Pending", "PENDING"), ("Pending", "PENDING"), ("Running", "RUNNING")]
    done = run(
        ROOT, sys.executable, "-c", NEXT, str(tmp_path), begun, foreign, foreign, str(uuid4()), "no id", **server
    )
    assert done.returncode == 0, done.stderr
    mine, state, *closed = done.stdout.split(maxsplit=2)
    assert (state, closed) == ("Running", ["[False, True, False, False, False]\n"])
    assert list_states(prefect_api, "flow_runs", mine) == [("Completed", "COMPLETED")]
    for kind, ids in (("flow_runs", (made, foreign, begun)), ("task_runs", (begun,))):
        for one in ids:
            assert list_states(prefect_api, kind, one) == [("Crashed", "CRASHED")]
    said = " ".join(done.stderr.split())
    assert said.count("closed in Prefect, its process was gone: run ") == 2
    away = run(
        ROOT,
        sys.executable,
        "-c",
        NEXT.replace("come_next(s", "str(s"),
        str(tmp_path),
        begun,
        PREFECT_API_URL="http://127.0.0.1:9/api",
    )
    assert f"visionloop.errors.PipelineError: Prefect run {begun}: is not closed (" in away.stderr.replace("\n", "")


WAIT = """
from types import SimpleNamespace
from prefect.events.filters import EventNameFilter, EventResourceFilter

def wait(client, event, resource):
    which = {"event": EventNameFilter(name=[event]), "resource": EventResourceFilter(id=[resource])}
    while not told.read_events(client, **which):
        time.sleep(0.1)  # each is heard this much after the one before
"""
AWAY = (
    RUNS
    + WAIT
    + """
told.mark_process = lambda: "4711.1.anothermachine.anothercomputer"

@flow(name="die", **told.HOOKS)
def die(workspace: str) -> None:
    own = f"prefect.flow-run.{runtime.flow_run.id}"
    print(runtime.flow_run.id, flush=True)
    with get_client(sync_client=True) as client:
        wait(client, told.BEAT, own)  # the server has it: now it may be killed
    task(lambda: (time.sleep(3), os._exit(9)), name="the step")()

die(str(home))
"""
)
LOOK = (
    RUNS
    + WAIT
    + """
from datetime import UTC, datetime
with get_client(sync_client=True) as client:
    print(told.close_left(client, home, now=datetime.now(UTC)))
    told.get_current_settings = lambda: SimpleNamespace(flows=SimpleNamespace(heartbeat_frequency=0.05))
    for other in range(told.MISSED_BEATS):
        own = f"prefect.flow-run.{home}-{other}"
        told.emit_event(event=told.BEAT, resource={"prefect.resource.id": own})
        wait(client, told.BEAT, own)
    print(told.close_left(client, home, now=datetime.now(UTC)))
"""
)


def test_a_run_of_another_machine_is_closed_when_its_heartbeats_have_stopped(tmp_path: Path, prefect_api: str) -> None:
    """After six of 50 ms, where those of others were heard: not of 3 minutes. Its workspace may lie elsewhere here."""
    server = {"PREFECT_API_URL": prefect_api}
    for folder in ("there", "here"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "params.yaml").write_text("name: silent\n")
    died = run(ROOT, sys.executable, "-c", AWAY, str(tmp_path / "there"), **server)
    assert died.returncode == 9, died.stderr
    (one,) = died.stdout.split()
    assert list_states(prefect_api, "flow_runs", one) == [("Running", "RUNNING")]
    looked = run(ROOT, sys.executable, "-c", LOOK, str(tmp_path / "here"), **server)
    assert looked.stdout == f"[]\n['closed in Prefect, its process was gone: run {one}']\n", looked.stderr
    assert list_states(prefect_api, "flow_runs", one) == [("Crashed", "CRASHED")]
    assert list_states(prefect_api, "task_runs", one) == [("Crashed", "CRASHED")]


def list_states(api: str, kind: str, run_id: str) -> list[tuple[str, str]]:
    query = {"flow_runs": {"id": {"any_": [run_id]}}}
    found = ask_prefect(api, f"{kind}/filter", query)
    return [(one["state_name"], one["state_type"]) for one in found]


KILLS = int(os.environ.get("TEST_KILLS", "20"))
STEPS = ("with the Prefect at", "[1/9]", "[2/9]", "[3/9]", "[4/9]", "[5/9]", "[6/9]", "[7/9]", "[8/9]", "[9/9]")


@pytest.mark.long
def test_twenty_kills_at_any_step_with_restarts_of_prefect(home: Path, own_prefect_server: "PrefectServer") -> None:
    """The flow, all of its processes, or dvc; or Prefect is restarted, and then the flow killed. Each step twice."""
    set_train(home, seed=2)
    rename(home, "killed")
    rng, ended = random.Random(14), []
    for number in range(KILLS):
        process = start_flow(home, PREFECT_API_URL=own_prefect_server.url)
        said = read_until(process, STEPS[number * len(STEPS) // KILLS])
        time.sleep(rng.uniform(0, 3))
        end = rng.choice((kill_flow, kill_group, kill_dvc, restart_prefect(own_prefect_server)))
        try:
            end(process)
        except StopIteration:  # no dvc at this step
            process.kill()
        said += read_until(process, None)
        ended.append(process.wait(timeout=300))
        assert "Traceback" not in said, said
        assert_all_gone(home)
    done = retrain(home, PREFECT_API_URL=own_prefect_server.url)
    assert done.returncode == 0, done.stderr
    assert sum(code != 0 for code in ended) >= KILLS / 2, (
        ended
    )  # at the last steps a run may be done before it is killed
    (entry,) = (home / ".visionloop" / "store" / "ledger" / "killed").iterdir()
    assert json.loads(entry.read_text())["number"] == 1
    query = {"flow_runs": {"state": {"type": {"any_": ["RUNNING", "PENDING"]}}}}
    left = ask_prefect(own_prefect_server.url, "flow_runs/filter", query)
    assert [one["id"] for one in left if one["parameters"].get("workspace") == str(home)] == [], ended
    assert json.loads(visionloop(home, "runs", "--status", "running", "--json").stdout) == {"runs": []}, ended
    assert len(json.loads(visionloop(home, "runs", "--json").stdout)["runs"]) == 1, "one training, often killed"
    assert len(list((home / ".visionloop" / "store" / "leases" / "killed").iterdir())) == 1


def restart_prefect(server: "PrefectServer") -> End:
    def restart(process: subprocess.Popen[str]) -> None:
        server.stop()
        server.start()
        process.kill()

    return restart


def kill_group(process: subprocess.Popen[str]) -> None:
    os.killpg(process.pid, signal.SIGKILL)


def read_until(process: subprocess.Popen[str], word: str | None) -> str:
    """Return what a flow says up to a line that begins so, or to its end."""
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line)
        if word and line.startswith(word):
            break
    return "".join(lines)


@pytest.mark.long
def test_two_retrains_of_one_workspace(home: Path, prefect_api: str) -> None:
    rename(home, "others")
    process = start_until_it_trains(home, PREFECT_API_URL=prefect_api)
    try:
        for server in ({}, {"PREFECT_API_URL": prefect_api}):
            second = retrain(home, **server)
            assert second.returncode == 2
            told = rf"error: retrain of others: \S+ on \S+ \(process {process.pid}, run \S+\) since \S+ is at it; .*\n"
            assert re.fullmatch(told, second.stderr), second.stderr
            assert "ingest" not in second.stdout
        found = find_flow_run(prefect_api, home)
        assert (found["state_name"], found["state_type"]) == ("Skipped", "CANCELLED")
    finally:
        terminate_group(process)  # as `timeout` and a service manager do
        assert process.wait(timeout=180) == 143
    assert_all_gone(home)
