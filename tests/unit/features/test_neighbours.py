"""Nearest neighbours and their votes, against scikit-learn; lengths of 0, NaN, fewer images than neighbours."""

import tracemalloc
from typing import Any

import numpy as np
import pytest
from sklearn.metrics.pairwise import cosine_distances
from sklearn.neighbors import KNeighborsClassifier, NearestNeighbors

from visionloop.errors import DatasetError
from visionloop.features import neighbours
from visionloop.features.neighbours import (
    Metric,
    Vote,
    compute_votes,
    compute_votes_of_others,
    find_neighbours,
    find_other_neighbours,
    measure_agreement,
    to_targets,
)

RNG = np.random.default_rng(0)
TABLE = RNG.normal(size=(300, 16)).astype(np.float32)
QUERY = RNG.normal(size=(40, 16)).astype(np.float32)
LABELS = RNG.integers(0, 3, 300)
CASES: list[tuple[Metric, Vote]] = [
    ("cosine", "uniform"),
    ("cosine", "distance"),
    ("euclidean", "uniform"),
    ("euclidean", "distance"),
]


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_neighbours_are_those_of_scikit_learn(metric: Any) -> None:
    distance_mk, row_mk = find_neighbours(QUERY, TABLE, 7, metric)
    theirs = NearestNeighbors(n_neighbors=7, algorithm="brute", metric=metric).fit(TABLE).kneighbors(QUERY)
    np.testing.assert_array_equal(row_mk, theirs[1])
    np.testing.assert_allclose(distance_mk, theirs[0], atol=1e-5)
    assert (np.diff(distance_mk, axis=1) >= 0).all()


@pytest.mark.parametrize(("metric", "vote"), CASES)
def test_votes_are_those_of_scikit_learn(metric: Metric, vote: Vote) -> None:
    distance_mk, row_mk = find_neighbours(QUERY, TABLE, 5, metric)
    ours = compute_votes(distance_mk, to_targets(LABELS, 3)[row_mk], vote)
    model = KNeighborsClassifier(5, algorithm="brute", metric=metric, weights=vote).fit(TABLE, LABELS)
    np.testing.assert_allclose(ours, model.predict_proba(QUERY), atol=1e-4)


def test_a_neighbour_at_distance_0_votes_alone() -> None:
    target_mkc = to_targets(np.array([0, 1, 1]), 2)[None]
    assert compute_votes(np.array([[0.0, 0.1, 0.1]]), target_mkc, "distance").tolist() == [[1.0, 0.0]]
    assert compute_votes(np.array([[0.0, 0.1, 0.1]]), target_mkc, "uniform") == pytest.approx(
        np.array([[1 / 3, 2 / 3]])
    )


def test_several_labels_vote_for_each_of_their_classes() -> None:
    target_mkc = np.array([[[1, 1, 0], [0, 1, 0]]], np.uint8)
    assert compute_votes(np.array([[0.2, 0.2]]), target_mkc).tolist() == [[0.5, 1.0, 0.0]]


def test_fewer_images_than_neighbours_gives_all_of_them() -> None:
    distance_mk, row_mk = find_neighbours(QUERY[:2], TABLE[:3], 10)
    assert sorted(row_mk[0]) == [0, 1, 2]
    assert distance_mk.shape == (2, 3)
    assert find_other_neighbours(TABLE[:3], 10)[1].shape == (3, 2)


def test_a_vector_of_length_0_is_at_distance_1_from_everything() -> None:
    table = TABLE[:5].copy()
    table[2] = 0
    query = np.stack([np.zeros(16, np.float32), table[0], -table[0]])
    distance_mk, row_mk = find_neighbours(query, table, 5)
    expected = cosine_distances(query, table)
    np.testing.assert_allclose(distance_mk, np.sort(expected, axis=1), atol=1e-6)
    np.testing.assert_allclose(distance_mk[0], 1.0)
    assert row_mk[1, 0] == 0
    assert distance_mk[2].max() == pytest.approx(2.0)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_huge_and_tiny_vectors_keep_their_direction(scale: float) -> None:
    far = find_neighbours((QUERY * np.float32(scale)).astype(np.float32), TABLE, 3)
    np.testing.assert_array_equal(far[1], find_neighbours(QUERY, TABLE, 3)[1])


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_not_finite_are_refused(value: float) -> None:
    broken = TABLE.copy()
    broken[3, 4] = value
    with pytest.raises(DatasetError, match="1 vectors of the table are not finite"):
        find_neighbours(QUERY, broken, 3)
    with pytest.raises(DatasetError, match="1 queries are not finite"):
        find_neighbours(broken, TABLE, 3)


