"""Answers compared with the truth: which are right, which are worst, and how label sets are written."""

import numpy as np
import pytest

from visionloop.evaluation.answers import Answers, find_worst, join_names

PROBS_NK = np.array([[0.9, 0.2, 0.1], [0.6, 0.7, 0.1], [0.4, 0.3, 0.2], [0.99, 0.9, 0.9]])
TARGETS_NK = np.array([[1, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 0]], bool)
SEVERAL = Answers(TARGETS_NK, PROBS_NK, PROBS_NK >= 0.5, ("a", "b", "c"), np.arange(4))


def test_a_set_is_right_as_a_whole() -> None:
    assert SEVERAL.hits_n.tolist() == [True, False, False, False]
    assert SEVERAL.name_labels() == [("a",), ("a",), ("b",), ()]
    assert SEVERAL.name_chosen() == [("a",), ("a", "b"), (), ("a", "b", "c")]
    assert SEVERAL.confidence_n.tolist() == pytest.approx([0.648, 0.378, 0.336, 0.8019])


def test_the_worst_come_first() -> None:
    assert find_worst(SEVERAL, 9).tolist() == [3, 2, 1]
    assert find_worst(SEVERAL, 1).tolist() == [3]
    single = Answers(np.array([0, 0, 1, 2]), PROBS_NK, np.array([0, 1, 0, 0]), ("a", "b", "c"), np.arange(4))
    assert find_worst(single, 9).tolist() == [2, 1, 3]


@pytest.mark.parametrize(
    ("names", "text"),
    [
        ((), "nothing"),
        (("cat",), "cat"),
        (("cat", "dog"), "cat, dog"),
        (("bicycle", "motorcycle", "person", "truck"), "bicycle, motorcycle +2"),
        (("a name that is longer than all the room",), "a name that is longer than all the room"),
    ],
)
def test_names_are_joined_as_far_as_there_is_room(names: tuple[str, ...], text: str) -> None:
    assert join_names(names) == text
