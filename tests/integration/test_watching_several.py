"""Several cameras, watched by one `visionloop predict`: real servers on loopback, and one network for all."""

import json
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import simplejpeg

from fakes import make_bundle, run_here
from http_server import Answer, Handler, serve
from mjpeg_camera import PATH, Camera, Plan, film
from videos import RED, WHITE
from visionloop.cli.cameras import allow_typed_host
from visionloop.errors import BusyError, ImageError
from visionloop.params.loop import Webhook
from visionloop.predict.connection import WatchPlan
from visionloop.predict.files import Sampling
from visionloop.predict.lines import Line, Outbox
from visionloop.predict.live import StreamEnded
from visionloop.predict.several import Answerer, Followed, follow_all, watch_all
from visionloop.predictor import Predictor

LIMIT_S = 120.0  # no test waits for it: it ends one that would wait for ever
AWAY = "http://127.0.0.1:1/live"
Open = Callable[[Camera], str]


@pytest.fixture(scope="module")
def predictor(tmp_path_factory: pytest.TempPathFactory) -> Predictor:
    folder = tmp_path_factory.mktemp("model") / "bundle"
    make_bundle(folder)
    return Predictor.load(folder, threads=1)


@pytest.fixture
def start() -> Iterator[Open]:
    """A function that starts a camera and returns its address."""
    with ExitStack() as stack:
        yield lambda camera: f"{stack.enter_context(film(camera)).url}{PATH}"


def plan(name: str, path: str, **keys: Any) -> WatchPlan:
    wishes = {"sampling": Sampling(0.05, 0.2), "seconds": LIMIT_S, "wait_s": 0.05, "is_one_of_several": True, **keys}
    return WatchPlan(path, allow_typed_host(path, {}), name=name, **wishes)


def read(streams: Sequence[Followed], until: Callable[[Sequence[Line]], bool]) -> dict[str, list[Line]]:
    """The lines of each stream; all are stopped when what is waited for has come."""
    lines = list[Line]()
    for found in watch_all(streams):
        if found:
            assert found[1]["source"] == found[0].shown
            lines.append(found[1])
            if until(lines):
                for one in streams:
                    one.watch.stop("stopped")
    return {one.shown: [line for line in lines if line["source"] == one.shown] for one in streams}


def count(lines: Sequence[Line], source: str, kind: str) -> int:
    return sum((line["source"], line["kind"]) == (source, kind) for line in lines)


def send_huge(handler: Handler) -> None:
    """A camera whose picture says that it has 60,000 x 60,000 pixels."""
    jpeg = bytearray(simplejpeg.encode_jpeg(np.zeros((48, 64, 3), np.uint8)))
    place = jpeg.index(b"\xff\xc0")
    jpeg[place + 5 : place + 9] = (60_000).to_bytes(2, "big") * 2
    handler.send_response(200)
    handler.send_header("Content-Type", "multipart/x-mixed-replace;boundary=frame")
    handler.end_headers()
    with suppress(ConnectionError):
        for _ in range(100):
            head = f"--frame\r\nContent-Type: image/jpeg\r\nContent-Length: {len(jpeg)}\r\n\r\n"
            handler.wfile.write(head.encode() + jpeg + b"\r\n")


def test_each_has_its_own_timeline_and_what_is_broken_holds_no_other_up(predictor: Predictor, start: Open) -> None:
    gate = Camera()
    with serve({"/huge": send_huge}) as site:
        plans = [
            plan("gate", start(gate)),
            plan("yard", start(Camera(color=WHITE))),
            plan("breaks", start(Camera([Plan(20), Plan()]))),
            plan("stalls", start(Camera([Plan(20, "hang")])), stall_s=0.5),
            plan("away", AWAY),
            plan("noise", start(Camera([Plan(0, "noise")]))),
            plan("huge", f"{site.url}/huge"),
            plan("refused", "http://169.254.169.254/latest"),
        ]

        def has_all(lines: Sequence[Line]) -> bool:
            if count(lines, "gate", "change"):
                gate.color = WHITE
            is_lost = all(count(lines, name, "lost") for name in ("breaks", "stalls", "away", "noise", "huge"))
            return bool(
                is_lost
                and count(lines, "gate", "change") > 1
                and count(lines, "yard", "change")
                and count(lines, "breaks", "back")
            )

        streams = follow_all(plans, predictor, "pets", None)
        told = read(streams, has_all)
    answers = {name: [one["prediction"] for one in told[name] if one["kind"] == "change"] for name in told}
    assert answers["gate"][:2] == ["a", "c"] and answers["yard"] == ["c"]
    assert answers["away"] == answers["noise"] == answers["huge"] == answers["refused"] == []
    assert [line["kind"] for line in told["breaks"]][:3] == ["change", "lost", "back"]
    why = {name: next((one["why"] for one in told[name] if one["kind"] == "lost"), "") for name in told}
    assert "the connection failed" in why["away"] and "no frame for" in why["stalls"]
    assert re.search("damaged|60000 x 60000|no video", why["huge"]), why["huge"]
    for name, lines in told.items():
        assert [line["kind"] for line in lines].index("end") == len(lines) - 1, f"{name} has one summary, at its end"
    refused = streams[-1]
    assert isinstance(refused.failure, StreamEnded) and "metadata address" in refused.describe()
    assert [one.shown for one in streams if one.has_failed] == ["away", "noise", "huge", "refused"]


