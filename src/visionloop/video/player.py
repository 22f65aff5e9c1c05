"""Ask the worker for the frames of a video, with limits on time, on the size of an answer, and on silence."""

import contextlib
import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from types import TracebackType
from typing import Any, Self

from visionloop.errors import SourceError, describe_install
from visionloop.video.sample import DecodeJob

SILENCE_S = 60.0
LEAST_S = 60.0
MAX_HEAD_BYTES = 1 << 20
MAX_FRAME_BYTES = 1 << 28
KEPT_VARIABLES = ("PATH", "PYTHONPATH", "LD_LIBRARY_PATH", "LANG", "TMPDIR", "SYSTEMROOT")


@dataclass(frozen=True)
class Frame:
    """A frame: milliseconds from the start of the video, its JPEG; of a live stream, when it came (seconds, epoch)."""

    t_ms: int
    jpeg: bytes
    clock: float | None = None


@dataclass(frozen=True)
class Start:
    """The video was opened. `created` is when it was recorded, ISO 8601 in UTC, if it says so."""

    created: str | None


@dataclass(frozen=True)
class End:
    """The video is over. `code` None: all of it was read; else why not, as for a rejected file. `told`: what else.

    `end_s`: how far it was read, with the time for which the last frame is shown; 0: no frame was.
    """

    code: str | None
    text: str | None = None
    told: tuple[str, ...] = ()
    end_s: float = 0.0


# These may be caused by the machine, not by the video: it is tried again in the next pull.
PASSING = frozenset({"too_slow", "crashed"})


class _Gone(Exception):
    """The worker cannot be used any more: a code of `PASSING`, and why."""

    def __init__(self, why: str = "breaks the decoder", code: str = "crashed") -> None:
        super().__init__(why)
        self.code = code


class Player:
    """One worker for many videos, started at the first; a new one when a video has broken it. Not for two threads.

    Another thread may `interrupt` it: the video that is played ends. `nice` makes the worker yield to other processes.
    """

    def __init__(self, nice: int = 0) -> None:
        self._nice = nice
        self._process: subprocess.Popen[bytes] | None = None
        self._buffer = bytearray()
        self._waited_s = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def play(self, job: DecodeJob) -> Iterator[Start | Frame | End]:
        """Yield the answers for a video; the last is always `End`, whatever happens to the worker."""
        limit_s = max(LEAST_S, job.max_s)
        self._waited_s = 0.0
        finished = False
        try:
            self._ask(job)
            while not finished:
                answer = self._receive(limit_s)
                finished = isinstance(answer, End)
                if answer is not None:
                    yield answer
        except _Gone as exc:
            self.stop()
            finished = True
            yield End(exc.code, str(exc))
        finally:
            if not finished:
                self.stop()  # its remaining answers would be taken for those of the next video

    def interrupt(self) -> None:
        """End the video that is played now. The thread that plays it closes what it reads from."""
        if process := self._process:
            process.kill()

    def stop(self) -> None:
        """End the worker."""
        process, self._process = self._process, None
        self._buffer.clear()
        if process:
            process.kill()
            process.wait()
            for stream in (process.stdin, process.stdout):
                with contextlib.suppress(OSError):
                    stream.close() if stream else None

    def _ask(self, job: DecodeJob) -> None:
        """Send a job to the worker; a pipe is inherited at its start, so that such a job has a worker of its own."""
        if self._process is None or self._process.poll() is not None or job.pipe is not None:
            self.stop()
            self._process = _start(job.pipe)
            if self._nice:
                os.setpriority(os.PRIO_PROCESS, self._process.pid, self._nice)
        assert self._process.stdin
        try:
            self._process.stdin.write(json.dumps(asdict(job)).encode() + b"\n")
            self._process.stdin.flush()
        except OSError as exc:
            raise _Gone("the decoder could not be started") from exc

    def _receive(self, limit_s: float) -> Start | Frame | End | None:
        """Return the worker's next answer, None for a sign of life. Raises _Gone."""
        size = int.from_bytes(self._read(4, limit_s), "big")
        if size > MAX_HEAD_BYTES:
            raise _Gone
        # The worker has read an untrusted file, so its answers are not trusted either.
        try:
            head: dict[str, Any] = json.loads(self._read(size, limit_s))
            num_bytes = int(head["bytes"])
            if not 0 <= num_bytes <= MAX_FRAME_BYTES:
                raise _Gone
            data = self._read(num_bytes, limit_s)
            return _understand(head, data)
        except (ValueError, KeyError, TypeError) as exc:
            raise _Gone from exc

    def _read(self, size: int, limit_s: float) -> bytes:
        """Return so many bytes of the worker. Time that we spend elsewhere is not counted. Raises _Gone."""
        process = self._process
        assert process and process.stdout
        stdout = process.stdout.fileno()
        poll = select.poll()
        poll.register(stdout, select.POLLIN | select.POLLHUP)
        while len(self._buffer) < size:
            started = time.monotonic()
            left_s = min(SILENCE_S, limit_s - self._waited_s)
            ready = left_s > 0 and poll.poll(left_s * 1000)
            self._waited_s += time.monotonic() - started
            if not ready:
                raise _Gone(f"takes longer to decode than {min(SILENCE_S, limit_s):.0f} s", "too_slow")
            chunk = os.read(stdout, 1 << 20)
            if not chunk:
                raise _Gone
            self._buffer += chunk
        data = bytes(self._buffer[:size])
        del self._buffer[:size]
        return data


def _start(pipe: int | None) -> subprocess.Popen[bytes]:
    """Start a worker. It gets no secrets of the environment, and an empty folder to work in."""
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "visionloop.video.worker"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        pass_fds=(pipe,) if pipe is not None else (),
        env={name: os.environ[name] for name in KEPT_VARIABLES if name in os.environ},
        cwd="/",
    )


def _understand(head: dict[str, Any], data: bytes) -> Start | Frame | End | None:
    """Raises ValueError, KeyError, TypeError."""
    kind = head["kind"]
    if kind == "frame":
        return Frame(int(head["t_ms"]), data, None if head["clock"] is None else float(head["clock"]))
    if kind == "start":
        return Start(None if head["created"] is None else str(head["created"]))
    if kind == "end":
        code, text = head["code"], head["text"]
        told = tuple(str(line) for line in head["told"])
        end_s = float(head["end_s"])
        return End(None if code is None else str(code), None if text is None else str(text), told, end_s)
    return None


def check_installed(where: str) -> None:
    """Raise SourceError when PyAV is missing: the worker could not say so clearly."""
    from importlib.util import find_spec

    if find_spec("av") is None:
        raise SourceError(where, "av is not installed", "the extra `ingest`", f"Run `{describe_install('ingest')}`.")
