"""Register, promote and roll back: what changes, what does not, and what a second run repairs."""

import json
import re
from dataclasses import replace

import pytest

from desks import NOW, Desk
from fakes import make_bundle
from memory_tracking import MemoryTracking
from visionloop.errors import BundleError, NotPromoted, PromotionError, TrackingError
from visionloop.predictor import FP32, INT8
from visionloop.promotion.ledger import append_entry, latest_decision, read_champion, read_history
from visionloop.promotion.promote import compare_alias, explain_engines, mirror_alias, register
from visionloop.records import LedgerEntry
from worlds import GOOD, POOR


@pytest.fixture
def desk(tmp_path):
    return Desk(tmp_path)


def test_a_passed_candidate_is_registered_once(desk):
    digest = desk.judge(GOOD, note="run-1")
    assert register(desk.place) == "1"
    assert register(desk.place) == "1"
    assert desk.tracking.versions == {digest: "1"}
    assert desk.tracking.version_tags["1"] == {
        "visionloop.decision": "1",
        "visionloop.dataset": desk.world.pin.digest,
        "visionloop.dataset_version": "1",
    }
    assert desk.store.exists(f"bundles/{digest}/digests.json")
    assert read_champion(desk.store, "fake") is None


def test_a_refused_candidate_is_not_registered(desk):
    digest = desk.judge(GOOD, floors={"accuracy": 0.99})
    with pytest.raises(NotPromoted, match="decision 1 is refused"):
        register(desk.place)
    with pytest.raises(NotPromoted, match="decision 1 is refused"):
        desk.promote()
    assert desk.tracking.versions == {}
    assert not desk.store.exists(f"bundles/{digest}/digests.json")


def test_an_experiment_is_judged_but_not_promoted(desk):
    desk.judge(GOOD)
    register(desk.place)
    key = "datasets/fake/000001.json"
    version = json.loads(desk.store.get(key))
    desk.store.put(key, json.dumps({**version, "split": {"method": "random"}}).encode())
    with pytest.raises(PromotionError, match=r"comes from an experiment: dataset fake version 1 is split at random"):
        desk.promote()
    assert read_champion(desk.store, "fake") is None


def test_a_flipped_byte_is_not_registered(desk):
    desk.judge(GOOD)
    path = desk.world.settings.candidate_dir / "model.onnx"
    path.write_bytes(path.read_bytes()[:-1] + b"\0")
    with pytest.raises(BundleError, match=r"model\.onnx differs from its digest"):
        register(desk.place)
    assert desk.tracking.versions == {}


def test_an_unreachable_mlflow_in_register_is_finished_by_a_second_run(desk):
    digest = desk.judge(GOOD)
    desk.tracking.down = True
    with pytest.raises(TrackingError):
        register(desk.place)
    with pytest.raises(TrackingError):
        desk.promote()
    assert read_champion(desk.store, "fake") is None
    desk.tracking.down = False
    assert register(desk.place) == "1"
    assert desk.promote().bundle == digest


def test_promotion_writes_the_ledger_and_the_alias_follows(desk):
    digest = desk.judge(GOOD, note="run-1")
    register(desk.place)
    entry = desk.promote()
    assert (entry.number, entry.action, entry.bundle, entry.previous) == (1, "promote", digest, None)
    assert (entry.model_version, entry.decision, entry.run_id) == ("1", 1, "run-1")
    assert (entry.by, entry.why, entry.at) == ("ann", "because", NOW)
    assert entry.dataset["digest"] == desk.world.pin.digest
    assert read_champion(desk.store, "fake") == entry
    assert compare_alias(desk.place) == ("1", "1")


def test_the_ledger_keeps_which_engines_were_approved_also_in_a_rollback(desk):
    reports = desk.world.settings.reports_dir
    reports.mkdir(exist_ok=True)
    rows = [{"runtime": name, "approved": name != "openvino int8"} for name in ("onnxruntime int8", "openvino int8")]
    digests = []
    for seed in (GOOD, POOR):
        digests.append(desk.judge(seed))
        (reports / "intervals.json").write_text(json.dumps({"bundle": digests[0], "runtimes": rows}))
        register(desk.place)
        desk.promote()
    first, second = read_history(desk.store, "fake")
    assert first.runtimes == ("onnxruntime int8",)
    assert second.runtimes == (), "the report is about another bundle"
    back = desk.rollback()
    assert (back.bundle, back.runtimes) == (digests[0], ("onnxruntime int8",))
    assert read_champion(desk.store, "fake") == back


