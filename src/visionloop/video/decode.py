"""Open an untrusted video, and make JPEG files of some of its frames. Runs in the worker; the home of PyAV.

Only containers and codecs of the lists below are opened, and only the one file: a container that refers to another file
or address (playlists, concat scripts, references of QuickTime) cannot open it. The same video gives the same bytes: the
conversion to RGB is the exact one. JPEG at quality 95 loses less than the video's own codec did. PNG would lose
nothing, but it is five times as large, and its bytes depend on the version of zlib.
"""

import contextlib
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import av
import av.error
import numpy as np
import simplejpeg
from av.video.reformatter import Interpolation
from numpy.typing import NDArray

from visionloop.video.sample import DecodeJob, FrameClock, Sampler, to_ms

FORMATS = ("mov", "mp4", "matroska", "webm", "avi", "mpegts", "mpeg", "flv", "ogg", "mpjpeg")
LIVE_FORMATS = {"rtsp", "v4l2", "video4linux2", "mjpeg", "h264", "hevc"}
CODECS = frozenset(
    (
        *("h264", "hevc", "av1", "vp8", "vp9", "mpeg4", "mpeg2video", "mpeg1video", "mjpeg", "prores", "dnxhd"),
        *("dvvideo", "h263", "flv1", "theora", "ffv1", "msmpeg4v2", "msmpeg4v3"),
    )
)
UNTIMED = frozenset({"mpjpeg"})  # its pictures carry no time; the time of arrival counts
DEVICE_CODECS = frozenset({"rawvideo"})
QUALITY = 95
SCALES = (8, 4, 2)
LIVE_THREADS = 2  # with more, as many frames are held back as there are threads
LIVE_OPTIONS = {"probesize": "1000000", "analyzeduration": "1000000"}  # a second at most before the first frame
OPEN_S, READ_S = 20.0, 20.0
MAX_STREAMS = 64
MAX_SIDE_PX = 65_500  # of a JPEG
MAX_FRAMES_PER_S, MAX_BAD_PACKETS = 1000, 100
FIRST_YEAR = 1990  # below it, a camera's clock was not set: 1904 and 1970 are zero
BEAT_S, JUMP_S = 1.0, 1.0
GREY_PX = 32
_EXACT = Interpolation.ACCURATE_RND | Interpolation.BITEXACT | Interpolation.FULL_CHR_H_INT
EXACT, EXACT_MEAN = Interpolation.BILINEAR | _EXACT, Interpolation.AREA | _EXACT
BT709, BT601 = 1, 5  # of swscale
UNSPECIFIED = 2
CUT_SHORT_S = 2.0
HDR = frozenset({16, 18})  # transfer curves PQ and HLG

Message = tuple[dict[str, Any], bytes]


class VideoFault(Exception):
    """Why a video ends here: a stable code, and a sentence. The frames before it are good."""

    def __init__(self, code: str, text: str) -> None:
        super().__init__(code, text)
        self.code, self.text = code, text


@dataclass
class _Reading:
    """What is told at the end, and how far it was read: the end of the last frame."""

    told: list[str] = field(default_factory=list)
    end_s: float = 0.0


@dataclass
class _Damage:
    """What was lost, and whether the following frames are built on damaged ones: until the next key frame they are."""

    packets: int = 0
    first_s: float = 0.0
    _spreads: bool = False
    _last_stamp: int | None = None

    def add(self, at_s: float, stamp: int | None) -> None:
        if not self.packets:
            self.first_s = at_s
        self.packets += 1
        self._spreads = True
        self._last_stamp = stamp if self._last_stamp is None else max(self._last_stamp, stamp or 0)

    def spoils(self, frame: Any) -> bool:
        """Say whether a frame is or may be damaged; the decoder may still return frames from before the loss.

        One that is long before the loss, by its time, is after it: the camera's clock has jumped back.
        """
        if self._spreads and frame.key_frame:
            is_timed = None not in (frame.pts, self._last_stamp, frame.time_base)
            self._spreads = is_timed and 0 <= (self._last_stamp - frame.pts) * frame.time_base < JUMP_S
        return self._spreads


def decode(job: DecodeJob) -> Iterator[Message]:
    """Yield `start`, frames (with their JPEG) and beats, and `end`, which says why: code None is the whole video."""
    reading = _Reading()
    code = text = None
    try:
        with _open(job) as container:
            stream = _choose_stream(container, job)
            yield {"kind": "start", "created": _read_creation_time(container, stream)}, b""
            yield from _sample(container, stream, job, reading)
    except VideoFault as fault:
        code, text = fault.code, fault.text
    except MemoryError:
        code, text = "too_large", "needs more memory than a video may have"
    except (av.error.FFmpegError, OSError, ValueError, OverflowError, RuntimeError) as exc:
        code, text = "damaged", f"cannot be decoded ({_describe(exc)})"
    yield {"kind": "end", "code": code, "text": text, "told": reading.told, "end_s": reading.end_s}, b""


