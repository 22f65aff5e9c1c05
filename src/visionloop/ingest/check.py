"""Check and store all that the sources offer, with several readers; results are in the order of the sources.

What the journal knows is not read again. Threads read, check and store the rest; the results keep the order of the
sources, whichever thread is done first.

There are as many threads as cores, and more of them while they wait for a network; at any time at most one image per
core is decoded. Work goes out in batches that take about 0.03 s, at most two batches per thread ahead, so a long source
uses no memory for what waits; results are put down on the disk.
"""

import time
from array import array
from collections import Counter
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from queue import SimpleQueue
from threading import Event, Semaphore, Thread
from typing import Any

import numpy as np

from visionloop.data.manifest import make_image_key
from visionloop.errors import DiskError, ImageError, VisionLoopError
from visionloop.ingest.inspect import Facts, Inspections, inspect_for_store, make_rejected
from visionloop.ingest.journal import SHA256, STAMP, Ahead, Journal, Offers, Row, unpack_row
from visionloop.ingest.sources import Cursor, Item, PassedOver
from visionloop.parallel import count_cores
from visionloop.params import Ingest
from visionloop.records import Rejected
from visionloop.store import ObjectStore

# Example: four images on two cores. The journal knows a.jpg with today's stamp; c.jpg is damaged.
#
#     offered   a.jpg            b.jpg             c.jpg             d.jpg
#     ordinals  0: is known      1: to be read     2: to be read     3: to be read
#     batches   -                [1] to thread 0   [2] to thread 1   [3] waits: two cores, so two threads
#
# Thread 1 is done first: ItemResult(2, c.jpg, Rejected). It took 1 ms, so later batches hold 0.03 s / 1 ms = 30 items.
# Had the threads spent less than half of their time on a core, a third one would start. Thread 1 takes [3]. `settle`
# keeps each result as it comes, here 2, 3, 1, and puts it into the journal; so the next pull reads none of the four. At
# the end: inspected a.jpg, b.jpg, d.jpg; rejected c.jpg; 4 seen, 3 read.
MAX_READERS = 32
KEPT_ROWS = 100_000
_BATCH_S = 0.03
_MAX_BATCH = 32
_GROUP_BYTES = 8_000_000
_BUSY = 0.5
Batch = list[tuple[int, Item]]
# The code of a rejection that may be gone next time: a server was away, a file was locked.
PASSING = "unreadable"


@dataclass(slots=True)
class ItemResult:
    """The result of one item. `is_lasting`: it depends on the bytes alone, so it holds until the stamp changes."""

    ordinal: int
    item: Item
    found: Facts | Rejected
    is_lasting: bool = True


@dataclass(slots=True)
class _Done:
    """A batch that was worked on: its results, the time it took, the time on a core, and the error that stopped it."""

    results: list[ItemResult]
    seconds: float
    cpu_s: float
    error: BaseException | None


class Crew:
    """Threads that work on batches. `on_results` gets everything that was stored, also when an error stopped the rest.

    It is called by the thread that calls `take` and `finish`.
    """

    def __init__(self, checker: "Checker", on_results: Callable[[list[ItemResult]], None], *, num_writers: int) -> None:
        self._checker = checker
        self._on_results = on_results
        self._todo: SimpleQueue[Batch | None] = SimpleQueue()
        self._done: SimpleQueue[_Done] = SimpleQueue()
        self._threads: list[Thread] = []
        self._num_cores = self._num_wanted = count_cores()
        self._max_threads = max(num_writers, MAX_READERS)
        self._batch: Batch = []
        self._batch_size = 1
        self._num_out = 0

    def take(self, ordinal: int, item: Item) -> None:
        """Add an item; wait while the threads have enough to do. Raises the error that stopped an earlier item."""
        self._batch.append((ordinal, item))
        if len(self._batch) >= self._batch_size:
            self._send()

    def finish(self) -> None:
        """Wait until everything is done. Raises the error that stopped it."""
        if self._batch:
            self._send()
        while self._num_out:
            self._receive()

    def stop(self) -> None:
        """End the threads: they finish the item they work on; the rest is dropped."""
        self._checker.stopped.set()
        for _ in self._threads:
            self._todo.put(None)
        for thread in self._threads:
            thread.join()
        while not self._done.empty():
            with suppress(DiskError):  # of what cannot be put down: the first one is told, and all are in the journal
                self._on_results(self._done.get().results)

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
        self._on_results(done.results)
        if done.error is not None:
            raise done.error
        each_s = done.seconds / max(1, len(done.results))
        self._batch_size = min(_MAX_BATCH, max(1, int(_BATCH_S / max(each_s, 1e-6))))
        num_threads = len(self._threads)
        if num_threads == self._num_wanted and done.cpu_s * num_threads < _BUSY * done.seconds * self._num_cores:
            self._num_wanted += 1  # they wait more than they work

    def _work(self) -> None:
        while (batch := self._todo.get()) is not None:
            started, cpu_started = time.perf_counter(), time.thread_time()
            results: list[ItemResult] = []
            error = None
            try:
                self._checker.check(batch, results)
            except BaseException as exc:  # raised again by the thread that calls `take`
                error = exc
            self._done.put(_Done(results, time.perf_counter() - started, time.thread_time() - cpu_started, error))