def test_an_empty_table_other_lengths_and_no_neighbours_are_refused() -> None:
    with pytest.raises(DatasetError, match="there is no image to search in"):
        find_neighbours(QUERY, TABLE[:0], 3)
    with pytest.raises(DatasetError, match=r"shape \(40, 8\) for a table of shape \(300, 16\)"):
        find_neighbours(QUERY[:, :8], TABLE, 3)
    with pytest.raises(DatasetError, match="got k = 0; expected 1 or more"):
        find_neighbours(QUERY, TABLE, 0)
    with pytest.raises(DatasetError, match="1 image has no other"):
        find_other_neighbours(TABLE[:1], 3)


def test_no_query_gives_no_neighbours() -> None:
    distance_mk, row_mk = find_neighbours(QUERY[:0], TABLE, 3)
    assert distance_mk.shape == row_mk.shape == (0, 3)


def test_an_image_is_never_its_own_neighbour_even_among_equal_ones() -> None:
    table = np.concatenate([np.repeat(TABLE[:1], 6, axis=0), TABLE[:20]])
    _, row_nk = find_other_neighbours(table, 4)
    assert not (row_nk == np.arange(len(table))[:, None]).any()
    assert all(len(set(rows)) == 4 for rows in row_nk.tolist())
    assert set(row_nk[0]) <= {1, 2, 3, 4, 5, 6}


def test_votes_of_others_leave_an_image_itself_out() -> None:
    # Two groups; one image of the first is labelled as the second: alone it would outvote its neighbours.
    table = np.concatenate([RNG.normal([5, 0], 0.1, (20, 2)), RNG.normal([0, 5], 0.1, (20, 2))]).astype(np.float32)
    labels = np.array([0] * 20 + [1] * 20)
    labels[4] = 1
    votes_nc = compute_votes_of_others(*find_other_neighbours(table, 5), to_targets(labels, 2))
    assert votes_nc.shape == (40, 2)
    assert votes_nc[4, 1] == 0.0
    assert votes_nc.sum(axis=1) == pytest.approx(np.ones(40))
    assert (votes_nc.argmax(axis=1) == np.array([0] * 20 + [1] * 20)).all()


def test_neighbours_of_the_same_label_agree_and_those_of_dealt_labels_do_not() -> None:
    labels = np.repeat([0, 1], [30, 10])
    table = (np.eye(2)[labels] * 9 + RNG.normal(size=(40, 2))).astype(np.float32)
    found = find_other_neighbours(table, 5)
    agreement = measure_agreement(*found, to_targets(labels, 2))
    assert agreement is not None
    assert (agreement.share, agreement.p_value, agreement.is_weak) == (pytest.approx(1.0), 1 / 200, False)
    assert agreement.chance == pytest.approx((29 / 39 + 9 / 39) / 2, abs=0.02), "the mean over the classes"
    words = "neighbours agree with the labels in 100.0% of cases, by chance it would be "
    assert agreement.describe().startswith(words)
    dealt = measure_agreement(*found, to_targets(RNG.permutation(labels), 2))
    assert dealt is not None
    assert dealt.p_value > 0.05
    assert dealt.is_weak


def test_votes_weigh_by_distance_in_the_agreement() -> None:
    distance_nk, row_nk = np.array([[0.1, 0.3]] * 3), np.array([[1, 2], [0, 2], [0, 1]])
    agreement = measure_agreement(distance_nk, row_nk, to_targets(np.array([0, 0, 1]), 2))
    assert agreement is not None, "the class of a single image does not count"
    assert agreement.share == pytest.approx(0.75)
    assert agreement.chance == pytest.approx(0.5, abs=0.05), "where another of the class is, near or far"


