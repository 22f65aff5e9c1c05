"""A month of decisions, day by day, with a clock that the test turns; and each thing that holds a retrain back."""

from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from typing import Any

import pytest

from visionloop.errors import ParamsError
from visionloop.monitoring.triggers import Answer, Signals, Window, decide, describe_looks
from visionloop.params import Triggers, make_params

START = datetime(2026, 3, 1, 4, tzinfo=UTC)
DAY = timedelta(days=1)
SECTION = Triggers(
    max_age_days=14, new_images=500, drift_windows=2, quality_windows=2, own_sources=("feedback",), max_per_week=2
)


@dataclass(frozen=True)
class Day:
    """What a night brings before the decision: new labels, labels of the model, the verdict of the last window."""

    new: int = 0
    own: int = 0
    window: str = "fine"
    clock: timedelta = timedelta()
    refused: bool = False


@dataclass
class Loop:
    """A loop as the triggers see it: what a retrain takes away from them, and what it leaves."""

    section: Triggers
    signals: Signals = field(default_factory=lambda: Signals(START))
    bundle: int = 0
    answers: list[Answer] = field(default_factory=list)

    def live(self, number: int, day: Day) -> None:
        true_now = START + number * DAY
        window = Window(true_now - timedelta(hours=4), day.window, str(self.bundle))
        known = self.signals
        self.signals = replace(
            known,
            now=true_now + day.clock,
            num_new=known.num_new + day.new,
            num_own=known.num_own + day.own,
            windows=(*known.windows, *([window] if day.window else [])),
        )
        answer = decide(self.section, self.signals)
        self.answers.append(answer)
        if answer.outcome == "retrain":
            self.retrain(promoted=not day.refused)

    def retrain(self, *, promoted: bool) -> None:
        now = self.signals.now
        self.bundle += promoted
        self.signals = replace(
            self.signals,
            judged_at=now + timedelta(hours=2),
            started=(*self.signals.started, now),
            promoted_at=now + timedelta(hours=2) if promoted else self.signals.promoted_at,
            champion=str(self.bundle),
            num_new=0,
            num_own=0,
        )


MONTH = {
    0: Day(new=2000),  # the first model
    3: Day(new=5000),  # a burst
    4: Day(new=5000),  # and another one the next day
    5: Day(new=5000),  # the week's budget is spent
    6: Day(),
    9: Day(window=""),  # empty days: no traffic, no window
    10: Day(window="drift"),
    11: Day(window="drift"),  # drift, and the same images as before
    12: Day(window="drift", new=40),  # the first labels of it come two days late
    13: Day(window="drift"),  # a new champion: a day to warm up
    14: Day(window="drift"),
    15: Day(clock=40 * DAY),  # the clock is 40 days ahead, for a night
    16: Day(new=10),
    18: Day(clock=-3 * DAY, new=10),  # and 3 days behind
    20: Day(window="broken", new=3000),  # an upstream that sends grey images, with labels
    21: Day(window="broken", new=3000),
    22: Day(),  # it is mended
    24: Day(window="quality", own=800),
    25: Day(window="quality", own=800),
    26: Day(window="quality", own=800),  # only the model's own answers to learn from
    27: Day(window="quality", new=1, refused=True),
    28: Day(window="quality", new=30),
    29: Day(window="quality", new=30),
}
EXPECTED = {
    0: ("retrain", "max_age_days: never retrained; new_images: 2,000 new images"),
    3: ("retrain", "new_images: 5,000 new images with labels"),
    4: ("held", "held by cooldown_hours: 22.0 hours since the last retrain; max_per_week: 2 retrains in 7 days"),
    5: ("held", "held by max_per_week: 2 retrains in 7 days"),
    6: ("held", "held by max_per_week: 2 retrains in 7 days"),
    7: ("retrain", "new_images: 10,000 new images with labels"),
    11: ("held", "drift_windows: 2 windows in a row -- held by nothing_new: 0 new images with labels, the same params"),
    12: ("retrain", "drift_windows: 3 windows in a row"),
    15: ("held", "max_age_days: 42.9 days since the last retrain -- held by nothing_new"),
    20: ("held", "new_images: 3,020 new images with labels -- held by broken_data: the newest window is broken"),
    21: ("held", "new_images: 6,020 new images with labels -- held by broken_data: the newest window is broken"),
    22: ("retrain", "new_images: 6,020 new images with labels"),
    25: ("held", "held by nothing_new: 0 new images with labels, 1,600 with labels of a model, the same params"),
    26: ("held", "quality_windows: 3 windows in a row -- held by nothing_new"),
    27: ("retrain", "quality_windows: 4 windows in a row"),
    29: ("retrain", "quality_windows: 2 windows in a row"),
}


