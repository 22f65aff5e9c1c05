"""Families have one side each, and given sides never move; a side is a function of seed and key alone."""

import random
from collections import Counter
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from visionloop.data.families import (
    Families,
    Member,
    Pair,
    place_members,
)
from visionloop.data.split import choose_random_sides, choose_side, compute_position

FRACTIONS = (0.70, 0.15, 0.15)
USED = ("train", "val", "test")


def choose(key: str, learn: bool) -> str:
    return choose_side(key, 0, (0.4, 0.3, 0.3), test_is_given=learn)


def make(name: str, side: str | None = None, group: str | None = None, **facts: bool) -> Member:
    return Member(name, group or name, group, side, **facts)


def place(members: Sequence[Member], *links: tuple[int, int], exclude_leaks: bool = False) -> Families:
    pairs = [Pair(one, other, 1, 0.1 * (n + 1)) for n, (one, other) in enumerate(links)]
    return place_members(members, pairs, choose, exclude_leaks=exclude_leaks)


def describe(families: Families) -> list[tuple[str, int, int]]:
    return [(f.kind, f.one, f.other) for f in families.leaks]


def test_the_worked_example_of_the_source() -> None:
    olds = [Member("a", "a", None, "train", is_old=True), Member("b", "b", None, "test", is_old=True)]
    members = [*olds, make("c"), make("d"), make("e", group="film"), make("f", group="film")]
    pairs = [Pair(2, 0, 2, 0.1), Pair(2, 1, 3, 0.2), Pair(3, 2, 1, 0.3), Pair(5, 3, 4, 0.4)]
    families = place_members(members, pairs, lambda key, learn: choose_side(key, 0, FRACTIONS, test_is_given=learn))
    assert families.sides == ["train", "test", "excluded", "train", "train", "train"]
    assert families.keys == ["a", "b", "c", "film", "film", "film"]
    assert describe(families) == [("excluded", 2, 1)]
    assert round(compute_position("film", 0), 3) == 0.559


def test_alone_the_side_is_the_hash_of_the_key() -> None:
    families = place([make("a"), make("b"), make("c", group="film")])
    assert families.sides == [choose("a", False), choose("b", False), choose("film", False)]
    assert families.keys == ["a", "b", "film"]
    assert families.leaks == []


def test_near_a_test_image_only_a_source_that_says_so_itself_keeps_its_image() -> None:
    asked = make("c", learn=True, excluded_near_test=True)
    families = place([Member("t", "t", None, "test", is_old=True), make("a", learn=True), asked], (1, 0), (2, 0))
    assert (families.sides[1] in ("train", "val"), families.sides[2]) == (True, "excluded")
    assert describe(families) == [("across", 1, 0), ("excluded", 2, 0)]


def test_a_chain_takes_the_key_of_its_earliest_member() -> None:
    families = place([make("c"), make("b"), make("a")], (2, 1), (1, 0))
    assert families.keys == ["c", "c", "c"]
    assert set(families.sides) == {choose("c", False)}


def test_a_group_gives_its_key_to_the_whole_family() -> None:
    families = place([make("b"), make("a", group="film")], (1, 0))
    assert families.keys == ["film", "film"]


def test_a_new_image_follows_an_earlier_version() -> None:
    old = Member("a", "k", None, "val", is_old=True)
    families = place([old, make("b"), make("c")], (1, 0), (2, 1))
    assert (families.sides, families.keys) == (["val"] * 3, ["k"] * 3)


def test_an_image_that_would_link_two_sides_is_excluded_and_named() -> None:
    olds = [Member("a", "a", None, "train", is_old=True), Member("b", "b", None, "test", is_old=True)]
    families = place([*olds, make("c"), make("d")], (2, 0), (2, 1), (3, 2))
    assert families.sides[:3] == ["train", "test", "excluded"]
    assert describe(families) == [("excluded", 2, 1)]
    assert families.leaks[0].side == "train"
    assert families.sides[3] == choose("d", False)  # an excluded image joins nothing


def test_given_sides_leak_and_stay() -> None:
    members = [make("a", "train"), make("b", "test"), make("c", "train")]
    families = place(members, (0, 1), (2, 1))
    assert families.sides == ["train", "test", "train"]
    assert describe(families) == [("across", 0, 1), ("across", 2, 1)]


