"""Starts the parts, asks how they are, starts one again that has ended, and stops all of them together.

A part that ends by itself is started again after 1, 2, 4 ... at most 60 seconds. While all is being started, a part
that the others cannot do without may fail three times; then all is stopped again.
"""

import contextlib
import os
import re
import secrets
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from visionloop.errors import ServingError
from visionloop.lifetime import MARK_VARIABLE, start_apart, stop_marked, stop_marked_with_us, taking_signals
from visionloop.secrets import mask
from visionloop.up.board import STARTING, STOPPING, UP, Board, PartState, State
from visionloop.up.parts import Part
from visionloop.workspace import get_now

TICK_S, LOOK_EVERY_S, TOLD_EVERY_S = 0.2, 3.0, 5.0
START_S = 180.0  # until a part answers for the first time
SILENT_S = 120.0  # of a part that has answered before: then it is started again
SOUND_S = 60.0  # so long it must be well for its failures to be forgotten
MAX_DELAY_S = 60.0
MAX_FAILURES = 3  # of a vital part, while all is being started
STOP_S = 15.0
LEFT_S = 10.0  # for what the parts have left
MAX_LOG_BYTES = 10_000_000
ERROR_LINE = re.compile(r"([A-Za-z_][\w.]*)?(Error|Exception|error): ")
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

Tell = Callable[[str], None]


@dataclass(frozen=True)
class _Look:
    held: str
    is_well: bool
    fingerprint: str


@dataclass
class _Running:
    """One part and all that is known of it. Times are of the monotonic clock."""

    part: Part
    log: Path
    state: str = "waiting"
    why: str = ""
    since: str = field(default_factory=get_now)
    restarts: int = 0
    failures: int = 0
    process: "subprocess.Popen[str] | None" = None
    fingerprint: str | None = None
    started_at: float = 0.0
    well_at: float = 0.0
    next_start: float = 0.0
    next_look: float = 0.0
    look: "Future[_Look] | None" = None

    @property
    def is_settled(self) -> bool:
        """Whether nothing more is to be waited for: it is ready, or why it is not is known."""
        is_held = self.state == "waiting" and bool(self.why)
        return self.state == "ready" or is_held or (not self.part.is_vital and self.failures > 0)

    def describe(self, logs: str) -> PartState:
        pid = self.process.pid if self.process else 0
        log = f"{logs}/{self.log.name}" if self.part.command else ""
        facts = (self.part.name, self.part.title, self.state, self.why, self.part.url, pid, self.since)
        return PartState(*facts, self.restarts, log)


