"""One connection to a camera: what is watched, and a thread that connects, decodes and keeps the newest frame."""

import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from visionloop.errors import ImageError, SourceError
from visionloop.ingest.video.cameras import Reach, Stream, hide_login, open_stream
from visionloop.predict.files import Sampling
from visionloop.secrets import mask
from visionloop.video.player import End, Frame, Player
from visionloop.video.sample import DecodeJob

STALL_S = 15.0  # without a byte of the camera
NO_PICTURE_S = 50.0  # without a picture, while something comes: the machine is busy, or the film is damaged
WAIT_S = 1.0


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


class Connection:
    """One connection. Its thread connects and decodes, and keeps the newest frame until somebody takes it.

    `reason`: why it is over. `is_silent`: it was given up without one byte of a film.
    """

    def __init__(self, plan: WatchPlan, job: DecodeJob, stream: Stream | None) -> None:
        self._plan, self._job, self._stream = plan, job, stream
        self.num_passed_over, self.reason = 0, ""
        self.error: SourceError | ImageError | None = None
        self._frame: Frame | None = None
        self._end: End | None = None
        self.is_stopped = self.is_silent = False
        self._opened_at: float | None = None
        self._shown_at: float | None = None  # the newest frame
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

    @property
    def waits_s(self) -> float:
        """For how long it is connected without a first frame; 0: it has one, or is not connected yet."""
        return time.monotonic() - self._opened_at if self._opened_at and not self._shown_at else 0.0

    @property
    def num_bytes(self) -> int | None:
        """How much has come; None: nobody can say."""
        arrivals = self._stream.feed.arrivals if self._stream else None
        return arrivals.num_bytes if arrivals else None

    def is_stalled(self) -> bool:
        """Say whether it is to be given up: nothing comes, or no frame although something does. `reason` says which."""
        if self._opened_at is None or self._stream is None:
            return False  # connecting has time limits of its own
        now, arrivals = time.monotonic(), self._stream.feed.arrivals
        without_s = now - (self._shown_at or self._opened_at)
        stall_s = self._plan.stall_s + (self._plan.sampling.every_s if self._shown_at else 0.0)
        # What has come before the first frame may still wait for the decoder, whose start takes long on a busy machine.
        is_plain = arrivals and bool(self._shown_at or not arrivals.num_bytes)
        if arrivals and is_plain and min(without_s, arrivals.quiet_s) > stall_s:
            self.is_silent = not arrivals.num_bytes
            why = "it is connected, but sends nothing" if self.is_silent else "it sends nothing any more"
            self.reason = self.reason or f"no frame for {stall_s:.0f} s: {why}"
            return True
        limit_s = max(NO_PICTURE_S, self._plan.stall_s) + self._plan.sampling.every_s
        if without_s > limit_s:
            self.reason = self.reason or f"no frame for {limit_s:.0f} s, though something came"
        return without_s > limit_s

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
            self._opened_at = time.monotonic()
            for found in () if self.is_stopped else self._player.play(job):
                if self.is_stopped:
                    break
                if isinstance(found, Frame):
                    with self._news:
                        self.num_passed_over += self._frame is not None
                        self._frame, self._shown_at = found, time.monotonic()
                        self._news.notify_all()
                elif isinstance(found, End):
                    end = found
        finally:
            stream.feed.close()
        if failure := stream.feed.failure:
            self.error, end = failure, End(failure.reason_code, failure.found)
        return end
