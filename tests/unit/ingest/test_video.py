"""Which frames of a video are taken, how they become upright RGB, and what a table of segments means."""

import io
import itertools
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from videos import BLACK, BLUE, GREEN, RED, WHITE, Film, write_slow, write_sound, write_video
from visionloop.errors import ImageError, SourceError
from visionloop.ingest.item import SourceContext
from visionloop.ingest.sources.video import parse_seconds, read_segments
from visionloop.ingest.video.cameras import is_camera
from visionloop.ingest.video.clip import Spool
from visionloop.params import VideoSource
from visionloop.video.decode import decode, turn_upright
from visionloop.video.sample import DecodeJob, FrameClock, Sampler, compute_difference


def ask(path: Path, **wishes: Any) -> DecodeJob:
    defaults = {"every_s": 1.0, "scene": None, "spans": [(0.0, None)], "max_frames": 100, "max_s": 3600.0}
    return DecodeJob(**{**defaults, "max_pixels": 1_000_000, "file": str(path), **wishes})


def play(path: Path, **wishes: Any) -> tuple[dict[int, bytes], dict[str, Any]]:
    """Frames by their time in ms, and how it ended."""
    messages = list(decode(ask(path, **wishes)))
    return {m["t_ms"]: data for m, data in messages if m["kind"] == "frame"}, messages[-1][0]


