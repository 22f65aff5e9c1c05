"""Which of the answers may enter the dataset: the rules by themselves, without a store."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta

from visionloop.data.acceptance import Accepted, settle
from visionloop.data.answers import (
    FEEDBACK_KIND,
    LABEL,
    LOG,
    NOT_OURS,
    SKIP,
    SUSPECTS,
    UNDO,
    Asked,
    Opinion,
    drop_asked,
)

MONDAY = datetime(2026, 3, 2, 12, tzinfo=UTC)


def say(
    image: str,
    label: str | None,
    who: str = "ann",
    *,
    client: str | None = None,
    verdict: str = LABEL,
    minutes: int = 0,
    reason: str = "novel",
    probability: float | None = None,
) -> Opinion:
    asked = Asked(image, "2026-03-02", "", ("cat",), 0.5, reason, probability)
    kind = FEEDBACK_KIND if client is not None else LOG
    labels = (label,) if label else ()
    return Opinion(asked, verdict, labels, who, kind, MONDAY + timedelta(minutes=minutes), client)


def test_settling_is_that_of_the_example() -> None:
    opinions = [say("a", "cat"), say("a", "dog", "bob")]
    opinions += [say(image, "dog", "", client="gate", minutes=k) for k, image in enumerate("bcd")]
    opinions += [say("d", "dog", "", client="gate", minutes=24 * 60)]  # the same again on Tuesday
    opinions += [say("e", "dog", "", client="gate", minutes=24 * 60 + 1)]
    settled = settle(opinions, {}, quota=2)
    assert settled.conflicts == {"a": "ann: cat; bob: dog"}
    assert [(one.sha256, one.on, one.client) for one in settled.labels] == [
        ("b", "2026-03-02", "gate"),
        ("c", "2026-03-02", "gate"),
        ("e", "2026-03-03", "gate"),
    ]
    assert settled.over_quota == {"gate": 1}


def test_quota_counts_what_was_accepted_before() -> None:
    first = settle([say("a", "dog", "", client="gate")], {}, quota=1).labels[0]
    again = settle([say("b", "dog", "", client="gate"), say("c", "dog", "", client="yard")], {"a": first}, quota=1)
    assert ([one.sha256 for one in again.labels], again.over_quota) == (["c"], {"gate": 1})


def test_label_of_nobody_that_repeats_the_model_is_never_one() -> None:
    opinions = [say("a", "cat", "", client="gate"), say("b", "cat", "eve", client="gate")]
    settled = settle([*opinions, say("c", "cat")], {}, quota=9)
    assert ({one.sha256: one.who for one in settled.labels}, settled.echoes) == ({"b": ("eve",), "c": ("ann",)}, 1)


def test_feedback_does_not_hold_up_what_people_said_who_were_asked() -> None:
    settled = settle([say("a", "dog", "ann", client="gate"), say("a", "cat", "ann")], {}, quota=9)
    assert [(one.labels, one.kind, one.client) for one in settled.labels] == [(("cat",), LOG, None)]
    assert not settled.conflicts


def test_skipped_and_taken_back_answers_say_nothing_and_not_ours_is_no_label() -> None:
    opinions = [say("a", None, verdict=SKIP), say("b", None, verdict=UNDO), say("c", None, verdict=NOT_OURS)]
    assert settle(opinions, {}, quota=9) == settle([opinions[2]], {}, quota=9)
    assert (settle(opinions, {}, quota=9).labels, settle(opinions, {}, quota=9).num_not_ours) == ((), 1)
    said = settle([*opinions, say("c", "cat", "bob")], {}, quota=9)
    assert said.conflicts == {"c": "ann: not an image of ours; bob: cat"}


def test_only_one_person_is_believed_and_a_lot_is_a_lot_whoever_answers_first() -> None:
    lot = say("a", "dog", "bob", minutes=1, reason="random", probability=0.01)
    settled = settle([say("a", "cat"), lot], {}, quota=9, only="bob")
    assert [(one.labels, one.who, one.probability) for one in settled.labels] == [(("dog",), ("bob",), 0.01)]
    both = settle([say("a", "dog"), lot], {}, quota=9).labels[0]
    assert (both.who, both.reason, both.probability) == (("ann", "bob"), "random", 0.01)


def test_feedback_does_not_replace_what_people_said_who_were_asked_though_its_client_is_believed() -> None:
    opinions = [say("a", "cat"), say("a", "dog", "", client="gate", minutes=5), say("b", "dog", "", client="gate")]
    first = settle(opinions[:1], {}, quota=9).labels[0]
    settled = settle(opinions, {"a": replace(first, at=MONDAY.isoformat())}, quota=9, only="gate")
    assert [one.sha256 for one in settled.labels] == ["b"]
    assert [one.sha256 for one in settle(opinions, {}, quota=9, only="gate").labels] == ["b"]


def test_what_was_accepted_stands_until_somebody_says_something_else() -> None:
    """Also what was said before, and came into the store only after: whose clock is right does not matter."""
    opinions = [say("a", "cat"), say("a", "dog", "bob")]
    known = {"a": replace(settle(opinions, {}, quota=9, only="ann").labels[0], at=MONDAY.isoformat())}
    assert settle(opinions, known, quota=9) == settle([], {}, quota=9)
    late = say("a", "fox", "cleo", minutes=-5)
    assert settle([*opinions, late], known, quota=9).conflicts == {"a": "cleo: fox; ann: cat; bob: dog"}
    assert settle([say("a", "fox", minutes=5)], known, quota=9).labels[0].labels == ("fox",)


def test_suspect_that_is_confirmed_changes_nothing() -> None:
    one = Accepted("a", ("cat",), ("ann",), SUSPECTS, None, "", "", "", "suspect", None, ("cat",), ())
    assert not one.changes
    assert Accepted(**{**one.to_json(), "labels": ("dog",)}).changes


def test_forgotten_images_are_dropped_wherever_they_stand() -> None:
    batch = {"number": 1, "images": [{"sha256": "a", "similar": [{"sha256": "b"}, {"sha256": "c"}]}, {"sha256": "b"}]}
    assert drop_asked(batch, frozenset("b")) == {"number": 1, "images": [{"sha256": "a", "similar": [{"sha256": "c"}]}]}
