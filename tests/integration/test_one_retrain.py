"""One retrain of a name at a time, as the chain of steps has it: who dies is replaced, and who is replaced ends."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from desks import NOW, Desk
from memory_tracking import MemoryTracking
from visionloop import pipeline, retrain
from visionloop.errors import DatasetError, LeaseHeld, LeaseLost, PipelineError, TrackingError, VisionLoopError
from visionloop.lifetime import Terminated
from visionloop.promotion.ledger import read_champion
from visionloop.promotion.promote import register
from visionloop.records import canonical_json
from visionloop.retrain import Scheduled, bring_up_to_date
from visionloop.runs import as_one_run
from visionloop.store import LocalStore, ObjectStore
from visionloop.store.lease import Claim, make_claim, take_lease
from visionloop.tracking import PARENT_TAG, RETRAIN_TAG
from worlds import write_note

HOLD = """
import sys, time
from dataclasses import replace
from pathlib import Path
from visionloop.store import LocalStore
from visionloop.store.lease import make_claim, take_lease

claim = replace(make_claim("ann", "03:00", ttl_s=float(sys.argv[2])), machine=sys.argv[3])
with take_lease(LocalStore(Path(sys.argv[1])), "fake", claim):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Desk:
    desk = Desk(tmp_path_factory.mktemp("desk"))
    (desk.world.settings.home / "dvc.yaml").write_text("stages: {prepare: {cmd: none}}\n")
    (desk.world.settings.home / "params.yaml").write_text("name: fake\n")
    return desk


@pytest.fixture(autouse=True)
def free(desk: Desk) -> None:
    """Begin without claims and runs."""
    for key in list(desk.store.list("leases/")):
        desk.store.delete(key)
    desk.tracking.runs.clear()
    desk.tracking.down = False


def hold_elsewhere(store: LocalStore, ttl_s: float, machine: str) -> subprocess.Popen[str]:
    """Hold the lease in another process, which says it is on that machine."""
    command = [sys.executable, "-c", HOLD, str(store.root), str(ttl_s), machine]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def wait_until_still(pid: int) -> None:
    """Wait until every thread has ended or is stopped: one in a write finishes that after the signal was sent."""
    deadline = time.monotonic() + 60
    while any(read_thread_state(task) not in "TZX" for task in Path(f"/proc/{pid}/task").iterdir()):
        assert time.monotonic() < deadline, "the signal was not taken within a minute"
        time.sleep(0.01)


def read_thread_state(task: Path) -> str:
    """Return the letter of a thread's state, X of one that is gone."""
    try:
        return (task / "stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return "X"


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGSTOP])
def test_a_holder_that_is_killed_or_stops_is_replaced_in_bounded_time(tmp_path: Path, end: signal.Signals) -> None:
    store, ttl_s = LocalStore(tmp_path), 3.0
    process = hold_elsewhere(store, ttl_s, "another machine")
    try:
        with pytest.raises(
            LeaseHeld, match=rf"retrain of fake: ann on \S+ \(process {process.pid}\) since 03:00 is at"
        ):
            take_lease(store, "fake", make_claim("ben", NOW))
        os.kill(process.pid, end)
        wait_until_still(process.pid)
        began = time.monotonic()
        with take_lease(store, "fake", make_claim("ben", NOW)) as lease:
            waited = time.monotonic() - began
            assert (lease.claim.number, [claim.pid for claim in lease.died]) == (2, [process.pid])
            assert 0.9 * ttl_s < waited < ttl_s + 30, "the time to live, and what the machine is slow"
            os.kill(process.pid, signal.SIGCONT)
            lease.check()
    finally:
        process.kill()
        process.wait()


def open_runs(tracking: MemoryTracking) -> list[str]:
    """A retrain with a training in it, a training by hand, and a retrain that was closed."""
    parent = tracking.open_run("retrain-dataset3", run_id=None, tags={RETRAIN_TAG: "a"}, params={})
    child = tracking.open_run("train", run_id=None, tags={PARENT_TAG: parent}, params={})
    by_hand = tracking.open_run("by hand", run_id=None, tags={}, params={})
    closed = tracking.open_run("retrain-dataset2", run_id=None, tags={RETRAIN_TAG: "b"}, params={})
    tracking.close_run(closed, "FINISHED")
    return [parent, child, by_hand, closed]


def die(store: ObjectStore, run: str = "") -> None:
    """Leave the claim of a process of this machine that is gone."""
    take_lease(store, "fake", replace(make_claim("ann", "03:00", run=run), process_start="1"))


def attempt(desk: Desk, scheduled: Scheduled | None = None) -> list[str]:
    """Begin a retrain that ends at its first step; return what it told."""
    told: list[str] = []

    def end(name: str, work: Callable[[], Any]) -> Any:
        if name == "ingest":
            raise DatasetError("test", "ends here")
        return work()

    with pytest.raises(DatasetError, match="ends here"):
        bring_up_to_date(desk.place, tell=told.append, run_step=end, scheduled=scheduled)
    return told


def list_claims(desk: Desk) -> list[str]:
    return [key.rpartition("/")[2] for key in desk.store.list("leases/fake/")]


