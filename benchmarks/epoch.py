"""Speed of a training epoch: visionloop's `train` against a plain PyTorch loop, on the same photos.

The baseline is what a tutorial teaches: ImageFolder, Pillow, a DataLoader with 4 workers, fp32, AdamW. Only the pass
over the training images counts, in images per second, since visionloop keeps some of them for validation. The first
epoch of each is left out: it pays for kernels that are built once (bf16 on a CPU: seconds).
"""

import os
import statistics
import time
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from commands import make_workspace, run_visionloop
from row import Row

WORKERS = 4
NUM_SYNTHETIC = 400
SYNTHETIC_PX = 300
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def bench_epoch(bench_dir: Path, photos: Path | None, *, epochs: int, size_px: int) -> Row:
    """Train ResNet18 for some epochs both ways; `photos` holds train/CLASS/*, else synthetic JPEGs are made."""
    photos = photos or make_photos(bench_dir / "photos")
    plain = time_plain_epoch(photos / "train", epochs=epochs, size_px=size_px)
    ours = time_visionloop_epoch(bench_dir / "epoch", photos, epochs=epochs, size_px=size_px)
    return Row(f"ResNet18 at {size_px}, training", ours, plain, "images/s", "ImageFolder, fp32, 4 workers")


def make_photos(folder: Path) -> Path:
    """Write two classes of smooth random JPEGs (they compress and decode like photos), once."""
    rng = np.random.default_rng(0)
    for i in range(NUM_SYNTHETIC):
        path = folder / "train" / ("dark", "light")[i % 2] / f"{i:04d}.jpg"
        if path.is_file():
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        coarse = rng.integers(0, 160, (38, 38, 3), dtype=np.uint8) + np.uint8(80 * (i % 2))
        image = Image.fromarray(coarse).resize((SYNTHETIC_PX, SYNTHETIC_PX), Image.Resampling.BICUBIC)
        image.save(path, quality=90)
    return folder


def time_plain_epoch(train_dir: Path, *, epochs: int, size_px: int) -> float:
    """Return the median images per second of the plain loop."""
    import torch
    from torch.nn import functional

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    loader, model, optimizer = make_plain_parts(train_dir, size_px, device)
    speeds = []
    for _ in range(1 + epochs):
        started, seen = time.perf_counter(), 0
        for images_nchw, labels_n in loader:
            units_nu = model(images_nchw.to(device))
            labels = labels_n.to(device)
            if units_nu.shape[1] == 1:
                loss = functional.binary_cross_entropy_with_logits(units_nu.squeeze(1), labels.float())
            else:
                loss = functional.cross_entropy(units_nu, labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            seen += len(labels)
            loss.item()  # a GPU is waited for
        speeds.append(seen / (time.perf_counter() - started))
    return statistics.median(speeds[1:])


def make_plain_parts(train_dir: Path, size_px: int, device: Any) -> tuple[Iterable[Any], Any, Any]:
    """Return loader, network and optimizer, with the learning figures of the example's params.yaml."""
    import torch
    from torchvision import datasets, models, transforms

    steps = [
        transforms.Resize((size_px, size_px)),
        transforms.ToTensor(),
        transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD),
    ]
    data = datasets.ImageFolder(str(train_dir), transforms.Compose(steps))
    num_units = 1 if len(data.classes) == 2 else len(data.classes)
    warnings.filterwarnings("ignore", message="This DataLoader will create")  # 4 workers are the baseline's rule
    loader = torch.utils.data.DataLoader(data, batch_size=32, shuffle=True, num_workers=WORKERS)
    model = models.resnet18(weights=None, num_classes=num_units).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=1e-4)
    return loader, model, optimizer


def time_visionloop_epoch(workspace: Path, photos: Path, *, epochs: int, size_px: int) -> float:
    """Return the median images per second of the stage `train`, in a workspace made for it.

    Ingest and prepare go before, uncounted: they run once for a dataset, not once for an epoch.
    """
    learning: dict[str, object] = {"max_epochs": 1 + epochs, "patience": 1 + epochs}
    make_workspace(workspace, "horses-or-humans", prepare={"image_size": size_px}, train=learning)
    if not (workspace / "data" / "dataset.json").is_file():
        run_visionloop(workspace, "ingest", str(photos.resolve()))
    run_visionloop(workspace, "prepare")
    return statistics.median(train_once(workspace)[1:])


def train_once(workspace: Path) -> list[float]:
    """Run the stage `train` in this process; return the images per second of each epoch."""
    from visionloop.params import load_params
    from visionloop.settings import apply_tool_environment, load_settings
    from visionloop.store import open_store
    from visionloop.tracking import Tracking
    from visionloop.training.fit import train
    from visionloop.training.watch import EpochReport, Watcher

    settings = load_settings({**os.environ, "VISIONLOOP_HOME": str(workspace)}, workspace)
    apply_tool_environment(settings.home)
    params = load_params(settings.params_path)
    tracking = Tracking(settings.tracking_uri, settings.artifact_root, params.name)
    speeds: list[float] = []

    class Keeper(Watcher):
        def on_epoch(self, report: EpochReport) -> None:
            speeds.append(report.images_per_s)

    train(settings, params, open_store(settings.store_url), tracking, now="bench", watcher=Keeper())
    return speeds
