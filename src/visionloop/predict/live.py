"""A camera, watched: frames at a rate, answers smoothed over time, and an event when what is seen has changed.

A thread for each connection (`connection.py`) decodes, in a process of its own, and keeps the newest frame alone;
whoever runs `Watch.run` asks the network about it (of many at once: `several.py`). So a network that is slower than the
camera answers about now and not about a minute ago, and the frames that it was too slow for are counted. A stream that
ends, or sends nothing for a while, is connected to again, after a time that doubles up to 30 s.

Lines are JSON objects. `kind` is `change` (another answer, from `since` on; it is known `smooth_s` later), `lost`,
`back`, `waiting` (connected, and no frame yet), `frame` (each answered one, if it is asked for) and `end` (what it came
to). Nothing secret is in them.
"""

import math
import re
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Protocol

import numpy as np

from visionloop.errors import ImageError, SourceError
from visionloop.ingest.video.cameras import Reach, Stream, open_stream
from visionloop.predict.connection import Connection, WatchPlan
from visionloop.predict.lines import Line, format_time
from visionloop.records import Card, Prediction
from visionloop.video.player import End, Frame, check_installed
from visionloop.video.sample import DecodeJob
from visionloop.video.timeline import Follower, Segment

TICK_S = 0.5
SAID_AFTER_S = 10.0  # without a first frame
MAX_WAIT_S = 30.0
STEADY_S = 10.0  # a connection that lasted so long makes the next wait short again
SETTLED_AFTER = 10  # times `smooth_s`: by then a frame is settled, whatever comes


class Network(Protocol):
    """What answers for a frame."""

    @property
    def card(self) -> Card: ...

    @property
    def digest(self) -> str: ...

    def answer(self, jpeg: bytes) -> Prediction:
        """Raises ImageError."""
        ...


class StreamEnded(SourceError):
    """A camera gave no frame at all. It may do so later."""

    transient = True


