"""A callback that shows something of a training: it may add figures to an epoch, and is shown the finished epoch."""

from collections.abc import Mapping

import pytorch_lightning as pl

from visionloop.training.watch import EpochReport


class View(pl.Callback):
    """Base of the callbacks that show a training; nothing in it changes what is learned."""

    def read_epoch(self, trainer: pl.Trainer) -> Mapping[str, float]:
        """Return figures of the epoch that just ended."""
        return {}

    def show_epoch(self, trainer: pl.Trainer, report: EpochReport, figures: Mapping[str, float]) -> None:
        """Take a finished epoch: what is reported of it, and all its figures."""
