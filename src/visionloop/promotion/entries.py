"""The entries of a ledger as the objects that they are: listed, read, checked, and copied into pages.

`ledger-pages/NAME/000001.json` holds a copy of the first 500 entries, and so on, so that a long ledger is read in few
requests. A page is only a faster way: it counts for the entries that are there, and what is damaged is not used.
"""

import contextlib
import json
from collections.abc import Iterator, Sequence
from functools import partial
from typing import TypeVar

from visionloop.errors import ObjectMissing, PromotionError
from visionloop.parallel import map_parallel
from visionloop.records import Decision, LedgerEntry, canonical_json
from visionloop.store import ObjectStore
from visionloop.store.keys import make_number_key, split_numbers

AnyRecord = TypeVar("AnyRecord", LedgerEntry, Decision)
PAGE = 500  # entries


def list_numbers(store: ObjectStore, folder: str, first: int = 0) -> tuple[list[int], list[str]]:
    """Return the numbers in a folder from `first` on, in order, and the keys there that are no number."""
    return split_numbers(store.list(f"{folder}/", make_number_key(folder, first - 1) if first > 1 else ""), folder)


def find_first(store: ObjectStore, name: str, since: int) -> int:
    """Return from which entry on a ledger is listed to find the newest; 0: from the beginning.

    The keys of seven digits do not sort behind those of six: from 100,000 on it is asked if there are any.
    """
    first = since or PAGE * len(list(store.list(f"ledger-pages/{name}/")))
    return 0 if first >= 100_000 and store.exists(make_entry_key(name, 1_000_000)) else first


def _make_page_key(name: str, page: int) -> str:
    return make_number_key(f"ledger-pages/{name}", page)


def read_entries(store: ObjectStore, name: str, numbers: Sequence[int]) -> Iterator[LedgerEntry | PromotionError]:
    """Yield entries, or what is wrong with them, in the order of their numbers: from pages, or several at a time."""
    paged: dict[int, LedgerEntry] = {}
    if len(numbers) >= PAGE:
        wanted = {_make_page_key(name, -(-number // PAGE)) for number in numbers}
        keys = [key for key in store.list(f"ledger-pages/{name}/") if key in wanted]
        for entries in map_parallel(partial(_read_page, store, name), keys):
            paged.update(entries)

    def read(number: int) -> LedgerEntry | PromotionError:
        try:
            return paged[number] if number in paged else read_entry(store, name, number)
        except PromotionError as exc:
            return exc

    return map_parallel(read, numbers, workers=store.num_writers)


def _read_page(store: ObjectStore, name: str, key: str) -> dict[int, LedgerEntry]:
    """Return the entries of a page by their numbers; none if it is damaged."""
    try:
        entries = [_check_entry(LedgerEntry.from_json(one), name, key) for one in json.loads(store.get(key))]
        return {entry.number: entry for entry in entries}
    except (ObjectMissing, PromotionError, ValueError, TypeError, AttributeError):
        return {}


def write_pages(store: ObjectStore, name: str, last: int) -> None:
    """If entry `last` ends a page, write the pages that are not there, but for those with a damaged entry."""
    if last % PAGE:
        return
    there = {*store.list(f"ledger-pages/{name}/")}
    for page in [page for page in range(1, last // PAGE + 1) if _make_page_key(name, page) not in there]:
        numbers = range(1 + PAGE * (page - 1), 1 + PAGE * page)
        with contextlib.suppress(ObjectMissing):
            entries = [one for one in read_entries(store, name, numbers) if isinstance(one, LedgerEntry)]
            if len(entries) == PAGE:
                store.create(_make_page_key(name, page), canonical_json([one.to_json() for one in entries]))


def make_entry_key(name: str, number: int) -> str:
    """Return the store key of an entry."""
    return make_number_key(f"ledger/{name}", number)


def read_believable(store: ObjectStore, name: str, number: int) -> LedgerEntry:
    """Read an entry: of this name and number, and after the entry before, if that one can be read.

    A missing entry before tells nothing: this one was written by who had read it.
    """
    entry, before = read_entry(store, name, number), None
    if number > 1:
        try:
            before = read_entry(store, name, number - 1)
        except (ObjectMissing, PromotionError):
            return entry
    check_follows(entry, before)
    return entry


def check_follows(entry: LedgerEntry, before: LedgerEntry | None) -> None:
    """Raise PromotionError unless an entry names the bundle of the entry before as its previous one."""
    if entry.previous != (before.bundle if before else None):
        known = f"{before.bundle[:12]}, the bundle of entry {before.number}" if before else "none"
        found = f"does not follow the entry before: its previous is {str(entry.previous)[:12]}"
        raise make_problem(make_entry_key(entry.name, entry.number), found, known)


def read_entry(store: ObjectStore, name: str, number: int) -> LedgerEntry:
    """Read an entry of this name and number. Raises PromotionError, ObjectMissing."""
    key = make_entry_key(name, number)
    entry = _check_entry(read_record(store, key, LedgerEntry, "a ledger entry"), name, key)
    if entry.number != number:
        raise make_problem(key, f"says it is entry {entry.number}", f"entry {number}")
    return entry


def _check_entry(entry: LedgerEntry, name: str, key: str) -> LedgerEntry:
    if entry.name != name:
        raise make_problem(key, f"is an entry of {entry.name!r}", f"one of {name!r}")
    if not isinstance(entry.bundle, str) or entry.action not in ("promote", "rollback"):
        raise make_problem(key, "is damaged", "a ledger entry")
    return entry


def make_problem(key: str, found: str, expected: str) -> PromotionError:
    """Return the error of an object that is not what it should be."""
    return PromotionError(f"store object {key}", found, expected, "Move it out of the store, or restore its backup.")


def read_record(store: ObjectStore, key: str, kind: type[AnyRecord], what: str) -> AnyRecord:
    """Read an entry or a decision. Raises PromotionError: it is damaged. ObjectMissing."""
    try:
        return kind.from_json(json.loads(store.get(key)))
    except (ValueError, TypeError, KeyError, AttributeError) as exc:
        raise PromotionError(f"store object {key}", "is damaged", what, "Restore the store from its backup.") from exc
