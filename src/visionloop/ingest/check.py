"""Check and store all that the sources offer, with several readers; results are in the order of the sources.

What the journal knows is not read again. Threads do the rest (`crew.py`); whatever is done first, the order stays.

There are as many threads as cores, and more of them while they wait for a network; no more decode at once than there
are cores. Work goes out in batches of some hundredths of a second, and no further ahead than the threads can hold: a
long source fills no memory but that of its results.
"""

import hashlib
import time
from collections.abc import Callable, Container, Iterable, Sequence
from dataclasses import dataclass, field, replace
from queue import SimpleQueue
from threading import Event, Semaphore, Thread

from visionloop.data.manifest import make_image_key
from visionloop.errors import ImageError, VisionLoopError
from visionloop.ingest.inspect import Facts, Inspected, inspect_bytes
from visionloop.ingest.journal import SHA256, STAMP, Journal, Row, unpack_row
from visionloop.ingest.sources import Cursor, Item
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
_FLUSH_LINES = 1000
# The code of a rejection that may pass by itself: a server that was away, a file that was locked.
PASSING = "unreadable"


@dataclass(slots=True)
class ItemResult:
    """What came of one item. `is_lasting`: it is a verdict on the bytes, and stands as long as the stamp does."""

    ordinal: int
    item: Item
    found: Facts | Rejected
    is_lasting: bool = True


@dataclass(slots=True)
class _Done:
    """A batch that was worked on: what came of it, its time on the clock and on a core, and what stopped it."""

    results: list[ItemResult]
    seconds: float
    cpu_s: float
    error: BaseException | None


class Crew:
    """Threads with batches on their way to and from them. `on_results` is called by the thread that gives the work.

    Everything that was stored is handed to `on_results`, also when an error stopped the rest.
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
            except BaseException as exc:  # handed on to the thread that gives the work
                error = exc
            self._done.put(_Done(results, time.perf_counter() - started, time.thread_time() - cpu_started, error))


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

    def check(self, batch: Batch, results: list[ItemResult]) -> None:
        """Add what comes of a batch to `results`. Raises StoreError, and what a source raises as a whole."""
        held: list[tuple[int, Item, bytes]] = []
        num_bytes = 0
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
            return _reject(item, exc)
        except (VisionLoopError, MemoryError):
            raise
        except Exception as exc:  # a source of one's own, that fails for one image
            return Rejected(item.origin, "unreadable", f"cannot be read ({type(exc).__name__})")

    def _inspect(self, held: Sequence[tuple[int, Item, bytes]], results: list[ItemResult]) -> None:
        with self._decoding:
            judged = [(self._judge(ordinal, item, data), data) for ordinal, item, data in held]
        for result, data in judged:
            if isinstance(result.found, Facts):
                if self.stopped.is_set():
                    return
                if result.found.sha256 in self._forgotten:
                    results.append(replace(result, is_lasting=False))
                    continue
                self._put(make_image_key(result.found.sha256), data)
            results.append(result)

    def _judge(self, ordinal: int, item: Item, data: bytes) -> ItemResult:
        try:
            return ItemResult(ordinal, item, inspect_bytes(data, item.origin, max_pixels=self._limits.max_pixels))
        except ImageError as exc:
            return ItemResult(ordinal, item, _reject(item, exc))
        except MemoryError:
            raise
        except Exception as exc:  # a decoder that fails in its own way costs this image, not the run
            found = Rejected(item.origin, "unreadable", f"cannot be decoded ({type(exc).__name__})")
            return ItemResult(ordinal, item, found, is_lasting=False)

    def _put(self, key: str, data: bytes) -> None:
        if not self._store.add(key, data) and self._verify and self._store.get(key) != data:
            self._store.put(key, data)


def _reject(item: Item, exc: ImageError) -> Rejected:
    return Rejected(item.origin, exc.reason_code, f"{exc.found}; expected {exc.expected}")


@dataclass(frozen=True)
class Checked:
    """What a pull has found: usable images, what cannot be used, and how far each incremental source has come.

    `num_read` of the `num_seen` were read; the others were known. `num_missing` were known, but not in the store.
    `offers` is equal when all that was offered is: each place, stamp, label, side and group, in the same order. None
    when something has no stamp. `is_as_before`: the offers are those that were asked about, all of them known, and
    neither images nor rejections are listed.
    """

    inspected: list[Inspected] = field(default_factory=list)
    rejected: list[Rejected] = field(default_factory=list)
    cursors: dict[str, str] = field(default_factory=dict)
    num_seen: int = 0
    num_read: int = 0
    num_missing: int = 0
    offers: str | None = None
    is_as_before: bool = False


@dataclass(frozen=True)
class Known:
    """What need not be read: by the journal, as far as it is in the store.

    `stored` are the digests in the store, None when the journal is believed. `offers` are those of the pull before, if
    nothing but new offers could make this one end otherwise. With `verify` everything is read, and compared. What was
    `forgotten` is not stored again.
    """

    journal: Journal
    stored: Container[str] | None = None
    offers: str | None = None
    verify: bool = False
    forgotten: Container[str] = frozenset()


def check_all(
    offered: Iterable[Item | Rejected | Cursor],
    store: ObjectStore,
    limits: Ingest,
    known: Known,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Checked:
    """Read, check and store every item that is not known. `on_progress(done, 0)` while the end is not known.

    Raises:
        StoreError: the store cannot be written; what was stored until then is in the journal.
        VisionLoopError: what a source raises as a whole.
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
            else:
                tally.rejected.append(one)
        crew.finish()
    finally:
        crew.stop()
        known.journal.flush()
    return tally.close()


