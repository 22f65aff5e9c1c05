"""Areas under curves: their intervals cover the truth, also where the area found is 1."""

from statistics import NormalDist

import numpy as np
import pytest
from sklearn import metrics as reference

from visionloop.evaluation.ranking import compute_auc, compute_mean_average_precision


def draw_scores(generator, positive, negative, area):
    """Normal scores whose true area under the ROC curve is `area`."""
    has_n = np.arange(positive + negative) < positive
    return has_n, generator.normal(0, 1, len(has_n)) + has_n * NormalDist().inv_cdf(area) * 2**0.5


def test_an_area_of_one_on_13_images_has_a_wide_interval():
    has_n = np.arange(13) < 7
    found = compute_auc(has_n, has_n.astype(float), np.arange(13))
    assert (found.value, found.high) == (1.0, 1.0)
    assert 0.65 < found.low < 0.8


def test_the_interval_is_the_published_one():
    # Newcombe (2006) solves |0.8 - a| = 1.96 sqrt(V(a)); both bounds are put in here.
    scores_n = np.array([3, 4, 5, 0.5, 9, 1, 2, 0, 3.5, 0.2])
    has_n = np.arange(10) < 5
    found = compute_auc(has_n, scores_n, np.arange(10))
    assert found.value == pytest.approx(reference.roc_auc_score(has_n, scores_n))
    for bound in (found.low, found.high):
        mean = 10 / 2 - 1
        inside = 1 + mean * (1 - bound) / (2 - bound) + mean * bound / (1 + bound)
        variance = bound * (1 - bound) * inside / 25
        assert abs(found.value - bound) == pytest.approx(1.959964 * variance**0.5, abs=1e-6)


@pytest.mark.parametrize("area", [0.5, 0.8, 0.95, 0.99])
@pytest.mark.parametrize(("positive", "negative"), [(7, 6), (128, 128), (20, 200)])
def test_the_interval_of_an_area_covers_the_truth(positive, negative, area):
    generator, covered = np.random.default_rng(positive), 0
    for _ in range(1000):
        found = compute_auc(*draw_scores(generator, positive, negative, area), np.arange(positive + negative))
        covered += found.low <= area <= found.high
    assert 930 <= covered <= 996


@pytest.mark.parametrize("correlation", [0.2, 0.5])
@pytest.mark.parametrize("area", [0.8, 0.98])
def test_the_interval_of_an_area_covers_the_truth_when_frames_are_alike(area, correlation):
    generator, covered, naive = np.random.default_rng(5), 0, 0
    key_n = np.repeat(np.arange(20), 12)
    has_n = key_n % 2 == 0
    for _ in range(500):
        scores_n = has_n * NormalDist().inv_cdf(area) * 2**0.5 + generator.normal(0, correlation**0.5, 20)[key_n]
        scores_n = scores_n + generator.normal(0, (1 - correlation) ** 0.5, 240)
        found = compute_auc(has_n, scores_n, key_n)
        covered += found.low <= area <= found.high
        plain = compute_auc(has_n, scores_n, np.arange(240))
        naive += plain.low <= area <= plain.high
    assert 0.91 <= covered / 500 <= 0.996
    assert naive < covered


def test_the_interval_of_average_precision_covers_the_truth():
    generator, covered = np.random.default_rng(2), 0
    truth = reference.average_precision_score(*draw_scores(generator, 100_000, 300_000, 0.85))
    for _ in range(300):
        has_n, scores_n = draw_scores(generator, 30, 90, 0.85)
        found = compute_mean_average_precision(has_n[:, None], scores_n[:, None], np.arange(120), resamples=200, seed=1)
        assert found.value == pytest.approx(reference.average_precision_score(has_n, scores_n))
        covered += found.low <= truth <= found.high
    assert 0.91 <= covered / 300 <= 0.99


def test_too_few_images_of_a_class_tell_no_interval():
    has_n = np.arange(40) < 4
    found = compute_mean_average_precision(has_n[:, None], has_n[:, None] * 1.0, np.arange(40), resamples=100, seed=0)
    assert (found.value, found.low) == (1.0, None)
    none = np.zeros((5, 1), bool)
    assert compute_mean_average_precision(none, none * 1.0, np.arange(5), resamples=100, seed=0) is None
