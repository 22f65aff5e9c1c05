"""Figures of an epoch that say how it went inside: the norm of the gradients, the memory of the GPU."""

from collections.abc import Mapping
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from visionloop.training.finite import FiniteGuard
from visionloop.training.views.view import View

BYTES_PER_GIB = 2**30


class GradientView(View):
    """Mean and largest norm of all gradients over the steps of an epoch, before they are clipped."""

    def __init__(self) -> None:
        self._guard: FiniteGuard | None = None
        self._norms: list[Tensor] = []

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        guards = [c for c in trainer.callbacks if isinstance(c, FiniteGuard)]  # type: ignore[attr-defined]
        self._guard, self._norms = next(iter(guards), None), []

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, i: int
    ) -> None:
        norm = self._guard.last_norm if self._guard else None
        if norm is not None and not (self._norms and norm is self._norms[-1]):  # the same one while it accumulates
            self._norms.append(norm)

    def read_epoch(self, trainer: pl.Trainer) -> Mapping[str, float]:
        if not self._norms:
            return {}
        norms = torch.stack(self._norms)
        return {"train/grad_norm": float(norms.mean()), "train/grad_norm_max": float(norms.max())}


class MemoryView(View):
    """The most memory that torch held on the GPU during an epoch, GiB."""

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if pl_module.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(pl_module.device)

    def read_epoch(self, trainer: pl.Trainer) -> Mapping[str, float]:
        device = trainer.strategy.root_device
        if device.type != "cuda":
            return {}
        return {"gpu/memory_gib": torch.cuda.max_memory_allocated(device) / BYTES_PER_GIB}
