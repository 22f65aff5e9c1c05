"""Connections of the server: how many there may be, and how long one may be quiet. Knows no routes.

uvicorn has no limits for the head of a request, neither in time nor in bytes. At the limit of open files no connection
can be accepted any more. So the number is limited below that, and the connection that was quiet longest gives its place
to a new one: one that has not sent a whole head, or waits for its next request.
"""

import asyncio
import logging
import resource
import time
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

HEAD_S = 10.0
MAX_HEAD_BYTES = 64 * 1024
# A body in tiny chunks costs a call for each. So many are free; with more of them, each must hold a few bytes.
FREE_PIECES, PIECE_BYTES = 1000, 64
UNSEEN = 128  # connections that are accepted and not yet looked at, or closed and not yet gone
OTHER_FILES = 128  # of the process: the ledger, the model, log and libraries
LOG_EVERY_S = 60.0
CLOSE = b"Content-Length: 0\r\nConnection: close\r\n\r\n"
FULL = b"HTTP/1.1 503 Service Unavailable\r\nRetry-After: 1\r\n" + CLOSE
TOO_SLOW = b"HTTP/1.1 408 Request Timeout\r\n" + CLOSE
TOO_LONG = b"HTTP/1.1 431 Request Header Fields Too Large\r\n" + CLOSE
TOO_MANY_PIECES = b"HTTP/1.1 400 Bad Request\r\n" + CLOSE

log = logging.getLogger(__name__)


class Door:
    """Counts the connections of one server and decides which one goes when there are too many."""

    def __init__(self, max_connections: int) -> None:
        self.limit = min(max_connections, _raise_file_limit(max_connections))
        self.quiet: dict[Connection, None] = {}  # the longest quiet first
        self._closed, self._logged_at = 0, float("-inf")

    def let_in(self, new: "Connection", number: int) -> None:
        """Close one if there are more than the limit: a quiet one, or else the new one."""
        if number > self.limit:
            quiet = next(iter(self.quiet), None)
            if quiet is None:
                new.turn_away(FULL)
            else:
                del self.quiet[quiet]
                quiet.turn_away()
            self._tell()
        if not new.transport.is_closing():
            self.quiet[new] = None

    def _tell(self) -> None:
        self._closed += 1
        now = time.monotonic()
        if now - self._logged_at >= LOG_EVERY_S:
            log.warning("more than %d connections: %d quiet ones were closed", self.limit, self._closed)
            self._closed, self._logged_at = 0, now


class Connection(HttpToolsProtocol):
    """uvicorn's connection, with limits for the head of each request and the pieces of a body, and a place at the door.

    A piece is a chunk of a body, or what of it came at once.
    """

    def __init__(self, door: Door, **options: Any) -> None:
        super().__init__(**options)
        self._door = door
        self._head_timer: asyncio.TimerHandle | None = None
        self._head_bytes = 0  # of the head that has begun and is not whole
        self._is_in_head = False
        self._pieces = self._body_bytes = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._door.let_in(self, len(self.connections))
        self._watch_head()

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        was_in_head = self._is_in_head
        super().data_received(data)
        if self._is_in_head:
            self._head_bytes += len(data) if was_in_head else 0
            if self._head_bytes > MAX_HEAD_BYTES:
                self.turn_away(TOO_LONG)
        self._watch_head()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._is_in_head, self._head_bytes = True, 0

    def on_headers_complete(self) -> None:
        self._is_in_head, self._pieces, self._body_bytes = False, 0, 0
        if len(self.url) + sum(len(name) + len(value) for name, value in self.headers) > MAX_HEAD_BYTES:
            self.turn_away(TOO_LONG)  # it came in one piece, so nothing was counted before
            raise ValueError("too long a head")
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._pieces += 1
        self._body_bytes += len(body)
        if self._pieces > FREE_PIECES + self._body_bytes // PIECE_BYTES:
            self.turn_away(TOO_MANY_PIECES)
            raise ValueError("too many pieces")  # the parser stops: no call for each of the rest that is here
        super().on_body(body)

    def send_400_response(self, msg: str) -> None:
        """Answer what the parser refused; not after a connection was turned away."""
        if not self.transport.is_closing():
            super().send_400_response(msg)

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_watching()
        super().connection_lost(exc)

    def on_response_complete(self) -> None:
        self._door.quiet[self] = None
        super().on_response_complete()  # it may begin the next request, whose head is here already
        if self._is_in_head or self._is_in_request():
            self._watch_head()

    def turn_away(self, answer: bytes = b"") -> None:
        """Close the connection, with an answer or without."""
        if not self.transport.is_closing():
            self.transport.write(answer)
            self.transport.close()

    def _is_in_request(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _watch_head(self) -> None:
        if self._is_in_request() or self.transport.is_closing():
            self._stop_watching()
        elif self._head_timer is None:
            self._head_timer = self.loop.call_later(HEAD_S, self._close_slow)

    def _stop_watching(self) -> None:
        self._door.quiet.pop(self, None)
        if self._head_timer:
            self._head_timer.cancel()
            self._head_timer = None

    def _close_slow(self) -> None:
        self.turn_away(TOO_SLOW if self._is_in_head else b"")


def _raise_file_limit(max_connections: int) -> int:
    """Let this process open as many files as it needs, if it may; return for how many connections they are enough."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = max_connections + UNSEEN + OTHER_FILES
    if hard == resource.RLIM_INFINITY or hard > soft:
        soft = max(soft, needed if hard == resource.RLIM_INFINITY else min(needed, hard))
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return max(1, soft - UNSEEN - OTHER_FILES)
