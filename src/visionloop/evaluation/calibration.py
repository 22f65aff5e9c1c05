"""Probabilities that mean what they say: a temperature, and biases, fitted on the validation side. Pure: numpy only.

    p = softmax(z / T + b)    binary and multiclass; z are the logits of an image, (k,); binary has z = [0, z1]
    p = sigmoid(z / T + b)    multilabel, each class by itself

Guo, Pleiss, Sun and Weinberger, "On calibration of modern neural networks", ICML 2017: one temperature T mends most of
the overconfidence of a network, and changes no answer. Biases b (one a class, as in their vector scaling) are fitted
only where the training weighed or drew rare classes more: such a model believes in them too often, which T cannot mend.

Imports nothing that judges or draws: this code is part of the stage `train`, and another plot must not train again.
Dimensions: n images, k classes, m the columns of a (k + 1, k + 1) system: 1/T, then a bias for each class.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from visionloop.confidence import sigmoid, softmax

FOLDS = 5
MIN_KEYS = 30  # fewer say nothing about a temperature
MAX_STEPS = 100
MOST_SHARPNESS = 100.0  # of 1 / T, either way
PENALTY = 1.0  # on (1/T - 1)^2 / 2 and b^2 / 2
NUM_BINS = 15
FIGURES = {"log_loss": "log loss", "brier": "Brier score", "ece": "calibration error"}
Kept = Literal["nothing", "temperature", "temperature and biases"]
WITHOUT: Kept = "nothing"
WAYS: tuple[tuple[Kept, bool], ...] = (("temperature", False), ("temperature and biases", True))
Truth = NDArray[np.int64] | NDArray[np.bool_]
FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]


@dataclass(frozen=True)
class Scale:
    """What logits are put through before they become probabilities. No biases is a bias of 0 for each class."""

    temperature: float = 1.0
    bias_k: NDArray[np.floating] | None = None

    def apply(self, logits_nk: NDArray[np.floating], *, several: bool) -> NDArray[np.float32]:
        """Return the probabilities (n, k) of logits. `several`: each class has its own (multilabel)."""
        scaled_nk = logits_nk.astype(np.float64) / self.temperature
        return (sigmoid if several else softmax)(scaled_nk if self.bias_k is None else scaled_nk + self.bias_k)


@dataclass(frozen=True)
class Fit:
    """The scale that was kept, and the log loss, Brier score and calibration error without it and with it.

    The figures are those of images that the scale was not fitted on (in folds). `why` says why nothing was kept.
    """

    scale: Scale
    kept: Kept
    before: dict[str, float]
    after: dict[str, float]
    why: str = ""


def fit_scale(logits_nk: NDArray[np.floating], truth: Truth, key_n: IntArray, *, with_biases: bool) -> Fit:
    """Fit a temperature, or a temperature with biases, and keep what lowers the log loss of held-out folds.

    `truth` holds classes (n,), or for several labels which ones (n, k). The images of one key are in one fold.
    """
    several = truth.ndim == 2
    targets_nk = make_targets(truth, logits_nk.shape[1])
    plain_nk = Scale().apply(logits_nk, several=several)
    before = compute_figures(plain_nk, targets_nk, several=several)
    codes_n, num_keys = number_keys(key_n)
    if num_keys < MIN_KEYS:
        why = f"{num_keys} independent validation images are too few; {MIN_KEYS} or more are needed"
        return Fit(Scale(), WITHOUT, before, before, why)
    best, kept, after = Scale(), WITHOUT, before
    for name, biased in WAYS[: 1 + with_biases]:
        held_nk = np.empty_like(plain_nk)
        for fold in range(FOLDS):
            held_n = codes_n % FOLDS == fold
            scale = solve_scale(logits_nk[~held_n], targets_nk[~held_n], several=several, with_biases=biased)
            held_nk[held_n] = scale.apply(logits_nk[held_n], several=several)
        figures = compute_figures(held_nk, targets_nk, several=several)
        if figures["log_loss"] < after["log_loss"]:
            best = solve_scale(logits_nk, targets_nk, several=several, with_biases=biased)
            kept, after = name, figures
    return Fit(best, kept, before, after, "" if kept != WITHOUT else "none lowers the log loss of held-out images")


def solve_scale(logits_nk: NDArray[np.floating], targets_nk: FloatArray, *, several: bool, with_biases: bool) -> Scale:
    """Minimise the log loss over 1/T, and over the biases if wanted. It is convex in both: Newton's method, damped.

    A small penalty holds them near 1 and 0, as a prior of standard deviation 1. It weighs less than one image, so many
    images overrule it. Without it a side without a mistake would make T go to 0, and a class that does not occur there
    would get a bias without end. (Platt 1999 smooths the targets instead. Of a model that is right in 99 of 100 images
    that makes T 50 % too large with 300 images, and 16 % with 1,500.)
    """
    inputs_nk: FloatArray = np.asarray(logits_nk, np.float64)
    num_classes = inputs_nk.shape[1]
    start_m = np.array([1.0, *[0.0] * num_classes])
    point_m, free = start_m, num_classes + 1 if with_biases else 1

    def compute_loss(point_m: FloatArray) -> float:
        loss = _compute_loss(point_m[0] * inputs_nk + point_m[1:], targets_nk, several=several)
        return loss + PENALTY * float(((point_m - start_m) ** 2).sum()) / 2

    for _ in range(MAX_STEPS):
        gradient_m, hessian_mm = _differentiate(inputs_nk, targets_nk, point_m, several=several)
        gradient_m, hessian_mm = gradient_m + PENALTY * (point_m - start_m), hessian_mm + PENALTY * np.eye(len(point_m))
        step_m = np.zeros(num_classes + 1)
        step_m[:free] = np.linalg.solve(hessian_mm[:free, :free], gradient_m[:free])
        lower_m = _step(point_m, step_m, compute_loss)
        if lower_m is None:
            break
        point_m = lower_m
    temperature = float(f"{1 / point_m[0]:.6g}")
    return Scale(temperature, np.round(point_m[1:], 6) + 0.0 if with_biases else None)


def _step(point_m: FloatArray, step_m: FloatArray, compute_loss: Callable[[FloatArray], float]) -> FloatArray | None:
    """Return the point after a step, halved until the loss falls; None where it no longer does."""
    loss = compute_loss(point_m)
    for halvings in range(30):
        found_m: FloatArray = point_m - step_m / 2.0**halvings
        found_m[0] = np.clip(found_m[0], 1 / MOST_SHARPNESS, MOST_SHARPNESS)
        if compute_loss(found_m) < loss - 1e-12 * abs(loss):
            return found_m
    return None


def _compute_loss(scaled_nk: FloatArray, targets_nk: FloatArray, *, several: bool) -> float:
    """Return the summed log loss of logits, without an exponential that overflows."""
    if several:
        return float((np.logaddexp(0.0, scaled_nk) - targets_nk * scaled_nk).sum())
    peak_n1 = scaled_nk.max(axis=1, keepdims=True)
    normal_n = np.log(np.exp(scaled_nk - peak_n1).sum(axis=1)) + peak_n1[:, 0]
    return float(normal_n.sum() - (targets_nk * scaled_nk).sum())


def _differentiate(
    logits_nk: FloatArray, targets_nk: FloatArray, point_m: FloatArray, *, several: bool
) -> tuple[FloatArray, FloatArray]:
    """Return gradient (m,) and Hessian (m, m) of the summed log loss in (1/T, b)."""
    scaled_nk = point_m[0] * logits_nk + point_m[1:]
    probs_nk = (sigmoid if several else softmax)(scaled_nk).astype(np.float64)
    off_nk = probs_nk - targets_nk
    gradient_m = np.concatenate([[(off_nk * logits_nk).sum()], off_nk.sum(axis=0)])
    if several:
        spread_nk = probs_nk * (1 - probs_nk)
        weighed_nk, square_kk = spread_nk * logits_nk, np.diag(spread_nk.sum(axis=0))
    else:
        mean_n1 = (probs_nk * logits_nk).sum(axis=1, keepdims=True)
        weighed_nk = probs_nk * (logits_nk - mean_n1)
        square_kk = np.diag(probs_nk.sum(axis=0)) - probs_nk.T @ probs_nk
    cross_k = weighed_nk.sum(axis=0)
    first = np.concatenate([[(weighed_nk * logits_nk).sum()], cross_k])
    return gradient_m, np.vstack([first, np.column_stack([cross_k, square_kk])])


def compute_figures(probs_nk: NDArray[np.floating], targets_nk: FloatArray, *, several: bool) -> dict[str, float]:
    """Return the mean log loss, the Brier score (Brier 1950) and the expected calibration error (Guo et al. 2017).

    The Brier score of one label an image is the squared error summed over the classes; for two classes half of that,
    the squared error of one of them. Several labels: means over images and classes.
    """
    probs_nk = np.asarray(probs_nk, np.float64)
    right_nk = np.where(targets_nk > 0, probs_nk, 1 - probs_nk) if several else probs_nk[targets_nk > 0]
    losses = -np.log(np.clip(right_nk, np.finfo(np.float64).eps, 1.0))
    square_nk = (probs_nk - targets_nk) ** 2
    num_classes = targets_nk.shape[1]
    if several:
        brier, confidence, hits = square_nk.mean(), probs_nk.ravel(), targets_nk.ravel()
    else:
        brier = square_nk.sum(axis=1).mean() / (2 if num_classes == 2 else 1)
        answer_n = probs_nk.argmax(axis=1)
        rows_n = np.arange(len(answer_n))
        confidence, hits = probs_nk[rows_n, answer_n], targets_nk[rows_n, answer_n]
    return {
        "log_loss": round(float(losses.mean()), 6),
        "brier": round(float(brier), 6),
        "ece": round(compute_ece(confidence, hits), 6),
    }


def compute_ece(confidence_n: NDArray[np.floating], hits_n: NDArray[np.floating]) -> float:
    """Return the expected calibration error over 15 bins of equal width: mean |confidence - accuracy| by count."""
    bin_n = np.minimum((confidence_n * NUM_BINS).astype(int), NUM_BINS - 1)
    gap_b = np.bincount(bin_n, weights=confidence_n - hits_n, minlength=NUM_BINS)
    return float(np.abs(gap_b).sum() / len(confidence_n))


def make_targets(truth: Truth, num_classes: int) -> FloatArray:
    """Return the truth as 0 and 1, (n, k)."""
    if truth.ndim == 2:
        return truth.astype(np.float64)
    return np.asarray(np.arange(num_classes) == truth[:, None], dtype=np.float64)


def number_keys(key_n: IntArray) -> tuple[IntArray, int]:
    """Return the keys of images as 0, 1, ... in the order in which they first occur, and how many there are."""
    _, first_g, codes_n = np.unique(key_n, return_index=True, return_inverse=True)
    place_g = np.argsort(np.argsort(first_g))
    return place_g[codes_n].astype(np.int64), len(first_g)
