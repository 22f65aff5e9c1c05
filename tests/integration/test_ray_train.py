"""Training in workers of a Ray cluster of two nodes on this machine: the figures of DDP, also after a kill."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from shapes import make_prepared_workspace, open_home, read_runs, set_compute, set_train
from visionloop.bundle import load_bundle
from visionloop.errors import ParamsError, TrainingError
from visionloop.records import RunNote
from visionloop.training.checks import check_training
from visionloop.training.job import Call
from visionloop.training.ranks.launch import launch_train
from visionloop.training.watch import EpochReport, Watcher
from visionloop.workspace import Workspace

ray = pytest.importorskip("ray", reason="the extra `ray` is not installed")

EPOCHS = 12
NOW = "2026-01-01T00:00:00+00:00"
NUM_NODES = 2


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


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace with prepared shapes; tests work on copies."""
    return make_prepared_workspace(tmp_path_factory.mktemp("prepared") / "ws", epochs=EPOCHS)


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


def test_two_nodes_give_the_figures_of_two_ranks_also_after_a_worker_was_killed(
    prepared: Path, tmp_path: Path, cluster_address: str
) -> None:
    here, there = tmp_path / "ddp", tmp_path / "ray"
    shutil.copytree(prepared, here)
    shutil.copytree(prepared, there)
    set_compute(here, devices=NUM_NODES)
    launch(open_home(here))
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
    (ddp,) = read_runs(here).values()
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
    assert not ray.is_initialized()
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
