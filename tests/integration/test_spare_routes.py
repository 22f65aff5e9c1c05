"""/explain and /predict/video: what they answer, what they refuse, and that they are in nobody's way."""

import asyncio
import base64
import io
import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fastapi.testclient import TestClient
from PIL import Image
from starlette.requests import ClientDisconnect

from fakes import make_image
from videos import BLUE, GREEN, RED, Film, write_sound, write_video
from visionloop.explain import explain
from visionloop.predictor import Predictor
from visionloop.serving import video as video_module
from visionloop.serving.access import Access
from visionloop.serving.app import make_app
from visionloop.serving.batcher import Batcher, QueueFull
from visionloop.serving.body import Limits
from visionloop.serving.service import Places
from visionloop.serving.swap import ModelSlot, ServedModel

LIMITS = Limits(max_body_bytes=200_000, max_pixels=100_000, max_video_bytes=300_000, max_video_s=20.0, deadline_s=20.0)


@pytest.fixture(scope="module")
def film(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return write_video(tmp_path_factory.mktemp("film") / "film.mp4", Film((RED, GREEN, BLUE), 2.0)).read_bytes()


@pytest.fixture
def model(bundle_dir: Path) -> ServedModel:
    return ServedModel(Predictor.load(bundle_dir, threads=1), version="7", promoted_at="2026-11-01T10:00:00Z")


@pytest.fixture
def client(model: ServedModel) -> Iterator[TestClient]:
    with TestClient(make_app(ModelSlot(model), LIMITS), raise_server_exceptions=False) as client:
        yield client


def test_an_explanation_equals_that_of_the_command(client: TestClient, model: ServedModel) -> None:
    data = make_image(1)
    answer = client.post("/explain?across=14", content=data).json()
    predictor = model.predictor
    found = explain(predictor, predictor.decode(data, "image"))
    assert (answer["label"], answer["probability"]) == (found.name, pytest.approx(found.probability))
    assert np.array(answer["cells"]) == pytest.approx(found.falls_hw[::3, ::3], abs=1e-5)
    assert answer["num_images"] == 1 + 13 * 13  # 32 px in steps of 3 are 11, and 2 more at the edge
    picture = Image.open(io.BytesIO(base64.b64decode(answer["heat_map"])))
    assert (picture.format, picture.size) == ("PNG", (32, 32))


def test_another_class_can_be_asked_about_and_the_picture_alone_be_had(client: TestClient) -> None:
    data = make_image(1)
    assert client.post("/explain?label=c", content=data).json()["label"] == "c"
    refused = client.post("/explain?label=zebra", content=data)
    assert (refused.status_code, refused.json()["code"]) == (422, "unknown_label")
    picture = client.post("/explain", content=data, headers={"Accept": "image/png"})
    assert picture.headers["content-type"] == "image/png"
    assert Image.open(io.BytesIO(picture.content)).size == (32, 32)


@pytest.mark.parametrize(
    ("send", "status", "code"),
    [
        ({"content": b""}, 400, "empty"),
        ({"content": b"no image at all"}, 415, "not_an_image"),
        ({"content": make_image(1)[:60]}, 422, "damaged"),
        ({"content": b"x" * 200_001}, 413, "body_too_large"),
        ({"files": [("file", make_image(1)), ("file", make_image(2))]}, 400, "bad_request"),
        ({"json": {"images": [base64.b64encode(make_image(1)).decode()]}}, 400, "bad_request"),
        ({"content": make_image(1, size_hw=(400, 400))}, 422, "too_large"),
    ],
)
def test_what_cannot_be_explained_is_refused(client: TestClient, send: dict[str, Any], status: int, code: str) -> None:
    refused = client.post("/explain", **send)
    assert (refused.status_code, refused.json()["code"]) == (status, code)


@pytest.mark.parametrize("as_form", [False, True])
def test_a_video_is_answered_in_segments(client: TestClient, film: bytes, as_form: bool) -> None:
    send: dict[str, Any] = {"files": {"file": ("film.mp4", film)}} if as_form else {"content": film}
    answer = client.post("/predict/video?every_s=0.25", **send).json()
    assert (answer["num_frames"], answer["notes"], answer["duration_s"]) == (24, [], pytest.approx(6.0, abs=0.25))
    edges = [(part["start_s"], part["end_s"]) for part in answer["segments"]]
    assert [end for _, end in edges[:-1]] == [start for start, _ in edges[1:]]
    assert sum(answer["shares"].values()) == pytest.approx(1)
    assert answer["model"]["version"] == "7"
    fine = client.post("/predict/video?every_s=1&smooth_s=0", content=film).json()
    assert fine["num_frames"] == 6


def test_frames_have_the_answers_of_images(client: TestClient, model: ServedModel, film: bytes) -> None:
    red = client.post("/predict/video?every_s=60", content=film).json()
    pixels = np.full((48, 64, 3), RED, np.uint8)
    sink = io.BytesIO()
    Image.fromarray(pixels).save(sink, "PNG")
    [expected] = model.predictor.predict([sink.getvalue()])
    assert red["segments"][0]["prediction"] == expected.prediction
    assert red["segments"][0]["confidence"] == pytest.approx(expected.confidence, abs=0.02)


def test_what_is_no_video_is_refused(client: TestClient, film: bytes, tmp_path: Path) -> None:
    sound = write_sound(tmp_path / "sound.mp4").read_bytes()
    playlist = b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n"
    concat = b"ffconcat version 1.0\nfile '/etc/passwd'\n"
    cases: list[tuple[dict[str, Any], int, str]] = [
        ({"content": b""}, 400, "empty"),
        ({"content": b"no video"}, 415, "not_a_video"),
        ({"content": make_image(1)}, 415, "not_a_video"),
        ({"content": playlist}, 415, "not_a_video"),
        ({"content": concat}, 415, "not_a_video"),
        ({"content": sound}, 415, "no_video"),
        ({"content": film[: len(film) // 2]}, 422, "damaged"),
        ({"content": b"x" * 300_001}, 413, "body_too_large"),
        ({"files": [("file", film), ("file", film)]}, 400, "one_video"),
        ({"files": {"file": ("a.mp4", b"")}}, 400, "empty"),
        ({"content": b"--x\r\n", "headers": {"Content-Type": "multipart/form-data; boundary=x"}}, 400, "bad_form"),
        ({"content": b"x", "headers": {"Content-Type": "multipart/form-data"}}, 400, "bad_form"),
    ]
    for send, status, code in cases:
        refused = client.post("/predict/video", **send)
        assert (refused.status_code, refused.json()["code"]) == (status, code), (send, refused.text)
        assert "/tmp" not in refused.text
    for kind in ("PNG", "JPEG", "WEBP"):
        refused = client.post("/predict/video", content=make_image(1, size_hw=(300, 300), kind=kind))
        assert refused.json()["detail"] == "request: it is an image; expected a video. Send it to /predict."
    refused = client.post("/predict", content=film)
    assert (refused.status_code, refused.json()["code"]) == (415, "not_an_image")
    assert "A server answers it at /predict/video" in refused.json()["detail"]
    assert client.post("/predict/video?every_s=0", content=film).json()["code"] == "bad_option"
    assert client.post("/predict/video", content=film).status_code == 200, "none of them took a place for good"


def test_a_broken_video_breaks_nothing(client: TestClient, film: bytes) -> None:
    rng = np.random.default_rng(0)
    statuses = set()
    for _ in range(4):
        data = bytearray(film)
        for place in rng.integers(100, 1200, 5):
            data[place] = rng.integers(256)
        answer = client.post("/predict/video?every_s=1", content=bytes(data))
        statuses.add(answer.status_code)
        assert answer.status_code in (200, 415, 422), answer.text
    assert 200 in statuses
    assert client.post("/predict", content=make_image(1)).status_code == 200


def test_a_long_video_is_cut_and_says_so(client: TestClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    long = write_video(tmp_path / "long.mp4", Film((RED,) * 24, 1.0, fps=2)).read_bytes()
    answer = client.post("/predict/video?every_s=1", content=long).json()
    assert answer["notes"] == ["is longer than max_video_s (20 s): the rest is not read"]
    assert answer["num_frames"] == 21
    monkeypatch.setattr(video_module, "MAX_FRAMES", 5)
    answer = client.post("/predict/video?every_s=1", content=long).json()
    assert (answer["num_frames"], len(answer["notes"])) == (5, 1)


def test_the_thread_that_reads_a_video_closes_its_pipe(
    model: ServedModel, film: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another thread could close it before it is read: its number may then be that of another client's connection."""
    read, entered, faults = os.read, threading.Event(), []

    def read_late(fd: int, size: int) -> bytes:
        if size < 1 << 20:
            return read(fd, size)  # not the player's
        entered.set()
        time.sleep(0.1)
        try:
            return read(fd, size)
        except OSError as exc:
            faults.append(exc)
            raise

    async def leave() -> None:
        batcher = Batcher()
        batcher.start()
        with ThreadPoolExecutor(1) as threads:
            job = video_module._make_job(str(tmp_path / "film.mp4"), 0.5, LIMITS, model)
            work = asyncio.create_task(video_module._watch(batcher, model, job, threads, video_module._Seen()))
            await asyncio.to_thread(entered.wait, 10)
            work.cancel()
            with pytest.raises(asyncio.CancelledError):
                await work
        await batcher.stop()

    (tmp_path / "film.mp4").write_bytes(film)
    monkeypatch.setattr("visionloop.video.player.os.read", read_late)
    asyncio.run(leave())
    assert faults == []


def test_frames_count_for_the_rate_also_where_there_was_no_answer(
    model: ServedModel, film: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(video_module, "_require_frames", lambda *seen: (_ for _ in ()).throw(ClientDisconnect()))
    access = Access(rate_per_s=1)
    with TestClient(make_app(ModelSlot(model), LIMITS, access), raise_server_exceptions=False) as client:
        assert client.post("/predict/video?every_s=0.25", content=film).status_code == 400
        assert client.post("/predict", content=make_image(1)).json()["code"] == "too_many", "24 frames at one a second"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no device that is always full")
def test_a_full_disk_is_told(client: TestClient, film: bytes, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("tempfile.NamedTemporaryFile", lambda prefix: io.BufferedWriter(io.FileIO("/dev/full", "w")))
    for data in (film[:100], film * 3):  # in the buffer to the end, and not
        refused = client.post("/predict/video", content=data)
        assert (refused.status_code, refused.json()["code"]) == (503, "no_room")
    monkeypatch.undo()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "gone"))
    assert client.post("/predict/video", content=film).json()["code"] == "no_room"


def test_a_server_without_a_reader_says_what_to_install(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    refused = client.post("/predict/video", content=b"x")
    assert (refused.status_code, refused.json()["code"]) == (415, "no_reader")
    assert "extra `ingest`" in refused.json()["detail"]


def test_there_is_an_end_to_how_many_and_how_long(client: TestClient) -> None:
    places = Places(Batcher(), "videos", 1)
    with places.take(), pytest.raises(QueueFull, match="has 1 videos under way; expected at most 1"):
        places.take().__enter__()
    places.take().__enter__()
    late = client.post("/explain", content=make_image(1), headers={"X-Deadline-Ms": "1"})
    assert (late.status_code, late.json()["code"]) == (503, "deadline")
    assert client.post("/explain", content=make_image(1)).status_code == 200


def test_spare_work_waits_until_no_image_does(model: ServedModel) -> None:
    order: list[str] = []
    opened = threading.Event()

    async def run() -> None:
        batcher = Batcher()
        batcher.start()
        predict = model.predictor.run
        model.predictor.run = lambda images: (opened.wait(10), order.append("image"), predict(images))[2]  # type: ignore[method-assign]
        first = asyncio.create_task(batcher.predict(model, [make_image(1)]))
        await asyncio.sleep(0.05)
        spare = [asyncio.create_task(batcher.run_spare(lambda: order.append("spare"), 1)) for _ in range(2)]
        await asyncio.sleep(0.05)
        later = asyncio.create_task(batcher.predict(model, [make_image(2)]))
        await asyncio.sleep(0.05)
        assert order == []
        opened.set()
        await asyncio.gather(first, later, *spare)
        await batcher.stop()
        with pytest.raises(QueueFull, match="stops"):
            await batcher.run_spare(lambda: None, 1)

    asyncio.run(run())
    assert order == ["image", "image", "spare", "spare"], "also before one that came later"


def test_spare_work_that_does_not_finish_is_a_network_that_does_not(model: ServedModel) -> None:
    opened = threading.Event()

    async def run() -> None:
        batcher = Batcher()
        batcher.start()
        spare = asyncio.create_task(batcher.run_spare(lambda: opened.wait(10), 1))
        await asyncio.sleep(0.05)
        image = asyncio.create_task(batcher.predict(model, [make_image(1)]))
        await asyncio.sleep(0.2)
        assert batcher.is_stuck(0.1)
        opened.set()
        await asyncio.gather(spare, image)
        assert not batcher.is_stuck(0.1)
        await batcher.stop()

    asyncio.run(run())
