"""HLS: a live playlist, whose pieces are fetched one after the other and passed to the decoder over a pipe (RFC 8216).

Nobody follows a playlist but this module: FFmpeg never sees one. Each address in it is judged by the rules of the
fetcher like the first one, and so is each redirect; sizes and numbers are bounded. A piece of six seconds comes at
once, so its bytes are passed on over six seconds. Keys and parts of files are refused.
"""

import contextlib
import io
import re
import threading
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import urljoin

from visionloop.errors import ImageError
from visionloop.ingest.video.webstream import Arrivals, WebStream, make_too_large
from visionloop.web.addresses import parse_url

MAX_PLAYLIST_BYTES, MAX_PIECE_BYTES = 1 << 20, 128 << 20
MAX_PIECE_S, SLICE_S = 60.0, 0.1
MAX_VARIANTS = 100
MOST_BEHIND, FASTER = 3, 0.8  # pieces that wait are shown in less time; if more wait, all but the newest are left out
_ATTRIBUTE = re.compile(r'([A-Z0-9-]+)=("[^"]*"|[^,]*)')
_PLAIN = re.compile(r"[^\x00-\x20\x7f\\]+")


@dataclass(frozen=True)
class Piece:
    """One piece of a stream: its number, its length, where it is, and where the head of an MP4 is that it needs."""

    number: int
    seconds: float
    url: str
    head: str | None


@dataclass(frozen=True)
class Playlist:
    """What a playlist says: of its pieces the newest, one more than are shown one after the other.

    `variants`: (bits a second, shorter side in pixels, URL) if it only lists others.
    """

    pieces: tuple[Piece, ...] = ()
    target_s: float = 1.0
    is_over: bool = False
    variants: tuple[tuple[int, int, str], ...] = ()


def parse_playlist(text: str, url: str) -> Playlist:
    """Read a playlist that came from a URL. Raises ImageError: it is none, or it asks for what is not done here."""
    lines = [line.strip() for line in text.lstrip("\ufeff").splitlines() if line.strip()]
    if not lines or lines[0] != "#EXTM3U":
        raise _refuse(url, "is no playlist", "#EXTM3U in its first line")
    pieces = deque[tuple[int, float, str, str | None]](maxlen=MOST_BEHIND + 1)
    variants = list[tuple[int, int, str]]()
    number, seconds, head, target_s, variant, is_gap = 0, 0.0, None, 1.0, None, False
    for line in lines[1:]:
        tag, _, value = line.partition(":")
        if tag == "#EXT-X-KEY" and _read_attributes(value).get("METHOD") != "NONE":
            raise _refuse(url, "is encrypted", "pieces without a key")
        if tag == "#EXT-X-BYTERANGE" or (tag == "#EXT-X-MAP" and "BYTERANGE" in _read_attributes(value)):
            raise _refuse(url, "names parts of files", "a file for each piece")
        if tag == "#EXT-X-MEDIA-SEQUENCE":
            number = int(value) if re.fullmatch("[0-9]{1,20}", value) else int(_read_number(value, url))
        elif tag == "#EXT-X-TARGETDURATION":
            target_s = _read_number(value, url)
        elif tag == "#EXTINF":
            seconds = _read_number(value.partition(",")[0], url)
        elif tag == "#EXT-X-MAP":
            head = _read_attributes(value).get("URI", "")
        elif tag == "#EXT-X-GAP":
            is_gap = True
        elif tag == "#EXT-X-STREAM-INF":
            variant = _read_attributes(value)
        elif not line.startswith("#") and variant is not None:
            variants.append(_read_variant(url, variant, line, len(variants)))
            variant = None
        elif not line.startswith("#"):
            # Of a gap its maker says that there is no such piece.
            pieces.extend([] if is_gap else [(number, min(seconds, MAX_PIECE_S), line, head)])
            number, is_gap = number + 1, False
    found = [Piece(n, s, _join(url, at), None if head is None else _join(url, head)) for n, s, at, head in pieces]
    target_s = min(max(target_s, 0.1), MAX_PIECE_S)
    return Playlist(tuple(found), target_s, "#EXT-X-ENDLIST" in lines, tuple(variants))


class _Held(io.BytesIO):
    """Holds a piece that comes, until nobody wants it any more. Raises ImageError then."""

    def __init__(self, where: str, closing: threading.Event, arrivals: Arrivals) -> None:
        super().__init__()
        self._where, self._closing, self._arrivals = where, closing, arrivals

    def write(self, data: Any, /) -> int:
        if self._closing.is_set():
            raise ImageError(self._where, "is not wanted any more", "", reason_code="unreadable")
        self._arrivals.note()
        return super().write(data)


