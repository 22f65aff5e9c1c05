"""Collects the images of many requests into batches for the network. Images are decoded in parallel.

An image that arrives alone does not wait for others. Where clients leave, and the oldest image has waited for long, the
newest goes first: its client is the likeliest to be there still. What nobody waits for any more is dropped before it is
decoded, and before the network. All methods belong to one event loop.
"""

import asyncio
import contextlib
import hashlib
import math
import time
from collections import deque
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar

import numpy as np

from visionloop.data.encoded import Size
from visionloop.data.images import UInt8Array, load_sized_array
from visionloop.errors import ImageError
from visionloop.serving.answers import Answer, AnswerCache, Timing
from visionloop.serving.body import RequestError
from visionloop.serving.decoding import Decoded, Decoders
from visionloop.serving.swap import ServedModel

MAX_RETRY_S = 60
SPARE_S = 0.05  # of a piece of work in the network's idle time: so long an image may wait for it

ImageInput = bytes | UInt8Array  # an encoded file, or pixels (h, w, 3)


class _Aged(Protocol):
    @property
    def taken_at(self) -> float: ...


_Queued = TypeVar("_Queued", bound=_Aged)
_Result = TypeVar("_Result")


class QueueFull(RequestError):
    """Too many images are waiting. The same request can succeed a moment later."""

    transient, where_from = True, "server"


class Patience:
    """How long clients wait that do not say it, learned from those that left: a queue longer than that helps nobody.

    Each that left makes it shorter by a tenth, down to most of the time that this one waited. Each answer makes it
    longer by a hundredth. So a few that leave change nothing: with one in ten it stays as it is. When nobody has left
    for a second, it soon grows to the longest.
    """

    SHORTEST_S, LONGEST_S = 0.1, 60.0
    CALM_S, GROWTH_OF_A_SECOND = 1.0, 2.5

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._seconds, self._left_at = clock, self.LONGEST_S, clock()

    @property
    def seconds(self) -> float:
        calm_s = min(60.0, max(0.0, self._clock() - self._left_at - self.CALM_S))
        return min(self.LONGEST_S, self._seconds * math.pow(self.GROWTH_OF_A_SECOND, calm_s))

    def note_left(self, waited_s: float) -> None:
        """A client left without an answer."""
        before, lowest = self.seconds, max(self.SHORTEST_S, 0.8 * waited_s)
        self._seconds, self._left_at = max(lowest, 0.9 * before) if before > lowest else before, self._clock()

    def note_answered(self) -> None:
        """A client got its answer."""
        self._seconds = min(self.LONGEST_S, 1.01 * self._seconds)


@dataclass(frozen=True)
class _Decoded:
    image_hwc: UInt8Array
    size: Size
    quality: Mapping[str, float] | None


