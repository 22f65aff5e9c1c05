"""Speed and memory of embeddings: from prepared shards through the chosen runtime, against what a tutorial teaches.

The baseline opens the files with Pillow, resizes and normalises them, and runs an eager fp32 network, 32 at a time.
Ours starts from the shards, because images are prepared once for a dataset, not once for each encoder. The time to load
the network is not counted, for either.
"""

import os
import shutil
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from commands import make_workspace, run_visionloop
from epoch import IMAGENET_MEAN, IMAGENET_STD, make_photos
from row import Row
from visionloop.data.shards import Prepared, Shards, load_prepared
from visionloop.features.embed import embed_prepared
from visionloop.features.encoder import Encoder, make_encoder
from visionloop.features.table import EmbeddingTable
from visionloop.params import Params, load_params
from visionloop.records import Pin
from visionloop.settings import Settings, load_settings
from visionloop.store import LocalStore
from visionloop.workspace import connect

LITE0 = "efficientnet_lite0"
NAMES = {"resnet18": "ResNet18", "mobilenet_v2": "MobileNetV2", LITE0: "EfficientNet-Lite0"}
LEAST_GAIN = {"resnet18": 1.9, "mobilenet_v2": 3.0, LITE0: 3.0}  # the goals
NUM_MANY, MANY_PX = 25_000, 64
GPU_PX = 224
BATCH = 500
REPEATS = 3
MIN_COSINE = 0.999


def bench_embed(bench_dir: Path, photos: Path | None, *, size_px: int, num_many: int = NUM_MANY) -> list[Row]:
    """Embed photos both ways with three backbones, then many small images for the memory."""
    photos = photos or make_photos(bench_dir / "photos")
    workspace = make_workspace(bench_dir / "embed", "horses-or-humans", prepare={"image_size": size_px})
    if not (workspace / "data" / "dataset.json").is_file():
        run_visionloop(workspace, "ingest", str(photos.resolve()))
    run_visionloop(workspace, "prepare")
    settings = load_settings({**os.environ, "VISIONLOOP_HOME": str(workspace)}, workspace)
    prepared = load_prepared(settings.prepared_dir)
    rows = [bench_backbone(name, settings, prepared, photos, size_px) for name in NAMES]
    rows.append(bench_memory(bench_dir / "many", settings, num_many))
    rows += bench_embed_gpu(bench_dir / "many", settings, num_many)
    shutil.rmtree(bench_dir / "many")
    return rows


def bench_backbone(name: str, settings: Settings, prepared: Prepared, photos: Path, size_px: int) -> Row:
    """Return images per second of one backbone. Raises RuntimeError if the vectors differ from those of fp32."""
    network = make_plain(name)
    encoder = make_encoder(connect(settings, make_params(settings, name)), prepared)
    ours = statistics.median(time_ours(encoder, prepared, settings) for _ in range(REPEATS))
    files = sorted(path for path in photos.rglob("*") if path.suffix.lower() in {".jpg", ".jpeg", ".png"})
    plain = time_plain(network, files[: len(prepared.sha256_n)], size_px)
    cosine = compute_cosine(encoder, settings, prepared, name)
    if cosine < MIN_COSINE:
        raise RuntimeError(f"{name}: cosine {cosine:.5f} to fp32")
    facts = encoder.facts
    print(f"{NAMES[name]}: embedding {ours / plain:.2f} x eager fp32 (goal: {LEAST_GAIN[name]})", file=sys.stderr)
    what = f"{NAMES[name]} at {size_px}, embedding ({facts.runtime} {facts.precision}, cosine {cosine:.4f})"
    return Row(what, ours, plain, "images/s", "Pillow, eager fp32")


def make_params(settings: Settings, name: str) -> Params:
    """Return the parameters of the workspace with another backbone, with random weights where none are installed."""
    params = load_params(settings.params_path)
    train = {
        "backbone": name,
        "weights": "default" if name == LITE0 else "none",
        "weights_sha256": None,
        "way": "scratch",
    }
    return params.model_copy(update={"train": params.train.model_copy(update=train)})


def time_ours(encoder: Encoder, prepared: Prepared, settings: Settings) -> float:
    """Return images per second into an empty table."""
    encoder.embed(prepared.read(np.arange(2)))
    folder = settings.hidden_dir / "tmp" / "table"
    shutil.rmtree(folder, ignore_errors=True)
    started = time.perf_counter()
    embed_prepared(
        EmbeddingTable(LocalStore(folder), encoder.facts.digest), encoder, prepared, prepared.read, batch_size=BATCH
    )
    return len(prepared.sha256_n) / (time.perf_counter() - started)


def make_plain(name: str) -> Any:
    """Return the library's network without its head, eager, on the GPU if there is one."""
    import timm
    import torch
    from torchvision import models

    if name == LITE0:
        network: Any = timm.create_model("tf_efficientnet_lite0", num_classes=0)
    else:
        network = models.get_model(name, weights=None)
        setattr(network, "fc" if hasattr(network, "fc") else "classifier", torch.nn.Identity())
    return network.eval().to("cuda" if torch.cuda.is_available() else "cpu")


