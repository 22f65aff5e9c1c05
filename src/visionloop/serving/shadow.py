"""The shadow: a second model that answers a share of what the champion answered, when nobody waits for anything.

It follows `shadow/NAME/current.json` of the store. Its images wait in a short queue, and are dropped when that is full.
One is answered at a time, after a quiet moment, and in DUTY of the time at most: so not even one request in a hundred
meets it, and the 99th percentile of their times stays. What goes wrong with it is written down, and hurts no answer.
"""

import asyncio
import contextlib
import logging
import random
import secrets
import shutil
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, date, datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from visionloop.bundle import Bundle, download_bundle
from visionloop.data.images import UInt8Array
from visionloop.data.prediction_log import SHADOW, Order, read_order
from visionloop.errors import ServingError, VisionLoopError
from visionloop.predictor import Predictor
from visionloop.records import Prediction
from visionloop.serving.batcher import Batcher
from visionloop.serving.log import Noted
from visionloop.serving.swap import ServedModel, give_memory_back
from visionloop.store import ObjectStore

QUIET_S, DUTY = 0.1, 0.005
MAX_WAITING, MAX_WAITING_BYTES = 64, 32_000_000
MAX_ROWS, MAX_FAILURES, RETRY_S = 5_000, 10, 60.0
GRAPH_TIMES, SPARE_BYTES = 4, 200_000_000  # memory: so many times the graph, and what must stay free
CGROUP = Path("/sys/fs/cgroup")

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Waiting:
    """An image, without the model that answered it: that may be swapped out meanwhile."""

    request_id: str
    at_s: float
    data: bytes


@dataclass(frozen=True)
class _Loaded:
    order: Order
    model: ServedModel


