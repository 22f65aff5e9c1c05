"""A camera, watched by `visionloop predict`: real servers on loopback, the real decoder, and a network of one layer."""

import json
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from fakes import make_bundle, run_here
from http_server import Answer, serve
from mjpeg_camera import LIMIT_S, PATH, Camera, Plan, film, plan, read
from shapes import ROOT
from videos import RED, WHITE, Film, write_video
from visionloop.cli.cameras import Shower, Telling, allow_typed_host, choose_webhook
from visionloop.errors import SourceError
from visionloop.params.loop import Webhook
from visionloop.predict.connection import WatchPlan
from visionloop.predict.files import Sampling
from visionloop.predict.lines import describe_line
from visionloop.predict.live import StreamEnded, Watch
from visionloop.predict.several import Answerer, Followed
from visionloop.predictor import Predictor

NULL_PACKET = bytes([0x47, 0x1F, 0xFF, 0x10]) + bytes(184)  # of MPEG-TS: nothing, so that a line is never idle
SAYS = {RED: "a", WHITE: "c"}  # the network of the bundle with seed 0


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Answerer:
    folder = tmp_path_factory.mktemp("model") / "bundle"
    make_bundle(folder)
    return Answerer(Predictor.load(folder, threads=1))


def test_a_change_is_told_once_when_it_is_sure(network: Answerer) -> None:
    camera = Camera()
    with film(camera) as site:
        watch, told = Watch(plan(f"{site.url}{PATH}"), network), []
        for line in read(watch, lambda line: line["kind"] == "change" and line["before"] == "c"):
            told.append((line["kind"], line.get("prediction"), line.get("before")))
            camera.color = {"a": WHITE, "c": RED}[line["prediction"]]
            assert line["since"] < line["time"]
    assert told == [("change", "a", None), ("change", "c", "a"), ("change", "a", "c")]
    assert watch.num_changes >= 3  # the colour that came last may have been seen too
    assert watch.seconds["a"] > 0 and watch.seconds["c"] > 0


def test_frames_that_the_network_is_too_slow_for_are_passed_over_and_the_newest_is_answered(
    network: Answerer, monkeypatch: pytest.MonkeyPatch
) -> None:
    quick = network.answer

    def be_slow(jpeg: bytes) -> Any:
        before, deadline = watch.num_passed_over, time.monotonic() + LIMIT_S
        while watch.num_passed_over < before + 8 and time.monotonic() < deadline:
            time.sleep(0.01)
        return quick(jpeg)

    monkeypatch.setattr(network, "answer", be_slow)
    with film(Camera()) as site:
        watch = Watch(plan(f"{site.url}{PATH}", frames=2, each_frame=True), network)
        lines = [*(one for one in watch.run(watch.connect()) if one), *watch.end()]
    first, second = [datetime.fromisoformat(one["at"]) for one in lines if one["kind"] == "frame"]
    assert (second - first).total_seconds() >= 8 * 0.05 - 0.01, "the newest, behind eight that were passed over"
    end = lines[-1]
    assert (end["kind"], end["why"], end["frames"]) == ("end", "limit", 2)
    assert end["passed_over"] >= 16


@pytest.mark.parametrize(
    ("then", "reason"), [("end", "has ended"), ("hang", "no frame for"), ("noise", "damaged|ended|cannot be read")]
)
def test_a_stream_that_breaks_off_is_connected_to_again(then: str, reason: str, network: Answerer) -> None:
    with film(Camera([Plan(20, then), Plan()])) as site:
        stall_s = 1.0 if then == "hang" else LIMIT_S
        watch = Watch(plan(f"{site.url}{PATH}", stall_s=stall_s), network)
        lines = list(read(watch, lambda line: line["kind"] == "back"))
    kinds = [line["kind"] for line in lines]
    assert kinds == ["change", "lost", "back"]
    assert re.search(reason, lines[1]["why"]), lines[1]["why"]
    assert lines[2]["after_s"] > 0


def test_what_is_the_same_after_a_gap_is_no_change(network: Answerer) -> None:
    camera = Camera([Plan(20), Plan()])
    with film(camera) as site:
        watch = Watch(plan(f"{site.url}{PATH}"), network)
        told = []
        for line in read(watch, lambda line: line["kind"] == "change" and line["prediction"] == "c"):
            told.append(line["kind"])
            if line["kind"] == "back":
                threading.Timer(0.5, lambda: setattr(camera, "color", WHITE)).start()
    assert told == ["change", "lost", "back", "change"]