def test_several_labels_agree_class_by_class() -> None:
    distance_nk, row_nk = np.ones((4, 1)), np.array([[1], [0], [3], [2]])
    target_nc = np.array([[1, 1], [1, 0], [0, 1], [0, 1]], np.uint8)
    agreement = measure_agreement(distance_nk, row_nk, target_nc)
    assert agreement is not None
    assert agreement.share == pytest.approx((2 / 2 + 2 / 3) / 2)


@pytest.mark.parametrize(
    "target_nc", [np.ones((6, 1), np.uint8), np.eye(6, dtype=np.uint8), np.zeros((6, 2), np.uint8)]
)
def test_labels_that_nobody_can_tell_apart_have_no_agreement(target_nc: Any) -> None:
    assert measure_agreement(*find_other_neighbours(TABLE[:6], 3), target_nc) is None


@pytest.mark.parametrize("counts", [(30, 30), (54, 6), (20, 20, 20)])
def test_labels_of_chance_pass_at_the_level_that_is_said(counts: tuple[int, ...]) -> None:
    """Of 300 sets whose vectors know nothing of the labels about 15 pass a test at 5 %: 4 to 29, but once in 2,000."""
    rng = np.random.default_rng(1)
    labels = np.repeat(np.arange(len(counts)), counts)
    passed = 0
    for _ in range(300):
        table = (rng.normal(size=(60, 4)) * [4, 2, 1, 1]).astype(np.float32)
        agreement = measure_agreement(*find_other_neighbours(table, 3), to_targets(labels, len(counts)))
        assert agreement is not None
        passed += agreement.p_value <= 0.05
    assert 4 <= passed <= 29


def make_clusters(number: int, d: int = 32, seed: int = 0) -> np.ndarray:
    """Vectors around 40 directions, as the embeddings of images of 40 classes."""
    rng = np.random.default_rng(seed)
    return (rng.normal(size=(40, d))[rng.integers(0, 40, number)] + 0.5 * rng.normal(size=(number, d))).astype(
        np.float32
    )


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_a_large_table_is_searched_in_pieces_with_the_same_result(metric: str, monkeypatch: pytest.MonkeyPatch) -> None:
    table, query = make_clusters(1000), make_clusters(50, seed=1)
    table[[3, 700]] = table[500]
    distance, row = neighbours.find_neighbours(query, table, 20, metric)
    monkeypatch.setattr(neighbours, "TABLE_BYTES", 4 * 32 * 7)
    other_distance, other_row = neighbours.find_neighbours(query, table, 20, metric)
    np.testing.assert_allclose(other_distance, distance, atol=1e-6)
    assert (other_row == row).mean() > 0.999
    assert neighbours.find_neighbours(table[500:501], table, 3, metric)[1].tolist() == [[3, 500, 700]]


def test_a_few_queries_are_compared_exactly_with_the_nearest_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    table, query = make_clusters(5000), make_clusters(3, seed=1)
    distance, row = neighbours.find_neighbours(query, table, 20)
    compared: list[int] = []

    def search(query_md: Any, table_nd: Any, *rest: Any) -> Any:
        compared.append(len(table_nd))
        return whole(query_md, table_nd, *rest)

    whole = neighbours._find_neighbours
    monkeypatch.setattr(neighbours, "TABLE_BYTES", 4 * 32 * 1000)
    monkeypatch.setattr(neighbours, "_find_neighbours", search)
    other_distance, other_row = neighbours.find_neighbours(query, table, 20)
    np.testing.assert_array_equal(other_row, row)
    np.testing.assert_allclose(other_distance, distance, atol=1e-6)
    assert len(compared) == 1
    assert 60 <= compared[0] < 100


