"""Connections that are kept, never finished, or far too many: over real sockets, with a server in its own process."""

import http.client
import socket
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest

from fakes import make_image
from model_server import TIMEOUT_S, Server, read_all, serving, wait_for

FAST = "import visionloop.serving.connections as c; c.HEAD_S = 1.0\n"
FEW_FILES = "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (300, 300))\n"
HALF = b"POST /predict HTTP/1.1\r\nHost: t\r\n"


def ask_again(server: Server, pause_s: float) -> int:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=TIMEOUT_S)
    connection.connect()
    sock = connection.sock
    for pause in (0.0, pause_s):
        time.sleep(pause)
        connection.request("POST", "/predict", make_image(0))
        response = connection.getresponse()
        response.read()
    assert connection.sock is sock, "it is the same connection"
    return response.status


def time_until_closed(sock: socket.socket) -> tuple[float, bytes]:
    started = time.monotonic()
    answer = read_all(sock)
    return time.monotonic() - started, answer


def test_a_connection_is_kept_longer_than_a_balancer_keeps_it(tmp_path: Path, bundle_dir: Path) -> None:
    with serving(tmp_path, bundle_dir) as server:
        assert ask_again(server, 6.5) == 200  # uvicorn's own 5 s would have closed it


def test_how_long_a_connection_is_kept_can_be_set(tmp_path: Path, bundle_dir: Path) -> None:
    with serving(tmp_path, bundle_dir, keep_alive_s=1) as server, server.connect() as sock:
        sock.sendall(b"GET /health/live HTTP/1.1\r\nHost: t\r\n\r\n")
        seconds, answer = time_until_closed(sock)
    assert answer.startswith(b"HTTP/1.1 200 OK")
    assert 0.8 < seconds < 60


@pytest.mark.parametrize(
    ("sent", "answer"),
    [
        (lambda sock: None, b""),
        (lambda sock: sock.sendall(HALF), b"HTTP/1.1 408 "),
        (lambda sock: sock.sendall(b"GET /health/live HTTP/1.1\r\nHost: t\r\n\r\n" + HALF), b"HTTP/1.1 200 "),
    ],
    ids=["nothing", "half a head", "half a head after a request"],
)
def test_a_head_that_does_not_come_ends_the_connection(
    tmp_path: Path, bundle_dir: Path, sent: Callable[[socket.socket], None], answer: bytes
) -> None:
    with serving(tmp_path, bundle_dir, first=FAST) as server, server.connect() as sock:
        sent(sock)
        seconds, got = time_until_closed(sock)
        assert got.startswith(answer)
        assert got.count(b"HTTP/1.1 ") == bool(answer) + answer.endswith(b"200 ")
        assert 0.8 < seconds < 60
        assert server.stop() == (0, "")


def test_a_head_that_drips_is_not_given_more_time(tmp_path: Path, bundle_dir: Path) -> None:
    with serving(tmp_path, bundle_dir, first=FAST) as server, server.connect() as sock:
        started = time.monotonic()
        with pytest.raises(OSError):
            for byte in HALF * 100:
                sock.sendall(bytes([byte]))
                time.sleep(0.1)
        assert 0.8 < time.monotonic() - started < 60


def test_a_slow_body_has_its_own_time_and_not_that_of_the_head(tmp_path: Path, bundle_dir: Path) -> None:
    data = make_image(0)
    with serving(tmp_path, bundle_dir, first=FAST) as server, server.connect() as sock:
        sock.sendall(HALF + f"Content-Length: {len(data)}\r\nConnection: close\r\n\r\n".encode())
        time.sleep(1.5)
        sock.sendall(data)
        assert read_all(sock).startswith(b"HTTP/1.1 200 OK")


def test_more_half_open_sockets_than_files_shut_nobody_out(tmp_path: Path, bundle_dir: Path) -> None:
    with ExitStack() as stack:
        server = stack.enter_context(serving(tmp_path, bundle_dir, first=FEW_FILES))
        for _ in range(700):
            sock = stack.enter_context(server.connect())
            sock.sendall(HALF)
        started = time.monotonic()
        assert [server.ask(make_image(0)).status for _ in range(20)] == [200] * 20
        assert time.monotonic() - started < 60
        code, errors = server.stop()
    assert (code, errors.count("\n")) == (0, 1), errors[:3000]
    assert "WARNING more than 44 connections: 1 quiet ones were closed" in errors


def test_requests_in_work_are_not_closed_for_new_connections(tmp_path: Path, bundle_dir: Path) -> None:
    data = make_image(0)
    head = HALF + f"Content-Length: {len(data)}\r\nExpect: 100-continue\r\nConnection: close\r\n\r\n".encode()
    with serving(tmp_path, bundle_dir, max_connections=2) as server, ExitStack() as stack:
        working = [stack.enter_context(server.connect()) for _ in range(2)]
        for sock in working:
            sock.sendall(head + data[:-1])
            assert sock.recv(65536).startswith(b"HTTP/1.1 100 "), "it reads the image"
        third = stack.enter_context(server.connect())
        assert read_all(third).startswith(b"HTTP/1.1 503 Service Unavailable\r\nRetry-After: 1\r\n")
        for sock in working:
            sock.sendall(data[-1:])
            assert read_all(sock).startswith(b"HTTP/1.1 200 OK")
        wait_for(lambda: server.ask(data).status == 200)


def test_a_long_head_is_refused_also_if_it_comes_whole(tmp_path: Path, bundle_dir: Path) -> None:
    with serving(tmp_path, bundle_dir) as server:
        for length, status in ((60_000, b"200 OK"), (70_000, b"431 Request Header Fields Too Large")):
            with server.connect() as sock:
                sock.sendall(b"GET /health/live HTTP/1.1\r\nHost: t\r\nX: " + b"x" * length + b"\r\n\r\n")
                assert sock.recv(100).startswith(b"HTTP/1.1 " + status)
