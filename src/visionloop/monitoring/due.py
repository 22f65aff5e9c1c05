"""Asks the triggers whether a retrain is due: collects what is known, and keeps each decision in the store.

    triggers/NAME/000001.json   one decision, also a "no", with the numbers that it was made by

A decision knows the one before: so of two that are made at once the second sees what the first has started. A call of a
webhook holds until the next retrain: with `needs: all` it may have to wait for the other triggers.
"""

import contextlib
import json
from collections.abc import Iterable
from dataclasses import asdict, replace
from datetime import UTC, datetime

from visionloop import pipeline
from visionloop.data.compare import pair_rows
from visionloop.data.manifest import load_pin, load_version
from visionloop.data.parts import iterate_records, iterate_version
from visionloop.errors import DatasetError, LeaseHeld, ParamsError, shorten
from visionloop.monitoring.triggers import RETRAIN, Look, Signals, TriggerDecision, Window, decide
from visionloop.monitoring.watch import list_windows, load_verdict
from visionloop.promotion.ledger import latest_decision, read_champion
from visionloop.records import Decision, ImageRecord, Pin, canonical_json
from visionloop.store import ObjectStore
from visionloop.store.keys import make_number_key, split_numbers
from visionloop.store.lease import wait_for_lease
from visionloop.workspace import Workspace

MAX_WHY_CHARS = 300
KEPT_WINDOWS = 400  # the newest that are looked at
KEPT_STARTS, KEPT_CALLS = 50, 20  # the newest that a decision tells the next one


def decide_retrain(
    workspace: Workspace, *, now: datetime, by: str, hand: str = "", webhook: str = ""
) -> TriggerDecision:
    """Decide whether a retrain is due, and keep the decision. `hand`, `webhook`: what a person or a caller said.

    Where a retrain is under way this takes ten seconds, and a minute where one has died: its lease is watched.

    Raises:
        DatasetError: nothing was ingested yet, or the dataset or the last decision is damaged.
        ParamsError: `triggers.own_sources` names a source that no image has.
        StoreError: the store cannot be read or written.
    """
    hand, webhook = (_clean(text) for text in (hand, webhook))
    store, name, section = workspace.store, workspace.name, workspace.params.triggers
    pin, judged = load_pin(workspace.settings.pin_path, name), latest_decision(store, name)
    known = collect_signals(workspace, pin, judged, now=now, hand=hand)
    while True:
        last = next(iter(read_decisions(store, name, 1)), None)
        calls = (*(last.calls if last else ()), *([webhook] if webhook else []))[-KEPT_CALLS:]
        started = last.started if last else ()
        times = tuple(_read_time(one) for one in started)
        answer = decide(section, replace(known, webhook=calls, started=times))
        at = now.isoformat(timespec="seconds")
        is_due = answer.outcome == RETRAIN
        decision = TriggerDecision(
            name=name,
            number=last.number + 1 if last else 1,
            at=at,
            outcome=answer.outcome,
            why=answer.why,
            looks=tuple(asdict(look) for look in answer.looks),
            dataset=pin.version,
            judged=judged.number if judged else None,
            by=by,
            calls=() if is_due else calls,
            # A person's word is not of the budget: that bounds what is started without one.
            started=(*started, at)[-max(KEPT_STARTS, section.max_per_week) :] if is_due and not hand else started,
        )
        if store.create(make_number_key(f"triggers/{name}", decision.number), canonical_json(decision.to_json())):
            return decision


def collect_signals(workspace: Workspace, pin: Pin, judged: Decision | None, *, now: datetime, hand: str) -> Signals:
    """Return what the triggers look at, besides earlier decisions. Raises as `decide_retrain`."""
    champion = read_champion(workspace.store, workspace.name)
    num_new, num_own = _count_new(workspace, pin, judged)
    state = pipeline.compute_state(workspace.settings.home, workspace.params, pin.digest)
    return Signals(
        now=now,
        champion=champion.bundle if champion else None,
        promoted_at=_read_time(champion.at) if champion else None,
        judged_at=_read_time(judged.decided_at) if judged else None,
        num_new=num_new,
        num_own=num_own,
        is_other=judged is not None and any(judged.state.get(k) != v for k, v in state.items() if k != "dataset"),
        windows=_read_windows(workspace),
        hand=hand,
        under_way="" if hand else _find_holder(workspace),
    )