def _open(job: DecodeJob) -> Any:
    """Open the container. Raises VideoFault."""
    options = {
        "max_streams": str(MAX_STREAMS),
        "format_whitelist": ",".join((*FORMATS, *(LIVE_FORMATS if job.is_live else ()))),
        "codec_whitelist": ",".join(_list_decoders()),
        "max_pixels": str(job.max_pixels),
        "protocol_whitelist": "none",
        **(LIVE_OPTIONS if job.is_live else {}),
        **job.options,
    }
    timeout = (OPEN_S, READ_S) if job.is_live else None
    try:
        if job.url is not None:
            return av.open(job.url, format=job.format, container_options=options, timeout=timeout)
        # Opened here, not by FFmpeg: `io_open` refuses every other file that this one names.
        source = open(job.pipe or 0 if job.file is None else job.file, "rb", buffering=0)  # noqa: SIM115
        return av.open(
            source, container_options=options, io_open=_refuse_to_open, buffer_size=1 << 18, metadata_errors="replace"
        )
    except (av.error.FFmpegError, OSError, ValueError) as exc:
        if job.is_live:
            raise VideoFault("unreadable", f"gives no video ({_describe(exc)})") from exc
        raise _explain_unopened(job, f"is not a video we read ({_describe(exc)})") from exc


def _explain_unopened(job: DecodeJob, text: str) -> VideoFault:
    """Tell an MP4 whose recording was cut off (its index comes last, and is missing) from a file that is no video."""
    with contextlib.suppress(OSError), open(job.file or "", "rb") as file:
        if file.read(12)[4:8] == b"ftyp":
            return VideoFault("damaged", "has no whole index: the recording was cut off, or the file is damaged")
    return VideoFault("not_a_video", text)


def _refuse_to_open(url: str, flags: int, options: dict[str, str]) -> Any:
    raise PermissionError("a video may not open other files")


def _list_decoders() -> list[str]:
    return sorted({*CODECS, *DEVICE_CODECS, "libdav1d", "libvpx", "libvpx-vp9", "flv"})


def _choose_stream(container: Any, job: DecodeJob) -> Any:
    """Return the first stream that is a film: no cover picture, of a codec and a size that are allowed."""
    attached = av.stream.Disposition.attached_pic | av.stream.Disposition.timed_thumbnails
    streams = [stream for stream in container.streams.video if not stream.disposition & attached]
    if not streams:
        if not container.streams and not job.is_live:
            raise _explain_unopened(job, "holds no stream")
        raise VideoFault("no_video", "holds no video")
    stream = streams[0]
    codec = stream.codec_context.codec.canonical_name if stream.codec_context else "unknown"
    if codec not in CODECS | (DEVICE_CODECS if job.is_live else frozenset()):
        raise VideoFault("not_a_video", f"is coded as {codec}; expected one of {', '.join(sorted(CODECS))}")
    _check_size(stream.codec_context.width, stream.codec_context.height, job)
    for other in container.streams:
        if other is not stream:
            other.discard = "all" if isinstance(other.discard, str) else av.stream.Discard.all
    stream.codec_context.options = {
        "max_pixels": str(job.max_pixels),
        "threads": str(LIVE_THREADS) if job.is_live else "auto",
        "thread_type": "frame+slice",
    }
    return stream


def _check_size(width: int, height: int, job: DecodeJob) -> None:
    if width * height > job.max_pixels or max(width, height) > MAX_SIDE_PX:
        raise VideoFault("too_large", f"has {width} x {height} pixels; expected at most {job.max_pixels}")


