"""Many items at once: the order stays, one bad image costs itself alone, an error of the store stops all."""

import errno
import hashlib
import random
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from fakes import make_image
from visionloop.data.manifest import make_image_key
from visionloop.errors import DiskError, ImageError, SourceError, StoreError
from visionloop.ingest import check as crew
from visionloop.ingest import spill
from visionloop.ingest.check import Checked, Known, check_all
from visionloop.ingest.inspect import Inspected, inspect_bytes
from visionloop.ingest.journal import SHA256, Journal, Row
from visionloop.ingest.pull import find_stored
from visionloop.ingest.sources import Cursor, Item
from visionloop.ingest.spill import Spill
from visionloop.params import Ingest
from visionloop.records import Rejected
from visionloop.store import LocalStore

LIMITS = Ingest()


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path / "store")


@pytest.fixture
def journal(tmp_path: Path, store: LocalStore) -> Iterator[Journal]:
    one = Journal(tmp_path / "journal.sqlite", store.url, LIMITS)
    yield one
    one.close()


def make_item(number: int, read: Callable[[int], bytes] | None = None, **facts: object) -> Item:
    data = make_image(number)
    item = Item(f"s:{number:03d}.png", "s", ("a",), read or (lambda limit: data), f"stamp-{number}")
    return item._replace(**facts)


def fail(exc: BaseException) -> Callable[[int], bytes]:
    def read(limit: int) -> bytes:
        raise exc

    return read


def list_all(checked: Checked) -> list[Inspected]:
    """What can be used, in the order of the sources."""
    return sorted(checked.inspected, key=lambda one: one.ordinal)


def name_all(checked: Checked) -> list[str]:
    return [one.origin for one in list_all(checked)]


def test_the_order_is_that_of_the_source_whatever_is_done_first(store: LocalStore, journal: Journal) -> None:
    def read_slowly(number: int) -> Callable[[int], bytes]:
        def read(limit: int) -> bytes:
            time.sleep(0.02 if number % 3 == 0 else 0)
            return make_image(number)

        return read

    items = [make_item(i, read_slowly(i)) for i in range(40)]
    checked = check_all(iter(items), store, LIMITS, Known(journal))
    assert name_all(checked) == [item.origin for item in items]
    assert [one.ordinal for one in list_all(checked)] == list(range(40))
    assert all(store.exists(make_image_key(one.sha256)) for one in checked.inspected)
    assert (checked.num_seen, checked.num_read) == (40, 40)


def test_what_was_read_and_what_is_known_are_the_same(store: LocalStore, journal: Journal) -> None:
    said = {"labels": ("cats",), "side": "test", "group": "film", "captured_at": "2026-01-01T00:00:00"}
    for num_read in (3, 0):  # the second time the journal knows them
        checked = check_all([make_item(i, **said) for i in range(3)], store, LIMITS, Known(journal))
        assert checked.num_read == num_read
        for number, one in enumerate(list_all(checked)):
            facts = inspect_bytes(make_image(number), "x", max_pixels=10**6)
            held = {**said, **asdict(facts), "origin": f"s:{number:03d}.png", "source": "s", "ordinal": number}
            assert one._asdict() == {**held, "test_is_given": False, "excluded_near_test": False}


@pytest.mark.parametrize(
    ("exc", "code", "reason"),
    [
        (ImageError("x", "is no photo", "one", reason_code="refused_url"), "refused_url", "is no photo; expected one"),
        (OSError(5, "password=hunter2"), "unreadable", "cannot be read (OSError)"),
        (KeyError("image"), "unreadable", "cannot be read (KeyError)"),
        (RecursionError(), "unreadable", "cannot be read (RecursionError)"),
    ],
)
def test_an_image_that_cannot_be_read_costs_itself_alone(
    store: LocalStore, journal: Journal, exc: Exception, code: str, reason: str
) -> None:
    items = [make_item(0), make_item(1, fail(exc)), make_item(2)]
    checked = check_all(items, store, LIMITS, Known(journal))
    assert checked.rejected == [Rejected("s:001.png", code, reason)]
    assert [one.ordinal for one in list_all(checked)] == [0, 2]
    again = check_all([items[1]], store, LIMITS, Known(journal))
    assert again.num_read == 1, "a file that could not be read may be there the next time"


