"""Where an epoch is, how fast it goes and how long it waits for data: told a few times a second."""

import math
import time
from collections.abc import Mapping
from typing import Any

import pytorch_lightning as pl

from visionloop.training.job import Job
from visionloop.training.views.view import View
from visionloop.training.watch import Phase, StepReport

TELL_EVERY_S = 0.25
SMOOTHED_OVER_S = 5.0


class StepView(View):
    """Times steps and tells the watcher. The wait for data is the time from the end of a step to the next one's start.

    On a GPU steps are queued: the times are those of the process that feeds it.
    """

    def __init__(self, job: Job) -> None:
        self.watcher, self.num_ranks = job.watcher, job.world.size
        self._started = self._last_end = self._told = self._val_started = 0.0
        self._wait_s = self._train_s = self._val_s = 0.0
        self._images = self._images_told = 0
        self._rate: float | None = None

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._started = self._last_end = self._told = time.perf_counter()
        self._wait_s = self._train_s = self._val_s = 0.0
        self._images = self._images_told = 0

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, i: int) -> None:
        self._wait_s += time.perf_counter() - self._last_end

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, i: int
    ) -> None:
        now = time.perf_counter()
        self._images += len(batch.rows_n) * self.num_ranks
        self._train_s = now - self._started
        if now - self._told >= TELL_EVERY_S:
            self._smooth(now)
            self._tell(trainer, "train", i + 1, trainer.num_training_batches, read_loss(trainer, outputs))
        self._last_end = time.perf_counter()

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._val_started = self._told = time.perf_counter()

    def on_validation_batch_end(  # noqa: PLR0917 - Lightning's
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, i: int, loader: int = 0
    ) -> None:
        now = time.perf_counter()
        if now - self._told >= TELL_EVERY_S:
            self._told = now
            self._tell(trainer, "val", i + 1, sum(trainer.num_val_batches), math.nan)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._val_s = time.perf_counter() - self._val_started

    def read_epoch(self, trainer: pl.Trainer) -> Mapping[str, float]:
        figures = {
            "epoch": trainer.current_epoch + 1,
            "train/images_per_s": self._images / max(self._train_s, 1e-9),
            "train/data_wait_ratio": self._wait_s / max(self._train_s, 1e-9),
            "train/epoch_s": self._train_s,
        }
        return {**figures, "val/epoch_s": self._val_s} if self._val_s else figures

    def _smooth(self, now: float) -> None:
        """Let the rate follow the last few seconds."""
        passed = now - self._told
        rate = (self._images - self._images_told) / passed
        known = rate if self._rate is None else self._rate
        self._rate = known + (1 - math.exp(-passed / SMOOTHED_OVER_S)) * (rate - known)
        self._told, self._images_told = now, self._images

    def _tell(self, trainer: pl.Trainer, phase: Phase, step: int, num_steps: float, loss: float) -> None:
        self.watcher.on_step(
            StepReport(
                epoch=trainer.current_epoch + 1,
                max_epochs=int(trainer.max_epochs or 0),
                step=step,
                num_steps=int(num_steps),
                loss=loss,
                images_per_s=self._rate or 0.0,
                wait_ratio=self._wait_s / max(self._train_s, 1e-9),
                phase=phase,
            )
        )


def read_loss(trainer: pl.Trainer, outputs: Any) -> float:
    """Return the loss of the batch; Lightning gives it divided by the number of batches that are accumulated."""
    loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
    return math.nan if loss is None else float(loss) * trainer.accumulate_grad_batches
