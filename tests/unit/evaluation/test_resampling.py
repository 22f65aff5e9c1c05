"""Intervals over keys: values by hand, equality with image intervals where keys are images, coverage by simulation."""

import numpy as np
import pytest

from visionloop.evaluation.resampling import (
    code_keys,
    compute_key_interval,
    count_keys,
    describe_images,
    draw_cells,
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


def test_drawn_cells_have_the_mean_and_spread_of_drawn_images(monkeypatch):
    count_c = np.array([5, 0, 15, 30])
    whole = np.concatenate(list(draw_cells(count_c, 4000, seed=1)))
    assert (whole.sum(axis=1) == 50).all()
    assert whole.mean(axis=0) == pytest.approx(count_c, abs=0.2)
    assert whole.var(axis=0) == pytest.approx(count_c * (1 - count_c / 50), rel=0.1)
    monkeypatch.setattr("visionloop.evaluation.resampling.CHUNK_CELLS", 90)
    assert np.array_equal(np.concatenate(list(draw_cells(count_c, 4000, seed=1))), whole)