def live(days: dict[int, Day], section: Triggers = SECTION) -> list[Answer]:
    loop = Loop(section)
    for number in range(31):
        loop.live(number, days.get(number, Day()))
    return loop.answers


def test_a_month_retrains_exactly_when_the_table_says() -> None:
    answers = live(MONTH)
    found = {n: (a.outcome, a.why) for n, a in enumerate(answers) if a.outcome != "no"}
    assert {n: outcome for n, (outcome, _) in found.items()} == {n: outcome for n, (outcome, _) in EXPECTED.items()}
    assert {n: why for n, (_, why) in found.items() if EXPECTED[n][1] not in why} == {}


def test_a_loop_is_not_fed_by_the_models_own_labels() -> None:
    """Drift and poor quality each day, thousands of answers of the model as labels: nothing is learned from them."""
    days = {n: Day(own=3000, window="drift" if n % 8 < 4 else "quality") for n in range(1, 31)}
    answers = live({0: Day(new=2000), **days})
    assert [n for n, a in enumerate(answers) if a.outcome == "retrain"] == [0]
    assert sum(a.outcome == "held" for a in answers) > 15


def test_no_label_no_window_and_no_traffic_for_a_month() -> None:
    days = {n: Day(window="") for n in range(1, 31)}
    answers = live({0: Day(new=2000, window=""), **days})
    assert [n for n, a in enumerate(answers) if a.outcome != "no"] == [0, *range(15, 31)], "held: nothing is new"


@pytest.mark.parametrize("jump", [-400 * DAY, -DAY, DAY, 400 * DAY])
def test_a_clock_that_jumps_for_good_costs_at_most_a_week_of_retrains(jump: timedelta) -> None:
    days = {n: Day(new=1000, clock=jump if n >= 10 else timedelta()) for n in range(31)}
    retrains = [n for n, a in enumerate(live(days)) if a.outcome == "retrain"]
    steady = [n for n, a in enumerate(live({n: Day(new=1000) for n in range(31)})) if a.outcome == "retrain"]
    assert abs(len(retrains) - len(steady)) <= SECTION.max_per_week
    assert max(b - a for a, b in pairwise(retrains)) <= 8, "it holds nothing back for long"


NOW = datetime(2026, 5, 1, tzinfo=UTC)
QUIET = Signals(NOW, "a", NOW - 9 * DAY, NOW - 9 * DAY, num_new=5)


def choose(section: dict[str, Any], **known: Any) -> tuple[str, str]:
    answer = decide(Triggers(**section), replace(QUIET, **known))
    return answer.outcome, answer.why


def test_without_a_trigger_only_a_person_starts_a_retrain() -> None:
    assert choose({}) == ("no", "no trigger is set")
    assert choose({}, hand="new camera") == ("retrain", "by hand: new camera")


def test_a_person_is_not_held_back() -> None:
    held = {"started": (NOW - timedelta(hours=1),) * 9, "num_new": 0, "windows": (Window(NOW, "broken", "a"),)}
    assert choose({"new_images": 1}, **{**held, "num_new": 1})[0] == "held"
    assert choose({"new_images": 1}, **held, hand="now")[0] == "retrain"


@pytest.mark.parametrize(("needs", "outcomes"), [("any", "RRR"), (2, "nRR"), ("all", "nnR"), (3, "nnR")])
def test_any_all_or_at_least_so_many(needs: str | int, outcomes: str) -> None:
    section = {"max_age_days": 7.0, "new_images": 6, "webhook": True, "needs": needs}
    found = [
        choose(section),
        choose(section, webhook=("a new menu",)),
        choose(section, webhook=("a new menu", "again"), num_new=6),
    ]
    assert "".join("R" if outcome == "retrain" else "n" for outcome, _ in found) == outcomes
    assert found[1][1] == {
        "any": "max_age_days: 9.0 days since the last retrain; webhook: a new menu",
        2: "max_age_days: 9.0 days since the last retrain; webhook: a new menu",
    }.get(needs, "2 of 3 needed triggers (max_age_days: 9.0 days since the last retrain; webhook: a new menu)")