class Shadow:
    """The shadow of one server. `follow` and `flush` are for the thread that follows the ledger, the rest for the loop.

    `num_dropped` images found the queue full, `num_failed` got no usable answer. `problem`: why there is none, though
    somebody wants one.
    """

    def __init__(
        self,
        name: str,
        store: ObjectStore,
        cache_dir: Path,
        *,
        open_model: Callable[[Bundle], Predictor],
        flush_s: float = 30.0,
        draw: random.Random | None = None,
        read_free: Callable[[], int] | None = None,
    ) -> None:
        self._name, self._store, self._cache_dir = name, store, cache_dir
        self._open_model, self._flush_s = open_model, flush_s
        self._draw, self._read_free = draw or random.Random(secrets.randbits(128)), read_free or read_free_bytes
        self._loaded: _Loaded | None = None
        self._order: Order | None = None
        self._refused_until_s = 0.0
        self._waiting: deque[_Waiting] = deque()
        self._waiting_bytes = 0
        self._seen_at_s = self._flushed_at_s = 0.0
        self._server, self._num_parts, self._num_in_a_row = secrets.token_hex(4), 0, 0
        self._rows: deque[dict[str, Any]] = deque(maxlen=MAX_ROWS)
        self._lock = threading.Lock()
        self.num_answered = self.num_dropped = self.num_failed = 0
        self.problem: str | None = None

    @property
    def is_on(self) -> bool:
        """Whether a second model is loaded, and answers."""
        return self._loaded is not None

    def start(self, batcher: Batcher) -> None:
        """Begin to answer, in the event loop of the batcher."""
        self._changed = asyncio.Event()
        self._worker = asyncio.create_task(self._work(batcher))

    async def stop(self) -> None:
        """Answer no more."""
        self._worker.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._worker

    def offer(self, noted: Noted) -> None:
        """Take an answered image, by the share of the order. It waits for nothing."""
        self._seen_at_s = time.monotonic()
        loaded = self._loaded
        if loaded is None or loaded.model.digest == noted.model.digest or self._draw.random() >= loaded.order.share:
            return
        if len(self._waiting) >= MAX_WAITING or self._waiting_bytes + len(noted.data) > MAX_WAITING_BYTES:
            self.num_dropped += 1
            return
        self._waiting.append(_Waiting(noted.request_id, noted.at_s, noted.data))
        self._waiting_bytes += len(noted.data)
        self._changed.set()

    def follow(self) -> None:
        """Take up the order of the store, or its end; send what was answered. Never raises."""
        try:
            order = read_order(self._store, self._name)
            self._obey(None if order is None or order.stopped_at else order)
        except Exception as exc:  # neither a damaged bundle nor a store that is away may end the thread
            self._refuse(exc)
        self.flush(is_last=False)

    def flush(self, *, is_last: bool = True) -> None:
        """Send the rows to the store if it is time, a part for each day. They wait where it is away, the newest."""
        with self._lock:
            rows = list(self._rows)
            self._rows.clear()
        is_due = is_last or time.monotonic() - self._flushed_at_s >= self._flush_s
        days: dict[date, list[dict[str, Any]]] = {}
        for row in rows:
            days.setdefault(row["time"].date(), []).append(row)
        for day, part in days.items():
            try:
                if not is_due:
                    raise TimeoutError
                self._num_parts += 1
                key = f"{part[0]['time']:%H%M%S}-{self._server}-{self._num_parts:06d}"
                self._store.create(SHADOW.make_key(self._name, day, key), SHADOW.encode(part))
                self._flushed_at_s = time.monotonic()
            except Exception as exc:
                with self._lock:
                    self._rows.extendleft(reversed(part[: MAX_ROWS - len(self._rows)]))
                if is_due:
                    log.warning("answers of the shadow cannot be written: %s", type(exc).__name__)

    def _obey(self, order: Order | None) -> None:
        is_to_try_again = bool(self.problem) and self._loaded is None and time.monotonic() >= self._refused_until_s
        if order == self._order and not (order and is_to_try_again):
            self.problem = None if self._loaded else self.problem
            return
        self._order, self._loaded, self.problem = order, None, None
        give_memory_back()
        if order is None:
            shutil.rmtree(self._cache_dir, ignore_errors=True)
            log.info("no shadow any more")
            return
        bundle = download_bundle(self._store, order.bundle, self._cache_dir)
        self._require_memory(bundle)
        self._num_in_a_row = 0
        self._loaded = _Loaded(order, ServedModel(self._open_model(bundle)))
        log.info("%s is the shadow, for a share of %g", order.bundle[:12], order.share)

    def _require_memory(self, bundle: Bundle) -> None:
        needed = GRAPH_TIMES * (bundle.folder / "model.onnx").stat().st_size + SPARE_BYTES
        free = self._read_free()
        if free < needed:
            found = f"{free / 1e6:,.0f} MB of memory are free"
            raise ServingError("shadow", found, f"{needed / 1e6:,.0f} MB for a second model", "Use a smaller one.")

    def _refuse(self, exc: Exception) -> None:
        """Do without a shadow for a while, and say why once."""
        problem = exc.found if isinstance(exc, VisionLoopError) else type(exc).__name__
        if problem != self.problem:
            log.warning("there is no shadow: %s", exc)
        self.problem, self._refused_until_s = problem, time.monotonic() + RETRY_S

    async def _work(self, batcher: Batcher) -> None:
        while True:
            await self._wait_for_quiet(batcher)
            image, loaded = self._waiting.popleft(), self._loaded
            self._waiting_bytes -= len(image.data)
            if loaded is not None:
                busy_s = await self._answer(batcher, loaded, image)
                del loaded  # else a model that was stopped stays in memory
                await asyncio.sleep(busy_s * (1 / DUTY - 1))

    async def _wait_for_quiet(self, batcher: Batcher) -> None:
        """Wait for an image, and until nobody was answered for QUIET_S."""
        while True:
            while not self._waiting:
                self._changed.clear()
                await self._changed.wait()
            quiet_s = time.monotonic() - self._seen_at_s
            if not batcher.depth and quiet_s >= QUIET_S:
                return
            await asyncio.sleep(max(QUIET_S - quiet_s, QUIET_S / 4))

    async def _answer(self, batcher: Batcher, loaded: _Loaded, image: _Waiting) -> float:
        """Answer one image and note it; return how long that kept the server busy, in seconds."""
        row: dict[str, Any] = {
            "request_id": image.request_id,
            "time": datetime.fromtimestamp(image.at_s, UTC),
            "model_digest": loaded.order.bundle,
        }
        started_at_s = time.monotonic()
        try:
            image_hwc = await batcher.decode(loaded.model, image.data)
            busy_s = time.monotonic() - started_at_s
            prediction, network_s = await batcher.run_spare(partial(_run, loaded.model.predictor, image_hwc), 1)
            busy_s += network_s
            row |= {"prediction": prediction.prediction, "confidence": prediction.confidence}
            row["network_ms"] = 1000 * network_s
            self.num_answered, self._num_in_a_row = self.num_answered + 1, 0
        except Exception as exc:  # whatever a second model does: the first one has answered
            row["problem"] = exc.found if isinstance(exc, VisionLoopError) else type(exc).__name__
            busy_s = time.monotonic() - started_at_s
            self.num_failed, self._num_in_a_row = self.num_failed + 1, self._num_in_a_row + 1
            if self._num_in_a_row >= MAX_FAILURES and self._loaded is loaded:
                self._loaded = None
                log.error("the shadow failed %d times in a row and is left alone: %s", MAX_FAILURES, row["problem"])
        with self._lock:
            self._rows.append(row)
        return busy_s


def _run(predictor: Predictor, image_hwc: UInt8Array) -> tuple[Prediction, float]:
    """Return the answer, and how long the network took, in seconds. Raises ServingError."""
    started_at_s = time.monotonic()
    outputs = predictor.run(image_hwc[None])
    network_s = time.monotonic() - started_at_s
    if not np.isfinite(outputs.probs_nk).all():
        raise ServingError("shadow", "its probabilities are not finite", "numbers from 0 to 1")
    return predictor.answer(outputs)[0], network_s


def read_free_bytes() -> int:
    """Return how much memory the process may still take, by the machine and by its cgroup."""
    import psutil

    found = [int(psutil.virtual_memory().available)]
    with contextlib.suppress(OSError, ValueError):  # "max": no limit
        limit, used = (int((CGROUP / f"memory.{name}").read_text("ascii")) for name in ("max", "current"))
        found.append(limit - used)
    return min(found)
