"""Collects the images of many requests into batches for the network. Images are decoded in parallel.

An image that arrives alone does not wait for others. While the queue stands, the newest goes first: its client is the
likeliest to be there still. What nobody waits for any more is dropped before it is decoded, and before the network.
All methods belong to one event loop.
"""

import asyncio
import contextlib
import math
import os
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from visionloop.data.images import UInt8Array
from visionloop.errors import ImageError, VisionLoopError
from visionloop.predictor import FloatArray
from visionloop.records import Prediction
from visionloop.serving.swap import ServedModel

STANDING_S = 0.1  # the queue stands when its oldest image has waited so long
MAX_RETRY_S = 60
MAX_DECODERS = 8  # each may hold a whole image in memory, about nine bytes for each of its pixels


class QueueFull(VisionLoopError, RuntimeError):
    """Too many images are waiting. The same request can succeed a moment later."""

    transient = True
    status = 503

    def __init__(self, found: str, expected: str, *, reason_code: str = "busy", retry_after_s: int = 1) -> None:
        super().__init__("server", found, expected, f"Try again in {retry_after_s} s.")
        self.reason_code, self.headers = reason_code, {"Retry-After": str(retry_after_s)}


@dataclass(frozen=True)
class Timing:
    """How long an image waited, for decoder and network together, was decoded, and was in the network, with others."""

    queue_ms: float | None = None
    decode_ms: float | None = None
    network_ms: float | None = None


@dataclass(frozen=True, kw_only=True)
class Answer(Prediction):
    """The answer for one image, with the embedding (d,) that it was made from, and what the log wants to know.

    `distance` is None where the card has no rule for it, `quality` where nobody measured. `cached`: the answer was
    known from an equal image.
    """

    embedding_d: FloatArray
    distance: float | None = None
    timing: Timing = Timing()
    quality: Mapping[str, float] | None = None
    cached: bool = False


@dataclass(frozen=True)
class _Decoded:
    image_hwc: UInt8Array
    seconds: float
    quality: Mapping[str, float] | None


@dataclass(frozen=True)
class _Waiting:
    model: ServedModel
    decoded: _Decoded
    taken_at: float
    answer: "asyncio.Future[Answer]"


@dataclass(frozen=True)
class _Turn:
    """The place of an image in front of the decoders."""

    taken_at: float
    given: "asyncio.Future[None]"