def test_other_params_or_code_are_something_to_learn() -> None:
    assert choose({"max_age_days": 7.0}, num_new=0)[0] == "held"
    assert choose({"max_age_days": 7.0}, num_new=0, is_other=True)[0] == "retrain"


def test_a_broken_window_of_long_ago_holds_nothing_back() -> None:
    """The newest one, but a week old: nobody watches any more."""
    old, new = (Window(NOW - days * DAY, "broken", "a") for days in (8, 6))
    assert choose({"max_age_days": 7.0}, windows=(old,))[0] == "retrain"
    assert choose({"max_age_days": 7.0}, windows=(old, new))[0] == "held"


def test_windows_of_another_model_say_nothing_of_the_champion() -> None:
    """As after a rollback, which is no retrain."""
    for bundle, outcome in (("a", "retrain"), ("b", "no")):
        windows = tuple(Window(NOW - days * DAY, "drift", bundle) for days in (3, 2))
        assert choose({"drift_windows": 2}, windows=windows)[0] == outcome


def test_drift_does_not_hide_that_the_accuracy_is_too_low() -> None:
    """The verdict names the first alert; broken data says nothing of the model."""
    for verdict, outcome in (("drift", "retrain"), ("quality", "retrain"), ("broken", "no"), ("service", "no")):
        alerts = ("drift", "quality") if verdict != "service" else ("service",)
        windows = tuple(Window(NOW - days * DAY, verdict, "a", alerts) for days in (3, 2))
        assert choose({"quality_windows": 2}, windows=windows)[0] == outcome, verdict


def test_a_retrain_under_way_holds_the_next_but_for_a_person() -> None:
    known = {"under_way": "ann on b (process 3) is at it", "webhook": ("a new menu",)}
    told = "webhook: a new menu -- held by under_way: ann on b (process 3) is at it"
    assert choose({"webhook": True}, **known) == ("held", told)
    assert choose({"webhook": True}, **known, hand="now")[0] == "retrain"


def test_what_was_looked_at_is_told_with_its_numbers() -> None:
    answer = decide(Triggers(new_images=6, max_age_days=7.0), QUIET)
    assert describe_looks(answer.looks) == [
        "  * max_age_days: 9.0 days since the last retrain (limit: 7 days)",
        "    new_images: 5 new images with labels (limit: 6)",
        "    under_way: no retrain is under way (limit: none)",
        "    cooldown_hours: 216.0 hours since the last retrain (limit: 24 hours)",
        "    max_per_week: 0 retrains in 7 days (limit: fewer than 3)",
        "    nothing_new: 5 new images with labels, the same params (limit: something to learn)",
        "    broken_data: no window (limit: sound data)",
    ]
    assert [look.value for look in answer.looks] == [9.0, 5, None, 216.0, 0, 5, None]


@pytest.mark.parametrize(
    ("section", "told"),
    [
        ({"needs": 2, "new_images": 5}, "triggers.needs: got 2; expected any, all, or at most 1: so many triggers are"),
        ({"needs": "some"}, "triggers.needs: got 'some'; expected "),
        ({"new_images": 0}, "triggers.new_images: got 0; expected "),
        ({"new_images": "many"}, "triggers.new_images: got 'many'; expected "),
        ({"max_age_days": -1}, "triggers.max_age_days: got -1; expected "),
        ({"max_age_days": float("nan")}, "triggers.max_age_days: got nan; expected "),
        ({"max_per_week": 0}, "triggers.max_per_week: got 0; expected "),
        ({"new_image": 5}, "triggers.new_image: unknown key; expected new_images"),
        ({"own_sources": "feedback"}, "triggers.own_sources: got 'feedback'; expected a list"),
    ],
)
def test_a_mistake_in_params_names_its_field(section: dict[str, Any], told: str) -> None:
    with pytest.raises(ParamsError) as caught:
        make_params({"name": "pets", "triggers": section})
    assert str(caught.value).startswith(f"params.yaml {told}")
