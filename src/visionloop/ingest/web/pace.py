"""How fast a host is asked, when it wants a pause, and when it is given up. Safe for threads."""

import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

BURST_S = 1.0  # so many seconds' worth of requests may go out at once after a rest
FAILURES_IN_A_ROW = 10


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
