"""The exponential moving average of the weights: what is validated, kept as the best, and exported.

After each step: average = d average + (1 - d) weights, with d = min(decay, (1 + t) / (10 + t)) at step t, so that the
first steps do not weigh on short trainings (as in TensorFlow's ExponentialMovingAverage). The running means and
variances of batch normalisation are averaged alike; counters are copied.
"""

from collections.abc import Sequence

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import WeightAveraging
from torch import Tensor


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
