"""A linear head solved to convergence: logistic regression with an L2 penalty, on standardised embeddings.

What is made small is that of scikit-learn's LogisticRegression:

    mean over images of their loss  +  (1 / (2 C n)) * sum of the squared weights

with the loss of the training (`losses.py`: class weights, label smoothing and the focal loss keep their meaning). The
bias is not penalised. For several labels the losses of the classes are added: each class has a regression of its own.

The method is L-BFGS (Liu and Nocedal, 1989). Embeddings are correlated, which slows it down: so it works on their
principal components, each scaled by the curvature that the loss has along it. The penalty is the same there, as
rotating the features does not change the length of the weights. Example: 5,000 embeddings of 1,280 numbers, two
classes, C = 0.1: 12 evaluations of the loss instead of 151.

Dimensions: n images, d features, r principal components, u units (1 for binary, else k classes).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from visionloop.training.losses import Objective, compute_loss

# Strong to weak, as multiples of sqrt(10): below, all answers are nearly alike; above, only the training side gains.
STRENGTHS = tuple(float(f"{10 ** (power / 2):.3g}") for power in range(-10, 5))
MAX_EVALUATIONS = 300  # of the loss and its gradient, for one C
TOLERANCE = 1e-7  # of the loss from one iteration to the next; float32 tells no more
LEAST_SCALE = 1e-3
LEAST_VARIANCE = 1e-6
BLOCK_ROWS = 4096
# Finding the components takes d^3 steps: above, a few seconds more than it saves.
MOST_ROTATED = 2048


@dataclass(frozen=True)
class Scaling:
    """The mean and the scale of each feature over the training side."""

    mean_d: Tensor
    scale_d: Tensor

    def apply(self, embedding_nd: Tensor) -> Tensor:
        """Standardise embeddings, in place."""
        return embedding_nd.sub_(self.mean_d).div_(self.scale_d)

    def fold(self, weight_ud: Tensor, bias_u: Tensor) -> tuple[Tensor, Tensor]:
        """Return the linear layer that does for embeddings as they are what this one does for standardised ones.

        Since w (x - m) / s + b = (w / s) x + (b - w m / s):  w' = w / s,  b' = b - sum(w m / s).
        Example: m = 4, s = 2, w = 3, b = 1 and x = 6. Standardised, x is 1, and 3 * 1 + 1 = 4.
        Folded, w' = 1.5 and b' = 1 - 3 * 4 / 2 = -5, and 1.5 * 6 - 5 = 4.
        """
        folded_ud = weight_ud.double() / self.scale_d.double()
        return folded_ud.float(), (bias_u.double() - folded_ud @ self.mean_d.double()).float()


def compute_scaling(embedding_nd: Tensor) -> Scaling:
    """Return the mean and the standard deviation of each feature, the latter at least a thousandth of the usual one.

    A constant feature becomes 0 then. One that hardly ever differs is not blown up: an image with an ordinary value of
    it would get an extreme answer.
    """
    total_d = embedding_nd.new_zeros(embedding_nd.shape[1], dtype=torch.float64)
    squares_d = total_d.clone()
    for start in range(0, len(embedding_nd), BLOCK_ROWS):
        block_nd = embedding_nd[start : start + BLOCK_ROWS].double()
        total_d += block_nd.sum(dim=0)
        squares_d += block_nd.square().sum(dim=0)
    mean_d = total_d / len(embedding_nd)
    variance_d = (squares_d / len(embedding_nd) - mean_d.square()).clamp_min(0.0)
    usual = float(variance_d.mean().sqrt()) or 1.0
    return Scaling(mean_d.float(), variance_d.sqrt().clamp_min(LEAST_SCALE * usual).float())


@dataclass(frozen=True)
class Solution:
    """The head that was found for a strength C, for standardised embeddings. `converged`: else the evaluations ran out.

    `units_nu` are its answers to the images that it learned from.
    """

    strength: float
    weight_ud: Tensor
    bias_u: Tensor
    units_nu: Tensor
    converged: bool


class Regression:
    """The standardised embeddings of some images, turned to their principal components, and what they should answer."""

    def __init__(
        self, embedding_nd: Tensor, targets_nu: Tensor, objective: Objective, row_weights_n: Tensor | None = None
    ) -> None:
        """Find the components. `row_weights_n`: how much each image counts, 1 on average."""
        self.targets_nu, self.objective, self.row_weights_n = targets_nu, objective, row_weights_n
        num_features = embedding_nd.shape[1]
        self.basis_dr: Tensor | None = None
        self.input_nr, self.variance_r = embedding_nd, embedding_nd.new_ones(num_features)
        if num_features <= MOST_ROTATED:
            variance_r, basis_dr = torch.linalg.eigh(embedding_nd.T @ embedding_nd / len(embedding_nd))
            kept_r = variance_r > LEAST_VARIANCE * variance_r[-1].clamp_min(1e-12)
            self.basis_dr, self.variance_r = basis_dr[:, kept_r].contiguous(), variance_r[kept_r]
            self.input_nr = embedding_nd @ self.basis_dr

    def solve_path(self, strengths: Sequence[float]) -> Iterator[Solution]:
        """Solve for each strength, beginning with the solution before: the stronger the penalty, the easier it is."""
        weight_ur = self.input_nr.new_zeros(self.targets_nu.shape[1], self.input_nr.shape[1])
        bias_u = self.input_nr.new_zeros(self.targets_nu.shape[1])
        for strength in strengths:
            weight_ur, bias_u, converged = self._solve(strength, weight_ur, bias_u)
            with torch.no_grad():
                units_nu = self._compute_units(weight_ur, bias_u)
            weight_ud = weight_ur if self.basis_dr is None else weight_ur @ self.basis_dr.T
            yield Solution(strength, weight_ud, bias_u, units_nu, converged)

    def _compute_units(self, weight_ur: Tensor, bias_u: Tensor) -> Tensor:
        return torch.addmm(bias_u, self.input_nr, weight_ur.T)

    def _solve(self, strength: float, weight_ur: Tensor, bias_u: Tensor) -> tuple[Tensor, Tensor, bool]:
        """Return the weights, the bias, and whether they stand still."""
        penalty = 1 / (strength * len(self.input_nr))
        # `compute_loss` is the mean over the classes of several labels; each shall have a regression of its own.
        times = self.targets_nu.shape[1] if self.objective.task == "multilabel" else 1
        curvature = self._measure_curvature(weight_ur, bias_u)
        scale_r, scale = (curvature * self.variance_r + penalty).rsqrt(), curvature**-0.5
        scaled_ur = (weight_ur / scale_r).requires_grad_()
        scaled_u = (bias_u / scale).requires_grad_()

        def evaluate() -> Tensor:
            optimizer.zero_grad()
            weight_ur = scaled_ur * scale_r
            units_nu = self._compute_units(weight_ur, scaled_u * scale)
            loss = compute_loss(units_nu, self.targets_nu, self.objective, row_weights_n=self.row_weights_n)
            loss = times * loss + penalty / 2 * weight_ur.square().sum()
            loss.backward()  # type: ignore[no-untyped-call]
            return loss

        optimizer = torch.optim.LBFGS(
            [scaled_ur, scaled_u],
            max_iter=MAX_EVALUATIONS,
            max_eval=MAX_EVALUATIONS,
            tolerance_grad=TOLERANCE,
            tolerance_change=TOLERANCE,
            history_size=20,
            line_search_fn="strong_wolfe",
        )
        optimizer.step(evaluate)  # type: ignore[no-untyped-call]
        num_evaluations = optimizer.state[scaled_ur]["func_evals"]
        weight_ur, bias_u = scaled_ur.detach() * scale_r, scaled_u.detach() * scale
        return weight_ur, bias_u, num_evaluations < MAX_EVALUATIONS

    def _measure_curvature(self, weight_ur: Tensor, bias_u: Tensor) -> float:
        """Return how much the loss bends with a unit, p (1 - p), on average."""
        with torch.no_grad():
            units_nu = self._compute_units(weight_ur, bias_u)
            probs_nu = units_nu.softmax(dim=1) if self.objective.task == "multiclass" else units_nu.sigmoid()
            return max(float((probs_nu * (1 - probs_nu)).mean()), 1e-6)