class _Tally:
    """Every item that was offered, in order, with what is known or was found out about it."""

    def __init__(self, known: Known, on_progress: Callable[[int, int], None]) -> None:
        self.rejected: list[Rejected] = []
        self.cursors: dict[str, str] = {}
        self._known = known
        self._on_progress = on_progress
        self._rows: dict[str, dict[str, Row]] = {}
        self._offers = _Offers()
        self._slots: list[tuple[Item, Row] | ItemResult | None] = []
        self._num_done = self._num_read = self._num_missing = 0

    def count(self, item: Item) -> int | None:
        """Count an item in; return its ordinal if it must be read."""
        self._offers.add(item)
        row = self._find(item)
        self._slots.append(None if row is None else (item, row))
        if row is None:
            return len(self._slots) - 1
        self._num_done += 1
        return None

    def settle(self, results: list[ItemResult]) -> None:
        """Take what threads have found out, and keep in the journal what lasts."""
        for result in results:
            self._slots[result.ordinal] = result
        self._known.journal.keep([(o.item.origin, o.item.stamp, o.found) for o in results if o.is_lasting])
        self._num_done += len(results)
        self._num_read += len(results)
        self._on_progress(self._num_done, 0)

    def close(self) -> Checked:
        """Return all of it, in the order of the sources."""
        num_seen = len(self._slots)
        self._on_progress(num_seen, num_seen)
        offers = self._offers.close(self.rejected, self.cursors)
        if offers is not None and offers == self._known.offers and not self._num_read:
            return Checked(cursors=self.cursors, num_seen=num_seen, offers=offers, is_as_before=True)
        held = self._list_held()
        results = [_unpack(ordinal, slot) for ordinal, slot in enumerate(self._slots) if slot is not None]
        return Checked(
            inspected=[one for one in results if isinstance(one, Inspected)],
            rejected=self.rejected + [one for one in results if isinstance(one, Rejected)],
            cursors={source: value for source, value in self.cursors.items() if source not in held},
            num_seen=num_seen,
            num_read=self._num_read,
            num_missing=self._num_missing,
            offers=offers,
        )

    def _list_held(self) -> set[str]:
        """Name the sources whose cursor stays: an image that could not be had today must be asked for again."""
        new = [slot for slot in self._slots if isinstance(slot, ItemResult)]
        return {o.item.source for o in new if isinstance(o.found, Rejected) and o.found.code == PASSING}

    def _find(self, item: Item) -> Row | None:
        if item.stamp is None or self._known.verify:
            return None
        rows = self._rows.get(item.source)
        if rows is None:  # a source's first item: all of its rows at once
            rows = self._rows[item.source] = self._known.journal.load(item.source)
        row = rows.get(item.origin)
        if row is None or row[STAMP] != item.stamp:
            return None
        if self._known.stored is not None and row[SHA256] and row[SHA256] not in self._known.stored:
            self._num_missing += 1
            return None
        return row


class _Offers:
    """A digest over all that the sources offer."""

    def __init__(self) -> None:
        self._digest = hashlib.sha256()
        self._lines: list[str] = []
        self._abouts: dict[tuple[object, ...], str] = {}
        self._have_stamps = True

    def add(self, item: Item) -> None:
        stamp = item.stamp
        if stamp is None:
            self._have_stamps = False
            return
        about = item.labels, item.side, item.test_is_given, item.group, item.captured_at
        text = self._abouts.get(about)
        if text is None:
            text = self._abouts[about] = repr(about)
        self._lines.append(f"{item.origin}\0{stamp}\0{text}")
        if len(self._lines) >= _FLUSH_LINES:
            self._flush()

    def close(self, rejected: list[Rejected], cursors: dict[str, str]) -> str | None:
        self._lines += [f"{one.origin}\0{one.code}\0{one.reason}" for one in rejected]
        self._lines.append(repr(sorted(cursors.items())))
        self._flush()
        return self._digest.hexdigest() if self._have_stamps else None

    def _flush(self) -> None:
        self._digest.update("\n".join((*self._lines, "")).encode("utf-8", "surrogatepass"))
        self._lines = []
        self._abouts = {} if len(self._abouts) > _FLUSH_LINES else self._abouts


def _unpack(ordinal: int, slot: tuple[Item, Row] | ItemResult) -> Inspected | Rejected:
    if isinstance(slot, ItemResult):
        item, found = slot.item, slot.found
    else:
        item, row = slot
        found = unpack_row(row)
    return found if isinstance(found, Rejected) else Inspected(item, ordinal, found)