class Supervisor:
    """All parts of one workspace. `tell` gets a line whenever something changes."""

    def __init__(self, board: Board, parts: Sequence[Part], environment: Mapping[str, str], tell: Tell) -> None:
        self.board, self.tell = board, tell
        self.mark = secrets.token_hex(16)
        self.environment = {**environment, MARK_VARIABLE: self.mark}
        self.running = [_Running(part, board.folder / f"{part.name}.log") for part in parts]
        self.phase, self.started_at = STARTING, get_now()
        self._num_signals = 0
        self._written: State | None = None
        self._pool = ThreadPoolExecutor(max_workers=len(parts), thread_name_prefix="look")

    def run(self, on_up: Callable[[], None] = lambda: None) -> None:
        """Start all, and keep it up until Ctrl-C, SIGTERM or SIGHUP; then stop all. The caller holds the lock.

        Raises:
            ServingError: a part that the others need did not start; nothing is left running.
        """
        watcher = stop_marked_with_us(self.mark)
        with self._taking_signals():
            try:
                self._start_all()
                if not self._num_signals:
                    self.phase = UP
                    self._write()
                    on_up()
                while not self._num_signals:
                    self._tick()
                    if watcher.poll() is not None:
                        watcher = stop_marked_with_us(self.mark)
                    time.sleep(TICK_S)
            finally:
                self._stop_all()
                watcher.terminate()
                watcher.wait()

    def _start_all(self) -> None:
        begun, told_at = time.monotonic(), time.monotonic()
        while not self._num_signals:
            self._tick()
            open_ones = [one for one in self.running if not one.is_settled]
            if not open_ones:
                return
            now = time.monotonic()
            for one in self.running:
                late = one.part.is_vital and now - begun > START_S and one.state != "ready"
                if one.part.is_vital and (late or one.failures >= MAX_FAILURES):
                    found = one.why or f"does not answer after {START_S:.0f} s"
                    raise ServingError(one.part.title, f"did not start: {found}", "it to answer", f"See {one.log}.")
            if now - begun > START_S:
                return
            if now - told_at >= TOLD_EVERY_S:
                told_at = now
                names = ", ".join(one.part.title for one in open_ones)
                self.tell(f"  waiting for {names}: {now - begun:.0f} s")
            time.sleep(TICK_S)

    def _tick(self) -> None:
        """Look at each part once, and do what is due."""
        now = time.monotonic()
        for one in self.running:
            if one.process and one.process.poll() is not None:
                self._note_end(one, now)
            if one.look is None and now >= one.next_look:
                one.look = self._pool.submit(_look_at, one.part, is_running=one.process is not None)
            elif one.look is not None and one.look.done():
                look, one.look, one.next_look = one.look, None, now + LOOK_EVERY_S
                self._act(one, look.result(), now)
                if one.state == "starting" or self.phase == STARTING:
                    one.next_look = now + TICK_S
        self._write()

    def _act(self, one: _Running, look: _Look, now: float) -> None:
        """Do what a look at a part asks for."""
        if not one.part.command:
            self._set(one, "ready" if look.is_well else "silent", "" if look.is_well else "does not answer")
        elif one.process is None:
            needed = next((other for other in self.running if other.part.name == one.part.needs), None)
            if look.held:
                self._set(one, "waiting", look.held)
            elif needed and needed.state != "ready":
                self._set(one, "waiting", "" if self.phase == STARTING else f"for {needed.part.title}")
            elif now >= one.next_start:
                self._start(one, look, now)
        elif look.is_well:
            one.well_at = now
            self._set(one, "ready")
            if one.failures and now - one.started_at > SOUND_S:
                one.failures = 0
            if look.fingerprint not in ("", one.fingerprint) and not _has_children(one.process):
                self._restart_for_params(one)
        elif now - max(one.well_at, one.started_at) > (SILENT_S if one.well_at else START_S):
            self._set(one, "silent", f"did not answer for {now - max(one.well_at, one.started_at):.0f} s")
            _kill_group(one.process)

    def _start(self, one: _Running, look: _Look, now: float) -> None:
        _keep_log_short(one.log)
        environment = {**self.environment, **one.part.environment}
        try:
            with one.log.open("a") as log:
                print(f"--- {get_now()} {' '.join(one.part.command[1:4])} ...", file=log, flush=True)
                one.process = start_apart(one.part.command, log, cwd=environment["VISIONLOOP_HOME"], env=environment)
        except OSError as exc:  # a full disk, no memory: it passes, and the other parts must go on
            self._put_off(one, f"cannot be started: {exc.strerror}", now)
            return
        if one.failures:
            one.restarts += 1
        one.started_at, one.well_at, one.fingerprint = now, 0.0, look.fingerprint
        one.look, one.next_look = None, now + TICK_S
        self._set(one, "starting")

    def _note_end(self, one: _Running, now: float) -> None:
        """Note that a part has ended by itself, and when it is started again."""
        assert one.process is not None
        code = one.process.returncode
        how = f"was killed (signal {-code})" if code < 0 else f"ended with code {code}"
        last = read_reason(one.log) if code > 0 else ""  # who was killed, or ended well, has not said why
        _kill_group(one.process)  # what it had started still holds its port
        self._put_off(one, f"{how}{f': {last}' if last else ''}", now)

    def _put_off(self, one: _Running, why: str, now: float) -> None:
        """Note that a part has failed, and start it later, each time after twice as long."""
        delay = min(MAX_DELAY_S, 2.0**one.failures)
        one.failures += 1
        one.process, one.next_start, one.look, one.next_look = None, now + delay, None, now
        self._set(one, "restarting", f"{why}; starts again in {delay:.0f} s")

    def _restart_for_params(self, one: _Running) -> None:
        """Start a part anew whose section of params.yaml was changed. It has no work under way."""
        assert one.process is not None
        self.tell(f"{one.part.title}: params.yaml has changed, it is started anew")
        self._stop(one)
        one.next_start = one.next_look = 0.0
        self._set(one, "waiting")

    def _set(self, one: _Running, state: str, why: str = "") -> None:
        """Note a state of a part, and tell it if it is new."""
        if (one.state, one.why) == (state, why):
            return
        one.state, one.why, one.since = state, why, get_now()
        if state == "starting":
            self.tell(f"  {one.part.title:<10} starting (log: .visionloop/up/{one.log.name})")
        elif state == "ready":
            took = f" after {time.monotonic() - one.started_at:.0f} s" if one.part.command else ""
            self.tell(f"  {one.part.title:<10} ready{took}{f': {one.part.url}' if one.part.url else ''}")
        elif why:
            self.tell(f"  {one.part.title:<10} {state}: {why}")

    def _write(self) -> None:
        parts = tuple(one.describe(".visionloop/up") for one in self.running)
        state = State(os.getpid(), self.mark, self.phase, self.started_at, parts)
        if state != self._written:
            with contextlib.suppress(OSError):  # a full disk: it is told once there is room
                self.board.write(state)
                self._written = state

    def _stop_all(self) -> None:
        """Stop the parts, the last that was started first, and what they have left."""
        self.phase = STOPPING
        self._write()
        with contextlib.suppress(OSError):  # its terminal is closed, its pipe ended: then it stops just as well
            self.tell("stopping; a retrain that is under way goes on at the next one ...")
        for one in reversed(self.running):
            self._stop(one)
            one.state, one.why, one.since = "stopped", "", get_now()
        self._pool.shutdown(wait=False, cancel_futures=True)
        stop_marked(self.mark, LEFT_S)
        self._write()
        with contextlib.suppress(OSError):
            self.tell("stopped")

    def _stop(self, one: _Running) -> None:
        if one.process is None:
            return
        with contextlib.suppress(OSError):
            os.kill(one.process.pid, one.part.stop_signal)
        deadline = time.monotonic() + STOP_S
        while one.process.poll() is None and time.monotonic() < deadline and self._num_signals < 2:
            time.sleep(0.05)
        _kill_group(one.process)
        one.process = None

    def _taking_signals(self) -> contextlib.AbstractContextManager[None]:
        """Let a signal ask for the end; a second one does not wait for anything. `nohup` keeps SIGHUP away."""

        def take(number: int, frame: FrameType | None) -> None:
            self._num_signals += 1

        is_kept_away = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        return taking_signals([n for n in SIGNALS if not (is_kept_away and n == signal.SIGHUP)], take)