def test_a_decoder_that_fails_in_its_own_way_costs_one_image(
    store: LocalStore, journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    def inspect(data: bytes, where: str, limits: Ingest) -> None:
        raise ZeroDivisionError(where)

    monkeypatch.setattr(crew, "inspect_for_store", inspect)
    checked = check_all([make_item(0)], store, LIMITS, Known(journal))
    assert checked.rejected == [Rejected("s:000.png", "unreadable", "cannot be decoded (ZeroDivisionError)")]


@pytest.mark.parametrize("exc", [MemoryError(), KeyboardInterrupt(), StoreError("s", "gone"), SourceError("s", "no")])
def test_what_is_no_fault_of_one_image_stops_all(store: LocalStore, journal: Journal, exc: BaseException) -> None:
    num_before = threading.active_count()
    first = make_image_key(hashlib.sha256(make_image(0)).hexdigest())

    def fail_when_the_first_is_stored(limit: int) -> bytes:
        deadline = time.monotonic() + 60
        while not store.exists(first) and time.monotonic() < deadline:
            time.sleep(0.001)
        raise exc

    def offer() -> Iterator[Item]:
        yield make_item(0)
        yield make_item(1, fail_when_the_first_is_stored)
        for i in range(2, 10_000):
            yield make_item(i % 50, lambda limit: b"")

    with pytest.raises(type(exc)):
        check_all(offer(), store, LIMITS, Known(journal))
    assert threading.active_count() == num_before
    assert "s:000.png" in journal.load("s"), "what was stored is not read again"


def test_a_store_that_fails_stops_the_rest_and_keeps_what_was_stored(
    store: LocalStore, journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    add, num_added = LocalStore.add, 0

    def fail_after_nine(self: LocalStore, key: str, data: bytes) -> bool:
        nonlocal num_added
        num_added += 1
        if num_added > 9:
            raise StoreError("store", "no space left")
        return add(self, key, data)

    monkeypatch.setattr(LocalStore, "add", fail_after_nine)
    items = [make_item(i) for i in range(200)]
    with pytest.raises(StoreError, match="no space left"):
        check_all(items, store, LIMITS, Known(journal))
    assert num_added < 100
    kept = journal.load("s")
    assert len(kept) == 9
    assert all(store.exists(make_image_key(row[SHA256])) for row in kept.values())
    monkeypatch.undo()
    checked = check_all(items, store, LIMITS, Known(journal))
    assert (checked.num_read, len(checked.inspected)) == (191, 200)


def test_a_full_disk_of_the_workspace_stops_all_and_keeps_what_was_stored(
    store: LocalStore, journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail_to_write(self: Spill, data: bytes) -> None:
        raise self._make_error("written", OSError(errno.ENOSPC, "No space left on device"))

    monkeypatch.setattr(spill, "RUN_ROWS", 3)
    monkeypatch.setattr(Spill, "_write", fail_to_write)
    num_before = threading.active_count()
    with pytest.raises(DiskError, match="No space left"):
        check_all([make_item(i) for i in range(100)], store, LIMITS, Known(journal))
    assert threading.active_count() == num_before
    stored = {key.rpartition("/")[2] for key in store.list("images/")}
    assert {row[SHA256] for row in journal.load("s").values()} == stored, "what is stored is not read again"


def test_a_source_that_fails_midway_raises_and_keeps_what_was_stored(store: LocalStore, journal: Journal) -> None:
    def offer() -> Iterator[Item]:
        yield from (make_item(i) for i in range(30))
        raise SourceError("source s", "the line was cut")

    with pytest.raises(SourceError, match="the line was cut"):
        check_all(offer(), store, LIMITS, Known(journal))
    known = journal.load("s")
    checked = check_all([make_item(i) for i in range(30)], store, LIMITS, Known(journal))
    assert checked.num_read == 30 - len(known)


def test_a_long_source_is_taken_no_faster_than_it_is_worked_on(store: LocalStore, journal: Journal) -> None:
    done, most = 0, 0
    lock, data = threading.Lock(), make_image(0)

    def read(limit: int) -> bytes:
        nonlocal done
        with lock:
            done += 1
        return data

    def offer() -> Iterator[Item]:
        nonlocal most
        for i in range(3000):
            most = max(most, i - done)
            yield make_item(0, read, origin=f"s:{i}", stamp=None)

    check_all(offer(), store, LIMITS, Known(journal))
    assert most < 1000


def test_many_wait_at_once_for_a_slow_network(store: LocalStore, journal: Journal) -> None:
    now, most = 0, 0
    lock = threading.Lock()

    def read(limit: int) -> bytes:
        nonlocal now, most
        with lock:
            now += 1
            most = max(most, now)
        time.sleep(0.02)
        with lock:
            now -= 1
        return make_image(0)

    check_all([make_item(0, read, origin=f"s:{i}") for i in range(300)], store, LIMITS, Known(journal))
    assert most > 16


def test_progress_has_no_total_until_the_end(store: LocalStore, journal: Journal) -> None:
    seen: list[tuple[int, int]] = []
    check_all([make_item(i) for i in range(9)], store, LIMITS, Known(journal), lambda *call: seen.append(call))
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert {total for _, total in seen[:-1]} == {0}
    assert seen[-1] == (9, 9)


def test_what_is_known_is_not_read_again(store: LocalStore, journal: Journal) -> None:
    items = [make_item(0), make_item(1, lambda limit: b"no image"), make_item(2, stamp=None)]
    first = check_all(items, store, LIMITS, Known(journal))
    again = check_all(items, store, LIMITS, Known(journal))
    assert (first.num_read, again.num_read) == (3, 1), "only the one without a stamp"
    assert (list_all(again), again.rejected) == (list_all(first), first.rejected)
    assert again.rejected[0].code == "not_an_image"


@pytest.mark.parametrize("facts", [{"stamp": "new"}, {"origin": "s:elsewhere"}, {"source": "t", "origin": "t:000.png"}])
def test_what_has_changed_is_read_again(store: LocalStore, journal: Journal, facts: dict[str, str]) -> None:
    check_all([make_item(0)], store, LIMITS, Known(journal))
    assert check_all([make_item(0, **facts)], store, LIMITS, Known(journal)).num_read == 1


def test_another_label_is_no_reason_to_read_again_but_another_offer(store: LocalStore, journal: Journal) -> None:
    first = check_all([make_item(0)], store, LIMITS, Known(journal))
    again = check_all([make_item(0, labels=("b",))], store, LIMITS, Known(journal, offers=first.offers))
    assert (again.num_read, again.is_as_before, list_all(again)[0].labels) == (0, False, ("b",))


@pytest.mark.parametrize(
    ("change", "is_as_before"),
    [
        (lambda offers: offers, True),
        (lambda offers: offers[:-1], False),
        (lambda offers: offers[::-1], False),
        (lambda offers: [*offers, Cursor("s", "18")], False),
        (lambda offers: [*offers, Rejected("s:x", "no_label", "it has none")], False),
        (lambda offers: [offers[0]._replace(side="test"), *offers[1:]], False),
        (lambda offers: [offers[0]._replace(group="g"), *offers[1:]], False),
        (lambda offers: [offers[0]._replace(captured_at="2026"), *offers[1:]], False),
        (lambda offers: [offers[0]._replace(test_is_given=True), *offers[1:]], False),
        (lambda offers: [offers[0]._replace(stamp=None), *offers[1:]], False),
    ],
)
def test_the_same_offers_are_recognised(
    store: LocalStore, journal: Journal, change: Callable[[list[object]], list[object]], is_as_before: bool
) -> None:
    offers: list[object] = [make_item(0), make_item(1), Cursor("s", "17")]
    first = check_all(offers, store, LIMITS, Known(journal))  # type: ignore[arg-type]
    again = check_all(change(offers), store, LIMITS, Known(journal, offers=first.offers))  # type: ignore[arg-type]
    assert again.is_as_before is is_as_before


def test_what_is_missing_from_the_store_is_read_and_stored_again(store: LocalStore, journal: Journal) -> None:
    items = [make_item(0), make_item(1)]
    first = check_all(items, store, LIMITS, Known(journal))
    lost, kept = (one.sha256 for one in list_all(first))
    store.delete(make_image_key(lost))
    again = check_all(items, store, LIMITS, Known(journal, stored={kept}, offers=first.offers))
    assert (again.num_read, again.num_missing, again.is_as_before) == (1, 1, False)
    assert store.exists(make_image_key(lost))


def test_verify_reads_everything_and_mends_what_is_damaged(store: LocalStore, journal: Journal) -> None:
    items = [make_item(0), make_item(1)]
    first = check_all(items, store, LIMITS, Known(journal))
    key = make_image_key(list_all(first)[0].sha256)
    store.put(key, b"\0" * len(make_image(0)))
    again = check_all(items, store, LIMITS, Known(journal, verify=True, offers=first.offers))
    assert (again.num_read, again.is_as_before) == (2, False)
    assert store.get(key) == make_image(0)


@pytest.mark.parametrize(("code", "cursors"), [("unreadable", {"t": "9"}), ("not_an_image", {"s": "2", "t": "9"})])
def test_a_cursor_stays_when_an_image_could_not_be_had(
    store: LocalStore, journal: Journal, code: str, cursors: dict[str, str]
) -> None:
    away = make_item(2, fail(ImageError("x", "the server is away", reason_code=code)))
    offered = [make_item(1), away, Cursor("s", "2"), make_item(3, source="t"), Cursor("t", "9")]
    assert check_all(offered, store, LIMITS, Known(journal)).cursors == cursors


def test_a_file_that_is_offered_twice_is_known_both_times(store: LocalStore, journal: Journal) -> None:
    """The journal's row of a file is given away when it is first asked for."""
    check_all([make_item(1), make_item(2)], store, LIMITS, Known(journal))
    again = check_all([make_item(1), make_item(3), make_item(1)], store, LIMITS, Known(journal))
    assert (name_all(again), again.num_read) == (["s:001.png", "s:003.png", "s:001.png"], 1)
    assert list_all(again)[0].sha256 == list_all(again)[2].sha256


@pytest.mark.parametrize("number", [0, 300])
def test_what_is_stored_is_found_and_a_damaged_row_of_the_journal_is_not(
    store: LocalStore, journal: Journal, number: int
) -> None:
    facts, sha256s = inspect_bytes(make_image(1), "x", max_pixels=10**6), [f"{7**i % 2**256:064x}" for i in range(300)]
    journal.keep([("s:1.png", "stamp", replace(facts, sha256="no digest"))])
    journal.flush()
    for sha256 in sha256s[:number]:
        store.add(make_image_key(sha256), b"")
    stored = find_stored(store, journal, frozenset({"f" * 64}))
    assert stored is not None
    assert [sha256 in stored for sha256 in sha256s] == [i < number for i in range(300)]
    assert "f" * 64 in stored
    assert "no digest" not in stored


@pytest.mark.parametrize("in_order", [True, False])
def test_what_the_journal_knows_is_read_ahead(store: LocalStore, journal: Journal, in_order: bool) -> None:
    """Few questions where places come in the order of their names; where not, one for each, and the same answers."""
    facts = inspect_bytes(make_image(1), "x", max_pixels=10**6)
    names = [f"s:{i:06d}.png" for i in range(3_000)]
    journal.keep((name, f"stamp-{name}", replace(facts, sha256=f"{i:064x}")) for i, name in enumerate(names))
    journal.flush()
    asked, load = 0, Journal.load

    def count(self: Journal, *place: Any) -> dict[str, Row]:
        nonlocal asked
        asked += 1
        return load(self, *place)

    order = names if in_order else random.Random(0).sample(names, len(names))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Journal, "load", count)
        offered = [make_item(0, origin=name, stamp=f"stamp-{name}") for name in (*order, "s:1new.png")]
        checked = check_all(offered, store, LIMITS, Known(journal))
    assert (name_all(checked), checked.num_read) == ([*order, "s:1new.png"], 1)
    assert [int(one.sha256, 16) for one in list_all(checked)[:-1]] == [names.index(name) for name in order]
    assert asked < 20 if in_order else asked <= 3_001
