"""A linear head solved to convergence: beside scikit-learn's LogisticRegression, on the same features."""

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from visionloop.training.imbalance import compute_row_weights, compute_weights
from visionloop.training.losses import Objective, compute_loss, make_targets
from visionloop.training.ways import logistic
from visionloop.training.ways.logistic import (
    STRENGTHS,
    Regression,
    Scaling,
    Solution,
    compute_scaling,
)

NUM_FEATURES = 40
Floats = NDArray[np.float32]


def make_data(shares: list[float], apart: float, num: int = 600) -> tuple[Floats, NDArray[np.int64]]:
    """Correlated features like those of a ReLU, of some classes with these shares; `apart`: how well they differ."""
    rng = np.random.default_rng(3)
    label_n = rng.choice(len(shares), num, p=np.asarray(shares) / sum(shares))
    label_n[: len(shares)] = np.arange(len(shares))
    mixing_dd = rng.normal(size=(NUM_FEATURES, NUM_FEATURES)) * np.arange(1, NUM_FEATURES + 1)[:, None] ** -1.0
    hidden_nd = rng.normal(size=(num, NUM_FEATURES)) + apart * rng.normal(size=(len(shares), NUM_FEATURES))[label_n]
    return np.maximum(hidden_nd @ mixing_dd + 0.5, 0).astype(np.float32), label_n


DATA = {
    "separable": ([1, 1], 3.0),
    "overlapping": ([1, 1], 0.2),
    "imbalanced": ([15, 1], 0.4),
    "twenty": ([1.0] * 20, 0.8),
    "three imbalanced": ([10, 3, 1], 0.4),
}


def get_task(shares: list[float]) -> str:
    return "binary" if len(shares) == 2 else "multiclass"


def standardise(embedding_nd: Floats) -> Tensor:
    table_nd = torch.from_numpy(embedding_nd.copy())
    return compute_scaling(table_nd).apply(table_nd)


def solve(
    embedding_nd: Tensor, targets: Any, objective: Objective, strengths: Any, weights_n: Any = None
) -> list[Solution]:
    """Solve the path for classes (n), or 0 and 1 (n, k) for several labels."""
    truth = torch.from_numpy(np.asarray(targets))
    units = truth.shape[1] if truth.ndim == 2 else 1 if objective.task == "binary" else int(truth.max()) + 1
    weights = None if weights_n is None else torch.from_numpy(weights_n).float()
    regression = Regression(embedding_nd.clone(), make_targets(truth, objective.task, units), objective, weights)
    return list(regression.solve_path(strengths))


def answer(solution: Solution, embedding_nd: Tensor) -> Tensor:
    return embedding_nd @ solution.weight_ud.T + solution.bias_u


def measure(units_nu: Tensor, label_n: NDArray[np.int64], task: str) -> tuple[float, float]:
    """Return the log loss and the accuracy."""
    targets = torch.from_numpy(label_n)
    loss = compute_loss(units_nu, make_targets(targets, task, units_nu.shape[1]), Objective(task))
    answer_n = units_nu.argmax(1) if task == "multiclass" else (units_nu[:, 0] > 0).long()
    return float(loss), float((answer_n == targets).double().mean())


def measure_sklearn(model: Any, embedding_nd: Tensor, label_n: NDArray[np.int64]) -> tuple[float, float]:
    probs_nk = model.predict_proba(embedding_nd.double().numpy())
    rows = np.arange(len(label_n))
    loss = -np.log(np.maximum(probs_nk[rows, label_n], 1e-30)).mean()
    return float(loss), float((probs_nk.argmax(1) == label_n).mean())


def fit_sklearn(embedding_nd: Tensor, label_n: NDArray[np.int64], strength: float, **options: Any) -> Any:
    model = LogisticRegression(C=strength, max_iter=5000, tol=1e-8, **options)
    return model.fit(embedding_nd.double().numpy(), label_n)


