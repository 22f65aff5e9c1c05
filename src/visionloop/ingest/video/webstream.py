"""A video over HTTP: a file is downloaded, a stream without end is handed to the decoder over a pipe as it comes.

Hosts, redirects and addresses are judged by the fetcher's rules (`ingest/web/download.py`).

The camera's address is resolved and judged here, and then it, not its name, is connected to. Before the film begins an
answer that redirects (3xx) ends the talk: FFmpeg would follow it to wherever it says.
"""

import contextlib
import os
import re
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urljoin

from visionloop.errors import ImageError
from visionloop.ingest.video.sample import Job
from visionloop.web.addresses import Address, parse_url
from visionloop.web.download import MAX_REDIRECTS, MIN_BYTES_PER_S, REDIRECTS, Fetcher

if TYPE_CHECKING:
    import httpcore
import select
import socket

from visionloop.web.addresses import HostRules

OPEN_S = 30.0
CONNECT_S = 15.0
SILENCE_S = 30.0
CHUNK = 1 << 16
MAX_LINE = 8192
_REDIRECT = re.compile(rb"RTSP/\d\.\d\s+3\d\d")


class WebStream:
    """One answer to GET: first `connect`, then either `download`, or `open` and `close`."""

    def __init__(self, fetcher: Fetcher, url: str, job: Job, max_bytes: int, watch_s: float) -> None:
        self._fetcher, self._url, self._job = fetcher, url, job
        self._max_bytes, self._watch_s = max_bytes, watch_s
        self._answer = contextlib.ExitStack()
        self._response: httpcore.Response | None = None
        self._length: int | None = None
        self._pipe: int | None = None
        self._closing = threading.Event()
        self._lock = threading.Lock()
        self.failure: ImageError | None = None

    def connect(self) -> bool:
        """Send the request, and say whether the answer is a file: whether it tells its length. Raises ImageError."""
        import httpcore

        address = first = self._fetcher.check(self._url)
        try:
            for _ in range(MAX_REDIRECTS + 1):
                self._fetcher.rules.check(address)
                self._fetcher.pace.wait(address.host)
                with self._fetcher.deadline.within(OPEN_S):
                    response = self._answer.enter_context(self._request(address))
                headers = {k.decode("latin-1").lower(): v.decode("latin-1") for k, v in response.headers}
                if response.status in REDIRECTS and "location" in headers:
                    self._answer.close()
                    address = _follow(address, headers["location"])
                    continue
                if response.status != 200 or headers.get("content-encoding", "identity") != "identity":
                    self._answer.close()
                    raise _unreadable(first, f"answered {response.status}")
                length = headers.get("content-length", "")
                self._response, self._length = response, int(length) if length.isdigit() else None
                return self._length is not None
        except (httpcore.TimeoutException, httpcore.NetworkError, httpcore.ProtocolError) as exc:
            raise _unreadable(first, f"the connection failed ({str(exc) or type(exc).__name__})") from exc
        raise ImageError(first.place, "redirects too often", "a video", reason_code="refused_url")

    def download(self, path: Path) -> Path:
        """Write a file, and return where. Raises ImageError."""
        with path.open("wb") as file:
            for chunk in self._receive(float("inf")):
                file.write(chunk)
        return path

    def open(self) -> Job:
        """Begin to hand on what comes; the decoder reads it from the pipe of the job."""
        self._pipe, writing = os.pipe()
        threading.Thread(target=self._hand_on, args=(writing,), daemon=True, name="stream").start()
        return replace(self._job, pipe=self._pipe)

    def close(self) -> None:
        """Hand on no more. The decoder has the pipe's end for itself by now."""
        self._closing.set()
        with self._lock:
            pipe, self._pipe = self._pipe, None
        if pipe is not None:
            os.close(pipe)

    def _hand_on(self, writing: int) -> None:
        try:
            for chunk in self._receive(self._watch_s):
                rest = memoryview(chunk)
                while rest:
                    rest = rest[os.write(writing, rest) :]
        except BrokenPipeError:
            pass  # the decoder has what it wanted
        except ImageError as exc:
            self.failure = None if self._closing.is_set() else exc
        finally:
            os.close(writing)

    def _receive(self, limit_s: float) -> Iterator[bytes]:
        """Yield the body, for so long; then close the connection. Raises ImageError."""
        import httpcore

        assert self._response
        where = self._fetcher.describe(self._url)
        began, num_bytes = time.monotonic(), 0
        if (self._length or 0) > self._max_bytes:
            self._answer.close()
            raise _too_large(where, self._max_bytes)
        try:
            with self._answer:
                for chunk in self._response.iter_stream():
                    num_bytes += len(chunk)
                    took_s = time.monotonic() - began
                    if num_bytes > self._max_bytes:
                        raise _too_large(where, self._max_bytes)
                    if self._closing.is_set() or took_s > limit_s:
                        return
                    if self._length is not None and took_s > OPEN_S + num_bytes / MIN_BYTES_PER_S:
                        raise ImageError(where, "comes too slowly", "a video", reason_code="unreadable")
                    yield chunk
        except (httpcore.TimeoutException, httpcore.NetworkError, httpcore.ProtocolError) as exc:
            reason = f"the connection failed ({str(exc) or type(exc).__name__})"
            raise ImageError(where, reason, "a video", reason_code="unreadable") from exc

    def _request(self, address: Address) -> "contextlib.AbstractContextManager[httpcore.Response]":
        import httpcore

        fetcher = self._fetcher
        secret = fetcher.headers if fetcher.headers_origin == address.origin else {}
        sent = {"User-Agent": "visionloop", "Accept": "*/*", "Accept-Encoding": "identity", **secret}
        sent["Host"] = address.netloc
        url = httpcore.URL(
            scheme=address.scheme.encode(),
            host=address.host.encode(),
            port=address.port,
            target=address.target.encode(),
        )
        timeouts: dict[str, Any] = dict.fromkeys(("connect", "read", "write", "pool"), fetcher.timeout_s)
        return fetcher.pool.stream("GET", url, headers=list(sent.items()), extensions={"timeout": timeouts})


