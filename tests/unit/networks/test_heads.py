"""Neighbours that vote, against scikit-learn; a learned head moved to other classes, against its own answers."""

from typing import Any

import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier, NearestNeighbors
from torch import nn

from visionloop.networks.classifier import NeighbourHead, find_steady, map_head
from visionloop.networks.export import _export
from visionloop.predictor import _open_openvino, open_session

RNG = np.random.default_rng(7)
POINTS = (RNG.standard_normal((300, 24)) + 2).astype(np.float32)
LABELS = RNG.integers(0, 4, 300)
QUERIES = (RNG.standard_normal((50, 24)) + 2).astype(np.float32)


def make_head(points: Any = POINTS, labels: Any = LABELS, *, task: str = "multiclass", **options: Any) -> NeighbourHead:
    targets = np.eye(int(labels.max()) + 1, dtype=np.uint8)[labels] if labels.ndim == 1 else labels
    return NeighbourHead(torch.from_numpy(points), torch.from_numpy(targets), task=task, **options)


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
@pytest.mark.parametrize("k", [1, 5, 300])
def test_neighbours_and_distances_are_those_of_scikit_learn(metric: Any, k: int) -> None:
    found = make_head(num_neighbours=k, metric=metric).find(torch.from_numpy(QUERIES))
    order = found[1].argsort(dim=1)
    nearest, distance = (one.gather(1, order) for one in found)
    theirs = NearestNeighbors(n_neighbors=k, metric=metric, algorithm="brute").fit(POINTS.astype(np.float64))
    expected_distance, expected = theirs.kneighbors(QUERIES.astype(np.float64))
    assert (nearest.numpy() == expected).mean() > 0.999
    np.testing.assert_allclose(distance.numpy(), expected_distance, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
@pytest.mark.parametrize("vote", ["uniform", "distance"])
def test_shares_are_those_of_scikit_learn_as_the_smoothing_vanishes(metric: Any, vote: Any) -> None:
    head = make_head(num_neighbours=7, metric=metric, vote=vote, smoothing=1e-6)
    shares = torch.softmax(head(torch.from_numpy(QUERIES)), dim=1)
    theirs = KNeighborsClassifier(7, metric=metric, weights=vote, algorithm="brute").fit(POINTS, LABELS)
    np.testing.assert_allclose(shares.numpy(), theirs.predict_proba(QUERIES), atol=2e-4)


def test_logits_are_the_log_of_smoothed_votes() -> None:
    head = make_head(num_neighbours=5, smoothing=0.5)
    votes = head.count_votes(torch.from_numpy(QUERIES))
    assert votes.sum(dim=1).tolist() == [5.0] * 50
    expected = np.log((votes.numpy() + 0.5) / (5 + 0.5 * 4))
    np.testing.assert_allclose(head(torch.from_numpy(QUERIES)).numpy(), expected, rtol=1e-5)
    np.testing.assert_allclose(np.exp(expected).sum(axis=1), 1, rtol=1e-6)


def test_several_labels_give_the_log_odds_of_smoothed_shares() -> None:
    targets = RNG.integers(0, 2, (300, 3)).astype(np.uint8)
    head = make_head(labels=targets, task="multilabel", num_neighbours=9, smoothing=0.1)
    votes = head.count_votes(torch.from_numpy(QUERIES)).numpy()
    found = torch.sigmoid(head(torch.from_numpy(QUERIES))).numpy()
    np.testing.assert_allclose(found, (votes + 0.1) / (9 + 0.2), rtol=1e-5)
    nearest, _ = head.find(torch.from_numpy(QUERIES))
    np.testing.assert_array_equal(votes, targets[nearest.numpy()].sum(axis=1))


def test_an_image_that_is_stored_decides_alone_when_votes_go_by_distance() -> None:
    head = make_head(num_neighbours=7, vote="distance", smoothing=1e-3)
    assert torch.softmax(head(torch.from_numpy(POINTS)), dim=1).argmax(dim=1).tolist() == LABELS.tolist()


def test_its_own_vote_can_be_left_out() -> None:
    head = make_head(num_neighbours=3)
    nearest, _ = head.find(torch.from_numpy(POINTS[:40]), torch.arange(40))
    assert not (nearest == torch.arange(40).unsqueeze(1)).any()
    with_own, _ = head.find(torch.from_numpy(POINTS[:40]))
    for row in range(40):
        others = set(with_own[row].tolist()) - {row}
        assert len(others) == 2
        assert others < set(nearest[row].tolist())


def test_of_equal_points_the_first_rows_vote() -> None:
    points = np.repeat(POINTS[:2], 50, axis=0)
    head = make_head(points, np.arange(100) % 2, num_neighbours=4)
    nearest, _ = head.find(torch.from_numpy(POINTS[:2] * 3))
    assert nearest.tolist() == [[0, 1, 2, 3], [50, 51, 52, 53]]


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_far_and_empty_queries_have_finite_answers(metric: Any) -> None:
    queries = torch.tensor(np.stack([np.zeros(24), np.full(24, 1e6), np.full(24, -1e6)]), dtype=torch.float32)
    head = make_head(num_neighbours=5, metric=metric, vote="distance")
    assert torch.isfinite(head(queries)).all()
    constant = make_head(np.ones((6, 3), np.float32), np.arange(6) % 2, num_neighbours=2, metric=metric)
    assert torch.isfinite(constant(torch.ones(1, 3))).all()


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_neighbours_are_the_same_in_every_runtime(metric: Any) -> None:
    """OpenVINO has whole numbers of 32 bits only; in larger ones it took any points for the nearest."""
    pytest.importorskip("openvino")
    points = np.concatenate([POINTS, POINTS[:100]])  # ties
    head = make_head(points, RNG.integers(0, 4, 400), num_neighbours=5, metric=metric, vote="distance")
    model = _export(head, torch.zeros(2, 24), "embedding", ("logits",)).SerializeToString()
    queries = np.concatenate([QUERIES, POINTS[:30]])
    expected = head(torch.from_numpy(queries)).numpy()
    for session in (open_session(model, "m", 1), _open_openvino(model, "m", "fp32", 1)):
        np.testing.assert_allclose(session.run(["logits"], {"embedding": queries})[0], expected, atol=1e-3)


def test_more_neighbours_than_points_are_refused() -> None:
    with pytest.raises(ValueError, match="301 neighbours of 300 points"):
        make_head(num_neighbours=301)


def test_an_answer_that_hangs_by_a_thread_is_not_steady() -> None:
    points = np.array([[1, 0], [0, 1], [0.9, 0.1], [0.1, 0.9]], np.float32)
    head = make_head(points, np.array([0, 1, 0, 1]), num_neighbours=1)
    queries = torch.tensor([[1.0, 0.02], [1.0, 1.00001], [0.02, 1.0]])
    assert find_steady(head, queries).tolist() == [True, False, True]


def make_linear(rows: int, seed: int) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(6, rows)


def answer(head: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return head(x)


X = torch.from_numpy(np.random.default_rng(3).standard_normal((20, 6)).astype(np.float32))


def test_classes_are_mapped_by_name_not_by_place() -> None:
    old, new, fresh = make_linear(3, 0), make_linear(3, 1), make_linear(3, 1)
    known = map_head(new, ("b", "c", "new"), dict(old.state_dict()), ("a", "b", "c"))
    assert known == ["b", "c"]
    torch.testing.assert_close(answer(new, X)[:, :2], answer(old, X)[:, 1:])
    torch.testing.assert_close(answer(new, X)[:, 2], answer(fresh, X)[:, 2])


def test_a_third_class_keeps_what_the_single_unit_knew() -> None:
    old, new = make_linear(1, 0), make_linear(3, 1)
    assert map_head(new, ("a", "b", "c"), dict(old.state_dict()), ("a", "c")) == ["a", "c"]
    logits = answer(new, X)
    torch.testing.assert_close(logits[:, 2] - logits[:, 0], answer(old, X).squeeze(1))
    torch.testing.assert_close(logits[:, 2], -logits[:, 0])


def test_two_of_three_classes_become_a_single_unit() -> None:
    old, new = make_linear(3, 0), make_linear(1, 1)
    assert map_head(new, ("a", "c"), dict(old.state_dict()), ("a", "b", "c")) == ["a", "c"]
    torch.testing.assert_close(answer(new, X).squeeze(1), answer(old, X)[:, 2] - answer(old, X)[:, 0])


def test_a_single_unit_stays_what_it_was() -> None:
    old, new = make_linear(1, 0), make_linear(1, 1)
    map_head(new, ("a", "b"), dict(old.state_dict()), ("a", "b"))
    torch.testing.assert_close(answer(new, X), answer(old, X))


def test_nothing_known_leaves_a_fresh_head() -> None:
    for rows, classes in ((1, ("x", "y")), (3, ("x", "y", "z"))):
        new, fresh = make_linear(rows, 1), make_linear(rows, 1)
        assert map_head(new, classes, dict(make_linear(2, 0).state_dict()), ("a", "b")) == []
        torch.testing.assert_close(answer(new, X), answer(fresh, X))
