"""The threads that read, check and store: a batch at a time, as many at once as there is to wait for.

There are as many threads as cores, and more of them while they wait for a network; no more decode at once than there
are cores. Work goes out in batches of some hundredths of a second, and no further ahead than the threads can hold: a
long source fills no memory but that of its results.
"""

import time
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass, replace
from queue import SimpleQueue
from threading import Event, Semaphore, Thread

from visionloop.data.manifest import make_image_key
from visionloop.errors import ImageError, VisionLoopError
from visionloop.ingest.inspect import Facts, inspect_bytes
from visionloop.ingest.sources import Item
from visionloop.parallel import count_cores
from visionloop.params import Ingest
from visionloop.records import Rejected
from visionloop.store import ObjectStore

MAX_READERS = 32
_BATCH_S = 0.03
_MAX_BATCH = 32
_GROUP_BYTES = 8_000_000
_BUSY = 0.5

Batch = list[tuple[int, Item]]


@dataclass(slots=True)
class Outcome:
    """What came of one item. `is_lasting`: it is a verdict on the bytes, and stands as long as the stamp does."""

    ordinal: int
    item: Item
    found: Facts | Rejected
    is_lasting: bool = True


@dataclass(slots=True)
class _Done:
    """A batch that was worked on: what came of it, its time on the clock and on a core, and what stopped it."""

    outcomes: list[Outcome]
    seconds: float
    cpu_s: float
    error: BaseException | None


class Crew:
    """Threads with batches on their way to and from them. `on_outcomes` is called by the thread that gives the work.

    Everything that was stored is handed to `on_outcomes`, also when an error stopped the rest.
    """

    def __init__(self, checker: "Checker", on_outcomes: Callable[[list[Outcome]], None], *, num_writers: int) -> None:
        self._checker = checker
        self._on_outcomes = on_outcomes
        self._todo: SimpleQueue[Batch | None] = SimpleQueue()
        self._done: SimpleQueue[_Done] = SimpleQueue()
        self._threads: list[Thread] = []
        self._num_cores = self._num_wanted = count_cores()
        self._max_threads = max(num_writers, MAX_READERS)
        self._batch: Batch = []
        self._batch_size = 1
        self._num_out = 0

    def take(self, ordinal: int, item: Item) -> None:
        """Take an item on; wait while enough of them are on their way. Raises what stopped an earlier one."""
        self._batch.append((ordinal, item))
        if len(self._batch) >= self._batch_size:
            self._send()

    def finish(self) -> None:
        """Wait until everything is done. Raises what stopped it."""
        if self._batch:
            self._send()
        while self._num_out:
            self._receive()

    def stop(self) -> None:
        """Let the threads go: what they have begun they end, what they have not is dropped."""
        self._checker.stopped.set()
        for _ in self._threads:
            self._todo.put(None)
        for thread in self._threads:
            thread.join()
        while not self._done.empty():
            self._on_outcomes(self._done.get().outcomes)

    def _send(self) -> None:
        if len(self._threads) < min(self._max_threads, self._num_wanted, self._num_out + 1):
            thread = Thread(target=self._work, name=f"ingest-{len(self._threads)}", daemon=True)
            thread.start()
            self._threads.append(thread)
        self._todo.put(self._batch)
        self._batch = []
        self._num_out += 1
        while self._num_out > 2 * len(self._threads) or not self._done.empty():
            self._receive()

    def _receive(self) -> None:
        done = self._done.get()
        self._num_out -= 1
        self._on_outcomes(done.outcomes)
        if done.error is not None:
            raise done.error
        each_s = done.seconds / max(1, len(done.outcomes))
        self._batch_size = min(_MAX_BATCH, max(1, int(_BATCH_S / max(each_s, 1e-6))))
        num_threads = len(self._threads)
        if num_threads == self._num_wanted and done.cpu_s * num_threads < _BUSY * done.seconds * self._num_cores:
            self._num_wanted += 1  # they wait more than they work

    def _work(self) -> None:
        while (batch := self._todo.get()) is not None:
            started, cpu_started = time.perf_counter(), time.thread_time()
            outcomes: list[Outcome] = []
            error = None
            try:
                self._checker.check(batch, outcomes)
            except BaseException as exc:  # handed on to the thread that gives the work
                error = exc
            self._done.put(_Done(outcomes, time.perf_counter() - started, time.thread_time() - cpu_started, error))


class Checker:
    """Read, check and store a batch of items; by many threads at once.

    With `verify` an object that is there already is compared with what was read, and put right. What was `forgotten`
    is neither stored nor remembered.
    """

    def __init__(
        self, store: ObjectStore, limits: Ingest, *, verify: bool, forgotten: Container[str] = frozenset()
    ) -> None:
        self.stopped = Event()
        self._store = store
        self._limits = limits
        self._verify = verify
        self._forgotten = forgotten
        self._decoding = Semaphore(count_cores())

    def check(self, batch: Batch, outcomes: list[Outcome]) -> None:
        """Add what comes of a batch to `outcomes`. Raises StoreError, and what a source raises as a whole."""
        held: list[tuple[int, Item, bytes]] = []
        num_bytes = 0
        for ordinal, item in batch:
            if self.stopped.is_set():
                return
            data = self._read(item)
            if isinstance(data, Rejected):
                outcomes.append(Outcome(ordinal, item, data, is_lasting=data.code == "too_large"))
                continue
            held.append((ordinal, item, data))
            num_bytes += len(data)
            if num_bytes > _GROUP_BYTES:
                self._inspect(held, outcomes)
                held, num_bytes = [], 0
        self._inspect(held, outcomes)

    def _read(self, item: Item) -> bytes | Rejected:
        try:
            return item.read(self._limits.max_file_bytes)
        except ImageError as exc:
            return _reject(item, exc)
        except (VisionLoopError, MemoryError):
            raise
        except Exception as exc:  # a source of one's own, that fails for one image
            return Rejected(item.origin, "unreadable", f"cannot be read ({type(exc).__name__})")

    def _inspect(self, held: Sequence[tuple[int, Item, bytes]], outcomes: list[Outcome]) -> None:
        with self._decoding:
            judged = [(self._judge(ordinal, item, data), data) for ordinal, item, data in held]
        for outcome, data in judged:
            if isinstance(outcome.found, Facts):
                if self.stopped.is_set():
                    return
                if outcome.found.sha256 in self._forgotten:
                    outcomes.append(replace(outcome, is_lasting=False))
                    continue
                self._put(make_image_key(outcome.found.sha256), data)
            outcomes.append(outcome)

    def _judge(self, ordinal: int, item: Item, data: bytes) -> Outcome:
        try:
            return Outcome(ordinal, item, inspect_bytes(data, item.origin, max_pixels=self._limits.max_pixels))
        except ImageError as exc:
            return Outcome(ordinal, item, _reject(item, exc))
        except MemoryError:
            raise
        except Exception as exc:  # a decoder that fails in its own way costs this image, not the run
            found = Rejected(item.origin, "unreadable", f"cannot be decoded ({type(exc).__name__})")
            return Outcome(ordinal, item, found, is_lasting=False)

    def _put(self, key: str, data: bytes) -> None:
        if not self._store.add(key, data) and self._verify and self._store.get(key) != data:
            self._store.put(key, data)


def _reject(item: Item, exc: ImageError) -> Rejected:
    return Rejected(item.origin, exc.reason_code, f"{exc.found}; expected {exc.expected}")
