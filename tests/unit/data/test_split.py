"""Sides of new keys: by class in the first version, within one key of the fractions; later by the hash alone."""

import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from visionloop.data import split
from visionloop.data.split import Undecided, choose_side, divide, find_lone_films

FRACTIONS = (0.70, 0.15, 0.15)


def make(sizes: dict[str, int], *, learn: bool = False) -> list[Undecided]:
    return [Undecided(f"{name}{i}", frozenset({name}), learn) for name, number in sizes.items() for i in range(number)]


def count(families: list[Undecided], sides: list[str]) -> dict[str, Counter[str]]:
    counts: dict[str, Counter[str]] = {}
    for one, side in zip(families, sides, strict=True):
        counts.setdefault(next(iter(one.labels)), Counter())[side] += 1
    return counts


def test_a_class_of_39_images_has_its_fractions() -> None:
    families = make({"cat": 39, "dog": 200})
    counts = count(families, divide(families, 0, FRACTIONS, is_first=True).sides)
    assert counts["cat"] == {"train": 27, "val": 6, "test": 6}
    assert counts["dog"] == {"train": 140, "val": 30, "test": 30}


def test_two_classes_of_three_photos_have_all_three_sides() -> None:
    families = make({"cat": 3, "dog": 3})
    counts = count(families, divide(families, 0, FRACTIONS, is_first=True).sides)
    assert counts == {"cat": {"train": 2, "test": 1}, "dog": {"train": 2, "val": 1}}


@settings(max_examples=150)
@given(
    st.lists(st.integers(1, 60), min_size=1, max_size=12),
    st.sampled_from([FRACTIONS, (0.8, 0.1, 0.1), (0.5, 0.25, 0.25), (0.9, 0.0, 0.1)]),
    st.integers(0, 5),
    st.booleans(),
)
def test_each_side_of_each_class_is_within_one_key_of_its_fraction(
    sizes: list[int], fractions: tuple[float, ...], seed: int, learn: bool
) -> None:
    families = make({f"class-{k}-": size for k, size in enumerate(sizes)}, learn=learn)
    sides = divide(families, seed, fractions, is_first=True).sides
    train, val, test = fractions
    wanted = {"train": train / (train + val), "val": val / (train + val), "test": 0.0} if learn else {}
    wanted = wanted or {"train": train, "val": val, "test": test}
    for counts in count(families, sides).values():
        for side, fraction in wanted.items():
            assert abs(counts[side] - fraction * counts.total()) < 1
    turned = random.Random(seed).sample(range(len(families)), len(families))
    again = divide([families[i] for i in turned], seed, fractions, is_first=True).sides
    assert again == [sides[i] for i in turned]


def test_many_small_classes_together_have_the_fractions_too() -> None:
    families = make({f"class-{k}-": 3 for k in range(100)})
    total = Counter(divide(families, 0, FRACTIONS, is_first=True).sides)
    assert total == {"train": 210, "val": 45, "test": 45}


def test_later_keys_go_by_the_hash_alone() -> None:
    families = make({"cat": 50})
    sides = divide(families, 3, FRACTIONS, is_first=False).sides
    assert sides == [choose_side(one.key, 3, FRACTIONS) for one in families]
    assert set(sides) == {"train", "val", "test"}


def find_key_on(side: str) -> str:
    return next(str(i) for i in range(1000) if choose_side(str(i), 0, FRACTIONS) == side)


@pytest.mark.parametrize("side", ["val", "test"])
def test_the_first_keys_of_a_class_go_to_train(side: str) -> None:
    family = [Undecided(find_key_on(side), frozenset({"cow"}))]
    for how in ({"min_train": 1}, {"min_train": 1, "num_train": {"cat": 4}}):
        division = divide(family, 0, FRACTIONS, is_first=False, **how)
        assert (division.sides, division.brought) == (["train"], {"cow": 1})
    for how in ({"min_train": 0}, {"min_train": 1, "num_train": {"cow": 1}}):
        division = divide(family, 0, FRACTIONS, is_first=False, **how)
        assert (division.sides, division.brought) == ([side], {})


def test_min_train_takes_the_keys_nearest_to_train_and_no_more_than_it_needs() -> None:
    families = make({"cat": 12})
    plain = divide(families, 0, (0.2, 0.4, 0.4), is_first=False).sides
    division = divide(families, 0, (0.2, 0.4, 0.4), is_first=False, min_train=8)
    assert division.sides.count("train") == 8
    assert division.brought == {"cat": 8 - plain.count("train")}
    assert all(new == old for new, old in zip(division.sides, plain, strict=True) if new != "train")


@pytest.mark.parametrize("step", [1, -1])
def test_keys_at_one_position_go_by_their_names(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    monkeypatch.setattr(split, "compute_position", lambda key, seed: 0.9 if key < "cat5" else 0.5)
    families = make({"cat": 9})[::step]
    first = divide(families, 0, (0.5, 0.5, 0.0), is_first=True).sides[::step]
    assert "".join(side[0] for side in first) == "vttttvvvv"
    later = divide(families, 0, (0.0, 1.0, 0.0), is_first=False, min_train=3).sides[::step]
    assert "".join(side[0] for side in later) == "tttvvvvvv"


def test_an_image_of_several_labels_counts_for_the_rarest() -> None:
    both = [Undecided(f"b{i}", frozenset({"cat", "rare"})) for i in range(20)]
    families = [*make({"cat": 60}), *both]
    sides = divide(families, 0, FRACTIONS, is_first=True).sides
    assert Counter(sides[60:]) == {"train": 14, "val": 3, "test": 3}
    assert Counter(sides[:60]) == {"train": 42, "val": 9, "test": 9}


def test_a_class_of_one_film_is_named() -> None:
    rows = [
        ("film", "test", ("cow",)),
        ("film", "test", ("cow",)),
        (None, "train", ("cat",)),
        ("film", "test", ("cat",)),
    ]
    assert find_lone_films([*rows, ("x", "excluded", ("cow",)), (None, "val", ("emu",))]) == {"cow": ("film", "test")}
