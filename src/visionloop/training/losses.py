"""The loss of a training (cross-entropy), batches of mixed images (mixup, CutMix), and an epoch's figures. Pure.

Targets are distributions ("soft" targets), so smoothing and mixing are the same for all tasks. A unit of `binary` or
`multilabel` is the logit of "yes"; the units of `multiclass` go through a softmax.

    train/loss           what was made small, with its weights, smoothing and mixing
    train/accuracy       of the images as they were learned from: augmented, and a mixed one by its own label
    train/learning_rate  the head's, at the epoch's last step
    val/loss             the log loss (cross-entropy), without weights or smoothing: alike in all runs, so they compare
    val/accuracy         share of right answers; several labels: share of images with all of them right
    val/f1               macro: the mean over the classes that occur, as `evaluate` reports it
    val/map              several labels only: mean average precision over the classes that occur

Dimensions: n images, k classes, u units (1 for binary, else k), 2 the answers no and yes, h height, w width.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from visionloop.evaluation.label_metrics import make_macro_f1, make_map
from visionloop.evaluation.metrics import compute_macro_f1


@dataclass(frozen=True)
class Mix:
    """How a batch is mixed: each image keeps `share` of itself, the rest comes from its partner.

    For CutMix `box` is the part of the image that the partner fills.
    """

    partner_n: tuple[int, ...]
    share: float
    box: tuple[int, int, int, int] | None = None  # top, bottom, left, right


def draw_mix(rng: np.random.Generator, shape_nhw: tuple[int, int, int], *, mixup: float, cutmix: float) -> Mix:
    """Draw how a batch is mixed. `mixup` and `cutmix` are the alpha of Beta(alpha, alpha); 0 is off.

    With both on, each batch uses one of them at random. All images of a batch have the same share, as in the authors'
    code. A box may reach beyond the edge of the image; the share is computed from the part inside.
    """
    num, height, width = shape_nhw
    is_cut = cutmix > 0 and (mixup <= 0 or rng.random() < 0.5)
    share = float(rng.beta(cutmix, cutmix) if is_cut else rng.beta(mixup, mixup))
    partner_n = tuple(int(i) for i in rng.permutation(num))
    if not is_cut:
        return Mix(partner_n, share)
    side = float(np.sqrt(1 - share))
    centre_y, centre_x = rng.integers(height), rng.integers(width)
    top, bottom = _cut(int(centre_y), int(height * side), height)
    left, right = _cut(int(centre_x), int(width * side), width)
    return Mix(partner_n, 1 - (bottom - top) * (right - left) / (height * width), (top, bottom, left, right))


def _cut(centre: int, length: int, end: int) -> tuple[int, int]:
    return max(0, centre - length // 2), min(end, centre - length // 2 + length)


def mix_images(images_nhwc: Tensor, mix: Mix) -> Tensor:
    """Mix images of 0 to 255: mixup gives float32, CutMix keeps the type."""
    partner_n = torch.tensor(mix.partner_n, device=images_nhwc.device)
    if mix.box is None:
        images_nhwc = images_nhwc.to(torch.float32)
        return images_nhwc * mix.share + images_nhwc[partner_n] * (1 - mix.share)
    top, bottom, left, right = mix.box
    mixed = images_nhwc.clone()
    mixed[:, top:bottom, left:right] = images_nhwc[partner_n, top:bottom, left:right]
    return mixed


def mix_targets(targets_nu: Tensor, mix: Mix) -> Tensor:
    """Mix distributions (n, u) in the same shares as the images."""
    partner_n = torch.tensor(mix.partner_n, device=targets_nu.device)
    return targets_nu * mix.share + targets_nu[partner_n] * (1 - mix.share)


@dataclass(frozen=True)
class Objective:
    """The loss of a training.

    `smoothing` is the share of a target that is spread over all answers (Szegedy et al., 2016). With `gamma` above 0 it
    is the focal loss (Lin et al., 2017): easy answers count less. `weights_2u` are the weights of the answers: row 1
    for yes, row 0 for no. `multiclass` uses only row 1, the weight of each class.
    """

    task: str
    smoothing: float = 0.0
    gamma: float = 0.0
    weights_2u: tuple[tuple[float, ...], tuple[float, ...]] | None = None


def make_targets(targets: Tensor, task: str, num_units: int) -> Tensor:
    """Turn classes (n), or 0 and 1 (n, k), into distributions (n, u) of float32."""
    if task == "multiclass":
        return functional.one_hot(targets.long(), num_units).float()
    return targets.float().reshape(len(targets), num_units)


def smooth_targets(targets_nu: Tensor, task: str, smoothing: float) -> Tensor:
    """Spread a share of each target evenly over its answers: the k classes, or no and yes.

    Example with smoothing 0.1: the target 1 of `binary` becomes 0.95, and (1, 0) of `multiclass` (0.95, 0.05).
    """
    answers = targets_nu.shape[1] if task == "multiclass" else 2
    return targets_nu * (1 - smoothing) + smoothing / answers


def compute_loss(
    units_nu: Tensor, targets_nu: Tensor, objective: Objective, *, row_weights_n: Tensor | None = None
) -> Tensor:
    """Return the mean loss of n images, in float32. For `multilabel` it is the mean over classes too.

    It is divided by the number of images, not by the sum of weights, so a batch with rare classes has a larger loss.
    `row_weights_n`: how much each image counts.
    """
    units_nu, targets_nu = units_nu.float(), targets_nu.float()
    if objective.smoothing:
        targets_nu = smooth_targets(targets_nu, objective.task, objective.smoothing)
    if objective.task == "multiclass":
        yes_nu = _weigh(targets_nu, functional.log_softmax(units_nu, dim=1), objective, yes=True)
        loss_n = yes_nu.sum(dim=1)
    else:
        yes_nu = _weigh(targets_nu, functional.logsigmoid(units_nu), objective, yes=True)
        loss_n = (yes_nu + _weigh(1 - targets_nu, functional.logsigmoid(-units_nu), objective, yes=False)).mean(dim=1)
    return loss_n.mean() if row_weights_n is None else (loss_n * row_weights_n).mean()


def _weigh(targets_nu: Tensor, log_probs_nu: Tensor, objective: Objective, *, yes: bool) -> Tensor:
    """Return -w y (1 - p)^gamma log p for each answer."""
    loss_nu = -targets_nu * log_probs_nu
    if objective.gamma:
        # 1 - p is -expm1(log p). It is kept above 0, where a power below 1 has an infinite derivative.
        rest_nu = (-torch.expm1(log_probs_nu)).clamp_min(1e-6)
        loss_nu = loss_nu * rest_nu**objective.gamma
    if objective.weights_2u is not None:
        loss_nu = loss_nu * torch.tensor(objective.weights_2u[int(yes)], device=loss_nu.device)
    return loss_nu


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
