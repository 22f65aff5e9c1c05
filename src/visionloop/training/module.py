"""The Lightning module: what a step does, the averaged weights, the epoch's figures. The network is handed in.

All randomness of a step (dropout, mixing) is a function of (seed, epoch, step, rank): a training that goes on from a
checkpoint draws what it would have drawn.

Dimensions: n images, u units (1 for binary, else k classes).

After each step: average = d average + (1 - d) weights, with d = min(decay, (1 + t) / (10 + t)) at step t, so that the
first steps do not weigh on short trainings (as in TensorFlow's ExponentialMovingAverage). The running means and
variances of batch normalisation are averaged alike; counters are copied.
"""

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import WeightAveraging
from torch import Tensor
from torch.optim.lr_scheduler import ReduceLROnPlateau

from visionloop.networks.classifier import Classifier
from visionloop.params import Train
from visionloop.training.batches import Batch
from visionloop.training.groups import make_optimizer, make_schedule, step_plateau
from visionloop.training.imbalance import ImbalancePlan, plan_imbalance
from visionloop.training.job import Job
from visionloop.training.losses import (
    Objective,
    compute_figures,
    compute_loss,
    count_right,
    draw_mix,
    make_targets,
    mix_images,
    mix_targets,
)
from visionloop.training.ranks.world import gather_rows

Learns = Literal["all", "head"]


def compute_decay(decay: float, step: int) -> float:
    """Return the decay of the average at step 1, 2, ...: `decay`, but less at the start."""
    return min(decay, (1 + step) / (10 + step))


