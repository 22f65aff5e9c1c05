"""What was decided and promoted: `decisions/NAME/` and `ledger/NAME/000001.json`. The ledger defines the champion.

An entry is created only if its number is free, so of two promoters only one wins. Entries are never changed or removed.
What else lies in the folder of a ledger (a backup copy, an entry of another name, a torn file) is named, and not
believed: the champion is that of the highest entry which can be.
"""

import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import pairwise
from pathlib import Path
from typing import Any

from visionloop.bundle import DIGESTS, Bundle
from visionloop.errors import NotPromoted, ObjectMissing, PromotionError, StoreError
from visionloop.parallel import map_parallel
from visionloop.promotion.advice import list_advice
from visionloop.promotion.entries import (
    check_follows,
    find_first,
    list_numbers,
    make_entry_key,
    make_problem,
    read_believable,
    read_entries,
    read_record,
    write_pages,
)
from visionloop.promotion.gate import INCONCLUSIVE, PASSED, REFUSED, WAITING, find_held
from visionloop.records import Decision, LedgerEntry, RuleResult, canonical_json, compute_digest
from visionloop.store import ObjectStore
from visionloop.store.keys import make_number_key
from visionloop.workfolder import write_file

ROLLED_BACK = "rolled_back"
ELDER = 50  # decisions in a row about earlier entries: those before them are not looked at


@dataclass(frozen=True)
class Ledger:
    """A ledger as it was read: the entries that can be believed, oldest first, and what is wrong, one text for each."""

    entries: tuple[LedgerEntry, ...]
    problems: tuple[str, ...]

    @property
    def champion(self) -> LedgerEntry | None:
        return self.entries[-1] if self.entries else None


def read_champion(store: ObjectStore, name: str, *, since: int = 0) -> LedgerEntry | None:
    """Return the highest entry that can be believed, whose bundle is the champion; None before the first promotion.

    Reads one or two objects, also of a long ledger. `since` is the number of an entry that the caller has seen: what is
    before it is not listed.

    Raises:
        PromotionError: there are entries, but none can be believed.
    """
    return next(iterate_history(store, name, since=since), None)


def iterate_history(store: ObjectStore, name: str, *, since: int = 0) -> Iterator[LedgerEntry]:
    """Yield the entries that can be believed, the newest first, each read when it is asked for; `since` as above.

    Raises:
        PromotionError: there are entries, but none can be believed.
    """
    first = find_first(store, name, since)
    numbers, strays = list_numbers(store, f"ledger/{name}", first)
    problem: PromotionError | None = None
    num_found = 0
    while True:
        for number in reversed(numbers):
            try:
                entry = read_believable(store, name, number)
            except PromotionError as exc:
                problem = problem or exc
            else:
                yield entry
                num_found += 1
        if not first:
            break
        numbers, strays = list_numbers(store, f"ledger/{name}")
        numbers, first = [number for number in numbers if number < first], 0
    if not num_found and (problem or strays):
        raise problem or make_problem(strays[0], "is no ledger entry", "000001.json and so on")


def read_ledger(store: ObjectStore, name: str) -> Ledger:
    """Read all of a ledger, and check names, numbers and that each entry follows the one before.

    Raises:
        PromotionError: there are entries, but none can be believed.
    """
    numbers, strays = list_numbers(store, f"ledger/{name}")
    problems = [make_problem(key, "is no ledger entry", "000001.json and so on") for key in strays]
    entries: list[LedgerEntry] = []
    before: LedgerEntry | None = None
    for number, entry in zip(numbers, read_entries(store, name, numbers), strict=True):
        try:
            if isinstance(entry, PromotionError):
                raise entry
            last, before = before, entry
            if number == 1 or (last and last.number == number - 1):
                check_follows(entry, last)
            entries.append(entry)
        except PromotionError as exc:
            problems.append(exc)
    if problems and not entries:
        raise problems[-1]
    told = [f"{problem.where.removeprefix('store object ')} {problem.found}" for problem in problems]
    known_numbers = [0, *(number for number in numbers if entries and number <= entries[-1].number)]
    for low, high in pairwise(known_numbers):
        if high > low + 1:
            lost = f"{low + 1:06d}" + (f" to {high - 1:06d}" if high > low + 2 else "")
            told.append(f"entries are missing: {lost}")
    return Ledger(tuple(entries), tuple(told))


