"""Several streams, watched at once by one model: a thread for each, and the frames that wait are answered together.

Each stream keeps its newest frame alone, and asks again when it has its answer. So a network that is too slow for all
passes over frames of those that send the most, memory is bounded, and one that hangs holds no other up. Their lines
come through one queue: while nobody takes them the streams wait, and pass their frames over.
"""

import queue
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from visionloop.data.images import UInt8Array
from visionloop.errors import SHOWN, BusyError, SourceError
from visionloop.ingest.video.cameras import Stream, hide_login, is_camera
from visionloop.predict.connection import WatchPlan
from visionloop.predict.lines import Line, Outbox, describe_line
from visionloop.predict.live import TICK_S, StreamEnded, Watch
from visionloop.predictor import Predictor, choose_batch_size
from visionloop.records import Card, Prediction
from visionloop.video.player import check_installed

MOST_LINES = 256  # that wait to be taken
DRAIN_S = 5.0
_NAMED = re.compile(r"(\w[\w. -]{0,63})=(?=[A-Za-z][A-Za-z0-9+.-]*://|/dev/|\$\{)(.+)", re.DOTALL)


def is_stream(text: str) -> bool:
    """Say whether a text names a stream, ADDRESS or NAME=ADDRESS, and no file that is there."""
    return (is_camera(text) or "://" in text or _NAMED.fullmatch(text) is not None) and not Path(text).is_file()


def name_streams(texts: Sequence[str]) -> list[tuple[str, str]]:
    """Return (name, address) of each: NAME=ADDRESS, or an address that is called as it is shown.

    Raises:
        SourceError: a stream is named twice, two would be shown alike, or a name cannot be one.
    """
    found: dict[str, str] = {}
    for text in texts:
        match = _NAMED.fullmatch(text)
        name, path = match.groups() if match else ("", text)
        shown = name or hide_login(path)
        if not is_camera(path):
            expected = "ADDRESS or NAME=ADDRESS, a name of letters, digits, spaces and . _ -"
            raise SourceError(shown, "is no stream", expected)
        if path in found.values():
            raise SourceError(shown, "is named twice", "each stream once")
        if shown in found:
            todo = "Write NAME=ADDRESS for each."
            raise SourceError(shown, "would be the name of two streams", "names that differ", todo)
        found[shown] = path
    return list(found.items())


class Answerer:
    """One network for the frames of several threads: those that wait when it is free are answered in one batch."""

    def __init__(self, predictor: Predictor) -> None:
        self._predictor, self._most = predictor, choose_batch_size(predictor.card.image_size)
        self._lock, self._network = threading.Lock(), threading.Lock()
        self._waiting: list[tuple[UInt8Array, Future[Prediction]]] = []

    @property
    def card(self) -> Card:
        return self._predictor.card

    @property
    def digest(self) -> str:
        """The model that answers."""
        return self._predictor.digest

    def answer(self, jpeg: bytes) -> Prediction:
        """Decode a frame, in the caller's thread, and answer for it. Raises ImageError."""
        image_hwc, answer = self._predictor.decode(jpeg, "frame"), Future[Prediction]()
        with self._lock:
            self._waiting.append((image_hwc, answer))
        while not answer.done():
            with self._network:  # who gets in here answers for all that wait, unless that was done meanwhile
                if not answer.done():
                    self._answer_waiting()
        return answer.result()

    def _answer_waiting(self) -> None:
        with self._lock:
            batch, self._waiting = self._waiting[: self._most], self._waiting[self._most :]
        try:
            found = self._predictor.answer(self._predictor.run(np.stack([image_hwc for image_hwc, _ in batch])))
        except Exception as exc:  # each thread learns of it
            for _, answer in batch:
                answer.set_exception(exc)
            return
        for (_, answer), one in zip(batch, found, strict=True):
            answer.set_result(one)