def read_decisions(store: ObjectStore, name: str, last: int) -> list[TriggerDecision]:
    """Return the newest decisions of a name, the oldest of them first. Raises DatasetError."""
    folder, found = f"triggers/{name}", []
    for number in split_numbers(store.list(f"{folder}/"), folder)[0][-last:]:
        key = make_number_key(folder, number)
        try:
            decision = TriggerDecision.from_json({**json.loads(store.get(key)), "number": number})
            [_read_time(one) for one in (decision.at, *decision.started)]
            "".join(decision.calls)
            [Look.from_json(look) for look in decision.looks]
            found.append(decision)
        except (ValueError, TypeError, AttributeError) as exc:
            todo = "Restore it from the store's backup, or remove it."
            raise DatasetError(f"store object {key}", "is damaged", "a decision of the triggers", todo) from exc
    return found


def _clean(text: str) -> str:
    """Return what somebody has said as it can be stored and printed: one line, no control characters, cut."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())[:MAX_WHY_CHARS]


def _find_holder(workspace: Workspace) -> str:
    """Return who is at a retrain, in words; "" if nobody is."""
    try:
        wait_for_lease(workspace.store, workspace.name)
    except LeaseHeld as exc:
        return exc.found
    return ""


def _count_new(workspace: Workspace, pin: Pin, judged: Decision | None) -> tuple[int, int]:
    """Count the images whose labels the last judged model did not know; those that a model has labelled apart."""
    own_sources = set(workspace.params.triggers.own_sources)
    has_sources = set(load_version(workspace.store, pin.name, pin.version).sources)
    if unknown := own_sources - {source.name for source in workspace.params.ingest.sources} - has_sources:
        found = f"no source and no image is of {shorten(sorted(unknown))}"
        expected = f"some of {shorten(sorted(has_sources))}"
        raise ParamsError("params.yaml triggers.own_sources", found, expected, "Edit the file.")
    known: Iterable[ImageRecord] = ()
    if judged and judged.dataset.get("digest") != pin.digest:
        known = iterate_version(
            workspace.store, load_version(workspace.store, pin.name, int(judged.dataset["version"]))
        )
    elif judged:
        return 0, 0
    num_new = num_own = 0
    for before, now in pair_rows(known, iterate_records(workspace.store, pin)):
        if now and now.labels and now.side != "excluded" and (before is None or before.labels != now.labels):
            num_new += 1
            num_own += bool(own_sources & _find_new_sources(now, before))
    return num_new - num_own, num_own


def _find_new_sources(now: ImageRecord, before: ImageRecord | None) -> set[str]:
    """Return the sources that an image has got since, which its new label comes from; else all that it has."""
    return set(now.sources) - set(before.sources if before else ()) or set(now.sources)


def _read_windows(workspace: Workspace) -> tuple[Window, ...]:
    """Return the newest windows of `visionloop monitor`, the oldest first; one that is damaged tells nothing."""
    windows = []
    for name in list_windows(workspace)[-KEPT_WINDOWS:]:
        with contextlib.suppress(DatasetError):
            if one := load_verdict(workspace, name):
                alerts = tuple({check["kind"] for check in one.list_alerts()})
                windows.append(Window(_read_time(one.end), one.verdict, one.bundle, alerts))
    return tuple(windows)


def _read_time(text: str) -> datetime:
    """Return a time of a record; one that names no zone is UTC, as all are. Raises ValueError, TypeError."""
    time = datetime.fromisoformat(text)
    return time if time.tzinfo else time.replace(tzinfo=UTC)