class HlsStream(WebStream):
    """A live playlist. First `connect`, then `open` and `close`."""

    def connect(self) -> bool:
        """Choose the stream that is large enough for the network. Raises ImageError: it is not live, or unusable."""
        found = self._fetch()
        if found.variants:
            enough_px = self._job.enough_px or 0
            enough = [one for one in sorted(found.variants) if one[1] >= enough_px] or [max(found.variants)]
            self._url = enough[0][2]
            found = self._fetch()
        if found.variants or found.is_over or not found.pieces:
            raise _refuse(
                self._url, "is a playlist, and of no live stream", "one that goes on", "Name the film's file."
            )
        return False

    def _receive(self, limit_s: float) -> Iterator[bytes]:
        """Yield the pieces, each in as much time as it is shown for. Raises ImageError."""
        num_bytes, until = 0, time.monotonic() + limit_s
        for data, seconds in self._read_pieces():
            number, began = max(1, round(seconds / SLICE_S)), time.monotonic()
            num_bytes, size = num_bytes + len(data), -(-len(data) // number)
            if num_bytes > self._max_bytes:
                raise make_too_large(self._fetcher.describe(self._url), self._max_bytes)
            for place in range(number):
                yield data[place * size : (place + 1) * size]
                left_s = began + (place + 1) * seconds / number - time.monotonic()
                if self._closing.wait(max(0.0, left_s)) or time.monotonic() > until:
                    return

    def _read_pieces(self) -> Iterator[tuple[bytes, float]]:
        """Yield pieces as they come, the newest first of all, and for how long each is shown. Raises ImageError."""
        last, head = -1, None
        while not self._closing.is_set():
            found = self._fetch()
            new = [piece for piece in found.pieces if piece.number > last]
            new = new if last >= 0 and len(new) <= MOST_BEHIND else new[-1:]
            for behind, piece in zip(range(len(new) - 1, -1, -1), new, strict=True):
                if head not in (None, piece.head):
                    return  # another film begins: the decoder begins anew as well
                if piece.head and head is None:
                    yield self._fetch_bytes(piece.head), 0.0
                head, last = piece.head, piece.number
                yield self._fetch_bytes(piece.url), piece.seconds * (FASTER if behind else 1.0)
            if found.is_over:
                return
            if not new:
                self._closing.wait(found.target_s / 2)

    def _fetch(self) -> Playlist:
        found = self._fetcher.fetch(self._url, MAX_PLAYLIST_BYTES)
        return parse_playlist(found.data.decode("utf-8", "replace"), found.url)

    def _fetch_bytes(self, url: str) -> bytes:
        held = _Held(self._fetcher.describe(url), self._closing, self.arrivals)
        self._fetcher.download(url, held, min(MAX_PIECE_BYTES, self._max_bytes))
        return held.getvalue()


def _read_attributes(text: str) -> dict[str, str]:
    return {name: value.strip('"') for name, value in _ATTRIBUTE.findall(text)}


def _read_variant(url: str, said: dict[str, str], line: str, number: int) -> tuple[int, int, str]:
    if number == MAX_VARIANTS:
        raise _refuse(url, f"lists more than {MAX_VARIANTS} streams", "a few sizes")
    sides = [int(side) for side in re.findall(r"\d{1,5}", said.get("RESOLUTION", ""))]
    return int(_read_number(said.get("BANDWIDTH", "0"), url)), min(sides, default=0), _join(url, line)


def _read_number(text: str, url: str) -> float:
    with contextlib.suppress(ValueError):
        if re.fullmatch(r"[0-9]{1,18}(\.[0-9]{0,30})?", text.strip()):
            return float(text)
    raise _refuse(url, f"has the number {text[:20]!r}", "a plain number")


def _join(url: str, text: str) -> str:
    """Return a URL of a playlist, whole. What may be asked is for the fetcher to say. Raises ImageError."""
    if not _PLAIN.fullmatch(text):
        raise _refuse(url, "names an address that is not plain", "a URL")
    joined = urljoin(url, text)
    if url.startswith("https:") and not joined.startswith("https:"):
        raise _refuse(url, "leads from https to another scheme", "https", code="refused_url")
    return joined


def _refuse(url: str, found: str, expected: str, todo: str = "", *, code: str = "unreadable") -> ImageError:
    return ImageError(parse_url(url).place, found, expected, todo, reason_code=code)