def test_a_later_evaluation_of_the_champion_approves_engines_and_a_rollback_passes_them_by(desk):
    first = desk.crown(POOR)
    second = desk.crown(GOOD)
    reports = desk.world.settings.reports_dir
    reports.mkdir(exist_ok=True)
    rows = [{"runtime": "onnxruntime int8", "approved": True}]
    (reports / "intervals.json").write_text(json.dumps({"bundle": second, "runtimes": rows}))
    entry = desk.promote(by="eve")
    assert (entry.number, entry.bundle, entry.previous, entry.by) == (3, second, second, "eve")
    assert (entry.runtimes, entry.why) == (("onnxruntime int8",), "evaluated again, approved: onnxruntime int8")
    before = read_history(desk.store, "fake")[1]
    assert (entry.model_version, entry.decision, entry.run_id) == (
        before.model_version,
        before.decision,
        before.run_id,
    )
    assert desk.promote(by="bob") == entry, "nothing new was approved"
    (reports / "intervals.json").write_text(json.dumps({"bundle": second, "runtimes": []}))
    entry = desk.promote()
    assert (entry.number, entry.runtimes) == (4, ())
    assert entry.why == "evaluated again, approved: no other engine"
    assert desk.rollback().bundle == first


def test_a_promotion_without_an_evaluation_says_that_it_serves_fp32_alone(desk):
    settings = desk.world.settings
    digest = make_bundle(settings.candidate_dir, engines=[FP32, INT8])
    entry = LedgerEntry("fake", 1, "promote", digest, None, "1", None, {}, None, "t", "t", NOW)
    assert explain_engines(desk.place, entry) == (
        "it is served in onnxruntime fp32: no evaluation of it is here that approves onnxruntime int8. "
        "Run `visionloop evaluate`, then `visionloop promote` again."
    )
    assert explain_engines(desk.place, replace(entry, runtimes=(INT8,))) is None
    settings.reports_dir.mkdir(exist_ok=True)
    (settings.reports_dir / "intervals.json").write_text(json.dumps({"bundle": digest, "runtimes": []}))
    assert explain_engines(desk.place, entry) is None, "it was judged, and none was approved"


def test_promoting_the_champion_again_returns_its_entry_and_mends_the_alias(desk):
    desk.crown(GOOD)
    desk.tracking.champion = "7"
    assert desk.promote(by="eve").by == "ann"
    assert len(read_history(desk.store, "fake")) == 1
    assert desk.tracking.champion == "1"


def test_an_unregistered_candidate_is_not_promoted(desk):
    desk.judge(GOOD)
    with pytest.raises(
        PromotionError, match=r"is not registered; expected a model version\. Run `visionloop register`"
    ):
        desk.promote()
    assert read_history(desk.store, "fake") == []


def test_a_champion_that_moved_since_the_decision_stops_the_promotion(desk):
    desk.judge(GOOD)
    register(desk.place)
    facts = {"decision": 9, "dataset": {}, "run_id": None, "by": "eve", "why": "first", "at": NOW}
    append_entry(desk.store, "fake", None, action="promote", bundle="e" * 64, model_version="9", **facts)
    with pytest.raises(
        PromotionError, match=r"champion moved since decision 1: .*eeeeeeeeeeee \(entry 1\).*gate` again"
    ):
        desk.promote()
    assert [e.by for e in read_history(desk.store, "fake")] == ["eve"]


def test_a_damaged_copy_in_the_store_is_not_promoted(desk):
    digest = desk.judge(GOOD)
    register(desk.place)
    data = desk.store.get(f"bundles/{digest}/model.onnx")
    desk.store.put(f"bundles/{digest}/model.onnx", data[:-1] + b"\0")
    with pytest.raises(BundleError, match=r"model\.onnx differs"):
        desk.promote()
    assert read_history(desk.store, "fake") == []
    assert not list(desk.world.settings.hidden_dir.glob("verify-*"))


def test_mlflow_lost_after_the_ledger_moved_is_mended_by_a_second_run(desk):
    digest = desk.judge(GOOD)
    register(desk.place)
    set_champion = desk.tracking.set_champion
    desk.tracking.set_champion = lambda version: setattr(desk.tracking, "down", True) or set_champion(version)
    with pytest.raises(TrackingError):
        desk.promote()
    assert read_champion(desk.store, "fake").bundle == digest
    desk.tracking.down, desk.tracking.set_champion = False, set_champion
    assert desk.promote().number == 1
    assert desk.tracking.champion == "1"


