"""What the triggers look at in a real workspace, and what is kept of each decision."""

import json
from dataclasses import fields, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from desks import Desk
from fakes import run_here
from visionloop import pipeline
from visionloop.data.manifest import load_version, make_pin, write_pin
from visionloop.errors import DatasetError, LeaseHeld, ParamsError, StoreError
from visionloop.monitoring import due
from visionloop.monitoring.due import decide_retrain, read_decisions
from visionloop.monitoring.judge import Verdict
from visionloop.monitoring.triggers import TriggerDecision
from visionloop.params import Triggers
from visionloop.promotion.decide import gate
from visionloop.records import LedgerEntry
from visionloop.workspace import Workspace
from workspaces import commit, store_image

NOW = datetime(2026, 2, 20, tzinfo=UTC)
DAY = timedelta(days=1)
JUDGED = "2026-02-10T00:00:00+00:00"
ENTRY = LedgerEntry("fake", 1, "promote", "b", None, "1", None, {}, None, "ann", "first", JUDGED).to_json()


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Desk:
    """A model was judged on version 1. Version 2 has ten labelled images more, six of them labelled by a model."""
    desk = Desk(tmp_path_factory.mktemp("desk"))
    digest = desk.world.write_candidate(0)
    state = pipeline.compute_state(desk.world.settings.home, desk.world.params, desk.world.pin.digest)
    gate(desk.place, state=state, now=JUDGED)
    assert digest
    first = load_version(desk.store, "fake", 1)
    rows = [store_image(desk.store, 9000 + n, sources=("feedback" if n < 6 else "photos",)) for n in range(10)]
    rows += [store_image(desk.store, 9100, labels=()), store_image(desk.store, 9101, side="excluded")]
    rows.append(replace(desk.world.records[0], labels=("relabelled",)))
    second = commit(desk.store, desk.world.records, rows, first, name="fake")
    write_pin(desk.world.settings.pin_path, make_pin(second))
    return desk


@pytest.fixture
def store(desk: Desk) -> Any:
    """The store without decisions of triggers and windows."""
    for prefix in ("triggers/", "monitoring/"):
        for key in list(desk.store.list(prefix)):
            desk.store.delete(key)
    return desk.store


def with_triggers(desk: Desk, **section: Any) -> Workspace:
    return replace(desk.place, params=desk.world.params.model_copy(update={"triggers": Triggers(**section)}))


def ask(desk: Desk, section: dict[str, Any], *, now: datetime = NOW, **words: str) -> TriggerDecision:
    return decide_retrain(with_triggers(desk, **section), now=now, by="ann", **words)


def find(decision: TriggerDecision, name: str) -> tuple[bool, float | None]:
    (look,) = [look for look in decision.looks if look["name"] == name]
    return look["fired"], look["value"]


def test_new_labels_are_counted_apart_from_those_of_a_model(desk: Desk, store: Any) -> None:
    """Four images of people and one label that was corrected; no image without a label, none that is excluded."""
    decision = ask(desk, {"new_images": 5, "max_age_days": 10.0, "own_sources": ("feedback",)})
    assert (find(decision, "new_images"), find(decision, "max_age_days")) == ((True, 5), (True, 10.0))
    assert decision.why.endswith("new_images: 5 new images with labels; 6 more have labels of a model")
    assert (decision.outcome, decision.dataset, decision.judged, decision.by) == ("retrain", 2, 1, "ann")
    assert find(ask(desk, {"new_images": 12}), "new_images") == (False, 11)


def test_a_label_is_of_the_source_that_has_come_since(desk: Desk) -> None:
    """A photo that had no label has got one by feedback: it is the model's, though the photo is not."""
    before = replace(desk.world.records[0], sources=("photos",), labels=())
    labelled = replace(before, sources=("feedback", "photos"), labels=("ant",))
    assert due._find_new_sources(labelled, before) == {"feedback"}
    assert due._find_new_sources(replace(labelled, sources=("photos",)), before) == {"photos"}, "corrected by a person"
    assert due._find_new_sources(labelled, None) == {"feedback", "photos"}