def read_history(store: ObjectStore, name: str) -> list[LedgerEntry]:
    """Return all entries that can be believed, oldest first. Raises PromotionError as `read_ledger`."""
    return list(read_ledger(store, name).entries)


def require_sound(ledger: Ledger, name: str) -> None:
    """Raise PromotionError if something is wrong with a ledger; it names all of it."""
    if ledger.problems:
        champion = f"entry {ledger.champion.number} stays the champion" if ledger.champion else "there is no champion"
        raise PromotionError(
            f"ledger {name}",
            f"{'; '.join(ledger.problems)}; {champion}",
            "entries 000001.json and so on, each after the one before",
            "Move what does not belong there out of the store; restore what is missing from its backup.",
        )


def require_entry(store: ObjectStore, name: str, number: int | None = None) -> LedgerEntry:
    """Return the champion's entry, or the one with a number.

    Raises:
        PromotionError: there is none, or it is damaged.
    """
    champion = read_champion(store, name)
    if champion is None:
        todo = "Run `visionloop start`; `predict`, `explain` and `serve` also take a --bundle."
        raise PromotionError(f"ledger {name}", "has no champion", "a promoted model", todo)
    if number in (None, champion.number):
        return champion
    try:
        return read_believable(store, name, int(number or 0))
    except ObjectMissing as exc:
        found, todo = f"has no entry {number}", "See `visionloop history`."
        raise PromotionError(f"ledger {name}", found, f"1 to {champion.number}", todo) from exc


def find_rolled_back(
    history: Sequence[LedgerEntry], digest: str, identify: Callable[[str], str] = lambda digest: digest
) -> LedgerEntry | None:
    """Return the rollback that took a bundle down, or None: it was not, or a person has put it back since.

    `identify` says what makes two bundles one model; default: their digest.

        1 promote A, 2 promote B, 3 rollback to A: B is down, by entry 3
        4 rollback to B (`--to 2`), or promote B (`--again`): B is up again
    """
    if all(entry.action != "rollback" for entry in history):
        return None
    sought, found = identify(digest), None
    for entry in history:
        if identify(entry.bundle) == sought:
            found = None
        elif entry.action == "rollback" and entry.previous and identify(entry.previous) == sought:
            found = entry
    return found


def check_rolled_back(store: ObjectStore, history: Sequence[LedgerEntry], candidate: Bundle) -> RuleResult | None:
    """Refuse a candidate that was rolled back from, also under another card: its network is the same. None: it was not.

    The same network comes back under another digest when only test images were added: the card names the dataset.
    """

    @cache
    def identify(digest: str) -> str:
        if digest == candidate.digest:
            return candidate.files["model.onnx"]
        try:
            return str(json.loads(store.get(f"bundles/{digest}/{DIGESTS}"))["model.onnx"])
        except (StoreError, ValueError, KeyError, TypeError):
            return digest

    entry = find_rolled_back(history, candidate.digest, identify)
    if entry is None:
        return None
    lasts = "the same network: a rollback lasts, also with another threshold"
    which = "" if entry.previous == candidate.digest else f" (as bundle {str(entry.previous)[:12]}, {lasts})"
    return RuleResult(
        ROLLED_BACK,
        False,
        f"{describe_rollback(entry)}{which}",
        "another model, or a person's word: `visionloop promote --again --why ...`, which lifts this rule alone",
    )


