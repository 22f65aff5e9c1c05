"""What was decided and promoted: `decisions/NAME/` and `ledger/NAME/000001.json`. The ledger defines the champion.

An entry is created only if its number is free, so of two promoters only one wins. Entries are never changed or removed.
"""

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from visionloop.errors import NotPromoted, PromotionError
from visionloop.promotion.gate import PASSED
from visionloop.records import Decision, LedgerEntry, canonical_json, compute_digest
from visionloop.store import ObjectStore

AnyRecord = TypeVar("AnyRecord", LedgerEntry, Decision)


def read_champion(store: ObjectStore, name: str) -> LedgerEntry | None:
    """Return the highest entry, whose bundle is the champion; None before the first promotion.

    Raises:
        PromotionError: the entry is damaged.
    """
    keys = _list_keys(store, f"ledger/{name}")
    return _read(store, keys[-1], LedgerEntry, "a ledger entry") if keys else None


def require_entry(store: ObjectStore, name: str, number: int | None = None) -> LedgerEntry:
    """Return the champion's entry, or the one with a number.

    Raises:
        PromotionError: there is none, or it is damaged.
    """
    entries = read_history(store, name) if number is not None else [read_champion(store, name)]
    for entry in entries:
        if entry and number in (None, entry.number):
            return entry
    todo = "Run `python flows/retrain.py`, or name a bundle with --bundle."
    if number is None or not entries:
        raise PromotionError(f"ledger {name}", "has no champion", "a promoted model", todo)
    raise PromotionError(
        f"ledger {name}", f"has no entry {number}", f"1 to {len(entries)}", "See `visionloop history`."
    )


def read_history(store: ObjectStore, name: str) -> list[LedgerEntry]:
    """Return all entries, oldest first. Raises PromotionError."""
    return [_read(store, key, LedgerEntry, "a ledger entry") for key in _list_keys(store, f"ledger/{name}")]


def append_entry(store: ObjectStore, name: str, after: LedgerEntry | None, **facts: Any) -> LedgerEntry:
    """Write the entry that follows `after`, the champion that the caller has read; `facts` are its other fields.

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


def latest_decision(store: ObjectStore, name: str, *, candidate: str | None = None) -> Decision | None:
    """Return the newest decision of a name, or the newest about one candidate (a bundle digest), or None.

    Raises:
        PromotionError: a decision is damaged.
    """
    for key in reversed(_list_keys(store, f"decisions/{name}")):
        decision = _read(store, key, Decision, "a decision")
        if candidate in (None, decision.candidate):
            return decision
    return None


def read_decisions(store: ObjectStore, name: str) -> list[Decision]:
    """Return all decisions of a name, oldest first. Raises PromotionError."""
    return [_read(store, key, Decision, "a decision") for key in _list_keys(store, f"decisions/{name}")]


def require_passed(store: ObjectStore, name: str, candidate: str) -> Decision:
    """Return the newest decision about a candidate if it passed.

    Raises:
        NotPromoted: there is none, or it did not pass; the rules that held it back are named.
    """
    decision = latest_decision(store, name, candidate=candidate)
    where = f"candidate {candidate[:12]}"
    if decision is None:
        raise NotPromoted(where, "has no decision", "one that passed", "Run `visionloop gate`.")
    if decision.verdict != PASSED:
        held = "; ".join(f"{r.rule}: {r.found}, expected {r.expected}" for r in decision.rules if not r.passed)
        raise NotPromoted(
            where,
            f"decision {decision.number} is {decision.verdict} ({held})",
            "one that passed",
            "The champion stays. Train on more images or with other params, then run `visionloop gate`.",
        )
    return decision


def store_decision(store: ObjectStore, decision: Decision) -> Decision:
    """Create the decision under the next free number. If the last decision has the same content, return that one."""
    while True:
        latest = latest_decision(store, decision.name)
        if latest and _compute_question(latest) == _compute_question(decision):
            return latest
        number = latest.number + 1 if latest else 1
        numbered = replace(decision, number=number)
        if store.create(f"decisions/{decision.name}/{number:06d}.json", canonical_json(numbered.to_json())):
            return numbered


def write_decision(folder: Path, decision: Decision) -> None:
    """Copy a decision into the workspace, under its number and as latest.json."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(decision.to_json(), indent=2, ensure_ascii=False) + "\n"
    for name in (f"{decision.number:06d}.json", "latest.json"):
        staged = folder / f".{name}.{os.getpid()}"
        staged.write_text(text, encoding="utf-8")
        os.replace(staged, folder / name)


def _compute_question(decision: Decision) -> str:
    return compute_digest({**decision.to_json(), "number": 0, "decided_at": ""})


def _list_keys(store: ObjectStore, folder: str) -> list[str]:
    """Return the keys of entries or decisions by their number."""
    keys = (key for key in store.list(f"{folder}/") if key.endswith(".json"))
    return sorted(keys, key=lambda key: (len(key), key))


def _read(store: ObjectStore, key: str, kind: type[AnyRecord], what: str) -> AnyRecord:
    try:
        return kind.from_json(json.loads(store.get(key)))
    except (ValueError, TypeError, KeyError, AttributeError) as exc:
        raise PromotionError(f"store object {key}", "is damaged", what, "Restore the store from its backup.") from exc
