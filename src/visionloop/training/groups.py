"""Which parameters learn at which rate, which of them decay, and how the rate moves over the steps.

All groups exist from the first step to the last, also where a backbone is frozen at first: so an optimizer's state fits
whenever a training goes on.

A schedule is the share of a group's own rate at each step, so that groups keep their proportions.
"""

import itertools
import math
from typing import Any, Literal

import torch
from torch import nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau

from visionloop.networks.classifier import Classifier
from visionloop.params import Train

STAGES = 8
NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.LocalResponseNorm)
Group = dict[str, Any]
WARM_UP_RATIO = 0.1
RISE_RATIO = 0.3
FIRST_SHARE, LAST_SHARE = 1 / 25, 1 / 25e4
PLATEAU_FACTOR = 0.3
PLATEAU_FLOOR = 1e-3


def compute_rates(section: Train, num_stages: int) -> list[float]:
    """Return the rate of each stage of the backbone and, last, of the head.

    For `finetune` they grow geometrically with the depth, from `backbone_rate` times the head's (discriminative
    fine-tuning: Howard and Ruder, 2018); else all are the same.
    """
    ratio = section.backbone_rate if section.way == "finetune" else 1.0
    steps = max(num_stages, 1)
    return [section.learning_rate * ratio ** (1 - stage / steps) for stage in range(num_stages)] + [
        section.learning_rate
    ]


def split_stages(backbone: nn.Module, stages: int = STAGES) -> list[list[nn.Module]]:
    """Cut a backbone's layers (modules with parameters of their own), in the order they are defined, into stages.

    Stages hold equal numbers of layers, to one; there are fewer where there are fewer layers.
    """
    layers = [module for module in backbone.modules() if any(True for _ in module.parameters(recurse=False))]
    count = min(stages, len(layers))
    cuts = [round(i * len(layers) / count) for i in range(count + 1)] if count else []
    return [layers[start:end] for start, end in itertools.pairwise(cuts)]


def make_groups(classifier: Classifier, section: Train, learns: Literal["all", "head"]) -> list[Group]:
    """Return parameter groups for an optimizer, the head's last. Biases and norms do not decay."""
    stages = split_stages(classifier.backbone, STAGES if section.way == "finetune" else 1) if learns == "all" else []
    parts = [*stages, list(classifier.head.modules())]
    rates = compute_rates(section, len(stages))
    seen: set[int] = set()
    groups: list[Group] = []
    for modules, rate in zip(parts, rates, strict=True):
        decayed, kept = _split_by_decay(modules, seen)
        groups += [
            {"params": params, "lr": rate, "weight_decay": decay}
            for params, decay in ((kept, 0.0), (decayed, section.weight_decay))
            if params
        ]
    return groups


def make_optimizer(classifier: Classifier, section: Train, learns: Literal["all", "head"]) -> AdamW:
    """Return AdamW (Loshchilov and Hutter, 2019) over the groups."""
    return torch.optim.AdamW(make_groups(classifier, section, learns), lr=section.learning_rate)


def _split_by_decay(modules: list[nn.Module], seen: set[int]) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Return the modules' own parameters that decay and those that do not; one that is shared counts once."""
    decayed: list[nn.Parameter] = []
    kept: list[nn.Parameter] = []
    for module in modules:
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) in seen or not parameter.requires_grad:
                continue
            seen.add(id(parameter))
            is_kept = isinstance(module, NORMS) or name.endswith("bias") or parameter.ndim <= 1
            (kept if is_kept else decayed).append(parameter)
    return decayed, kept


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