def test_frames_that_wait_are_answered_in_one_batch_as_each_would_be_alone(
    predictor: Predictor, monkeypatch: pytest.MonkeyPatch
) -> None:
    frames = [simplejpeg.encode_jpeg(np.full((48, 64, 3), color, np.uint8)) for color in (RED, WHITE, (9, 90, 200))]
    alone, answerer = predictor.predict([*frames, frames[0]]), Answerer(predictor)
    run, sizes, found = predictor.run, list[int](), dict[int, Any]()

    def run_late(images_nhwc: Any) -> Any:
        deadline = time.monotonic() + LIMIT_S
        while not sizes and len(answerer._waiting) < 3 and time.monotonic() < deadline:
            time.sleep(0.01)
        sizes.append(len(images_nhwc))
        return run(images_nhwc)

    monkeypatch.setattr(predictor, "run", run_late)
    jobs = enumerate([*frames, frames[0]])
    threads = [threading.Thread(target=lambda i, f: found.update({i: answerer.answer(f)}), args=job) for job in jobs]
    for thread in threads:
        thread.start()
    with pytest.raises(ImageError, match="frame: is text"):
        answerer.answer(b"no picture")
    for thread in threads:
        thread.join(LIMIT_S)
    assert sizes == [1, 3]
    for number, answer in enumerate(alone):
        assert found[number].prediction == answer.prediction
        assert found[number].probabilities == pytest.approx(answer.probabilities, abs=1e-5)

    def fail(images_nhwc: Any) -> Any:
        raise RuntimeError("the network is broken")

    monkeypatch.setattr(predictor, "run", fail)
    with pytest.raises(RuntimeError, match="the network is broken"):
        answerer.answer(frames[0])


