"""Cameras: rtsp://, http(s):// and a device, watched for `watch_s`. A file on a web server is read like a local file.

FFmpeg connects only to this machine. The camera's host is resolved and checked like every download, and its bytes are
passed on: over a pipe for HTTP, over a relay on the loopback for RTSP. The relay also stops a camera that redirects
FFmpeg. So no unchecked address is reached, and no more bytes are read than allowed.
"""

import contextlib
import math
import os
import re
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Protocol
from urllib.parse import quote, unquote

from visionloop.errors import ImageError, SourceError
from visionloop.ingest.item import Item, SourceContext
from visionloop.ingest.video.clip import Spool
from visionloop.ingest.video.hls import HlsStream
from visionloop.ingest.video.webstream import Arrivals, Relay, WebStream
from visionloop.params import VideoSource
from visionloop.records import Rejected
from visionloop.secrets import Environment, mask
from visionloop.video.player import End, Frame, Player
from visionloop.video.sample import DecodeJob
from visionloop.web.addresses import HostRules, parse_url
from visionloop.web.download import make_fetcher, parse_private_hosts

RTSP_PORT = 554
_SCHEME = re.compile(r"(?i)^([a-z][a-z0-9+.-]*)://")
_LOGIN = re.compile(r"^([a-zA-Z]+://)([^/?#]*)@")
_HIDDEN = re.compile(r"^.*@", re.DOTALL)
# Here nobody can tell whether a password with a / in it ends at the @: what is before it would be shown as the host.
_UNCLEAR = re.compile(r"^[a-zA-Z]+://[^/?#]*[:@][^/?#]*[/?#].*@")
# Cameras that take the password in the path or the query: /user=admin_password=x_channel=1, ?token=x.
_VALUE = re.compile(r"(?i)((?:password|passwd|pwd|token|key)=)(.*?)(?=_[a-z]+=|[&/?#;]|$)")
# Options of FFmpeg's demuxer: the protocols that it may open, and how long it may wait (in microseconds).
RTSP_OPTIONS = {"protocol_whitelist": "rtsp,tcp,rtp", "rtsp_transport": "tcp", "timeout": "20000000"}


class Feed(Protocol):
    """Something that passes a camera's bytes to the decoder."""

    @property
    def failure(self) -> ImageError | None:
        """Why it broke off, if it did."""
        ...

    @property
    def arrivals(self) -> Arrivals | None:
        """What has come; None: nobody can say."""
        ...

    def open(self) -> DecodeJob:
        """Begin, and return what the decoder is to read. Raises ImageError."""
        ...

    def close(self) -> None:
        """Stop."""
        ...


@dataclass(frozen=True)
class Reach:
    """What a stream may reach and how much of it is read; `where` names who asks, in errors.

    `env` holds the values of `${NAME}` and VISIONLOOP_PRIVATE_HOSTS; `hosts` are those that a redirect may lead to.
    """

    env: Mapping[str, str]
    where: str
    hosts: Sequence[str] = ()
    max_bytes: int = sys.maxsize
    watch_s: float = math.inf


@dataclass(frozen=True)
class Stream:
    """What a URL or a device names. `secrets` are to be masked in what the feed and the decoder say.

    `file`: the URL is that of a video file, which is to be downloaded and read like a local one.
    """

    feed: Feed
    place: str = "live"
    secrets: tuple[str, ...] = ()
    file: WebStream | None = None