class Watch:
    """One camera and one model. `connect`, then `run` until a limit or `stop`, then `end`.

    `problem`: why there was no frame, before the first one. `is_silent`: there was none because nothing was sent.
    """

    def __init__(self, plan: WatchPlan, network: Network) -> None:
        self.plan, self._network, self.problem = plan, network, ""
        self.num_answered = self.num_lost = self.num_changes = self._num_passed_over = 0
        self.last: Prediction | None = None
        self.seconds: dict[str, float] = {}  # for how long each answer was seen
        self.network_s = 0.0
        self._began = time.monotonic()
        self._session: Connection | None = None
        self._why = "limit"
        self._is_asked_to_stop = self.is_silent = False
        self._before: Segment | None = None
        self._waiting: tuple[float, Prediction] | None = None  # the newest frame: how long it is shown is not known yet
        self._follower = self._make_follower()

    @property
    def num_passed_over(self) -> int:
        """How many frames came while the network was busy with an earlier one."""
        session = self._session
        return self._num_passed_over + (session.num_passed_over if session and not session.is_stopped else 0)

    @property
    def digest(self) -> str:
        """The model that answers."""
        return self._network.digest

    @property
    def took_s(self) -> float:
        """How long it has been watched."""
        return time.monotonic() - self._began

    def connect(self) -> Stream:
        """Open the camera. Raises SourceError: the address is wrong, or nobody answers there."""
        check_installed(self.plan.shown)
        try:
            reach = Reach(self.plan.env, self.plan.shown, self.plan.hosts)
            return open_stream(self.plan.path, self._make_job(), reach)
        except ImageError as exc:
            todo = _advise(exc.found) or exc.todo
            raise StreamEnded(self.plan.shown, exc.found, exc.expected, todo) from None

    def run(self, stream: Stream | None) -> Iterator[Line | None]:
        """Yield lines as they come, and None now and then in between, until a limit is reached.

        Raises:
            StreamEnded: the first connection gives no frame; of one of several: it may not be reached at all.
            SourceError: the address is wrong.
        """
        self._began, wait_s, lost_at = time.monotonic(), self.plan.wait_s, None
        while not self._is_over():
            self._session, began = Connection(self.plan, self._make_job(), stream), time.monotonic()
            before = self.num_answered
            yield from self._follow(self._session, lost_at)
            reason = self._session.reason  # "": it goes on, and is left
            self._close()
            self.is_silent = self._session.is_silent and not self.num_answered
            if not self.num_answered and not self._is_asked_to_stop and (self._is_over() or not self.is_silent):
                self.problem = reason = reason or f"no frame in {self.took_s:.0f} s"
                self._check_first(self._session.error)
            if self._is_over():
                return
            if self.num_answered > before or lost_at is None:
                yield from self._settle()
                lost_at = time.monotonic()
                self.num_lost, self.last = self.num_lost + 1, None
                yield self._make_line("lost", why=reason)
            is_steady = self.num_answered > before and time.monotonic() - began > STEADY_S
            wait_s = self.plan.wait_s if is_steady else wait_s
            yield from self._pause(wait_s)
            wait_s, stream = min(2 * wait_s, MAX_WAIT_S), None

    def stop(self, why: str) -> None:
        """Let `run` come to its end within half a second. For handlers of signals, too."""
        self._why, self._is_asked_to_stop = self._why if self._is_asked_to_stop else why, True

    def end(self) -> list[Line]:
        """Close; return the changes that were not told yet, and what it came to."""
        self._close()
        lines = list(self._settle())
        took_s = self.took_s
        each_s = self.network_s / self.num_answered if self.num_answered else None
        summary = {
            "why": self._why,
            "duration_s": round(took_s, 3),
            "frames": self.num_answered,
            "passed_over": self.num_passed_over,
            "changes": self.num_changes,
            "lost": self.num_lost,
            "network_ms": round(1000 * each_s, 3) if each_s is not None else None,
            "seconds": {
                name: round(self.seconds[name], 3) for name in sorted(self.seconds, key=self.seconds.__getitem__)[::-1]
            },
            "bundle": self.digest,
        }
        return [*lines, self._make_line("end", **summary)]

    def _check_first(self, error: SourceError | ImageError | None) -> None:
        """Raise why a stream that has shown nothing yet is not tried again; of one of several only what stays so."""
        if isinstance(error, SourceError):
            raise error
        if not self.plan.is_one_of_several or (error and error.reason_code == "refused_url"):
            raise StreamEnded(self.plan.shown, self.problem, "a video stream", _advise(self.problem) or self.plan.todo)

    def _follow(self, session: Connection, lost_at: float | None) -> Iterator[Line | None]:
        """Answer for the newest frames of a connection until it ends, hangs, or a limit is reached."""
        is_said = False
        while not self._is_over():
            found = session.take(min(TICK_S, self._left_s()))
            if isinstance(found, Frame):
                if lost_at is not None:
                    yield self._make_line("back", after_s=round(time.monotonic() - lost_at, 3))
                    lost_at = None
                yield from self._answer(found)
            elif isinstance(found, End):
                return
            elif session.waits_s > SAID_AFTER_S and not is_said and lost_at is None:
                is_said = True
                yield self._make_line("waiting", after_s=round(session.waits_s, 3), bytes=session.num_bytes)
            elif session.is_stalled():
                return
            yield None

    def _answer(self, frame: Frame) -> Iterator[Line]:
        assert frame.clock is not None
        started = time.perf_counter()
        try:
            answer = self._network.answer(frame.jpeg)
        except ImageError:
            return
        finally:
            self.network_s += time.perf_counter() - started
        self.num_answered += 1
        self.last = answer
        if self.plan.each_frame:
            yield self._make_line("frame", at=format_time(frame.clock), **answer.to_json())
        yield from self._take_waiting(frame.clock)
        self._waiting = (frame.clock, answer)

    def _take_waiting(self, until: float) -> Iterator[Line]:
        """Smooth the frame before, now that it is known until when it was shown."""
        if self._waiting:
            at, answer = self._waiting
            probs_k = list(answer.probabilities.values())
            ended = self._follower.add(at, max(1e-3, until - at), np.array(probs_k), answer.abstained)
            yield from self._tell_changes(ended)

    def _settle(self) -> Iterator[Line]:
        """Tell what is not told yet: the stream is lost, or nobody watches any more. What comes then begins anew."""
        if self._waiting:
            yield from self._take_waiting(self._waiting[0] + self.plan.sampling.every_s)
        self._waiting = None
        yield from self._tell_changes(self._follower.finish())
        self._follower = self._make_follower()

    def _tell_changes(self, ended: list[Segment]) -> Iterator[Line]:
        """Yield a line for each segment that shows something else than the one before it."""
        for segment in ended:
            yield from self._tell_change(segment)
            name = "don't know" if segment.abstained else segment.prediction or "no label"
            self.seconds[name] = self.seconds.get(name, 0.0) + segment.end_s - segment.start_s
        if current := self._follower.current:
            yield from self._tell_change(current)

    def _tell_change(self, segment: Segment) -> Iterator[Line]:
        before, self._before = self._before, segment
        if before is None or _key(before) != _key(segment):
            self.num_changes += 1
            labels = {} if segment.labels is None else {"labels": list(segment.labels)}
            yield self._make_line(
                "change",
                since=format_time(segment.start_s),
                prediction=segment.prediction,
                **labels,
                confidence=round(segment.confidence, 6),
                abstained=segment.abstained,
                before=before.prediction if before else None,
                before_abstained=before.abstained if before else None,
                before_s=round(before.end_s - before.start_s, 3) if before else None,
            )
        else:  # it goes on; after a gap it is the same one too
            self._before = replace(segment, start_s=before.start_s)

    def _make_line(self, kind: str, **more: Any) -> Line:
        return {"kind": kind, "time": format_time(time.time()), "source": self.plan.shown, **more}

    def _make_follower(self) -> Follower:
        every_s, smooth_s = self.plan.sampling.every_s, self.plan.sampling.smooth_s
        return Follower(self._network.card, smooth_s, most_waiting=2 + math.ceil(SETTLED_AFTER * smooth_s / every_s))

    def _make_job(self) -> DecodeJob:
        return DecodeJob(
            every_s=self.plan.sampling.every_s,
            scene=None,
            spans=[(0.0, None)],
            max_frames=sys.maxsize,
            max_s=math.inf,
            max_pixels=self._network.card.max_pixels,
            by_arrival=True,
            enough_px=max(self._network.card.image_size),
        )

    def _left_s(self) -> float:
        return math.inf if self.plan.seconds is None else self._began + self.plan.seconds - time.monotonic()

    def _is_over(self) -> bool:
        return (
            self._is_asked_to_stop
            or self._left_s() <= 0
            or (self.plan.frames is not None and self.num_answered >= self.plan.frames)
        )

    def _pause(self, wait_s: float) -> Iterator[None]:
        until = time.monotonic() + wait_s
        while not self._is_over() and (left_s := min(until - time.monotonic(), self._left_s())) > 0:
            time.sleep(min(TICK_S, left_s))
            yield None

    def _close(self) -> None:
        """End the connection."""
        if self._session and not self._session.is_stopped:
            self._session.stop()
            self._num_passed_over += self._session.num_passed_over


def _advise(found: str) -> str:
    """Say how a host may be asked that a stream leads to; "" if that is not what is wrong."""
    if match := re.search(r"(?:port (\d+) of|host) (\S+) is not in the list of hosts", found):
        host = f"{match[2]}:{match[1]}" if match[1] else match[2]
        return f"If it belongs to the stream: `--host {host}`, or `predict.hosts` in params.yaml."
    return ""


def _key(segment: Segment) -> tuple[str, bool]:
    return segment.prediction, segment.abstained is not None
