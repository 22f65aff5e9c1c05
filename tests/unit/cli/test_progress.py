"""A training on the terminal: lines that align, nothing too often, a display that fits and leaves no trace."""

import io
import math
import re

import pytest
from rich.console import Console

from visionloop.cli.progress import Clock, LineWatcher, LiveWatcher, format_seconds, list_figures, open_watcher
from visionloop.training.watch import EpochReport, StepReport, Watcher


def make_step(epoch: int = 1, step: int = 1, phase: str = "train", **other: object) -> StepReport:
    facts = {"loss": 0.5, "images_per_s": 1234.4, "wait_ratio": 0.02, "num_steps": 10, "max_epochs": 4, **other}
    return StepReport(epoch=epoch, step=step, phase=phase, **facts)  # type: ignore[arg-type]


def make_epoch(epoch: int, *, max_epochs: int = 20, wait: int = 0, **metrics: float) -> EpochReport:
    figures = {"train/loss": 0.25, "val/loss": 0.5, "val/accuracy": 0.75, "val/f1": 0.7, **metrics}
    return EpochReport(epoch, max_epochs, figures, 1234.4, 3.21, "val/loss", 0.5, wait, 5, 60.0)


class Times:
    """A clock that stands still until it is set."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_an_epoch_is_one_line_that_aligns_with_the_next() -> None:
    lines: list[str] = []
    watcher = LineWatcher(lines.append)
    watcher.on_epoch(make_epoch(7))
    watcher.on_epoch(make_epoch(12, wait=2))
    assert lines[0] == (
        "epoch   7/20  train loss 0.2500  val loss 0.5000  accuracy 0.7500  f1 0.7000"
        "  1,234 images/s  3.2 s  best so far"
    )
    assert lines[1].startswith("epoch  12/20  train loss")
    assert lines[1].endswith("  no better for 2 of 5")
    watcher.on_epoch(make_epoch(9, max_epochs=10_000))
    assert lines[2].startswith("epoch     9/10000  ")
    watcher.on_epoch(make_epoch(1, max_epochs=0))
    assert lines[3].startswith("solved  train loss") and lines[3].endswith("  1,234 images/s  3.2 s")


def test_within_an_epoch_a_line_comes_every_fifteen_seconds_at_most() -> None:
    lines: list[str] = []
    times = Times()
    watcher = LineWatcher(lines.append, times)
    for step in range(1, 10):
        times.now += 5
        watcher.on_step(make_step(step=step))
    assert len(lines) == 3
    # 8 of 40 steps since the first one seen, in 40 s: 31 more take 155 s.
    assert lines[2] == "  in epoch 1/4: step 9/10  loss 0.5000  1,234 images/s  at most 2 min 35 s left"
    times.now += 14
    watcher.on_epoch(make_epoch(1))
    times.now += 14
    watcher.on_step(make_step(2, 1, phase="val"))
    assert len(lines) == 4, "a finished epoch is a sign of life too"
    times.now += 2
    watcher.on_step(make_step(2, 3, phase="val"))
    assert lines[4].startswith("  in epoch 2/4: validation 3/10")


def test_time_left_counts_from_the_epoch_that_a_resumed_training_began_with() -> None:
    times = Times()
    clock = Clock(times)
    assert clock.estimate(11, 20, 0.5) is None
    times.now += 30
    assert clock.estimate(12, 20, 0.0) == pytest.approx(30 / 0.5 * 9)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.04, "0.0 s"),
        (12.34, "12.3 s"),
        (59.96, "1 min 00 s"),
        (151, "2 min 31 s"),
        (3599.6, "1 h 00 min"),
        (90_000, "25 h 00 min"),
    ],
)
def test_lengths_of_time(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text


def test_figures_are_those_of_validation_and_the_monitored_one() -> None:
    assert [name for name, _ in list_figures(make_epoch(1))] == ["train loss", "val loss", "accuracy", "f1"]
    alone = EpochReport(1, 2, {"train/loss": 1.0, "train/accuracy": 0.5}, 1, 1, "train/accuracy", 0.5, 0, 5, 0)
    assert list_figures(alone) == [("train loss", 1.0), ("train accuracy", 0.5)]
    other = EpochReport(1, 2, {"train/loss": 1.0, "val/loss": 2.0, "val/map": 0.4}, 1, 1, "val/map", 0.4, 0, 5, 0)
    assert list_figures(other)[-1] == ("val map", 0.4)


def play(width: int, *, color: bool = True) -> str:
    """Return all that a display writes to a terminal of this width."""
    sink = io.StringIO()
    console = Console(file=sink, width=width, force_terminal=True, no_color=not color, highlight=False)
    with LiveWatcher(console) as watcher:
        watcher.tell("imbalance: [none] chosen")
        watcher.on_step(make_step(1, 5))
        watcher.on_epoch(make_epoch(1))
        watcher.on_step(make_step(2, 3, phase="val", loss=math.nan))
        watcher.on_epoch(make_epoch(2, wait=1))
        shown = console.render_lines(watcher._render())
    assert len(shown) == 3, "two bars and a line, none wrapped"
    return sink.getvalue() + "\n".join("".join(segment.text for segment in line) for line in shown)


def test_display_fits_eighty_columns() -> None:
    text = play(80)
    lines = text.split("\n")
    assert "imbalance: [none] chosen" in text
    assert "epoch   train loss  val loss  accuracy      f1  images/s        time" in text
    assert "  1/20      0.2500    0.5000    0.7500  0.7000     1,234       3.2 s" in text
    assert "best val/loss 0.5000 · patience left 4 of 5 · loss 0.5000 · waiting for data 2%" in lines[-1]
    assert "validate 3 of 10" in text
    assert text.count("train loss  val loss") == 1, "the header once"
    assert "\x1b[?25h" in text, "the cursor is there again"


def test_display_without_colour_writes_none() -> None:
    assert "\x1b[32m" in play(80)
    plain = play(80, color=False)
    assert not any(code in plain for code in ("\x1b[32m", "\x1b[36m", "\x1b[90m"))


def test_display_in_a_narrow_window_does_not_wrap() -> None:
    last = re.sub(r"\x1b\[[?\d;]*[A-Za-z]", "", play(40)).split("\n")[-3:]
    assert [line.split()[0] for line in last] == ["epoch", "validate", "best"]
    assert max(len(line.strip("\r")) for line in last) <= 40


def test_only_the_first_rank_talks(capsys: pytest.CaptureFixture[str]) -> None:
    with open_watcher({"RANK": "1"}) as watcher:
        assert type(watcher) is Watcher
    with open_watcher({"RANK": "0"}) as watcher:
        assert type(watcher) is LineWatcher, "no terminal here"
        watcher.tell("a line")
    assert capsys.readouterr().out == "a line\n"


def test_display_draws_nothing_before_the_first_step() -> None:
    sink = io.StringIO()
    with LiveWatcher(Console(file=sink, width=80, force_terminal=True)):
        pass
    assert sink.getvalue() == "", "ranks that were started may have the terminal"
