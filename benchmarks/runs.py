"""The stage `train` in this process, with the times of its epochs; and the same steps in a bare loop."""

import os
import statistics
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from visionloop.params import Params, load_params
from visionloop.settings import Settings, apply_tool_environment, load_settings
from visionloop.store import open_store
from visionloop.tracking import MlflowTracking
from visionloop.workspace import connect


@dataclass(frozen=True)
class Epochs:
    """Medians over epochs: images per second of training, and the seconds of an epoch and of its parts."""

    images_per_s: float
    epoch_s: float
    train_s: float
    wait_s: float
    val_s: float


class ListeningTracking(MlflowTracking):
    """The real tracking, which also keeps the figures and the time of each epoch."""

    def __init__(self, uri: str, artifact_root: str, name: str) -> None:
        super().__init__(uri, artifact_root, name)
        self.epochs: list[dict[str, float]] = []

    def log_metrics(self, run_id: str, metrics: Mapping[str, float], *, step: int = 0) -> None:
        super().log_metrics(run_id, metrics, step=step)
        if "train/epoch_s" in metrics:
            self.epochs.append({**metrics, "at_s": time.perf_counter()})

    def summarize(self) -> Epochs:
        """Return the medians of all epochs but the first."""
        later = self.epochs[1:]

        def median(name: str) -> float:
            return statistics.median(epoch.get(name, 0.0) for epoch in later)

        between = [b["at_s"] - a["at_s"] for a, b in zip(self.epochs, later, strict=False)]
        waits = [epoch["train/data_wait_ratio"] * epoch["train/epoch_s"] for epoch in later]
        return Epochs(
            images_per_s=median("train/images_per_s"),
            epoch_s=statistics.median(between),
            train_s=median("train/epoch_s"),
            wait_s=statistics.median(waits),
            val_s=median("val/epoch_s"),
        )


def load_workspace(workspace: Path) -> tuple[Settings, Params, ListeningTracking]:
    """Return what a stage needs in this workspace."""
    settings = load_settings({**os.environ, "VISIONLOOP_HOME": str(workspace)}, workspace)
    apply_tool_environment(settings.home)
    params = load_params(settings.params_path)
    return settings, params, ListeningTracking(settings.tracking_uri, settings.artifact_root, params.name)


def train_once(workspace: Path) -> Epochs:
    """Run the stage `train` in this process; return the times of its epochs."""
    from visionloop.training.checks import check_training
    from visionloop.training.fit import train
    from visionloop.training.job import Call

    settings, params, tracking = load_workspace(workspace)
    opened = connect(settings, params, store=open_store(settings.store_url), tracking=tracking)
    train(opened, check_training(opened), Call(now="bench"))
    return tracking.summarize()


def make_bench_job(workspace: Path) -> Any:
    """Return the job that the stage `train` would run."""
    from visionloop.training.checks import check_training
    from visionloop.training.fit import make_job
    from visionloop.training.job import Call

    settings, params, tracking = load_workspace(workspace)
    opened = connect(settings, params, store=open_store(settings.store_url), tracking=tracking)
    return make_job(opened, check_training(opened), Call())


@dataclass(frozen=True)
class BareEpochs:
    """Of a bare loop: its precision, images per second of training, and the seconds of an epoch with validation."""

    precision: str
    images_per_s: float
    epoch_s: float


def time_bare_epochs(job: Any, *, epochs: int) -> BareEpochs:
    """Return the medians of some epochs in the precision of a job, without Lightning's loop and MLflow."""
    import torch

    from visionloop.training.datamodule import PreparedData
    from visionloop.training.groups import make_optimizer
    from visionloop.training.loop import keep_memory
    from visionloop.training.ways import prepare_learning

    section = job.params.train
    run_id = job.tracking.open_run("bare loop", run_id=None, tags={}, params={})
    module, _ = prepare_learning(job, run_id)
    data = PreparedData(job, section.batch_size)
    device = torch.device("cuda" if job.hardware.accelerator == "gpu" else "cpu")
    trainer = data.trainer = SimpleNamespace(training=True)  # tells training from validation images
    if data.on_device:
        data.keep_on(device)
    module.to(device)
    optimizer = make_optimizer(module.classifier, section, "all")
    train_loader, val_loader = data.train_dataloader(), data.val_dataloader()
    mixed = torch.autocast(device.type, torch.bfloat16, enabled=job.hardware.precision == "bf16")

    def move(batch: Any) -> Any:
        batch = type(batch)(*(None if part is None else part.to(device, non_blocking=True) for part in batch))
        return data.on_after_batch_transfer(batch)

    train_s, epoch_s = [], []
    with keep_memory():
        for epoch in range(1 + epochs):
            started = time.perf_counter()
            train_loader.sampler.set_epoch(epoch)
            module.train()
            for number, batch in enumerate(map(move, train_loader)):
                with mixed:
                    loss, _ = module.compute_batch(batch, number)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            float(loss.detach())  # a GPU is waited for
            train_s.append(time.perf_counter() - started)
            module.eval()
            trainer.training = False
            with torch.no_grad():
                for batch in map(move, val_loader):
                    with mixed:
                        module.compute_units(batch.inputs)
            trainer.training = True
            if device.type == "cuda":
                torch.cuda.synchronize()
            epoch_s.append(time.perf_counter() - started)
    data.teardown("fit")
    with suppress(Exception):
        job.tracking.close_run(run_id)
    speed = len(job.train_rows) / statistics.median(train_s[1:])
    return BareEpochs(job.hardware.precision, speed, statistics.median(epoch_s[1:]))
