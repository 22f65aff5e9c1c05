"""Which frames of a video are taken, and what time each one has. Pure: times in seconds, grey pixels as numbers."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

SLACK_S = 0.0005  # times are rounded fractions: 0.99999 is the frame at 1 s
STEPS_S = (1e-4, 10.0)

GreyArray = NDArray[np.uint8]


@dataclass(frozen=True)
class DecodeJob:
    """What the worker is asked for. One of `file` (a path), `pipe` (a file descriptor), `url` is where the video is.

    `spans` are the seconds [start, end) that are wanted; end None: to the end. `format` names the demuxer of a device.
    `scene` None: a frame every `every_s`. `max_s` of the video are read, `max_frames` taken, `max_pixels` in each.
    `by_arrival`: a live frame has the time at which it came, and not its own: clocks of cameras jump and stand still.
    `enough_px`: frames may be scaled to a half, a quarter or an eighth, as long as no side is shorter than that.
    """

    every_s: float
    scene: float | None
    spans: Sequence[Sequence[float | None]]
    max_frames: int
    max_s: float
    max_pixels: int
    file: str | None = None
    pipe: int | None = None
    url: str | None = None
    format: str | None = None
    options: dict[str, str] = field(default_factory=dict)
    by_arrival: bool = False
    enough_px: int | None = None

    @property
    def is_live(self) -> bool:
        return self.file is None


class FrameClock:
    """Turns the time stamps of frames into seconds from the start that never go back.

    A frame without a stamp is one step after the frame before. A stamp that jumps back (a restarted recorder, a counter
    that overflowed) continues from the frame before. A time before the start counts as the start.
    """

    def __init__(self, start: float | None, step: float | None) -> None:
        self._base = start
        low, high = STEPS_S
        self._step = min(max(step, low), high) if step else 0.04
        self._last: float | None = None

    def read(self, stamp: float | None) -> float:
        """Return the time of the next frame."""
        if stamp is None:
            time = 0.0 if self._last is None else self._last + self._step
        else:
            if self._base is None:
                self._base = stamp
            time = stamp - self._base
            if self._last is not None and time < self._last:
                self._base = stamp - self._last - self._step
                time = self._last + self._step
        self._last = max(0.0, time)
        return self._last


class Sampler:
    """Says of each frame in turn whether it is taken.

    The first frame of each span is; then one every `every_s` from there, or each that differs by `scene` from the one
    taken before it. Two frames of the same millisecond are one.
    """

    def __init__(self, spans: Sequence[Sequence[float | None]], every_s: float, scene: float | None) -> None:
        self._spans, self._every_s, self._scene = spans, every_s, scene
        self._inside: tuple[int, ...] = ()
        self._anchor = 0.0
        self._count = 0
        self._taken_ms: int | None = None
        self._grey: GreyArray | None = None

    def is_inside(self, time: float) -> bool:
        """Say whether a frame of this time could be taken at all."""
        return bool(find_spans(self._spans, time))

    def is_over(self, time: float) -> bool:
        """Say whether nothing is wanted from this time on."""
        return all(end is not None and time >= end for _, end in self._spans)

    def is_due(self, time: float) -> bool:
        """Say whether a frame of this time could be taken; if not, `take` refuses it, whatever it shows."""
        inside = find_spans(self._spans, time)
        is_new = bool(set(inside) - set(self._inside))
        return is_new or (bool(inside) and (self._scene is not None or time >= self._next_s()))

    def _next_s(self) -> float:
        return self._anchor + (self._count + 1) * self._every_s - SLACK_S

    def take(self, time: float, grey: GreyArray | None = None) -> bool:
        """Say whether the frame at `time` is taken; with `scene`, `grey` is its small grey picture."""
        inside = find_spans(self._spans, time)
        entered = bool(set(inside) - set(self._inside))
        self._inside = inside
        if not inside or to_ms(time) == self._taken_ms:
            return False
        if entered:
            self._anchor, self._count = time, 0
        elif grey is not None and self._scene is not None:
            assert self._grey is not None
            if compute_difference(grey, self._grey) < self._scene:
                return False
        elif time < self._next_s():
            return False
        else:
            # After a gap in the recording the next frame is taken at the next step; missed ones are not made up.
            self._count = int((time - self._anchor + SLACK_S) / self._every_s)
        self._taken_ms, self._grey = to_ms(time), grey
        return True


def find_spans(spans: Sequence[Sequence[float | None]], time: float) -> tuple[int, ...]:
    """Return the numbers of the spans that hold a time."""
    return tuple(
        number
        for number, (start, end) in enumerate(spans)
        if time >= (start or 0.0) - SLACK_S and (end is None or time < end - SLACK_S)
    )


def compute_difference(a: NDArray[Any], b: NDArray[Any]) -> float:
    """Return the mean absolute difference of two grey pictures, 0 to 1."""
    return float(np.abs(a.astype(np.int16) - b.astype(np.int16)).mean() / 255)


def to_ms(time: float) -> int:
    return round(time * 1000)
