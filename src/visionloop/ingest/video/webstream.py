"""A camera's bytes on their way to the decoder: over a pipe for HTTP, over a relay on the loopback for RTSP.

A video file on a web server is downloaded instead. Hosts, redirects and addresses of HTTP are judged by the rules of
the fetcher (`web/download.py`). An RTSP camera's address is resolved and judged here, and then the socket goes to this
address, not to the name. FFmpeg would follow a redirect of the camera to any address, so the relay reads the camera's
replies and breaks off before a redirect reaches FFmpeg.
"""

import contextlib
import os
import re
import select
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from visionloop.errors import ImageError
from visionloop.video.sample import DecodeJob
from visionloop.web.addresses import Address, HostRules
from visionloop.web.download import (
    IDENTITY,
    MAX_REDIRECTS,
    MIN_BYTES_PER_S,
    REDIRECTS,
    Fetcher,
    explain_failure,
    follow_redirect,
)

if TYPE_CHECKING:
    import httpcore

OPEN_S = 30.0
CONNECT_S = 15.0
SILENCE_S = 30.0
CHUNK = 1 << 16
PAGES = ("text/html", "application/xhtml+xml")
MAX_LINE = 4000  # FFmpeg cuts a line off at 4096 bytes; a shorter one it reads as we do
_STATUS = re.compile(rb"RTSP/\d\.\d[ \t]+([1-5])\d\d([ \t].*)?")
_LENGTH = re.compile(rb"(?i)content-length:[ \t]*(\d{1,9})[ \t]*")


class Arrivals:
    """How many bytes of a camera's film have come, and for how long none has.

    Those that wait because the decoder is busy do come: the machine is slow then, and the camera is not silent.
    """

    def __init__(self) -> None:
        self.num_bytes = 0
        self._heard_at, self._is_held_up = time.monotonic(), False

    @property
    def quiet_s(self) -> float:
        """For how long nothing has come."""
        return 0.0 if self._is_held_up else time.monotonic() - self._heard_at

    def note(self, num_bytes: int = 0) -> None:
        """Take notice of so many bytes of the film; 0: of a sign of life."""
        self.num_bytes += num_bytes
        self._heard_at = time.monotonic()

    @contextlib.contextmanager
    def passing_on(self, num_bytes: int) -> Iterator[None]:
        """Take notice of bytes while they are passed on, which may take until the decoder has time for them."""
        self.note(num_bytes)
        self._is_held_up = True
        try:
            yield
        finally:
            self.note()
            self._is_held_up = False


