"""A camera that is connected and sends nothing, and a machine that is too busy for one that does."""

import re
import socket
import sys
import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from fakes import make_bundle
from mjpeg_camera import LIMIT_S, PATH, Camera, Plan, film, plan, read
from visionloop.ingest.video.cameras import Stream
from visionloop.ingest.video.webstream import Arrivals, Relay
from visionloop.predict.connection import NO_PICTURE_S, STALL_S, Connection, WatchPlan
from visionloop.predict.lines import describe_line
from visionloop.predict.live import StreamEnded, Watch
from visionloop.predict.several import Answerer
from visionloop.predictor import Predictor
from visionloop.video.player import Frame
from visionloop.video.sample import DecodeJob
from visionloop.web.addresses import HostRules
from visionloop.web.download import PRIVATE_HOSTS, parse_private_hosts

JOB: dict[str, Any] = {"every_s": 1.0, "scene": None, "spans": [], "max_frames": 1, "max_s": 1.0, "max_pixels": 1}


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Answerer:
    folder = tmp_path_factory.mktemp("model") / "bundle"
    make_bundle(folder)
    return Answerer(Predictor.load(folder, threads=1))


def test_a_camera_that_is_connected_and_sends_nothing_is_told_and_connected_to_again(
    network: Answerer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("visionloop.predict.live.SAID_AFTER_S", 0.1)
    with film(Camera([Plan(0, "hang"), Plan()])) as site:
        watch = Watch(plan(f"{site.url}{PATH}", stall_s=2.0), network)
        lines = list(read(watch, lambda line: line["kind"] == "back"))
    assert [line["kind"] for line in lines] == ["waiting", "lost", "back"]
    assert (lines[0]["bytes"], lines[0]["after_s"] > 0.1, watch.problem) == (0, True, "")
    assert re.fullmatch(r"..:..:..  connected, no picture yet after \d s: it sends nothing", describe_line(lines[0]))
    assert lines[1]["why"] == "no frame for 2 s: it is connected, but sends nothing"


def test_the_reply_of_a_camera_to_play_is_no_film() -> None:
    rules = HostRules((), parse_private_hosts({PRIVATE_HOSTS: "127.0.0.1"}))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        relay = Relay(rules, "127.0.0.1", listener.getsockname()[1], DecodeJob(url="{port}", **JOB), sys.maxsize)
        port = int(relay.open().url or "")
        camera, _ = listener.accept()
    with camera, socket.create_connection(("127.0.0.1", port)) as decoder:
        decoder.sendall(b"PLAY rtsp://h/1 RTSP/1.0\r\n\r\n")
        assert camera.recv(100).startswith(b"PLAY")
        for sent, counted in ((b"RTSP/1.0 200 OK\r\n\r\n", 0), (b"$\x00\x00\x02ab", 6)):
            camera.sendall(sent)
            assert decoder.recv(100) == sent
            assert relay.arrivals.num_bytes == counted
        relay.close()


def test_one_that_sends_nothing_until_the_end_is_an_error(network: Answerer) -> None:
    with film(Camera([Plan(0, "hang")])) as site:
        watch = Watch(plan(f"{site.url}{PATH}", stall_s=0.2, seconds=1.5), network)
        with pytest.raises(StreamEnded, match=r"live: no frame (in|for) .* s.*; expected a video stream") as caught:
            list(read(watch, lambda line: False))
    assert watch.num_lost >= 1 and caught.value.exit_code == 2


class _Clock:
    """Stands in for `time`, and for a decoder that gives a frame when it is told to."""

    def __init__(self) -> None:
        self.now, self.is_ready, self.is_over = 1000.0, threading.Event(), threading.Event()

    def monotonic(self) -> float:
        return self.now

    def play(self, job: object) -> Iterator[Any]:
        self.is_ready.wait(LIMIT_S)
        yield Frame(0, b"", self.now)
        self.is_over.wait(LIMIT_S)

    def interrupt(self) -> None:
        self.is_over.set()

    stop = interrupt


def test_a_machine_that_is_busy_is_not_taken_for_a_camera_that_sends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, arrivals = _Clock(), Arrivals()
    for module in ("predict.connection", "ingest.video.webstream"):
        monkeypatch.setattr(f"visionloop.{module}.time", clock)
    monkeypatch.setattr("visionloop.predict.connection.Player", lambda: clock)
    feed = SimpleNamespace(open=object, close=object, failure=None, arrivals=arrivals)
    connection = Connection(WatchPlan("rtsp://h/1", {}), None, Stream(feed))  # type: ignore[arg-type]
    while connection.waits_s == 0:
        clock.now += 1e-6
    clock.now += STALL_S - 1
    assert (connection.is_stalled(), connection.num_bytes) == (False, 0)
    arrivals.note(100)
    clock.now += STALL_S + 1
    assert not connection.is_stalled(), "what came waits for the decoder, which starts"
    clock.now += NO_PICTURE_S
    assert (connection.is_stalled(), connection.is_silent) == (True, False)
    assert connection.reason == "no frame for 50 s, though something came"
    clock.is_ready.set()
    assert connection.take(LIMIT_S)
    connection.reason = ""
    with arrivals.passing_on(100):  # the decoder has no time for them
        clock.now += NO_PICTURE_S - 1
        assert not connection.is_stalled()
    clock.now += STALL_S + 1
    assert (connection.is_stalled(), connection.is_silent) == (True, False)
    assert connection.reason == "no frame for 16 s: it sends nothing any more"
    connection.stop()