@dataclass(frozen=True)
class _Waiting:
    """A decoded image. `begun_at`: when it was taken in; of a dear one, whose decoding is no measure, the end of it."""

    model: ServedModel
    sha256: str
    decoded: _Decoded
    taken_at: float
    begun_at: float
    answer: "asyncio.Future[tuple[Answer, float]]"


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
        cache_bytes: int = 0,
        decoders: Callable[[], int] = lambda: 0,
        on_batch: Callable[[int], None] = lambda size: None,
        measure: Callable[[UInt8Array], Mapping[str, float] | None] = lambda image_hwc: None,
    ) -> None:
        """Wait up to `max_wait_s` only while other images are being decoded. `on_batch` is called with each size.

        `measure` is called with each decoded image, in a thread; what it returns is the answer's `quality`.

        A batch is so small that it takes about `max_batch_s` at most, by what was measured: longer ones answer many
        clients late, and are hardly faster for an image. `decoders`: see `Decoders`.
        """
        self.max_batch, self.max_queue, self.max_pixels, self.max_wait_s = max_batch, max_queue, max_pixels, max_wait_s
        self._on_batch, self._measure_image = on_batch, measure
        self._max_batch_s = max_batch_s
        self.patience = Patience()
        self.cache = AnswerCache(cache_bytes)
        self._wanted_decoders = decoders
        self._ready: deque[_Waiting] = deque()
        self._image_s = self._network_s = 0.0  # measured, for an image: from queue to answer, and in the network
        self._finished_at = 0.0
        self._busy_since: float | None = None
        self._spare: asyncio.Future[Any] | None = None
        self._spare_image_s = 0.0
        self._spare_turns = asyncio.Lock()
        self._changed = asyncio.Event()
        self._tasks: set[asyncio.Task[Answer | ImageError]] = set()
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
        return self._worker.done() or (since is not None and time.monotonic() - since > limit_s)

    def start(self) -> None:
        """Make the threads and begin to work."""
        self._decoders = Decoders(self._may_decode, self._changed.set, self._pick, decoders=self._wanted_decoders)
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
        self._decoders.stop()
        self._runner.shutdown()

    async def predict(
        self, model: ServedModel, images: Sequence[ImageInput], *, limit_s: float = math.inf, is_patient: bool = True
    ) -> list[Answer | ImageError]:
        """Answer for images, all with one model: a prediction, or what is wrong with that image.

        An array has the size (h, w, 3) of the model's input already, and is not decoded. If the caller is
        cancelled, its images leave the queue at once. `limit_s`, `is_patient`: see `require_room`.

        Raises:
            QueueFull: not all of them fit in the queue now; none was taken.
        """
        sha256s = [_make_digest(image) for image in images]
        found: list[Answer | ImageError | None] = [self.cache.find(model.predictor, sha256) for sha256 in sha256s]
        missing = [i for i, one in enumerate(found) if one is None]
        if missing:
            self.require_room(len(missing), limit_s, is_patient=is_patient)
            waiting = [self._answer(model, images[i], sha256s[i]) for i in missing]
            for i, one in zip(missing, await self._finish_all(waiting), strict=True):
                found[i] = one
                if isinstance(one, Answer):
                    self.cache.keep(model.predictor, one)
            self.patience.note_answered()
        return [one for one in found if one is not None]

    def require_room(self, number: int = 1, limit_s: float = math.inf, *, is_patient: bool = True) -> None:
        """Raise QueueFull if so many more images do not fit, or would not be answered within `limit_s`.

        `is_patient`: `limit_s` is the client's own word. If not, it is also refused what others did not wait for.
        """
        if self._closed or self.depth + number > self.max_queue:
            found = "stops" if self._closed else f"has {self.depth} images waiting"
            raise self.refuse(found, f"at most {self.max_queue} with yours")
        if not is_patient and self.depth > self._choose_size():  # fewer keep the network busy
            limit_s = min(limit_s, self.patience.seconds)
        if self.depth and self.drain_s + number * self._image_s > limit_s:
            raise self.refuse(f"has images waiting for {self.drain_s:.1f} s", f"at most {limit_s:.1f} s with yours")

    @property
    def spare_size(self) -> int:
        """How many images a piece of spare work may have, by what the pieces before it took."""
        known_s = self._spare_image_s or self._network_s
        return max(1, min(self.max_batch, int(SPARE_S / known_s))) if known_s else 1

    async def decode(self, model: ServedModel, data: bytes) -> UInt8Array:
        """Return an image as the model's input. Raises ImageError."""
        try:
            return (await self._decoders.run(data, lambda: self._load(model, data)[0])).value
        finally:
            self._decoders.give_turns()

    async def run_spare(self, work: Callable[[], _Result], number: int) -> _Result:
        """Run a short piece of work in the network's thread while no image waits for an answer; till then it waits.

        `number` of images are in it, see `spare_size`. Those who want pieces take turns.
        """
        async with self._spare_turns:
            while self._tasks:
                await asyncio.wait(set(self._tasks))
            if self._closed:
                raise self.refuse("stops", "one that goes on")
            started_at = time.monotonic()
            self._spare = running = asyncio.get_running_loop().run_in_executor(self._runner, work)
            result = await asyncio.shield(running)  # whoever gives up leaves the thread busy
            self._finished_at = time.monotonic()
            self._spare_image_s = _smooth(self._spare_image_s, (self._finished_at - started_at) / number)
            return result

    async def _finish_all(
        self, waiting: Sequence[Coroutine[Any, Any, Answer | ImageError]]
    ) -> list[Answer | ImageError]:
        tasks = [asyncio.create_task(one) for one in waiting]
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
        todo, headers = f"Try again in {retry_after_s} s.", {"Retry-After": str(retry_after_s)}
        return QueueFull(found, expected, todo, status=503, reason_code=reason_code, headers=headers)

    async def _answer(self, model: ServedModel, image: ImageInput, sha256: str) -> Answer | ImageError:
        loop = asyncio.get_running_loop()
        taken_at = time.monotonic()
        try:
            decoded = await self._take(model, image)
        except ImageError as exc:
            return exc
        answer: asyncio.Future[tuple[Answer, float]] = loop.create_future()
        begun_at = time.monotonic() if decoded.was_dear else taken_at
        self._ready.append(_Waiting(model, sha256, decoded.value, taken_at, begun_at, answer))
        self._changed.set()
        try:
            made, network_s = await answer
        finally:
            self._decoders.give_turns()
        queue_s = max(0.0, time.monotonic() - taken_at - decoded.seconds - network_s)
        return replace(made, timing=Timing(queue_s, decoded.seconds, network_s))

    async def _take(self, model: ServedModel, image: ImageInput) -> Decoded[_Decoded]:
        """Return an image as the network takes it. Raises ImageError."""
        if isinstance(image, bytes):
            return await self._decoders.run(image, lambda: self._decode(model, image))
        return Decoded(_Decoded(image, (image.shape[1], image.shape[0]), None), 0.0, False)

    def _may_decode(self, number: int) -> bool:
        """Say whether another image may be decoded while so many are: not far ahead of the network."""
        return sum(not one.answer.done() for one in self._ready) + number < 2 * self._choose_size() + 1

    def _choose_size(self) -> int:
        """Return how many images the next batch may have."""
        return (
            max(1, min(self.max_batch, int(self._max_batch_s / self._network_s))) if self._network_s else self.max_batch
        )

    def _decode(self, model: ServedModel, data: bytes) -> _Decoded:
        image_hwc, size = self._load(model, data)
        return _Decoded(image_hwc, size, self._measure_image(image_hwc))

    def _load(self, model: ServedModel, data: bytes) -> tuple[UInt8Array, Size]:
        card = model.predictor.card
        limits = {"max_pixels": card.max_pixels, "max_decoded": self.max_pixels}
        return load_sized_array(data, "image", size_hw=card.image_size, resize=card.resize, **limits)

    async def _work(self) -> None:
        while True:
            await self._finish(await self._collect())  # no name here: it would keep a model that was swapped out

    async def _finish(self, batch: Sequence[_Waiting]) -> None:
        """Run the network on a batch, and give each its answer, or the error."""
        loop = asyncio.get_running_loop()
        self._on_batch(len(batch))
        self._busy_since = time.monotonic()
        if self._spare and not self._spare.done():
            await asyncio.wait((self._spare,))  # else its time would be taken for the network's with this batch
        started_at = time.monotonic()
        try:
            predictions = await loop.run_in_executor(self._runner, _run, batch)
        except Exception as exc:  # passed on to the callers; the worker goes on
            for waiting in batch:
                if not waiting.answer.done():
                    waiting.answer.set_exception(exc)
            return
        finally:
            self._busy_since = None
        now = time.monotonic()
        self._measure(batch, started_at, now)
        for waiting, prediction in zip(batch, predictions, strict=True):
            if not waiting.answer.done():
                waiting.answer.set_result((prediction, now - started_at))

    def _measure(self, batch: Sequence[_Waiting], started_at: float, now: float) -> None:
        begun_at = max(self._finished_at, min(waiting.begun_at for waiting in batch))
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
                while self._decoders.num_decoding and len(self._ready) < self._choose_size():
                    await self._wait_for_change()
        size, others = self._choose_size(), deque[_Waiting]()
        batch: list[_Waiting] = []
        while self._ready and len(batch) < size:
            one = self._pick(self._ready)
            if not batch or one.model is batch[0].model:
                batch += [] if one.answer.done() else [one]
            else:
                others.append(one)
        self._ready.extendleft(reversed(others))
        self._decoders.give_turns()
        return batch

    def _pick(self, queue: deque[_Queued]) -> _Queued:
        """Take the oldest, or the newest if the oldest has waited for half of what clients wait."""
        waited_s = time.monotonic() - queue[0].taken_at
        return queue.pop() if waited_s > self.patience.seconds / 2 else queue.popleft()

    async def _wait_for_change(self) -> None:
        self._changed.clear()
        await self._changed.wait()


def _make_digest(image: ImageInput) -> str:
    """Return the sha256 of a file. That of pixels is never one of a file: both are kept in one cache."""
    data = image if isinstance(image, bytes) else b"pixels" + hashlib.sha256(image.tobytes()).digest()
    return hashlib.sha256(data).hexdigest()


def _smooth(before: float, value: float) -> float:
    return 0.8 * before + 0.2 * value if before else value


def _run(batch: Sequence[_Waiting]) -> list[Answer]:
    predictor = batch[0].model.predictor
    outputs = predictor.run(np.stack([waiting.decoded.image_hwc for waiting in batch]))
    distances = [None] * len(batch) if outputs.distance_n is None else outputs.distance_n.tolist()
    made = zip(batch, predictor.answer(outputs), outputs.embedding_nd, distances, strict=True)
    return [
        Answer(
            **vars(prediction),
            sha256=waiting.sha256,
            embedding_d=embedding_d.copy(),  # a row of the batch would keep the whole batch in memory
            size=waiting.decoded.size,
            distance=distance,
            quality=waiting.decoded.quality,
        )
        for waiting, prediction, embedding_d, distance in made
    ]
