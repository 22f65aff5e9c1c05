"""The figures of an epoch: what they are called, and how the validation side's are worked out. Pure.

    train/loss           what was made small, with its weights, smoothing and mixing
    train/accuracy       of the images as they were learned from: augmented, and a mixed one by its own label
    train/learning_rate  the head's, at the epoch's last step
    val/loss             the log loss (cross-entropy), without weights or smoothing: alike in all runs, so they compare
    val/accuracy         share of right answers; several labels: share of images with all of them right
    val/f1               macro: the mean over the classes that occur, as `evaluate` reports it
    val/map              several labels only: mean average precision over the classes that occur

Dimensions: n images, k classes, u units (1 for binary, else k).
"""

import numpy as np
import torch
from torch import Tensor

from visionloop.evaluation.label_metrics import make_macro_f1, make_map
from visionloop.evaluation.metrics import compute_macro_f1
from visionloop.training.losses import Objective, compute_loss, make_targets


def choose_answers(units_nu: Tensor, task: str) -> Tensor:
    """Return the answers: classes (n), or 0 and 1 (n, k) for several labels; yes from a probability of one half."""
    if task == "multiclass":
        return units_nu.argmax(dim=1)
    yes_nu = (units_nu > 0).long()
    return yes_nu if task == "multilabel" else yes_nu.squeeze(1)


def count_right(units_nu: Tensor, targets: Tensor, task: str) -> Tensor:
    """Return how many of n images got the right answer; of several labels, all of them right."""
    right = choose_answers(units_nu, task) == targets
    return right.all(dim=1).sum() if right.ndim == 2 else right.sum()


def compute_figures(units_nu: Tensor, targets: Tensor, task: str) -> dict[str, float]:
    """Return the validation figures of units (n, u) against classes (n), or 0 and 1 (n, k) for several labels."""
    units_nu, targets = units_nu.float().cpu(), targets.cpu()
    loss = compute_loss(units_nu, make_targets(targets, task, units_nu.shape[1]), Objective(task))
    answers = choose_answers(units_nu, task)
    figures = {
        "val/loss": float(loss),
        "val/accuracy": float(count_right(units_nu, targets, task)) / max(len(targets), 1),
    }
    if task != "multilabel":
        num_classes = max(2, units_nu.shape[1])
        return figures | {
            "val/f1": float(compute_macro_f1(targets[None].numpy(), answers[None].numpy(), num_classes)[0])
        }
    truth_nk, every_1n = targets.numpy().astype(bool), np.arange(len(targets))[None]
    figures["val/f1"] = float(make_macro_f1(truth_nk, answers.numpy().astype(bool))(every_1n)[0])
    figures["val/map"] = _compute_map(units_nu, truth_nk, every_1n)
    return figures


def _compute_map(units_nk: Tensor, truth_nk: np.ndarray, every_1n: np.ndarray) -> float:
    """Mean average precision; 0 where no class occurs, NaN if a unit is not finite."""
    if not torch.isfinite(units_nk).all():
        return float("nan")
    return float(make_map(truth_nk, units_nk.numpy())(every_1n)[0]) if truth_nk.any() else 0.0
