"""More work than the server can do: clients that give up, deadlines, and when to come back. With a slow network."""

import socket
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from fakes import make_image
from model_server import Server, read_metric, serving, wait_for

SLOW = """
import time
from visionloop.predictor import Predictor
run = Predictor.run
def slow(self, images_nhwc):
    time.sleep({seconds} * len(images_nhwc))
    return run(self, images_nhwc)
Predictor.run = slow
"""


def ask_briefly(server: Server, data: bytes, limit_s: float) -> bytes:
    """Send a request and wait for `limit_s` at most; return its status, or nothing."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=limit_s) as sock:
        head = f"POST /predict HTTP/1.1\r\nHost: t\r\nContent-Length: {len(data)}\r\nConnection: close\r\n\r\n"
        try:
            sock.sendall(head.encode() + data)
            return sock.recv(65536)[9:12]
        except OSError:
            return b""


def test_clients_that_give_up_do_not_take_the_answers_of_others(tmp_path: Path, bundle_dir: Path) -> None:
    data, counts, lasts_s = make_image(0, size_hw=(64, 64)), Counter[bytes](), 5.0
    with serving(tmp_path, bundle_dir, first=SLOW.format(seconds=0.037)) as server:
        started = time.monotonic()

        def hammer(number: int) -> None:
            time.sleep(number * 0.003)
            while time.monotonic() - started < lasts_s:
                counts[ask_briefly(server, data, 0.2)] += 1

        with ThreadPoolExecutor(64) as pool:
            list(pool.map(hammer, range(64)))
        assert counts[b"200"] > 0.4 * lasts_s / 0.037, counts
        wait_for(lambda: read_metric(server, "visionloop_queue_images") == 0)
        answered = read_metric(server, 'visionloop_requests_total{outcome="ok"}')
        assert counts[b"200"] <= answered <= counts[b"200"] + 10, "what nobody got is not counted"
        assert read_metric(server, 'visionloop_requests_total{outcome="disconnected"}') > 100
        started = time.monotonic()
        assert server.ask(data).status == 200
        assert time.monotonic() - started < 2


def test_a_deadline_of_the_client_is_kept_and_says_when_to_come_back(tmp_path: Path, bundle_dir: Path) -> None:
    data = make_image(0)
    with serving(tmp_path, bundle_dir, first=SLOW.format(seconds=0.3)) as server:
        started = time.monotonic()
        answer = server.ask(data, **{"X-Deadline-Ms": "100"})
        assert time.monotonic() - started < 0.29
        assert (answer.status, answer.body["error"]["code"]) == (503, "deadline")
        assert "one within 0.1 s" in answer.body["error"]["message"]
        assert server.ask(data, **{"X-Deadline-Ms": "5000"}).status == 200
        with ThreadPoolExecutor(10) as pool:
            calls = [pool.submit(server.ask, data) for _ in range(9)]
            wait_for(lambda: read_metric(server, "visionloop_queue_images") >= 9)
            refused = server.ask(data, **{"X-Deadline-Ms": "1000"})
            refused_at = time.monotonic()
            assert (refused.status, refused.body["error"]["code"]) == (503, "busy")
            assert {call.result().status for call in calls} == {200}
        drained_s = time.monotonic() - refused_at
        assert abs(int(refused.headers["retry-after"]) - drained_s) < 1.5


def test_the_server_has_a_deadline_of_its_own(tmp_path: Path, bundle_dir: Path) -> None:
    with serving(tmp_path, bundle_dir, first=SLOW.format(seconds=1.0), deadline_s=0.2) as server:
        for asked in ({}, {"X-Deadline-Ms": "9000"}):
            answer = server.ask(make_image(0), **asked)
            assert (answer.status, answer.body["error"]["code"]) == (503, "deadline")


def test_a_deadline_that_is_no_number_is_refused(tmp_path: Path, bundle_dir: Path) -> None:
    with serving(tmp_path, bundle_dir) as server:
        for text in ("0", "-5", "soon", "9" * 400, "9" * 5000):
            assert server.ask(make_image(0), **{"X-Deadline-Ms": text}).status == 422


def test_a_network_that_does_not_finish_is_not_alive(tmp_path: Path, bundle_dir: Path) -> None:
    with serving(tmp_path, bundle_dir, first=SLOW.format(seconds=3.0), stuck_s=0.5, deadline_s=0.2) as server:
        assert server.ask(path="/health/live").status == 200
        time.sleep(0.7)
        assert server.ask(path="/health/live").status == 200, "it has nothing to do"
        assert server.ask(make_image(0)).body["code"] == "deadline"
        wait_for(lambda: server.ask(path="/health/live").status == 503)
        assert server.ask(path="/health/live").body["code"] == "stuck"
        wait_for(lambda: server.ask(path="/health/live").status == 200)
