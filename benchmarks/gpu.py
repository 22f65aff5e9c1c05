"""Training on a GPU, in images per second: random images, resident on the device, cropped and mirrored there.

It measures only the device and the loader: no photos, no bundle. The goals are those for one H200.
"""

import json
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from row import Row
from runs import ListeningTracking
from visionloop.settings import Settings
from visionloop.store import LocalStore

GOALS = {"resnet18": 12_000.0, "mobilenet_v3_large": 9_000.0}
NUM_IMAGES = 20_480
BATCH_SIZE = 512
CHUNK = 1024


def bench_gpu(bench_dir: Path, *, epochs: int, size_px: int) -> list[Row]:
    """Train each network for some epochs. Returns no rows if torch sees no GPU."""
    import torch

    if not torch.cuda.is_available():
        return []
    folder = bench_dir / f"random-{size_px}"
    write_random_images(folder, NUM_IMAGES, size_px)
    rows = []
    for backbone, goal in GOALS.items():
        speed = time_training(folder, backbone, epochs=epochs, batch_size=BATCH_SIZE)
        name = f"{backbone} at {size_px} on {torch.cuda.get_device_name()}"
        rows.append(Row(name, speed, goal, "images/s", "the goal for one H200"))
    return rows


def write_random_images(folder: Path, number: int, size_px: int) -> None:
    """Write prepared data of random pixels and two classes, once; a sixteenth of them for validation."""
    if (folder / "index.parquet").is_file():
        return
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    shape = (number, size_px, size_px, 3)
    images = np.lib.format.open_memmap(folder / "images-00000.npy", mode="w+", dtype=np.uint8, shape=shape)
    for start in range(0, number, CHUNK):
        images[start : start + CHUNK] = rng.integers(0, 256, images[start : start + CHUNK].shape, dtype=np.uint8)
    images.flush()
    report = {
        "dataset": {"name": "random", "version": 1, "digest": "0" * 64, "num_images": number, "classes": ["a", "b"]},
        "task": "binary",
        "resize": "squash",
        "image_size": [size_px, size_px],
        "num_shards": 1,
        "rows_per_shard": number,
    }
    (folder / "report.json").write_text(json.dumps(report))
    (folder / "classes.json").write_text(json.dumps(["a", "b"]))
    index = {
        "sha256": [f"{i:064x}" for i in range(number)],
        "label": pa.array(rng.integers(0, 2, number), pa.int64()),
        "side": ["val" if i % 16 == 0 else "train" for i in range(number)],
    }
    pq.write_table(pa.table(index), folder / "index.parquet")


def time_training(folder: Path, backbone: str, *, epochs: int, batch_size: int) -> float:
    """Return the median images per second over epochs, the first left out."""
    from visionloop.data.shards import load_prepared
    from visionloop.params import make_params
    from visionloop.training.fit import learn
    from visionloop.training.job import Job
    from visionloop.training.precision import make_hardware
    from visionloop.training.watch import Watcher

    prepared = load_prepared(folder)
    section: dict[str, Any] = {"backbone": backbone, "max_epochs": 1 + epochs, "patience": 1 + epochs}
    section |= {"batch_size": batch_size, "augment": "light", "imbalance": "none"}
    params = make_params({"name": "random", "prepare": {"image_size": list(prepared.size_hw)}, "train": section})
    settings = Settings(folder, (folder / "store").as_uri(), f"sqlite:///{folder}/mlflow.db", (folder / "a").as_uri())
    tracking = ListeningTracking(settings.tracking_uri, settings.artifact_root, params.name)
    run_id = tracking.open_run(backbone, run_id=None, tags={}, params={})
    watcher = Watcher()
    watcher.wants_pictures = False
    store, hardware = LocalStore(folder / "store"), make_hardware("gpu", "bf16")
    job = Job(settings, params, store, tracking, prepared, hardware, "", watcher)
    work = folder / "work" / run_id
    work.mkdir(parents=True)
    learn(job, work, run_id)
    return statistics.median(epoch["train/images_per_s"] for epoch in tracking.epochs[1:])