class Checker:
    """Read, check and store a batch of items; by many threads at once.

    With `verify` an object that is already stored is compared with what was read, and replaced if it differs.
    What was `forgotten` is neither stored nor put into the journal.
    """

    def __init__(self, store: ObjectStore, limits: Ingest, *, verify: bool, forgotten: Container[str]) -> None:
        self.stopped = Event()
        self._store, self._limits = store, limits
        self._verify, self._forgotten = verify, forgotten
        self._decoding = Semaphore(count_cores())

    def check(self, batch: Batch, results: list[ItemResult]) -> None:
        """Add the results of a batch to `results`. Raises StoreError, and errors that end a whole source."""
        held, num_bytes = list[tuple[int, Item, bytes]](), 0
        for ordinal, item in batch:
            if self.stopped.is_set():
                return
            data = self._read(item)
            if isinstance(data, Rejected):
                results.append(ItemResult(ordinal, item, data, is_lasting=data.code == "too_large"))
                continue
            held.append((ordinal, item, data))
            num_bytes += len(data)
            if num_bytes > _GROUP_BYTES:
                self._inspect(held, results)
                held, num_bytes = [], 0
        self._inspect(held, results)

    def _read(self, item: Item) -> bytes | Rejected:
        try:
            return item.read(self._limits.max_file_bytes)
        except ImageError as exc:
            return make_rejected(item, exc)
        except (VisionLoopError, MemoryError):
            raise
        except Exception as exc:  # a user's source fails for one image
            return Rejected(item.origin, "unreadable", f"cannot be read ({type(exc).__name__})")

    def _inspect(self, held: Sequence[tuple[int, Item, bytes]], results: list[ItemResult]) -> None:
        with self._decoding:
            judged = [self._judge(ordinal, item, data) for ordinal, item, data in held]
        for result, data in judged:
            if isinstance(result.found, Facts):
                if self.stopped.is_set():
                    return
                if result.found.sha256 in self._forgotten:
                    results.append(replace(result, is_lasting=False))
                    continue
                self._put(make_image_key(result.found.sha256), data)
            results.append(result)

    def _judge(self, ordinal: int, item: Item, data: bytes) -> tuple[ItemResult, bytes]:
        """Return what was found out about an image, and the bytes to store."""
        found: Facts | Rejected
        is_lasting = True
        try:
            found, data = inspect_for_store(data, item.origin, self._limits)
        except ImageError as exc:
            found = make_rejected(item, exc)
        except MemoryError:
            raise
        except Exception as exc:  # an unexpected error of a decoder costs this image only
            found, is_lasting = Rejected(item.origin, "unreadable", f"cannot be decoded ({type(exc).__name__})"), False
        return ItemResult(ordinal, item, found, is_lasting=is_lasting), data

    def _put(self, key: str, data: bytes) -> None:
        if not self._store.add(key, data) and self._verify and self._store.get(key) != data:
            self._store.put(key, data)


@dataclass(frozen=True)
class Checked:
    """What a pull has found: usable images, what cannot be used, and the cursor of each incremental source.

    `num_read` of the `num_seen` were read; the others were known. `num_missing` were known, but not in the store.
    `num_places` are the places of files that were offered or rejected, each once; `num_passed_over` the other files;
    `more_rows` the rejected rows, by code, that are too many to be listed.
    `offers` is a digest of all that was offered, in order: place, stamp, label, side and group; None when an item has
    no stamp. `is_as_before`: this digest equals `Known.offers` and nothing was read; then rejections are left out here.
    `rejected_labels` counts, by label, the files that were read and cannot be used.
    """

    inspected: Inspections
    rejected: list[Rejected] = field(default_factory=list)
    cursors: dict[str, str] = field(default_factory=dict)
    num_seen: int = 0
    num_read: int = 0
    num_missing: int = 0
    num_places: int = 0
    num_passed_over: int = 0
    more_rows: Mapping[str, int] = field(default_factory=dict)
    offers: str | None = None
    is_as_before: bool = False
    rejected_labels: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Known:
    """What need not be read: what is in the journal, and in the store.

    `stored` are the digests in the store; None: trust the journal. `offers` is the digest of the last pull, if this
    pull can only differ by what is offered. With `verify` everything is read and compared. Images that were
    `forgotten` are not stored again.
    """

    journal: Journal
    stored: Container[str] | None = None
    offers: str | None = None
    verify: bool = False
    forgotten: Container[str] = frozenset()