@dataclass
class Camera:
    """An opened camera of a source; or `file`, when its URL is a video file, which is read like a local one."""

    source: VideoSource
    spool: Spool
    stream: Stream
    file: Path | None = None

    def watch(self, labels: tuple[str, ...]) -> Iterator[Item | Rejected]:
        """Yield its frames as they come, for `watch_s`; then, if it failed, a `Rejected` with the reason.

        All frames of sessions that began in the same hour are one group, because the scene hardly changes.
        """
        session = ""
        name = self.source.name
        end = End(None)
        timer = threading.Timer(self.source.watch_s + GRACE_S, self.stream.feed.close)
        timer.daemon = True
        try:
            with Player() as player:
                job = self.stream.feed.open()
                timer.start()
                for answer in player.play(job):
                    if isinstance(answer, Frame) and answer.clock is not None:
                        now = datetime.fromtimestamp(answer.clock, UTC)
                        session = session or f"{name}:{now:%Y-%m-%dT%H}"
                        moment = now.isoformat(timespec="milliseconds").replace("+00:00", "Z")
                        if (path := self.spool.put(answer.jpeg)) is None:
                            end = End("too_large", "frames came faster than they could be checked")
                            break
                        read = partial(_take, self.spool, path)
                        yield Item(
                            f"{name}:{self.stream.place}#t={moment}",
                            name,
                            labels,
                            read,
                            group=session,
                            captured_at=now.isoformat(timespec="milliseconds"),
                        )
                    elif isinstance(answer, End):
                        end = answer
        except ImageError as exc:
            end = End(exc.reason_code, f"{exc.found}; expected {exc.expected}")
        finally:
            timer.cancel()
            self.stream.feed.close()
        if failure := self.stream.feed.failure:
            end = End(failure.reason_code, f"{failure.found}; expected {failure.expected}")
        if end.code and (not session or end.code != "damaged"):  # we cut a stream anywhere
            yield Rejected(f"{name}:{self.stream.place}", end.code, mask(end.text or "", self.stream.secrets))


GRACE_S = 15.0  # beyond `watch_s`, for a camera that needs time before its first frame


def is_camera(path: str) -> bool:
    """Say whether a path is a camera: a URL, or a device."""
    return bool(_SCHEME.match(path)) or path.startswith(("/dev/", "${"))


def hide_login(path: str) -> str:
    """Return a camera's path as it may be shown, however its login is written: without login, query and fragment.

    What stands after `password=`, `token=` and the like in its path is hidden too.
    """
    head, divider, rest = path.partition("://")
    shown = re.split("[?#]", _HIDDEN.sub("***@", rest))[0]
    return head + divider + _VALUE.sub(r"\1***", shown) if divider else path


@contextlib.contextmanager
def open_camera(source: VideoSource, context: SourceContext, spool: Spool, where: str) -> Iterator[Camera]:
    """Open what a URL or a device names.

    Raises:
        SourceError: the kind is not known, its host is not allowed, or a variable is not set.
    """
    job = DecodeJob(
        every_s=source.every_s,
        scene=source.scene,
        spans=[(0.0, None)],
        max_frames=source.max_frames,
        max_s=source.watch_s,
        max_pixels=context.limits.max_pixels,
    )
    reach = Reach(context.env, where, source.hosts, source.max_video_bytes, source.watch_s + GRACE_S)
    try:
        stream = open_stream(source.path, job, reach)
        file = stream.file.download(spool.reserve(".video")) if stream.file else None
        yield Camera(source, spool, stream, file)
    except ImageError as exc:
        raise SourceError(f"{where} path", exc.found, exc.expected, exc.todo) from None


def open_stream(path: str, job: DecodeJob, reach: Reach) -> Stream:
    """Open what a URL or a device names. HTTP is connected to, the others when their feed is opened.

    Raises:
        SourceError: the kind is not known, or a variable is not set.
        ImageError: the address is none, it may not be reached, or it does not answer. No secret is in its text.
    """
    kind, url, hidden = read_address(path, reach)
    try:
        if kind == "device":
            return Stream(Device(url, job))
        return _open_rtsp(url, job, reach, hidden) if kind == "rtsp" else _open_web(url, job, reach, hidden)
    except ImageError as exc:
        texts = (mask(text, hidden) for text in (exc.where, exc.found, exc.expected, exc.todo))
        raise ImageError(*texts, reason_code=exc.reason_code) from None


