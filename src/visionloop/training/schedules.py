"""The learning rate over the steps of a training. Pure, but for the plateau, which looks at a figure.

A schedule is the share of a group's own rate at each step, so that groups keep their proportions.
"""

import math
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau

from visionloop.params import Train

WARM_UP_RATIO = 0.1
RISE_RATIO = 0.3
FIRST_SHARE, LAST_SHARE = 1 / 25, 1 / 25e4
PLATEAU_FACTOR = 0.3
PLATEAU_FLOOR = 1e-3


def compute_share(schedule: str, step: int, total: int) -> float:
    """Return the share of the rate at step 0, 1, ... of `total`; after them that of the end.

    cosine: linear warm-up over a tenth, then a cosine to 0 (Loshchilov and Hutter, 2017).
    one_cycle: from 1/25 to 1 over 0.3, then to 1/250,000, both as cosines (Smith and Topin, 2018, in the form that
    fastai and torch's OneCycleLR use; the momentum stays as it is).
    constant: 1.
    """
    if schedule == "cosine":
        warm_up = max(1, int(total * WARM_UP_RATIO))
        return (step + 1) / warm_up if step < warm_up else _fall(step - warm_up, total - warm_up, 1.0, 0.0)
    if schedule == "one_cycle":
        peak = max(1.0, RISE_RATIO * total - 1)
        if step < peak:
            return _fall(step, peak, FIRST_SHARE, 1.0)
        return _fall(step - peak, total - 1 - peak, 1.0, LAST_SHARE)
    return 1.0


def _fall(step: float, steps: float, start: float, end: float) -> float:
    """Go from start to end on half a cosine; stay there."""
    done = min(1.0, step / max(steps, 1.0))
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * done))


def make_schedule(optimizer: Optimizer, section: Train, total: int) -> LambdaLR | ReduceLROnPlateau:
    """Return the scheduler of `train.schedule`: all but the plateau are stepped after each step of the optimizer.

    The plateau multiplies rates by 0.3 after `patience // 2` epochs without a better figure (at least one), down to a
    thousandth: it acts before early stopping gives up.
    """
    if section.schedule == "plateau":
        return ReduceLROnPlateau(
            optimizer,
            mode=section.monitor_mode,
            factor=PLATEAU_FACTOR,
            patience=max(1, section.patience // 2) - 1,
            threshold=0.0,
            threshold_mode="abs",
            min_lr=[group["lr"] * PLATEAU_FLOOR for group in optimizer.param_groups],
        )
    return LambdaLR(optimizer, lambda step: compute_share(section.schedule, step, total))


def step_plateau(scheduler: Any, figure: float | torch.Tensor) -> None:
    """Let a plateau schedule look at an epoch's figure; other schedules need no figure."""
    if isinstance(scheduler, ReduceLROnPlateau):
        scheduler.step(float(figure))