class WebStream:
    """One answer to GET: first `connect`, then either `download`, or `open` and `close`.

    `is_playlist`: it names the pieces of a stream, and is for `hls.py`.
    """

    def __init__(self, fetcher: Fetcher, url: str, job: DecodeJob, max_bytes: int, watch_s: float) -> None:
        self._fetcher, self._url, self._job = fetcher, url, job
        self._max_bytes, self._watch_s = max_bytes, watch_s
        self._answer = contextlib.ExitStack()
        self._response: httpcore.Response | None = None
        self._length: int | None = None
        self._pipe: int | None = None
        self._closing = threading.Event()
        self._lock = threading.Lock()
        self.is_playlist = False
        self.failure: ImageError | None = None
        self.arrivals = Arrivals()

    def connect(self) -> bool:
        """Send the request, and say whether the answer is a file: whether it tells its length. Raises ImageError."""
        import httpcore

        address = first = self._fetcher.check(self._url)
        try:
            for _ in range(MAX_REDIRECTS + 1):
                self._fetcher.rules.check(address)
                self._fetcher.pace.wait(address.host)
                with self._fetcher.deadline.within(OPEN_S):
                    response = self._answer.enter_context(self._fetcher.open_stream("GET", address, IDENTITY))
                headers = {k.decode("latin-1").lower(): v.decode("latin-1") for k, v in response.headers}
                if response.status in REDIRECTS and "location" in headers:
                    self._answer.close()
                    address = follow_redirect(address, headers["location"])
                    continue
                if response.status != 200 or headers.get("content-encoding", "identity") != "identity":
                    self._answer.close()
                    raise _unreadable(first, f"answered {response.status}")
                kind = headers.get("content-type", "").partition(";")[0].strip().lower()
                if kind in PAGES:
                    self._answer.close()
                    raise _unreadable(first, f"answers with a page ({kind}), not with a stream: a login may be needed")
                if "mpegurl" in kind or address.target.partition("?")[0].endswith(".m3u8"):
                    self._answer.close()
                    self.is_playlist = True
                    return False
                length = headers.get("content-length", "")
                self._response, self._length = response, int(length) if length.isdigit() else None
                return self._length is not None
        except (httpcore.TimeoutException, httpcore.NetworkError, httpcore.ProtocolError) as exc:
            raise _unreadable(first, explain_failure(exc)) from exc
        raise ImageError(first.place, "redirects too often", "a video", reason_code="refused_url")

    def download(self, path: Path) -> Path:
        """Write a file, and return where. Raises ImageError."""
        with path.open("wb") as file:
            for chunk in self._receive(float("inf")):
                file.write(chunk)
        return path

    def open(self) -> DecodeJob:
        """Begin to pass on what comes; the decoder reads it from the pipe of the job."""
        self._pipe, writing = os.pipe()
        self.arrivals.note()
        threading.Thread(target=self._hand_on, args=(writing,), daemon=True, name="stream").start()
        return replace(self._job, pipe=self._pipe)

    def close(self) -> None:
        """Stop passing on. The decoder has its own copy of the pipe's end by now."""
        self._closing.set()
        with self._lock:
            pipe, self._pipe = self._pipe, None
        if pipe is not None:
            os.close(pipe)

    def _hand_on(self, writing: int) -> None:
        try:
            for chunk in self._receive(self._watch_s):
                rest = memoryview(chunk)
                with self.arrivals.passing_on(len(chunk)):
                    while rest:
                        rest = rest[os.write(writing, rest) :]
        except BrokenPipeError:
            pass  # the decoder has all it needs and has closed the pipe
        except ImageError as exc:
            self.failure = None if self._closing.is_set() else exc
        finally:
            os.close(writing)

    def _receive(self, limit_s: float) -> Iterator[bytes]:
        """Yield the body for at most `limit_s`; then close the connection. Raises ImageError."""
        import httpcore

        assert self._response
        where = self._fetcher.describe(self._url)
        began, num_bytes = time.monotonic(), 0
        if (self._length or 0) > self._max_bytes:
            self._answer.close()
            raise make_too_large(where, self._max_bytes)
        try:
            with self._answer:
                for chunk in self._response.iter_stream():
                    num_bytes += len(chunk)
                    took_s = time.monotonic() - began
                    if num_bytes > self._max_bytes:
                        raise make_too_large(where, self._max_bytes)
                    if self._closing.is_set() or took_s > limit_s:
                        return
                    if self._length is not None and took_s > OPEN_S + num_bytes / MIN_BYTES_PER_S:
                        raise ImageError(where, "comes too slowly", "a video", reason_code="unreadable")
                    yield chunk
        except (httpcore.TimeoutException, httpcore.NetworkError, httpcore.ProtocolError) as exc:
            raise ImageError(where, explain_failure(exc), "a video", reason_code="unreadable") from exc


def _unreadable(address: Address, found: str) -> ImageError:
    return ImageError(address.place, found, "a video", reason_code="unreadable")


def make_too_large(where: str, max_bytes: int) -> ImageError:
    """Return the error of a video that is larger than it may be."""
    return ImageError(where, "is too large", f"at most {max_bytes:,} bytes (max_video_bytes)", reason_code="too_large")


