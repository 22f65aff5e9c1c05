"""The space of tune: keys of train, checked when params.yaml is read."""

from typing import Any

import pytest

from visionloop.errors import ParamsError
from visionloop.params import Span, make_params
from visionloop.params.train import nest


def make_space(space: dict[str, Any]) -> dict[str, Any]:
    return make_params({"name": "pets", "tune": {"space": space}}).tune.space


def test_ranges_lists_and_nested_keys() -> None:
    space = make_space(
        {"learning_rate": {"low": 1e-4, "high": 0.1, "log": True}, "neighbours.k": [1, 5], "clip_norm": [None, 1.0]}
    )
    assert space["learning_rate"] == Span(low=1e-4, high=0.1, log=True)
    assert space["neighbours.k"] == (1, 5)
    assert space["clip_norm"] == (None, 1.0)


@pytest.mark.parametrize(
    ("space", "line"),
    [
        ({"learning_ratee": [0.1]}, "'learning_ratee' is none that can be tuned, near: backbone_rate, learning_rate"),
        ({"devices": [1, 2]}, "'devices' is none that can be tuned"),
        ({"monitor": ["val/f1"]}, "'monitor' is none that can be tuned"),
        ({"learning_rate": {"low": 0.1, "high": 20.0}}, "values of train.learning_rate; 20.0: "),
        ({"batch_size": [16, 32.5]}, "values of train.batch_size; 32.5: "),
        ({"augment": ["light", "wild"]}, "values of train.augment; 'wild': "),
        ({"neighbours.metric": ["cosine", "manhattan"]}, "values of train.neighbours.metric; 'manhattan': "),
        ({"learning_rate": []}, "tune.space"),
        ({}, "tune.space"),
    ],
)
def test_what_is_no_space_is_refused_when_params_are_read(space: dict[str, Any], line: str) -> None:
    with pytest.raises(ParamsError) as caught:
        make_space(space)
    assert line in str(caught.value)


def test_values_that_do_not_fit_other_keys_are_left_to_the_trial() -> None:
    assert make_space({"way": ["scratch", "finetune"], "weights": ["none", "default"]})["way"] == (
        "scratch",
        "finetune",
    )


def test_dotted_keys_become_mappings() -> None:
    assert nest({"a.b": 1, "a.c": 2, "d": 3}) == {"a": {"b": 1, "c": 2}, "d": 3}
