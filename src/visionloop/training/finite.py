"""A loss or gradient that is not finite stops the run at that step, and the batch is kept for a person to look at.

.visionloop/failed/<run id>/   batch.json  batch.npz (inputs, targets, rows_n, sha256_n)  batch.png
"""

import contextlib
import math
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor

from visionloop.data.contact_sheet import Cell, draw_contact_sheet
from visionloop.data.shards import Prepared
from visionloop.errors import TrainingError
from visionloop.records import canonical_json
from visionloop.tracking import CALL_ERRORS
from visionloop.training.batches import Batch
from visionloop.training.job import Job

MAX_PICTURES = 60
TODO = "Lower train.learning_rate, set train.clip_norm, try train.precision: fp32, and look at the images in it."


@dataclass(frozen=True)
class Step:
    """One step: its epoch and number, both from 1, its learning rate, and the batch that it saw."""

    epoch: int
    number: int
    learning_rate: float
    batch: Batch


@dataclass(frozen=True)
class _Watched:
    """A value of a step on its way from the device; `arrived` is None where it is there already."""

    what: str
    value: Tensor
    step: Step
    arrived: torch.cuda.Event | None


class FiniteGuard(pl.Callback):
    """Looks at the loss of every batch and at the total norm of the gradients before every step of the optimizer.

    On a GPU a value is looked at one batch later, so that nobody waits for it. `last_norm` is before clipping.
    """

    def __init__(self, job: Job, run_id: str) -> None:
        self.job, self.run_id = job, run_id
        self.last_norm: Tensor | None = None
        self._step: Step | None = None
        self._watched: deque[_Watched] = deque()

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Batch, batch_idx: int
    ) -> None:
        rate = max(float(group["lr"]) for group in trainer.optimizers[0].param_groups)
        self._step = Step(trainer.current_epoch + 1, batch_idx + 1, rate, batch)

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        self._watch("loss", loss.detach())

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        if gradients:
            self.last_norm = torch.nn.utils.get_total_norm(gradients)
            self._watch("norm of the gradients", self.last_norm)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: object, batch: Batch, batch_idx: int
    ) -> None:
        self._check_all_before(self._step)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._check_all_before(None)
        self._step = None  # the last batch of the epoch need not stay in memory

    def _watch(self, what: str, value: Tensor) -> None:
        assert self._step is not None
        if value.is_cuda:
            on_cpu = torch.empty(value.shape, dtype=value.dtype, pin_memory=True).copy_(value, non_blocking=True)
            arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            arrived.record()
            self._watched.append(_Watched(what, on_cpu, self._step, arrived))
        elif not math.isfinite(number := float(value)):
            self._fail(_Watched(what, value, self._step, None), number)

    def _check_all_before(self, step: Step | None) -> None:
        """Look at what came from earlier steps, waiting for it if need be."""
        while self._watched and self._watched[0].step is not step:
            watched = self._watched.popleft()
            if watched.arrived is not None:
                watched.arrived.synchronize()
            if not math.isfinite(number := float(watched.value)):
                self._fail(watched, number)

    def _fail(self, watched: _Watched, number: float) -> NoReturn:
        step = watched.step
        folder = self._choose_folder()
        write_failed_batch(folder, step, f"{watched.what} {number}", self.job.prepared)
        if self.job.world.is_first:
            with contextlib.suppress(*CALL_ERRORS):  # the error to tell is the other one
                self.job.tracking.log_artifact(self.run_id, folder, "failed")
        raise TrainingError(
            f"train epoch {step.epoch}, step {step.number}",
            f"the {watched.what} is {number} at learning rate {step.learning_rate:.3g}; "
            f"its batch is in {folder.relative_to(self.job.settings.home)}",
            "a finite number",
            TODO,
        )

    def _choose_folder(self) -> Path:
        folder = self.job.settings.hidden_dir / "failed" / self.run_id
        return folder if self.job.world.is_first else folder / f"rank-{self.job.world.rank}"


def write_failed_batch(folder: Path, step: Step, found: str, prepared: Prepared) -> None:
    """Write what a step saw: numbers, names and, of images, a contact sheet."""
    folder.mkdir(parents=True, exist_ok=True)
    inputs, targets, rows_n = (tensor.detach().float().cpu().numpy() for tensor in step.batch[:3])
    rows_n = rows_n.astype(np.int64)
    if step.batch.inputs.dtype == torch.uint8:
        inputs = inputs.astype(np.uint8)
    images = [(prepared.sha256_n[row], " ".join(prepared.labels(row)) or "none") for row in rows_n]
    sha256_n = np.asarray([sha256 for sha256, _ in images], dtype="S64")
    np.savez(folder / "batch.npz", inputs=inputs, targets=targets, rows_n=rows_n, sha256_n=sha256_n)
    facts = {
        "epoch": step.epoch,
        "step": step.number,
        "learning_rate": step.learning_rate,
        "found": found,
        "images": [
            {"sha256": sha256, "label": label, "row": int(row)}
            for (sha256, label), row in zip(images, rows_n, strict=True)
        ],
    }
    (folder / "batch.json").write_bytes(canonical_json(facts) + b"\n")
    if inputs.ndim == 4:
        pixels_nhwc = np.nan_to_num(inputs).clip(0, 255).astype(np.uint8)
        cells = [
            Cell(pixels, label, sha256[:12])
            for pixels, (sha256, label) in zip(pixels_nhwc[:MAX_PICTURES], images, strict=False)
        ]
        title = f"epoch {step.epoch}, step {step.number}: {found}"
        (folder / "batch.png").write_bytes(draw_contact_sheet(cells, title, columns=8, cell_px=112))
