"""Connections of the server: how many there may be, and how long one may be quiet. Knows no routes.

uvicorn has no time limit for the head of a request. At the limit of open files asyncio cannot accept any more, and
writes a traceback for each try. So the number is limited below that, and the connection that was quiet longest gives
its place to a new one: one that has not sent a whole head, or waits for its next request.
"""

import asyncio
import logging
import resource
import time
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

HEAD_S = 10.0
ACCEPT_AT_ONCE = 16  # asyncio accepts so many at a time
UNSEEN = 8 * ACCEPT_AT_ONCE  # it goes round some times until the first of them is looked at, and a closed one is gone
OTHER_FILES = 128  # of the process: the ledger, the model, log and libraries
LOG_EVERY_S = 60.0
FULL = b"HTTP/1.1 503 Service Unavailable\r\nRetry-After: 1\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
TOO_SLOW = b"HTTP/1.1 408 Request Timeout\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"

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


class Connection(H11Protocol):
    """uvicorn's connection, with a time limit for the head of each request, and a place at the door."""

    def __init__(self, door: Door, **options: Any) -> None:
        super().__init__(**options)
        self._door = door
        self._head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._door.let_in(self, len(self.connections))
        self._watch_head()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_watching()
        super().connection_lost(exc)

    def on_response_complete(self) -> None:
        self._door.quiet[self] = None
        super().on_response_complete()  # it may begin the next request, whose head is here already
        if self._is_in_request() or self.conn.trailing_data[0]:
            self._watch_head()

    def turn_away(self, answer: bytes = b"") -> None:
        """Close the connection, with an answer or without."""
        if not self.transport.is_closing():
            self.transport.write(answer)
            self.transport.close()

    def _is_in_request(self) -> bool:
        return self.conn.their_state is not h11.IDLE

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
        self.turn_away(TOO_SLOW if self.conn.trailing_data[0] else b"")


def _raise_file_limit(max_connections: int) -> int:
    """Let this process open as many files as it needs, if it may; return for how many connections they are enough."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = max_connections + UNSEEN + OTHER_FILES
    if hard == resource.RLIM_INFINITY or hard > soft:
        soft = max(soft, needed if hard == resource.RLIM_INFINITY else min(needed, hard))
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return max(1, soft - UNSEEN - OTHER_FILES)