class Batcher:
    """A bounded queue in front of the network. `start` and `stop` it inside the event loop that uses it."""

    def __init__(
        self,
        *,
        max_batch: int = 32,
        max_queue: int = 256,
        max_pixels: int | None = None,
        max_wait_s: float = 0.004,
        max_batch_s: float = 0.1,
        on_batch: Callable[[int], None] = lambda size: None,
        measure: Callable[[UInt8Array], Mapping[str, float] | None] = lambda image_hwc: None,
    ) -> None:
        """Wait up to `max_wait_s` only while other images are being decoded. `on_batch` is called with each size.

        `measure` is called with each decoded image, in a thread; what it returns is the answer's `quality`.

        A batch is so small that it takes about `max_batch_s` at most, by what was measured: longer ones answer many
        clients late, and are hardly faster for an image.
        """
        self.max_batch, self.max_queue, self.max_pixels, self.max_wait_s = max_batch, max_queue, max_pixels, max_wait_s
        self._on_batch, self._measure_image = on_batch, measure
        self._max_batch_s = max_batch_s
        self._turns: deque[_Turn] = deque()
        self._ready: deque[_Waiting] = deque()
        self._image_s = self._network_s = 0.0  # measured, for an image: from queue to answer, and in the network
        self._finished_at = 0.0
        self._busy_since: float | None = None
        self._changed = asyncio.Event()
        self._tasks: set[asyncio.Task[Answer | ImageError]] = set()
        self._decoding = 0
        self._closed = True

    @property
    def depth(self) -> int:
        """The number of images that were accepted and have no answer yet."""
        return len(self._tasks)

    @property
    def drain_s(self) -> float:
        """How long the images take that wait now, by the measured rate."""
        return self.depth * self._image_s

    def is_stuck(self, limit_s: float) -> bool:
        """Say whether the network has been busy with one batch for so long, or nobody hands it batches any more."""
        if self._closed:
            return False
        since = self._busy_since
        return self._worker.done() or (since is not None and asyncio.get_running_loop().time() - since > limit_s)

    def start(self) -> None:
        """Make the threads and begin to work."""
        # One core is left for the network and the event loop: with decoding on all cores the server is slower.
        self._free = max(1, min((os.cpu_count() or 1) - 1, MAX_DECODERS))
        self._decoders = ThreadPoolExecutor(self._free, thread_name_prefix="decode")
        self._runner = ThreadPoolExecutor(1, thread_name_prefix="network")
        self._worker = asyncio.create_task(self._work())
        self._closed = False

    async def stop(self) -> None:
        """Accept no more images, answer those that were accepted, end the threads."""
        self._closed = True
        if self._tasks:
            await asyncio.wait(self._tasks)
        self._worker.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._worker
        self._decoders.shutdown()
        self._runner.shutdown()

    async def predict(
        self, model: ServedModel, images: Sequence[bytes], *, limit_s: float = math.inf
    ) -> list[Answer | ImageError]:
        """Answer for encoded images, all with one model: a prediction, or what is wrong with that image.

        If the caller is cancelled, its images leave the queue at once.

        Raises:
            QueueFull: not all of them fit in the queue now, or would be answered within `limit_s`; none was taken.
        """
        if self._closed or self.depth + len(images) > self.max_queue:
            found = "stops" if self._closed else f"has {self.depth} images waiting"
            raise self.refuse(found, f"at most {self.max_queue} with yours")
        if self.depth and self.drain_s + len(images) * self._image_s > limit_s:
            raise self.refuse(f"has images waiting for {self.drain_s:.1f} s", f"at most {limit_s:.1f} s with yours")
        tasks = [asyncio.create_task(self._answer(model, data)) for data in images]
        for task in tasks:
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        try:
            await asyncio.wait(tasks)
        except asyncio.CancelledError:
            for task in tasks:
                task.cancel()
            raise
        return [task.result() for task in tasks]

    def refuse(self, found: str, expected: str, reason_code: str = "busy") -> QueueFull:
        """Return the error that says when the images that wait now will be answered."""
        retry_after_s = max(1, min(MAX_RETRY_S, math.ceil(self.drain_s)))
        return QueueFull(found, expected, reason_code=reason_code, retry_after_s=retry_after_s)

    async def _answer(self, model: ServedModel, data: bytes) -> Answer | ImageError:
        loop = asyncio.get_running_loop()
        taken_at = loop.time()
        turn = _Turn(taken_at, loop.create_future())
        self._turns.append(turn)
        self._give_turns()
        try:
            await turn.given
        except asyncio.CancelledError:
            if turn.given.done() and not turn.given.cancelled():
                self._end_decoding()
            raise
        try:
            decoded = await loop.run_in_executor(self._decoders, self._decode, model, data)
        except ImageError as exc:
            return exc
        finally:
            self._end_decoding()
        answer: asyncio.Future[Answer] = loop.create_future()
        self._ready.append(_Waiting(model, decoded, taken_at, answer))
        try:
            return await answer
        finally:
            self._give_turns()

    def _give_turns(self) -> None:
        """Let images be decoded: no more at a time than there are decoders, and not far ahead of the network."""
        waiting = sum(not one.answer.done() for one in self._ready)
        while self._free and waiting + self._decoding < 2 * self._choose_size() + 1:
            while self._turns and self._turns[0].given.done():
                self._turns.popleft()
            if not self._turns:
                return
            turn = _pick(self._turns)
            if not turn.given.done():
                turn.given.set_result(None)
                self._free -= 1
                self._decoding += 1

    def _end_decoding(self) -> None:
        self._free += 1
        self._decoding -= 1
        self._changed.set()
        self._give_turns()

    def _choose_size(self) -> int:
        """Return how many images the next batch may have."""
        return (
            max(1, min(self.max_batch, int(self._max_batch_s / self._network_s))) if self._network_s else self.max_batch
        )

    def _decode(self, model: ServedModel, data: bytes) -> _Decoded:
        started = time.monotonic()
        image_hwc = model.predictor.decode(data, "image", max_pixels=self.max_pixels)
        seconds = time.monotonic() - started
        return _Decoded(image_hwc, seconds, self._measure_image(image_hwc))

    async def _work(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            batch = await self._collect()
            self._on_batch(len(batch))
            self._busy_since = started_at = loop.time()
            try:
                predictions = await loop.run_in_executor(self._runner, _run, batch)
            except Exception as exc:  # passed on to the callers; the worker goes on
                for waiting in batch:
                    if not waiting.answer.done():
                        waiting.answer.set_exception(exc)
                continue
            finally:
                self._busy_since = None
            self._measure(batch, started_at, loop.time())
            for waiting, prediction in zip(batch, predictions, strict=True):
                if not waiting.answer.done():
                    waiting.answer.set_result(prediction)

    def _measure(self, batch: Sequence[_Waiting], started_at: float, now: float) -> None:
        begun_at = max(self._finished_at, min(waiting.taken_at for waiting in batch))
        self._image_s = _smooth(self._image_s, (now - begun_at) / len(batch))
        self._network_s = _smooth(self._network_s, (now - started_at) / len(batch))
        self._finished_at = now

    async def _collect(self) -> list[_Waiting]:
        """Wait for an image, then up to `max_wait_s` for those being decoded. Return a batch for one model."""
        while not (batch := await self._take_batch()):
            pass
        return batch

    async def _take_batch(self) -> list[_Waiting]:
        while not self._ready:
            await self._wait_for_change()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self.max_wait_s):
                while self._decoding and len(self._ready) < self._choose_size():
                    await self._wait_for_change()
        size, others = self._choose_size(), deque[_Waiting]()
        batch: list[_Waiting] = []
        while self._ready and len(batch) < size:
            one = _pick(self._ready)
            if not batch or one.model is batch[0].model:
                batch += [] if one.answer.done() else [one]
            else:
                others.append(one)
        self._ready.extendleft(reversed(others))
        self._give_turns()
        return batch

    async def _wait_for_change(self) -> None:
        self._changed.clear()
        await self._changed.wait()


