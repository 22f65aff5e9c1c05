"""A camera, watched: frames at a rate, answers smoothed over time, and an event when what is seen has changed.

A thread for each connection decodes (in a process of its own, as for every video) and keeps the newest frame alone;
whoever runs `Watch.run` asks the network about it (of many at once: `several.py`). So a network that is slower than the
camera answers about now and not about a minute ago, and the frames that it was too slow for are counted. A stream that
ends, or gives no frame for a while, is connected to again, after a time that doubles up to 30 s.

Lines are JSON objects. `kind` is `change` (another answer, from `since` on; it is known `smooth_s` later), `lost`,
`back`, `frame` (each answered one, if it is asked for) and `end` (what it came to). Nothing secret is in them.
"""

import math
import re
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np

from visionloop.errors import ImageError, SourceError
from visionloop.ingest.video.cameras import Reach, Stream, hide_login, open_stream
from visionloop.predict.files import Sampling
from visionloop.predict.lines import Line, format_time
from visionloop.records import Card, Prediction
from visionloop.secrets import mask
from visionloop.video.player import End, Frame, Player, check_installed
from visionloop.video.sample import DecodeJob
from visionloop.video.timeline import Follower, Segment

FIRST_S = 40.0  # for the first frame of a connection
STALL_S = 15.0  # without a frame, beyond the time from one to the next
TICK_S = 0.5
WAIT_S, MAX_WAIT_S = 1.0, 30.0
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


@dataclass(frozen=True)
class WatchPlan:
    """What is watched and for how long: for `seconds`, or until `frames` were answered; None: until it is stopped.

    `each_frame`: a line for each answered frame too. `env` holds the values of `${NAME}` in the path. `name`: what
    it is called, if not by its path. `is_one_of_several`: a first connection that fails is tried again, too. `hosts`:
    to which others a playlist or a redirect may lead.
    """

    path: str
    env: Mapping[str, str]
    sampling: Sampling = field(default_factory=Sampling)
    seconds: float | None = None
    frames: int | None = None
    each_frame: bool = False
    name: str = ""
    is_one_of_several: bool = False
    hosts: Sequence[str] = ()
    stall_s: float = STALL_S
    wait_s: float = WAIT_S

    @property
    def shown(self) -> str:
        """Its name, or the path as it may be shown."""
        return self.name or hide_login(self.path)

    @property
    def todo(self) -> str:
        """What people had better look at if it gives no frame."""
        is_here = self.path.startswith("/dev/")
        return "Name a camera: `ls /dev/video*` lists them." if is_here else "Check the address and the login."


class Watch:
    """One camera and one model. `connect`, then `run` until a limit or `stop`, then `end`.

    `problem`: why there was no frame, before the first one.
    """

    def __init__(self, plan: WatchPlan, network: Network) -> None:
        self.plan, self._network, self.problem = plan, network, ""
        self.num_answered = self.num_lost = self.num_changes = self._num_passed_over = 0
        self.last: Prediction | None = None
        self.seconds: dict[str, float] = {}  # for how long each answer was seen
        self.network_s = 0.0
        self._began = time.monotonic()
        self._session: _Session | None = None
        self._why = "limit"
        self._is_asked_to_stop = False
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
            self._session, began = _Session(self.plan, self._make_job(), stream), time.monotonic()
            before = self.num_answered
            yield from self._follow(self._session, lost_at)
            self._close()
            reason = self._session.reason
            if not self.num_answered and not self._is_asked_to_stop:
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

    def _follow(self, session: "_Session", lost_at: float | None) -> Iterator[Line | None]:
        """Answer for the newest frames of a connection until it ends, hangs, or a limit is reached."""
        heard_at, limit_s = time.monotonic(), max(FIRST_S, self.plan.stall_s)
        while not self._is_over():
            found = session.take(min(TICK_S, self._left_s()))
            if isinstance(found, Frame):
                if lost_at is not None:
                    yield self._make_line("back", after_s=round(time.monotonic() - lost_at, 3))
                    lost_at = None
                yield from self._answer(found)
                heard_at, limit_s = time.monotonic(), self.plan.stall_s + self.plan.sampling.every_s
            elif isinstance(found, End) or time.monotonic() - heard_at > limit_s:
                session.reason = session.reason or f"no frame for {limit_s:.0f} s"
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


class _Session:
    """One connection. Its thread connects and decodes, and keeps the newest frame until somebody takes it."""

    def __init__(self, plan: WatchPlan, job: DecodeJob, stream: Stream | None) -> None:
        self._plan, self._job, self._stream = plan, job, stream
        self.num_passed_over, self.reason = 0, ""
        self.error: SourceError | ImageError | None = None
        self._frame: Frame | None = None
        self._end: End | None = None
        self.is_stopped = False
        self._news = threading.Condition()
        self._player = Player()
        self._thread = threading.Thread(target=self._run, daemon=True, name="camera")
        self._thread.start()

    def take(self, timeout_s: float) -> Frame | End | None:
        """Return the newest frame, once; else the end, if it is one; None: nothing came in that time."""
        with self._news:
            self._news.wait_for(lambda: self._frame or self._end, max(0.0, timeout_s))
            found, self._frame = self._frame or self._end, None
            return found

    def stop(self) -> None:
        """Close the connection. A thread that waits for a host that does not answer ends by itself."""
        with self._news:
            self.is_stopped = True
        self._player.interrupt()
        if self._stream:
            self._stream.feed.close()
        self._thread.join(1.0)

    def _run(self) -> None:
        end = End(None)
        try:
            reach = Reach(self._plan.env, self._plan.shown, self._plan.hosts)
            self._stream = stream = self._stream or open_stream(self._plan.path, self._job, reach)
            if stream.file:
                raise SourceError(self._plan.shown, "is a video file", "a stream", "Name it alone.")
            end = self._play(stream)
            end = End(end.code, mask(end.text or "the stream has ended", stream.secrets))
        except (ImageError, SourceError) as exc:
            self.error, end = exc, End("unreadable", exc.found)
        finally:
            self._player.stop()
            with self._news:
                self.reason = self.reason or mask(end.text or "the connection broke off")
                self._end = end
                self._news.notify_all()

    def _play(self, stream: Stream) -> End:
        """Decode until the stream ends, or is stopped. Raises ImageError."""
        end = End(None)
        try:
            job = stream.feed.open()
            for found in () if self.is_stopped else self._player.play(job):
                if self.is_stopped:
                    break
                if isinstance(found, Frame):
                    with self._news:
                        self.num_passed_over += self._frame is not None
                        self._frame = found
                        self._news.notify_all()
                elif isinstance(found, End):
                    end = found
        finally:
            stream.feed.close()
        if failure := stream.feed.failure:
            self.error, end = failure, End(failure.reason_code, failure.found)
        return end


def _advise(found: str) -> str:
    """Say how a host may be asked that a stream leads to; "" if that is not what is wrong."""
    if match := re.search(r"(?:port (\d+) of|host) (\S+) is not in the list of hosts", found):
        host = f"{match[2]}:{match[1]}" if match[1] else match[2]
        return f"If it belongs to the stream: `--host {host}`, or `predict.hosts` in params.yaml."
    return ""


def _key(segment: Segment) -> tuple[str, bool]:
    return segment.prediction, segment.abstained is not None