@dataclass
class Followed:
    """One of several streams, and what became of it. `name` is that of the model's workspace, for events.

    `failure` ended it while the others go on; `told` is what people should know of its webhook.
    """

    watch: Watch
    name: str
    open_box: Callable[[str], Outbox] | None = None
    box: Outbox | None = None
    failure: Exception | None = None
    told: list[str] = field(default_factory=list)
    end: Line | None = None
    is_over: bool = False

    @property
    def shown(self) -> str:
        return self.watch.plan.shown

    @property
    def has_failed(self) -> bool:
        """Whether it has shown nothing, and at least one try is over."""
        return not self.watch.num_answered and bool(self.failure or self.watch.problem)

    def describe(self) -> str:
        """Return what it came to, in one line."""
        if isinstance(self.failure, SourceError | BusyError):
            return f"{self.shown}: {self.failure.found}"
        if self.has_failed or self.end is None:
            return f"{self.shown}: {self.watch.problem or 'no frame'}"
        return "; ".join([f"{self.shown}: {describe_line(self.end)}", *self.told])

    def follow(self, opened: Stream | None, put: "Callable[[tuple[Followed, Line | None]], None]") -> None:
        """Watch it to its end, in a thread of its own; None is the last that is put."""
        try:
            self.box = self.open_box(self.shown) if self.open_box else None
            for line in self.watch.run(opened):
                self._tell(line, put)
        except Exception as exc:  # `watch_all` raises what is not this stream's own fault
            self.failure = exc
        try:
            for line in self.watch.end():  # whatever has happened, the camera is let go
                self._tell(line, put)
            self.told = self.box.close() if self.box else []
        except Exception as exc:
            self.failure = self.failure or exc
        put((self, None))

    def _tell(self, line: Line | None, put: "Callable[[tuple[Followed, Line | None]], None]") -> None:
        if line is None:
            return
        self.end = line if line["kind"] == "end" else None
        if self.box:
            self.box.tell(self.name, line)
        put((self, line))


def follow_all(
    plans: Sequence[WatchPlan], predictor: Predictor, name: str, open_box: Callable[[str], Outbox] | None
) -> list[Followed]:
    """Make the watches of several streams, for one network. `open_box` opens the outbox of the stream of a name.

    Raises:
        SourceError: what decodes is not installed.
    """
    check_installed(plans[0].shown)
    answerer = Answerer(predictor)
    return [Followed(Watch(plan, answerer), name, open_box) for plan in plans]


def watch_all(streams: Sequence[Followed], opened: Stream | None = None) -> Iterator[tuple[Followed, Line] | None]:
    """Yield the lines of all streams as they come, and None now and then, until all have ended.

    `opened`: the one stream, already connected to. One that has shown nothing is not waited for when the others are
    through.

    Raises:
        VisionLoopError: none of them shows anything; the first one's reason. DiskError: an event could not be kept.
    """
    news: queue.Queue[tuple[Followed, Line | None]] = queue.Queue(MOST_LINES)
    for one in streams:
        threading.Thread(target=one.follow, args=(opened, news.put), daemon=True, name=one.shown).start()
    try:
        while any(not one.is_over for one in streams):
            found = _take(news)
            _check(streams)
            yield found
    finally:
        _let_go(streams, news)


def _take(news: "queue.Queue[tuple[Followed, Line | None]]") -> tuple[Followed, Line] | None:
    try:
        one, line = news.get(timeout=TICK_S)
    except queue.Empty:
        return None
    one.is_over = line is None
    return (one, line) if line else None


def _check(streams: Sequence[Followed]) -> None:
    """Raise what ends them all; stop those that show nothing once the others are through."""
    for one in streams:
        if one.is_over and one.failure and not isinstance(one.failure, SourceError | BusyError):
            raise one.failure
    if all(one.has_failed for one in streams):
        raise _make_error(streams)
    is_through = any(one.is_over and not one.has_failed for one in streams)
    if is_through and all(one.is_over or one.has_failed or one.watch.is_silent for one in streams):
        for one in streams:
            one.watch.stop("limit")


def _make_error(streams: Sequence[Followed]) -> Exception:
    """Return why nothing is watched, when all have failed."""
    first, *others = streams
    if first.failure and (not others or not isinstance(first.failure, StreamEnded)):
        return first.failure
    why = [one.describe() for one in others[: SHOWN - 1]] + (["..."] if len(streams) > SHOWN else [])
    found = "; ".join([first.describe().removeprefix(f"{first.shown}: "), *why])
    return StreamEnded(first.shown, found, "a video stream", first.watch.plan.todo)


def _let_go(streams: Sequence[Followed], news: "queue.Queue[tuple[Followed, Line | None]]") -> None:
    """End the threads that still run: nobody takes their lines any more."""
    for one in streams:
        one.watch.stop("stopped")
    for _ in range(round(DRAIN_S / TICK_S)):
        while any(not one.is_over for one in streams) and not news.empty():
            _take(news)
        if all(one.is_over for one in streams):
            return
        _take(news)
