"""The ledger of promotions: `ledger/NAME/000001.json`, one entry a promotion or rollback. The truth about champions.

An entry is created only if its number is free, so of two promoters one wins. Nothing is changed or removed.
"""

import json
from typing import Any

from visionloop.errors import PromotionError
from visionloop.records import LedgerEntry, canonical_json
from visionloop.store import ObjectStore


def read_champion(store: ObjectStore, name: str) -> LedgerEntry | None:
    """Return the highest entry, whose bundle is the champion; None before the first promotion.

    Raises:
        PromotionError: the entry is damaged.
    """
    keys = _list_keys(store, name)
    return _read_entry(store, keys[-1]) if keys else None


def read_history(store: ObjectStore, name: str) -> list[LedgerEntry]:
    """Return all entries, oldest first. Raises PromotionError."""
    return [_read_entry(store, key) for key in _list_keys(store, name)]


def append_entry(store: ObjectStore, name: str, after: LedgerEntry | None, **facts: Any) -> LedgerEntry:
    """Write the entry that follows `after`, the champion the caller looked at; `facts` are its other fields.

    Raises:
        PromotionError: another promoter has written this number: the champion is no longer `after`.
    """
    number = after.number + 1 if after else 1
    entry = LedgerEntry(name=name, number=number, previous=after.bundle if after else None, **facts)
    if not store.create(f"ledger/{name}/{number:06d}.json", canonical_json(entry.to_json())):
        raise PromotionError(
            f"ledger {name}",
            f"champion moved: entry {number} was written by someone else",
            f"entry {number - 1} to be the last" if after else "no entry yet",
            "Run `visionloop gate` again.",
        )
    return entry


def _list_keys(store: ObjectStore, name: str) -> list[str]:
    keys = (key for key in store.list(f"ledger/{name}/") if key.endswith(".json"))
    return sorted(keys, key=lambda key: (len(key), key))


def _read_entry(store: ObjectStore, key: str) -> LedgerEntry:
    try:
        return LedgerEntry.from_json(json.loads(store.get(key)))
    except (ValueError, TypeError, AttributeError) as exc:
        raise PromotionError(
            f"store object {key}", "is damaged", "a ledger entry", "Restore the store from its backup."
        ) from exc
