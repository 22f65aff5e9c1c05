"""The trials of `tune` on the terminal: a line each, and in place below them where the present one is."""

import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from visionloop.cli.progress import LineWatcher, LiveWatcher, format_seconds, print_line
from visionloop.training.watch import EpochReport, StepReport, TrialReport, Watcher

if TYPE_CHECKING:
    from rich.console import Console


@contextlib.contextmanager
def open_tune_watcher(env: Mapping[str, str]) -> Iterator[Watcher]:
    """Yield what shows a study: a display on a terminal, lines elsewhere."""
    if not sys.stdout.isatty() or env.get("TERM") == "dumb":
        yield LineTuneWatcher(print_line)
    else:
        from rich.console import Console

        with LiveTuneWatcher(Console(highlight=False)) as watcher:
            yield watcher


class LineTuneWatcher(LineWatcher):
    """One line a trial; within a long trial one now and then."""

    def __init__(self, tell: Callable[[str], None]) -> None:
        super().__init__(tell)
        self._place = ""

    def on_trial_start(self, number: int, total: int, values: Mapping[str, Any]) -> None:
        self._place = f"  in trial {number}/{total}, "

    def on_step(self, report: StepReport) -> None:
        self.say_step(report, self._place)

    def on_epoch(self, report: EpochReport) -> None:
        """Say nothing: a line a trial is enough."""

    def on_trial(self, report: TrialReport, total: int) -> None:
        self.said_now()
        self.tell(describe_trial(report, total))


class LiveTuneWatcher(LiveWatcher):
    """Bars for trials, epochs and steps below, finished trials above."""

    def __init__(self, console: "Console") -> None:
        super().__init__(console)
        self._last: TrialReport | None = None

    def on_trial_start(self, number: int, total: int, values: Mapping[str, Any]) -> None:
        self.start()
        self.set_first(f"trial {number} of {total}", number - 1, total)
        best = self._last.best if self._last else None
        start = f"best {self._last.metric} {best:.4f} · " if self._last and best is not None else ""
        self.set_status(f"{start}{describe_values(values)}")

    def on_epoch(self, report: EpochReport) -> None:
        """Say nothing: a line a trial is enough."""

    def on_trial(self, report: TrialReport, total: int) -> None:
        self._last = report
        style = "green" if report.is_best else "" if report.state == "done" else "bright_black"
        self.print(describe_trial(report, total), style)
        self.set_first(f"trial {report.number} of {total}", report.number, total)


def describe_trial(report: TrialReport, total: int) -> str:
    """Return a finished trial as one line."""
    head = f"trial {report.number:>{max(3, len(str(total)))}}/{total}"
    value = f"{report.metric} {report.value:.4f}" if report.value is not None else f"{report.metric} -"
    epochs = f"{report.epochs} epoch{'' if report.epochs == 1 else 's'}"
    end = "best so far" if report.is_best else report.reason or ""
    if report.state == "failed":
        return f"{head}  failed  {describe_values(report.values)}: {report.reason}"
    line = f"{head}  {value}  {describe_values(report.values)}  {epochs}  {format_seconds(report.seconds)}"
    return f"{line}  {end}".rstrip()


def format_value(value: Any) -> str:
    """Return a value of the space for people."""
    return "null" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def describe_values(values: Mapping[str, Any]) -> str:
    """Return the values of a trial on one line."""
    return "  ".join(f"{key} {format_value(value)}" for key, value in sorted(values.items()))
