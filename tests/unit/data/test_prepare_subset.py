"""Subsets for `prepare.limit`: in proportion, at least one of each class, and stable when images are added."""

import hashlib
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from visionloop.data.prepare import choose_subset as choose_places
from visionloop.data.prepare import divide_seats
from visionloop.records import SIDES, ImageRecord


def make_records(first: int, number: int, *, side: str = "train", label: str = "cat") -> list[ImageRecord]:
    shas = [hashlib.sha256(str(i).encode()).hexdigest() for i in range(first, first + number)]
    return [
        ImageRecord(sha, (label,), ("s",), ("s:x",), 0, None, sha, side, None, 40, 30, "PNG", 99, "") for sha in shas
    ]


def choose_subset(records: list[ImageRecord], limit: int) -> list[ImageRecord]:
    """The images that are chosen of some, which may come in any order."""
    ordered = sorted(records, key=lambda r: r.sha256)
    label_sets = sorted({r.labels for r in records})
    side_n = np.asarray([SIDES.index(r.side) for r in ordered], np.int8)
    set_n = np.asarray([label_sets.index(r.labels) for r in ordered], np.int32)
    return [ordered[place] for place in choose_places(side_n, set_n, label_sets, limit)]


def count(records: list[ImageRecord]) -> dict[tuple[str, str], int]:
    return dict(Counter((r.side, r.labels[0]) for r in records))


RECORDS = [
    *make_records(0, 700),
    *make_records(1000, 140, side="val"),
    *make_records(2000, 150, side="test"),
    *make_records(3000, 9, label="dog"),
    *make_records(4000, 1, side="test", label="dog"),
]


def test_sides_and_classes_keep_their_proportions_and_none_is_left_out() -> None:
    chosen = choose_subset(RECORDS, 100)
    assert count(chosen) == {
        ("train", "cat"): 69,
        ("val", "cat"): 14,
        ("test", "cat"): 15,
        ("train", "dog"): 1,
        ("test", "dog"): 1,
    }
    assert [r.sha256 for r in chosen] == sorted(r.sha256 for r in chosen)


def test_a_hundredth_more_images_change_about_a_hundredth_of_the_subset() -> None:
    before = {r.sha256 for r in choose_subset(RECORDS, 100)}
    after = {r.sha256 for r in choose_subset([*RECORDS, *make_records(9000, 10)], 100)}
    assert len(before & after) >= 96


def test_a_higher_limit_only_adds() -> None:
    smaller = {r.sha256 for r in choose_subset(RECORDS, 50)}
    assert smaller < {r.sha256 for r in choose_subset(RECORDS, 51)}


@pytest.mark.parametrize("limit", [1000, 5000])
def test_a_limit_at_or_above_all_takes_all(limit: int) -> None:
    assert count(choose_subset(RECORDS, limit)) == count(RECORDS)


def test_fewer_places_than_classes_go_to_the_training_side() -> None:
    assert count(choose_subset(RECORDS, 2)) == {("train", "cat"): 1, ("train", "dog"): 1}


def make_tagged(first: int, number: int, *labels: str, side: str = "train") -> list[ImageRecord]:
    return [replace(r, labels=labels) for r in make_records(first, number, side=side)]


def test_images_of_several_labels_show_every_class_of_every_side() -> None:
    records = [
        *make_tagged(0, 60, "cat", "indoor"),
        *make_tagged(100, 20, "dog", "indoor"),
        *make_tagged(200, 15, "dog"),
        *make_tagged(300, 5, "indoor", "lamp"),
        *make_tagged(400, 1, "cat", "rare", side="val"),
        *make_tagged(500, 30, "cat", side="val"),
        *make_tagged(600, 20),
    ]
    chosen = choose_subset(records, 30)
    assert len(chosen) == 30
    assert {(r.side, label) for r in chosen for label in r.labels} == {(r.side, x) for r in records for x in r.labels}
    rarest = Counter("lamp" if "lamp" in r.labels else "".join(r.labels[:1]) for r in chosen if r.side == "train")
    assert rarest == {"cat": 11, "dog": 7, "lamp": 1, "": 4}  # 60, 35, 5 and 20 of 151
    assert len(choose_subset(records, 29)) == 29


def test_few_places_go_to_images_that_show_many_classes() -> None:
    records = [*make_tagged(0, 1, "a", "b", "c"), *make_tagged(10, 50, "d"), *make_tagged(100, 50, "a")]
    chosen = choose_subset(records, 2)
    assert {label for r in chosen for label in r.labels} >= {"a", "d"}


SIZES = st.dictionaries(
    st.tuples(st.sampled_from(["train", "val", "test"]), st.text("abc", min_size=1)), st.integers(1, 60), min_size=1
)


@given(SIZES, st.integers(2, 200))
def test_every_place_is_given_and_none_twice(sizes: dict[tuple[str, str], int], limit: int) -> None:
    seats = divide_seats(sizes, limit, dict.fromkeys(sorted(sizes)[:limit], 1))
    assert sum(seats.values()) == min(limit, sum(sizes.values()))
    assert all(seats[name] <= sizes[name] for name in sizes)
    assert limit < len(sizes) or min(seats.values()) >= 1