_Queued = TypeVar("_Queued", _Turn, _Waiting)


def _pick(queue: deque[_Queued]) -> _Queued:
    """Take the oldest, or the newest while the queue stands."""
    standing = asyncio.get_running_loop().time() - queue[0].taken_at > STANDING_S
    return queue.pop() if standing else queue.popleft()


def _smooth(before: float, value: float) -> float:
    return 0.8 * before + 0.2 * value if before else value


def _run(batch: Sequence[_Waiting]) -> list[Answer]:
    predictor, started = batch[0].model.predictor, time.monotonic()
    outputs = predictor.run(np.stack([waiting.decoded.image_hwc for waiting in batch]))
    network_ms = 1000 * (time.monotonic() - started)
    distances = [None] * len(batch) if outputs.distance_n is None else outputs.distance_n.tolist()
    return [
        Answer(
            **vars(prediction),
            embedding_d=embedding_d,
            distance=distance,
            timing=_make_timing(waiting, started, network_ms),
            quality=waiting.decoded.quality,
        )
        for waiting, prediction, embedding_d, distance in zip(
            batch, predictor.answer(outputs), outputs.embedding_nd, distances, strict=True
        )
    ]


def _make_timing(waiting: _Waiting, started: float, network_ms: float) -> Timing:
    decode_ms = 1000 * waiting.decoded.seconds
    return Timing(max(0.0, 1000 * (started - waiting.taken_at) - decode_ms), decode_ms, network_ms)
