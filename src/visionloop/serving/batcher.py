"""Collects the images of many requests into batches for the network. Images are decoded in parallel.

An image that arrives alone does not wait for others. All methods belong to one event loop.
"""

import asyncio
import contextlib
import os
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from visionloop.data.images import UInt8Array
from visionloop.errors import ImageError, VisionLoopError
from visionloop.predictor import FloatArray
from visionloop.records import Prediction
from visionloop.serving.swap import ServedModel

MAX_DECODERS = 8  # each may hold a whole image in memory, about nine bytes for each of its pixels


class QueueFull(VisionLoopError, RuntimeError):
    """Too many images are waiting. The same request can succeed a moment later."""

    transient = True
    status, reason_code = 503, "busy"


@dataclass(frozen=True, kw_only=True)
class Answer(Prediction):
    """The answer for one image, with the embedding (d,) that it was made from."""

    embedding_d: FloatArray


@dataclass(frozen=True)
class _Waiting:
    model: ServedModel
    image_hwc: UInt8Array
    answer: "asyncio.Future[Answer]"


class Batcher:
    """A bounded queue in front of the network. `start` and `stop` it inside the event loop that uses it."""

    def __init__(
        self,
        *,
        max_batch: int = 32,
        max_queue: int = 256,
        max_pixels: int | None = None,
        max_wait_s: float = 0.004,
        on_batch: Callable[[int], None] = lambda size: None,
    ) -> None:
        """Wait up to `max_wait_s` only while other images are being decoded. `on_batch` is called with each size."""
        self.max_batch, self.max_queue, self.max_pixels, self.max_wait_s = max_batch, max_queue, max_pixels, max_wait_s
        self._on_batch = on_batch
        self._ready: deque[_Waiting] = deque()
        self._changed = asyncio.Event()
        self._tasks: set[asyncio.Task[Answer | ImageError]] = set()
        self._decoding = 0
        self._closed = True

    @property
    def depth(self) -> int:
        """The number of images that were accepted and have no answer yet."""
        return len(self._tasks)

    def start(self) -> None:
        """Make the threads and begin to work."""
        # One core is left for the network and the event loop: with decoding on all cores the server is slower.
        decoders = max(1, min((os.cpu_count() or 1) - 1, MAX_DECODERS))
        self._decoders = ThreadPoolExecutor(decoders, thread_name_prefix="decode")
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

    async def predict(self, model: ServedModel, images: Sequence[bytes]) -> list[Answer | ImageError]:
        """Answer for encoded images, all with one model: a prediction, or what is wrong with that image.

        If the caller is cancelled, its images are still finished, and free their places in the queue then.

        Raises:
            QueueFull: not all of them fit in the queue now; none was taken.
        """
        if self._closed or self.depth + len(images) > self.max_queue:
            found = "stops" if self._closed else f"has {self.depth} images waiting"
            raise QueueFull("server", found, f"at most {self.max_queue} with yours", "Try again in a moment.")
        tasks = [asyncio.create_task(self._answer(model, data)) for data in images]
        for task in tasks:
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        await asyncio.wait(tasks)
        return [task.result() for task in tasks]

    async def _answer(self, model: ServedModel, data: bytes) -> Answer | ImageError:
        loop = asyncio.get_running_loop()
        self._decoding += 1
        try:
            image_hwc = await loop.run_in_executor(self._decoders, self._decode, model, data)
        except ImageError as exc:
            return exc
        finally:
            self._decoding -= 1
            self._changed.set()
        answer: asyncio.Future[Answer] = loop.create_future()
        self._ready.append(_Waiting(model, image_hwc, answer))
        return await answer

    def _decode(self, model: ServedModel, data: bytes) -> UInt8Array:
        return model.predictor.decode(data, "image", max_pixels=self.max_pixels)

    async def _work(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            batch = await self._collect()
            self._on_batch(len(batch))
            try:
                predictions = await loop.run_in_executor(self._runner, _run, batch)
            except Exception as exc:  # passed on to the callers; the worker goes on
                for waiting in batch:
                    waiting.answer.set_exception(exc)
                continue
            for waiting, prediction in zip(batch, predictions, strict=True):
                waiting.answer.set_result(prediction)

    async def _collect(self) -> list[_Waiting]:
        """Wait for an image, then up to `max_wait_s` for those being decoded. Return a batch for one model."""
        while not self._ready:
            await self._wait_for_change()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self.max_wait_s):
                while self._decoding and len(self._ready) < self.max_batch:
                    await self._wait_for_change()
        model = self._ready[0].model
        batch: list[_Waiting] = []
        while self._ready and len(batch) < self.max_batch and self._ready[0].model is model:
            batch.append(self._ready.popleft())
        return batch

    async def _wait_for_change(self) -> None:
        self._changed.clear()
        await self._changed.wait()


def _run(batch: Sequence[_Waiting]) -> list[Answer]:
    predictor = batch[0].model.predictor
    outputs = predictor.run(np.stack([waiting.image_hwc for waiting in batch]))
    predictions = predictor.answer(outputs)
    return [Answer(**vars(p), embedding_d=e) for p, e in zip(predictions, outputs.embedding_nd, strict=True)]