def _follow(address: Address, location: str) -> Address:
    """Return where a redirect leads. Raises ImageError."""
    if re.search(r"[\x00-\x20\x7f\\]", location):
        raise ImageError(address.place, "redirects to no plain URL", "a video", reason_code="refused_url")
    target = parse_url(urljoin(address.url, location))
    if address.scheme == "https" and target.scheme == "http":
        raise ImageError(address.place, "redirects from https to http", "https", reason_code="refused_url")
    return target


def _unreadable(address: Address, found: str) -> ImageError:
    return ImageError(address.place, found, "a video", reason_code="unreadable")


def _too_large(where: str, max_bytes: int) -> ImageError:
    return ImageError(where, "is too large", f"at most {max_bytes:,} bytes (max_video_bytes)", reason_code="too_large")


class Relay:
    """Between the decoder and one RTSP camera. `job.url` holds `{port}` where ours belongs."""

    def __init__(self, rules: HostRules, host: str, port: int, job: Job, max_bytes: int) -> None:
        self._rules, self._host, self._port, self._job, self._max_bytes = rules, host, port, job, max_bytes
        self._closing = threading.Event()
        self.failure: ImageError | None = None

    def open(self) -> Job:
        """Connect to the camera and wait for the decoder. Raises ImageError (`refused_url`, `unreadable`)."""
        camera = self._connect()
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
        answers, num_bytes, quiet_s = Answers(), 0, 0.0
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
                if source is camera and not answers.allow(data):
                    self._fail("redirects to another address", "the film itself", "refused_url")
                    return
                (decoder if source is camera else camera).sendall(data)

    def _fail(self, found: str, expected: str, code: str) -> None:
        self.failure = ImageError(self._host, found, expected, reason_code=code)


class Answers:
    """Reads the lines of a camera's answers as they pass, until the film begins (`$`, then binary)."""

    def __init__(self) -> None:
        self._line = b""
        self._filming = False

    def allow(self, data: bytes) -> bool:
        """Say whether the bytes may pass: False when they redirect, or a line never ends."""
        if self._filming:
            return True
        *lines, self._line = (self._line + data).split(b"\n")
        for line in [*lines, self._line]:
            if line.startswith(b"$"):
                self._filming = True
                return True
            if _REDIRECT.match(line.lstrip()):
                return False
        return len(self._line) <= MAX_LINE