@pytest.mark.parametrize("name", sorted(DATA))
@pytest.mark.parametrize("rotated", [True, False])
def test_each_strength_gives_what_scikit_learn_gives(name: str, rotated: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not rotated:
        monkeypatch.setattr(logistic, "MOST_ROTATED", NUM_FEATURES - 1)
    shares, apart = DATA[name]
    embedding_nd, label_n = make_data(shares, apart, num=1200)
    table_nd, task = standardise(embedding_nd), get_task(shares)
    train_nd, val_nd = table_nd[:600], table_nd[600:]
    strengths = (1e-4, 1e-2, 1.0)
    for solution in solve(train_nd, label_n[:600], Objective(task), strengths):
        model = fit_sklearn(train_nd, label_n[:600], solution.strength)
        assert solution.converged
        for rows, own_nd in ((slice(0, 600), train_nd), (slice(600, None), val_nd)):
            loss, accuracy = measure(answer(solution, own_nd), label_n[rows], task)
            their_loss, their_accuracy = measure_sklearn(model, own_nd, label_n[rows])
            assert loss == pytest.approx(their_loss, abs=1e-3)
            assert accuracy == pytest.approx(their_accuracy, abs=3e-3)
        torch.testing.assert_close(solution.units_nu, answer(solution, train_nd), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("kind", ["weights", "sampler"])
@pytest.mark.parametrize("name", ["imbalanced", "three imbalanced"])
def test_what_is_done_about_imbalance_is_scikit_learns_balanced(name: str, kind: str) -> None:
    """Weights in the loss, and images as often as they would be drawn: both let each class count alike."""
    shares, apart = DATA[name]
    embedding_nd, label_n = make_data(shares, apart)
    table_nd, task = standardise(embedding_nd), get_task(shares)
    counts_k = np.bincount(label_n)
    weights_2u = compute_weights(counts_k, len(label_n), task) if kind == "weights" else None
    weights_n = compute_row_weights(label_n, counts_k) if kind == "sampler" else None
    (solution,) = solve(table_nd, label_n, Objective(task, weights_2u=weights_2u), [0.1], weights_n)
    model = fit_sklearn(table_nd, label_n, 0.1, class_weight="balanced")
    ours, theirs = measure(answer(solution, table_nd), label_n, task), measure_sklearn(model, table_nd, label_n)
    assert ours == pytest.approx(theirs, abs=1e-3)
    plain = measure_sklearn(fit_sklearn(table_nd, label_n, 0.1), table_nd, label_n)
    assert abs(plain[0] - theirs[0]) > 0.01, "the weights change something"


def test_label_smoothing_and_the_focal_loss_are_made_small() -> None:
    """At the solution no small step makes it smaller: with a penalty, and of a loss that scikit-learn has not."""
    embedding_nd, label_n = make_data(*DATA["overlapping"])
    table_nd = standardise(embedding_nd)
    targets_nu = make_targets(torch.from_numpy(label_n), "binary", 1)
    objective = Objective("binary", smoothing=0.2, gamma=2.0)
    (solution,) = solve(table_nd, label_n, objective, [0.01])
    weight_ud, bias_u = solution.weight_ud.clone().requires_grad_(), solution.bias_u.clone().requires_grad_()
    loss = compute_loss(table_nd @ weight_ud.T + bias_u, targets_nu, objective)
    (loss + weight_ud.square().sum() / (2 * 0.01 * len(label_n))).backward()
    assert weight_ud.grad is not None and bias_u.grad is not None
    assert float(weight_ud.grad.abs().max()) < 3e-4
    assert float(bias_u.grad.abs().max()) < 3e-4
    (hard,) = solve(table_nd, label_n, Objective("binary"), [0.01])
    assert float((hard.weight_ud - solution.weight_ud).abs().max()) > 0.01


def test_several_labels_are_a_regression_for_each_class() -> None:
    embedding_nd, label_n = make_data([1.0] * 3, 0.5)
    table_nd = standardise(embedding_nd)
    targets_nk = np.stack([label_n == 0, label_n != 1, label_n == 2], axis=1).astype(np.uint8)
    (solution,) = solve(table_nd, targets_nk, Objective("multilabel"), [0.05])
    for number in range(3):
        model = fit_sklearn(table_nd, targets_nk[:, number], 0.05)
        np.testing.assert_allclose(
            answer(solution, table_nd)[:, number].numpy(), model.decision_function(table_nd.double().numpy()), atol=0.02
        )


def test_a_folded_head_is_the_same_function() -> None:
    embedding_nd, label_n = make_data(*DATA["three imbalanced"])
    raw_nd = torch.from_numpy(embedding_nd * 10 + 7)
    scaling = compute_scaling(raw_nd)
    table_nd = scaling.apply(raw_nd.clone())
    (solution,) = solve(table_nd, label_n, Objective("multiclass"), [0.1])
    weight_ud, bias_u = scaling.fold(solution.weight_ud, solution.bias_u)
    assert weight_ud.dtype == bias_u.dtype == torch.float32
    torch.testing.assert_close(raw_nd @ weight_ud.T + bias_u, answer(solution, table_nd), atol=1e-5, rtol=1e-5)


def test_the_worked_example_of_folding() -> None:
    scaling = Scaling(torch.tensor([4.0]), torch.tensor([2.0]))
    weight_ud, bias_u = scaling.fold(torch.tensor([[3.0]]), torch.tensor([1.0]))
    assert (weight_ud.item(), bias_u.item()) == (1.5, -5.0)
    assert scaling.apply(torch.tensor([[6.0]])).item() == 1.0


def test_features_are_standardised_but_constant_and_rare_ones_are_not_blown_up() -> None:
    rng = np.random.default_rng(0)
    features_nd = rng.normal(5, 2, (400, 3)).astype(np.float32)
    features_nd[:, 1] = 0.1
    features_nd[:, 2] = 0
    features_nd[7, 2] = 1e-6
    scaling = compute_scaling(torch.from_numpy(features_nd))
    np.testing.assert_allclose(scaling.mean_d, features_nd.mean(axis=0, dtype=np.float64), rtol=1e-6)
    assert scaling.scale_d[0] == pytest.approx(features_nd[:, 0].std(dtype=np.float64), rel=1e-6)
    usual = float(scaling.scale_d[0]) / 3**0.5
    assert scaling.scale_d[1:].tolist() == pytest.approx([1e-3 * usual] * 2, rel=1e-5)
    table_nd = scaling.apply(torch.from_numpy(features_nd))
    assert float(table_nd[:, 1:].abs().max()) < 1e-2


def test_features_that_are_all_constant_leave_the_shares_of_the_classes() -> None:
    table_nd = standardise(np.full((40, 5), 3.0, dtype=np.float32))
    label_n = np.repeat([0, 1], [30, 10])
    (solution,) = solve(table_nd, label_n, Objective("binary"), [1.0])
    assert solution.weight_ud.tolist() == [[0.0] * 5]
    assert float(solution.bias_u.sigmoid()) == pytest.approx(0.25, abs=1e-3)


@pytest.mark.parametrize("rotated", [True, False])
def test_fewer_images_than_features_and_a_class_with_one_image(rotated: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not rotated:
        monkeypatch.setattr(logistic, "MOST_ROTATED", NUM_FEATURES - 1)
    embedding_nd, _ = make_data([1.0] * 3, 1.0, num=12)
    label_n = np.array([0] * 6 + [1] * 5 + [2])
    table_nd = standardise(embedding_nd)
    for solution in solve(table_nd, label_n, Objective("multiclass"), (1e-2, 1.0)):
        model = fit_sklearn(table_nd, label_n, solution.strength)
        ours = measure(answer(solution, table_nd), label_n, "multiclass")
        assert ours == pytest.approx(measure_sklearn(model, table_nd, label_n), abs=1e-3)


def test_a_label_that_all_images_have_stays_finite() -> None:
    embedding_nd, label_n = make_data([1.0] * 2, 0.5, num=100)
    targets_nk = np.stack([np.ones(100, dtype=np.uint8), label_n.astype(np.uint8)], axis=1)
    for solution in solve(standardise(embedding_nd), targets_nk, Objective("multilabel"), STRENGTHS):
        assert torch.isfinite(solution.weight_ud).all()
        assert torch.isfinite(solution.bias_u).all()
        assert (solution.units_nu[:, 0] > 0).all()


def test_a_path_ends_where_each_strength_ends_by_itself() -> None:
    embedding_nd, label_n = make_data(*DATA["twenty"])
    table_nd = standardise(embedding_nd)
    path = solve(table_nd, label_n, Objective("multiclass"), STRENGTHS[:9])
    (alone,) = solve(table_nd, label_n, Objective("multiclass"), STRENGTHS[8:9])
    assert [solution.strength for solution in path] == list(STRENGTHS[:9])
    torch.testing.assert_close(path[-1].weight_ud, alone.weight_ud, atol=2e-3, rtol=1e-2)


def test_the_same_input_gives_the_same_bytes() -> None:
    embedding_nd, label_n = make_data(*DATA["twenty"])
    first, again = (
        solve(standardise(embedding_nd), label_n, Objective("multiclass"), STRENGTHS[:8])[-1] for _ in range(2)
    )
    assert torch.equal(first.weight_ud, again.weight_ud)
    assert torch.equal(first.bias_u, again.bias_u)


def test_evaluations_that_ran_out_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logistic, "MAX_EVALUATIONS", 4)
    embedding_nd, label_n = make_data(*DATA["twenty"])
    (solution,) = solve(standardise(embedding_nd), label_n, Objective("multiclass"), [1.0])
    assert not solution.converged
