"""Figures on their way to an MLflow that cannot be reached for a while."""

from collections.abc import Mapping
from pathlib import Path

import pytest

from memory_tracking import MemoryTracking
from visionloop.errors import DiskError, TrackingError
from visionloop.training import epoch_end
from visionloop.training.epoch_end import FigureLog


class Flaky(MemoryTracking):
    """An MLflow with one run, that notes what comes and in which order."""

    def __init__(self) -> None:
        super().__init__()
        self.run_id = self.open_run("run", run_id=None, tags={}, params={})
        self.got: list[tuple[int, dict[str, float]]] = []

    def log_metrics(self, run_id: str, metrics: Mapping[str, float], *, step: int = 0) -> None:
        super().log_metrics(run_id, metrics, step=step)
        self.got.append((step, dict(metrics)))


def make_log(work: Path, tracking: Flaky, told: list[str]) -> FigureLog:
    return FigureLog(work, tracking, tracking.run_id, told.append)


def test_figures_are_sent_later_in_order_and_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(epoch_end, "TRY_EVERY_S", 0.0)
    tracking, told = Flaky(), list[str]()
    log = make_log(tmp_path, tracking, told)
    log.add(0, {"a": 0.0})
    tracking.down = True
    log.add(1, {"a": 1.0})
    log.add(2, {"a": 2.0})
    assert told == [
        "MLflow cannot be reached; training goes on, its figures are sent later (cannot be used (connection refused))"
    ]
    tracking.down = False
    log.add(3, {"a": 3.0})
    assert tracking.got == [(step, {"a": float(step)}) for step in range(4)]
    assert told[1:] == ["MLflow can be reached again: all figures are there"]
    assert list(tmp_path.iterdir()) == []


def test_what_one_process_could_not_send_the_next_one_does(tmp_path: Path) -> None:
    tracking, told = Flaky(), list[str]()
    tracking.down = True
    log = make_log(tmp_path, tracking, told)
    log.add(0, {"a": 0.5, "b": float("inf")})
    with pytest.raises(TrackingError):
        log.send()
    again = make_log(tmp_path, tracking, told)
    tracking.down = False
    again.add(0, {"a": 0.25})  # the same epoch, learned once more
    assert tracking.got == [(0, {"a": 0.25})]


def test_a_server_that_is_down_is_not_waited_for_each_epoch(tmp_path: Path) -> None:
    tracking, told = Flaky(), list[str]()
    tracking.down = True
    log = make_log(tmp_path, tracking, told)
    log.add(0, {"a": 0.0})
    tracking.down = False
    log.add(1, {"a": 1.0})
    assert tracking.got == [], "the next try is half a minute later"
    assert [step for step, _ in make_log(tmp_path, tracking, told).unsent] == [0, 1]


def test_a_full_disk_under_a_local_mlflow_ends_no_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(run_id: str, metrics: Mapping[str, float], *, step: int = 0) -> None:
        raise DiskError("mlflow.db", "cannot be written (no space left)", "a disk with free space")

    tracking, told = Flaky(), list[str]()
    log = make_log(tmp_path, tracking, told)
    with monkeypatch.context() as full:
        full.setattr(tracking, "log_metrics", fail)
        log.add(0, {"a": 0.0})
    assert told[0].endswith("its figures are sent later (cannot be written (no space left))")
    log.send()
    assert tracking.got == [(0, {"a": 0.0})]


@pytest.mark.parametrize("text", ["", "{}", "[1]", '[["x", {}]]', "[[1, 2]]"])
def test_a_damaged_note_is_as_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "unsent.json").write_text(text)
    assert make_log(tmp_path, Flaky(), []).unsent == []