def test_rollback_goes_back_one_champion_at_a_time(desk):
    first, second, third = desk.crown(POOR), desk.crown(GOOD), desk.crown(POOR + 1)
    entry = desk.rollback()
    assert (entry.number, entry.action, entry.bundle, entry.previous) == (4, "rollback", second, third)
    assert (entry.model_version, entry.decision, entry.by, entry.why) == ("2", 2, "bob", "it was wrong")
    assert desk.tracking.champion == "2"
    assert desk.rollback().bundle == first
    with pytest.raises(PromotionError, match="has no champion before"):
        desk.rollback()
    assert desk.rollback(to=3).bundle == third
    assert desk.rollback().bundle == second
    assert [e.number for e in read_history(desk.store, "fake")] == [1, 2, 3, 4, 5, 6, 7]
    assert compare_alias(desk.place) == ("2", "2")


def test_a_model_that_was_rolled_back_from_stays_down_until_a_person_says_again(desk):
    first, second = desk.crown(POOR), desk.crown(GOOD)
    desk.rollback()
    down = r"rolled back from by bob on 2026-02-03 \(entry 3\): it was wrong"
    with pytest.raises(NotPromoted, match=rf"was {down}; expected another model.* promote --again --why"):
        desk.promote()
    moved = r"champion moved since decision 2: entry 3, not entry 1; expected the entry"
    with pytest.raises(
        PromotionError, match=rf"{moved}.* Run `visionloop gate`, then `visionloop promote --again --why"
    ):
        desk.promote(again=True)
    assert desk.judge(GOOD) == second
    decision = latest_decision(desk.store, "fake")
    assert (decision.number, decision.verdict, decision.entry, decision.champion) == (3, "refused", 3, first)
    assert [(r.rule, r.passed) for r in decision.rules if r.mode == "on"] == [
        ("rolled_back", False),
        ("no_worse", True),
    ]
    assert re.match(down, decision.rules[0].found)
    with pytest.raises(NotPromoted, match=f"was {down}"):
        desk.promote()
    assert read_champion(desk.store, "fake").number == 3
    assert register(desk.place) == "2"
    entry = desk.promote(again=True)
    assert (entry.number, entry.bundle, entry.action, entry.decision) == (4, second, "promote", 3)
    assert desk.tracking.champion == "2"
    assert desk.judge(POOR) == first, "it was replaced, not rolled back from"
    assert latest_decision(desk.store, "fake").rules[0].rule == "no_worse"


def test_again_lifts_the_rollback_and_no_other_rule(desk):
    desk.crown(POOR)
    desk.crown(GOOD)
    desk.rollback()
    desk.judge(GOOD, floors={"accuracy": 0.99})
    with pytest.raises(NotPromoted, match=r"decision 3 is refused \(rolled_back: .*; floor accuracy: "):
        desk.promote(again=True)
    with pytest.raises(NotPromoted, match=r"`--again` would not help: decision 3 also .* by floor accuracy\.$"):
        desk.promote()
    assert read_champion(desk.store, "fake").number == 3


def test_the_same_network_under_another_card_is_down_too(desk):
    """As when only test images were added: the card names another dataset, the network is the same."""
    desk.crown(POOR)
    second = desk.crown(GOOD)
    desk.rollback()
    third = desk.judge(GOOD, params={"seed": "another"})
    decision = latest_decision(desk.store, "fake")
    assert third != second
    assert (decision.verdict, decision.rules[0].rule) == ("refused", "rolled_back")
    assert f"wrong (as bundle {second[:12]}, the same network: a rollback lasts, also" in decision.rules[0].found
    with pytest.raises(NotPromoted, match=r"person's word: `visionloop promote --again --why ...`"):
        desk.promote()
    assert third not in desk.tracking.versions, "the next command registers it"
    assert desk.promote(again=True).bundle == third
    assert desk.judge(GOOD, params={"seed": "a third"}) != third
    assert latest_decision(desk.store, "fake").verdict == "passed", "a person has put this network back"