def describe_rollback(entry: LedgerEntry) -> str:
    """Tell who rolled back, when and why."""
    return f"rolled back from by {entry.by} on {entry.at[:10]} (entry {entry.number}): {entry.why}"


def append_entry(store: ObjectStore, name: str, after: LedgerEntry | None, **facts: Any) -> LedgerEntry:
    """Write the entry that follows `after`, the champion that the caller has read; `facts` are its other fields.

    Raises:
        PromotionError: another promoter has written this number: the champion is no longer `after`. Or the number is
            taken by an object that is no entry of this ledger.
    """
    number = after.number + 1 if after else 1
    entry = LedgerEntry(name=name, number=number, previous=after.bundle if after else None, **facts)
    if not store.create(make_entry_key(name, number), canonical_json(entry.to_json())):
        read_believable(store, name, number)
        raise PromotionError(
            f"ledger {name}",
            f"champion moved: entry {number} was written by someone else",
            f"entry {number - 1} to be the last" if after else "no entry yet",
            "Run `visionloop gate` again.",
        )
    with contextlib.suppress(StoreError):  # the entry stands; the next page brings this one too
        write_pages(store, name, number)
    return entry


def latest_decision(store: ObjectStore, name: str, *, candidate: str | None = None) -> Decision | None:
    """Return the newest decision of a name, or the newest about one candidate (a bundle digest), or None.

    Raises:
        PromotionError: a decision is damaged.
    """
    for number in reversed(list_numbers(store, f"decisions/{name}")[0]):
        decision = _read_decision(store, name, number)
        if candidate in (None, decision.candidate):
            return decision
    return None


def read_decisions(store: ObjectStore, name: str, last: int = 0) -> list[Decision]:
    """Return all decisions of a name, or the `last` ones, oldest first. Raises PromotionError."""
    numbers = list_numbers(store, f"decisions/{name}")[0][-last:]
    return list(map_parallel(partial(_read_decision, store, name), numbers, workers=store.num_writers))


def read_decision(store: ObjectStore, name: str, number: int) -> Decision | None:
    """Return one decision; None: there is none with this number. Raises PromotionError."""
    try:
        return _read_decision(store, name, number)
    except ObjectMissing:
        return None


def read_decisions_about(store: ObjectStore, name: str, champion: LedgerEntry | None) -> list[Decision]:
    """Return the decisions that compared with this champion's entry, oldest first. Raises PromotionError.

    Of two gates at once, the one that began earlier may end later: some decisions about earlier entries are passed over
    before the search ends.
    """
    found: list[Decision] = []
    num_elder = 0
    for number in reversed(list_numbers(store, f"decisions/{name}")[0]):
        decision = _read_decision(store, name, number)
        if is_bound(decision, champion):
            found.append(decision)
            num_elder = 0
        elif (num_elder := num_elder + 1) == ELDER:
            break
    return found[::-1]


def find_verdict(store: ObjectStore, name: str, entry: LedgerEntry) -> str:
    """Tell by which verdict an entry was made; its decision may be none, or no longer be there."""
    if entry.decision is None:
        return "no decision"
    try:
        decision = _read_decision(store, name, entry.decision)
    except (ObjectMissing, PromotionError):
        return f"decision {entry.decision}: not there"
    return f"decision {entry.decision}: {describe_by_person(decision, entry) or decision.verdict}"


def describe_by_person(decision: Decision, entry: LedgerEntry | None) -> str:
    """Tell that an entry has promoted what its decision refused, as a person wanted; "" if the entry says no such."""
    is_its = entry is not None and (entry.action, entry.decision) == ("promote", decision.number)
    if entry is None or not is_its or decision.verdict != REFUSED:
        return ""
    return f"promoted by a person (`--again`), as entry {entry.number}"


