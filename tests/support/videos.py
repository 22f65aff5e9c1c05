"""Small clips of any kind, made with PyAV: plain colours that a test can read back from a frame."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray

RED, GREEN, BLUE, WHITE, BLACK = (220, 30, 30), (30, 200, 30), (30, 30, 220), (250, 250, 250), (5, 5, 5)
Color = tuple[int, int, int]


@dataclass(frozen=True)
class Film:
    """What a clip shows: `colors`, each for `seconds`, or, with `frames`, those pictures (height, width, 3)."""

    colors: Sequence[Color] = (RED, GREEN, BLUE)
    seconds: float = 1.0
    fps: int = 10
    size_hw: tuple[int, int] = (48, 64)
    codec: str = "mpeg4"
    pix_fmt: str = "yuv420p"
    options: dict[str, str] = field(default_factory=dict)
    frames: Sequence[NDArray[np.uint8]] | None = None

    def draw(self) -> list[NDArray[np.uint8]]:
        """The pictures of the clip, one a frame."""
        if self.frames is not None:
            return list(self.frames)
        count = round(self.seconds * self.fps)
        return [np.full((*self.size_hw, 3), color, np.uint8) for color in self.colors for _ in range(count)]


def write_video(
    path: Path,
    film: Film | None = None,
    *,
    format: str | None = None,
    created: str | None = None,
    rotation: int | None = None,
    pts: Sequence[int] | None = None,
    **muxer: str,
) -> Path:
    """Write a clip. `pts` are the frames' times in units of 1/fps; `muxer` options of the container."""
    film = film or Film()
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w", format=format, options=dict(muxer)) as container:
        if created:
            container.metadata["creation_time"] = created
        stream: Any = container.add_stream(film.codec, rate=film.fps, options=film.options)
        pictures = film.draw()
        stream.height, stream.width = pictures[0].shape[:2]
        stream.pix_fmt = film.pix_fmt
        stream.codec_context.time_base = Fraction(1, film.fps)
        if rotation is not None:
            stream.set_display_rotation(rotation)
        for number, picture in enumerate(pictures):
            kind = "rgba" if picture.shape[2] == 4 else "rgb24"
            frame = av.VideoFrame.from_ndarray(picture, format=kind)
            frame.pts = number if pts is None else pts[number]
            frame.time_base = Fraction(1, film.fps)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def write_sound(path: Path) -> Path:
    """Write a second of silence: a file without a picture."""
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream("aac", rate=8000)
        for number in range(8):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            frame.sample_rate, frame.pts = 8000, number * 1024
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def write_slow(path: Path, rate: Fraction, number: int, sound_s: float = 0.0, codec: str = "mpeg4") -> Path:
    """Write `number` frames at a rate, and a sound beside them that may be longer."""
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream(codec, rate=rate)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.codec_context.time_base = 1 / rate
        sound: Any = container.add_stream("aac", rate=8000) if sound_s else None
        for place in range(number):
            frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), 40 * place % 255, np.uint8), format="rgb24")
            frame.pts, frame.time_base = place, 1 / rate
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
        for place in range(int(sound_s * 8000 / 1024)):
            quiet = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            quiet.sample_rate, quiet.pts = 8000, place * 1024
            container.mux(sound.encode(quiet))
        if sound:
            container.mux(sound.encode())
    return path
