"""What a card says of confidence in words, and its figures: whatever is on the card, and of an old bundle."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fakes import make_bundle, make_card
from visionloop.bundle import load_bundle, seal_bundle
from visionloop.evaluation.answers import Answers, compute_answered
from visionloop.evaluation.confidence_plots import (
    describe_answered,
    describe_confidence,
    describe_limits,
    draw_certainty,
    draw_risk_coverage,
    draw_sweeps,
)
from visionloop.evaluation.thresholds import sweep_thresholds
from visionloop.records import Interval

PNG = b"\x89PNG"
WANTED = {"error": 0.02, "delta": 0.05, "coverage": 0.95}
FIGURES = {"log_loss": 0.5, "brier": 0.2, "ece": 0.1}
TUNING = {"on": "val", "num_images": 1200, "num_keys": 1100, "kept": "temperature", "before": FIGURES, "after": FIGURES}
RULE = {"confidence": 0.83, "distance": 0.5, "neighbours": 5, "error": 0.02}
PROMISED = {**TUNING, "abstain": {"wanted": WANTED, "promised": 0.0187, "best_bound": 0.0187}}
REFUSED = {**TUNING, "abstain": {"wanted": WANTED, "promised": None, "best_bound": 0.0491}}


def make_answers(*, abstained_n: Any = None, number: int = 40, classes: tuple[str, ...] = ("a", "b", "c")) -> Answers:
    rng = np.random.default_rng(0)
    probs_nk = rng.dirichlet(np.ones(len(classes)), number)
    labels_n = rng.integers(0, len(classes), number)
    return Answers(labels_n, probs_nk, probs_nk.argmax(axis=1), classes, np.arange(number), abstained_n)


def test_words_of_a_card() -> None:
    card = replace(
        make_card(), temperature=1.25, biases={"b": 0.5, "a": -0.25, "c": 0.0}, abstain=RULE, tuning=PROMISED
    )
    assert describe_confidence(card) == {
        "Temperature": "1.25",
        "Biases": "a -0.25, b +0.50, c +0.00",
        "Tuned on": "1,200 validation images (1,100 independent)",
        "Held-out log loss": "0.5000 before, 0.5000 after",
        "Held-out Brier score": "0.2000 before, 0.2000 after",
        "Held-out calibration error": "0.1000 before, 0.1000 after",
        "Does not know": "below confidence 0.83 or beyond distance 0.5 to the 5th nearest validation image; "
        "at most 1.87% wrong is promised",
    }
    assert describe_confidence(make_card()) == {"Temperature": "1"}
    untuned = replace(make_card(), tuning={"on": None, "why": "a random split"})
    assert describe_confidence(untuned) == {"Temperature": "1", "Tuned on": "nothing: a random split"}


def test_what_could_not_be_promised_is_told_at_each_evaluation() -> None:
    card = replace(make_card(), tuning=REFUSED)
    line = "answers everything: at most 2.00% wrong cannot be promised; the lowest bound on validation is 4.91%"
    assert describe_limits(card) == line
    assert describe_answered(card, {}) == f"LOOK: {line}"
    assert describe_answered(make_card(), {}) == ""


def test_more_mistakes_than_wanted_are_told() -> None:
    card = replace(make_card(), abstain=RULE, tuning=PROMISED)
    share, good, bad = (Interval(value, 0.0, 1.0) for value in (0.9, 0.985, 0.97))
    line = "answers 90.0% of the test images; "
    assert describe_answered(card, {"answered": share, "answered_accuracy": good}) == (
        f"{line}1.50% of these are wrong (wanted: 2.00%)"
    )
    assert describe_answered(card, {"answered": share, "answered_accuracy": bad}).startswith(f"LOOK: {line}3.00%")
    assert describe_answered(card, {"answered": Interval(0.0, 0.0, 0.1)}) == "LOOK: answers 0.0% of the test images"


def test_far_fewer_answers_than_on_validation_are_told() -> None:
    facts = {**PROMISED, "abstain": {**PROMISED["abstain"], "num_answered": 1045}}  # 95 % of 1,100
    card, good = replace(make_card(), abstain=RULE, tuning=facts), Interval(0.99, 0.9, 1.0)
    told = describe_answered(card, {"answered": Interval(0.64, 0.6, 0.7), "answered_accuracy": good})
    assert told.startswith("LOOK: answers 64.0% of the test images, 95.0% of the validation images; 1.00% of these")
    assert "LOOK" not in describe_answered(card, {"answered": Interval(0.86, 0.8, 0.9), "answered_accuracy": good})


def test_figures_of_what_is_answered() -> None:
    abstained_n = np.arange(40) < 10
    answers = make_answers(abstained_n=abstained_n)
    figures = compute_answered(answers)
    assert figures["answered"].value == 0.75
    assert figures["answered_accuracy"].value == pytest.approx(answers.hits_n[10:].mean())
    assert compute_answered(make_answers()) == {}
    assert list(compute_answered(make_answers(abstained_n=np.ones(40, bool)))) == ["answered"]


@pytest.mark.parametrize("task", ["binary", "multiclass", "multilabel"])
def test_figures_are_drawn_from_what_a_bundle_keeps(tmp_path: Path, task: str) -> None:
    classes = ("a", "b") if task == "binary" else tuple("abcdefgh")
    make_bundle(tmp_path / "b", classes=classes, task=task)
    answers = make_answers(abstained_n=np.arange(40) % 4 == 0, classes=classes)
    rng = np.random.default_rng(1)
    arrays: dict[str, Any] = {"logits_nk": rng.normal(0, 2, (60, len(classes))).astype(np.float32)}
    arrays["label_n"] = rng.integers(0, len(classes), 60)
    if task == "multilabel":
        labels = rng.random((40, 8)) < 0.3
        answers = replace(answers, labels=labels, chosen=answers.probs_nk > 0.2)
        arrays["targets_nk"] = (rng.random((60, 8)) < 0.3).astype(np.uint8)
    assert draw_certainty(load_bundle(tmp_path / "b"), answers) == {}, "an old bundle keeps no logits"
    np.savez(tmp_path / "b" / "reference.npz", **arrays)
    seal_bundle(tmp_path / "b")
    figures = draw_certainty(load_bundle(tmp_path / "b"), answers)
    assert list(figures) == (["risk"] if task == "multiclass" else ["risk", "threshold"])
    assert all(png.startswith(PNG) for png in figures.values())
    assert figures == draw_certainty(load_bundle(tmp_path / "b"), answers), "same input, same bytes"


def test_where_nothing_is_wrong_there_is_no_figure_of_not_answering(tmp_path: Path) -> None:
    classes = tuple("abcdefgh")
    make_bundle(tmp_path / "b", classes=classes)
    answers = make_answers(classes=classes)
    right = replace(answers, labels=answers.chosen)
    label_n = np.arange(60) % 8
    np.savez(tmp_path / "b" / "reference.npz", logits_nk=(9 * np.eye(8)[label_n]).astype(np.float32), label_n=label_n)
    seal_bundle(tmp_path / "b")
    assert list(draw_certainty(load_bundle(tmp_path / "b"), right)) == []
    assert list(draw_certainty(load_bundle(tmp_path / "b"), replace(right, labels=7 - answers.chosen))) == ["risk"]


def test_few_and_very_many_images_are_drawn() -> None:
    for number in (1, 2, 200_000):
        score_n = np.random.default_rng(number).random(number).astype(np.float32)
        png = draw_risk_coverage([("validation", score_n, score_n > 0.1)], error=None, share=None)
        assert png.startswith(PNG) and len(png) < 100_000
        sweep = sweep_thresholds(score_n, score_n > 0.5)
        assert draw_sweeps([("a name that is far too long for a title, and goes on and on", sweep, 0.5)]).startswith(
            PNG
        )