@pytest.mark.parametrize("what", ["all nearly equal", "one without length", "very long", "very short"])
def test_where_one_pass_cannot_tell_the_nearest_the_search_is_as_before(what: str, monkeypatch: Any) -> None:
    table, query = make_clusters(3000), make_clusters(2, seed=1)
    if what == "all nearly equal":  # nearer to each other than numbers of 32 bits can tell by their cosines
        table = np.float32(1) + np.float32(1e-4) * table
        query = table[:2] + np.float32(1e-6)
    elif what == "one without length":
        table[5] = 0
    else:
        table[7] *= np.float32(1e25 if what == "very long" else 1e-25)
    distance, row = neighbours.find_neighbours(query, table, 9)
    monkeypatch.setattr(neighbours, "TABLE_BYTES", 4 * 32 * 500)
    monkeypatch.setattr(neighbours, "MOST_NEAR", 1000)
    assert neighbours.choose_near(query, table, 9) is None
    other_distance, other_row = neighbours.find_neighbours(query, table, 9)
    np.testing.assert_array_equal(other_row, row)
    np.testing.assert_allclose(other_distance, distance, atol=1e-6)


def test_a_large_table_has_no_more_neighbours_than_images_and_refuses_what_is_not_finite(monkeypatch: Any) -> None:
    table = make_clusters(40)
    monkeypatch.setattr(neighbours, "TABLE_BYTES", 4 * 32 * 7)
    assert neighbours.find_neighbours(table[:1], table, 50)[1].shape == (1, 40)
    table[30, 2] = np.nan
    with pytest.raises(DatasetError, match="1 vectors of the table are not finite"):
        neighbours.find_neighbours(table[:1], table, 3)


def test_the_memory_of_a_search_does_not_grow_with_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """But for the cosines of a few queries: a number for each query and row."""
    monkeypatch.setattr(neighbours, "TABLE_BYTES", 4 * 32 * 1000)
    query = make_clusters(neighbours.FEW + 1, seed=1)

    def measure(number: int) -> int:
        table = make_clusters(number)
        tracemalloc.start()
        neighbours.find_neighbours(query, table, 5)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return peak

    assert measure(32_000) < 1.5 * measure(8000)
    query = query[:2]
    assert measure(32_000) < 4 * 2 * 2 * 32_000


def test_neighbours_of_all_images_in_cells_are_nearly_all_of_the_exact_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """6,000 images in 60 cells, of which 16 are searched: about a quarter of all pairs."""
    table = make_clusters(6000)
    exact_distance, exact = neighbours.find_other_neighbours(table, 10)
    for name, value in (("CELLS_FROM", 5000), ("CELL_ROWS", 100)):
        monkeypatch.setattr(neighbours, name, value)
    told: list[tuple[int, int]] = []
    distance, found = neighbours.find_other_neighbours(table, 10, on_progress=lambda *done: told.append(done))
    assert (len(told), told[-1]) == (60, (6000, 6000))
    assert told == sorted(told)
    assert found.shape == (6000, 10)
    assert not (found == np.arange(6000)[:, None]).any()
    recall = np.mean([len({*a} & {*b}) / 10 for a, b in zip(exact.tolist(), found.tolist(), strict=True)])
    assert recall > 0.95
    assert (np.diff(distance, axis=1) >= 0).all()
    assert (distance[:, -1] >= exact_distance[:, -1] - 1e-6).all()


def test_images_that_all_look_alike_are_compared_with_some_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """One vector, and one without length: a single cell that holds everything."""
    for name, value in (("CELLS_FROM", 1000), ("CELL_ROWS", 50), ("MOST_ROWS", 200), ("BLOCK", 128)):
        monkeypatch.setattr(neighbours, name, value)
    table = np.ones((1500, 8), np.float32)
    table[7] = 0
    distance, found = neighbours.find_other_neighbours(table, 10)
    assert found.shape == (1500, 10)
    assert not (found == np.arange(1500)[:, None]).any()
    assert np.abs(np.delete(distance, 7, axis=0)).max() < 1e-6
    np.testing.assert_allclose(distance[7], 1, atol=1e-6)
