"""Two ranks on this machine: near to one process; whatever is killed, nothing stays, and the same command goes on.

Then two ranks in workers of a Ray cluster of two nodes on this machine: the figures of DDP, also after a kill.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from shapes import (
    find_run,
    make_prepared_workspace,
    open_home,
    read_runs,
    run,
    set_compute,
    set_train,
    start_training,
)
from visionloop.bundle import load_bundle
from visionloop.errors import ParamsError, TrainingError
from visionloop.records import RunNote
from visionloop.training.checks import check_training
from visionloop.training.fit import train
from visionloop.training.job import Call
from visionloop.training.ranks.launch import launch_train
from visionloop.training.watch import EpochReport, Watcher
from visionloop.workspace import Workspace

EPOCHS = 12
NOW = "2026-01-01T00:00:00+00:00"
NUM_NODES = 2


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace with prepared shapes; tests work on copies."""
    return make_prepared_workspace(tmp_path_factory.mktemp("prepared") / "ws", epochs=EPOCHS)


@pytest.fixture(scope="module")
def trained(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace that two ranks trained without interruption."""
    home = tmp_path_factory.mktemp("trained") / "ws"
    shutil.copytree(prepared, home)
    set_compute(home, devices=2)
    before = dict(os.environ)
    workspace = open_home(home)
    note = launch_train(workspace, check_training(workspace), Call(now=NOW), env={})
    assert note is not None
    assert note.bundle == load_bundle(home / "models" / "candidate").digest
    assert list(read_runs(home)) == [note.run_id]
    assert dict(os.environ) == before
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    return home


def wait_for_epoch(process: "subprocess.Popen[str]") -> list[psutil.Process]:
    """Read until an epoch is told; return the ranks, in their order."""
    assert process.stdout is not None
    told = []
    for line in process.stdout:
        told.append(line)
        if line.startswith("epoch "):
            ranks = {}
            for child in psutil.Process(process.pid).children():
                with contextlib.suppress(psutil.Error):
                    ranks[child.environ().get("RANK")] = child
            return [ranks["0"], ranks["1"]]
    raise AssertionError("".join(told) + (process.stderr.read() if process.stderr else ""))


def find_processes(home: Path) -> list[str]:
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get("VISIONLOOP_HOME") == str(home) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(" ".join(process.cmdline()))
    return found


def wait_until_none_is_left(home: Path, *, within_s: float) -> None:
    deadline = time.monotonic() + within_s
    while found := find_processes(home):
        assert time.monotonic() < deadline, found
        time.sleep(0.1)


def test_two_ranks_are_near_to_one_process(trained: Path, prepared: Path, tmp_path: Path) -> None:
    home = tmp_path / "ws"
    shutil.copytree(prepared, home)
    workspace = open_home(home)
    note = train(workspace, check_training(workspace), Call(now=NOW))
    assert note is not None
    alone = read_runs(home)[note.run_id].data
    (together,) = (one.data for one in read_runs(trained).values())
    assert together.tags["visionloop.world_size"] == "2"
    assert alone.tags["visionloop.world_size"] == "1"
    for name, most in (("train/loss", 0.05), ("val/loss", 0.15), ("val/accuracy", 0.1)):
        assert abs(together.metrics[name] - alone.metrics[name]) < most, name


@pytest.mark.long
def test_after_a_killed_rank_the_same_command_goes_on(trained: Path, prepared: Path, tmp_path: Path) -> None:
    check_ends(trained, prepared, tmp_path / "ws", kill_a_rank)


@pytest.mark.long
def test_after_other_ends_the_same_command_goes_on(trained: Path, prepared: Path, tmp_path: Path) -> None:
    check_ends(trained, prepared, tmp_path / "ws", press_ctrl_c, kill_the_parent)


def check_ends(trained: Path, prepared: Path, home: Path, *ends: Callable[[Path], str]) -> None:
    """End a training in each of the ways, then let torchrun finish it: the same run and bundle."""
    shutil.copytree(prepared, home)
    set_compute(home, devices=2)
    run_ids = [end(home) for end in ends]
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    done = run(home, *torchrun, "-m", "visionloop", "train", timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("going on from epoch") == 1
    assert "epoch   1/" not in done.stdout
    assert {*run_ids, find_run(done.stdout)} == {run_ids[0]}
    assert [one.info.status for one in read_runs(home).values()] == ["FINISHED"]
    theirs, ours = (load_bundle(each / "models" / "candidate") for each in (trained, home))
    assert ours.files == theirs.files


def kill_a_rank(home: Path) -> str:
    process = start_training(home, stderr=subprocess.PIPE)
    _, second = wait_for_epoch(process)
    second.kill()
    stopped = time.monotonic()
    _, stderr = process.communicate(timeout=300)
    assert time.monotonic() - stopped < 120
    assert process.returncode == 2
    assert stderr.startswith(
        f"error: rank 1 of 2: was killed by SIGKILL (process {second.pid}); expected all to go on."
    )
    assert stderr.rstrip().endswith("The same command goes on from the last finished epoch.")
    assert stderr.count("\n") == 1
    assert find_processes(home) == []
    ((run_id, one),) = read_runs(home).items()
    assert one.info.status == "FAILED"
    return run_id


def press_ctrl_c(home: Path) -> str:
    process = start_training(home, stderr=subprocess.PIPE)
    wait_for_epoch(process)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=300)
    assert process.returncode == 130
    assert "Traceback" not in stdout + stderr
    assert "; the same command goes on from epoch " in stdout
    assert find_processes(home) == []
    ((run_id, one),) = read_runs(home).items()
    assert one.info.status == "KILLED"
    return run_id


def kill_the_parent(home: Path) -> str:
    process = start_training(home, stderr=subprocess.PIPE)
    ranks = wait_for_epoch(process)
    process.kill()
    process.wait(timeout=60)
    psutil.wait_procs(ranks, timeout=60)
    wait_until_none_is_left(home, within_s=60)
    assert not (home / "models" / "candidate").exists()
    (run_id,) = read_runs(home)
    return run_id


class Listener(Watcher):
    """Keeps what was told; `then` is called at each epoch."""

    def __init__(self, then: Any = None) -> None:
        self.lines: list[str] = []
        self.reports: list[EpochReport] = []
        self.then = then

    def tell(self, line: str) -> None:
        self.lines.append(line)

    def on_epoch(self, report: EpochReport) -> None:
        self.reports.append(report)
        if self.then:
            self.then(report)


def open_with_ray(home: Path, address: str) -> Workspace:
    set_compute(home, address=address, strategy="ray", num_nodes=NUM_NODES)
    return open_home(home)


def launch(workspace: Workspace, watcher: Watcher | None = None) -> RunNote | None:
    return launch_train(workspace, check_training(workspace), Call(NOW, watcher=watcher or Watcher()), env={})


def is_worker(process: psutil.Process) -> bool:
    try:
        return "RayTrainWorker" in " ".join(process.cmdline())
    except psutil.Error:
        return False


@pytest.mark.long
def test_two_nodes_give_the_figures_of_two_ranks_also_after_a_worker_was_killed(
    trained: Path, prepared: Path, tmp_path: Path, cluster_address: str
) -> None:
    there = tmp_path / "ray"
    shutil.copytree(prepared, there)
    workspace = open_with_ray(there, cluster_address)

    def kill(report: EpochReport) -> None:
        if report.epoch == 1:
            workers = [p for p in psutil.process_iter() if is_worker(p)]
            assert len(workers) == NUM_NODES
            workers[1].kill()

    with pytest.raises(
        TrainingError, match=r"^rank [01] of 2 on Ray: is gone: its process was killed.*The same command goes on"
    ) as caught:
        launch(workspace, Listener(kill))
    assert "\n" not in str(caught.value)
    assert not [p for p in psutil.process_iter() if is_worker(p)]

    listener = Listener()
    note = launch(workspace, listener)
    assert note is not None
    assert note.bundle == load_bundle(there / "models" / "candidate").digest
    (ddp,) = read_runs(trained).values()
    (on_ray,) = read_runs(there).values()
    assert on_ray.info.run_id == note.run_id
    assert on_ray.info.status == "FINISHED"
    assert on_ray.data.tags["visionloop.world_size"] == "2"
    for name in ("train/loss", "train/accuracy", "val/loss", "val/accuracy", "val/f1"):
        assert on_ray.data.metrics[name] == pytest.approx(ddp.data.metrics[name], abs=1e-4), name
    epochs = [report.epoch for report in listener.reports]
    assert epochs[0] > 1
    assert epochs == list(range(epochs[0], EPOCHS + 1))
    assert any(line.startswith("going on from epoch") for line in listener.lines)
    assert not sys.modules["ray"].is_initialized()
    assert not (there / ".visionloop" / "ray").exists()


@pytest.mark.long
def test_an_error_of_the_workers_comes_back_as_it_was(prepared: Path, tmp_path: Path, cluster_address: str) -> None:
    home = tmp_path / "ws"
    shutil.copytree(prepared, home)
    workspace = open_with_ray(home, cluster_address)
    set_train(home, weights="params.yaml")
    with pytest.raises(TrainingError, match=r"train\.weights: params\.yaml cannot be read as weights") as caught:
        launch(open_home(home))
    assert "\n" not in str(caught.value)
    with pytest.raises(ParamsError, match=r"got 1 on 9 nodes, and the Ray cluster has 2 nodes with 2 cores and 0 GPUs"):
        section = workspace.params.compute.model_copy(update={"num_nodes": 9})
        launch(replace(workspace, params=workspace.params.model_copy(update={"compute": section})))
