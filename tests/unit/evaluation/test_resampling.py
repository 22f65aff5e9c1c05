"""Intervals over keys: values by hand, equality with image intervals where keys are images, coverage by simulation."""

import numpy as np
import pytest

from visionloop.evaluation.resampling import (
    code_keys,
    compute_key_interval,
    compute_share_interval,
    compute_wilson,
    count_keys,
    describe_images,
    draw_keys,
    sum_keys,
)


def test_a_ratio_has_the_interval_of_the_worked_example():
    found = compute_key_interval([3, 1, 2], [4, 4, 4])
    assert (found.value, found.low, found.high) == pytest.approx((0.5, 0.5 - 0.6210, 0.5 + 0.6210), abs=1e-4)


def test_one_key_tells_no_interval():
    found = compute_key_interval([3], [4])
    assert (found.value, found.low, found.high) == (0.75, None, None)


@pytest.mark.parametrize(
    ("num_keys", "per_key", "spread"), [(16, 16, 0.2), (16, 16, 0.5), (8, 30, 0.3), (60, 10, 0.5), (25, None, 0.3)]
)
def test_the_interval_of_a_mean_covers_the_truth_when_frames_are_alike(num_keys, per_key, spread):
    # Each key has a level of its own: the correlation of two frames of a key is `spread`.
    covered, by_images = 0, 0
    generator = np.random.default_rng(num_keys)
    for _ in range(1000):
        count_g = generator.integers(2, 60, num_keys) if per_key is None else np.full(num_keys, per_key)
        key_n = np.repeat(np.arange(num_keys), count_g)
        level_g = generator.normal(0, np.sqrt(spread), num_keys)
        value_n = level_g[key_n] + generator.normal(0, np.sqrt(1 - spread), len(key_n))
        found = compute_key_interval(sum_keys(value_n, key_n), count_g)
        covered += found.low <= 0 <= found.high
        naive = compute_key_interval(value_n, np.ones(len(value_n)))
        by_images += naive.low <= 0 <= naive.high
    assert 930 <= covered <= 985
    assert by_images < 800


@pytest.mark.parametrize(
    ("hits", "trials", "low", "high"),
    [(8, 10, 0.490162, 0.943318), (0, 20, 0.0, 0.161125), (20, 20, 0.838875, 1.0), (0, 0, 0.0, 1.0)],
)
def test_wilson_equals_published_values(hits, trials, low, high):
    found = compute_wilson(hits, trials)
    assert (found.low, found.high) == pytest.approx((low, high), abs=1e-6)


def test_a_share_of_single_images_has_wilsons_interval():
    assert compute_share_interval(np.arange(50) < 45, np.ones(50)) == compute_wilson(45, 50)


@pytest.mark.parametrize("correlation", [0.2, 0.35, 0.5])
@pytest.mark.parametrize(("num_keys", "per_key"), [(8, 30), (16, 16), (29, 10), (60, 8)])
@pytest.mark.parametrize("share", [0.7, 0.95])
def test_the_interval_of_a_share_covers_the_truth_when_frames_are_alike(correlation, num_keys, per_key, share):
    # Each film has a share of its own, of a beta distribution: frames of a film correlate by `correlation`.
    generator = np.random.default_rng(num_keys)
    scale = (1 - correlation) / correlation
    level = generator.beta(share * scale, (1 - share) * scale, (1000, num_keys))
    hits = generator.binomial(per_key, level)
    found = [compute_share_interval(row, np.full(num_keys, per_key)) for row in hits]
    covered = sum(one.low <= share <= one.high for one in found)
    naive = [compute_wilson(int(row.sum()), num_keys * per_key) for row in hits]
    assert 915 <= covered <= 998
    assert sum(one.low <= share <= one.high for one in naive) < 850
    # It is no wider than if each film were one image.
    films = compute_wilson(share * num_keys, num_keys)
    assert np.median([one.high - one.low for one in found]) < 1.15 * (films.high - films.low)


def test_flawless_films_tell_as_much_as_so_many_images():
    found = compute_share_interval([16] * 16, [16] * 16)
    assert (found.low, found.high) == pytest.approx((compute_wilson(16, 16).low, 1.0))
    one_error = compute_share_interval([15] + [16] * 15, [16] * 16)
    assert one_error.low == pytest.approx(found.low)
    assert one_error.low < compute_wilson(255, 256).low
    assert compute_share_interval([9], [10]).low is None


def test_codes_and_sums_follow_the_keys():
    key_n = code_keys(["film-b", "film-a", "film-b", "x"])
    assert key_n.tolist() == [1, 0, 1, 2]
    assert count_keys(key_n) == 3
    assert sum_keys([1.0, 2.0, 4.0, 8.0], key_n).tolist() == [2.0, 5.0, 8.0]
    assert sum_keys(np.eye(4)[:, :2], key_n).tolist() == [[0.0, 1.0], [1.0, 0.0], [0.0, 0.0]]
    assert sum_keys([1.0, 2.0], np.array([7, 3])).tolist() == [2.0, 1.0]


@pytest.mark.parametrize(
    ("numbers", "text"),
    [((256, 16), "256 images in 16 groups"), ((5, 1), "5 images in 1 group"), ((2_000, 2_000), "2,000 images")],
)
def test_people_read_images_and_groups(numbers, text):
    assert describe_images(*numbers) == text


def test_keys_are_drawn_whole_and_the_same_however_they_are_cut(monkeypatch):
    key_n = np.array([4, 4, 9, 2, 2, 2])
    whole = np.concatenate(list(draw_keys(key_n, 500, seed=3)))
    assert whole.shape == (500, 3)
    assert (whole.sum(axis=1) == 3).all()
    assert whole.mean(axis=0) == pytest.approx([1, 1, 1], abs=0.15)
    monkeypatch.setattr("visionloop.evaluation.resampling.CHUNK_CELLS", 90)
    assert np.array_equal(np.concatenate(list(draw_keys(key_n, 500, seed=3))), whole)
    assert not np.array_equal(np.concatenate(list(draw_keys(key_n, 500, seed=4))), whole)
