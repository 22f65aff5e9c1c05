"""Long work that is no training: how much is done, at which rate, and for how long still; or that it still goes on."""

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator

from visionloop.cli.progress import format_seconds
from visionloop.lifetime import terminable
from visionloop.words import make_log_progress

MOMENT_S = 1.5  # what is done by then needs no progress
WAITING_EVERY_S = 5.0


def make_progress(verb: str, unit: str, *, quiet: bool = False, only_slow: bool = False) -> Callable[[int, int], None]:
    """Return a callback (done, total) that shows progress: in place on a terminal, else a line every few seconds.

    A total of 0 is one that is not known yet. `quiet`: it shows nothing. `only_slow`: nothing of what takes a moment.
    """
    if quiet:
        return lambda done, total: None
    if only_slow:
        return _hide_quick(make_progress(verb, unit))
    if not sys.stdout.isatty():
        return make_log_progress(verb, unit, lambda line: print(line, flush=True))

    def show(line: str) -> None:
        print(f"\r{line:<78}", end="", flush=True)

    in_place = make_log_progress(verb, unit, show, every_s=0.1)

    def show_and_end(done: int, total: int) -> None:
        in_place(done, total)
        if done >= total > 0:
            print(flush=True)

    return show_and_end


def _hide_quick(show: Callable[[int, int], None]) -> Callable[[int, int], None]:
    """Return a callback that passes on what comes later than a moment from now, unless all is done by then."""
    started, is_shown = time.perf_counter(), False

    def show_if_slow(done: int, total: int) -> None:
        nonlocal is_shown
        is_shown = is_shown or (time.perf_counter() - started > MOMENT_S and (done < total or not total))
        if is_shown:
            show(done, total)

    return show_if_slow


@contextlib.contextmanager
def show_waiting(
    words: str, *, quiet: bool = False, every_s: float = WAITING_EVERY_S
) -> Iterator[Callable[[str], None]]:
    """Say while a block runs that it still does, and for how long: in place on a terminal, else a line now and then.

    It is for what cannot count its work. Yields what prints a line in between. `quiet`: nothing but such lines.
    """
    is_live, ended, lock = sys.stdout.isatty(), threading.Event(), threading.Lock()
    started = time.perf_counter()

    def tell(line: str) -> None:
        with lock:
            print(f"\r{'':<78}\r" * (is_live and not quiet) + line, flush=True)

    def wait() -> None:
        while not ended.wait(1.0 if is_live else every_s):
            line = f"{words}: {format_seconds(time.perf_counter() - started)}"
            with lock:
                print(f"\r{line:<78}" if is_live else line, end="" if is_live else "\n", flush=True)

    thread = threading.Thread(target=wait, daemon=True)
    if not quiet:
        thread.start()
    try:
        yield tell
    finally:
        ended.set()
        if not quiet:
            thread.join()
            if is_live:
                print(f"\r{'':<78}\r", end="", flush=True)


@contextlib.contextmanager
def tell_when_stopped() -> Iterator[None]:
    """Say on Ctrl-C and SIGTERM that what was done is kept."""
    try:
        with terminable():
            yield
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        raise