def require_passed(store: ObjectStore, name: str, candidate: str, *, again: bool = False) -> Decision:
    """Return the newest decision about a candidate if it passed.

    `again`: a person wants the model all the same, which was rolled back from; so no other rule may hold it back.

    Raises:
        NotPromoted: there is none, or it did not pass; the rules that held it back are named.
    """
    decision = latest_decision(store, name, candidate=candidate)
    where = f"candidate {candidate[:12]}"
    if decision is None:
        raise NotPromoted(where, "has no decision", "one that passed", "Run `visionloop gate`.")
    held = [r for r in decision.rules if r.holds_back]
    if decision.verdict == PASSED or (again and held and all(r.rule == ROLLED_BACK for r in held)):
        return decision
    told = "; ".join(f"{r.rule}: {r.found}, expected {r.expected}" for r in held)
    todo = "Train on more images or with other params, then run `visionloop gate`."
    if decision.verdict == INCONCLUSIVE:
        todo = " ".join(list_advice(find_held(INCONCLUSIVE, [rule.to_json() for rule in held])))
    elif decision.verdict == WAITING or all(r.rule == ROLLED_BACK for r in held):
        todo = ""  # the rule says what a person can do
    todo = f"The champion stays. {todo}".strip()
    raise NotPromoted(where, f"decision {decision.number} is {decision.verdict} ({told})", "one that passed", todo)


def is_bound(decision: Decision, champion: LedgerEntry | None) -> bool:
    """Say whether the ledger is where it was when the gate decided.

    A decision holds for one ledger entry: after a rollback and back, the same champion is another entry. One from
    before entries were noted holds for a bundle.
    """
    if decision.entry is None:
        return decision.champion == (champion.bundle if champion else None)
    return decision.entry == (champion.number if champion else 0)


def require_bound(decision: Decision, champion: LedgerEntry | None, *, again: bool = False) -> None:
    """Raise PromotionError unless the ledger is where it was when the gate decided."""
    if is_bound(decision, champion):
        return
    seen = decision.champion[:12] if decision.champion else "no champion"
    found = f"it is now {describe_entry(champion)}"
    expected = f"{seen}{f' (entry {decision.entry})' if decision.entry else ''}, as the gate saw it"
    if champion and decision.entry and champion.bundle == decision.champion:
        found, expected = f"entry {champion.number}, not entry {decision.entry}", "the entry that the gate saw"
    then = ", then `visionloop promote --again --why ...`." if again else " again."
    raise PromotionError(
        f"candidate {decision.candidate[:12]}",
        f"champion moved since decision {decision.number}: {found}",
        expected,
        f"Run `visionloop gate`{then}",
    )


def describe_entry(champion: LedgerEntry | None) -> str:
    """Name a champion by its bundle and its ledger entry."""
    return f"{champion.bundle[:12]} (entry {champion.number})" if champion else "none"


def store_decision(store: ObjectStore, decision: Decision) -> Decision:
    """Create the decision under the next free number. If the last decision has the same content, return that one."""
    while True:
        latest = latest_decision(store, decision.name)
        if latest and _compute_question(latest) == _compute_question(decision):
            return latest
        number = latest.number + 1 if latest else 1
        numbered = replace(decision, number=number)
        if store.create(make_number_key(f"decisions/{decision.name}", number), canonical_json(numbered.to_json())):
            return numbered


def write_decision(folder: Path, decision: Decision) -> None:
    """Copy a decision into the workspace, under its number and as latest.json."""
    text = json.dumps(decision.to_json(), indent=2, ensure_ascii=False) + "\n"
    for name in (f"{decision.number:06d}.json", "latest.json"):
        write_file(folder / name, text.encode())


def _compute_question(decision: Decision) -> str:
    return compute_digest({**decision.to_json(), "number": 0, "decided_at": ""})


def _read_decision(store: ObjectStore, name: str, number: int) -> Decision:
    """Read a decision. Its number is that of its key: a copy under another one would take the next number for ever."""
    return replace(
        read_record(store, make_number_key(f"decisions/{name}", number), Decision, "a decision"), number=number
    )