def read_address(path: str, reach: Reach) -> tuple[str, str, tuple[str, ...]]:
    """Return the kind of a stream (rtsp, http, https, device), its whole URL, and what is secret in it.

    Nothing is connected to. Raises SourceError: the kind is not known, or a variable is not set.
    """
    environment = Environment(reach.env, reach.where)
    url = environment.expand_url(path)
    scheme = _SCHEME.match(url)
    kind = scheme[1].lower() if scheme else "device"
    if kind not in ("rtsp", "http", "https", "device"):
        expected = "a file, rtsp://, http://, https:// or /dev/video0"
        raise SourceError(reach.where, f"got {kind}://", expected, "Check the path.")
    if _UNCLEAR.match(url):
        expected = "a login in which / ? # are written as %2F %3F %23 (and @ in a path as %40)"
        raise SourceError(reach.where, "has an @ behind a / ? or #", expected, "Or write ${NAME} for the password.")
    login = _LOGIN.match(url)
    parts = [part for part in re.split("[:@]", login[2]) if len(part) > 2] if login else []
    values = [value for _, value in _VALUE.findall(url) if len(value) > 2]
    secrets = {*environment.secrets, *parts, *values}
    return kind, url, tuple(secrets | {unquote(secret) for secret in secrets})


def _open_rtsp(url: str, job: DecodeJob, reach: Reach, secrets: tuple[str, ...]) -> Stream:
    """Raises ImageError, SourceError."""
    login = _LOGIN.match(url)
    bare = _LOGIN.sub(r"\1", url)
    address = parse_url("http" + bare[len("rtsp") :])  # the same strict parser as for every other URL
    has_port = re.match(r"[a-z]+://(\[[^]]*\]|[^/:?#]*):\d", bare, re.IGNORECASE)
    port = address.port if has_port else RTSP_PORT
    rules = HostRules((), parse_private_hosts(reach.env))
    local = f"rtsp://{_encode_login(login[2]) + '@' if login else ''}127.0.0.1:{{port}}{address.target}"
    job = replace(job, url=local, format="rtsp", options=RTSP_OPTIONS)
    return Stream(Relay(rules, address.host, port, job, reach.max_bytes), secrets=secrets)


def _encode_login(text: str) -> str:
    """Return `user:password` as it may stand in a URL, whether or not it was percent-encoded."""
    return ":".join(quote(unquote(part), safe="") for part in text.split(":", 1))


def _open_web(url: str, job: DecodeJob, reach: Reach, secrets: tuple[str, ...]) -> Stream:
    """Send the request, and see whether the answer is a file or a stream. Raises ImageError, SourceError."""
    from base64 import b64encode

    login = _LOGIN.match(url)
    bare = _LOGIN.sub(r"\1", url)
    address = parse_url(bare)
    headers = {}
    if login:
        token = b64encode(unquote(login[2]).encode()).decode()
        headers["Authorization"] = f"Basic {token}"
        secrets = (*secrets, token)
    hosts = [address.netloc, *reach.hosts]
    fetcher = make_fetcher(reach.env, hosts, headers=headers, headers_host=bare, secrets=secrets)
    stream = WebStream(fetcher, bare, job, reach.max_bytes, reach.watch_s)
    is_file = stream.connect()
    if stream.is_playlist:
        stream = HlsStream(fetcher, bare, job, reach.max_bytes, reach.watch_s)
        stream.connect()
    return Stream(stream, fetcher.describe(bare), secrets, stream if is_file else None)


class Device:
    """A camera of this machine, by its file: /dev/video0 (Video4Linux)."""

    failure: ImageError | None = None
    arrivals: Arrivals | None = None

    def __init__(self, path: str, job: DecodeJob) -> None:
        self._path, self._job = path, job

    def open(self) -> DecodeJob:
        """Raises ImageError: there is no such device, or it may not be read."""
        try:
            os.close(os.open(self._path, os.O_RDWR | os.O_NONBLOCK))
        except OSError as exc:
            expected = "a camera that may be read, like /dev/video0"
            raise ImageError(
                self._path, f"cannot be opened ({exc.strerror})", expected, reason_code="unreadable"
            ) from exc
        return replace(self._job, url=self._path, format="v4l2")

    def close(self) -> None:
        """The decoder stops by itself: it has the device."""


def _take(spool: Spool, path: Path, max_bytes: int) -> bytes:
    """Return a frame of a camera. Raises ImageError."""
    try:
        data = spool.take(path)
    except OSError as exc:
        raise ImageError(path.name, "is gone", "a frame", "Run it again.", reason_code="unreadable") from exc
    if len(data) > max_bytes:
        raise ImageError(path.name, "is too large", f"at most {max_bytes} bytes", reason_code="too_large")
    return data
