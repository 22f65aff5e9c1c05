"""A process that works for another one ends with it, so that no kill leaves a training or a server behind.

`python -m visionloop.lifetime WATCHED STOPPED` ends the process STOPPED once WATCHED is gone. With a mark instead of
STOPPED it ends all that was started under that mark: children, their children, and what has left its group.

And what each process of ours does at its start and end, so that neither takes seconds; and whether one that left its
mark is gone.
"""

import atexit
import contextlib
import gc
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from hashlib import sha256
from pathlib import Path
from types import FrameType
from typing import IO, TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    import psutil

SHELLS = frozenset({"sh", "bash", "dash", "zsh", "ksh", "fish"})
GUARDIAN_VARIABLE = "VISIONLOOP_GUARDIAN"
MARK_VARIABLE = "VISIONLOOP_UP"  # in the environment of all that one `visionloop up` has started
WATCH_EVERY_S = 0.25
OUTSIDE = "pid:[4026531836]"  # on every Linux, the space of the processes that are in no container
MARK_CHARS = 100
# Python looks for garbage among its objects whenever 700 are new. Loading torch and MLflow makes half a million, and
# none is garbage: looking took a quarter of that time.
COLLECT_AFTER = (10_000, 10, 10)


class Terminated(KeyboardInterrupt):
    """SIGTERM, raised as an exception so that work is closed properly, as with Ctrl-C."""


def collect_seldom() -> None:
    """Let Python look for garbage less often. For entry points, before they load anything heavy."""
    gc.set_threshold(*COLLECT_AFTER)


def end_process(code: int) -> NoReturn:
    """End this process in order, but for one thing: no object is taken apart, as the system frees them all at once.

    Behind torch that took one to three seconds. Threads are waited for, and what `atexit` knows runs, as ever.
    """
    with contextlib.suppress(KeyboardInterrupt):  # who presses Ctrl-C now does not want to wait for threads
        threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except (OSError, ValueError, AttributeError):  # a full disk, a reader that is gone: Python tells it as ever
        sys.exit(code)
    os._exit(code)


@contextlib.contextmanager
def terminable() -> Iterator[None]:
    """Let SIGTERM raise `Terminated` in here, as Ctrl-C raises KeyboardInterrupt, so that work is closed properly."""
    asked = threading.Event()

    def stop(number: int, frame: object) -> None:
        if not asked.is_set():  # a second SIGTERM must not interrupt the closing
            asked.set()
            raise Terminated

    with taking_signals((signal.SIGTERM,), stop):
        yield


def die_with_parents(guardian_pid: int | None = None) -> None:
    """Watch the processes this stage works for, and stop at once when one is gone.

    They are the parent (if that is a shell, also the process above it) and the guardian: `guardian_pid`, or the process
    named in VISIONLOOP_GUARDIAN. A killed dvc or flow then leaves no training behind. A parent that is killed while
    this process starts can no longer be found; so whoever starts one passes its own number as the guardian.
    """
    watched = _find_watched(guardian_pid or int(os.environ.get(GUARDIAN_VARIABLE, "0")))
    threading.Thread(target=_watch, args=(watched, lambda: os._exit(143)), daemon=True, name="watch").start()


def stop_with_us(pid: int) -> None:
    """Have another process, whose code is not ours, stopped when this one ends or is killed."""
    stop_marked_with_us(str(pid))


def stop_marked_with_us(mark: str) -> "subprocess.Popen[str]":
    """Have all that is started under a mark stopped when this process ends or is killed; return the watcher."""
    return start_apart([sys.executable, "-m", "visionloop.lifetime", str(os.getpid()), mark], subprocess.DEVNULL)


def start_apart(command: Sequence[str], log: IO[str] | int, **options: Any) -> "subprocess.Popen[str]":
    """Start a program in a session of its own, which Ctrl-C does not reach; what it says goes into a log."""
    return subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        **options,
    )


