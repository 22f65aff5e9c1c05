"""Asks the triggers whether a retrain is due: collects what is known, and keeps each decision in the store.

    triggers/NAME/000001.json   one decision, also a "no", with the numbers that it was made by

A call of a webhook holds until the next retrain: with `needs: all` it may have to wait for the other triggers.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from datetime import UTC, datetime

from visionloop import pipeline
from visionloop.data.manifest import load_pin, load_records, load_version, load_version_records
from visionloop.errors import DatasetError, ObjectMissing, ParamsError, shorten
from visionloop.monitoring.triggers import RETRAIN, Look, Signals, TriggerDecision, Window, decide
from visionloop.promotion.ledger import latest_decision, read_champion
from visionloop.records import Decision, ImageRecord, Pin, canonical_json
from visionloop.store import ObjectStore
from visionloop.store.keys import split_numbers
from visionloop.workspace import Workspace

MAX_WHY_CHARS = 300
KEPT_WINDOWS = 400  # the newest that are looked at
LOOK_BACK = 200  # decisions that are read for what was asked and started: a week of hours and more


def decide_retrain(
    workspace: Workspace, *, now: datetime, by: str, hand: str = "", webhook: str = ""
) -> TriggerDecision:
    """Decide whether a retrain is due, and keep the decision. `hand`, `webhook`: what a person or a caller said.

    Raises:
        DatasetError: nothing was ingested yet, or the dataset is damaged.
        ParamsError: `triggers.own_sources` names a source that no image has.
        StoreError: the store cannot be read or written.
    """
    hand, webhook = (" ".join(text.split())[:MAX_WHY_CHARS] for text in (hand, webhook))
    pin, judged = (
        load_pin(workspace.settings.pin_path, workspace.name),
        latest_decision(workspace.store, workspace.name),
    )
    past = read_decisions(workspace.store, workspace.name)[-LOOK_BACK:]
    signals = collect_signals(workspace, pin, judged, past, now=now, hand=hand, webhook=webhook)
    answer = decide(workspace.params.triggers, signals)
    number = past[-1].number + 1 if past else 1
    while True:
        decision = TriggerDecision(
            name=workspace.name,
            number=number,
            at=now.isoformat(timespec="seconds"),
            outcome=answer.outcome,
            why=answer.why,
            looks=tuple(asdict(look) for look in answer.looks),
            dataset=pin.version,
            judged=judged.number if judged else None,
            by=by,
            webhook=webhook,
        )
        if workspace.store.create(_make_key(workspace.name, number), canonical_json(decision.to_json())):
            return decision
        number += 1


def collect_signals(
    workspace: Workspace,
    pin: Pin,
    judged: Decision | None,
    past: Sequence[TriggerDecision],
    *,
    now: datetime,
    hand: str = "",
    webhook: str = "",
) -> Signals:
    """Return what the triggers look at. Raises as `decide_retrain`."""
    champion = read_champion(workspace.store, workspace.name)
    num_new, num_own = _count_new(workspace, pin, judged)
    state = pipeline.compute_state(workspace.settings.home, workspace.params, pin.digest)
    since = max((i for i, one in enumerate(past) if one.outcome == RETRAIN), default=-1)
    calls = [one.webhook for one in past[since + 1 :]]
    return Signals(
        now=now,
        champion=champion.bundle if champion else None,
        promoted_at=_read_time(champion.at) if champion else None,
        judged_at=_read_time(judged.decided_at) if judged else None,
        started=tuple(_read_time(one.at) for one in past if one.outcome == RETRAIN),
        num_new=num_new,
        num_own=num_own,
        is_other=judged is not None and any(judged.state.get(k) != v for k, v in state.items() if k != "dataset"),
        windows=tuple(_read_windows(workspace.store, workspace.name)),
        webhook=tuple(call for call in [*calls, webhook] if call),
        hand=hand,
    )


def read_decisions(store: ObjectStore, name: str, last: int = LOOK_BACK) -> list[TriggerDecision]:
    """Return the newest decisions of a name, the oldest of them first. Raises DatasetError."""
    numbers = split_numbers(store.list(f"triggers/{name}/"), f"triggers/{name}")[0]
    found = []
    for key in (_make_key(name, number) for number in numbers[-last:]):
        try:
            decision = TriggerDecision.from_json(json.loads(store.get(key)))
            _read_time(decision.at)
            [Look.from_json(look) for look in decision.looks]
            found.append(decision)
        except (ValueError, TypeError, AttributeError) as exc:
            todo = "Restore it from the store's backup, or remove it."
            raise DatasetError(f"store object {key}", "is damaged", "a decision of the triggers", todo) from exc
    return found


def _count_new(workspace: Workspace, pin: Pin, judged: Decision | None) -> tuple[int, int]:
    """Count the images whose labels the last judged model did not know; those that a model has labelled apart."""
    records = load_records(workspace.store, pin)
    own_sources = set(workspace.params.triggers.own_sources)
    if unknown := own_sources - {source.name for source in workspace.params.ingest.sources} - _list_sources(records):
        found = f"no source and no image is of {shorten(sorted(unknown))}"
        expected = f"some of {shorten(sorted(_list_sources(records)))}"
        raise ParamsError("params.yaml triggers.own_sources", found, expected, "Edit the file.")
    known: set[tuple[str, tuple[str, ...]]] = set()
    if judged and judged.dataset.get("digest") != pin.digest:
        version = load_version(workspace.store, pin.name, int(judged.dataset["version"]))
        known = {(one.sha256, one.labels) for one in load_version_records(workspace.store, version)}
    elif judged:
        return 0, 0
    new = [one for one in records if one.labels and one.side != "excluded" and (one.sha256, one.labels) not in known]
    num_own = sum(own_sources.issuperset(one.sources) for one in new)
    return len(new) - num_own, num_own


def _list_sources(records: Sequence[ImageRecord]) -> set[str]:
    return {source for record in records for source in record.sources}


def _read_windows(store: ObjectStore, name: str) -> Iterator[Window]:
    """Yield the newest windows of `visionloop monitor`, the oldest first; one that is damaged tells nothing."""
    keys = [key for key in store.list(f"monitoring/{name}/") if key.endswith("/verdict.json")]
    windows = []
    for key in keys[-KEPT_WINDOWS:]:
        try:
            value = json.loads(store.get(key))
            end = _read_time(value["end"])
            windows.append(Window(end, str(value["verdict"]), str(value["bundle"])))
        except (ObjectMissing, ValueError, TypeError, KeyError):
            continue
    yield from sorted(windows, key=lambda window: window.end)


def _read_time(text: str) -> datetime:
    """Return a time of a record; one that names no zone is UTC, as all are. Raises ValueError, TypeError."""
    time = datetime.fromisoformat(text)
    return time if time.tzinfo else time.replace(tzinfo=UTC)


def _make_key(name: str, number: int) -> str:
    return f"triggers/{name}/{number:06d}.json"
