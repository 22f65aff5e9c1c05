"""What a training tells the person who waits: values, and a watcher that takes them. It prints nothing itself."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

Phase = Literal["train", "val"]


@dataclass(frozen=True)
class StepReport:
    """Where an epoch is. `wait_ratio` is the share of its time so far that was spent waiting for data.

    In the phase `val` the steps are those of validation, and there is no loss (NaN).
    """

    epoch: int
    max_epochs: int
    step: int
    num_steps: int
    loss: float
    images_per_s: float
    wait_ratio: float
    phase: Phase = "train"


@dataclass(frozen=True)
class EpochReport:
    """One finished epoch, or with `max_epochs` 0 a head that was solved at once.

    `wait` is how many epochs have passed without a better one; `eta_s` what all may take yet.
    """

    epoch: int
    max_epochs: int
    metrics: Mapping[str, float]
    images_per_s: float
    seconds: float
    monitor: str
    best: float
    wait: int
    patience: int
    eta_s: float


@dataclass(frozen=True)
class TrialReport:
    """One finished trial of `tune`: `state` is done, pruned or failed; `best` is the best value of all so far."""

    number: int
    state: str
    metric: str
    value: float | None
    best: float | None
    is_best: bool
    values: Mapping[str, Any]
    epochs: int
    seconds: float
    reason: str


class Watcher:
    """Takes what a training tells, and does nothing with it. The command line and `tune` have one of their own.

    `on_epoch` may raise to end the training: it is called after the epoch's checkpoint was written.
    `wants_pictures`: whether anyone will look at pictures of this run; the trials of `tune` have none.
    """

    wants_pictures: bool = True

    def tell(self, line: str) -> None:
        """Take a line about something that happened once: a fallback, a choice, a resumed epoch."""

    def on_step(self, report: StepReport) -> None:
        """Take a step; a few a second at most."""

    def on_epoch(self, report: EpochReport) -> None:
        """Take a finished epoch."""

    def on_trial_start(self, number: int, total: int, values: Mapping[str, Any]) -> None:
        """Take what the next trial of `tune` tries; its steps and epochs follow."""

    def on_trial(self, report: TrialReport, total: int) -> None:
        """Take a finished trial of `tune`."""