def _sample(container: Any, stream: Any, job: DecodeJob, reading: _Reading) -> Iterator[Message]:
    """Yield the frames that are wanted. Raises VideoFault at the end of one that is damaged or goes beyond a limit."""
    sampler = Sampler(job.spans, job.every_s, job.scene)
    damage, told, num_decoded, num_taken = _Damage(), reading.told, 0, 0
    began_at, beat_at = None, time.monotonic()
    shape = _Shape(stream, told, job.enough_px)
    for now_s, frame in _decode_frames(container, stream, job, damage, sampler):
        if time.monotonic() - beat_at > BEAT_S:
            beat_at = time.monotonic()
            yield {"kind": "beat"}, b""
        if frame is None and now_s > job.max_s:
            break
        if frame is None:
            continue
        reading.end_s, num_decoded = now_s + _read_length(frame, stream), num_decoded + 1
        began_at = time.time() - now_s if began_at is None else began_at
        if num_decoded > MAX_FRAMES_PER_S * (1 + now_s):
            raise VideoFault("too_many_frames", f"has more than {MAX_FRAMES_PER_S} frames a second at {now_s:.1f} s")
        if now_s > job.max_s or sampler.is_over(now_s):
            if now_s > job.max_s and not job.is_live:
                told.append(f"is longer than max_video_s ({job.max_s:g} s): the rest is not read")
            break
        if not sampler.is_inside(now_s):
            continue
        grey = _to_grey(frame) if job.scene is not None else None
        if sampler.take(now_s, grey):
            if num_taken == job.max_frames:
                told.append(f"has more than max_frames ({job.max_frames:,}): the rest is not read")
                break
            num_taken += 1
            _check_size(frame.width, frame.height, job)
            message = {"kind": "frame", "t_ms": to_ms(now_s), "clock": began_at + now_s if job.is_live else None}
            yield message, shape.encode(frame)
    else:
        _check_end(container, stream, job, damage, end_s=reading.end_s, num_decoded=num_decoded)
    if damage.packets:
        raise VideoFault("damaged", f"is damaged at {damage.first_s:.1f} s ({damage.packets:,} packets were lost)")


def _decode_frames(
    container: Any, stream: Any, job: DecodeJob, damage: _Damage, sampler: Sampler
) -> Iterator[tuple[float, Any]]:
    """Yield (seconds from the start, frame) for every frame that is whole.

    None: it came before one is due, and as none is built on it (JPEG) it was not decoded.
    """
    base = float(stream.time_base or 0)
    start = None if job.is_live or container.start_time is None else container.start_time / av.time_base
    rate = stream.guessed_rate
    clock = FrameClock(start, 1 / float(rate) if rate else None)
    untimed = job.is_live and (job.by_arrival or container.format.name in UNTIMED)
    may_skip = untimed and stream.codec_context.codec.intra_only
    now_s, opened_at = 0.0, time.monotonic()
    packets = container.demux(stream)
    while True:
        try:
            packet = next(packets)
        except StopIteration:
            return
        except (av.error.FFmpegError, OSError) as exc:
            raise VideoFault("damaged", f"cannot be read beyond {now_s:.1f} s ({_describe(exc)})") from exc
        at = packet.dts if packet.pts is None else packet.pts
        if may_skip and packet.size and not sampler.is_due(came_s := time.monotonic() - opened_at):
            yield came_s, None
            continue
        if packet.is_corrupt:
            damage.add(now_s, at)
        try:
            frames = packet.decode()
        except av.error.EOFError:
            return
        except av.error.FFmpegError:
            damage.add(now_s, at)
            if damage.packets >= MAX_BAD_PACKETS:
                return
            continue
        for frame in frames:
            stamp = None if frame.pts is None else frame.pts * float(frame.time_base or base)
            now_s = time.monotonic() - opened_at if untimed else clock.read(stamp)
            if frame.is_corrupt:
                damage.add(now_s, frame.pts)
            if not damage.spoils(frame):
                yield now_s, frame


def _check_end(container: Any, stream: Any, job: DecodeJob, damage: _Damage, *, end_s: float, num_decoded: int) -> None:
    """Tell a video that was cut off, or has no frame, from a complete one. Raises VideoFault."""
    if not num_decoded:
        code, text = ("damaged", "every frame is damaged") if damage.packets else ("no_video", "has no frame")
        raise VideoFault(code, text)
    declared = _read_duration(container, stream)
    if not job.is_live and declared and end_s < declared - max(CUT_SHORT_S, declared / 20):
        raise VideoFault("damaged", f"ends at {end_s:.1f} s of {declared:.1f} s: the file is cut off")


def _read_length(frame: Any, stream: Any) -> float:
    """Return for how many seconds a frame is shown: by its own word, else by the usual rate; 0 where none is known."""
    if frame.duration and frame.time_base:
        return float(frame.duration * frame.time_base)
    return 1 / float(stream.average_rate) if stream.average_rate else 0.0


def _read_duration(container: Any, stream: Any) -> float | None:
    """Return the duration of the pictures in seconds. The sound beside them may be longer, and says nothing."""
    if stream.duration and stream.time_base:
        return float(stream.duration * stream.time_base)
    if container.duration and len(container.streams) == 1:
        return float(container.duration / av.time_base)
    for name, value in stream.metadata.items():  # Matroska: DURATION, or DURATION-eng
        if name.startswith("DURATION") and (found := re.fullmatch(r"(\d+):(\d\d):(\d\d\.\d+)", value)):
            return int(found[1]) * 3600 + int(found[2]) * 60 + float(found[3])
    return None


