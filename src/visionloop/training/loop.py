"""The epochs: Lightning over batches, with checkpoints in the work folder, from the last one if there is one.

WORK/checkpoints/{last,best}.ckpt
"""

import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import EarlyStopping, ModelCheckpoint

from visionloop.training.callbacks import EpochReporter, find_checkpoint, has_stopped_early
from visionloop.training.datamodule import PreparedData
from visionloop.training.job import Job
from visionloop.training.module import ClassifierModule
from visionloop.training.plots import write_curve
from visionloop.training.views import make_views
from visionloop.training.watch import EpochReport

MakeData = Callable[[int], PreparedData]


def run_loop(work: Path, job: Job, run_id: str, module: ClassifierModule, make_data: MakeData) -> None:
    """Train until the patience or the epochs are used up, and leave the best epoch's weights in the module.

    `make_data` takes the number of images that are to be in memory at a time.

    Raises:
        KeyboardInterrupt: it was stopped; the last finished epoch is kept.
        TrainingError: the loss is not finite.
    """
    _, checkpoint = find_checkpoint(work / "checkpoints")
    if not has_stopped_early(checkpoint, job.params.train.patience):
        _run_epochs(work, job, run_id, module, make_data(job.params.train.batch_size))
    best = torch.load(work / "checkpoints" / "best.ckpt", "cpu", weights_only=True)
    module.load_state_dict(best["state_dict"])


def make_repeatable(seed: int) -> None:
    """Seed torch, and choose kernels that give the same bits each time."""
    pl.seed_everything(seed, workers=True, verbose=False)
    torch.use_deterministic_algorithms(True, warn_only=True)
    # A debugging aid that costs a pass over every new tensor.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def _run_epochs(work: Path, job: Job, run_id: str, module: ClassifierModule, data: PreparedData) -> None:
    checkpoint_path, _ = find_checkpoint(work / "checkpoints")
    reports: list[EpochReport] = []

    def report(epoch: EpochReport) -> None:
        reports.append(epoch)
        job.watcher.on_epoch(epoch)

    trainer = make_trainer(work, job, run_id, report)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(module, datamodule=data, ckpt_path=str(checkpoint_path) if checkpoint_path else None)
    if trainer.interrupted:
        raise KeyboardInterrupt
    if reports:
        write_curve(reports, work / "curve.png")
        job.tracking.log_artifact(run_id, work / "curve.png", "figures")


def make_trainer(work: Path, job: Job, run_id: str, report: Any) -> pl.Trainer:
    """Wire Lightning: early stopping, best and last checkpoint in the work folder, nothing printed."""
    for name in ("lightning.pytorch", "pytorch_lightning", "lightning.fabric", "lightning_fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    section = job.params.train
    stopping = EarlyStopping(section.monitor, patience=section.patience, mode=section.monitor_mode)
    keeper = ModelCheckpoint(
        dirpath=work / "checkpoints",
        filename="best",
        monitor=section.monitor,
        mode=section.monitor_mode,
        save_last=True,
        enable_version_counter=False,
    )
    reporter = EpochReporter(job.tracking, run_id, len(job.train_rows), stopping, report)
    precision: Any = job.hardware.lightning_precision
    return pl.Trainer(
        max_epochs=section.max_epochs,
        accelerator=job.hardware.accelerator,
        devices=1,
        precision=precision,
        callbacks=[stopping, keeper, reporter, *make_views(job, run_id, work)],
        default_root_dir=work,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        deterministic="warn",
    )
