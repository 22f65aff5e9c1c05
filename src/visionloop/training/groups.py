"""Which parameters learn at which rate, and which of them decay.

All groups exist from the first step to the last, also where a backbone is frozen at first: so an optimizer's state fits
whenever a training goes on.
"""

import itertools
from typing import Any, Literal

import torch
from torch import nn
from torch.optim import AdamW

from visionloop.networks.classifier import Classifier
from visionloop.params import Train

STAGES = 8
NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.LocalResponseNorm)

Group = dict[str, Any]


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