class _Shape:
    """How the frames of one video become upright RGB with square pixels."""

    def __init__(self, stream: Any, told: list[str], enough_px: int | None) -> None:
        aspect = stream.codec_context.sample_aspect_ratio
        self._aspect = float(aspect) if aspect and 0.25 <= aspect <= 4 else 1.0
        self._told, self._enough_px = told, enough_px

    def encode(self, frame: Any) -> bytes:
        """Return a frame as JPEG."""
        rgb_hwc = self._to_rgb(frame)
        is_whole = self._enough_px is None and min(rgb_hwc.shape[:2]) > 1  # a smaller one keeps all of its colour
        subsampling = "420" if is_whole else "444"
        jpeg: bytes = simplejpeg.encode_jpeg(rgb_hwc, quality=QUALITY, colorspace="RGB", colorsubsampling=subsampling)
        return jpeg

    def _to_rgb(self, frame: Any) -> NDArray[np.uint8]:
        if frame.color_trc in HDR and not self._told:
            self._told.append("is HDR: its colours are taken as they are, which looks pale")
        size = min(MAX_SIDE_PX, max(1, round(frame.width * self._aspect))), frame.height
        width, height = size if frame.interlaced_frame else self._scale(*size)
        name = frame.format.name
        has_alpha = name.startswith(("yuva", "rgba", "argb", "bgra", "abgr", "gbrap", "ya"))
        # As players do: a video that does not name its colour space has the usual one for its size.
        guess = BT709 if frame.height >= 720 else BT601
        space = guess if frame.colorspace == UNSPECIFIED else frame.colorspace
        picture = frame.reformat(
            width=width,
            height=height,
            format="rgba" if has_alpha else "rgb24",
            src_colorspace=space,
            interpolation=EXACT if (width, height) == size else EXACT_MEAN,
            threads=1,
        ).to_ndarray()
        if has_alpha:
            alpha = picture[:, :, 3:].astype(np.uint16)
            picture = ((picture[:, :, :3] * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)
        if frame.interlaced_frame and picture.shape[0] > 2:
            # Interlaced: every second line is from another moment; it is replaced by the mean of its neighbours.
            inner = picture[1:-1:2]
            above, below = picture[0:-2:2][: len(inner)], picture[2::2][: len(inner)]
            picture = picture.copy()
            picture[1:-1:2] = ((above.astype(np.uint16) + below + 1) // 2).astype(np.uint8)
        return np.ascontiguousarray(turn_upright(picture, _read_matrix(frame)))

    def _scale(self, width: int, height: int) -> tuple[int, int]:
        """Return the size that is enough: each new pixel is the mean of those that it stands for."""
        for scale in SCALES if self._enough_px else ():
            sides = -(-width // scale), -(-height // scale)
            if min(sides) >= (self._enough_px or 0):
                return sides
        return width, height


def turn_upright(picture_hwc: NDArray[np.uint8], matrix: tuple[int, int, int, int] | None) -> NDArray[np.uint8]:
    """Turn and mirror a picture as its display matrix (a, b, c, d) says: x' = ax + cy, y' = bx + dy."""
    if matrix is None:
        return picture_hwc
    a, b, c, d = matrix
    if abs(a) + abs(d) < abs(b) + abs(c):
        picture_hwc = picture_hwc.transpose(1, 0, 2)
        a, d = c, b
    if a < 0:
        picture_hwc = picture_hwc[:, ::-1]
    return picture_hwc[::-1] if d < 0 else picture_hwc


def _read_matrix(frame: Any) -> tuple[int, int, int, int] | None:
    data = frame.side_data.get("DISPLAYMATRIX")
    if data is None or data.buffer_size < 36:
        return None
    values = np.frombuffer(bytes(data), dtype=np.int32, count=9)
    return int(values[0]), int(values[1]), int(values[3]), int(values[4])


def _to_grey(frame: Any) -> NDArray[np.uint8]:
    small = frame.reformat(width=GREY_PX, height=GREY_PX, format="gray", interpolation=Interpolation.AREA, threads=1)
    grey: NDArray[np.uint8] = small.to_ndarray()
    return grey


def _read_creation_time(container: Any, stream: Any) -> str | None:
    """Return when the recording began, ISO 8601 in UTC; None when the container does not say, or says nonsense."""
    for key in ("com.apple.quicktime.creationdate", "creation_time"):
        for metadata in (container.metadata, stream.metadata):
            try:
                value = datetime.fromisoformat(metadata.get(key, ""))
                value = value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)
            except (ValueError, OverflowError):
                continue
            if FIRST_YEAR <= value.year < 2200:
                return value.isoformat()
    return None


def _describe(exc: BaseException) -> str:
    return str(getattr(exc, "strerror", None) or type(exc).__name__)[:100]
