"""What an epoch shows: where it is, its speed and waits, its gradients, memory, curve and confusion; TensorBoard.

With several labels an image there is no such matrix: what was found, missed and wrongly said of a class is drawn.
TensorBoard's files are .visionloop/tensorboard/RUN/, with `compute.tensorboard: true`.

Dimensions: n images, u units (1 for binary, else k classes), k classes.
"""

import contextlib
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from PIL import Image
from torch import Tensor

from visionloop.data.fonts import number_names
from visionloop.evaluation.label_metrics import count_labels
from visionloop.evaluation.metrics import compute_confusion
from visionloop.evaluation.plots import draw_confusion, draw_outcomes
from visionloop.evaluation.resampling import IntArray
from visionloop.tracking import CALL_ERRORS, Tracking
from visionloop.tracking_pages import name_run
from visionloop.training.finite import FiniteGuard
from visionloop.training.job import Job
from visionloop.training.module import ClassifierModule
from visionloop.training.plots import SHOWN, find_best, write_curve
from visionloop.training.watch import EpochReport, Phase, StepReport


class View(pl.Callback):
    """Base of the callbacks that show a training; nothing in it changes what is learned."""

    def read_epoch(self, trainer: pl.Trainer) -> Mapping[str, float]:
        """Return figures of the epoch that just ended."""
        return {}

    def show_epoch(self, trainer: pl.Trainer, report: EpochReport, figures: Mapping[str, float]) -> None:
        """Take a finished epoch: what is reported of it, and all its figures."""


def read_views(trainer: pl.Trainer) -> dict[str, float]:
    """Return the figures that the views have of the epoch that just ended, for the same request as the others."""
    views = [c for c in trainer.callbacks if isinstance(c, View)]  # type: ignore[attr-defined]
    return {name: value for view in views for name, value in view.read_epoch(trainer).items()}


def show_in_views(trainer: pl.Trainer, report: EpochReport, figures: Mapping[str, float]) -> None:
    """Let the views show a finished epoch: its report, and all its figures."""
    for view in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(view, View):
            view.show_epoch(trainer, report, figures)


TELL_EVERY_S = 0.25
SMOOTHED_OVER_S = 5.0
BYTES_PER_GIB = 2**30


class ConfusionView(View):
    """Draws the confusion matrix of an epoch's validation for MLflow, every `compute.confusion_every` epochs."""

    def __init__(self, job: Job, run_id: str, work: Path) -> None:
        self.job, self.run_id, self.work = job, run_id, work

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        epoch = trainer.current_epoch + 1
        if epoch % self.job.params.compute.confusion_every and epoch != trainer.max_epochs:
            return
        classes = [*number_names(self.job.prepared.classes).values()]
        assert isinstance(pl_module, ClassifierModule)
        units_nu, targets = pl_module.val_units_nu, pl_module.val_targets
        folder = self.work / "figures" / "confusion"
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"epoch-{epoch:03d}.png"
        of_images = f"of {len(targets):,} validation images, epoch {epoch}"
        if targets.ndim == 2:
            outcomes = count_labels(targets.cpu().numpy() > 0.5, units_nu.cpu().numpy() > 0, classes)
            path.write_bytes(draw_outcomes(outcomes, title=f"Answers {of_images}"))
        else:
            confusion_kk = count_confusion(units_nu, targets, len(classes))
            path.write_bytes(draw_confusion(confusion_kk, classes, title=f"Confusion {of_images}"))
        self.job.tracking.log_artifact(self.run_id, path, "figures/confusion")


def count_confusion(units_nu: Tensor, labels_n: Tensor, num_classes: int) -> IntArray:
    """Return how many images of each class (rows) were taken for which (columns)."""
    chosen_n = (units_nu.squeeze(1) > 0).long() if units_nu.shape[1] == 1 else units_nu.argmax(dim=1)
    return compute_confusion(labels_n.long().cpu().numpy(), chosen_n.cpu().numpy(), num_classes)


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


