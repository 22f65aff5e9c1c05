"""The server as a process of its own on loopback: hostile clients, swaps under load, and a clean end."""

import http.client
import json
import math
import signal
import socket
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from fakes import make_image
from model_server import (
    TIMEOUT_S,
    Answer,
    assert_quick,
    promote,
    read_all,
    read_metric,
    serving,
    take_time,
    wait_for,
)
from visionloop.errors import BundleError, ServingError, StoreError
from visionloop.params import make_params
from visionloop.promotion.ledger import append_entry
from visionloop.serving.main import run_server
from visionloop.settings import Settings
from visionloop.store import LocalStore
from visionloop.workspace import connect


def run_here(home: Path, port: int = 0, bundle_dir: Path | None = None) -> None:
    settings = Settings(home=home, store_url=(home / "store").as_uri(), tracking_uri="", artifact_root="")
    run_server(connect(settings, make_params({"name": "fake"})), host="127.0.0.1", port=port, bundle=bundle_dir)


def test_a_port_in_use_is_one_clear_line(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ServingError) as caught:
            run_here(tmp_path, port=port)
    expected = f"port 127.0.0.1:{port}: is in use; expected a free port. Pass --port 0 for any free one."
    assert (str(caught.value), caught.value.exit_code) == (expected, 2)


def test_a_number_that_is_no_port_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(ServingError, match=r"port 127\.0\.0\.1:70000: is no port; expected 0 to 65535"):
        run_here(tmp_path, port=70000)


def test_without_a_champion_it_says_how_to_get_one(tmp_path: Path) -> None:
    with pytest.raises(ServingError, match=r"no champion.*visionloop start"):
        run_here(tmp_path)


def test_a_bundle_with_a_flipped_byte_is_refused(tmp_path: Path, bundle_dir: Path) -> None:
    model = bundle_dir / "model.onnx"
    data = model.read_bytes()
    model.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(BundleError, match=r"model\.onnx differs from its digest"):
        run_here(tmp_path, bundle_dir=bundle_dir)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_with_code_0_and_nothing_left_behind(
    tmp_path: Path, bundle_dir: Path, number: signal.Signals
) -> None:
    with serving(tmp_path, bundle_dir, log=False) as server:
        assert server.ask(make_image(0)).body["prediction"] in {"a", "b", "c"}
        assert server.stop(number) == (0, "")
        with pytest.raises(ConnectionRefusedError):
            server.connect()
    assert {path.name for path in tmp_path.iterdir()} == {"bundle"}


def test_a_signal_in_the_middle_of_work_loses_no_request_that_was_taken(tmp_path: Path, bundle_dir: Path) -> None:
    data = make_image(0, size_hw=(1500, 1500))
    with serving(tmp_path, bundle_dir) as server:
        sockets = [server.connect() for _ in range(12)]
        for sock in sockets:
            head = f"POST /predict HTTP/1.1\r\nHost: t\r\nContent-Length: {len(data)}\r\nConnection: close\r\n\r\n"
            sock.sendall(head.encode() + data)
        depth = "visionloop_queue_images"
        wait_for(lambda: read_metric(server, depth) > 0)
        code, _ = server.stop()
        answers = [read_all(sock) for sock in sockets]
    assert code == 0
    assert Counter(answer.split(b"\r\n")[0] for answer in answers) == {b"HTTP/1.1 200 OK": 12}
    assert all(b'"prediction"' in answer for answer in answers)


def test_a_spoilt_champion_leaves_the_old_one_serving_and_shows(tmp_path: Path) -> None:
    first = promote(tmp_path, 1, None)
    with serving(tmp_path, poll_s=0.1) as server:
        facts = {"model_version": "9", "decision": None, "dataset": {}, "run_id": None, "by": "t", "why": "t"}
        store = LocalStore(tmp_path / "store")
        append_entry(store, "fake", first, action="promote", bundle="f" * 64, at="2026-01-01T00:00:00Z", **facts)
        wait_for(lambda: server.ask(path="/health/ready").body["problem"] is not None)
        ready = server.ask(path="/health/ready")
        assert ready.status == 200
        assert ready.body["problem"] == "ledger entry 2 is not served: bundle_error: is not whole in the store"
        assert server.ask(make_image(0)).body["model"]["version"] == "1"
        assert read_metric(server, "visionloop_swap_failures_total") == 1
        assert server.stop()[1].count("ERROR") == 1


def test_a_slow_client_blocks_no_other(tmp_path: Path, bundle_dir: Path) -> None:
    with serving(tmp_path, bundle_dir, max_queue=2) as server:
        slow = [server.connect() for _ in range(50)]
        for sock in slow:
            sock.sendall(b"POST /predict HTTP/1.1\r\nHost: t\r\nContent-Length: 100000\r\n\r\nx")
        started = time.monotonic()
        assert [server.ask(make_image(i)).status for i in range(10)] == [200] * 10
        assert time.monotonic() - started < 60
        for sock in slow:
            sock.close()
        assert server.ask(make_image(0)).status == 200