def test_nothing_is_new_on_the_version_that_was_judged(desk: Desk, store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    workspace = with_triggers(desk, max_age_days=1.0)
    pin = make_pin(load_version(desk.store, "fake", 1))
    monkeypatch.setattr("visionloop.monitoring.due.load_pin", lambda *_: pin)
    held = decide_retrain(workspace, now=NOW, by="ann")
    assert (held.outcome, find(held, "nothing_new")) == ("held", (True, 0))
    other = workspace.params.model_copy(update={"prepare": workspace.params.prepare.model_copy(update={"limit": 9})})
    assert decide_retrain(replace(workspace, params=other), now=NOW, by="ann").outcome == "retrain", "other params"


def test_of_two_that_decide_at_once_the_second_sees_what_the_first_has_started(
    desk: Desk, store: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, read = ask(desk, {}), due.read_decisions
    stale: list[list[TriggerDecision]] = [[]]
    monkeypatch.setattr(due, "read_decisions", lambda *told: stale.pop() if stale else read(*told))
    second = ask(desk, {"new_images": 1})
    stale = [[first]]
    third = ask(desk, {"new_images": 1}, now=NOW + timedelta(hours=3))
    monkeypatch.undo()
    assert [(one.number, one.outcome) for one in (first, second, third)] == [(1, "no"), (2, "retrain"), (3, "held")]
    assert (find(third, "cooldown_hours"), find(third, "max_per_week")) == ((True, 3), (False, 1))
    assert read_decisions(store, "fake", 9) == [
        TriggerDecision.from_json(json.loads(json.dumps(one.to_json()))) for one in (first, second, third)
    ]
    assert [one.number for one in read_decisions(store, "fake", 1)] == [3]


def test_who_asks_each_minute_forgets_no_start_and_no_call(desk: Desk, store: Any) -> None:
    """Of the decisions before only the last is read."""
    section = {"webhook": True, "new_images": 12, "needs": "all", "cooldown_hours": 0.0, "max_per_week": 1}
    ask(desk, {"new_images": 1})
    ask(desk, section, webhook="a new menu")
    for minute in range(1, 4):
        store.delete(f"triggers/fake/{minute:06d}.json")
        ask(desk, section, now=NOW + timedelta(minutes=minute))
    last = ask(desk, {**section, "new_images": 11}, now=NOW + DAY)
    assert (last.outcome, find(last, "webhook"), find(last, "max_per_week")) == ("held", (True, 1), (True, 1))


def test_a_person_spends_nothing_of_the_weeks_budget(desk: Desk, store: Any) -> None:
    """The budget bounds what is started without a person; `visionloop start` is not counted either."""
    section = {"new_images": 1, "cooldown_hours": 0.0, "max_per_week": 1}
    by_hand = ask(desk, section, hand="try it")
    assert (by_hand.outcome, by_hand.started) == ("retrain", ())
    first, second = (ask(desk, section, now=NOW + timedelta(minutes=n)) for n in (1, 2))
    assert [one.outcome for one in (first, second)] == ["retrain", "held"]
    assert ask(desk, section, now=NOW + timedelta(minutes=3), hand="again").outcome == "retrain"


def test_a_decision_that_was_copied_under_another_number_blocks_nothing(desk: Desk, store: Any) -> None:
    ask(desk, {})
    ask(desk, {"new_images": 1})
    store.put("triggers/fake/000007.json", store.get("triggers/fake/000001.json"))
    assert ask(desk, {}).number == 8
    assert [one.number for one in read_decisions(store, "fake", 9)] == [1, 2, 7, 8]


def test_a_call_while_a_retrain_is_under_way_waits_for_the_next(
    desk: Desk, store: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def hold(store: Any, name: str) -> int:
        raise LeaseHeld(f"retrain of {name}", "ann on b (process 3) is at it")

    monkeypatch.setattr(due, "wait_for_lease", hold)
    held = ask(desk, {"webhook": True}, webhook="a new menu")
    assert (held.outcome, held.started, held.calls) == ("held", (), ("a new menu",))
    assert "held by under_way: ann on b (process 3) is at it" in held.why
    assert ask(desk, {"webhook": True}, hand="now").outcome == "retrain"
    monkeypatch.undo()
    assert find(ask(desk, {"webhook": True}), "webhook") == (False, 0)


def test_a_call_is_kept_until_the_next_retrain(desk: Desk, store: Any) -> None:
    section = {"webhook": True, "new_images": 11, "needs": "all", "cooldown_hours": 0.0}
    waits = {**section, "new_images": 12}
    assert ask(desk, waits, webhook="a  new\n\x1bmenu\udcff" + "x" * 1000).outcome == "no"
    assert find(ask(desk, waits, webhook="again"), "webhook") == (True, 2)
    due = ask(desk, section)
    assert due.outcome == "retrain"
    assert due.why.startswith("new_images: 11 new images with labels; webhook: a new menu xxx")
    assert len(due.why) < 500
    assert find(ask(desk, section, now=NOW + DAY), "webhook") == (False, 0)


def make_verdict(day: int, verdict: str, **facts: Any) -> bytes:
    values: dict[str, Any] = {one.name: None for one in fields(Verdict)}
    start, end = (f"2026-02-{number}T00:00:00+00:00" for number in (day, day + 1))
    values |= {"start": start, "end": end, "verdict": verdict, "bundle": "b", "checks": [], **facts}
    return json.dumps(values).encode()


def write_windows(store: Any, *verdicts: str) -> None:
    for day, verdict in enumerate(verdicts, start=11):
        store.put(f"monitoring/fake/202602{day}T0000/verdict.json", make_verdict(day, verdict))


def test_windows_of_the_monitor_are_read_and_damaged_ones_passed_over(desk: Desk, store: Any) -> None:
    champion = ask(desk, {"drift_windows": 1})
    assert find(champion, "drift_windows") == (False, 0)
    write_windows(store, "drift", "drift", "broken")
    assert find(ask(desk, {"drift_windows": 1}, now=NOW - 6 * DAY), "broken_data") == (True, None)
    bad = (make_verdict(13, "broken", end="13 Feb"), make_verdict(13, "broken", end="2026-02-14"))
    for damaged in (b"{", b"[]", b'{"end": 3}', *bad, make_verdict(13, "broken", checks=[3])):
        store.put("monitoring/fake/20260213T0000/verdict.json", damaged)
        assert find(ask(desk, {"drift_windows": 1}, now=NOW - 6 * DAY), "broken_data")[0] is False, damaged


def test_all_alerts_of_a_window_count(desk: Desk, store: Any) -> None:
    store.put("ledger/fake/000001.json", json.dumps(ENTRY).encode())
    alerts = [{"kind": kind, "state": "alert"} for kind in ("drift", "quality")]
    store.put("monitoring/fake/20260213T0000/verdict.json", make_verdict(13, "drift", checks=alerts))
    asked = ask(desk, {"drift_windows": 1, "quality_windows": 1})
    assert [find(asked, name) for name in ("drift_windows", "quality_windows")] == [(True, 1)] * 2
    store.delete("ledger/fake/000001.json")


def test_what_is_damaged_or_cannot_be_written_is_told(desk: Desk, store: Any, tmp_path: Path) -> None:
    whole = ask(desk, {}).to_json()
    bad = ({**whole, "calls": [3]}, {**whole, "started": ["soon"]}, {**whole, "looks": ["x"]})
    for data in (b"{", b"[1]", b'{"name": "fake"}', b'{"at": 3}', *(json.dumps(one).encode() for one in bad)):
        store.put("triggers/fake/000001.json", data)
        with pytest.raises(DatasetError, match=r"triggers/fake/000001.json: is damaged; expected a decision"):
            ask(desk, {})
    store.delete("triggers/fake/000001.json")
    (desk.store.root / "triggers" / "fake").rmdir()
    (desk.store.root / "triggers" / "fake").write_text("a file where the folder should be")
    with pytest.raises(StoreError):
        ask(desk, {})
    (desk.store.root / "triggers" / "fake").unlink()
    with pytest.raises(ParamsError, match=r"triggers.own_sources: no source and no image is of feed; expected "):
        ask(desk, {"own_sources": ("feed",)})
    with pytest.raises(DatasetError, match="this workspace has no images yet"):
        decide_retrain(replace(desk.place, settings=replace(desk.place.settings, home=tmp_path)), now=NOW, by="ann")


def test_the_commands_end_with_0_where_one_is_due_and_tell_each_decision(
    desk: Desk, store: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    home = desk.world.settings.home
    (home / "params.yaml").write_text("name: fake\ntriggers: {new_images: 100}\n")
    monkeypatch.chdir(home)
    monkeypatch.setenv("VISIONLOOP_STORE", desk.world.settings.store_url)
    monkeypatch.setenv("VISIONLOOP_USER", "ann")
    assert run_here(monkeypatch, "triggers", "history") == 0
    assert capsys.readouterr().out == "nothing was decided yet\nnext: `visionloop triggers decide`\n"
    assert run_here(monkeypatch, "triggers", "decide") == 3
    said = capsys.readouterr().out.splitlines()
    assert said[:2] == ["no: 0 of 1 needed triggers", "    new_images: 11 new images with labels (limit: 100)"]
    assert run_here(monkeypatch, "triggers", "decide", "--hand", "new camera", "--json") == 0
    assert json.loads(capsys.readouterr().out)["why"] == "by hand: new camera"
    assert run_here(monkeypatch, "triggers", "history") == 0
    *listed, after = capsys.readouterr().out.splitlines()
    assert ([line.split()[0] for line in listed], after) == (["2", "1"], "next: `visionloop triggers decide`")
    assert listed[0].split()[3:] == ["dataset", "2", "retrain", "by", "hand:", "new", "camera"]
    assert run_here(monkeypatch, "triggers", "history", "--json", "--last", "1") == 0
    assert [one["number"] for one in json.loads(capsys.readouterr().out)["decisions"]] == [2]
    monkeypatch.setenv("VISIONLOOP_STORE", str(home / "not-mounted"))
    for command in (("triggers", "history"), ("triggers", "decide"), ("monitor",)):
        assert run_here(monkeypatch, *command) not in (0, 3), command
        told = capsys.readouterr()
        assert (told.out, "Mount it or correct VISIONLOOP_STORE" in told.err) == ("", True), command
