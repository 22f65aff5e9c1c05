"""Hand an RTSP camera's bytes to the decoder, over a port of the loopback that takes one connection.

The camera's address is resolved and judged here, and then it, not its name, is connected to. Before the film begins an
answer that redirects (3xx) ends the talk: FFmpeg would follow it to wherever it says.
"""

import contextlib
import re
import select
import socket
import threading
from dataclasses import replace

from visionloop.errors import ImageError
from visionloop.ingest.video.sample import Job
from visionloop.ingest.web.addresses import HostRules

CONNECT_S = 15.0
SILENCE_S = 30.0
CHUNK = 1 << 16
MAX_LINE = 8192
_REDIRECT = re.compile(rb"RTSP/\d\.\d\s+3\d\d")


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

        from visionloop.ingest.web.connect import resolve

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