@pytest.mark.parametrize("then", ["end", "noise"])
def test_a_camera_without_a_frame_is_an_error_at_once(then: str, network: Answerer) -> None:
    with film(Camera([Plan(0, then)])) as site:
        watch = Watch(plan(f"{site.url}{PATH}"), network)
        with pytest.raises(StreamEnded, match=rf"^{site.url}/live: (has no frame|gives no video|.*ended)") as caught:
            list(read(watch, lambda line: False))
    assert (caught.value.exit_code, caught.value.transient) == (2, True)


def test_no_secret_is_told(network: Answerer) -> None:
    camera = Camera([Plan(20), Plan()], login="Basic YWRtaW46cEBzc3cwcmQ=")
    with film(camera) as site:
        env = {**allow_typed_host(f"{site.url}", {}), "CAM": "p@ssw0rd"}
        path = f"http://admin:${{CAM}}@{site.host}{PATH}?token=t0ken"
        watch = Watch(WatchPlan(path, env, Sampling(0.05, 0.2), seconds=LIMIT_S, wait_s=0.05), network)
        lines = [*read(watch, lambda line: line["kind"] == "back"), *watch.end()]
        text = json.dumps(lines) + "".join(map(describe_line, lines))
        for wrong in (f"http://admin:wr0ngpw@{site.host}{PATH}", f"http://admin:wr0ng/pw@{site.host}{PATH}"):
            with pytest.raises(SourceError) as caught:
                Watch(plan(wrong), network).connect()
            text += str(caught.value)
    assert {line["source"] for line in lines} == {f"http://***@{site.host}{PATH}"}
    for secret in ("p@ssw0rd", "p%40ssw0rd", "t0ken", "wr0ng", "admin"):
        assert secret not in text


def test_a_stream_that_changes_its_size_and_one_of_4k_are_answered(tmp_path: Path, network: Answerer) -> None:
    sizes, parts = [(48, 64), (2160, 3840), (120, 160)], []
    for number, size_hw in enumerate(sizes):
        clip = Film(
            [(RED, WHITE, RED)[number]],
            0.6 if number else 2.0,
            fps=10,
            size_hw=size_hw,
            codec="mpeg2video",
            options={"g": "1"},
        )
        parts.append(write_video(tmp_path / f"{number}.ts", clip, output_ts_offset=str(4 * number)).read_bytes())

    def send(handler: Any) -> None:
        handler.send_response(200)
        handler.end_headers()
        for part, wanted in zip(parts, "aca", strict=True):
            handler.wfile.write(part)
            deadline = time.monotonic() + LIMIT_S
            while (watch.last is None or watch.last.prediction != wanted) and time.monotonic() < deadline:
                handler.wfile.write(NULL_PACKET)  # as a camera does, it goes on: who sends nothing for 15 s is lost
                time.sleep(0.01)

    with serve({"/ts": send}) as site:
        # Each frame is looked at: the few of a part may come closer together than a camera's, and none after them.
        watch = Watch(plan(f"{site.url}/ts", sampling=Sampling(1e-4, 0.0)), network)
        lines = list(read(watch, lambda line: line["kind"] == "lost" or line.get("before") == "c"))
    assert [one.get("prediction") for one in lines] == ["a", "c", "a"], lines


def test_a_file_on_a_server_is_no_stream(tmp_path: Path, network: Answerer) -> None:
    body = write_video(tmp_path / "a.mp4").read_bytes()
    with serve({"/a.mp4": Answer(body)}) as site:
        stream = Watch(plan(f"{site.url}/a.mp4"), network).connect()
        assert stream.file is not None
        assert stream.file.download(tmp_path / "b.mp4").read_bytes() == body


def test_metadata_addresses_are_refused_also_when_they_are_typed(network: Answerer) -> None:
    with pytest.raises(SourceError, match="metadata address"):
        Watch(plan("http://169.254.169.254/latest"), network).connect()


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    (tmp_path / "params.yaml").write_text("name: pets\n")
    make_bundle(tmp_path / "bundle")
    return tmp_path


