"""The end of an epoch: its figures to MLflow, its checkpoint to the disk, its report to the person who waits.

Lightning calls it after the module and early stopping have had their say. The checkpoint is copied at once and written
in the background while the next epoch runs; the one before is then always on the disk.

WORK/unsent.json   what it has not got yet, also for the next process
"""

import json
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Checkpoint, EarlyStopping

from visionloop.errors import TrainingError
from visionloop.tracking import CALL_ERRORS, Tracking
from visionloop.training.checkpoints import SavedEpoch
from visionloop.training.job import Job
from visionloop.training.views.steps import read_views, show_in_views
from visionloop.training.watch import EpochReport
from visionloop.workfolder import write_file

UNSENT_FILE = "unsent.json"
TRY_EVERY_S = 30.0  # each try may wait for the server's time limit
ALL_EPOCHS, STOPPED_EARLY = "all epochs", "early stopping"


class FigureLog:
    """The figures of a run's epochs on their way to MLflow, in order."""

    def __init__(self, work: Path, tracking: Tracking, run_id: str, tell: Callable[[str], object]) -> None:
        self.path, self.tracking, self.run_id, self.tell = work / UNSENT_FILE, tracking, run_id, tell
        self.unsent = _load(self.path)
        self._failed_at: float | None = None

    def add(self, step: int, figures: Mapping[str, float]) -> None:
        """Send the figures of an epoch, or keep them until MLflow can be reached."""
        self.unsent = [(at, kept) for at, kept in self.unsent if at != step] + [(step, dict(figures))]
        if self._failed_at is not None and time.monotonic() - self._failed_at < TRY_EVERY_S:
            self._keep()
            return
        try:
            self.send()
        except CALL_ERRORS as exc:
            if self._failed_at is None:
                self.tell(f"MLflow cannot be reached; training goes on, its figures are sent later ({exc.found})")
            self._failed_at = time.monotonic()
            self._keep()

    def send(self) -> None:
        """Send what is left. Raises TrackingError; nothing is lost then."""
        while self.unsent:
            step, figures = self.unsent[0]
            self.tracking.log_metrics(self.run_id, figures, step=step)
            self.unsent.pop(0)
        self.path.unlink(missing_ok=True)
        if self._failed_at is not None:
            self.tell("MLflow can be reached again: all figures are there")
            self._failed_at = None

    def _keep(self) -> None:
        write_file(self.path, json.dumps(self.unsent).encode())


def _load(path: Path) -> list[tuple[int, dict[str, float]]]:
    try:
        value: list[tuple[int, dict[str, float]]] = json.loads(path.read_text())
        return [(int(step), {str(name): float(v) for name, v in figures.items()}) for step, figures in value]
    except (OSError, ValueError, TypeError, AttributeError):
        return []


class EpochEnd(Checkpoint):
    """Sends each epoch's figures to MLflow in one request, has its checkpoint written, and reports it."""

    def __init__(self, job: Job, figures: FigureLog, stopping: EarlyStopping, found: SavedEpoch | None) -> None:
        self.job, self.figures, self.stopping = job, figures, stopping
        self.history = list(found.history) if found else []
        self.best_epoch = found.best_epoch if found else 0
        self._started = self._train_s = 0.0

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._started, self._train_s = time.perf_counter(), 0.0

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._train_s = time.perf_counter() - self._started

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        check_figures(metrics, self.stopping.monitor, trainer.current_epoch + 1)
        seconds = time.perf_counter() - self._started
        speed = {
            "train/images_per_s": len(self.job.train_rows) / max(self._train_s or seconds, 1e-9),
            "train/epoch_s": seconds,
        }
        figures = {**metrics, **speed, **read_views(trainer)}
        report = self._make_report(trainer, metrics, figures["train/images_per_s"], seconds)
        if trainer.is_global_zero:
            self.figures.add(trainer.current_epoch + 1, figures)
        self.history.append(report)
        if report.wait == 0:
            self.best_epoch = report.epoch
        saved = SavedEpoch(report.epoch, self.best_epoch, _say_end(trainer), tuple(self.history))
        trainer.save_checkpoint("given by CheckpointFiles", storage_options=saved)
        if trainer.is_global_zero:
            show_in_views(trainer, report, figures)
            self.job.watcher.on_epoch(report)

    def _make_report(
        self, trainer: pl.Trainer, metrics: dict[str, float], images_per_s: float, seconds: float
    ) -> EpochReport:
        epoch, max_epochs = trainer.current_epoch + 1, int(trainer.max_epochs or 0)
        return EpochReport(
            epoch=epoch,
            max_epochs=max_epochs,
            metrics={name: value for name, value in metrics.items() if math.isfinite(value)},
            images_per_s=images_per_s,
            seconds=seconds,
            monitor=self.stopping.monitor,
            best=float(self.stopping.best_score),
            wait=self.stopping.wait_count,
            patience=self.stopping.patience,
            eta_s=seconds * (max_epochs - epoch),
        )


def check_figures(metrics: Mapping[str, float], monitor: str, epoch: int) -> None:
    """Raise TrainingError unless the losses and the monitored figure are finite."""
    watched = {name: value for name, value in metrics.items() if name.endswith("/loss") or name == monitor}
    if not all(math.isfinite(value) for value in watched.values()):
        found = ", ".join(f"{name} {value}" for name, value in sorted(watched.items()))
        raise TrainingError(
            f"train epoch {epoch}",
            f"the loss is not finite ({found})",
            "finite figures",
            "Lower train.learning_rate, set train.clip_norm, or try train.precision: fp32.",
        )


def _say_end(trainer: pl.Trainer) -> str | None:
    if trainer.should_stop:
        return STOPPED_EARLY
    return ALL_EPOCHS if trainer.current_epoch + 1 >= int(trainer.max_epochs or 0) else None
