"""Check and store all that the sources offer; what comes of it, in the order of the sources.

What the journal knows is not read again. Threads do the rest (`crew.py`); whatever is done first, the order stays.
"""

import hashlib
from collections.abc import Callable, Container, Iterable
from dataclasses import dataclass, field

from visionloop.ingest.crew import Checker, Crew, Outcome
from visionloop.ingest.inspect import Inspected
from visionloop.ingest.journal import SHA256, STAMP, Journal, Row, unpack_row
from visionloop.ingest.sources import Cursor, Item
from visionloop.params import Ingest
from visionloop.records import Rejected
from visionloop.store import ObjectStore

_FLUSH_LINES = 1000
# The code of a rejection that may pass by itself: a server that was away, a file that was locked.
PASSING = "unreadable"


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
        self._slots: list[tuple[Item, Row] | Outcome | None] = []
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

    def settle(self, outcomes: list[Outcome]) -> None:
        """Take what threads have found out, and keep in the journal what lasts."""
        for outcome in outcomes:
            self._slots[outcome.ordinal] = outcome
        self._known.journal.keep([(o.item.origin, o.item.stamp, o.found) for o in outcomes if o.is_lasting])
        self._num_done += len(outcomes)
        self._num_read += len(outcomes)
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
        new = [slot for slot in self._slots if isinstance(slot, Outcome)]
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


def _unpack(ordinal: int, slot: tuple[Item, Row] | Outcome) -> Inspected | Rejected:
    if isinstance(slot, Outcome):
        item, found = slot.item, slot.found
    else:
        item, row = slot
        found = unpack_row(row)
    return found if isinstance(found, Rejected) else Inspected(item, ordinal, found)