def test_what_a_dead_retrain_left_open_is_closed_by_the_next_and_told(desk: Desk) -> None:
    runs, closed = open_runs(desk.tracking), []  # type: ignore[var-annotated]
    die(desk.store, "run-1")

    def close(run: str) -> bool:
        closed.append(run)
        return True

    told = attempt(desk, Scheduled("run-2", close))
    assert [desk.tracking.load_run(run).status for run in runs] == ["KILLED", "KILLED", "RUNNING", "FINISHED"]
    assert told[0].startswith("a retrain was ended before it could close its runs: ann on ")
    assert told[1:3] == [
        "  closed in MLflow, as killed: retrain-dataset3, train",
        "  closed by the scheduler, as crashed: run run-1",
    ]
    assert (closed, list_claims(desk)) == (["run-1"], ["000002.json"])
    assert attempt(desk, Scheduled("run-3", close))[0].startswith("[1/"), "it is told once"


def test_a_run_of_a_scheduler_is_left_for_the_next_one_that_knows_the_scheduler(desk: Desk) -> None:
    die(desk.store, "run-1")
    attempt(desk)
    assert list_claims(desk) == ["000001.json", "000002.json"]
    closed: list[str] = []
    attempt(desk, Scheduled("run-2", lambda run: bool(closed.append(run))))
    assert (closed, list_claims(desk)) == (["run-1"], ["000003.json"])


def test_what_cannot_be_closed_is_told_and_tried_again(desk: Desk) -> None:
    run = open_runs(desk.tracking)[0]
    die(desk.store)
    desk.tracking.down = True
    assert "  not closed, the next retrain tries again: MLflow" in attempt(desk)[1]
    desk.tracking.down = False
    assert desk.tracking.load_run(run).status == "RUNNING"
    attempt(desk)
    assert (desk.tracking.load_run(run).status, list_claims(desk)) == ("KILLED", ["000003.json"])


def steal(store: ObjectStore) -> None:
    """Another machine has taken the holder for dead."""
    claim = Claim(99, token="other", who="eve", host="elsewhere")
    store.put("leases/fake/000099.json", canonical_json(claim.to_json()))


def test_an_older_number_does_not_promote(desk: Desk) -> None:
    digest = desk.judge(0)
    register(desk.place)
    lease = take_lease(desk.store, "fake", make_claim("ann", NOW))
    steal(desk.store)
    with pytest.raises(
        LeaseLost, match=r"lease 1 of fake: taken over by eve on elsewhere .*, lease 99; expected to hold"
    ):
        desk.promote(lease=lease)
    assert read_champion(desk.store, "fake") is None
    assert desk.promote().bundle == digest, "a person needs no lease"


def test_a_stage_is_stopped_when_another_retrain_takes_over(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """Within a beat, with what it is, not with what came of the stop."""
    home, ended = str(desk.world.settings.home), []  # type: ignore[var-annotated]

    def run_stage(*_: Any, on_start: Callable[[Any], None], **__: Any) -> None:
        process = subprocess.Popen(["sleep", "60"])
        on_start(process)
        ended.append(process.wait())
        raise PipelineError("stage train", "failed", "a finished stage")

    monkeypatch.setattr(pipeline, "run_stage", run_stage)
    with take_lease(desk.store, "fake", make_claim("ann", NOW, ttl_s=0.6)) as lease:
        steal(desk.store)
        with pytest.raises(LeaseLost, match="taken over by eve"):
            retrain._under(lease, lambda: retrain.run_stage(home, "train", print, lease=lease))
        with pytest.raises(LeaseLost, match="taken over by eve"):
            retrain._under(lease, lambda: pytest.fail("the next step begins"))
    assert ended == [-signal.SIGTERM]


def test_a_store_without_what_is_known_gets_no_lease(desk: Desk, tmp_path: Path) -> None:
    away = replace(desk.place, store=LocalStore(tmp_path / "not mounted"))
    with pytest.raises(VisionLoopError, match="does not hold dataset fake version 1"):
        bring_up_to_date(away, tell=print)
    assert not (tmp_path / "not mounted").exists()


def test_a_lease_that_is_lost_leaves_the_run_to_who_has_it(desk: Desk) -> None:
    dataset = desk.world.pin.to_json()
    with pytest.raises(LeaseLost), as_one_run(desk.place, dataset) as run:
        raise LeaseLost("lease 1", "taken over")
    assert run is not None
    assert desk.tracking.load_run(run).status == "RUNNING"
    with pytest.raises(TrackingError), as_one_run(desk.place, dataset) as again:
        raise TrackingError("MLflow", "away")
    assert (again, desk.tracking.load_run(run).status) == (run, "FAILED")


@pytest.mark.parametrize(
    ("end", "status", "shown"),
    [
        (None, "FINISHED", {"test/accuracy": 0.5}),
        (Terminated(), "KILLED", {}),
        (KeyboardInterrupt(), "KILLED", {}),
        (PipelineError("stage prepare", "failed", "a finished stage"), "FAILED", {}),
    ],
)
def test_a_retrain_that_is_stopped_is_killed_as_its_training_is_and_shows_no_candidate_of_before(
    desk: Desk, end: BaseException | None, status: str, shown: dict[str, float]
) -> None:
    before = desk.tracking.open_run("before", run_id=None, tags={}, params={})
    desk.tracking.log_metrics(before, {"test/accuracy": 0.5})
    write_note(desk.world.settings.runs_dir, desk.world.write_candidate(seed=1), before)
    with contextlib.suppress(KeyboardInterrupt, PipelineError), as_one_run(desk.place, desk.world.pin.to_json()) as run:
        if end:
            raise end
    assert run is not None
    found = desk.tracking.load_run(run)
    assert (found.status, found.metrics) == (status, shown)
