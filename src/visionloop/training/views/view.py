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


def read_views(trainer: pl.Trainer) -> dict[str, float]:
    """Return the figures that the views have of the epoch that just ended, for the same request as the others."""
    views = [c for c in trainer.callbacks if isinstance(c, View)]  # type: ignore[attr-defined]
    return {name: value for view in views for name, value in view.read_epoch(trainer).items()}


def show_in_views(trainer: pl.Trainer, report: EpochReport, figures: Mapping[str, float]) -> None:
    """Let the views show a finished epoch: its report, and all its figures."""
    for view in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(view, View):
            view.show_epoch(trainer, report, figures)
