"""TensorBoard beside MLflow, with `compute.tensorboard: true`: .visionloop/tensorboard/RUN/. Heavy: imported when on.

All steps are those of the optimizer, so that one number says what a resumed run replaces (`purge_step`).
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
from PIL import Image
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from visionloop.tracking_pages import name_run
from visionloop.training.job import Job
from visionloop.training.views.steps import read_loss
from visionloop.training.views.view import View
from visionloop.training.watch import EpochReport

LOSSES_PER_EPOCH = 50


class TensorBoardView(View):
    """Writes the loss within epochs, all figures of each epoch, the run's pictures, its parameters and the result."""

    def __init__(self, job: Job, run_id: str, work: Path) -> None:
        self.job, self.work = job, work
        train = job.params.train
        name = f"{name_run(train.network_name, train.way, job.prepared.pin.version)}-{run_id[:8]}"
        self.folder = job.settings.hidden_dir / "tensorboard" / name
        self._writer: Any = None
        self._last: dict[str, float] = {}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # A resumed run has done `global_step` steps: what an epoch that is run again had logged is dropped.
        self._writer = SummaryWriter(str(self.folder), purge_step=trainer.global_step or None)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, i: int
    ) -> None:
        if i % max(1, int(trainer.num_training_batches) // LOSSES_PER_EPOCH) == 0:
            self._writer.add_scalar("step/loss", read_loss(trainer, outputs), trainer.global_step - 1)

    def show_epoch(self, trainer: pl.Trainer, report: EpochReport, figures: Mapping[str, float]) -> None:
        self._last = dict(figures)
        for name, value in figures.items():
            self._writer.add_scalar(name, value, trainer.global_step - 1)
        if trainer.global_step and report.epoch == 1:
            self._add_pictures()
        self._writer.flush()

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._end()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._end()

    def _add_pictures(self) -> None:
        for path in sorted((self.work / "figures").glob("*.png")):
            with Image.open(path) as image:
                self._writer.add_image(path.stem, np.asarray(image.convert("RGB")), 0, dataformats="HWC")

    def _end(self) -> None:
        """Write the parameters beside the result (the page HPARAMS), and close the file."""
        if self._writer is None:
            return
        section = self.job.params.train.model_dump(mode="json")
        plain = {
            key: value if isinstance(value, str | bool | int | float) else str(value) for key, value in section.items()
        }
        results = {name: value for name, value in self._last.items() if name.startswith("val/")}
        for summary in hparams(plain, results):  # type: ignore[no-untyped-call]
            self._writer.file_writer.add_summary(summary)
        self._writer.close()
        self._writer = None
