"""When a run of another machine is taken for dead: simulated on a server of Prefect that is away now and then.

Minutes of the server's clock. A run beats every three minutes; what cannot be received is sent with a later heartbeat.
"""

import importlib
import random
import types
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from prefect.states import Cancelling, Pending, Running, State

from shapes import ROOT

NOW = datetime(2026, 11, 29, 3, tzinfo=UTC)
BEAT, BEGUN = "prefect.flow-run.heartbeat", "prefect.flow-run.Running"
EVER, DAY = 400.0, 24 * 60.0


class Server:
    """A Prefect server that is away in some spans of minutes, and what it has received: `asked_at` is its time."""

    def __init__(self, *away: tuple[float, float]) -> None:
        self.away, self.asked_at, self.queries = away, 0.0, 0
        self.events: list[Any] = []

    def is_up(self, minute: float) -> bool:
        return not any(start <= minute < end for start, end in self.away)

    def hear(
        self, run: str, start: float, end: float, *, every: float = 3, ahead: float = 0, event: str = BEAT
    ) -> "Server":
        """A run that beats from `start` until it is gone; its clock may be ahead."""
        told = [start + every * i for i in range(int((end - start) // every) + 1)]
        for i, minute in enumerate(told):
            received = next((later for later in told[i:] if self.is_up(later)), None)
            if received is not None:
                self.tell(run, minute + ahead, received, event)
        return self

    def tell(self, run: str, occurred: float, received: float, event: str = BEAT) -> "Server":
        times = {"occurred": NOW + timedelta(minutes=occurred), "received": NOW + timedelta(minutes=received)}
        self.events.append(types.SimpleNamespace(run=f"prefect.flow-run.{run}", event=event, **times))
        return self

    def read_events(self, asked: Any, limit: int) -> Any:
        self.queries += 1
        is_old_first = asked.order.value == "ASC"
        found = [
            one
            for one in self.events
            if one.received <= NOW + timedelta(minutes=self.asked_at)
            and asked.occurred.since <= one.occurred <= asked.occurred.until
            and one.event in asked.event.name
            and (asked.resource is None or one.run in asked.resource.id)
        ]
        found.sort(key=lambda one: one.occurred, reverse=not is_old_first)
        return types.SimpleNamespace(events=found[:limit])


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "flows"))
    module = importlib.import_module("told")
    set_interval(monkeypatch, module, 180)
    return module


def set_interval(monkeypatch: pytest.MonkeyPatch, told: Any, every_s: int | None) -> None:
    settings = types.SimpleNamespace(flows=types.SimpleNamespace(heartbeat_frequency=every_s))
    monkeypatch.setattr(told, "get_current_settings", lambda: settings)


def find_closed(told: Any, server: Server, until: float, step: float = 1) -> float | None:
    """Return the minute at which run `x` would be closed, if somebody looked every minute at which the server is up."""
    run, minute = types.SimpleNamespace(id="x", state=Running()), 0.0
    while minute <= until:
        server.asked_at = minute
        if server.is_up(minute) and told.is_silent(server, run):
            return minute
        minute += step
    return None


def dead_at(minute: float, *away: tuple[float, float], **more: float) -> Server:
    return Server(*away).hear("x", 0, minute, **more)


OUTAGE = (31.0, 95.0)
# A run that lives is never closed; one that is dead is, some day. The run in question beats at 0, 3, ... minutes.
CASES: dict[str, tuple[Server, float | None]] = {
    "others beat on": (dead_at(30).hear("a", 1, EVER), 52),  # it was due at 34.5; heard: 37, 40, 43, 46, 49, 52
    "it lives": (dead_at(EVER).hear("a", 1, EVER), None),
    "it died in an outage": (dead_at(40, OUTAGE).hear("a", 1, EVER), 112),
    "it lives on after an outage": (dead_at(EVER, OUTAGE).hear("a", 1, EVER), None),
    "it lives, and the others were heard first": (dead_at(EVER, (31, 98.9)).hear("a", 0.9, EVER), None),
    "the server is up for a minute each ten": (
        dead_at(EVER, *[(10 * i + 1.5, 10 * i + 9.5) for i in range(20)]).hear("a", 0.5, EVER).hear("b", 1.5, EVER),
        None,
    ),
    "nobody else beats": (dead_at(30), None),
    "only short runs, each hour": (
        [server := dead_at(30), *(server.hear(f"{i}", 60 * i, 60 * i + 1) for i in range(1, 30))][0],
        360,
    ),
    "its clock is a day ahead": (dead_at(30, ahead=DAY).hear("a", 1, EVER), 52),
    "its clock is a day behind": (dead_at(30, ahead=-DAY).hear("a", 1, EVER), 52),
    "it lives, with a clock a day ahead": (dead_at(EVER, OUTAGE, ahead=DAY).hear("a", 1, EVER), None),
    "it lives, with a clock a day behind": (dead_at(EVER, OUTAGE, ahead=-DAY).hear("a", 1, EVER), None),
    "clocks of others are an hour ahead": (dead_at(30).hear("a", 1, EVER, ahead=60), 52),
    "clocks of others are ten minutes behind": (dead_at(30).hear("a", 1, EVER, ahead=-10), 121),
    "two hundred others": (
        [server := dead_at(30), *(server.hear(f"{i}", i / 70, 90) for i in range(200))][0],
        50,
    ),
    "it beats every twenty minutes, and lives": (dead_at(EVER, every=20).hear("a", 1, EVER), None),
    "it beat every twenty minutes": (dead_at(40, every=20).hear("a", 1, EVER), 175),
}


@pytest.mark.parametrize("case", CASES)
def test_a_run_is_closed_after_six_heartbeats_that_were_missed_while_those_of_others_were_heard(
    told: Any, case: str
) -> None:
    server, closed = CASES[case]
    assert find_closed(told, server, until=EVER - 10) == closed


def test_no_run_that_lives_is_closed_whatever_the_outages(told: Any) -> None:
    """Of ten servers, with up to eight outages of up to two hours."""
    rng = random.Random(19)
    for _ in range(10):
        starts = sorted(rng.uniform(20, 500) for _ in range(rng.randint(1, 8)))
        server = Server(*[(start, start + rng.uniform(1, 120)) for start in starts])
        for name in ("x", "a", "b", "c"):
            server.hear(name, rng.uniform(0, 3), 700, every=rng.uniform(3, 3.2), ahead=rng.uniform(-90, 90))
        assert find_closed(told, server, until=640, step=13) is None, server.away


@pytest.mark.parametrize(
    ("state", "events", "every_s"),
    [
        (Pending(), [(BEAT, 0)], 180),
        (Running(), [], 180),
        (Running(), [(BEGUN, 0)], 180),
        (Running(), [(BEAT, 0), (BEGUN, 30)], 180),
        (Running(), [(BEAT, 0)], None),
    ],
)
def test_of_a_run_that_has_not_beaten_since_it_was_begun_nothing_is_known(
    told: Any, monkeypatch: pytest.MonkeyPatch, state: State[Any], events: Sequence[tuple[str, float]], every_s: Any
) -> None:
    """Also where the server is told of no heartbeats: it never was up to hear of those."""
    set_interval(monkeypatch, told, every_s)
    server = Server().hear("a", 1, EVER)
    server.asked_at = 500
    for event, minute in events:
        server.tell("x", minute, minute, event)
    assert told.is_silent(server, types.SimpleNamespace(id="x", state=state)) is False


def test_a_run_that_somebody_cancels_is_closed_too_and_one_that_lives_costs_two_questions(told: Any) -> None:
    server = dead_at(30).hear("a", 1, EVER)
    server.asked_at = 60
    assert told.is_silent(server, types.SimpleNamespace(id="x", state=Cancelling())) is True
    server.asked_at, server.queries = 30, 0
    assert told.is_silent(server, types.SimpleNamespace(id="x", state=Running())) is False
    assert server.queries == 2
