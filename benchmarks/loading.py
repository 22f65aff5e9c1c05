"""Speed of loading: prepared shards against ImageFolder and Pillow with two workers, to batches of tensors.

Both leave the normalisation to the network. Without augmentation visionloop reads in a thread, as `train` does on a
CPU; with the preset `light`, against RandomResizedCrop and a flip of Pillow images, in two processes
(VISIONLOOP_LOADER_WORKERS=2).
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from epoch import make_photos, make_plain_loader, prepare_workspace
from row import Row
from runs import make_bench_job

WORKERS = 2
PASSES = 5


def bench_loading(bench_dir: Path, photos: Path | None, *, size_px: int) -> list[Row]:
    """Load all training images some times both ways, in turn, without and with augmentation."""
    from torchvision import transforms

    photos = photos or make_photos(bench_dir / "photos")
    workspace = prepare_workspace(bench_dir / "epoch", photos, "resnet18", epochs=1, size_px=size_px)
    light = [transforms.RandomResizedCrop(size_px, (0.8, 1.0), (1 / 1.1, 1.1)), transforms.RandomHorizontalFlip()]
    rows = []
    for preset, steps in (("none", []), ("light", light)):
        plain = make_plain_loader(photos / "train", size_px, workers=WORKERS, augment=steps, normalised=False)
        workers = 0 if preset == "none" else WORKERS
        data = make_data(workspace, preset, workers)
        ours, baseline = time_in_turn(make_pass(data.train_dataloader()), make_pass(plain))
        data.teardown("fit")
        name = f"loading at {size_px}, augment: {preset}"
        rows.append(Row(name, ours, baseline, "images/s", f"ImageFolder, Pillow, {WORKERS} workers"))
    return rows


def make_data(workspace: Path, preset: str, workers: int) -> Any:
    """Return the batches that `train` would take in this workspace on a CPU."""
    from visionloop.training.datamodule import PreparedData

    job = make_bench_job(workspace)
    section = job.params.train.model_copy(update={"augment": preset})
    params = job.params.model_copy(update={"train": section})
    job = replace(job, params=params, settings=replace(job.settings, loader_workers=workers))
    return PreparedData(job, section.batch_size, on_device=False)


def make_pass(loader: Any) -> Callable[[], float]:
    """Return a function that iterates over a loader once and returns the images per second."""

    def run() -> float:
        started, seen = time.perf_counter(), 0
        for batch in loader:
            seen += len(batch[0])
        return seen / (time.perf_counter() - started)

    return run


def time_in_turn(first: Callable[[], float], second: Callable[[], float]) -> tuple[float, float]:
    """Return the medians of both over some passes, taken in turn, after a first pass of each that is not counted."""
    speeds = [(first(), second()) for _ in range(1 + PASSES)][1:]
    return statistics.median(a for a, _ in speeds), statistics.median(b for _, b in speeds)