def time_plain(network: Any, files: list[Path], size_px: int) -> float:
    """Return images per second of the plain way."""
    import torch

    device = next(network.parameters()).device
    started = time.perf_counter()
    with torch.no_grad():
        for batch in load_plainly(files, size_px):
            network(torch.from_numpy(batch).to(device)).cpu().numpy()
    return len(files) / (time.perf_counter() - started)


def load_plainly(files: list[Path], size_px: int, batch_size: int = 32) -> Iterator[Any]:
    """Yield normalised batches (n, 3, h, w) of files opened with Pillow."""
    mean, std = (np.asarray(values, np.float32) for values in (IMAGENET_MEAN, IMAGENET_STD))
    for start in range(0, len(files), batch_size):
        images = [Image.open(f).convert("RGB").resize((size_px, size_px)) for f in files[start : start + batch_size]]
        batch = (np.stack([np.asarray(image, np.float32) for image in images]) / 255 - mean) / std
        yield np.ascontiguousarray(batch.transpose(0, 3, 1, 2))


def compute_cosine(encoder: Encoder, settings: Settings, prepared: Prepared, name: str) -> float:
    """Return the smallest cosine between our vectors and those of eager fp32, for the same weights and images."""
    import torch

    from visionloop.networks.export import EmbeddingNetwork
    from visionloop.networks.weights import load_backbone

    images = prepared.read(np.arange(min(32, len(prepared.sha256_n))))
    section = make_params(settings, name).train
    network = EmbeddingNetwork(*load_backbone(section, prepared.size_hw, settings.home), prepared.size_hw).eval()
    with torch.no_grad():
        plain = network(torch.from_numpy(images)).numpy()
    ours = encoder.embed(images)
    return float(((ours * plain).sum(1) / np.linalg.norm(ours, axis=1) / np.linalg.norm(plain, axis=1)).min())


def bench_memory(folder: Path, settings: Settings, number: int) -> Row:
    """Return the growth of memory after the first 1,000 of many images, and the size of all of them in memory."""
    prepared = make_many(folder, number, MANY_PX)
    encoder = make_encoder(connect(settings, make_params(settings, "resnet18")), prepared)
    table = EmbeddingTable(LocalStore(folder / "store"), encoder.facts.digest)
    seen: list[int] = []
    started = time.perf_counter()
    embed_prepared(
        table,
        encoder,
        prepared,
        prepared.read,
        batch_size=BATCH,
        on_progress=lambda done, total: seen.append(read_memory()),
    )
    seconds = time.perf_counter() - started
    peak_mb = max(seen) / 1e6
    what = f"{number:,} images of {MANY_PX} px embedded in {seconds:.0f} s, peak {peak_mb:,.0f} MB, growth after 1,000"
    in_memory = number * MANY_PX * MANY_PX * 3 / 1e6
    growth = max(0.1, (max(seen) - seen[min(2, len(seen) - 1)]) / 1e6)
    return Row(what, growth, in_memory, "MB", "the images as an array")


def bench_embed_gpu(folder: Path, settings: Settings, number: int) -> list[Row]:
    """Time many images at full size from shards on a GPU. Returns no rows without a GPU."""
    import torch

    if not torch.cuda.is_available():
        return []
    rows = []
    prepared = make_many(folder, number, GPU_PX)
    for name, shown in NAMES.items():
        encoder = make_encoder(connect(settings, make_params(settings, name)), prepared)
        ours = number / statistics.median(time_ours(encoder, prepared, settings) for _ in range(REPEATS))
        network, batch = make_plain(name), torch.zeros(32, 3, GPU_PX, GPU_PX).cuda()
        with torch.no_grad():
            network(batch)
            torch.cuda.synchronize()
            started = time.perf_counter()
            for _ in range(-(-number // 32)):
                network(batch).cpu()
        plain = time.perf_counter() - started
        what = f"{shown} at {GPU_PX}, {number:,} embeddings from shards on a GPU"
        rows.append(Row(what, ours, plain, "s", "eager fp32, its images on the GPU already"))
    return rows


def make_many(folder: Path, number: int, size_px: int) -> Prepared:
    """Return prepared data of made-up images in one memory-mapped shard, and no embedding of them."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    path = folder / "images-00000.npy"
    shard = np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=(number, size_px, size_px, 3))
    rng = np.random.default_rng(0)
    for start in range(0, number, BATCH):
        shard[start : start + BATCH] = rng.integers(0, 255, shard[start : start + BATCH].shape, dtype=np.uint8)
    del shard
    shards = Shards((size_px, size_px), number, (np.load(path, mmap_mode="r"),))
    return Prepared(
        folder=folder,
        pin=Pin("many", 1, "0" * 64, number, ("a", "b")),
        task="binary",
        classes=("a", "b"),
        size_hw=(size_px, size_px),
        resize="squash",
        sha256_n=tuple(f"{i:064x}" for i in range(number)),
        label_n=np.zeros(number, np.int64),
        targets_nk=None,
        side_n=np.full(number, "train"),
        place_n=np.arange(number),
        shards=shards,
        train_shards=None,
    )


def read_memory() -> int:
    """Return the anonymous memory of this process in bytes. The system can drop pages of mapped files at any time."""
    status = Path("/proc/self/status").read_text()
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith("RssAnon"))) * 1024