def test_given_sides_that_leak_are_excluded_on_demand_and_the_test_side_stays() -> None:
    members = [make("a", "test"), make("b", "train"), make("c", "val"), make("d", "train")]
    families = place(members, (1, 0), (2, 0), exclude_leaks=True)
    assert families.sides == ["test", "excluded", "excluded", "train"]


def test_of_a_leak_to_an_earlier_version_the_new_image_is_excluded() -> None:
    families = place([Member("a", "a", None, "train", is_old=True), make("b", "test")], (1, 0), exclude_leaks=True)
    assert families.sides == ["train", "excluded"]


def test_an_image_beside_a_test_folder_is_never_test() -> None:
    """The source keeps its own test side: a near duplicate in it is a leak of the source, not a move."""
    members = [make("t", "test"), make("a", learn=True), make("b", learn=True), make("c")]
    families = place(members, (1, 0), (1, 2), (3, 1))
    assert families.sides[1] == families.sides[2] != "test"
    assert families.sides[3] == families.sides[1]
    assert describe(families) == [("across", 1, 0)]


def test_a_group_on_two_given_sides_leaks_once_an_image_and_takes_no_third() -> None:
    members = [
        make("a", "test", "film"),
        make("b", "train", "film"),
        make("c", "train", "film"),
        make("d", None, "film"),
    ]
    families = place(members)
    assert families.sides == ["test", "train", "train", "excluded"]
    assert describe(families) == [("across", 1, 0), ("excluded", 3, 0)]


MEMBERS = st.lists(
    st.tuples(
        st.sampled_from([None, None, None, "train", "val", "test", "learn"]), st.sampled_from([None, None, "x", "y"])
    ),
    min_size=1,
    max_size=24,
)


@given(MEMBERS, st.lists(st.tuples(st.integers(0, 23), st.integers(0, 23)), max_size=40), st.data())
def test_no_order_batch_or_later_version_moves_an_image_or_splits_a_family(
    facts: list[tuple[str | None, str | None]], links: list[tuple[int, int]], data: st.DataObject
) -> None:
    """Images come in batches, each a version. Sides never change, and images of a family are on one side."""
    people = [
        make(str(i), None if side == "learn" else side, group, learn=side == "learn")
        for i, (side, group) in enumerate(facts)
    ]
    pairs = {(max(a, b), min(a, b)) for a, b in links if a != b and max(a, b) < len(people)}
    cuts = sorted(data.draw(st.sets(st.integers(1, len(people)), max_size=4)) | {len(people)})
    shuffle = random.Random(data.draw(st.integers(0, 99))).shuffle
    placed: list[Member] = []
    for cut in cuts:
        old = [m for m in placed if m.side != "excluded"]
        members = [*old, *people[len(placed) : cut]]
        place_of = {m.sha256: i for i, m in enumerate(members)}
        near = [
            Pair(place_of[str(a)], place_of[str(b)], 1, (a + b) % 7 / 7)
            for a, b in pairs
            if str(a) in place_of and str(b) in place_of and max(place_of[str(a)], place_of[str(b)]) >= len(old)
        ]
        families = place_members(members, near, choose)
        shuffle(near)
        assert place_members(members, near, choose) == families
        assert families.sides[: len(old)] == [m.side for m in old]
        for i in range(len(old), len(members)):
            m = members[i]
            placed.append(Member(m.sha256, families.keys[i], m.group, families.sides[i], is_old=True))
    side = [str(m.side) for m in placed]
    batch = [sum(cut <= i for cut in cuts) for i in range(len(people))]
    same_group = (
        (a, b) for a in range(len(people)) for b in range(a) if people[a].group == people[b].group is not None
    )
    for a, b in {*pairs, *same_group}:
        if side[a] in USED and side[b] in USED and side[a] != side[b]:
            # Only given sides do that: of both images, or of one against an image of an earlier version.
            assert all(people[i].side or people[i].learn for i in (a, b) if batch[i] == batch[a])
    assert all(side[i] == m.side for i, m in enumerate(people) if m.side)
    assert all(side[i] != "test" for i, m in enumerate(people) if m.learn)


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
