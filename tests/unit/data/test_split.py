"""Sides: a function of seed and key alone, in the asked proportions."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from visionloop.data.families import choose_random_sides, choose_side, compute_position

FRACTIONS = (0.70, 0.15, 0.15)


@given(st.text(min_size=1), st.integers(0, 2**31))
def test_position_is_stable_and_in_range(key: str, seed: int) -> None:
    position = compute_position(key, seed)
    assert 0 <= position < 1
    assert position == compute_position(key, seed)


def test_known_positions_never_change() -> None:
    """Another value here would move images between the sides of every dataset that exists."""
    assert round(compute_position("a", 0), 12) == 0.617000936233
    assert [choose_side(k, 0, FRACTIONS) for k in ("a", "f", "h")] == ["train", "val", "test"]


def test_proportions_are_as_asked() -> None:
    counts = Counter(choose_side(str(i), 7, FRACTIONS) for i in range(20_000))
    assert abs(counts["train"] / 20_000 - 0.70) < 0.01
    assert abs(counts["val"] / 20_000 - 0.15) < 0.01


def test_no_test_image_is_chosen_where_the_source_brings_its_own() -> None:
    counts = Counter(choose_side(str(i), 7, FRACTIONS, test_is_given=True) for i in range(20_000))
    assert counts["test"] == 0
    assert abs(counts["val"] / 20_000 - 0.15 / 0.85) < 0.01


@pytest.mark.parametrize("number", [2, 5, 9, 1000, 1283])
@pytest.mark.parametrize("fraction", [0.2, 0.25, 1 / 3])
def test_random_sides_are_those_of_scikit_learn(number: int, fraction: float) -> None:
    from sklearn.model_selection import train_test_split

    train, test = train_test_split(range(number), test_size=fraction, random_state=13, shuffle=True)
    sides = choose_random_sides(number, 13, fraction)
    assert [i for i, side in enumerate(sides) if side == "train"] == sorted(train)
    assert [i for i, side in enumerate(sides) if side == "test"] == sorted(test)
