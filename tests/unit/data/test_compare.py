"""What changed between two versions: added, removed, relabelled, and moved, which must never be."""

from dataclasses import replace
from pathlib import Path

import pytest

from visionloop.data.compare import compare_records
from visionloop.records import ImageRecord
from visionloop.store import LocalStore
from workspaces import store_image


@pytest.fixture
def rows(tmp_path: Path) -> list[ImageRecord]:
    """Eight images: cats (odd) and dogs (even)."""
    store = LocalStore(tmp_path)
    return [store_image(store, seed) for seed in range(8)]


def test_equal_versions_have_no_difference(rows: list[ImageRecord]) -> None:
    diff = compare_records(rows, list(reversed(rows)))
    assert (diff.is_empty, diff.num_same, diff.classes, diff.sources) == (True, 8, {}, {})


def test_added_and_removed_are_told_apart(rows: list[ImageRecord]) -> None:
    diff = compare_records(rows[:6], rows[1:])
    assert [r.sha256 for r in diff.removed] == [rows[0].sha256]
    assert {r.sha256 for r in diff.added} == {rows[6].sha256, rows[7].sha256}
    assert diff.classes == {"cat": (3, 4)}, "a dog went, a dog came"
    assert diff.sources == {"photos": (6, 7)}
    assert diff.num_same == 5


def test_a_new_label_and_a_new_side(rows: list[ImageRecord]) -> None:
    after = [
        replace(rows[0], labels=("fox",)),
        replace(rows[1], side="test"),
        replace(rows[2], labels=(), side="excluded"),
        *rows[3:],
    ]
    diff = compare_records(rows, after)
    assert {(c.before.labels, c.after.labels) for c in diff.relabelled} == {(("dog",), ("fox",)), (("dog",), ())}
    assert {(c.before.side, c.after.side) for c in diff.moved} == {("train", "test"), ("val", "excluded")}
    assert diff.classes == {"(unlabelled)": (0, 1), "dog": (4, 2), "fox": (0, 1)}
    assert diff.num_same == 5
    assert not diff.is_empty


def test_the_order_of_several_labels_means_nothing(rows: list[ImageRecord]) -> None:
    before, after = (replace(rows[0], labels=labels) for labels in (("a", "b"), ("b", "a")))
    assert compare_records([before], [after]).is_empty


def test_as_json(rows: list[ImageRecord]) -> None:
    changed = replace(rows[0], labels=("fox",), side="test")
    value = compare_records([rows[0], rows[1]], [changed, rows[2]]).to_json()
    assert value["relabelled"] == [
        {
            "sha256": rows[0].sha256,
            "labels": ("fox",),
            "sources": ("photos",),
            "origins": ("photos:dog/0.png",),
            "side": "test",
            "from": ["dog"],
            "to": ["fox"],
        }
    ]
    assert (value["moved"][0]["from"], value["moved"][0]["to"]) == ("train", "test")
    assert [one["sha256"] for one in value["added"]] == [rows[2].sha256]
    assert [one["sha256"] for one in value["removed"]] == [rows[1].sha256]
    assert value["classes"]["fox"] == [0, 1]