class GradientView(View):
    """Mean and largest norm of all gradients over the steps of an epoch, before they are clipped."""

    def __init__(self) -> None:
        self._guard: FiniteGuard | None = None
        self._norms: list[Tensor] = []

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        guards = [c for c in trainer.callbacks if isinstance(c, FiniteGuard)]  # type: ignore[attr-defined]
        self._guard, self._norms = next(iter(guards), None), []

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, i: int
    ) -> None:
        norm = self._guard.last_norm if self._guard else None
        if norm is not None and not (self._norms and norm is self._norms[-1]):  # the same one while it accumulates
            self._norms.append(norm)

    def read_epoch(self, trainer: pl.Trainer) -> Mapping[str, float]:
        if not self._norms:
            return {}
        norms = torch.stack(self._norms)
        return {"train/grad_norm": float(norms.mean()), "train/grad_norm_max": float(norms.max())}


class MemoryView(View):
    """The most memory that torch held on the GPU during an epoch, GiB."""

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if pl_module.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(pl_module.device)

    def read_epoch(self, trainer: pl.Trainer) -> Mapping[str, float]:
        device = trainer.strategy.root_device
        if device.type != "cuda":
            return {}
        return {"gpu/memory_gib": torch.cuda.max_memory_allocated(device) / BYTES_PER_GIB}


class CurveView(View):
    """Draws losses, figures and learning rate over all epochs, also those before a resume."""

    def __init__(self, job: Job, run_id: str, work: Path, history: Sequence[EpochReport]) -> None:
        self.job, self.run_id, self.work, self.reports = job, run_id, work, list(history)

    def show_epoch(self, trainer: pl.Trainer, report: EpochReport, figures: Mapping[str, float]) -> None:
        self.reports.append(report)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._show()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        with contextlib.suppress(*CALL_ERRORS):  # what ended the training is the news
            self._show()

    def _show(self) -> None:
        if self.reports:
            path = self.work / SHOWN / "curve.png"
            path.parent.mkdir(exist_ok=True)
            write_curve(self.reports, path)
            self.job.tracking.log_artifact(self.run_id, path, "figures")
            self.job.tracking.log_images(self.run_id, [path])
            log_best(self.job.tracking, self.run_id, self.reports)


def log_best(tracking: Tracking, run_id: str, reports: Sequence[EpochReport]) -> None:
    """Log which epoch was the best and its figures: `best/epoch`, `best/val_loss`, ... Raises TrackingError.

    They are of the run, not of a step: MLflow draws a bar, where a later step would be a chart of one dot.
    """
    best = find_best(reports)
    figures = {f"best/{name.replace('/', '_')}": value for name, value in best.metrics.items()}
    tracking.log_metrics(run_id, {**figures, "best/epoch": best.epoch})


LOSSES_PER_EPOCH = 50


class TensorBoardView(View):
    """Writes the loss within epochs, all figures of each epoch, the run's pictures, its parameters and the result.

    All steps are those of the optimizer, so that one number says what a resumed run replaces (`purge_step`).
    """

    def __init__(self, job: Job, run_id: str, work: Path) -> None:
        self.job, self.work = job, work
        train = job.params.train
        name = f"{name_run(train.network_name, train.way, job.prepared.pin.version)}-{run_id[:8]}"
        self.folder = job.settings.hidden_dir / "tensorboard" / name
        self._writer: Any = None
        self._last: dict[str, float] = {}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        from torch.utils.tensorboard import SummaryWriter

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
        from torch.utils.tensorboard.summary import hparams

        section = self.job.params.train.model_dump(mode="json")
        plain = {
            key: value if isinstance(value, str | bool | int | float) else str(value) for key, value in section.items()
        }
        results = {name: value for name, value in self._last.items() if name.startswith("val/")}
        for summary in hparams(plain, results):  # type: ignore[no-untyped-call]
            self._writer.file_writer.add_summary(summary)
        self._writer.close()
        self._writer = None