def test_a_decision_holds_for_one_entry_also_if_its_champion_came_back(desk):
    first = desk.crown(POOR)
    desk.judge(GOOD)
    register(desk.place)
    entry = read_champion(desk.store, "fake")
    facts = {"model_version": "1", "decision": 1, "dataset": {}, "run_id": None, "by": "eve", "why": "x", "at": NOW}
    entry = append_entry(desk.store, "fake", entry, action="promote", bundle="e" * 64, **facts)
    append_entry(desk.store, "fake", entry, action="rollback", bundle=first, **facts)
    with pytest.raises(
        PromotionError, match=r"champion moved since decision 2: entry 3, not entry 1; expected the entry"
    ):
        desk.promote()
    assert len(read_history(desk.store, "fake")) == 3


def test_a_decision_without_an_entry_holds_for_its_champion(desk):
    """As those were stored that older code has made."""
    desk.crown(POOR)
    digest = desk.judge(GOOD)
    register(desk.place)
    key = "decisions/fake/000002.json"
    old = {k: v for k, v in json.loads(desk.store.get(key)).items() if k != "entry"}
    desk.store.put(key, json.dumps(old).encode())
    assert desk.promote().bundle == digest
    desk.rollback()
    with pytest.raises(NotPromoted, match="was rolled back from by bob"):
        desk.promote()


@pytest.mark.parametrize(
    ("to", "message"),
    [
        (1, "entry 1 is the champion already"),
        (9, "has no entry 9; expected an earlier champion"),
        (None, "no champion before"),
    ],
)
def test_a_rollback_to_nowhere_is_an_error(desk, to, message):
    desk.crown(GOOD)
    with pytest.raises(PromotionError, match=message):
        desk.rollback(to=to)
    assert len(read_history(desk.store, "fake")) == 1


def test_entries_are_named_by_their_numbers(desk):
    desk.crown(POOR)
    desk.crown(GOOD)
    with pytest.raises(PromotionError, match=r"has no entry 99; expected one of 1\. See"):
        desk.rollback(to=99)


def test_an_empty_ledger_has_nothing_to_roll_back(desk):
    with pytest.raises(PromotionError, match="ledger fake: is empty"):
        desk.rollback()


def test_a_damaged_earlier_bundle_is_not_rolled_back_to(desk):
    first = desk.crown(POOR)
    second = desk.crown(GOOD)
    desk.store.delete(f"bundles/{first}/golden/answers.json")
    with pytest.raises(BundleError, match="is not whole in"):
        desk.rollback()
    assert read_champion(desk.store, "fake").bundle == second


def test_rollback_moves_the_ledger_while_mlflow_is_down(desk):
    first = desk.crown(POOR)
    desk.crown(GOOD)
    desk.tracking.down = True
    with pytest.raises(
        TrackingError, match=r"rolled back all the same: ledger entry 3 stands.* Do not roll back again"
    ):
        desk.rollback()
    assert read_champion(desk.store, "fake").bundle == first
    desk.tracking.down = False
    assert compare_alias(desk.place) == ("1", "2")
    assert mirror_alias(desk.place) == "1"
    assert compare_alias(desk.place) == ("1", "1")


def test_a_new_mlflow_learns_the_champion_from_the_store(desk):
    desk.crown(POOR)
    digest = desk.crown(GOOD)
    fresh = MemoryTracking()
    assert compare_alias(replace(desk.world, tracking=fresh)) == (
        "2",
        None,
    )
    assert mirror_alias(replace(desk.world, tracking=fresh)) == "1"
    assert fresh.versions == {digest: "1"}
    assert compare_alias(replace(desk.world, tracking=fresh)) == (
        "1",
        "1",
    )


def test_an_alias_that_will_not_stay_is_an_error(desk):
    desk.crown(GOOD)
    desk.tracking.champion = "5"
    desk.tracking.set_champion = lambda version: None
    with pytest.raises(PromotionError, match=r"its alias `champion` keeps moving; expected version 1"):
        mirror_alias(desk.place)


def test_a_promotion_during_the_mirroring_wins_the_alias(desk):
    desk.crown(POOR)
    desk.crown(GOOD)
    desk.rollback()
    set_champion = desk.tracking.set_champion

    def set_late(version):
        desk.tracking.set_champion = set_champion
        desk.rollback(to=2)
        set_champion(version)

    desk.tracking.set_champion, desk.tracking.champion = set_late, None
    assert mirror_alias(desk.place) == "2"
    assert desk.tracking.champion == "2"


def test_without_a_champion_there_is_no_alias_to_mirror(desk):
    assert mirror_alias(desk.place) is None
    assert compare_alias(desk.place) == (None, None)