def start(workspace: Path, *words: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-m", "visionloop", "predict", *words, "--bundle", "bundle"],
        cwd=workspace,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize(("number", "why"), [(signal.SIGINT, "stopped"), (signal.SIGTERM, "terminated")])
def test_a_signal_ends_it_with_a_summary_and_the_events_are_at_the_webhook(
    number: signal.Signals, why: str, workspace: Path
) -> None:
    with film(Camera()) as site, serve({"/hook": Answer(status=204)}) as hook:
        wishes = ("--out", "events.jsonl", "--webhook", f"{hook.url}/hook", "--every", "0.1", "--smooth", "0.2")
        process = start(workspace, f"{site.url}{PATH}", "--json", *wishes)
        assert process.stdout
        first = json.loads(process.stdout.readline())
        process.send_signal(number)
        rest, errors = process.communicate(timeout=LIMIT_S)
    lines = [first, *map(json.loads, rest.splitlines())]
    assert process.returncode == 0
    assert not re.search("webhook|error|Traceback", errors), errors  # a library may warn of the machine
    assert [(one["kind"], one.get("why")) for one in lines] == [("change", None), ("end", why)]
    assert [json.loads(line) for line in (workspace / "events.jsonl").read_text().splitlines()] == lines
    (sent,) = [json.loads(request.body) for request in hook.requests]
    assert (sent["event"], sent["name"], sent["prediction"]) == ("visionloop.predict.change", "pets", "a")
    assert not list((workspace / ".visionloop/predict/webhook").glob("*/*.json"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("a.png", "--seconds", "3"), "--seconds: is for a stream; expected rtsp://"),
        (
            ("rtsp://u:pw0rd@h/1", "a.png"),
            "rtsp://\\*\\*\\*@h/1: is a stream, and a path beside it is none; expected streams alone, or files alone",
        ),
        (("rtsp://h/1", "--sheet", "a.png"), "--sheet: is for files; expected --out FILE.jsonl, --json or --webhook"),
        (("rtsp://h/1", "--out", "a.csv"), "--out: got 'a.csv'; expected a file that ends in .jsonl"),
        (("rtsp://h/1", "--webhook", "ftp://x"), "--webhook: got 'ftp://x'; expected a URL, http:// or https://"),
        (("rtsp://h/1", "--webhook", "ftp://u:w0rd@x"), "--webhook: got 'ftp://\\*\\*\\*@x'; expected a URL"),
        (("rtsp://u:p\nw0rd@h/1", "--sheet", "a.png"), "--sheet: is for files"),
        (("rtsp://u:p\nw0rd@h/1", "a.png"), "rtsp://\\*\\*\\*@h/1: is a stream"),
        (("rtsp:/u:w0rd@h/1",), "rtsp:\\*\\*\\*@h/1: does not exist"),
        (("rtsp://h/1", "--webhook", "https://"), "--webhook: got 'https://'; expected a URL, http:// or https://"),
        (("film.mp4", "--sheet", "a.png"), "--sheet: is for images, and there are only videos; expected an image"),
        (("rtsp://u:p/w0rd@h/1",), "rtsp://\\*\\*\\*@h/1: has an @ behind a / \\? or #"),
        (("gopher://h/1",), "gopher://h/1: got gopher://"),
    ],
)
def test_what_does_not_fit_is_told_in_one_line(
    words: tuple[str, ...],
    message: str,
    workspace: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(workspace)
    Path("film.mp4").write_bytes(b"")
    assert run_here(monkeypatch, "predict", *words, "--bundle", "bundle") == 2
    told = capsys.readouterr().err
    assert re.match(f"error: {message}", told), told
    assert "w0rd" not in told


def test_a_film_on_a_server_is_answered_also_in_the_file(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(workspace)
    Path("lines.jsonl").write_text("{}\n")
    with serve({"/a.mp4": Answer(write_video(workspace / "a.mp4").read_bytes())}) as site:
        address = f"{site.url}/a.mp4"
        assert run_here(monkeypatch, "predict", address, "--bundle", "bundle", "--out", "lines.jsonl", "--json") == 0
    (shown,) = json.loads(capsys.readouterr().out)["answers"]
    before, line = map(json.loads, Path("lines.jsonl").read_text().splitlines())
    bundle = line.pop("bundle")
    assert (before, line, len(bundle), line["path"]) == ({}, shown, 64, address)


def test_a_webhook_that_is_away_is_told_while_it_goes_on(network: Answerer, capsys: pytest.CaptureFixture[str]) -> None:
    gate, yard = (Followed(Watch(WatchPlan("/dev/video0", {}, name=one), network), "pets") for one in ("gate", "yard"))
    for streams, name in (([gate], ""), ([gate, yard], "gate: ")):
        show = Shower(Telling(as_json=True), None, streams)
        for problem in ("", "answers 404", "answers 404", "", "answers 404", "answers 503"):
            show.warn(gate, problem)
        told = capsys.readouterr()
        assert (told.out, told.err.splitlines()) == ("", [f"note: {name}answers {code}" for code in (404, 404, 503)])


def test_headers_of_a_webhook_go_to_its_own_address_alone() -> None:
    section = Webhook(url="https://a.example/hook", headers={"Authorization": "Bearer ${TOKEN}"})
    assert choose_webhook(None, section) == choose_webhook(section.url, section) == section
    assert choose_webhook("https://b.example/hook", section) == Webhook(url="https://b.example/hook")
    assert choose_webhook("https://b.example/hook", None) == Webhook(url="https://b.example/hook")
    assert choose_webhook(None, None) is None


def test_a_host_that_is_slow_to_refuse_is_asked_less_and_less_often(
    network: Answerer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A connection that gave no frame was none, however long it took."""
    monkeypatch.setattr("visionloop.predict.live.STEADY_S", 0.0)
    waits = list[float]()

    def note(watch: Watch, wait_s: float) -> Iterator[None]:
        waits.append(wait_s)
        if len(waits) == 4:
            watch.stop("stopped")
        yield None

    monkeypatch.setattr(Watch, "_pause", note)
    with film(Camera([Plan(20), Plan(0)])) as site:
        watch = Watch(plan(f"{site.url}{PATH}"), network)
        list(read(watch, lambda line: False))
    assert waits == [0.05, 0.1, 0.2, 0.4]


HAS_GST = (
    "import gi; gi.require_version('Gst', '1.0'); gi.require_version('GstRtspServer', '1.0');"
    "from gi.repository import Gst, GstRtspServer; Gst.init(None);"
    "exit(not all(Gst.ElementFactory.find(x) for x in ('x264enc', 'rtph264pay', 'videotestsrc')))"
)


@pytest.fixture
def rtsp_camera() -> "Iterator[subprocess.Popen[str]]":
    system = Path("/usr/bin/python3")
    asked = [system, "-c", HAS_GST]
    if not system.is_file() or subprocess.run(asked, check=False, capture_output=True, timeout=120).returncode:
        pytest.skip("no RTSP server of GStreamer here: gir1.2-gst-rtsp-server-1.0, gstreamer1.0-plugins-ugly")
    script = ROOT / "tests" / "support" / "gst_camera.py"
    with subprocess.Popen(
        [system, script, "admin:p@ss/w0rd"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        yield process
        process.kill()


def test_a_real_rtsp_camera_with_h264(rtsp_camera: "subprocess.Popen[str]", network: Answerer) -> None:
    assert rtsp_camera.stdin and rtsp_camera.stdout
    address = f"127.0.0.1:{int(rtsp_camera.stdout.readline())}/cam"
    env = {**allow_typed_host(f"rtsp://{address}", {}), "CAM": "p@ss/w0rd"}
    sampling = Sampling(0.2, 0.5)
    watch = Watch(WatchPlan(f"rtsp://admin:${{CAM}}@{address}", env, sampling, seconds=LIMIT_S), network)
    told = []
    for line in read(watch, lambda line: line["kind"] == "change" and line["prediction"] == "c"):
        told += [line["prediction"]] if line["kind"] == "change" else []
        rtsp_camera.stdin.write("0xfffafafa\n")
        rtsp_camera.stdin.flush()
    assert told == ["a", "c"]
    wrong = Watch(WatchPlan(f"rtsp://admin:wr0ngpw@{address}", env, sampling), network)
    with pytest.raises(StreamEnded, match="401 Unauthorized") as caught:
        list(read(wrong, lambda line: False))
    assert "wr0ng" not in str(caught.value)
