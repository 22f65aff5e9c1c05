from datetime import UTC, datetime
from typing import Any

import numpy as np
import pytest

from visionloop.monitoring.shadow import compare, judge_hits
from visionloop.promotion.paired import count_hits

NOW = datetime(2026, 11, 29, tzinfo=UTC)


def make_rows(number: int, champion: str, shadow: str | None, labels: list[str] | None, start: int = 0) -> Any:
    answers, predictions = [], []
    for i in range(start, start + number):
        answers.append({"request_id": f"r{i}", "prediction": shadow, "network_ms": 4.0, "problem": None})
        predictions.append(
            {
                "request_id": f"r{i}",
                "time": NOW,
                "image_sha256": f"{i:064x}",
                "model_digest": "m",
                "prediction": champion,
                "network_ms": 2.0,
                "cached": False,
                "image_kept": i % 2 == 0,
                "feedback_labels": labels,
            }
        )
    return answers, predictions


def test_agreement_time_and_labels_are_counted_by_image() -> None:
    parts = [
        make_rows(6, "a", "a", ["a"]),
        make_rows(3, "a", "b", ["b"], 6),
        make_rows(1, "a", "b", None, 9),
        make_rows(1, "a", None, ["a"], 10),
    ]
    answers, predictions = ([row for part in parts for row in part[k]] for k in (0, 1))
    answers[-1]["problem"] = "crashed"
    answers += [{**answers[0], "request_id": "again"}, {**answers[0], "request_id": "lost"}]
    predictions.append({**predictions[0], "request_id": "again"})
    found = compare(answers, predictions, 0.05)
    assert (found.num_answered, found.num_failed, found.problems, found.num_unmatched) == (12, 1, ("crashed",), 1)
    assert (found.num_images, found.num_agreeing) == (10, 6)
    assert found.agreement == (pytest.approx(0.3127, abs=1e-4), pytest.approx(0.8318, abs=1e-4))  # Wilson, 6 of 10
    assert (found.champion_ms, found.shadow_ms) == ((2.0, 2.0), (4.0, 4.0))
    assert [(one.image_sha256[-1], one.shadow, one.is_kept) for one in found.differences] == [
        *[("6", "b", True), ("7", "b", False), ("8", "b", True), ("9", "b", False)]
    ]
    assert found.labels is not None
    assert (found.labels.num_labels, found.labels.champion, found.labels.shadow) == (9, 6 / 9, 1.0)
    assert (found.labels.only_shadow, found.labels.only_champion, found.labels.verdict) == (3, 0, "cannot tell")
    assert found.labels.num_more is not None
    assert 1 <= found.labels.num_more < 30


def test_answers_of_an_earlier_champion_are_left_out() -> None:
    answers, predictions = make_rows(4, "a", "a", None)
    predictions[0] |= {"model_digest": "old", "time": NOW.replace(year=2025)}
    found = compare(answers, predictions, 0.05)
    assert (found.num_images, found.num_unmatched) == (3, 1)


def test_nothing_is_compared_where_nothing_was_answered() -> None:
    found = compare([], [], 0.05)
    assert (found.num_images, found.agreement, found.labels, found.champion_ms) == (0, None, None, None)


def test_labels_of_several_classes_are_sets() -> None:
    answers, predictions = make_rows(1, "a|b", "", ["b", "a"])
    labels = compare(answers, predictions, 0.05).labels
    assert labels is not None
    assert (labels.champion, labels.shadow) == (1.0, 0.0)
    answers, predictions = make_rows(1, "a|b", "", [])
    labels = compare(answers, predictions, 0.05).labels
    assert labels is not None
    assert (labels.champion, labels.shadow) == (0.0, 1.0)


def simulate(only_shadow: float, only_champion: float, number: int, times: int = 400) -> dict[str, float]:
    """Return how often each verdict comes, where so large shares of images are right in one model alone."""
    draw = np.random.default_rng(0)
    counts = dict.fromkeys(("better", "worse", "cannot tell"), 0.0)
    for _ in range(times):
        kind_n = draw.random(number)
        shadow_n, champion_n = kind_n < 0.8, kind_n < 0.8
        shadow_n |= (kind_n >= 0.8) & (kind_n < 0.8 + only_shadow)
        champion_n |= (kind_n >= 0.8 + only_shadow) & (kind_n < 0.8 + only_shadow + only_champion)
        counts[judge_hits(count_hits(shadow_n, champion_n, np.arange(number)), 0.05).verdict] += 1 / times
    return counts


def test_level_and_power_of_the_verdict() -> None:
    equal = simulate(0.05, 0.05, 300)
    assert equal["better"] + equal["worse"] <= 0.05
    assert equal["better"] + equal["worse"] > 0.005, "it can say something"
    assert simulate(0.12, 0.04, 300)["better"] > 0.85
    assert simulate(0.04, 0.12, 300)["worse"] > 0.85
    assert simulate(0.12, 0.04, 300)["worse"] == 0
