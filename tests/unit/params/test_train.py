"""Keys of train, checked when params.yaml is read: the space of tune, thresholds, when to abstain."""

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
        ({"threshold": [0.4, 0.6]}, "'threshold' is none that can be tuned"),
        ({"threshold.at": [0.4, 0.6]}, "'threshold.at' is none that can be tuned"),
        ({"abstain": [None]}, "'abstain' is none that can be tuned"),
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


@pytest.mark.parametrize(
    "value",
    [
        0.3,
        "max_f1",
        {"precision": 0.95},
        {"recall": 0.9},
        {"cost": {"false_positive": 1.0, "false_negative": 5.0}},
    ],
)
def test_a_threshold_is_kept_as_it_is_written(value: Any) -> None:
    params = make_params({"name": "pets", "train": {"threshold": value}})
    dumped = params.model_dump(mode="json")
    assert dumped["train"]["threshold"] == value
    assert make_params(dumped) == params


def test_the_default_threshold_is_a_half_and_nothing_is_left_out() -> None:
    section = make_params({"name": "pets"}).train
    assert (section.model_dump()["threshold"], section.abstain) == (0.5, None)


FORMS = "got {}; expected a number between 0 and 1, max_f1, {{precision: 0.95}}"


@pytest.mark.parametrize(
    ("value", "line"),
    [
        (1.0, "train.threshold.at: got 1.0; expected less than 1"),
        (0, "train.threshold.at: got 0.0; expected greater than 0"),
        (float("nan"), "train.threshold.at: got nan"),
        ("f1", FORMS.format("'f1'")),
        (None, FORMS.format("None")),
        (True, FORMS.format("True")),
        ([0.5], FORMS.format("[0.5]")),
        ({}, FORMS.format("{}")),
        ({"precision": 0.9, "recall": 0.9}, "expected a number between 0 and 1, max_f1, {precision: 0.95}"),
        ({"precision": 1.0}, "train.threshold.precision: got 1.0; expected less than 1"),
        ({"precison": 0.9}, "train.threshold.precison: unknown key; expected precision"),
        ({"cost": {"false_positive": 1}}, "train.threshold.cost.false_negative: missing; expected a value"),
        ({"cost": {"false_positive": 0, "false_negative": 1}}, "false_positive: got 0; expected greater than 0"),
    ],
)
def test_a_threshold_that_is_none_is_refused(value: Any, line: str) -> None:
    with pytest.raises(ParamsError) as caught:
        make_params({"name": "pets", "train": {"threshold": value}})
    assert line in str(caught.value)


@pytest.mark.parametrize(
    ("value", "line"),
    [
        ({"error": 0}, "train.abstain.error: got 0; expected greater than 0"),
        ({"error": 1.0}, "train.abstain.error: got 1.0; expected less than 1"),
        ({"error": None, "coverage": None}, "expected `error`, `coverage` or both; or no `abstain` at all"),
        ({"errors": 0.02}, "train.abstain.errors: unknown key"),
        ({"error": 0.02, "delta": 0.7}, "train.abstain.delta: got 0.7; expected less than 0.5"),
        (0.02, "train.abstain: got 0.02"),
    ],
)
def test_a_rule_of_abstaining_that_is_none_is_refused(value: Any, line: str) -> None:
    with pytest.raises(ParamsError) as caught:
        make_params({"name": "pets", "train": {"abstain": value}})
    assert line in str(caught.value)
