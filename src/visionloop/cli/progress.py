"""A training on the terminal: a calm display in place, or plain lines where there is no terminal. Imports no torch."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from visionloop.training.watch import EpochReport, StepReport, TrialReport, Watcher

if TYPE_CHECKING:
    from rich.console import Console


LINE_EVERY_S = 15.0
SHORT_NAMES = {"train/loss": "train loss", "val/loss": "val loss", "val/accuracy": "accuracy", "val/f1": "f1"}


@contextlib.contextmanager
def open_watcher(env: Mapping[str, str], *, quiet: bool = False, is_study: bool = False) -> Iterator[Watcher]:
    """Yield what shows a training, or a study of several: a display on a terminal, lines elsewhere.

    On any rank but the first it shows nothing.
    """
    if quiet or not is_first_rank(env):
        yield Watcher()
    elif not sys.stdout.isatty() or env.get("TERM") == "dumb":
        yield (LineTuneWatcher if is_study else LineWatcher)(print_line)
    else:
        from rich.console import Console

        with (LiveTuneWatcher if is_study else LiveWatcher)(Console(highlight=False)) as watcher:
            yield watcher


def is_first_rank(env: Mapping[str, str]) -> bool:
    """Say whether this is the one process that talks, of those that train together (torchrun sets RANK)."""
    return env.get("RANK", "0") == "0"


def print_line(line: str) -> None:
    """Print a line so that whoever reads a pipe has it at once."""
    print(line, flush=True)


class Clock:
    """Estimates the time left from the epochs and steps done since it saw the first one."""

    def __init__(self, get_s: Callable[[], float] = time.perf_counter) -> None:
        self.get_s = get_s
        self._first: tuple[float, float] | None = None

    def estimate(self, epoch: int, max_epochs: int, epoch_ratio: float) -> float | None:
        """Return the seconds left if all epochs are run; None as long as nothing can be said."""
        now, done = self.get_s(), epoch - 1 + epoch_ratio
        if self._first is None:
            self._first = (now, done)
        passed, gone = now - self._first[0], done - self._first[1]
        return (max_epochs - done) * passed / gone if gone > 0 and passed > 0 else None


class LineWatcher(Watcher):
    """One line an epoch; within a long epoch one now and then."""

    def __init__(self, tell: Callable[[str], None], get_s: Callable[[], float] = time.perf_counter) -> None:
        self.clock, self._tell, self._said = Clock(get_s), tell, get_s()

    def tell(self, line: str) -> None:
        self._tell(line)

    def on_step(self, report: StepReport) -> None:
        left = estimate_left(self.clock, report)
        self.say_step(report, "  in ", f"  at most {format_seconds(left)} left" if left is not None else "")

    def say_step(self, report: StepReport, before: str, after: str = "") -> None:
        """Say where an epoch is, if nothing was said for a while."""
        now = self.clock.get_s()
        if now - self._said >= LINE_EVERY_S:
            self._said = now
            self._tell(f"{before}epoch {report.epoch}/{report.max_epochs}: {describe_step(report)}{after}")

    def said_now(self) -> None:
        """Begin to count the time without a line."""
        self._said = self.clock.get_s()

    def on_epoch(self, report: EpochReport) -> None:
        self.said_now()
        figures = "".join(f"  {label} {value:.4f}" for label, value in list_figures(report))
        speed = f"{report.images_per_s:,.0f} images/s  {format_seconds(report.seconds)}"
        self._tell(f"{name_epoch(report)}{figures}  {speed}  {describe_wait(report)}".rstrip())


class LiveWatcher(Watcher):
    """Bars for epochs and steps below, finished epochs above as lines of a table. To be used as a workspace."""

    def __init__(self, console: "Console") -> None:
        from rich.live import Live
        from rich.progress import BarColumn, Progress, TextColumn
        from rich.table import Column

        self.console, self.clock = console, Clock()
        self._bars = Progress(
            TextColumn("{task.description}", table_column=Column(min_width=16)),
            BarColumn(None, style="bright_black", complete_style="cyan", finished_style="cyan"),
            TextColumn("{task.fields[note]}", table_column=Column(min_width=24)),
            expand=True,
            console=console,
        )
        self._first = self._bars.add_task("", total=None, visible=False, note="")
        self._epochs = self._bars.add_task("epoch", total=None, visible=False, note="")
        self._steps = self._bars.add_task("step", total=None, visible=False, note="")
        self._status, self._best = "", ""
        self._header: list[str] = []
        self._runs = False  # not before the first step: ranks that were started may have the terminal
        self._live = Live(console=console, get_renderable=self._render, transient=True, refresh_per_second=4)

    def __enter__(self) -> "LiveWatcher":
        return self

    def __exit__(self, *error: object) -> None:
        if self._runs:
            self._live.stop()

    def start(self) -> None:
        """Begin to draw, if it does not yet."""
        if not self._runs:
            self._runs = True
            self._live.start()

    def set_first(self, words: str, done: int, total: int) -> None:
        """Show a bar above the others."""
        self._bars.update(self._first, description=words, completed=done, total=total, visible=True)

    def set_status(self, words: str) -> None:
        """Show words at the beginning of the last line."""
        self._best, self._status, self.clock = words, "", Clock()

    def tell(self, line: str) -> None:
        self.print(line)

    def print(self, line: str, style: str = "", *, last: str = "") -> None:
        """Print a line above the bars; `last` is its end, in green. (A style of the console would reach the bars.)"""
        from rich.text import Text

        self.console.print(Text(line, style).append(last, "green"), soft_wrap=True)

    def _hide(self, words: str) -> None:
        """Show words instead of bars: what comes next has no steps."""
        for task in (self._epochs, self._steps):
            self._bars.update(task, visible=False)
        self._status = words

    def on_step(self, report: StepReport) -> None:
        self.start()
        left = estimate_left(self.clock, report)
        done = report.epoch - 1 + (report.step / max(report.num_steps, 1) if report.phase == "train" else 1)
        note = f"at most {format_seconds(left)} left" if left is not None else ""
        self._bars.update(
            self._epochs,
            description=f"epoch {report.epoch} of {report.max_epochs}",
            completed=done,
            total=report.max_epochs,
            note=note,
            visible=True,
        )
        word = "step" if report.phase == "train" else "validate"
        speed = f"{report.images_per_s:,.0f} images/s" if report.phase == "train" else ""
        self._bars.update(
            self._steps,
            description=f"{word} {report.step} of {report.num_steps}",
            completed=report.step,
            total=report.num_steps,
            note=speed,
            visible=True,
        )
        if report.phase == "train":
            self._status = f"loss {report.loss:.4f} · waiting for data {report.wait_ratio:.0%}"

    def on_epoch(self, report: EpochReport) -> None:
        names, values = zip(*list_figures(report), strict=True)
        widths = [max(6, len(name)) for name in names]
        epoch = name_epoch(report).removeprefix("epoch ")
        header = [
            f"{'epoch':<{len(epoch)}}",
            *(f"{name:>{width}}" for name, width in zip(names, widths, strict=True)),
            "images/s",
            f"{'time':>10}",
        ]
        cells = [
            epoch,
            *(f"{value:>{width}.4f}" for value, width in zip(values, widths, strict=True)),
            f"{report.images_per_s:>8,.0f}",
            f"{format_seconds(report.seconds):>10}",
        ]
        if header != self._header:
            self._header = header
            self.print("  ".join(header), "bright_black")
        self.print("  ".join(cells), last="" if report.wait else "  best")
        left = report.patience - report.wait
        self._best = f"best {report.monitor} {report.best:.4f} · patience left {left} of {report.patience}"
        if report.epoch >= report.max_epochs or report.wait >= report.patience:
            self._hide("making the bundle ...")

    def _render(self) -> Any:
        from rich.console import Group
        from rich.text import Text

        status = " · ".join(part for part in (self._best, self._status) if part)
        line = Text(status, style="bright_black", no_wrap=True, overflow="ellipsis")
        return Group(self._bars, line) if status else self._bars


def estimate_left(clock: Clock, report: StepReport) -> float | None:
    """Return the seconds left at a step, if all epochs are run."""
    ratio = report.step / max(report.num_steps, 1) if report.phase == "train" else 1.0
    return clock.estimate(report.epoch, report.max_epochs, ratio)


def list_figures(report: EpochReport) -> list[tuple[str, float]]:
    """Return the figures that a person looks at: those of validation if there was one, and the monitored one."""
    names = [name for name in SHORT_NAMES if name in report.metrics]
    if "val/loss" not in report.metrics and "train/accuracy" in report.metrics:
        names.append("train/accuracy")
    if report.monitor in report.metrics and report.monitor not in names:
        names.append(report.monitor)
    return [(SHORT_NAMES.get(name, name.replace("/", " ")), report.metrics[name]) for name in names]


def name_epoch(report: EpochReport) -> str:
    """Return `epoch   7/20`, of the same width for all epochs of a training; `solved`: there are none."""
    if not report.max_epochs:
        return "solved"
    return f"epoch {report.epoch:>{max(3, len(str(report.max_epochs)))}}/{report.max_epochs}"


def describe_wait(report: EpochReport) -> str:
    """Say whether an epoch was the best, and how much patience is left if not."""
    if not report.max_epochs:
        return ""
    return f"no better for {report.wait} of {report.patience}" if report.wait else "best so far"


def describe_step(report: StepReport) -> str:
    """Return where an epoch is, on one line."""
    if report.phase == "val":
        return f"validation {report.step}/{report.num_steps}"
    return f"step {report.step}/{report.num_steps}  loss {report.loss:.4f}  {report.images_per_s:,.0f} images/s"


def format_seconds(seconds: float) -> str:
    """Return a length of time for people: 0.4 s, 12.3 s, 2 min 31 s, 1 h 05 min."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60:,} h {minutes % 60:02d} min"


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
