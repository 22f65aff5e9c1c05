"""A video over HTTP: a file is downloaded, a stream without end is handed to the decoder over a pipe as it comes.

Hosts, redirects and addresses are judged by the fetcher's rules (`ingest/web/download.py`).
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
from visionloop.ingest.web.addresses import Address, parse_url
from visionloop.ingest.web.download import MAX_REDIRECTS, MIN_BYTES_PER_S, REDIRECTS, Fetcher

if TYPE_CHECKING:
    import httpcore

OPEN_S = 30.0


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