def test_a_flood_is_answered_with_200_or_503_and_then_it_is_well_again(tmp_path: Path, bundle_dir: Path) -> None:
    with serving(tmp_path, bundle_dir, max_queue=4, max_batch=4) as server:
        data = make_image(0, size_hw=(600, 600))

        def ask(_: int) -> tuple[Answer, float]:
            started = time.monotonic()
            return server.ask(data), time.monotonic() - started

        with ThreadPoolExecutor(60) as pool:
            timed = list(pool.map(ask, range(240)))
        counts = Counter(answer.status for answer, _ in timed)
        assert counts.keys() == {200, 503}
        refused = [answer for answer, _ in timed if answer.status == 503]
        longest_s = max(seconds for answer, seconds in timed if answer.status == 200)
        waits_s = {int(answer.headers["retry-after"]) for answer in refused}
        assert waits_s <= set(range(1, 2 + math.ceil(longest_s))), "four images wait: no longer than the slowest took"
        assert {answer.body["error"]["code"] for answer in refused} == {"busy"}
        assert server.ask(make_image(0)).status == 200
        assert read_metric(server, "visionloop_queue_images") == 0


def test_too_large_a_body_is_refused_however_it_is_declared(tmp_path: Path, bundle_dir: Path) -> None:
    with serving(tmp_path, bundle_dir, max_body_bytes=100_000) as server:
        assert server.ask(b"a" * 3_000_000).status == 413
        with server.connect() as sock:
            sock.sendall(b"POST /predict HTTP/1.1\r\nHost: t\r\nTransfer-Encoding: chunked\r\n\r\n")
            for _ in range(30):
                sock.sendall(b"%x\r\n" % 10_000 + b"a" * 10_000 + b"\r\n")
            sock.sendall(b"0\r\n\r\n")
            assert read_all(sock).startswith(b"HTTP/1.1 413 ")
        with server.connect() as sock:  # more bytes than it declares: the rest is no request
            sock.sendall(b"POST /predict HTTP/1.1\r\nHost: t\r\nContent-Length: 5\r\n\r\n" + b"a" * 5_000 + b"\r\n\r\n")
            answer = read_all(sock)
            assert answer.startswith(b"HTTP/1.1 400 ")
            assert answer.count(b"HTTP/1.1 ") == 1
        with server.connect() as sock:  # fewer bytes than it declares: it goes away in the middle
            sock.sendall(b"POST /predict HTTP/1.1\r\nHost: t\r\nContent-Length: 5000\r\n\r\naaaaa")
        assert server.ask(make_image(0)).status == 200
        assert server.stop() == (0, "")


def test_an_answer_on_a_kept_connection_does_not_wait_for_an_acknowledgement(tmp_path: Path, bundle_dir: Path) -> None:
    with serving(tmp_path, bundle_dir) as server:

        def measure() -> tuple[float, float]:
            connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=TIMEOUT_S)

            def ask() -> None:
                connection.request("POST", "/predict", make_image(0))
                connection.getresponse().read()

            seconds = sorted(take_time(ask) for _ in range(30))
            connection.close()
            return seconds[5], 0.035  # Nagle's algorithm and a delayed acknowledgement make it 0.04

        assert_quick(measure)


def test_a_server_starts_with_what_it_served_last_while_the_store_is_away(tmp_path: Path) -> None:
    first = promote(tmp_path, 1, None)
    away, store = tmp_path / "away", tmp_path / "store"
    with serving(tmp_path) as server:
        expected = server.ask(make_image(0)).body["probabilities"]
        server.stop()
    store.rename(away)
    with serving(tmp_path, poll_s=0.1) as server:
        ready = server.ask(path="/health/ready").body
        assert ready["model"] == {"name": "fake", "version": "1", "digest": first.bundle, "engine": "onnxruntime fp32"}
        assert ready["problem"].startswith("the ledger cannot be read: store_error: ")
        assert server.ask(make_image(0)).body["probabilities"] == expected
        away.rename(store)
        wait_for(lambda: server.ask(path="/health/ready").body["problem"] is None)
        assert "started with the model that was served last: ledger entry 1" in server.stop()[1]


def test_a_thread_that_computes_does_not_keep_requests_waiting_for_long(tmp_path: Path, bundle_dir: Path) -> None:
    busy = """
import threading
import visionloop.serving.main as m
make = m.make_app
def compute():
    while True:
        sum(range(1000))
def make_busy(*args, **kwargs):
    threading.Thread(target=compute, daemon=True).start()
    return make(*args, **kwargs)
m.make_app = make_busy
"""
    with serving(tmp_path, bundle_dir, first=busy) as server:

        def measure() -> tuple[float, float]:
            seconds = sorted(take_time(lambda: server.ask(make_image(0))) for _ in range(40))
            return seconds[10], 0.018  # by Python's own interval each change of threads takes 5 ms

        assert_quick(measure)


