"""Intervals of macro F1 and its kin: their coverage by simulation, and the bound of a flawless test."""

import numpy as np
import pytest
from sklearn import metrics as reference

from visionloop.evaluation.counts import (
    balanced_accuracy,
    compute_count_interval,
    compute_flawless_bound,
    macro_f1,
    make_counts,
    make_label_counts,
)

NUM_TESTS = 1000


def make_truth(num_classes, accuracy, generator):
    """The probability of each answer for each class: recalls differ, and some confusions are frequent."""
    recall_k = np.clip(accuracy + 1.2 * (1 - accuracy) * generator.uniform(-1, 1, num_classes), 0.05, 0.995)
    answers_kk = generator.dirichlet(np.full(num_classes, 0.3), num_classes)
    np.fill_diagonal(answers_kk, 0)
    answers_kk *= ((1 - recall_k) / answers_kk.sum(axis=1))[:, None]
    np.fill_diagonal(answers_kk, recall_k)
    return answers_kk


def compute_truth(figure, cells_kk):
    return float(figure(np.diag(cells_kk)[None], cells_kk.sum(axis=1)[None], cells_kk.sum(axis=0)[None])[0])


def simulate(figure, num_classes, a_class, accuracy, *, is_fixed, number=NUM_TESTS):
    """Return the share of simulated test sets whose interval holds the truth: class sizes fixed, or drawn."""
    generator = np.random.default_rng([num_classes, a_class, round(100 * accuracy), is_fixed])
    answers_kk = make_truth(num_classes, accuracy, generator)
    truth = compute_truth(figure, answers_kk * 1e6)
    total = num_classes * a_class
    covered = told = 0
    for _ in range(number):
        if is_fixed:
            cells_kk = generator.multinomial(a_class, answers_kk)
        else:
            cells_kk = generator.multinomial(total, answers_kk.ravel() / num_classes).reshape(answers_kk.shape)
        labels_n, chosen_n = np.repeat(np.argwhere(cells_kk >= 0), cells_kk.ravel(), axis=0).T
        found = compute_count_interval(figure, make_counts(labels_n, chosen_n, num_classes, np.arange(total)))
        if found.low is not None:
            told += 1
            covered += found.low <= truth <= found.high
    return covered / told


@pytest.mark.parametrize("is_fixed", [True, False], ids=["sizes fixed", "sizes drawn"])
@pytest.mark.parametrize("accuracy", [0.6, 0.9])
@pytest.mark.parametrize(("num_classes", "a_class"), [(10, 10), (4, 60)])
def test_the_interval_of_macro_f1_covers_the_truth(num_classes, a_class, accuracy, is_fixed):
    assert 0.92 <= simulate(macro_f1, num_classes, a_class, accuracy, is_fixed=is_fixed) <= 0.985


@pytest.mark.parametrize("is_fixed", [True, False], ids=["sizes fixed", "sizes drawn"])
def test_the_interval_of_macro_f1_covers_the_truth_with_many_small_classes(is_fixed):
    assert 0.92 <= simulate(macro_f1, 120, 10, 0.8, is_fixed=is_fixed, number=300) <= 0.99


@pytest.mark.long
@pytest.mark.parametrize("figure", [macro_f1, balanced_accuracy])
@pytest.mark.parametrize("is_fixed", [True, False], ids=["sizes fixed", "sizes drawn"])
@pytest.mark.parametrize("accuracy", [0.3, 0.6, 0.8, 0.9, 0.95, 0.98])
@pytest.mark.parametrize(("num_classes", "a_class"), [(10, 10), (120, 10), (4, 60), (2, 100), (30, 100)])
def test_intervals_cover_the_truth_everywhere(figure, num_classes, a_class, accuracy, is_fixed):
    assert 0.91 <= simulate(figure, num_classes, a_class, accuracy, is_fixed=is_fixed) <= 0.995


def test_with_fewer_than_five_keys_a_class_there_is_no_interval():
    labels_n = np.repeat([0, 1], [30, 4])
    few = compute_count_interval(macro_f1, make_counts(labels_n, labels_n, 3, np.arange(34)))
    assert (few.value, few.low, few.high) == (1.0, None, None)
    labels_n = np.repeat([0, 1], [30, 5])
    enough = compute_count_interval(macro_f1, make_counts(labels_n, labels_n, 3, np.arange(35)))
    assert (enough.low, enough.high) == pytest.approx((0.7391, 1.0), abs=1e-4)
    films = compute_count_interval(macro_f1, make_counts(labels_n, labels_n, 3, np.arange(35) // 2))
    assert films.low is None
    labels_n = np.repeat(np.arange(10), [4] + [6] * 9)
    assert compute_count_interval(macro_f1, make_counts(labels_n, labels_n, 10, np.arange(58))).low > 0.9


def test_the_bound_of_a_flawless_test_is_the_lowest_mean_that_is_likely_enough():
    assert compute_flawless_bound(np.array([30.0]), 30) == pytest.approx(0.025 ** (1 / 30))
    assert compute_flawless_bound(np.array([15.0, 15.0]), 30) == pytest.approx(0.025 ** (1 / 30))
    grid = np.linspace(0.001, 1, 1000)
    one, two = np.meshgrid(grid, grid)
    likely = 30 * np.log(one) + 5 * np.log(two) >= np.log(0.025)
    assert compute_flawless_bound(np.array([30.0, 5.0]), 35) == pytest.approx(((one + two) / 2)[likely].min(), abs=1e-3)


def test_flawless_films_of_many_classes_tell_no_more_than_so_many_films():
    labels_n = np.tile(np.arange(50), 40)
    films = compute_count_interval(macro_f1, make_counts(labels_n, labels_n, 50, np.repeat(np.arange(40), 50)))
    assert films.low == pytest.approx(0.025 ** (1 / 40))


def test_shared_rows_give_the_interval_of_single_ones():
    generator = np.random.default_rng(0)
    labels_n = np.arange(200) % 5
    chosen_n = np.where(generator.random(200) < 0.3, generator.integers(0, 5, 200), labels_n)
    shared = make_counts(labels_n, chosen_n, 5, np.arange(200))
    assert len(shared.times_g) < 30
    single = make_label_counts(np.eye(5, dtype=bool)[labels_n], np.eye(5, dtype=bool)[chosen_n], np.arange(200))
    one, two = (compute_count_interval(macro_f1, counts) for counts in (shared, single))
    assert one.to_json() == pytest.approx(two.to_json(), abs=1e-12)
    assert one.value == pytest.approx(reference.f1_score(labels_n, chosen_n, average="macro"))


def test_films_make_the_interval_of_macro_f1_wider_and_it_covers():
    # 24 films of 12 frames, each film of one class; a film is easy or hard.
    generator, covered = np.random.default_rng(1), 0
    label_g = np.arange(24) % 3
    recall_g = np.array([0.95, 0.6])[np.arange(24) // 3 % 2]
    key_n = np.repeat(np.arange(24), 12)
    for _ in range(500):
        drawn_g = generator.integers(0, 2, 24)
        right_n = generator.random(288) < np.array([0.95, 0.6])[drawn_g][key_n]
        other_n = (label_g[key_n] + generator.integers(1, 3, 288)) % 3
        chosen_n = np.where(right_n, label_g[key_n], other_n)
        found = compute_count_interval(macro_f1, make_counts(label_g[key_n], chosen_n, 3, key_n))
        covered += found.low <= recall_g.mean() <= found.high
    assert 0.92 <= covered / 500 <= 0.995
