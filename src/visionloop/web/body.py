"""The body of an answer: how fast it may come, how large it may be, and its decompression."""

import io
import re
import threading
import time
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import BinaryIO

from visionloop.errors import ImageError

GZIP = 16 + zlib.MAX_WBITS
BURST_S = 1.0  # after a pause, the requests of so many seconds may go out at once
FAILURES_IN_A_ROW = 10


class TryAgain(Exception):
    """It failed, but a second try may succeed. `wait_s`: the wait that the server asked for.

    `of_host`: it is the host that fails, not this one URL.
    """

    def __init__(self, reason: str, wait_s: float | None = None, *, of_host: bool = True) -> None:
        super().__init__(reason)
        self.reason, self.wait_s, self.of_host = reason, wait_s, of_host


@dataclass
class Body:
    """What was received so far. With a `validator` (ETag or date) a cut download continues where it ended."""

    file: BinaryIO = field(default_factory=io.BytesIO)
    num_bytes: int = 0
    url: str = ""
    validator: str | None = None

    def start(self, url: str, validator: str | None) -> None:
        self.file.seek(0)
        self.file.truncate()
        self.num_bytes, self.url, self.validator = 0, url, validator

    def ask_for_rest(self, url: str) -> dict[str, str]:
        if self.num_bytes and self.validator and self.url == url:
            return {"Range": f"bytes={self.num_bytes}-", "If-Range": self.validator}
        self.start(url, None)
        return {}

    def receive(
        self,
        chunks: Iterable[bytes],
        headers: Mapping[str, str],
        max_bytes: int,
        where: str,
        on_bytes: Callable[[int], None],
    ) -> None:
        """Write each piece, and pass its size to `on_bytes`. Raises TryAgain, and ImageError (`too_large`, ...)."""
        length = headers.get("content-length", "")
        if length.isdecimal() and int(length) + self.num_bytes > max_bytes:
            raise make_too_large(where, max_bytes)
        decoder = _make_decoder(headers.get("content-encoding", "identity"), where)
        num_received = 0
        for chunk in chunks:
            num_received += len(chunk)
            on_bytes(len(chunk))
            data = decoder.decode(chunk, max_bytes + 1 - self.num_bytes) if decoder else chunk
            self.num_bytes += len(data)
            # Both are counted: gzip may hold any number of empty members.
            if max(self.num_bytes, num_received) > max_bytes:
                raise make_too_large(where, max_bytes)
            self.file.write(data)
        if decoder and not decoder.is_whole:
            raise TryAgain("the compressed answer was cut", of_host=False)


class _Gunzip:
    """Unpacks gzip, member by member, never more than asked for."""

    def __init__(self, where: str) -> None:
        self._where, self._member = where, zlib.decompressobj(GZIP)

    @property
    def is_whole(self) -> bool:
        return self._member.eof

    def decode(self, chunk: bytes, max_bytes: int) -> bytes:
        parts = bytearray()
        try:
            while chunk and len(parts) < max_bytes:
                if self._member.eof:
                    self._member = zlib.decompressobj(GZIP)
                parts += self._member.decompress(chunk, max_bytes - len(parts))
                chunk = self._member.unused_data if self._member.eof else self._member.unconsumed_tail
        except zlib.error as exc:
            raise make_unreadable(self._where, "is not the gzip that it says it is", "Ask its owner.") from exc
        return bytes(parts)


def _make_decoder(encoding: str, where: str) -> _Gunzip | None:
    kind = encoding.strip().lower()
    if kind in {"", "identity"}:
        return None
    if kind in {"gzip", "x-gzip"}:
        return _Gunzip(where)
    raise make_unreadable(where, f"comes as {encoding[:40]!r}, which was not asked for", "Ask its owner.")


def find_validator(headers: Mapping[str, str]) -> str | None:
    """Return what an If-Range may name: a strong ETag, else the date; nothing for a compressed answer."""
    if headers.get("content-encoding", "identity").lower() != "identity" or headers.get("accept-ranges") == "none":
        return None
    etag = headers.get("etag", "")
    return etag if etag.startswith('"') else headers.get("last-modified") if not etag else None


def goes_on(headers: Mapping[str, str], start: int) -> bool:
    """True when a part begins where the last one ended, and both are plain bytes."""
    is_plain = headers.get("content-encoding", "identity").lower() == "identity"
    here = re.fullmatch(rf"bytes {start}-\d+/(\d+|\*)", headers.get("content-range", "").strip())
    return bool(start and is_plain and here)


def make_unreadable(where: str, found: str, todo: str) -> ImageError:
    return ImageError(where, found, "an image or a page", todo, reason_code="unreadable")


def make_too_large(where: str, max_bytes: int) -> ImageError:
    return ImageError(where, "is too large", f"at most {max_bytes:,} bytes", reason_code="too_large")


class Pace:
    """A token bucket for each host: at most `requests_per_s` requests go there, over all threads."""

    def __init__(
        self,
        requests_per_s: float,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._interval_s = 1 / requests_per_s
        self._clock, self._sleep, self._lock = clock, sleep, threading.Lock()
        self._next: defaultdict[str, float] = defaultdict(lambda: float("-inf"))
        self._failures: Counter[str] = Counter()

    def wait(self, host: str) -> None:
        """Sleep until it is this request's turn."""
        burst_s = max(0.0, BURST_S - self._interval_s)
        with self._lock:
            now = self._clock()
            turn = max(self._next[host], now - burst_s)
            self._next[host] = turn + self._interval_s
        if turn > now:
            self._sleep(turn - now)

    def rest(self, seconds: float) -> None:
        """Let this thread wait before it tries again."""
        self._sleep(seconds)

    def hold(self, host: str, seconds: float) -> None:
        """Let nobody ask this host for so long."""
        with self._lock:
            self._next[host] = max(self._next[host], self._clock() + seconds)

    def note(self, host: str, *, failed: bool) -> None:
        """Remember how a fetch ended, after its retries."""
        with self._lock:
            self._failures[host] = self._failures[host] + 1 if failed else 0

    def has_given_up(self, host: str) -> bool:
        """True when so many fetches failed in a row that a dead host would cost hours."""
        return self._failures[host] >= FAILURES_IN_A_ROW


def parse_retry_after(text: str | None, now: datetime | None = None) -> float | None:
    """Return the seconds of a Retry-After header: a number, or a date. None when there is none that can be read."""
    if not text:
        return None
    if text.strip().isascii() and text.strip().isdigit():
        return float(text[:20])
    try:
        then = parsedate_to_datetime(text)
    except (ValueError, OverflowError):
        return None
    then = then if then.tzinfo else then.replace(tzinfo=UTC)
    return max(0.0, (then - (now or datetime.now(UTC))).total_seconds())