HANGING = """
import threading
import visionloop.serving.log, visionloop.serving.main, visionloop.serving.swap
from visionloop.store import LocalStore

def hang(name):
    work = getattr(LocalStore, name)
    def wait(self, *args, **kwargs):
        while (home / "hang").exists():
            threading.Event().wait()
        return work(self, *args, **kwargs)
    setattr(LocalStore, name, wait)

for name in ("get", "list", "exists", "put", "create"):
    hang(name)
visionloop.serving.main.GRACE_S = 1
visionloop.serving.log.STOP_S = visionloop.serving.swap.STOP_S = 0.5
"""


def test_a_store_that_hangs_for_ever_does_not_hold_the_end_of_the_process(tmp_path: Path) -> None:
    entry = promote(tmp_path, 1, None)
    picture = np.load(tmp_path / "bundle-1" / "reference.npz")["sha256_n"][0].decode()
    with serving(tmp_path, poll_s=0.05, log_flush_s=0.1, first=HANGING) as server:
        request_id = server.ask(make_image(0)).body["request_id"]
        (tmp_path / "hang").touch()
        server.ask(make_image(1))
        feedback = json.dumps({"request_id": request_id, "label": "a"}).encode()
        with ThreadPoolExecutor(3) as pool:
            asked = [
                pool.submit(server.ask, feedback, "/feedback"),
                pool.submit(server.ask, b"", "/admin/reload"),
                pool.submit(server.ask, None, f"/images/{picture}"),
            ]
            time.sleep(0.5)
            assert not any(each.done() for each in asked), "all of them wait for the store"
            assert server.ask(path="/model").body["entry"] == entry.number
            started = time.monotonic()
            code, _ = server.stop()
            assert (code, time.monotonic() - started < 60) == (0, True)


def test_a_store_that_is_away_is_an_error_where_nothing_whole_was_served(tmp_path: Path) -> None:
    first = promote(tmp_path, 1, None)
    with serving(tmp_path) as server:
        server.stop()
    (tmp_path / "store").rename(tmp_path / "away")
    model = tmp_path / ".visionloop" / "serving" / first.bundle / "model.onnx"
    model.write_bytes(model.read_bytes()[:-1] + b"?")
    with pytest.raises(StoreError, match="ledger entry"):
        run_here(tmp_path)


def test_another_store_does_not_replace_what_was_served_last(tmp_path: Path) -> None:
    promote(tmp_path, 1, promote(tmp_path, 3, None))
    with serving(tmp_path) as server:
        digest = server.ask(path="/model").body["digest"]
        server.stop()
    (tmp_path / "store").rename(tmp_path / "away")
    promote(tmp_path, 2, None)
    with serving(tmp_path, poll_s=0.05) as server:
        time.sleep(0.5)
        assert server.ask(path="/model").body["digest"] == digest


def test_the_current_bundle_and_the_one_before_stay_on_disk_and_no_more(tmp_path: Path) -> None:
    entries = [promote(tmp_path, 1, None)]
    with serving(tmp_path, poll_s=0.05) as server:
        for seed in (2, 3, 4):
            entries.append(promote(tmp_path, seed, entries[-1]))
            wait_for(lambda: server.ask(path="/model").body["digest"] == entries[-1].bundle)
        server.stop()
    folder = tmp_path / ".visionloop" / "serving"
    assert {path.name for path in folder.iterdir()} == {entries[-1].bundle, entries[-2].bundle, "last.json"}


def test_after_sigterm_it_is_not_ready_and_still_answers_for_a_while(tmp_path: Path, bundle_dir: Path) -> None:
    with serving(tmp_path, bundle_dir, lame_duck_s=600) as server:
        assert server.ask(path="/health/ready").status == 200
        server.process.send_signal(signal.SIGTERM)
        wait_for(lambda: server.ask(path="/health/ready").status == 503)
        assert server.ask(path="/health/ready").body["error"]["code"] == "stopping"
        assert (server.ask(make_image(0)).status, server.ask(path="/health/live").status) == (200, 200)
    with serving(tmp_path, bundle_dir, lame_duck_s=1) as server:
        started = time.monotonic()
        assert server.stop() == (0, "")
        assert time.monotonic() - started > 0.9


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_does_not_wait(tmp_path: Path, bundle_dir: Path, second: signal.Signals) -> None:
    with serving(tmp_path, bundle_dir, lame_duck_s=60) as server:
        server.process.send_signal(signal.SIGTERM)
        wait_for(lambda: server.ask(path="/health/ready").status == 503)
        assert server.stop(second) == (0, "")
