"""Broken data, window by window: what was so before is no fault."""

import numpy as np
import pytest

from visionloop.monitoring.health import check_colours, check_model, check_traffic
from visionloop.monitoring.window import Traffic
from visionloop.params import Monitor


def make_traffic(number: int = 100, **columns: list[str] | list[float]) -> Traffic:
    values = {
        "client_n": [f"c{i % 5}" for i in range(number)],
        "picture_n": [f"p{i}" for i in range(number)],
        "size_n": ["640 x 480"] * number,
        "contrast_n": [0.2] * number,
        "latency_n": [10.0] * number,
    }
    return Traffic(**{name: np.array(columns.get(name, value)) for name, value in values.items()})


def judge(window: Traffic, reference: Traffic | None = None, volumes: tuple[int, ...] = ()) -> dict[str, str]:
    return {check.name: check.state for check in check_traffic(window, reference, volumes, Monitor())}


def test_sound_traffic_has_no_alert() -> None:
    states = judge(make_traffic(), make_traffic(), (100, 90, 120))
    assert states == dict.fromkeys(("one_client", "same_picture", "blank", "size", "volume"), "fine")
    alone = judge(make_traffic())
    assert (alone["size"], alone["volume"], alone["one_client"]) == ("unknown", "unknown", "fine")


@pytest.mark.parametrize(("share", "state"), [(50, "fine"), (51, "alert")])
def test_one_client_may_have_half(share: int, state: str) -> None:
    clients = ["big"] * share + [f"c{i}" for i in range(100 - share)]
    assert judge(make_traffic(client_n=clients))["one_client"] == state


def test_what_was_so_in_the_reference_is_no_fault() -> None:
    one = make_traffic(client_n=["only"] * 100, picture_n=["test card"] * 100, contrast_n=[0.0] * 100)
    assert judge(one, make_traffic())["one_client"] == "alert"
    states = judge(one, one)
    assert (states["one_client"], states["same_picture"], states["blank"]) == ("fine", "fine", "fine")
    other = make_traffic(client_n=["another"] * 100)
    assert judge(other, one)["one_client"] == "alert"


def test_few_images_of_one_client_are_no_fault() -> None:
    assert judge(make_traffic(6, client_n=["a"] * 6))["one_client"] == "fine"


def test_size_counts_where_there_were_few_sizes() -> None:
    turned = make_traffic(size_n=["480 x 640"] * 60 + ["640 x 480"] * 40)
    assert judge(turned, make_traffic())["size"] == "alert"
    half = make_traffic(size_n=["480 x 640"] * 50 + ["640 x 480"] * 50)
    assert judge(half, make_traffic())["size"] == "fine"
    phones = make_traffic(1000, size_n=[f"{i} x {i}" for i in range(1000)])
    assert judge(turned, phones)["size"] == "fine"
    assert judge(make_traffic(size_n=[""] * 100), make_traffic())["size"] == "alert"


@pytest.mark.parametrize(("number", "state"), [(19, "alert"), (20, "fine"), (500, "fine"), (501, "alert")])
def test_volume_is_held_against_the_median(number: int, state: str) -> None:
    assert judge(make_traffic(number), None, (100, 5, 1000))["volume"] == state


def test_unknown_columns_give_no_verdict() -> None:
    states = judge(make_traffic(client_n=[""] * 100, contrast_n=[np.nan] * 100))
    assert (states["one_client"], states["blank"]) == ("unknown", "unknown")


def test_empty_window_is_one_alert() -> None:
    checks = check_traffic(make_traffic(0), make_traffic(), (), Monitor())
    assert [(check.name, check.kind, check.state) for check in checks] == [("empty", "broken", "alert")]


def test_colours_that_are_swapped_or_gone() -> None:
    """The example of the docstring."""
    rng = np.random.default_rng(0)
    before = np.array([140.0, 120, 90]) + rng.normal(0, 10, (30, 3))
    swapped = check_colours(before[:, ::-1] + 1, before)
    assert swapped.state == "alert"
    assert "red and blue seem to be swapped" in swapped.found
    assert check_colours(before + np.array([20, 0, -10]), before).state == "fine"
    assert check_colours(before.mean(axis=1, keepdims=True).repeat(3, axis=1), before).state == "alert"
    grey = np.full((30, 3), 100.0)
    assert check_colours(grey, grey).state == "fine"
    assert check_colours(before[:5], before).state == "unknown"


def test_model_checks() -> None:
    facts = {"age_days": 40.0, "max_age_days": 30.0, "served": 10, "others": 90, "version": "3", "alias": "2"}
    assert {c.name: c.state for c in check_model(**facts)} == dict.fromkeys(
        ("served_model", "model_age", "alias"), "alert"
    )
    well = check_model(**{**facts, "max_age_days": None, "others": 0, "alias": "3"})
    assert {c.name: c.state for c in well} == {"served_model": "fine", "alias": "fine"}
