"""What a run shows besides its loss: callbacks of Lightning for MLflow, TensorBoard and the person who waits.

They change no result, and cost less than a hundredth of an epoch.
"""

from collections.abc import Sequence
from pathlib import Path

import pytorch_lightning as pl

from visionloop.params import WAYS_ON_EMBEDDINGS
from visionloop.training.job import Job
from visionloop.training.views.samples import make_sample_view
from visionloop.training.views.steps import (
    ConfusionView,
    CurveView,
    GradientView,
    MemoryView,
    StepView,
    TensorBoardView,
)
from visionloop.training.watch import EpochReport


def make_views(job: Job, run_id: str, work: Path, history: Sequence[EpochReport]) -> list[pl.Callback]:
    """Return the callbacks that show a training; none on a rank that is not the first. `history`: epochs before it."""
    if not job.world.is_first:
        return []
    section = job.params.train
    views: list[pl.Callback] = [GradientView(), MemoryView()]
    if job.watcher.wants_pictures:
        views.append(CurveView(job, run_id, work, history))
        if section.way not in WAYS_ON_EMBEDDINGS:
            views.append(make_sample_view(job, run_id, work))
        if job.params.compute.confusion_every and section.on == "train":
            views.append(ConfusionView(job, run_id, work))
        if job.params.compute.tensorboard:
            views.append(TensorBoardView(job, run_id, work))
    # Last, so that what the others do between two steps is not taken for a wait for data.
    return [*views, StepView(job)]
