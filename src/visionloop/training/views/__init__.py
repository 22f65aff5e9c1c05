"""What a run shows besides its loss: callbacks of Lightning for MLflow, TensorBoard and the person who waits.

They change no result, and cost less than a hundredth of an epoch.
"""

from collections.abc import Mapping
from pathlib import Path

import pytorch_lightning as pl

from visionloop.params import WAYS_ON_EMBEDDINGS
from visionloop.training.job import Job
from visionloop.training.samples import make_sample_view
from visionloop.training.views.confusion import ConfusionView
from visionloop.training.views.curve import CurveView
from visionloop.training.views.gauges import GradientView, MemoryView
from visionloop.training.views.steps import StepView
from visionloop.training.views.view import View
from visionloop.training.watch import EpochReport

__all__ = ["View", "make_views", "read_views", "show_in_views"]


def make_views(job: Job, run_id: str, work: Path) -> list[pl.Callback]:
    """Return the callbacks that show a training; none on a rank that is not the first."""
    if not job.world.is_first:
        return []
    section = job.params.train
    views: list[pl.Callback] = [GradientView(), MemoryView()]
    if job.watcher.wants_pictures:
        views += _make_pictures(job, run_id, work)
        if section.confusion_every and section.on == "train":
            views.append(ConfusionView(job, run_id, work))
        if section.tensorboard:
            from visionloop.training.views.tensorboard import TensorBoardView

            views.append(TensorBoardView(job, run_id, work))
    # Last, so that what the others do between two steps is not taken for a wait for data.
    return [*views, StepView(job)]


def _make_pictures(job: Job, run_id: str, work: Path) -> list[pl.Callback]:
    views: list[pl.Callback] = [CurveView(job, run_id)]
    if job.params.train.way not in WAYS_ON_EMBEDDINGS:
        views.append(make_sample_view(job, run_id, work))
    return views


def read_views(trainer: pl.Trainer) -> dict[str, float]:
    """Return the figures that the views have of the epoch that just ended, for the same request as the others."""
    views = [c for c in trainer.callbacks if isinstance(c, View)]  # type: ignore[attr-defined]
    return {name: value for view in views for name, value in view.read_epoch(trainer).items()}


def show_in_views(trainer: pl.Trainer, report: EpochReport, figures: Mapping[str, float]) -> None:
    """Let the views show a finished epoch: its report, and all its figures."""
    for view in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(view, View):
            view.show_epoch(trainer, report, figures)
