"""The curve of a run, drawn when it ends, however it ends; and its best epoch, as figures of the run."""

import contextlib
from collections.abc import Sequence

import pytorch_lightning as pl

from visionloop.errors import TrackingError
from visionloop.tracking import Tracking
from visionloop.training.job import Job
from visionloop.training.plots import find_best, write_curve
from visionloop.training.views.view import View
from visionloop.training.watch import EpochReport


class CurveView(View):
    """Draws losses, figures and learning rate over all epochs, also those before a resume; a copy is in .visionloop."""

    def __init__(self, job: Job, run_id: str) -> None:
        self.job, self.run_id = job, run_id

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._show(trainer)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        with contextlib.suppress(TrackingError):  # what ended the training is the news
            self._show(trainer)

    def _show(self, trainer: pl.Trainer) -> None:
        from visionloop.training.callbacks import get_history

        if reports := get_history(trainer):
            path = self.job.settings.hidden_dir / "curve.png"
            write_curve(reports, path)
            self.job.tracking.log_artifact(self.run_id, path, "figures")
            log_best(self.job.tracking, self.run_id, reports)


def log_best(tracking: Tracking, run_id: str, reports: Sequence[EpochReport]) -> None:
    """Log which epoch was the best and its figures: `best/epoch`, `best/val_loss`, ... Raises TrackingError."""
    best = find_best(reports)
    figures = {f"best/{name.replace('/', '_')}": value for name, value in best.metrics.items()}
    tracking.log_metrics(run_id, {**figures, "best/epoch": best.epoch}, step=best.epoch - 1)
