"""Cameras as a source: real servers on loopback, watched by the real decoder in its own process."""

import contextlib
import socket
import socketserver
import struct
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from source_runs import read_video
from videos import BLUE, GREEN, RED, Film, write_video
from visionloop.errors import ImageError, SourceError

MB = 1_000_000
PRIVATE = {"VISIONLOOP_PRIVATE_HOSTS": "127.0.0.1"}


Answer = Callable[[BaseHTTPRequestHandler], None]


@contextlib.contextmanager
def serve(answer: Answer) -> Iterator[str]:
    """An HTTP server on loopback; yields host:port."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            with contextlib.suppress(ConnectionError):
                answer(self)

        def do_HEAD(self) -> None:
            self.send_error(405)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield f"127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


def send_paced(handler: BaseHTTPRequestHandler, kind: str, data: bytes, seconds: float) -> None:
    """Send a body without a length, in real time."""
    handler.send_response(200)
    handler.send_header("Content-Type", kind)
    handler.end_headers()
    step = max(188, len(data) // 40 // 188 * 188)
    for i in range(0, len(data), step):
        handler.wfile.write(data[i : i + step])
        time.sleep(seconds * step / len(data))


@pytest.fixture
def transport_stream(tmp_path: Path) -> bytes:
    film = Film([RED, GREEN, BLUE, RED], 0.5, fps=20, codec="mpeg2video", options={"g": "5"})
    return write_video(tmp_path / "made.ts", film, output_ts_offset="777").read_bytes()


def test_a_camera_over_http_is_watched(tmp_path: Path, transport_stream: bytes) -> None:
    before = time.time()
    with serve(lambda handler: send_paced(handler, "video/mp2t", transport_stream * 30, 60.0)) as host:
        items, rejected, told = read_video(
            tmp_path, PRIVATE, path=f"http://{host}/live", label="yard", every_s=0.25, watch_s=1.0
        )
    assert time.time() - before < 40
    assert (len(items), rejected, told) == (5, [], [])
    assert {i.labels for i in items} == {("yard",)}
    groups = {i.group for i in items}
    assert len(groups) == 1
    assert time.strftime("cam:%Y-%m-%dT", time.gmtime(before)) in str(groups)
    times = sorted(i.captured_at or "" for i in items)
    assert times[0][:16] >= time.strftime("%Y-%m-%dT%H:%M", time.gmtime(before))
    assert len(set(times)) == 5
    assert items[0].origin.startswith(f"cam:{host}/live#t=20")
    assert items[0].stamp is None
    assert items[0].read(MB).startswith(b"\xff\xd8")
    with pytest.raises(ImageError, match="is gone"):
        items[0].read(MB)


def test_a_camera_of_single_pictures_has_the_time_of_their_coming(tmp_path: Path) -> None:
    film = Film([RED, GREEN], 1.0, fps=10, codec="mjpeg", pix_fmt="yuvj420p")
    path = write_video(tmp_path / "a.mjpeg", film, format="mpjpeg")
    with serve(
        lambda h: send_paced(
            h, "multipart/x-mixed-replace;boundary=ffmpeg", path.read_bytes()[: -len(b"--ffmpeg\r\n")] * 20, 3.0
        )
    ) as host:
        items, _, _ = read_video(tmp_path, PRIVATE, path=f"http://{host}/", label="x", every_s=0.4, watch_s=1.0)
    assert 2 <= len(items) <= 4


def test_a_file_on_a_server_is_read_like_every_other(tmp_path: Path) -> None:
    data = write_video(tmp_path / "a.mp4", created="2026-01-01T00:00:00Z").read_bytes()

    def answer(handler: BaseHTTPRequestHandler) -> None:
        if handler.headers["Authorization"] != "Basic dXNlcjpzM2NyZXQhdw==":
            handler.send_error(401)
            return
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(data)))
        handler.end_headers()
        handler.wfile.write(data)

    env = {**PRIVATE, "CAM_PASSWORD": "s3cret!w"}
    with serve(answer) as host:
        items, _, _ = read_video(tmp_path, env, path=f"http://user:${{CAM_PASSWORD}}@{host}/a.mp4", label="x")
        assert [(i.origin, i.captured_at) for i in items][1] == (
            f"cam:{host}/a.mp4#t=1.000",
            "2026-01-01T00:00:01.000+00:00",
        )
        assert {i.group for i in items} == {f"cam:{host}/a.mp4"}
        with pytest.raises(SourceError, match="too large"):
            read_video(tmp_path, env, path=f"http://user:${{CAM_PASSWORD}}@{host}/a.mp4", max_video_bytes=1024)
        with pytest.raises(SourceError, match=r"answered 401") as caught:
            read_video(
                tmp_path, {**env, "CAM_PASSWORD": "wr0ng!pw"}, path=f"http://user:${{CAM_PASSWORD}}@{host}/a.mp4"
            )
    assert "wr0ng" not in str(caught.value)


@pytest.mark.parametrize(
    ("path", "env", "reason"),
    [
        ("http://127.0.0.1:1/live", {}, "loopback address"),
        ("http://169.254.169.254/latest", PRIVATE, "metadata address"),
        ("rtsp://127.0.0.1:1/live", {}, "loopback address"),
        ("rtsp://user:hunter2@169.254.169.254/live", PRIVATE, "metadata address"),
        ("rtsp://2130706433/live", PRIVATE, "four plain numbers"),
        ("http://${NO_SUCH}@camera/live", {}, "the variable NO_SUCH is not set"),
        ("file:///etc/passwd", {}, "got file://"),
        ("concat://a|b", {}, "got concat://"),
        ("/dev/video99", {}, "cannot be opened"),
        ("rtsp://127.0.0.1:1/live", PRIVATE, "cannot be reached"),
    ],
)
def test_a_camera_that_may_not_be_asked_is_refused(path: str, env: dict[str, str], reason: str, tmp_path: Path) -> None:
    try:
        _, rejected, _ = read_video(tmp_path, env, path=path, label="x", watch_s=1.0)
        text = str(rejected)
    except SourceError as exc:
        text = str(exc)
    assert reason in text
    assert "hunter2" not in text


def test_a_redirect_off_the_list_is_refused(tmp_path: Path) -> None:
    asked: list[str] = []

    def answer(handler: BaseHTTPRequestHandler) -> None:
        asked.append(handler.path)
        handler.send_response(302)
        handler.send_header("Location", "http://localhost:1/secret")
        handler.end_headers()

    with serve(answer) as host, pytest.raises(SourceError, match="host localhost is not in the list of hosts"):
        read_video(tmp_path, PRIVATE, path=f"http://{host}/live")
    assert asked == ["/live"]


def test_a_camera_that_sends_nothing_useful_is_rejected_and_the_pull_goes_on(tmp_path: Path) -> None:
    with serve(lambda h: send_paced(h, "video/mp2t", b"x" * 100_000, 0.2)) as host:
        items, rejected, _ = read_video(tmp_path, PRIVATE, path=f"http://{host}/live", label="x", watch_s=1.0)
    assert items == []
    assert [(r.origin, r.code) for r in rejected] == [(f"cam:{host}/live", "unreadable")]


@pytest.mark.parametrize("length", [None, 15])
def test_a_page_is_no_stream_and_no_file(tmp_path: Path, length: int | None) -> None:
    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.send_header("Content-Type", "text/HTML; charset=utf-8")
        if length:
            handler.send_header("Content-Length", str(length))
        handler.end_headers()
        handler.wfile.write(b"<html>login</html>"[:15])

    told = r"answers with a page \(text/html\), not with a stream: a login may be needed"
    with serve(answer) as host, pytest.raises(SourceError, match=told):
        read_video(tmp_path, PRIVATE, path=f"http://{host}/live")


class RtspCamera(socketserver.StreamRequestHandler):
    """Just enough of RFC 2326: DESCRIBE, SETUP, PLAY, and MPEG-TS in RTP inside the same connection."""

    server: Any

    def handle(self) -> None:
        while line := self.rfile.readline():
            method, url = line.split()[:2]
            headers = {}
            while (header := self.rfile.readline().strip()) and b":" in header:
                name, _, value = header.partition(b":")
                headers[name.lower()] = value.strip().decode()
            self.server.asked.append((method.decode(), headers.get(b"authorization", "")))
            with contextlib.suppress(ConnectionError):
                self.answer(method.decode(), url.decode(), headers[b"cseq"])

    def answer(self, method: str, url: str, number: str) -> None:
        if self.server.redirect and method == "DESCRIBE":
            self.reply(number, "302 Found", f"Location: {self.server.redirect}\r\n")
        elif self.server.password and not self.server.asked[-1][1]:
            self.reply(number, "401 Unauthorized", 'WWW-Authenticate: Basic realm="camera"\r\n')
        elif method == "OPTIONS":
            self.reply(number, "200 OK", "Public: DESCRIBE, SETUP, PLAY, TEARDOWN\r\n")
        elif method == "DESCRIBE":
            sdp = "v=0\r\no=- 0 0 IN IP4 127.0.0.1\r\ns=c\r\nt=0 0\r\nm=video 0 RTP/AVP 33\r\na=control:track1\r\n"
            self.reply(
                number, "200 OK", f"Content-Type: application/sdp\r\nContent-Length: {len(sdp)}\r\n", sdp.encode()
            )
        elif method == "SETUP":
            self.reply(number, "200 OK", "Transport: RTP/AVP/TCP;unicast;interleaved=0-1\r\nSession: 1\r\n")
        elif method == "PLAY":
            self.reply(number, "200 OK", "Session: 1\r\n")
            self.film()
        else:
            self.reply(number, "200 OK", "Session: 1\r\n")

    def reply(self, number: str, status: str, headers: str, body: bytes = b"") -> None:
        head = f"RTSP/1.0 {status}\r\nCSeq: {number}\r\n{headers}\r\n".encode()
        self.wfile.write(self.server.before + head + body)

    def film(self) -> None:
        data: bytes = self.server.film
        for number, i in enumerate(range(0, len(data), 7 * 188)):
            packet = struct.pack(">BBHII", 0x80, 33, number, int(number * 900), 1) + data[i : i + 7 * 188]
            self.wfile.write(b"$\x00" + struct.pack(">H", len(packet)) + packet)
            time.sleep(0.01)


@contextlib.contextmanager
def film_over_rtsp(film: bytes, *, redirect: str = "", password: bool = False, before: bytes = b"") -> Iterator[Any]:
    server: Any = socketserver.ThreadingTCPServer(("127.0.0.1", 0), RtspCamera)
    server.daemon_threads = True
    server.film, server.redirect, server.password, server.asked = film, redirect, password, []
    server.before = before  # what the camera sends before each answer
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


def test_a_camera_over_rtsp_is_watched(tmp_path: Path, transport_stream: bytes) -> None:
    with film_over_rtsp(transport_stream * 6, password=True) as server:
        path = f"rtsp://admin:${{CAM}}@127.0.0.1:{server.server_address[1]}/stream1"
        items, rejected, _ = read_video(
            tmp_path, {**PRIVATE, "CAM": "p@ss:w"}, path=path, label="gate", every_s=0.25, watch_s=1.0
        )
    assert [method for method, _ in server.asked][-2:-1] == ["SETUP"] or "PLAY" in dict(server.asked)
    assert ("DESCRIBE", "Basic YWRtaW46cEBzczp3") in server.asked  # admin:p@ss:w
    assert (len(items), rejected) == (5, [])
    assert items[0].origin.startswith("cam:live#t=20")
    assert items[0].read(MB).startswith(b"\xff\xd8")


REDIRECTS = "redirects to another address; expected the film itself"


@pytest.mark.parametrize(
    ("before", "code", "reason"),
    [
        (b"", "refused_url", REDIRECTS),
        (b"$\x00\x00\x02ab", "refused_url", REDIRECTS),
        (b"\r$\x00\x00\x00", "refused_url", REDIRECTS),
        (b"\0\n", "refused_url", "sends a control character in a reply; expected the film itself"),
        (b"\r\n\n", "unreadable", "gives no video"),  # FFmpeg takes these for a whole reply, and gives up
        (b"ANNOUNCE x RTSP/1.0\nContent-Length: 3\n\n\n\n$", "unreadable", "gives no video"),
    ],
    ids=["plain", "packet", "packet-after-return", "NUL", "empty-lines", "request-with-body"],
)
def test_a_camera_that_sends_the_decoder_elsewhere_is_stopped(
    tmp_path: Path, before: bytes, code: str, reason: str
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as elsewhere:
        elsewhere.settimeout(0.2)
        with film_over_rtsp(
            b"", redirect=f"rtsp://127.0.0.1:{elsewhere.getsockname()[1]}/internal", before=before
        ) as server:
            path = f"rtsp://127.0.0.1:{server.server_address[1]}/stream1"
            items, rejected, _ = read_video(tmp_path, PRIVATE, path=path, label="x", watch_s=1.0)
        with pytest.raises(TimeoutError):
            elsewhere.accept()
    assert items == []
    assert [r.code for r in rejected] == [code]
    assert rejected[0].reason.startswith(reason)


def test_a_stream_stops_at_its_limit_of_bytes(tmp_path: Path, transport_stream: bytes) -> None:
    with film_over_rtsp(transport_stream * 50) as server:
        path = f"rtsp://127.0.0.1:{server.server_address[1]}/stream1"
        _, rejected, _ = read_video(
            tmp_path, PRIVATE, path=path, label="x", watch_s=9.0, max_video_bytes=len(transport_stream) * 2
        )
    assert [r.code for r in rejected] == ["too_large"]
