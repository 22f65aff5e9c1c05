"""What is done less of for cameras: pictures that come too early, and pixels that no network needs."""

import io
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from videos import RED, WHITE, Film, write_video
from visionloop.data.images import load_array
from visionloop.video.decode import decode
from visionloop.video.sample import DecodeJob, Sampler


def test_no_frame_that_is_taken_was_not_due() -> None:
    tenths = [i / 10 for i in range(60)]
    for spans in ([(0.0, None)], [(0.3, 0.9), (0.6, 2.0), (3.0, None)]):
        sampler = Sampler(spans, 0.25, None)
        due = {t: sampler.is_due(t) == sampler.take(t) for t in tenths}
        assert all(due.values()), due
    assert Sampler([(0.0, None)], 9.0, 0.1).is_due(1.0)


@pytest.mark.parametrize(("size_hw", "resize"), [((48, 48), "squash"), ((48, 64), "fit_crop"), ((64, 48), "letterbox")])
def test_a_frame_of_a_camera_is_as_large_as_the_network_needs_and_gives_the_same_array(
    size_hw: tuple[int, int], resize: str, tmp_path: Path
) -> None:
    noise = np.asarray(
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (27, 36, 3), np.uint8)).resize((640, 480))
    )
    path = write_video(tmp_path / "a.mkv", Film(frames=[noise], codec="mjpeg", pix_fmt="yuvj444p"))
    jpegs = [
        data
        for enough_px in (None, max(size_hw), 700)
        for message, data in decode(
            DecodeJob(1.0, None, [(0.0, None)], 9, 9.0, 10**7, file=str(path), enough_px=enough_px)
        )
        if message["kind"] == "frame"
    ]
    assert [Image.open(io.BytesIO(jpeg)).size for jpeg in jpegs] == [
        (640, 480),
        (160, 120) if 64 in size_hw else (80, 60),
        (640, 480),
    ]
    whole, enough, _ = (load_array(jpeg, "x", size_hw=size_hw, resize=resize).astype(int) for jpeg in jpegs)
    assert np.abs(whole - enough).mean() < 2


def test_pictures_of_a_camera_that_come_too_early_are_not_decoded(tmp_path: Path) -> None:
    """Those between two that are due may be what they like: they are never looked at."""
    parts = write_video(tmp_path / "a.mjpeg", Film(codec="mjpeg", pix_fmt="yuvj420p"), format="mpjpeg").read_bytes()
    parts = parts[: -len(b"--ffmpeg\r\n")]
    head, body = parts[: parts.index(b"\xff\xd8")], parts[parts.index(b"\xff\xd8") : parts.index(b"--ffmpeg", 10)]
    broken = head + body[:20] + bytes(len(body) - 22) + b"\r\n"
    (tmp_path / "live").write_bytes(parts + broken * 200)

    def read(every_s: float) -> tuple[int, str | None]:
        with (tmp_path / "live").open("rb") as file:
            job = DecodeJob(every_s, None, [(0.0, None)], 999, 9.0, 10**7, pipe=os.dup(file.fileno()), by_arrival=True)
            *frames, end = [message for message, _ in decode(job) if message["kind"] in ("frame", "end")]
        return len(frames), end["code"]

    assert read(1000.0) == (1, None)
    assert read(1e-9)[1] == "damaged"


def test_a_camera_that_begins_anew_is_seen_again_after_what_was_lost_at_the_joint(tmp_path: Path) -> None:
    """Its clock jumps back, and a part of a frame is missing there."""
    film = Film([RED, WHITE], 3.0, codec="libx264", options={"g": "5", "tune": "zerolatency"})
    once = write_video(tmp_path / "a.ts", film).read_bytes()
    (tmp_path / "live").write_bytes(once[: -188 * 2] + once[: -188 * 2] + once)
    with (tmp_path / "live").open("rb") as file:
        job = DecodeJob(0.01, None, [(0.0, None)], 999, 99.0, 10**7, pipe=os.dup(file.fileno()))
        frames = [message for message, _ in decode(job) if message["kind"] == "frame"]
    assert len(frames) > 150, "of 180"
