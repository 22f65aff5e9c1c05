"""What a run shows besides its figures, as callbacks of Lightning: for MLflow, TensorBoard and the person who waits."""

from pathlib import Path

import pytorch_lightning as pl

from visionloop.training.job import Job


def make_views(job: Job, run_id: str, work: Path) -> list[pl.Callback]:
    """Return the callbacks that show a training; none on a rank that is not the first."""
    return []
