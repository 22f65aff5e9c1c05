"""What of the answers may enter the dataset. A label counts once it is accepted.

review/NAME/accepted/000001.json     labels that somebody has accepted; a later one of an image replaces an earlier one

A label waits until a person accepts it, or its giver is one of `review.accept_at_once`. People who disagree on an image
hold it. Of feedback, which comes from clients, only so many labels of one client and day are accepted; and none that
repeats the model's answer without the name of a person.

Feedback is read from `review.days` before the last acceptance on, and of the last 90 days at most.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import Any

from visionloop.data.answers import (
    FEEDBACK_KIND,
    LABEL,
    LOG,
    NOT_OURS,
    RANDOM,
    SUSPECTS,
    Asked,
    Labels,
    Opinion,
    keep_image,
    load_feedback_opinions,
    load_numbered,
    load_opinions,
)
from visionloop.data.drop import load_aside
from visionloop.data.manifest import latest_version
from visionloop.data.parts import iterate_version
from visionloop.data.tombstones import load_tombstones
from visionloop.errors import ObjectMissing, SettingsError, shorten
from visionloop.params import Review
from visionloop.records import Record, canonical_json
from visionloop.store import ObjectStore
from visionloop.store.keys import make_number_key, split_numbers

WAITS = timedelta(days=90)  # feedback, to be accepted
SURE = 0.9  # a confidence of the model that a label is held against
SOURCE_KINDS = {"review": (LOG, SUSPECTS), "feedback": (FEEDBACK_KIND,)}  # of a source: what it takes


@dataclass(frozen=True)
class Accepted(Record):
    """A label that may enter the dataset: `who` gave it, on which day, and all that decides its side.

    `client`: whose quota it counts in; None for answers of people who were asked. `at`: when it was accepted. `heard`:
    all that was said of the image then, which is settled by it. `confidence`: of the model, in `before`.
    """

    sha256: str
    labels: Labels
    who: Labels
    kind: str
    client: str | None
    on: str
    day: str
    request_id: str
    reason: str
    probability: float | None
    before: Labels
    heard: Labels = ()
    at: str = ""
    confidence: float | None = None

    @property
    def is_doubtful(self) -> bool:
        """Whether the model had answered another label, and was sure: a slip of the hand, or what it must learn."""
        return self.kind != SUSPECTS and self.labels != self.before and (self.confidence or 0.0) >= SURE

    @property
    def changes(self) -> bool:
        """Whether it says something new: that the label of a suspect is right changes nothing."""
        return self.kind != SUSPECTS or self.labels != self.before


@dataclass(frozen=True)
class Settled:
    """What can be accepted, and what is held and why: `conflicts` by sha256, `over_quota` and `echoes` by client."""

    labels: tuple[Accepted, ...] = ()
    conflicts: Mapping[str, str] = field(default_factory=dict)
    over_quota: Mapping[str, int] = field(default_factory=dict)
    echoes: int = 0
    num_not_ours: int = 0
    gone: Labels = ()


def settle(
    opinions: Iterable[Opinion], known: Mapping[str, Accepted], *, quota: int, only: str | None = None
) -> Settled:
    """Decide what can be accepted, beside the labels that are `known`. `only`: of one person or client alone.

    Where people who were asked have answered, feedback of clients does not count, also not if it is that of `only`.
    Example, with a quota of 2 a day: ann says cat on one image, and bob dog: a conflict. The client `gate` sends three
    labels on Monday: the first two can be accepted, the third is over the quota.
    """
    by_image: dict[str, list[Opinion]] = {}
    for one in sorted(opinions, key=lambda one: (one.time, one.asked.sha256)):
        if one.verdict in (LABEL, NOT_OURS):
            by_image.setdefault(one.asked.sha256, []).append(one)
    used: Counter[tuple[str, str]] = Counter((one.client, one.on) for one in known.values() if one.client is not None)
    found, conflicts, over = list[Accepted](), dict[str, str](), Counter[str]()
    echoes = num_not_ours = 0
    for sha256, said in by_image.items():
        asked = [one for one in said if one.kind != FEEDBACK_KIND]
        everything = asked or [one for one in said if not one.is_echo]
        echoes += len(said) - len(everything) if not asked else 0
        heard = [one for one in everything if only is None or only in (one.who, one.client)]
        settled = tuple(f"{one.giver} {one.time.isoformat()}" for one in everything)
        if not heard or (sha256 in known and known[sha256].at and {*settled} <= {*known[sha256].heard}):
            continue
        earlier = {} if asked or only is not None else _list_earlier(known.get(sha256), everything)
        if len({(one.verdict, one.labels) for one in heard} | {(LABEL, labels) for labels in earlier.values()}) > 1:
            words = [f"{giver}: {', '.join(labels)}" for giver, labels in earlier.items()]
            conflicts[sha256] = "; ".join([*words, *(f"{one.giver}: {_name(one)}" for one in heard)])
        elif heard[0].verdict == NOT_OURS:
            num_not_ours += 1
        elif sha256 not in known or known[sha256].labels != heard[0].labels:
            new = _accept(heard, settled)
            if new.client is not None:
                if used[new.client, new.on] >= quota:
                    over[new.client] += 1
                    continue
                used[new.client, new.on] += 1
            found.append(new)
    return Settled(tuple(found), conflicts, dict(over), echoes, num_not_ours)


def _accept(heard: Sequence[Opinion], settled: Labels) -> Accepted:
    """Return the label that all givers agree on; of the random share if one of them was asked for it there."""
    first = next((one for one in heard if one.asked.reason == RANDOM), heard[0])
    is_feedback = first.kind == FEEDBACK_KIND
    return Accepted(
        sha256=first.asked.sha256,
        labels=first.labels,
        who=tuple(sorted({one.who or one.client or "nobody" for one in heard})),
        kind=first.kind,
        client=(first.client or "") if is_feedback else None,
        on=first.time.astimezone(UTC).date().isoformat(),
        day=first.asked.day,
        request_id=first.asked.request_id,
        reason=first.asked.reason,
        probability=first.asked.probability,
        before=first.asked.model,
        heard=settled,
        confidence=first.asked.confidence,
    )


def _list_earlier(known: Accepted | None, said: Sequence[Opinion]) -> dict[str, Labels]:
    """Return the label that was accepted, by each who gave it in feedback that is not read any more: it counts."""
    if known is None or not known.at or known.kind != FEEDBACK_KIND:
        return {}
    givers = {one.rpartition(" ")[0] for one in known.heard} - {one.giver for one in said}
    return dict.fromkeys(sorted(givers), known.labels)


def accept(store: ObjectStore, name: str, rules: Review, *, by: str, now: datetime, only: str | None = None) -> Settled:
    """Accept all that can be accepted, of all or `only` of one person or client; return it, and what stays held.

    Raises:
        StoreError, DatasetError: the store cannot be read or written, or is damaged.
    """
    folder = _folder(name)
    while True:
        settled = look(store, name, rules, now=now, only=only)
        gone = []
        for one in settled.labels:
            try:
                keep_image(store, name, Asked(one.sha256, one.day, "", (), 0.0, ""))
            except ObjectMissing:
                gone.append(one.sha256)
        at = now.isoformat()
        taken = tuple(replace(one, at=at) for one in settled.labels if one.sha256 not in gone)
        settled = replace(settled, labels=taken, gone=tuple(gone))
        if not taken:
            return settled
        numbers = split_numbers(store.list(f"{folder}/"), folder)[0]
        value = {"at": at, "by": by, "only": only, "images": [one.to_json() for one in taken]}
        store.sync()
        if store.create(make_number_key(folder, max(numbers, default=0) + 1), canonical_json(value)):
            return settled


def look(store: ObjectStore, name: str, rules: Review, *, now: datetime, only: str | None = None) -> Settled:
    """Return what could be accepted now, and what not. Raises as `accept`."""
    known = load_accepted(store, name, rules)
    opinions = [*load_opinions(store, name), *load_waiting_feedback(store, name, rules, now=now)]
    return settle(opinions, known, quota=rules.client_quota, only=only)


def check_giver(store: ObjectStore, name: str, rules: Review, giver: str, *, now: datetime) -> None:
    """Refuse a person or client who has said nothing, and name those whose labels wait. Raises SettingsError."""
    opinions = [*load_opinions(store, name), *load_waiting_feedback(store, name, rules, now=now)]
    if any(giver in (one.who, one.client) for one in opinions):
        return
    settled = settle(opinions, load_accepted(store, name, rules), quota=rules.client_quota)
    waiting = {*settled.conflicts, *(one.sha256 for one in settled.labels)}
    names = {one.who or one.client or "" for one in opinions if one.verdict == LABEL and one.asked.sha256 in waiting}
    wait = (
        f"{shorten([*(names - {''})], 10)}, whose labels wait" if names - {""} else "one who has; no named label waits"
    )
    raise SettingsError(f"--from {giver}", "has answered nothing", wait, "Mend the name.")


def load_waiting_feedback(store: ObjectStore, name: str, rules: Review, *, now: datetime) -> list[Opinion]:
    """Return the feedback that may wait to be accepted: all of it would be read each time. Raises as `accept`."""
    values = load_numbered(store, _folder(name), _read_acceptance)
    at = [datetime.fromisoformat(value["at"]) for value in values if value["only"] is None]
    last = [min(at[-1], now) - timedelta(days=rules.days)] if at else []  # the clock may have been wrong then
    return load_feedback_opinions(store, name, max([now - WAITS, *last]))


def load_accepted(store: ObjectStore, name: str, rules: Review) -> dict[str, Accepted]:
    """Return the labels that may enter the dataset, by sha256: those accepted, and those that need no word.

    Raises:
        StoreError, DatasetError: the store cannot be read, or is damaged.
    """
    known: dict[str, Accepted] = {}
    for value in load_numbered(store, _folder(name), _read_acceptance):
        known.update((one.sha256, one) for one in _read_acceptance(value))
    if at_once := {*rules.accept_at_once}:
        settled = settle(load_opinions(store, name), known, quota=0)
        known.update((one.sha256, one) for one in settled.labels if at_once.intersection(one.who))
    return known


@dataclass(frozen=True)
class Answered:
    """The labels of a dataset that people gave, by sha256, and where the bytes are.

    `sides`: of images that it has. `past_tests`: those that were on test, and were taken out.
    """

    store: ObjectStore
    name: str
    labels: Mapping[str, Accepted]
    sides: Mapping[str, str] = field(default_factory=dict)
    past_tests: frozenset[str] = frozenset()

    def choose(self, kinds: Iterable[str]) -> list[Accepted]:
        """Return the labels that say something new, of the sources of some kinds, in the order of the images."""
        wanted = {kind for one in kinds for kind in SOURCE_KINDS.get(one, ())}
        labels = [one for _, one in sorted(self.labels.items()) if one.kind in wanted and one.changes]
        return [one for one in labels if not self._is_on_test(one)]

    def count_on_test(self) -> int:
        """Return of how many test images clients say what they show, which changes nothing."""
        return sum(self._is_on_test(one) for one in self.labels.values())

    def _is_on_test(self, one: Accepted) -> bool:
        is_test = self.sides.get(one.sha256) == "test" or one.sha256 in self.past_tests
        return one.kind == FEEDBACK_KIND and is_test


def load_answered(store: ObjectStore, name: str, rules: Review) -> Answered:
    """Return all of it. Raises as `load_accepted`."""
    labels = load_accepted(store, name, rules)
    may_be_known = any(one.kind in (SUSPECTS, FEEDBACK_KIND) for one in labels.values())
    version = latest_version(store, name) if may_be_known else None
    rows = iterate_version(store, version) if version else ()
    sides = {one.sha256: one.side for one in rows if one.sha256 in labels}
    aside = load_aside(store, version) if version else {}
    gone = {sha256 for sha256, row in aside.items() if row.side == "test" and sha256 in labels}
    return Answered(store, name, labels, sides, frozenset(gone - sides.keys()))


def describe_unread(store: ObjectStore, name: str, rules: Review, kinds: Iterable[str]) -> list[str]:
    """Say which accepted labels wait because no source is of their kind. Raises as `load_accepted`.

    Those of images that the dataset has, or had, do not wait; but a suspect's does, where it has another label there.
    """
    missing = sorted(SOURCE_KINDS.keys() - {*kinds})
    answered = load_answered(store, name, rules) if missing else None
    labels = answered.choose(missing) if answered else []
    version = latest_version(store, name) if labels else None
    if answered is None or version is None:
        return []
    wanted = {one.sha256 for one in labels}
    has = {row.sha256: row.labels for row in iterate_version(store, version) if row.sha256 in wanted}
    gone = load_aside(store, version).keys() | load_tombstones(store, name)

    def waits(one: Accepted) -> bool:
        if one.kind == SUSPECTS:
            return one.sha256 in has and has[one.sha256] != one.labels
        return one.sha256 not in has and one.sha256 not in gone

    lines = []
    for kind in missing:
        if number := sum(one.kind in SOURCE_KINDS[kind] for one in labels if waits(one)):
            wait = "1 accepted label waits" if number == 1 else f"{number:,} accepted labels wait"
            lines.append(f"LOOK: {wait}: add `- kind: {kind}` under ingest.sources in params.yaml, which takes them in")
    return lines


def _folder(name: str) -> str:
    return f"review/{name}/accepted"


def _read_acceptance(value: Mapping[str, Any]) -> list[Accepted]:
    return [Accepted.from_json(one) for one in value["images"]]


def _name(one: Opinion) -> str:
    return "not an image of ours" if one.verdict == NOT_OURS else ", ".join(one.labels) or "no label"