def test_a_network_that_is_too_slow_passes_frames_over_and_a_fault_of_ours_ends_all(
    predictor: Predictor, start: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    streams = follow_all([plan(name, start(Camera())) for name in ("gate", "yard")], predictor, "pets", None)

    def fail_late(images_nhwc: Any) -> Any:
        deadline = time.monotonic() + LIMIT_S
        while min(one.watch.num_passed_over for one in streams) < 8 and time.monotonic() < deadline:
            time.sleep(0.01)
        raise RuntimeError("the network is broken")

    monkeypatch.setattr(predictor, "run", fail_late)
    with pytest.raises(RuntimeError, match="the network is broken"):
        list(watch_all(streams))
    assert min(one.watch.num_passed_over for one in streams) >= 8
    assert all(one.is_over for one in streams)


def test_one_that_shows_nothing_is_not_waited_for_when_the_others_are_through(
    predictor: Predictor, start: Open
) -> None:
    silent = plan("silent", start(Camera([Plan(0, "hang")])), stall_s=0.2)
    plans = [plan("gate", start(Camera()), frames=3), plan("away", AWAY), silent]
    told = read(follow_all(plans, predictor, "pets", None), lambda lines: False)
    assert {name: (lines[-1]["why"], lines[-1]["frames"]) for name, lines in told.items()} == {
        "gate": ("limit", 3),
        "away": ("limit", 0),
        "silent": ("limit", 0),
    }


def test_each_has_its_own_outbox_and_one_that_another_process_sends_is_left_out(
    predictor: Predictor, start: Open, tmp_path: Path
) -> None:
    with serve({"/hook": Answer(status=204)}) as site:
        hook = Webhook(url=f"{site.url}/hook")
        by_hand = Outbox.open(tmp_path, "busy", hook, {})
        plans = [plan(name, start(Camera())) for name in ("gate", "yard", "busy")]
        streams = follow_all(plans, predictor, "pets", lambda shown: Outbox.open(tmp_path, shown, hook, {}))
        read(streams, lambda lines: count(lines, "gate", "change") > 0 < count(lines, "yard", "change"))
        by_hand.close()
        events = [json.loads(request.body) for request in site.requests]
    assert isinstance(streams[2].failure, BusyError)
    assert {(one["source"], one["name"], one["event"]) for one in events} == {
        ("gate", "pets", "visionloop.predict.change"),
        ("yard", "pets", "visionloop.predict.change"),
    }
    assert all(one["text"].startswith(f"pets: {one['source']}: ") for one in events)


@pytest.mark.long
def test_thirty_two_are_watched_at_once(predictor: Predictor, start: Open) -> None:
    plans = [plan(f"camera {number}", start(Camera(color=(RED, WHITE)[number % 2]))) for number in range(32)]
    streams = follow_all(plans, predictor, "pets", None)
    told = read(streams, lambda lines: all(count(lines, one.shown, "change") for one in streams))
    for number, lines in enumerate(told.values()):
        assert {one["prediction"] for one in lines if one["kind"] == "change"} == {"ac"[number % 2]}


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    (tmp_path / "params.yaml").write_text("name: pets\n")
    make_bundle(tmp_path / "bundle")
    return tmp_path


def test_one_command_watches_several_and_ctrl_c_ends_each_with_a_summary(workspace: Path, start: Open) -> None:
    login = "Basic YWRtaW46cEBzc3cwcmQ="
    gate = start(Camera(login=login)).replace("http://", "http://admin:p%40ssw0rd@")
    words = (f"gate={gate}", f"yard={start(Camera(color=WHITE))}", AWAY)
    wishes = ("--out", "events.jsonl", "--every", "0.1", "--smooth", "0.2", "--json", "--bundle", "bundle")
    with subprocess.Popen(
        [sys.executable, "-m", "visionloop", "predict", *words, *wishes],
        cwd=workspace,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout
        lines = [json.loads(process.stdout.readline()) for _ in range(3)]
        process.send_signal(signal.SIGINT)
        rest, errors = process.communicate(timeout=LIMIT_S)
    lines += map(json.loads, rest.splitlines())
    assert process.returncode == 0
    assert not re.search("error|Traceback|ssw0rd", errors + rest), errors
    first = {one["source"]: one["kind"] for one in lines[:3]}
    assert first == {"gate": "change", "yard": "change", AWAY: "lost"}
    ends = [one for one in lines if one["kind"] == "end"]
    assert sorted((one["source"], one["why"], one["frames"] > 0) for one in ends) == [
        ("gate", "stopped", True),
        (AWAY, "stopped", False),
        ("yard", "stopped", True),
    ]
    assert [json.loads(line) for line in (workspace / "events.jsonl").read_text().splitlines()] == lines


def test_streams_of_params_are_watched_and_each_line_bears_its_name(
    workspace: Path, start: Open, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(workspace)
    streams = [f"north gate={start(Camera())}", f"yard={start(Camera(color=WHITE))}"]
    Path("params.yaml").write_text(json.dumps({"name": "pets", "predict": {"streams": streams}}))
    words = ("predict", "--streams", "--bundle", "bundle", "--frames", "9", "--every", "0.05")
    assert run_here(monkeypatch, *words) == 2
    assert re.match(r"error: north gate: .*loopback address", capsys.readouterr().err)
    monkeypatch.setenv("VISIONLOOP_PRIVATE_HOSTS", "127.0.0.1")
    assert run_here(monkeypatch, *words) == 0
    begin, *lines = capsys.readouterr().out.splitlines()
    assert begin.startswith("watching 2 streams: a frame every 0.05 s, by bundle ")
    assert {line[:12] for line in lines} == {"north gate  ", "yard        "}
    assert sorted(line[:12].strip() for line in lines if "  9 frames in " in line) == ["north gate", "yard"]
    assert any(re.fullmatch(r"yard        \d\d:\d\d:\d\d  c \d+%", line) for line in lines)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((AWAY, f"yard={AWAY}?b"), rf"{AWAY}: .*connection failed.*; yard: .*connection failed.*; expected a video"),
        ((AWAY, AWAY), f"{AWAY}: is named twice; expected each stream once"),
        ((f"a={AWAY}", f"b={AWAY}"), "b: is named twice"),
        ((f"{AWAY}?k=w0rd1", f"{AWAY}?k=w0rd2"), f"{AWAY}: would be the name of two streams.*NAME=ADDRESS for each"),
        (("a/b=rtsp://u:pw0rd@h/1",), r"a/b=rtsp://\*\*\*@h/1: is no stream; expected ADDRESS or NAME=ADDRESS"),
        (("rtsp://h/1", "gate=gopher://u:pw0rd@h/2"), "gate: got gopher://; expected a file, rtsp://"),
        (("rtsp://h/1", "gate=rtsp://u:${NO_SUCH}@h/2"), "gate: the variable NO_SUCH is not set"),
        (("--streams",), "--streams: params.yaml `predict.streams` names none"),
        ((AWAY, "--host", "a b"), r"hosts: got 'a b'; expected HOST, HOST:PORT or \*.DOMAIN in `hosts`"),
        (("a.jpg", "--host", "cdn.example.com"), "--host: is for a stream"),
        (("--streams", "rtsp://h/1"), "--streams: is there, and PATHS too; expected one of them"),
    ],
)
def test_what_cannot_be_watched_is_told_in_one_line(
    words: tuple[str, ...],
    message: str,
    workspace: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(workspace)
    assert run_here(monkeypatch, "predict", *words, "--bundle", "bundle") == 2
    told = capsys.readouterr().err
    assert re.match(f"error: {message}", told), told
    assert told.count("\n") == 1 and "w0rd" not in told
