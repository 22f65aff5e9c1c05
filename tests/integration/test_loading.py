"""Batches in a real training: the same whoever reads them, on the device or off it; what happens when a reader dies."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from PIL import Image

from arrays import make_job, make_prepared, sort_by_row
from trainings import Ear, MemoryTracking, make_place
from visionloop.errors import DatasetError, TrackingError, TrainingError
from visionloop.training.datamodule import Batch, Loader, PreparedData, fits, make_lost_reader_error
from visionloop.training.fit import translate_error
from visionloop.training.ranks.world import World


def read_epoch(data: PreparedData, epoch: int, loader: Loader | None = None) -> list[Batch]:
    loader = loader or data.train_dataloader()
    loader.sampler.set_epoch(epoch)
    return [data.on_after_batch_transfer(batch) for batch in loader]


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_batches_are_the_same_with_any_number_of_processes(tmp_path: Path) -> None:
    prepared = make_prepared(tmp_path, train_px=40)
    epochs: dict[int, list[list[Batch]]] = {}
    for workers in (0, 1, 3):
        data = PreparedData(make_job(prepared, workers=workers, augment="strong"), 8)
        loader = data.train_dataloader()  # one for all epochs, as Lightning does
        epochs[workers] = [read_epoch(data, epoch, loader) for epoch in (0, 1)]
        data.teardown("fit")
    for workers in (1, 3):
        for ours, theirs in zip(epochs[workers], epochs[0], strict=True):
            assert len(ours) == len(theirs) == 3
            for a, b in zip(ours, theirs, strict=True):
                assert all(torch.equal(x, y) for x, y in zip(a[:3], b[:3], strict=True))
    first, second = (sort_by_row(batches)[1] for batches in epochs[3])
    assert (first != second).any(axis=(1, 2, 3)).mean() > 0.9, "the epoch reaches the processes"


@pytest.mark.parametrize("train_px", [None, 40])
@pytest.mark.parametrize("augment", ["none", "strong"])
def test_images_that_stay_on_the_device_are_the_same_as_those_sent_to_it(
    tmp_path: Path, augment: str, train_px: int | None
) -> None:
    prepared = make_prepared(tmp_path, train_px=train_px)
    job = make_job(prepared, augment=augment)
    sent, kept = (PreparedData(job, 8, on_device=True) for _ in range(2))
    kept.keep_on(torch.device("cpu"))
    for a, b in zip(read_epoch(sent, 2), read_epoch(kept, 2), strict=True):
        assert a.inputs.shape[1:] == (32, 32, 3)
        assert a.inputs.dtype == torch.uint8
        assert a.draws_nd is None
        assert all(torch.equal(x, y) for x, y in zip(a[:3], b[:3], strict=True))
    if augment == "none":
        on_cpu = PreparedData(job, 8)
        for a, b in zip(read_epoch(on_cpu, 2), read_epoch(kept, 2), strict=True):
            assert torch.equal(a.inputs, b.inputs), "without a preset the device sees the very same crops"


def test_validation_images_on_the_device_are_those_that_were_prepared(tmp_path: Path) -> None:
    prepared = make_prepared(tmp_path, train_px=40)
    kept = PreparedData(make_job(prepared, world=World(2, 3)), 8, on_device=True)
    kept.keep_on(torch.device("cpu"))
    kept.trainer = type("Trainer", (), {"training": False})()
    rows, inputs, _ = sort_by_row([kept.on_after_batch_transfer(batch) for batch in kept.val_dataloader()])
    (real,) = np.nonzero(rows >= 0)
    assert len(real) < len(rows) or len(prepared.rows("val")) % 3 == 0
    assert (inputs[real] == prepared.read(rows[real])).all()
    assert not inputs[rows < 0].any()


def test_images_fit_on_a_device_if_they_take_half_of_its_free_memory(tmp_path: Path) -> None:
    prepared = make_prepared(tmp_path, train_px=40)
    train, val = prepared.rows("train"), prepared.rows("val")
    needed = 3 * (len(train) * 40 * 40 + len(val) * 32 * 32)
    assert fits(prepared, train, val, 2 * needed)
    assert not fits(prepared, train, val, 2 * needed - 1)


def test_embeddings_are_read_by_a_thread_and_not_augmented(tmp_path: Path) -> None:
    prepared = make_prepared(tmp_path)
    embedding_nd = np.random.default_rng(0).normal(size=(30, 5)).astype(np.float32)
    data = PreparedData(make_job(prepared, workers=2, way="frozen"), 8, embedding_nd=embedding_nd)
    rows, inputs, _ = sort_by_row(read_epoch(data, 0))
    assert (rows == prepared.rows("train")).all()
    assert (inputs == embedding_nd[rows]).all()


def test_a_step_that_does_not_fit_into_memory_has_the_same_images(tmp_path: Path) -> None:
    job = make_job(make_prepared(tmp_path))
    whole, halved = PreparedData(job, 8), PreparedData(job, 4)
    assert (whole.accumulate, halved.accumulate) == (1, 2)
    parts = [batch.rows_n.tolist() for batch in read_epoch(halved, 1)]
    steps = [a + b for a, b in zip(parts[::2], parts[1::2], strict=True)]
    assert steps == [batch.rows_n.tolist() for batch in read_epoch(whole, 1)]
    with pytest.raises(DatasetError, match="32 ranks for 20 training images"):
        PreparedData(make_job(job.prepared, world=World(size=32)), 8)


def test_reading_ahead_keeps_the_threads_of_the_training_and_its_random_numbers(tmp_path: Path) -> None:
    prepared = make_prepared(tmp_path)
    before, state = torch.get_num_threads(), torch.get_rng_state()
    torch.set_num_threads(2)
    try:
        for workers in (0, 1):
            data = PreparedData(make_job(prepared, workers=workers, augment="strong"), 8)
            read_epoch(data, 0)
            data.teardown("fit")
            assert torch.get_num_threads() == 2
            assert torch.equal(torch.get_rng_state(), state), "dropout draws what it would have drawn"
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def without_signals_of_children() -> Iterator[None]:
    """Torch raises from a handler of SIGCHLD, wherever Python is by then: in a test that would be anywhere."""
    before = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGCHLD, before)


def test_a_process_that_dies_is_a_clear_error_and_leaves_none(tmp_path: Path) -> None:
    before = psutil.Process().children()
    data = PreparedData(make_job(make_prepared(tmp_path, number=900), workers=2, augment="medium"), 8)
    loader = data.train_dataloader()
    iterator = iter(loader)
    next(iterator)
    children = psutil.Process().children()
    readers = [child for child in children if child not in before and child.pid != _find_tracker()]
    assert len(readers) == 2
    with without_signals_of_children():
        with pytest.raises(TrainingError, match=r"is gone .*; expected memory .*VISIONLOOP_LOADER_WORKERS to fewer"):
            os.kill(readers[0].pid, signal.SIGKILL)
            for _ in iterator:
                pass
        data.teardown("fit")
    with pytest.raises(TrainingError, match="a process that reads them is gone"):
        raise translate_error(RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed."))
    _, alive = psutil.wait_procs(readers, timeout=60)
    assert alive == []


READ_FOREVER = """
import sys, time
from pathlib import Path
sys.path[:0] = [{tests!r}]
from arrays import make_job
from visionloop.data.shards import load_prepared
from visionloop.training.datamodule import PreparedData
if __name__ == "__main__":
    data = PreparedData(make_job(load_prepared(Path({folder!r})), workers=2), 8)
    iterator = iter(data.train_dataloader())
    next(iterator)
    import psutil
    print(*[child.pid for child in psutil.Process().children()], flush=True)
    time.sleep(60)
