"""Which keys of `train` make the head of `frozen` learn by epochs, and which do not fit one that is solved."""

from typing import Any

import pytest
from pydantic import ValidationError

from visionloop.params import Train

BY_EPOCHS = {"clip_norm": 1.0, "dropout": 0.1, "ema": 0.9, "schedule": "constant", "precision": "bf16"}
SOLVED = {"label_smoothing": 0.1, "imbalance": "weights", "batch_size": 8, "learning_rate": 0.1, "max_epochs": 3}


@pytest.mark.parametrize("key", BY_EPOCHS)
def test_what_only_epochs_can_do_asks_for_epochs(key: str) -> None:
    section = Train.model_validate({"way": "frozen", key: BY_EPOCHS[key]})
    assert section.list_epoch_keys() == [key]
    assert not section.solves_head


@pytest.mark.parametrize("key", SOLVED)
def test_other_keys_leave_the_head_to_be_solved(key: str) -> None:
    assert Train.model_validate({"way": "frozen", key: SOLVED[key]}).solves_head
    assert Train.model_validate({"way": "frozen", "solver": "lbfgs", key: SOLVED[key]}).solves_head
    assert not Train.model_validate({"way": "frozen", "solver": "epochs", key: SOLVED[key]}).solves_head
    assert not Train.model_validate({"way": "scratch", key: SOLVED[key]}).solves_head


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"solver": "lbfgs"}, "`solver: lbfgs` with `way: frozen` alone: with `way: scratch` there is no such head"),
        ({"way": "knn", "solver": "lbfgs"}, "with `way: knn` there is no such head"),
        (
            {"way": "frozen", "solver": "lbfgs", "ema": 0.9, "dropout": 0.1},
            "no dropout, ema with `solver: lbfgs`: only `solver: epochs` does that",
        ),
        ({"C": 1.0}, "`C` with `way: frozen` and `solver: lbfgs` alone"),
        ({"way": "frozen", "solver": "epochs", "C": 1.0}, "`C` with `way: frozen` and `solver: lbfgs` alone"),
        ({"way": "frozen", "ema": 0.9, "C": 1.0}, "`solver: lbfgs` alone; ema needs `solver: epochs`"),
        ({"way": "frozen", "C": 0.0}, "greater than 0"),
        ({"way": "frozen", "solver": "newton"}, "'auto', 'lbfgs' or 'epochs'"),
    ],
)
def test_keys_that_do_not_fit_are_refused(keys: dict[str, Any], expected: str) -> None:
    with pytest.raises(ValidationError) as caught:
        Train.model_validate(keys)
    assert expected in str(caught.value)
