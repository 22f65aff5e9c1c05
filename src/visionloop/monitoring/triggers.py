"""Decides whether a retrain is due, from what is known at a time. Pure: the clock is an argument.

    retrain   as many triggers fired as are needed, or a person asks
    held      they fired, but it is too early, or nothing new can be learned, or the data is broken
    no        too few fired

A time that is later than now comes from a clock that was wrong, then or now, and is not believed. So a clock that
jumps costs at most the retrains that a week allows; it never holds one back for long.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from visionloop.params.loop import Triggers
from visionloop.records import Record

RETRAIN, HELD, NO = "retrain", "held", "no"
AHEAD = timedelta(hours=1)  # two machines that keep time differ by less
BROKEN_HOLDS = timedelta(days=7)  # a broken window that is older says that nobody watches
WEEK = timedelta(days=7)
DAY_S = 86_400


@dataclass(frozen=True)
class Window:
    """One window of `visionloop monitor`: when it ended, its verdict, the bundle that was served, all that alerted.

    The verdict names the first alert only: while the images drift, the accuracy may be too low as well.
    """

    end: datetime
    verdict: str
    bundle: str
    alerts: tuple[str, ...] = ()

    def says(self, what: str) -> bool:
        return what == self.verdict or (self.verdict != "broken" and what in self.alerts)


@dataclass(frozen=True)
class Signals:
    """What is known. All times are UTC.

    `judged_at`: the last decision of the gate. `started`: the retrains that triggers started. `num_new`: images with
    labels that the last judged model did not know; `num_own` more have labels that a model gave. `is_other`: params,
    code or weights differ from those of the last judged model. `webhook`: what callers said since the last retrain.
    `hand`: why a person wants one, "" if none does. `windows`: the oldest first. `under_way`: who is at a retrain.
    """

    now: datetime
    champion: str | None = None
    promoted_at: datetime | None = None
    judged_at: datetime | None = None
    started: tuple[datetime, ...] = ()
    num_new: int = 0
    num_own: int = 0
    is_other: bool = False
    windows: tuple[Window, ...] = ()
    webhook: tuple[str, ...] = ()
    hand: str = ""
    under_way: str = ""


@dataclass(frozen=True)
class Look(Record):
    """What was looked at: a trigger, or what holds a retrain back. `fired`: the trigger wants one, or this holds it."""

    name: str
    fired: bool
    found: str
    limit: str
    value: float | None = None


@dataclass(frozen=True)
class Answer:
    """What was decided, why, and all that was looked at."""

    outcome: str
    why: str
    looks: tuple[Look, ...]


def decide(section: Triggers, signals: Signals) -> Answer:
    """Decide whether a retrain is due."""
    past = _Past(section, signals)
    triggers = [look for name in section.names if (look := past.look(name))]
    holds = [past.under_way(), past.cool_down(), past.budget(), past.nothing_new(), past.broken()]
    looks = (*triggers, *holds)
    if signals.hand:
        return Answer(RETRAIN, f"by hand: {signals.hand}", looks)
    fired = [look for look in triggers if look.fired]
    told = "; ".join(f"{look.name}: {look.found}" for look in fired)
    if not triggers or len(fired) < section.num_needed:
        of = f"{len(fired)} of {section.num_needed} needed triggers" if triggers else "no trigger is set"
        return Answer(NO, f"{of}{f' ({told})' if told else ''}", looks)
    held = [f"{look.name}: {look.found}" for look in holds if look.fired]
    return Answer(HELD if held else RETRAIN, f"{told}{' -- held by ' * bool(held)}{'; '.join(held)}", looks)


class _Past:
    """What is known, without times that cannot be."""

    def __init__(self, section: Triggers, signals: Signals) -> None:
        self.section, self.signals, self.now = section, signals, signals.now
        self.started = self._believe(signals.started)
        judged = [signals.judged_at] if signals.judged_at else []
        self.last = max([*self.started, *self._believe(judged)], default=None)
        ends = self._believe(window.end for window in signals.windows)
        self.windows = [window for window in signals.windows if window.end in ends]

    def look(self, name: str) -> Look:
        limit = getattr(self.section, name)
        if name == "max_age_days":
            return self._look_at_age(limit)
        if name == "new_images":
            number, own = self.signals.num_new, self.signals.num_own
            more = f"; {own:,} more have labels of a model" if own else ""
            return Look(name, number >= limit, f"{number:,} new images with labels{more}", f"{limit:,}", number)
        if name == "webhook":
            asked = self.signals.webhook
            return Look(name, bool(asked), "; ".join(asked) or "nobody has called", "a call", len(asked))
        row = self._count_row(name.partition("_")[0])
        return Look(name, row >= limit, f"{row} windows in a row", str(limit), row)

    def _look_at_age(self, limit: float) -> Look:
        days = None if self.last is None else max(0.0, (self.now - self.last).total_seconds() / DAY_S)
        found = "never retrained" if days is None else f"{days:.1f} days since the last retrain"
        return Look("max_age_days", days is None or days >= limit, found, f"{limit:g} days", days)

    def _count_row(self, verdict: str) -> int:
        """Count the newest windows in a row with a verdict: of this champion, once it is warm, after the last retrain.

        A retrain that changed nothing begins the row anew, so that one drift does not ask for it again each day.
        """
        since = [self.last] if self.last else []
        if self.signals.promoted_at:
            since.append(self.signals.promoted_at + timedelta(hours=self.section.warmup_hours))
        own = [w for w in self.windows if w.bundle == self.signals.champion and all(w.end > one for one in since)]
        row = 0
        for window in reversed(own):
            if not window.says(verdict):
                break
            row += 1
        return row

    def under_way(self) -> Look:
        """Hold one that could not begin: a call would be taken for answered, and a start be counted."""
        holder = self.signals.under_way
        return Look("under_way", bool(holder), holder or "no retrain is under way", "none")

    def cool_down(self) -> Look:
        hours = None if self.last is None else (self.now - self.last).total_seconds() / 3600
        limit = self.section.cooldown_hours
        found = "never retrained" if hours is None else f"{hours:.1f} hours since the last retrain"
        return Look("cooldown_hours", hours is not None and hours < limit, found, f"{limit:g} hours", hours)

    def budget(self) -> Look:
        number, limit = sum(self.now - one < WEEK for one in self.started), self.section.max_per_week
        return Look("max_per_week", number >= limit, f"{number} retrains in 7 days", f"fewer than {limit}", number)

    def nothing_new(self) -> Look:
        """Hold a retrain that could only learn what was learned already, or what a model said itself."""
        signals = self.signals
        held = signals.judged_at is not None and not signals.num_new and not signals.is_other
        own = f", {signals.num_own:,} with labels of a model" if signals.num_own else ""
        found = f"{signals.num_new:,} new images with labels{own}, {'other' if signals.is_other else 'the same'} params"
        return Look("nothing_new", held, found, "something to learn", signals.num_new)

    def broken(self) -> Look:
        newest = max(self.windows, key=lambda window: window.end, default=None)
        held = newest is not None and newest.verdict == "broken" and self.now - newest.end < BROKEN_HOLDS
        found = f"the newest window is {newest.verdict}" if newest else "no window"
        return Look("broken_data", held, found, "sound data")

    def _believe(self, times: Iterable[datetime]) -> Sequence[datetime]:
        return [one for one in times if one <= self.now + AHEAD]


def describe_looks(looks: Iterable[Look]) -> list[str]:
    """Tell what was looked at, a line each."""
    return [f"  {'*' if look.fired else ' '} {look.name}: {look.found} (limit: {look.limit})" for look in looks]


@dataclass(frozen=True)
class TriggerDecision(Record):
    """One decision as it is stored. `dataset`: the version that was looked at; `judged`: the gate's last decision.

    `calls`: what callers of the webhook have said, and no retrain has answered. `started`: when triggers started
    retrains, this one among them, the newest; none that a person asked for. So the next decision needs no other than
    the last.
    """

    name: str
    number: int
    at: str
    outcome: str
    why: str
    looks: tuple[dict[str, Any], ...]
    dataset: int
    judged: int | None
    by: str
    calls: tuple[str, ...] = ()
    started: tuple[str, ...] = ()
