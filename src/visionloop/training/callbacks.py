"""What happens beside the learning: epoch figures to MLflow and to the person who waits, and safe checkpoints."""

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import EarlyStopping

from visionloop.errors import TrainingError
from visionloop.tracking import Tracking
from visionloop.training.watch import EpochReport


class EpochReporter(pl.Callback):
    """Sends each epoch's figures to MLflow in one request, and to `on_epoch`."""

    def __init__(
        self,
        tracking: Tracking,
        run_id: str,
        num_train: int,
        stopping: EarlyStopping,
        on_epoch: Callable[[EpochReport], None],
    ) -> None:
        self.tracking, self.run_id, self.num_train = tracking, run_id, num_train
        self.stopping, self.on_epoch = stopping, on_epoch
        self._started = self._train_s = 0.0

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._started = time.perf_counter()

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._train_s = time.perf_counter() - self._started

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        metrics = {k: float(v) for k, v in trainer.callback_metrics.items()}
        if not all(torch.isfinite(torch.tensor(list(metrics.values())))):
            raise TrainingError(
                f"train epoch {trainer.current_epoch + 1}",
                f"the loss is not finite ({metrics})",
                "finite figures",
                "Lower train.learning_rate.",
            )
        seconds = time.perf_counter() - self._started
        images_per_s = self.num_train / max(self._train_s, 1e-9)
        speed = {"train/images_per_s": images_per_s, "train/epoch_s": seconds}
        self.tracking.log_metrics(self.run_id, {**metrics, **speed}, step=trainer.current_epoch)
        # Lightning lets early stopping look only after this: say what it is about to find.
        best, current = float(self.stopping.best_score), metrics[self.stopping.monitor]
        better = current < best if self.stopping.mode == "min" else current > best
        self.on_epoch(
            EpochReport(
                epoch=trainer.current_epoch + 1,
                max_epochs=int(trainer.max_epochs or 0),
                metrics=metrics,
                images_per_s=images_per_s,
                seconds=seconds,
                monitor=self.stopping.monitor,
                best=current if better else best,
                wait=0 if better else int(self.stopping.wait_count) + 1,
                patience=self.stopping.patience,
                eta_s=seconds * (int(trainer.max_epochs or 0) - trainer.current_epoch - 1),
            )
        )


def find_checkpoint(folder: Path) -> tuple[Path | None, dict[str, Any]]:
    """Return the checkpoint to go on from and its content; an unreadable one is passed over for the one before."""
    for name in ("last.ckpt", "best.ckpt"):
        path = folder / name
        if path.is_file():
            try:
                return path, torch.load(path, "cpu", weights_only=True)
            except Exception:  # any damage at all: zip, pickle, tensor; the one before is used
                path.unlink()
    return None, {}


def has_stopped_early(checkpoint: Mapping[str, Any], patience: int) -> bool:
    """Say whether a checkpoint was made by the epoch that used up the patience."""
    states = [s for key, s in checkpoint.get("callbacks", {}).items() if "EarlyStopping" in str(key)]
    return any(int(state.get("wait_count", 0)) >= patience for state in states)