@contextlib.contextmanager
def taking_signals(numbers: Sequence[int], handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Let a handler take some signals in here; the ones before come back. Only the main thread can take any."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def stop_marked(mark: str, limit_s: float = 10) -> int:
    """Stop all processes that were started under a mark, politely, then for good; return how many there were.

    What they start in the meantime is found too.
    """
    import psutil

    found: set[int] = set()
    deadline = time.monotonic() + limit_s
    while alive := _find_marked(mark):
        late = time.monotonic() > deadline
        for process in alive:
            if late or process.pid not in found:
                with contextlib.suppress(psutil.Error):
                    process.kill() if late else process.terminate()
        found.update(process.pid for process in alive)
        psutil.wait_procs(alive, timeout=0.2)
        if time.monotonic() > deadline + limit_s:
            break
    return len(found)


def _find_marked(mark: str) -> "list[psutil.Process]":
    import psutil

    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            is_marked = process.pid != os.getpid() and process.environ().get(MARK_VARIABLE) == mark
            if is_marked and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def stop_process(process: subprocess.Popen[str], limit_s: float = 15) -> None:
    """Stop a process we started and wait for its end: politely, then for good. One that has ended is no error."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(timeout=limit_s)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def stop_programs(process: subprocess.Popen[str], limit_s: float = 15) -> None:
    """Ask the programs that a process runs, itself or by a shell, to end, and wait for it: so each can close its work.

    Were the process ended first, its programs would stop at once where they are (`die_with_parents`).
    """
    import psutil

    with contextlib.suppress(psutil.Error, subprocess.TimeoutExpired):
        todo = psutil.Process(process.pid).children()
        while todo:
            program = todo.pop()
            if program.name() in SHELLS:
                todo += program.children()
            else:
                program.terminate()
        process.wait(timeout=limit_s)


def stop_children() -> None:
    """Stop every process below this one: politely, then for good."""
    import psutil

    children = psutil.Process().children(recursive=True)
    for child in children:
        with contextlib.suppress(psutil.Error):
            child.terminate()
    _, alive = psutil.wait_procs(children, timeout=10)
    for child in alive:
        with contextlib.suppress(psutil.Error):
            child.kill()


def find_machine() -> str:
    """Return what tells this machine, and this container on it, from others until it is started anew; "" if unknown."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def find_process_start(pid: int) -> str:
    """Return when a process of this machine began, in ticks since the machine did; "" if it is gone, or unknown.

    Not `psutil.Process.create_time`: that moves with the clock.
    """
    try:
        words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if words[0] in "ZX" else words[19]


def has_ended(pid: int, start: str) -> bool:
    """Say whether a process of this machine is gone that began at `start` (see `find_process_start`)."""
    found = find_process_start(pid)
    return found != start and (bool(found) or not _is_hidden(pid))


def mark_process() -> str:
    """Return a text by which any process can tell later whether this one is gone: number, start, machine, computer."""
    pid = os.getpid()
    return f"{pid}.{find_process_start(pid)}.{_shorten(find_machine())}.{_find_computer()}"


def is_gone(mark: str) -> bool:
    """Say whether it is sure that the process of a mark is gone: one of this machine, or of it before its last start.

    Of another machine, of another container, or of what is no mark nothing is known: False.
    """
    parts = mark.split(".")
    if len(parts) != 4 or len(mark) > MARK_CHARS or not (parts[0].isdecimal() and parts[2]):
        return False
    pid, start, machine, computer = parts
    if machine == _shorten(find_machine()):
        return has_ended(int(pid), start)
    return bool(computer) and computer == _find_computer()


def _find_computer() -> str:
    """Return what tells this computer from others, also after it was started anew; "" if unknown, or in a container.

    Not the machine-id alone: copies of one disk have the same.
    """
    try:
        number = Path("/etc/machine-id").read_text().strip()
    except OSError:
        return ""
    return _shorten(f"{number} {socket.gethostname()}") if number and find_machine().endswith(OUTSIDE) else ""


def _shorten(text: str) -> str:
    return sha256(text.encode()).hexdigest()[:12] if text else ""


def _is_hidden(pid: int) -> bool:
    """Say whether a process lives that /proc does not show: it hides those of other users if told so (`hidepid`)."""
    try:
        os.kill(pid, 0)  # sends nothing
    except (OSError, OverflowError) as exc:
        return isinstance(exc, PermissionError)
    return False


def _find_watched(guardian_pid: int) -> dict[int, float]:
    """Return pid -> start time of the processes to watch. A start time tells a reused pid from the old one."""
    import psutil

    watched: dict[int, float] = {}
    with contextlib.suppress(psutil.Error):
        parents = psutil.Process().parents()
        for parent in parents:
            watched[parent.pid] = parent.create_time()
            if parent.name() not in SHELLS:
                break
    if guardian_pid:
        with contextlib.suppress(psutil.Error):
            watched[guardian_pid] = psutil.Process(guardian_pid).create_time()
        watched.setdefault(guardian_pid, -1.0)
    return watched


def _watch(watched: dict[int, float], on_gone: Callable[[], object]) -> None:
    """Wait until one of the processes is gone, then call `on_gone` and return."""
    import psutil

    while True:
        for pid, started_at in watched.items():
            try:
                process = psutil.Process(pid)
                alive = process.create_time() == started_at and process.status() != psutil.STATUS_ZOMBIE
            except psutil.Error:
                alive = False
            if not alive:
                on_gone()
                return
        time.sleep(WATCH_EVERY_S)


def main() -> None:
    """Watch the first process id, and end the second when either is gone; or all that bears a mark."""
    import psutil

    watched_pid = int(sys.argv[1])
    if not sys.argv[2].isdigit():
        with contextlib.suppress(psutil.Error):
            _watch({watched_pid: psutil.Process(watched_pid).create_time()}, lambda: None)
        stop_marked(sys.argv[2])
        return
    stopped_pid = int(sys.argv[2])
    try:
        watched = {pid: psutil.Process(pid).create_time() for pid in (watched_pid, stopped_pid)}
    except psutil.Error:
        watched = {}
    _watch(watched or {watched_pid: -1.0}, lambda: None)
    with contextlib.suppress(psutil.Error, OSError):
        if psutil.Process(stopped_pid).create_time() == watched.get(stopped_pid):
            os.kill(stopped_pid, signal.SIGTERM)


if __name__ == "__main__":
    main()
