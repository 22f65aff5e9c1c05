"""Speed of a training epoch: visionloop's `train` against a plain PyTorch loop, on the same photos.

The baseline is what a tutorial teaches: ImageFolder, Pillow, a DataLoader with 4 workers, fp32, AdamW. Only the pass
over the training images counts, in images per second, because visionloop keeps some images for validation. The first
epoch of each is not counted: some kernels are built in it (bf16 on a CPU: seconds).

A second row compares the same training with a bare loop over the same batches, in fp32 or bf16, whichever is faster.
That shows what a wrong precision would cost. A third compares a whole epoch (validation, figures, checkpoint) with a
bare loop of the same step. That shows the cost of Lightning and MLflow. The parts of an epoch are printed beside the
table.
"""

import statistics
import sys
import time
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from commands import make_workspace, run_visionloop
from row import Row
from runs import BareEpochs, Epochs, make_bench_job, time_bare_epochs, train_once
from visionloop.networks.processor import has_bf16

WORKERS = 4
NUM_SYNTHETIC = 400
SYNTHETIC_PX = 300
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
BACKBONES = {"resnet18": "ResNet18", "mobilenet_v2": "MobileNetV2"}
# The goals: times the plain loop, and the share of the better bare step.
LEAST_GAIN, LEAST_SHARE = {"resnet18": 1.4, "mobilenet_v2": 1.7}, 0.95


def bench_epoch(bench_dir: Path, photos: Path | None, *, epochs: int, size_px: int) -> list[Row]:
    """Train some epochs both ways, with each network; `photos` holds train/CLASS/*, else synthetic JPEGs are made."""
    photos = photos or make_photos(bench_dir / "photos")
    rows = []
    for backbone, name in BACKBONES.items():
        plain = time_plain_epoch(photos / "train", backbone, epochs=epochs, size_px=size_px)
        workspace = prepare_workspace(bench_dir / "epoch", photos, backbone, epochs=epochs, size_px=size_px)
        ours = train_once(workspace)
        job = make_bench_job(workspace)
        precisions = ["fp32", *["bf16"][: has_bf16() or job.hardware.accelerator == "gpu"]]
        jobs = [replace(job, hardware=replace(job.hardware, precision=precision)) for precision in precisions]
        bare = {one.hardware.precision: time_bare_epochs(one, epochs=epochs) for one in jobs}
        best, same = max(bare.values(), key=lambda one: one.images_per_s), bare[job.hardware.precision]
        print(describe_epochs(name, ours, same.epoch_s), file=sys.stderr)
        print(describe_goals(backbone, ours, plain, bare), file=sys.stderr)
        what = f"{name} at {size_px}, training"
        rows += [
            Row(what, ours.images_per_s, plain, "images/s", "ImageFolder, fp32, 4 workers"),
            Row(what, ours.images_per_s, best.images_per_s, "images/s", f"the better bare step: {best.precision}"),
            Row(f"{name}, a whole epoch", ours.epoch_s, same.epoch_s, "s", "a bare loop of the same step"),
        ]
    return rows


def describe_goals(backbone: str, ours: Epochs, plain: float, bare: Mapping[str, BareEpochs]) -> str:
    """Return the speed of training beside the plain loop and beside the better bare step, with the goals."""
    speeds = {precision: one.images_per_s for precision, one in bare.items()}
    figures = ", ".join(f"{speed:.1f} in {precision}" for precision, speed in speeds.items())
    return (
        f"  training {ours.images_per_s:.1f} images/s: {ours.images_per_s / plain:.2f} x the plain loop (goal: "
        f"{LEAST_GAIN[backbone]}), {ours.images_per_s / max(speeds.values()):.2f} x the better bare step (goal: "
        f"{LEAST_SHARE}; bare: {figures})"
    )


def describe_epochs(name: str, ours: Epochs, bare_s: float) -> str:
    """Return the parts of an epoch and the goals, in words."""
    parts = {
        "wait for data": ours.wait_s,
        "steps": ours.train_s - ours.wait_s,
        "validation": ours.val_s,
        "figures, checkpoint": ours.epoch_s - ours.train_s - ours.val_s,
    }
    lines = [f"{name}: where an epoch of {ours.epoch_s:.2f} s goes"]
    lines += [f"  {what:<20} {s:8.2f} s {100 * s / ours.epoch_s:6.1f} %" for what, s in parts.items()]
    over_s = ours.epoch_s - bare_s
    wait = 100 * ours.wait_s / max(ours.train_s - ours.wait_s, 1e-9)
    lines += [
        f"  Lightning and MLflow {over_s:8.2f} s {100 * over_s / bare_s:6.1f} % over a bare loop (goal: 5 % or 3 s)",
        f"  wait for data        {wait:6.1f} % of the steps (goal: 3 %)",
    ]
    return "\n".join(lines)


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


def time_plain_epoch(train_dir: Path, backbone: str, *, epochs: int, size_px: int) -> float:
    """Return the median images per second of the plain loop."""
    import torch
    from torch.nn import functional

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    loader = make_plain_loader(train_dir, size_px, workers=WORKERS)
    model, optimizer = make_plain_network(backbone, len(loader.dataset.classes), device)
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


def make_plain_loader(
    train_dir: Path, size_px: int, *, workers: int, augment: Iterable[Any] = (), normalised: bool = True
) -> Any:
    """Return a tutorial's DataLoader: ImageFolder, Pillow, float tensors. `augment` replaces the resize."""
    import torch
    from torchvision import datasets, transforms

    first = list(augment) or [transforms.Resize((size_px, size_px))]
    steps = [*first, transforms.ToTensor()]
    if normalised:
        steps.append(transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD))
    data = datasets.ImageFolder(str(train_dir), transforms.Compose(steps))
    warnings.filterwarnings("ignore", message="This DataLoader will create")  # 4 workers are the baseline's rule
    return torch.utils.data.DataLoader(data, batch_size=32, shuffle=True, num_workers=workers)


def make_plain_network(backbone: str, num_classes: int, device: Any) -> tuple[Any, Any]:
    """Return network and optimizer, with the learning figures of the example's params.yaml."""
    import torch
    from torchvision import models

    model = models.get_model(backbone, weights=None, num_classes=1 if num_classes == 2 else num_classes)
    optimizer = torch.optim.AdamW(model.to(device).parameters(), lr=1e-3, weight_decay=1e-4)
    return model.train(), optimizer


def prepare_workspace(workspace: Path, photos: Path, backbone: str, *, epochs: int, size_px: int) -> Path:
    """Make a workspace whose stage `train` trains this network, and prepare its images.

    Ingest and prepare are not counted: they run once for a dataset, not once for an epoch.
    """
    learning: dict[str, object] = {"backbone": backbone, "max_epochs": 1 + epochs, "patience": 1 + epochs}
    learning |= {"way": "scratch", "frozen_epochs": 0, "weights": "none", "augment": "none", "batch_size": 32}
    make_workspace(workspace, "horses-or-humans", prepare={"image_size": size_px}, train=learning)
    if not (workspace / "data" / "dataset.json").is_file():
        run_visionloop(workspace, "ingest", str(photos.resolve()))
    run_visionloop(workspace, "prepare")
    return workspace