class MovingAverage(WeightAveraging):
    """Lightning's weight averaging with a decay that warms up; kept whole in checkpoints.

    A checkpoint's `state_dict` holds the average, `current_model_state` the weights that go on learning.
    """

    def __init__(self, decay: float) -> None:
        @torch.no_grad()
        def average(averages: Sequence[Tensor], weights: Sequence[Tensor], num_averaged: Tensor | int) -> None:
            if not averages[0].is_floating_point():
                torch._foreach_copy_(list(averages), list(weights))
                return
            rest = 1 - compute_decay(decay, int(num_averaged))
            torch._foreach_lerp_(list(averages), list(weights), rest)

        super().__init__(use_buffers=True, multi_avg_fn=average)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Make the average where the weights are going to be: Lightning moves them there only after this."""
        self._device = trainer.strategy.root_device
        super().setup(trainer, pl_module, stage)


def make_module(job: Job, run_id: str, classifier: Classifier, *, learns: Learns = "all") -> "ClassifierModule":
    """Return the module of a job; tell and log what is done about imbalance. Raises TrackingError."""
    plan = plan_imbalance(job)
    if job.world.is_first:
        announce_imbalance(job, run_id, plan)
        if job.params.train.way == "finetune":
            job.watcher.tell(describe_finetune(job.params.train))
    return ClassifierModule(classifier, job.params.train, learns=learns, plan=plan)


def announce_imbalance(job: Job, run_id: str, plan: ImbalancePlan) -> None:
    """Tell and tag what is done about imbalance. Raises TrackingError."""
    job.watcher.tell(plan.sentence)
    job.tracking.set_tags(run_id, plan.to_tags())


def make_objective(section: Train, task: str, plan: ImbalancePlan | None) -> Objective:
    """Return the loss that the parameters and the plan ask for."""
    gamma, weights_2u = (plan.gamma, plan.weights_2u) if plan else (0.0, None)
    return Objective(task, smoothing=section.label_smoothing, gamma=gamma, weights_2u=weights_2u)


def describe_finetune(section: Train) -> str:
    """Say which layers learn when, and how fast."""
    first = section.learning_rate * section.backbone_rate
    rates = f"rates from {first:g} (first layers) to {section.learning_rate:g} (head)"
    if not section.frozen_epochs:
        return f"finetune: all layers, {rates}"
    if section.frozen_epochs >= section.max_epochs:
        return f"finetune: the head alone in all {section.max_epochs} epochs (train.frozen_epochs), the backbone frozen"
    return f"finetune: the head alone for {section.frozen_epochs} epochs, then all layers, {rates}"


class ClassifierModule(pl.LightningModule):
    """Trains a classifier for its task.

    `learns`: all of it, or the head alone; a batch holds images or, for the head alone, embeddings. In the first
    `frozen_epochs` of `finetune` the backbone neither learns nor updates its batch-norm statistics.

    `val_units_nu`, `val_targets` and `val_rows_n` are the last validation's, of all ranks, in the order of the rows.
    """

    val_units_nu: Tensor
    val_targets: Tensor
    val_rows_n: Tensor

    def __init__(
        self, classifier: Classifier, params: Train, *, learns: Learns = "all", plan: ImbalancePlan | None = None
    ) -> None:
        super().__init__()
        self.classifier, self.params, self.learns = classifier, params, learns
        self.objective = make_objective(params, classifier.task, plan)
        self._totals = torch.zeros(3, dtype=torch.float64)  # of the epoch: loss, right answers, images
        self._rate = 0.0
        self._seen: list[tuple[Tensor, Tensor, Tensor]] = []
        self.val_units_nu, self.val_targets, self.val_rows_n = (torch.empty(0) for _ in range(3))

    @property
    def backbone_is_frozen(self) -> bool:
        """Whether this is one of the first epochs of a fine-tuning, in which only the head learns."""
        return self.params.way == "finetune" and self.current_epoch < self.params.frozen_epochs

    def compute_units(self, inputs: Tensor) -> Tensor:
        """Map images (n, h, w, 3) or embeddings (n, d) to units (n, u)."""
        if inputs.ndim == 2:
            return self.classifier.classify(inputs)
        # Among several ranks every parameter needs a gradient, or they would wait for it: there it is dropped later.
        if self.training and self.backbone_is_frozen and self._is_alone:
            with torch.no_grad():
                embedding_nd = self.classifier.embed(inputs)
            return self.classifier.classify(embedding_nd)
        units_nu, _ = self.classifier(inputs)
        return units_nu  # type: ignore[no-any-return]

    def compute_batch(self, batch: Batch, batch_idx: int) -> tuple[Tensor, Tensor]:
        """Return the loss of a training batch and its units (n, u), mixed if the parameters say so. Seeds torch."""
        inputs, mix = batch.inputs, None
        rng = np.random.default_rng([self.params.seed, self.current_epoch, batch_idx, self.global_rank])
        # For dropout. Once an epoch would not do: loaders draw from torch too, at other moments after a resume.
        torch.manual_seed(int(rng.integers(2**63)))
        if inputs.ndim == 4 and (self.params.mixup or self.params.cutmix):
            shape = (inputs.shape[0], inputs.shape[1], inputs.shape[2])
            mix = draw_mix(rng, shape, mixup=self.params.mixup, cutmix=self.params.cutmix)
            inputs = mix_images(inputs, mix)
        units_nu = self.compute_units(inputs)
        targets_nu = make_targets(batch.targets, self.classifier.task, units_nu.shape[1])
        if mix is not None:
            targets_nu = mix_targets(targets_nu, mix)
        return compute_loss(units_nu, targets_nu, self.objective), units_nu

    def on_train_epoch_start(self) -> None:
        """Freeze or thaw the backbone, and start counting."""
        if self.learns == "all":
            self.classifier.backbone.train(not self.backbone_is_frozen)
        self._totals = torch.zeros(3, dtype=torch.float64, device=self.device)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss, units_nu = self.compute_batch(batch, batch_idx)
        # Added up where they are: reading them at each step would make a GPU wait.
        num = len(batch.targets)
        right = count_right(units_nu.detach(), batch.targets, self.classifier.task)
        self._totals += torch.stack(
            [loss.detach().double() * num, right.double(), torch.full_like(right, num).double()]
        )
        return loss

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Keep the head's rate for the epoch's figures; among several ranks drop the gradients of a frozen backbone."""
        self._rate = float(optimizer.param_groups[-1]["lr"])
        if self.backbone_is_frozen and not self._is_alone:
            for parameter in self.classifier.backbone.parameters():
                parameter.grad = None

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        """End an epoch that has no validation: here, since the next hook comes after callbacks that read figures."""
        if self.params.on == "all" and self.trainer.is_last_batch:
            self._end_epoch(self._compute_train_figures())

    def on_validation_epoch_start(self) -> None:
        self._seen = []

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self._seen.append((self.compute_units(batch.inputs).float(), batch.targets, batch.rows_n))

    def on_validation_epoch_end(self) -> None:
        units_nu, targets, rows_n = (torch.cat(parts) for parts in zip(*self._seen, strict=True))
        self._seen = []
        gathered = gather_rows(units_nu, targets, rows_n)
        self.val_units_nu, self.val_targets, self.val_rows_n = (part.cpu() for part in gathered)
        figures = compute_figures(self.val_units_nu, self.val_targets, self.classifier.task)
        self._end_epoch(self._compute_train_figures() | figures)

    def configure_optimizers(self):  # type: ignore[no-untyped-def]
        optimizer = make_optimizer(self.classifier, self.params, self.learns)
        scheduler = make_schedule(optimizer, self.params, max(int(self.trainer.estimated_stepping_batches), 1))
        if isinstance(scheduler, ReduceLROnPlateau):
            config = {"interval": "epoch", "monitor": self.params.monitor, "strict": False}
        else:
            config = {"interval": "step"}
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, **config}}

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        """Step a schedule; the plateau was stepped with the epoch's figures: Lightning comes after the checkpoint."""
        if not isinstance(scheduler, ReduceLROnPlateau):
            scheduler.step()

    def configure_callbacks(self) -> list[pl.Callback]:
        """Return the moving average of the weights, if there is to be one."""
        return [MovingAverage(self.params.ema)] if self.params.ema else []

    @property
    def _is_alone(self) -> bool:
        return self._trainer is None or self._trainer.world_size == 1

    def _compute_train_figures(self) -> dict[str, float]:
        totals = self._totals if self._is_alone else self.trainer.strategy.reduce(self._totals, reduce_op="sum")
        loss, right, num = (float(total) for total in totals)
        shares = {"train/loss": loss / max(num, 1.0), "train/accuracy": right / max(num, 1.0)}
        return {**shares, "train/learning_rate": self._rate}

    def _end_epoch(self, figures: dict[str, float]) -> None:
        """Log the figures, before anything reads them or writes a checkpoint."""
        for name, figure in figures.items():
            self.log(name, figure, on_step=False, on_epoch=True, batch_size=1)
        step_plateau(self.lr_schedulers(), figures[self.params.monitor])