"""


def test_processes_that_read_end_with_a_killed_training(tmp_path: Path) -> None:
    """In a workspace with a long path, too: the folder for sockets is below it."""
    make_prepared(tmp_path)
    (long := tmp_path / ("long" * 20)).mkdir()
    code = READ_FOREVER.format(tests=str(Path(__file__).parents[1] / "support"), folder=str(tmp_path))
    env = {**os.environ, "TMPDIR": str(long)}
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=env)
    (alarm := threading.Timer(60, process.kill)).start()
    try:
        assert process.stdout is not None
        pids = [int(pid) for pid in process.stdout.readline().split()]
        assert len(pids) >= 2
    finally:
        alarm.cancel()
        process.kill()
        process.wait()
    until = time.monotonic() + 5
    while time.monotonic() < until and any(psutil.pid_exists(pid) for pid in pids):
        time.sleep(0.05)
    assert [pid for pid in pids if psutil.pid_exists(pid)] == []


def test_weights_are_the_same_bytes_with_another_number_of_processes(tmp_path: Path) -> None:
    place = make_place(tmp_path / "ws", max_epochs=2, augment="medium", mixup=0.2)
    weights, artifacts = [], []
    for workers in (0, 2):
        settings = replace(place.settings, loader_workers=workers)
        again = replace(place, settings=settings, tracking=MemoryTracking())
        weights.append(again.learn(work=tmp_path / str(workers)).classifier.state_dict())
        artifacts.append(again.tracking.only["artifacts"])
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert {"figures/batch.png", "figures/augment.png"} <= set(artifacts[0])
    assert artifacts[0].count("figures/batch.png") == 1, "once a run, not once an epoch"


def test_pictures_that_mlflow_does_not_take_do_not_end_a_training(tmp_path: Path) -> None:
    place = make_place(tmp_path / "ws", max_epochs=1)
    ear = Ear()
    ear.wants_pictures = True
    log_artifact = place.tracking.log_artifact

    def refuse(run_id: str, path: Path, folder: str | None = None) -> None:
        if path.name in {"batch.png", "augment.png"}:
            raise TrackingError("MLflow http://x", "cannot be used (down)", "a reachable MLflow")
        log_artifact(run_id, path, folder)

    place.tracking.log_artifact = refuse
    place.learn(ear, work=tmp_path / "work")
    assert ear.said("figures/batch.png is not in MLflow: MLflow http://x: cannot be used (down)")
    with Image.open(tmp_path / "work" / "figures" / "augment.png") as image:
        assert image.width > 7 * 128


def _find_tracker() -> int | None:
    """The process that Python keeps for shared memory, if there is one."""
    from multiprocessing import resource_tracker

    return getattr(resource_tracker._resource_tracker, "_pid", None)


def test_a_reader_whose_pipe_is_closed_without_a_word_is_told() -> None:
    assert "is gone (EOFError); expected memory" in str(make_lost_reader_error(EOFError()))
    assert "is gone (killed); expected memory" in str(make_lost_reader_error(RuntimeError("killed\nby a signal")))