def middle(jpeg: bytes) -> tuple[int, ...]:
    pixels = np.asarray(Image.open(io.BytesIO(jpeg)).convert("RGB"))
    return tuple(int(v) for v in pixels[pixels.shape[0] // 2, pixels.shape[1] // 2])


def assert_near(found: tuple[int, ...], expected: tuple[int, ...], slack: int = 14) -> None:
    assert max(abs(a - b) for a, b in zip(found, expected, strict=True)) <= slack, (found, expected)


# What time a frame has


def test_the_clock_starts_at_the_start_of_the_file_and_only_goes_forward() -> None:
    clock = FrameClock(100.0, 0.5)
    assert [clock.read(t) for t in (99.9, 100.5, None, 101.5, 3.0, 3.5)] == pytest.approx([0, 0.5, 1.0, 1.5, 2.0, 2.5])


def test_the_clock_without_any_stamp_counts_frames() -> None:
    clock = FrameClock(None, 0.25)
    assert [clock.read(None) for _ in range(4)] == pytest.approx([0, 0.25, 0.5, 0.75])


@pytest.mark.parametrize("step", [None, 0.0, 1e9])
def test_a_nonsense_frame_rate_is_not_believed(step: float | None) -> None:
    clock = FrameClock(None, step)
    clock.read(None)
    assert 0 < clock.read(None) <= 10


# Which frames are taken


def take(sampler: Sampler, times: list[float]) -> list[float]:
    return [t for t in times if sampler.take(t)]


TENTHS = [i / 10 for i in range(60)]


def test_a_frame_every_so_often_counts_from_the_first() -> None:
    assert take(Sampler([(0.0, None)], 1.0, None), TENTHS) == [0, 1, 2, 3, 4, 5]
    assert take(Sampler([(0.0, None)], 0.25, None), TENTHS[:8]) == [0, 0.3, 0.5]
    assert take(Sampler([(0.0, None)], 1.0, None), [t + 0.04 for t in TENTHS[:25]]) == [0.04, 1.04, 2.04]


def test_times_that_are_fractions_of_odd_bases_are_not_missed() -> None:
    ntsc = [i * 1001 / 30000 for i in range(120)]
    assert len(take(Sampler([(0.0, None)], 1001 / 1000, None), ntsc)) == 4


def test_a_gap_in_the_recording_is_not_made_up_for() -> None:
    assert take(Sampler([(0.0, None)], 1.0, None), [0.0, 0.9, 7.3, 7.4, 8.0, 8.1]) == [0.0, 7.3, 8.0]


def test_the_first_frame_of_each_segment_is_taken() -> None:
    spans = [(0.5, 0.7), (2.0, 4.0), (3.5, None)]
    assert take(Sampler(spans, 1.0, None), TENTHS) == [0.5, 2.0, 3.0, 3.5, 4.5, 5.5]


def test_frames_of_one_millisecond_are_one() -> None:
    assert take(Sampler([(0.0, None)], 1e-9, None), [0.0, 0.0001, 0.0002, 0.001]) == [0.0, 0.001]


def test_scene_takes_what_differs_from_the_frame_taken_before() -> None:
    sampler = Sampler([(0.0, None)], 1.0, 0.1)
    greys = [np.full((4, 4), v, np.uint8) for v in (10, 10, 30, 60, 60, 200)]
    assert [sampler.take(i, grey) for i, grey in enumerate(greys)] == [True, False, False, True, False, True]
    assert compute_difference(greys[0], greys[5]) == pytest.approx(190 / 255)


# From a file to JPEG


@pytest.mark.parametrize(
    ("name", "codec"),
    [("a.mp4", "libx264"), ("a.mkv", "mpeg4"), ("a.avi", "mjpeg"), ("a.ts", "mpeg2video"), ("a.webm", "libvpx")],
)
def test_every_container_gives_its_frames(name: str, codec: str, tmp_path: Path) -> None:
    pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
    frames, end = play(write_video(tmp_path / name, Film(codec=codec, pix_fmt=pix_fmt, fps=25)))
    assert (end["code"], list(frames)) == (None, [0, 1000, 2000])
    for jpeg, color in zip(frames.values(), (RED, GREEN, BLUE), strict=True):
        assert_near(middle(jpeg), color)


def test_the_same_video_gives_the_same_bytes(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    film = Film(frames=[rng.integers(0, 256, (48, 64, 3), dtype=np.uint8) for _ in range(20)], codec="libx264")
    path = write_video(tmp_path / "a.mp4", film)
    first, second = play(path, every_s=0.3)[0], play(path, every_s=0.6)[0]
    assert len(first) == 7
    assert {t: first[t] for t in second} == second  # also: which frames are wished for does not change them


@pytest.mark.parametrize(
    ("size_hw", "codec", "pix_fmt"),
    [
        ((48, 64), "libx264", "yuv444p"),
        ((48, 64), "libx265", "yuv420p10le"),
        ((48, 64), "ffv1", "gray"),
        ((48, 64), "ffv1", "yuv422p10le"),
        ((47, 63), "ffv1", "yuv444p"),
        ((720, 1280), "mpeg4", "yuv420p"),
    ],
)
def test_any_pixel_format_becomes_rgb(size_hw: tuple[int, int], codec: str, pix_fmt: str, tmp_path: Path) -> None:
    options = {"x265-params": "log-level=none:bframes=0", "preset": "ultrafast"} if codec == "libx265" else {}
    film = Film([RED], 0.1, size_hw=size_hw, codec=codec, pix_fmt=pix_fmt, options=options)
    frames, end = play(write_video(tmp_path / "a.mkv", film))
    assert end["code"] is None
    assert Image.open(io.BytesIO(frames[0])).size == size_hw[::-1]
    assert_near(middle(frames[0]), (93, 93, 93) if pix_fmt == "gray" else RED, 40 if size_hw[0] == 720 else 14)


def test_alpha_is_laid_on_white(tmp_path: Path) -> None:
    picture = np.zeros((48, 64, 4), np.uint8)
    picture[:, 32:] = (*RED, 255)
    frames, _ = play(write_video(tmp_path / "a.mkv", Film(frames=[picture] * 3, codec="ffv1", pix_fmt="bgra")))
    pixels = np.asarray(Image.open(io.BytesIO(frames[0])))
    assert_near(tuple(pixels[24, 8]), (255, 255, 255))
    assert_near(tuple(pixels[24, 56]), RED)


@pytest.mark.parametrize(("rotation", "corner"), [(0, "tl"), (90, "bl"), (180, "br"), (-90, "tr")])
def test_a_phone_held_upright_gives_upright_frames(rotation: int, corner: str, tmp_path: Path) -> None:
    picture = np.full((48, 80, 3), BLACK, np.uint8)
    picture[:20, :20] = WHITE  # the corner at the top left of what is coded
    frames, _ = play(write_video(tmp_path / "a.mp4", Film(frames=[picture] * 5), rotation=rotation))
    pixels = np.asarray(Image.open(io.BytesIO(frames[0])).convert("L")).astype(int)
    assert pixels.shape == ((48, 80) if rotation in (0, 180) else (80, 48))
    corners = {"tl": pixels[8, 8], "tr": pixels[8, -8], "bl": pixels[-8, 8], "br": pixels[-8, -8]}
    assert max(corners, key=lambda name: corners[name]) == corner
    assert sorted(corners.values())[2] < 80


def test_all_eight_ways_to_hold_a_camera() -> None:
    picture = np.arange(6, dtype=np.uint8).reshape(2, 3, 1)
    matrices = [*itertools.product((1, -1), (0,), (0,), (1, -1)), *((0, b, c, 0) for b in (1, -1) for c in (1, -1))]
    turned = {turn_upright(picture, m).tobytes() + bytes(turn_upright(picture, m).shape) for m in matrices}
    assert len(turned) == 8
    assert np.array_equal(turn_upright(picture, (0, 1, -1, 0)), np.rot90(picture, -1))  # x' = -y, y' = x: clockwise


def test_wide_pixels_are_made_square(tmp_path: Path) -> None:
    film = Film([RED], 0.5, codec="libx264", options={"x264-params": "sar=2/1"})
    frames, _ = play(write_video(tmp_path / "a.mp4", film))
    assert Image.open(io.BytesIO(frames[0])).size == (128, 48)


def test_two_interlaced_moments_are_not_mixed(tmp_path: Path) -> None:
    picture = np.full((48, 64, 3), BLACK, np.uint8)
    picture[1::2, 30:40] = WHITE  # the second moment, between the lines of the first
    options = {"x264-params": "tff=1:crf=1", "flags": "+ilme+ildct"}
    film = Film(frames=[picture] * 4, codec="libx264", pix_fmt="yuv444p", options=options)
    frames, _ = play(write_video(tmp_path / "a.mp4", film))
    assert np.asarray(Image.open(io.BytesIO(frames[0])).convert("L"))[4:-4].max() < 90


def test_frames_of_varying_length_have_their_own_times(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mkv", Film(seconds=0.2), pts=[0, 3, 11, 12, 40, 41])
    assert list(play(path)[0]) == [0, 1100, 4000]


def test_a_transport_stream_that_starts_late_starts_at_zero(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.ts", Film(codec="mpeg2video", fps=25), output_ts_offset="5000")
    assert list(play(path)[0]) == [0, 1000, 2000]


def test_the_time_of_the_recording_is_the_containers(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", created="2026-05-01T10:00:00+02:00")
    unset = write_video(tmp_path / "b.mkv", created="1980-01-01T00:00:00Z")
    assert next(decode(ask(path)))[0] == {"kind": "start", "created": "2026-05-01T08:00:00+00:00"}
    assert next(decode(ask(unset)))[0] == {"kind": "start", "created": None}


def test_scene_finds_the_cuts(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", Film([RED, WHITE, WHITE, BLACK], 0.7))
    assert list(play(path, scene=0.2)[0]) == [0, 700, 2100]


def test_limits_are_told(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4")
    frames, end = play(path, max_frames=2)
    assert (list(frames), end["told"]) == ([0, 1000], ["has more than max_frames (2): the rest is not read"])
    frames, end = play(path, max_s=1.5)
    assert (list(frames), end["told"]) == ([0, 1000], ["is longer than max_video_s (1.5 s): the rest is not read"])


def test_frames_before_the_damage_are_used(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mkv", Film(seconds=3.0, codec="libx264", options={"g": "10"}))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    frames, end = play(path)
    assert list(frames)[:3] == [0, 1000, 2000]
    assert len(frames) < 9
    assert (end["code"], end["text"].startswith("ends at")) == ("damaged", True)


def test_damage_in_the_middle_leaves_both_ends(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    film = Film(
        frames=[rng.integers(0, 256, (48, 64, 3), dtype=np.uint8) for _ in range(40)], codec="mjpeg", pix_fmt="yuvj420p"
    )
    data = bytearray(write_video(tmp_path / "a.avi", film).read_bytes())
    data[len(data) // 2 - 8000 : len(data) // 2 - 2000] = bytes(6000)
    (tmp_path / "a.avi").write_bytes(data)
    frames, end = play(tmp_path / "a.avi", every_s=0.1)
    assert end["code"] == "damaged"
    assert "packets were lost" in end["text"]
    assert {0, 500, 2900} <= set(frames)
    assert len(frames) < 40


@pytest.mark.parametrize("place", [0.3, 0.5, 0.7])
def test_what_is_drawn_on_top_of_damage_is_not_used(place: float, tmp_path: Path) -> None:
    tiles = np.random.default_rng(0).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    moving = np.kron(tiles, np.ones((8, 8, 1), np.uint8))
    film = Film(
        frames=[np.roll(moving, 3 * i, axis=1) for i in range(60)],
        fps=25,
        codec="libx264",
        options={"g": "15", "preset": "ultrafast"},
    )
    path = write_video(tmp_path / "a.ts", film)
    whole, _ = play(path, every_s=0.01)
    data = path.read_bytes()
    at = int(len(data) // 188 * place) * 188
    path.write_bytes(data[:at] + data[at + 4 * 188 :])  # what a bad line loses of a broadcast
    frames, end = play(path, every_s=0.01)
    assert (len(whole), end["code"]) == (60, "damaged")
    assert 25 < len(frames) < 58
    assert max(frames) > 2000
    assert [t for t, jpeg in frames.items() if whole[t] != jpeg] == []


def test_a_sound_is_no_video(tmp_path: Path) -> None:
    assert play(write_sound(tmp_path / "a.mp4"))[1]["code"] == "no_video"


# A table of segments


def read_table(
    tmp_path: Path, text: str, videos: list[str], **keys: Any
) -> tuple[dict[str, Any], list[Any], list[str]]:
    (tmp_path / "t.csv").write_text(text)
    source = VideoSource(kind="video", path="v", name="cam", table="t.csv", **keys)
    told: list[str] = []
    context = SourceContext(tmp_path, tmp_path / ".visionloop", {}, tell=told.append)
    found = read_segments(tmp_path / "t.csv", source, context, "source cam", videos)
    return found.segments, found.rejected, told


def test_a_table_labels_parts_of_videos(tmp_path: Path) -> None:
    text = "video,label,start,end\na.mp4,cat,0,1.5\nb.mp4,dog,,\na.mp4,dog,1:00,1:02:03.5\n"
    segments, rejected, _ = read_table(tmp_path, text, ["x/a.mp4", "b.mp4"])
    assert {name: [(s.start, s.end, s.labels) for s in parts] for name, parts in segments.items()} == {
        "x/a.mp4": [(0.0, 1.5, ("cat",)), (60.0, 3723.5, ("dog",))],
        "b.mp4": [(0.0, None, ("dog",))],
    }
    assert rejected == []


@pytest.mark.parametrize(
    ("row", "code"),
    [
        ("missing.mp4,cat,0,1", "row_without_image"),
        (",cat,0,1", "row_without_image"),
        ("../../etc/passwd,cat,0,1", "unsafe_path"),
        ("/etc/passwd,cat,0,1", "unsafe_path"),
        ("a.mp4,cat,soon,1", "bad_row"),
        ("a.mp4,cat,-1,1", "bad_row"),
        ("a.mp4,cat,nan,1", "bad_row"),
        ("a.mp4,cat,3,3", "bad_row"),
        ("a,cat,0,1", "ambiguous"),
    ],
)
def test_a_row_that_cannot_be_used_does_not_stop_the_table(row: str, code: str, tmp_path: Path) -> None:
    text = f"video,label,start,end\nb.mp4,cat,0,1\n{row}\nb.mp4,dog,1,2\n"
    segments, rejected, _ = read_table(tmp_path, text, ["a.mp4", "a.avi", "b.mp4"])
    assert [(r.code, r.origin) for r in rejected] == [(code, "cam:t.csv row 2")]
    assert [s.labels for s in segments["b.mp4"]] == [("cat",), ("dog",)]


@pytest.mark.parametrize(("text", "seconds"), [("", None), ("1.5", 1.5), ("01:02", 62.0), ("1:00:00.25", 3600.25)])
def test_seconds_are_numbers_or_clock_times(text: str, seconds: float | None) -> None:
    assert parse_seconds(text) == seconds


@pytest.mark.parametrize("text", ["inf", "1e300", "1:2:3:4", "12s"])
def test_other_times_are_refused(text: str) -> None:
    with pytest.raises(ImageError, match="seconds like"):
        parse_seconds(text)


def test_a_table_that_is_missing_is_an_error(tmp_path: Path) -> None:
    source = VideoSource(kind="video", path="v", table="no.csv")
    context = SourceContext(tmp_path, tmp_path, {})
    with pytest.raises(SourceError, match=r"table no\.csv: does not exist; expected a \.csv"):
        read_segments(tmp_path / "no.csv", source, context, "source cam", [])


# Small parts


def test_the_spool_holds_so_many_bytes_and_forgets_what_was_read(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "spool", max_bytes=10)
    first = spool.put(b"123456")
    assert first is not None
    assert spool.put(b"12345") is None
    assert spool.take(first) == b"123456"
    assert not first.exists()
    assert spool.put(b"1234567890") is not None


def test_the_spool_of_a_dead_process_is_swept(tmp_path: Path) -> None:
    dead, alive = tmp_path / "999999999", tmp_path / "1"
    for folder in (dead, alive):
        folder.mkdir()
        (folder / "1.jpg").write_bytes(b"x")
    Spool(tmp_path)
    assert (dead.exists(), alive.exists()) == (False, True)


@pytest.mark.parametrize(
    ("path", "camera"),
    [("rtsp://c/1", True), ("https://c/1.mp4", True), ("/dev/video0", True), ("${CAMERA}", True), ("clips", False)],
)
def test_cameras_are_told_from_files(path: str, camera: bool) -> None:
    assert is_camera(path) is camera


# Where a film ends


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "avi", "mov"])
@pytest.mark.parametrize(("rate", "number"), [(Fraction(1, 5), 4), (Fraction(1, 60), 3), (Fraction(1, 5), 1)])
def test_the_last_frame_of_a_slow_film_is_shown_to_its_end(
    tmp_path: Path, suffix: str, rate: Fraction, number: int
) -> None:
    frames, end = play(write_slow(tmp_path / f"slow.{suffix}", rate, number))
    assert (len(frames), end["code"], end["text"]) == (number, None, None)


@pytest.mark.parametrize(("suffix", "codec"), [("mp4", "mpeg4"), ("mkv", "mpeg4"), ("flv", "flv1")])
def test_a_sound_that_goes_on_is_not_the_end_of_the_pictures(tmp_path: Path, suffix: str, codec: str) -> None:
    frames, end = play(write_slow(tmp_path / f"a.{suffix}", Fraction(10), 20, sound_s=12.0, codec=codec))
    assert (len(frames), end["code"]) == (2, None)


@pytest.mark.parametrize(("suffix", "share"), [("avi", 0.8), ("mkv", 0.5)])
def test_a_slow_film_that_lacks_frames_is_still_cut_off(tmp_path: Path, suffix: str, share: float) -> None:
    whole = write_slow(tmp_path / f"whole.{suffix}", Fraction(1, 5), 40)
    cut = tmp_path / f"cut.{suffix}"
    cut.write_bytes(whole.read_bytes()[: int(whole.stat().st_size * share)])
    frames, end = play(cut)
    assert 0 < len(frames) < 40
    assert end["code"] == "damaged"
    assert "cut off" in end["text"]
