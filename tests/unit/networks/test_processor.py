"""What is taken of several candidates, what is kept of a measurement, and how one goes, by a clock of the test."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from visionloop.networks import processor
from visionloop.networks.processor import (
    FEW_ROUNDS,
    LIMIT_S,
    MAX_ROUNDS,
    Measured,
    load_measured,
    measure_once,
    sums_int8_exactly,
    time_in_turn,
)

FACTS: dict[str, Any] = {"step": "train", "backbone": "resnet18", "image_size": [224, 224], "processor": "x"}


@pytest.mark.parametrize(
    ("images_per_s", "cosine", "choice"),
    [
        ({"fp32": 24.0, "bf16": 16.0}, {}, "fp32"),
        ({"fp32": 18.0, "bf16": 24.0}, {}, "bf16"),
        ({"fp32": 100.0, "bf16": 109.9}, {}, "fp32"),
        ({"fp32": 100.0, "bf16": 110.1}, {}, "bf16"),
        ({"fp32": 10.0, "bf16": 0.0}, {}, "fp32"),
        ({"fp32": 0.0, "bf16": 0.0}, {}, "fp32"),
        ({"fp32": 10.0}, {}, "fp32"),
        ({"a": 10.0, "b": 30.0, "c": 20.0}, {"b": 0.9989, "c": 0.9991}, "c"),
        ({"a": 10.0, "b": 30.0, "c": 20.0}, {"b": 0.9991, "c": 0.9991}, "b"),
        ({"a": 100.0, "b": 124.9}, {"b": 1.0}, "a"),
        ({"a": 100.0, "b": 125.1}, {"b": 1.0}, "b"),
    ],
)
def test_another_candidate_is_taken_where_it_is_a_tenth_faster_and_agrees(
    images_per_s: dict[str, float], cosine: dict[str, float], choice: str
) -> None:
    assert Measured(FACTS, images_per_s, cosine).choice == choice


def test_a_measurement_in_words() -> None:
    assert Measured(FACTS, {"fp32": 17.21, "bf16": 33.4}).describe() == "bf16: 33 images/s against 17 in fp32"
    measured = Measured(FACTS, {"a": 1234.5, "b": 0.0, "c": 2000.0}, {"c": 0.5})
    assert measured.describe_all() == (
        "train resnet18 at 224 x 224: a: 1,234 images/s against none in b, 2,000 in c (its vectors differ)"
    )


@pytest.mark.parametrize(
    ("machine", "flags", "exact"),
    [
        ("x86_64", "avx2 avx512f", False),
        ("x86_64", "avx2 avx512f avx512_vnni", True),
        ("AMD64", "avx2 avx_vnni", True),
        ("AMD64", "", False),
        ("aarch64", "", True),
    ],
)
def test_sums_of_int8_are_cut_off_on_x86_without_vnni(
    machine: str, flags: str, exact: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cpuinfo").write_text(f"model name : x\nflags : {flags}\n")
    monkeypatch.setattr(processor, "CPUINFO", tmp_path / "cpuinfo")
    monkeypatch.setattr(processor.platform, "machine", lambda: machine)
    assert sums_int8_exactly() is exact


def never() -> Measured:
    raise AssertionError("measured again")


def test_a_folder_that_cannot_be_written_is_no_reason_to_stop(tmp_path: Path) -> None:
    (tmp_path / "hidden").write_text("a file where the folder should be")
    first = Measured(FACTS, {"fp32": 1.0, "bf16": 2.0})
    assert measure_once(tmp_path / "hidden", FACTS, ["fp32", "bf16"], lambda: first) == first


def test_what_was_measured_is_kept_beside_what_else_was(tmp_path: Path) -> None:
    first = Measured(FACTS, {"fp32": 1.0, "bf16": 2.0})
    other = Measured({**FACTS, "backbone": "small_cnn"}, {"fp32": 3.0, "bf16": 1.0}, {"bf16": 0.9})
    for one in (first, other):
        assert measure_once(tmp_path, one.facts, list(one.images_per_s), lambda one=one: one) == one
    for one in (first, other):
        assert measure_once(tmp_path, one.facts, list(one.images_per_s), never) == one
    assert load_measured(tmp_path) == [first, other]
    assert [path.name for path in tmp_path.iterdir()] == ["machine.json"]
    newer = Measured(FACTS, {"fp32": 1.0})
    assert measure_once(tmp_path, FACTS, ["fp32"], lambda: newer) == newer
    assert load_measured(tmp_path) == [other, newer], "other candidates are measured again"


def test_what_failed_is_not_kept(tmp_path: Path) -> None:
    measure_once(tmp_path, FACTS, ["fp32", "bf16"], lambda: Measured(FACTS, {"fp32": 0.0, "bf16": 0.0}))
    assert load_measured(tmp_path) == []


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "{}",
        '{"measured": 5}',
        '{"measured": [5]}',
        '{"measured": [{"facts": {}, "images_per_s": {}, "cosine": {}}]}',
        '{"measured": [{"facts": {}, "images_per_s": {"fp32": NaN}, "cosine": {}}]}',
        '{"measured": [{"facts": {}, "images_per_s": {"fp32": -1}, "cosine": {}}]}',
        '{"measured": [{"facts": 5, "images_per_s": {"fp32": 1}, "cosine": {}}]}',
        '{"measured": [{"facts": {}, "images_per_s": ["fp32"], "cosine": {}}]}',
    ],
)
def test_a_damaged_or_foreign_file_is_measured_again(tmp_path: Path, text: str) -> None:
    (tmp_path / "machine.json").write_text(text)
    assert load_measured(tmp_path) == []
    measured = Measured(FACTS, {"fp32": 1.0, "bf16": 2.0})
    measure_once(tmp_path, FACTS, ["fp32", "bf16"], lambda: measured)
    (kept,) = json.loads((tmp_path / "machine.json").read_text())["measured"]
    assert kept == {"facts": FACTS, "images_per_s": {"fp32": 1.0, "bf16": 2.0}, "cosine": {}}


class Clock:
    """A clock that only steps move."""

    def __init__(self) -> None:
        self.now = 0.0
        self.log: list[str] = []

    def __call__(self) -> float:
        return self.now

    def make_step(self, name: str, *seconds: float, fails_at: int = 0) -> Callable[[], None]:
        """A step that takes these seconds in turn, the last ones for ever, and fails when it is run for that time."""

        def step() -> None:
            self.log.append(name)
            number = self.log.count(name)
            self.now += seconds[min(number, len(seconds)) - 1]
            if number == fails_at:
                raise RuntimeError("no such instruction")

        return step


def test_steps_are_timed_in_turn_by_their_best_times() -> None:
    clock = Clock()
    steps = {"a": clock.make_step("a", 0.01, 0.2, 0.4, 0.21), "b": clock.make_step("b", 5.0, 0.1)}
    assert time_in_turn(steps, 8, clock=clock) == {"a": 40.0, "b": 80.0}
    assert clock.log == ["a", "b"] * 4, "one round goes before, uncounted, and three are enough"


def test_a_busy_machine_is_waited_for_within_limits() -> None:
    clock, never = Clock(), Clock()
    steps = {"a": clock.make_step("a", 0.1), "b": clock.make_step("b", 1.0, 1.0, 0.4, 0.9, 0.1, 0.9, 0.105, 0.1)}
    assert time_in_turn(steps, 1, clock=clock) == {"a": 10.0, "b": 10.0}
    assert clock.log.count("b") == 1 + 6, "until the two best are alike"
    # Each best time is a fifth better than the one before: never calm.
    assert time_in_turn({"a": never.make_step("a", *(2 * 0.8**n for n in range(99)))}, 1, clock=never)["a"] > 1
    assert LIMIT_S < never.now - 2 < LIMIT_S + 1


def test_a_quick_step_is_timed_often_and_a_slow_one_once() -> None:
    quick, slow = Clock(), Clock()
    assert time_in_turn({"a": quick.make_step("a", 0.001)}, 1, clock=quick) == {"a": 1000.0}
    assert len(quick.log) == 1 + MAX_ROUNDS
    medium = Clock()
    time_in_turn({"a": medium.make_step("a", 1.0)}, 1, clock=medium)
    assert len(medium.log) == 1 + FEW_ROUNDS
    assert time_in_turn({"a": slow.make_step("a", 30.0)}, 60, clock=slow) == {"a": 2.0}
    assert len(slow.log) == 1 + 1


@pytest.mark.parametrize("fails_at", [1, 2])
def test_a_step_that_cannot_be_run_has_no_speed(fails_at: int) -> None:
    clock = Clock()
    steps = {"a": clock.make_step("a", 0.5), "b": clock.make_step("b", 0.1, fails_at=fails_at)}
    assert time_in_turn(steps, 1, clock=clock) == {"a": 2.0, "b": 0.0}
    assert clock.log.count("b") == fails_at
