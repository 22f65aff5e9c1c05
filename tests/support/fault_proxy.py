"""A proxy on loopback that passes requests on to a server, and makes the faults that a test asks for.

Each request takes the next fault of the script; when the script is over, requests pass. Faults: `refuse` (the
connection, before a byte is read), `reset` (after the request was read, not passed on), `delay` (passed on late),
`cut` (half of the answer, then a reset), `short` (half of the answer, then the end), `cut_request` (half of the request
arrives), `lost` (passed on, its answer dropped), `flip` (a bit of the answer), `flip_request` (a bit of the body;
answered like a store that checks its MD5), or a status.
"""

import base64
import hashlib
import socket
import socketserver
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPConnection
from typing import Any
from urllib.parse import urlsplit

from http_server import running

CODES = {
    400: "InvalidArgument",
    403: "AccessDenied",
    409: "ConditionalRequestConflict",
    412: "PreconditionFailed",
    500: "InternalError",
    501: "NotImplemented",
    503: "SlowDown",
}
DELAY_S = 0.4
STRETCH = {"transfer-encoding", "connection", "content-length"}


class FaultProxy(socketserver.ThreadingTCPServer):
    """The proxy. `script` is what it does to the next requests, `seen` the method, path and size of all of them.

    `refusals` answers requests whose "METHOD path" holds a text with a status, or with a status and a body; `ignored`
    headers are not passed on. So it plays a store that lacks something. `breaks` is what a setting does to writes: from
    the PUT of `?setting` to its DELETE, objects are not written (a status), or a header of theirs is not passed on.
    """

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, target: str) -> None:
        super().__init__(("127.0.0.1", 0), Connection)
        self.target = urlsplit(target).netloc
        self.script: list[str | int] = []
        self.seen: list[tuple[str, str, int]] = []
        self.refusals: dict[str, int | tuple[int, bytes]] = {}
        self.ignored: set[str] = set()
        self.breaks: dict[str, int | str] = {}
        self.broken: set[str] = set()
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def plan(self, *faults: str | int) -> None:
        """Set what happens to the next requests."""
        with self.lock:
            self.script, self.seen, self.refusals, self.ignored = list(faults), [], {}, set()
            self.breaks, self.broken = {}, set()

    def note_setting(self, method: str, path: str) -> None:
        """Remember whether a setting that breaks writes is there."""
        for setting in self.breaks:
            if setting in path and method in {"PUT", "DELETE"}:
                (self.broken.add if method == "PUT" else self.broken.discard)(setting)

    def list_breaks(self, method: str, path: str) -> "list[int | str]":
        """What the settings that are there do to this request."""
        return [self.breaks[setting] for setting in self.broken] if method == "PUT" and "?" not in path else []

    def next_fault(self) -> str | int:
        with self.lock:
            return self.script.pop(0) if self.script else "pass"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Stay silent: broken connections are the purpose here."""


class Connection(socketserver.StreamRequestHandler):
    """One connection of a client, one request."""

    server: FaultProxy

    def handle(self) -> None:
        fault = self.server.next_fault()
        if fault == "refuse":
            self._reset()
            return
        head = b""
        while not head.endswith(b"\r\n\r\n"):
            line = self.rfile.readline()
            if not line:
                return
            head += line
        method, path, _ = head.split(b"\r\n", 1)[0].decode().split(" ")
        headers = dict(line.split(": ", 1) for line in head.decode().split("\r\n")[1:] if line)
        lower = {name.lower(): value for name, value in headers.items()}
        size = int(lower.get("content-length", 0))
        if lower.get("expect") == "100-continue":
            self.wfile.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        body = self.rfile.read(size // 2 if fault == "cut_request" else size)
        self.server.seen.append((method, path, size))
        self.server.note_setting(method, path)
        fault = next((status for status in self.server.list_breaks(method, path) if isinstance(status, int)), fault)
        told = next((told for text, told in self.server.refusals.items() if text in f"{method} {path}"), fault)
        self._commit(told, method, path, headers, body)

    def _commit(
        self, fault: str | int | tuple[int, bytes], method: str, path: str, headers: dict[str, str], body: bytes
    ) -> None:
        if fault in ("reset", "cut_request"):
            self._reset()
        elif isinstance(fault, tuple):
            self._answer(*fault, {})
        elif isinstance(fault, int):
            self._answer(fault, make_error(CODES[fault]) if method != "HEAD" else b"", {})
        elif fault == "flip_request":
            body = flip(body)
            sent = {k.lower(): v for k, v in headers.items()}["content-md5"]
            assert base64.b64encode(hashlib.md5(body).digest()).decode() != sent
            self._answer(400, make_error("BadDigest"), {})
        else:
            if fault == "delay":
                time.sleep(DELAY_S)
            status, answer, answer_headers = self._pass_on(method, path, headers, body)
            if fault == "lost":
                self._reset()
            else:
                self._answer(status, flip(answer) if fault == "flip" else answer, answer_headers, str(fault))

    def _pass_on(
        self, method: str, path: str, headers: dict[str, str], body: bytes
    ) -> tuple[int, bytes, dict[str, str]]:
        dropped = {"expect", *self.server.ignored, *self.server.list_breaks(method, path)}
        upstream = HTTPConnection(self.server.target, timeout=30)
        upstream.request(method, path, body, {k: v for k, v in headers.items() if k.lower() not in dropped})
        answer = upstream.getresponse()
        data = answer.read()
        kept = {k: v for k, v in answer.getheaders() if k.lower() not in STRETCH or method == "HEAD"}
        upstream.close()
        return answer.status, data, kept

    def _answer(self, status: int, data: bytes, headers: dict[str, str], fault: str = "") -> None:
        named = {"Content-Length": str(len(data)), **headers, "Connection": "close"}
        head = "".join(f"{k}: {v}\r\n" for k, v in named.items())
        self.wfile.write(f"HTTP/1.1 {status} Answer\r\n{head}\r\n".encode())
        self.wfile.write(data[: len(data) // 2] if fault in ("cut", "short") else data)
        if fault == "cut":
            self._reset()

    def _reset(self) -> None:
        """Close at once, so that the client sees a reset."""
        self.wfile.flush()
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()


def make_error(code: str) -> bytes:
    """The body of an S3 error."""
    return f'<?xml version="1.0"?><Error><Code>{code}</Code><Message>{code} it is</Message></Error>'.encode()


def flip(data: bytes) -> bytes:
    """Damage one bit in the middle."""
    if not data:
        return data
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


@contextmanager
def serve_faults(target: str) -> Iterator[FaultProxy]:
    """Run a proxy before a server."""
    proxy = FaultProxy(target)
    with running(proxy):
        yield proxy
