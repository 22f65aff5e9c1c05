"""The decisions of the gate: `decisions/NAME/000001.json` in the store, and copies in the workspace. Never changed."""

import json
import os
from dataclasses import replace
from pathlib import Path

from visionloop.errors import NotPromoted, PromotionError
from visionloop.promotion.gate import PASSED
from visionloop.records import Decision, canonical_json, compute_digest
from visionloop.store import ObjectStore


def latest_decision(store: ObjectStore, name: str, *, candidate: str | None = None) -> Decision | None:
    """Return the newest decision of a name, or the newest about one candidate (a bundle digest), or None.

    Raises:
        PromotionError: a decision is damaged.
    """
    for key in reversed(_list_keys(store, name)):
        decision = _read_decision(store, key)
        if candidate in (None, decision.candidate):
            return decision
    return None


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
    """Create the decision under the next free number; if the last one decided just this, return that one instead."""
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


def _list_keys(store: ObjectStore, name: str) -> list[str]:
    keys = (key for key in store.list(f"decisions/{name}/") if key.endswith(".json"))
    return sorted(keys, key=lambda key: (len(key), key))


def _read_decision(store: ObjectStore, key: str) -> Decision:
    try:
        return Decision.from_json(json.loads(store.get(key)))
    except (ValueError, TypeError, KeyError, AttributeError) as exc:
        raise PromotionError(
            f"store object {key}", "is damaged", "a decision", "Restore the store from its backup."
        ) from exc
