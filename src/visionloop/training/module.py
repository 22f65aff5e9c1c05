"""The Lightning module: a loss, an optimizer and the epoch's figures. The network is handed in.

Dimensions: n images, u units (1 for binary, else k classes).
"""

import math
from typing import Literal

import pytorch_lightning as pl
import torch
from sklearn.metrics import f1_score
from torch import Tensor
from torch.nn import functional

from visionloop.networks.classifier import Classifier
from visionloop.params import Train
from visionloop.training.datamodule import Batch

WARM_UP_RATIO = 0.1


class ClassifierModule(pl.LightningModule):
    """Trains a classifier: one unit with binary cross-entropy for two classes, else cross-entropy.

    `learns`: all of it, or the head alone; a batch holds images or, for the head alone, embeddings.
    """

    def __init__(self, classifier: Classifier, params: Train, *, learns: Literal["all", "head"] = "all") -> None:
        super().__init__()
        self.classifier, self.params, self.learns = classifier, params, learns
        self._loss_sum = self._count = 0.0
        self._seen: list[tuple[Tensor, Tensor]] = []

    def compute_loss(self, units_nu: Tensor, labels_n: Tensor) -> Tensor:
        """Return the mean loss of a batch, in fp32."""
        if units_nu.shape[1] == 1:
            return functional.binary_cross_entropy_with_logits(units_nu.float().squeeze(1), labels_n.float())
        return functional.cross_entropy(units_nu.float(), labels_n)

    def compute_units(self, inputs: Tensor) -> Tensor:
        """Map images (n, h, w, 3) or embeddings (n, d) to units (n, u)."""
        if inputs.ndim == 2:
            return self.classifier.classify(inputs)
        units_nu, _ = self.classifier(inputs)
        return units_nu  # type: ignore[no-any-return]

    def on_train_epoch_start(self) -> None:
        """Make dropout a function of (seed, epoch), and start counting."""
        torch.manual_seed(self.params.seed * 1_000_003 + self.current_epoch)
        self._loss_sum = self._count = 0.0

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss = self.compute_loss(self.compute_units(batch.inputs), batch.targets)
        self._loss_sum += float(loss.detach()) * len(batch.targets)
        self._count += len(batch.targets)
        return loss

    def on_validation_epoch_start(self) -> None:
        self._seen = []

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self._seen.append((self.compute_units(batch.inputs).float(), batch.targets))

    def on_validation_epoch_end(self) -> None:
        units_nu = torch.cat([units for units, _ in self._seen])
        labels_n = torch.cat([labels for _, labels in self._seen])
        chosen_n = (units_nu.squeeze(1) > 0).long() if units_nu.shape[1] == 1 else units_nu.argmax(dim=1)
        f1 = f1_score(labels_n.cpu().numpy(), chosen_n.cpu().numpy(), average="macro", zero_division=0.0)
        # Logged here, since the hook at the end of the training epoch comes after the callbacks that read it.
        self.log("train/loss", self._loss_sum / max(self._count, 1.0))
        self.log("val/loss", self.compute_loss(units_nu, labels_n))
        self.log("val/accuracy", (chosen_n == labels_n).float().mean())
        self.log("val/f1", float(f1))

    def configure_optimizers(self):  # type: ignore[no-untyped-def]
        """AdamW with a short linear warm-up and a cosine to zero (Loshchilov and Hutter, 2017 and 2019)."""
        learning = self.classifier if self.learns == "all" else self.classifier.head
        optimizer = torch.optim.AdamW(
            learning.parameters(), lr=self.params.learning_rate, weight_decay=self.params.weight_decay
        )
        total = max(int(self.trainer.estimated_stepping_batches), 1)
        warm_up = max(1, int(total * WARM_UP_RATIO))

        def scale(step: int) -> float:
            if step < warm_up:
                return (step + 1) / warm_up
            return 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, total - warm_up)))

        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, scale)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