class Relay:
    """Stands between the decoder and one RTSP camera. `{port}` in `job.url` is replaced by the relay's port."""

    def __init__(self, rules: HostRules, host: str, port: int, job: DecodeJob, max_bytes: int) -> None:
        self._rules, self._host, self._port, self._job, self._max_bytes = rules, host, port, job, max_bytes
        self._closing = threading.Event()
        self.failure: ImageError | None = None
        self.arrivals = Arrivals()

    def open(self) -> DecodeJob:
        """Connect to the camera and wait for the decoder. Raises ImageError (`refused_url`, `unreadable`)."""
        camera = self._connect()
        self.arrivals.note()
        listener = socket.create_server(("127.0.0.1", 0), backlog=1)
        threading.Thread(target=self._run, args=(camera, listener), daemon=True, name="relay").start()
        port = listener.getsockname()[1]
        return replace(self._job, url=(self._job.url or "").replace("{port}", str(port)))

    def close(self) -> None:
        """End both connections."""
        self._closing.set()

    def _connect(self) -> socket.socket:
        import httpcore

        from visionloop.web.connect import resolve

        where = f"{self._host}:{self._port}"
        try:
            ips = resolve(self._rules, self._host, self._port)
        except httpcore.ConnectError as exc:
            raise ImageError(where, str(exc), "a camera", reason_code="unreadable") from exc
        reason = "no address"
        for ip in ips:
            try:
                return socket.create_connection((str(ip), self._port), timeout=CONNECT_S)
            except OSError as exc:
                reason = exc.strerror or str(exc)
        raise ImageError(where, f"{where} cannot be reached ({reason})", "a camera", reason_code="unreadable")

    def _run(self, camera: socket.socket, listener: socket.socket) -> None:
        with contextlib.suppress(OSError), camera, listener:
            listener.settimeout(CONNECT_S)
            decoder, _ = listener.accept()
            listener.close()
            with decoder:
                self._pump(camera, decoder)

    def _pump(self, camera: socket.socket, decoder: socket.socket) -> None:
        replies, num_bytes, quiet_s = RtspReplies(), 0, 0.0
        while not self._closing.is_set() and quiet_s < SILENCE_S:
            ready, _, _ = select.select([camera, decoder], [], [], 0.25)
            quiet_s = 0.0 if ready else quiet_s + 0.25
            for source in ready:
                data = source.recv(CHUNK)
                if not data:
                    return
                num_bytes += len(data)
                if num_bytes > self._max_bytes:
                    self._fail("sends more than max_video_bytes", f"at most {self._max_bytes:,}", "too_large")
                    return
                if source is decoder:
                    replies.note_request(data)
                elif fault := replies.find_fault(data):
                    self._fail(fault, "the film itself", "refused_url")
                    return
                if source is decoder:
                    camera.sendall(data)
                else:
                    is_film = replies.plays and not data.startswith(b"RTSP/")  # nor is the reply to PLAY
                    with self.arrivals.passing_on(len(data) if is_film else 0):
                        decoder.sendall(data)

    def _fail(self, found: str, expected: str, code: str) -> None:
        self.failure = ImageError(self._host, found, expected, reason_code=code)


class RtspReplies:
    """Reads a camera's replies as FFmpeg does (`ff_rtsp_read_reply`), until the decoder asks it to PLAY.

    A reply is a status line, header lines, an empty line, then a body of `Content-Length` bytes. Wherever a line would
    begin, a `$` begins a binary packet instead: a channel, a length of two bytes, so many bytes. Carriage returns
    count nowhere. What two readers could take in two ways is a fault. Once PLAY is asked for, FFmpeg follows no
    redirect any more, and the film may hold any bytes.
    """

    def __init__(self) -> None:
        self._rest = b""
        self._num_skipped = 0  # bytes still to come of a body or a binary packet
        self._num_lines = self._body_bytes = 0  # of the head that is being read
        self.plays = False  # whether the film was asked for

    def note_request(self, data: bytes) -> None:
        """Take notice of what the decoder asks."""
        if data.startswith(b"PLAY "):
            self.plays, self._rest = True, b""

    def find_fault(self, data: bytes) -> str:
        """Return why the camera's bytes may not pass; "" when they may."""
        if self.plays:
            return ""
        data, place = self._rest + data, 0
        while place < len(data):
            if self._num_skipped:
                taken = min(self._num_skipped, len(data) - place)
                self._num_skipped -= taken
            elif data[place] == ord("\r"):
                taken = 1
            elif data[place] == ord("$"):
                if len(data) - place < 4:
                    break
                self._num_skipped, taken = 4 + int.from_bytes(data[place + 2 : place + 4], "big"), 0
            else:
                end = data.find(b"\n", place)
                if (end if end >= 0 else len(data)) - place > MAX_LINE:
                    return "sends a line that is too long"
                if end < 0:
                    break
                if fault := self._read_line(data[place:end].replace(b"\r", b"")):
                    return fault
                taken = end + 1 - place
            place += taken
        self._rest = data[place:]
        return ""

    def _read_line(self, line: bytes) -> str:
        if not line:
            self._num_skipped, self._num_lines, self._body_bytes = self._body_bytes, 0, 0
            return ""
        self._num_lines += 1
        if re.search(rb"[\x00-\x08\x0b-\x1f]", line):
            return "sends a control character in a reply"
        if self._num_lines == 1:
            status = _STATUS.fullmatch(line)
            if status and status[1] == b"3":
                return "redirects to another address"
            # A line that is no status line is a request of the camera: FFmpeg answers it, and does nothing else.
            is_request = not line.lstrip().upper().startswith(b"RTSP/")
            return "" if status or is_request else "sends a status that is not plain"
        if line.lower().strip().startswith(b"content-length"):
            length = _LENGTH.fullmatch(line)
            if not length or self._body_bytes not in (0, int(length[1])):
                return "sends a length that is not plain"
            self._body_bytes = int(length[1])
        return ""