def stop_left(board: Board) -> int:
    """Stop what a supervisor that was killed has left; return how many processes. The caller holds the lock."""
    state = board.read()
    return stop_marked(state.mark) if state and state.mark else 0


def _look_at(part: Part, *, is_running: bool) -> _Look:
    """Ask a part that runs how it is, or whether one may be started. Takes seconds, and never raises."""
    try:
        if is_running or not part.command:
            return _Look("", part.is_well(), part.fingerprint())
        return _Look(part.hold(), False, part.fingerprint())
    except Exception as exc:  # a store may raise anything of its library's; the other parts must go on
        return _Look(f"{type(exc).__name__}: {exc}", False, "")


def _kill_group(process: "subprocess.Popen[str]") -> None:
    """Kill a part and what is left of its group; wait for its end."""
    with contextlib.suppress(OSError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _has_children(process: "subprocess.Popen[str]") -> bool:
    """Say whether a part has work under way in processes below it, as the runner has."""
    import psutil

    try:
        return bool(psutil.Process(process.pid).children())
    except psutil.Error:
        return True


def read_reason(log: Path, most: int = 200) -> str:
    """Return the line that tells why a part has ended: the last error that it has named since it was started, or its
    last line. Prefect says 166 lines where its database cannot be reached, and ends them with "Server stopped!".
    """
    try:
        with log.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 4000))
            lines = file.read().decode(errors="replace").splitlines()
    except OSError:
        return ""
    said: list[str] = []
    for line in lines:
        said = [] if line.startswith("--- ") else [*said, line.strip()] if line.strip() else said
    told = ([line for line in said if ERROR_LINE.match(line)] or said or [""])[-1]
    return mask("".join(char for char in told if char.isprintable()))[:most]


def _keep_log_short(log: Path) -> None:
    """Move a log that has grown large aside, in the place of the one that was moved before."""
    with contextlib.suppress(OSError):
        if log.stat().st_size > MAX_LOG_BYTES:
            log.replace(log.with_suffix(".log.1"))