def check_all(
    offered: Iterable[Item | Rejected | Cursor | PassedOver],
    store: ObjectStore,
    limits: Ingest,
    known: Known,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Checked:
    """Read, check and store every item that is not known. `on_progress(done, 0)` while the end is not known.

    Raises:
        StoreError: the store cannot be written; what was stored until then is in the journal.
        VisionLoopError: an error that ends a whole source.
    """
    tally = _Tally(known, on_progress)
    checker = Checker(store, limits, verify=known.verify, forgotten=known.forgotten)
    crew = Crew(checker, tally.settle, num_writers=store.num_writers)
    try:
        for one in offered:
            if isinstance(one, Item):
                ordinal = tally.count(one)
                if ordinal is not None:
                    crew.take(ordinal, one)
            elif isinstance(one, Cursor):
                tally.cursors[one.source] = one.value
            elif isinstance(one, PassedOver):
                tally.num_passed_over += one.num_files
            else:
                tally.reject(one)
        crew.finish()
    finally:
        crew.stop()
        known.journal.flush()
    return tally.close()


class _Tally:
    """Every item that was offered, with the journal's row or with its result; `rejected` with their ordinals."""

    def __init__(self, known: Known, on_progress: Callable[[int, int], None]) -> None:
        self.cursors: dict[str, str] = {}
        self.num_passed_over = 0
        self._known = known
        self._on_progress = on_progress
        self._ahead: dict[str, Ahead] = {}
        self._offers = Offers()
        self._inspected = Inspections(known.journal.folder)
        self._refused: list[Rejected] = []
        self._rejected: list[tuple[int, Rejected]] = []
        self._labels: Counter[str] = Counter()
        self._places = array("q")  # Python's hashes of them: 64 bits are enough to tell millions apart
        self._held: set[str] = set()  # sources whose cursor must not move: an image is to be asked for again
        self._num_rows: Counter[str] = Counter()
        self._num_seen = self._num_done = self._num_read = self._num_missing = 0

    def reject(self, one: Rejected) -> None:
        """Keep what a source has rejected; of rows that lead to no file so many of a kind, the others are counted."""
        if one.is_row:
            self._num_rows[one.code] += 1
            if self._num_rows[one.code] > KEPT_ROWS:
                return
        else:
            self._places.append(hash(one.origin))
        self._refused.append(one)

    def count(self, item: Item) -> int | None:
        """Give an item its ordinal; return it if the item must be read."""
        ordinal = self._num_seen
        self._num_seen += 1
        self._offers.add(item)
        self._places.append(hash(item.origin))
        row = self._find(item)
        if row is None:
            return ordinal
        self._keep(ordinal, item, unpack_row(row))
        self._num_done += 1
        return None

    def settle(self, results: list[ItemResult]) -> None:
        """Keep results, and put them into the journal if they are lasting."""
        self._known.journal.keep([(o.item.origin, o.item.stamp, o.found) for o in results if o.is_lasting])
        for one in results:
            self._keep(one.ordinal, one.item, one.found)
            if isinstance(one.found, Rejected) and one.found.code == PASSING:
                self._held.add(one.item.source)
        self._num_done += len(results)
        self._num_read += len(results)
        self._on_progress(self._num_done, 0)

    def close(self) -> Checked:
        """Return everything; what is rejected in the order of the sources."""
        more = {code: number - KEPT_ROWS for code, number in self._num_rows.items() if number > KEPT_ROWS}
        self._on_progress(self._num_seen, self._num_seen)
        offers = self._offers.close(self._refused, self.cursors, more)
        facts: dict[str, Any] = {
            "inspected": self._inspected,
            "num_seen": self._num_seen,
            "num_places": len(np.unique(np.frombuffer(self._places, np.int64))) if self._places else 0,
            "num_passed_over": self.num_passed_over,
            "more_rows": more,
            "offers": offers,
        }
        if offers is not None and offers == self._known.offers and not self._num_read:
            return Checked(cursors=self.cursors, is_as_before=True, **facts)
        self._rejected.sort(key=lambda pair: pair[0])
        return Checked(
            rejected=[*self._refused, *(one for _, one in self._rejected)],
            cursors={source: value for source, value in self.cursors.items() if source not in self._held},
            num_read=self._num_read,
            num_missing=self._num_missing,
            rejected_labels=self._labels,
            **facts,
        )

    def _keep(self, ordinal: int, item: Item, found: Facts | Rejected) -> None:
        if isinstance(found, Rejected):
            self._rejected.append((ordinal, found))
            self._labels.update(item.labels)
        else:
            self._inspected.add(item, ordinal, found)

    def _find(self, item: Item) -> Row | None:
        if item.stamp is None or self._known.verify:
            return None
        ahead = self._ahead.get(item.source)
        if ahead is None:
            ahead = self._ahead[item.source] = Ahead(self._known.journal, item.source)
        row = ahead.find(item.origin)
        if row is None or row[STAMP] != item.stamp:
            return None
        if self._known.stored is not None and row[SHA256] and row[SHA256] not in self._known.stored:
            self._num_missing += 1
            return None
        return row
