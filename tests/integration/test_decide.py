"""The stage `gate`: verdicts on small real models, and the decisions it stores."""

import json

import pytest

from visionloop.bundle import load_bundle, upload_bundle
from visionloop.errors import BundleError, DatasetError, NotPromoted, PromotionError
from visionloop.promotion.decide import gate
from visionloop.promotion.ledger import append_entry, latest_decision, require_passed
from visionloop.records import Decision
from visionloop.workspace import connect
from worlds import GOOD, POOR, make_world, write_bundle

STATE = {"dataset": "d1", "params": "p1", "code": "c1"}
NOW = "2026-02-03T04:05:06Z"


@pytest.fixture
def world(tmp_path):
    return make_world(tmp_path / "home")


def crown(world, tmp_path, seed, **card):
    """Make a model the champion of the world, without asking the gate."""
    folder = tmp_path / f"champion-{seed}"
    digest = write_bundle(folder, world.pin, seed, **card)
    upload_bundle(world.store, load_bundle(folder))
    facts = {"decision": None, "dataset": {}, "run_id": None, "by": "test", "why": "test", "at": NOW}
    append_entry(world.store, "fake", None, action="promote", bundle=digest, model_version="1", **facts)
    return digest


def judge(world, params=None, state=STATE, now=NOW):
    return gate(connect(world.settings, params or world.params, store=world.store), state=state, now=now)


def test_the_first_candidate_passes_by_its_floors(world):
    digest = world.write_candidate(GOOD)
    decision = judge(world, world.with_gate(floors={"accuracy": 0.7}))
    assert (decision.verdict, decision.candidate, decision.champion) == ("passed", digest, None)
    assert [(r.rule, r.passed) for r in decision.rules] == [("floor accuracy", True), ("first", True)]
    assert decision.champion_metrics == {}
    assert (decision.number, decision.num_test, decision.state, decision.decided_at) == (1, 80, STATE, NOW)
    assert decision.dataset == {"name": "fake", "version": 1, "digest": world.pin.digest}


def test_a_candidate_below_a_floor_is_refused(world):
    world.write_candidate(GOOD)
    decision = judge(world, world.with_gate(floors={"macro_f1": 0.999}))
    assert decision.verdict == "refused"
    assert [(r.rule, r.passed) for r in decision.rules] == [("floor macro_f1", False), ("first", True)]


def test_a_better_candidate_passes_and_a_worse_one_is_refused(world, tmp_path):
    poor = crown(world, tmp_path, POOR)
    world.write_candidate(GOOD)
    decision = judge(world)
    assert (decision.verdict, decision.champion) == ("passed", poor)
    assert decision.metrics["accuracy"]["value"] > decision.champion_metrics["accuracy"]["value"] + 0.2
    points = 100 * (decision.metrics["accuracy"]["value"] - decision.champion_metrics["accuracy"]["value"])
    assert f"difference {points:+.2f} points" in decision.rules[-1].found


def test_a_worse_candidate_is_refused(world, tmp_path):
    crown(world, tmp_path, GOOD)
    world.write_candidate(POOR)
    for rule in ("better", "no_worse"):
        assert judge(world, world.with_gate(rule=rule)).verdict == "refused"


def test_equal_answers_are_inconclusive_for_better_and_pass_no_worse(world, tmp_path):
    crown(world, tmp_path, GOOD)
    world.write_candidate(GOOD, params={"seed": "another"})
    assert judge(world).verdict == "inconclusive"
    assert judge(world, world.with_gate(rule="no_worse")).verdict == "passed"


def test_the_champion_itself_is_inconclusive_and_said(world, tmp_path):
    digest = crown(world, tmp_path, GOOD)
    assert world.write_candidate(GOOD) == digest
    decision = judge(world, world.with_gate(rule="no_worse"))
    assert decision.verdict == "inconclusive"
    assert decision.rules[-1].found == "the candidate is the champion itself"
    assert decision.champion_metrics == decision.metrics


def test_a_champion_with_other_classes_is_judged_by_name(world, tmp_path):
    crown(world, tmp_path, GOOD, model_classes=("c", "x", "a"))
    world.write_candidate(GOOD)
    decision = judge(world)
    assert decision.verdict == "passed"
    assert 0 < decision.champion_metrics["accuracy"]["value"] < decision.metrics["accuracy"]["value"]
    assert decision.champion_metrics["log_loss"]["value"] > 5  # classes it does not know have probability 0


def test_decisions_are_stored_numbered_and_copied(world):
    world.write_candidate(GOOD)
    first = judge(world)
    second = judge(world, world.with_gate(floors={"accuracy": 0.99}), now="2026-02-04T00:00:00Z")
    assert (first.number, second.number) == (1, 2)
    stored = [json.loads(world.store.get(key)) for key in world.store.list("decisions/fake/")]
    assert [Decision.from_json(d) for d in stored] == [first, second]
    assert latest_decision(world.store, "fake") == second
    folder = world.settings.decisions_dir
    assert sorted(p.name for p in folder.iterdir()) == ["000001.json", "000002.json", "latest.json"]
    assert Decision.from_json(json.loads((folder / "latest.json").read_text())) == second
    assert Decision.from_json(json.loads((folder / "000001.json").read_text())) == first


def test_the_same_question_again_gives_the_decision_that_stands(world):
    world.write_candidate(GOOD)
    first = judge(world)
    assert judge(world, now="2027-01-01T00:00:00Z") == first
    assert judge(world, state={**STATE, "code": "c2"}).number == 2


def test_a_taken_number_is_never_written_over(world):
    world.write_candidate(GOOD)
    first = judge(world)
    create = world.store.create

    def create_late(key, data):
        if key.startswith("decisions/") and not world.store.exists("decisions/fake/000002.json"):
            other = {**first.to_json(), "number": 2, "candidate": "someone else"}
            create("decisions/fake/000002.json", json.dumps(other).encode())
        return create(key, data)

    world.store.create = create_late
    assert judge(world, state={}).number == 3
    assert latest_decision(world.store, "fake", candidate="someone else").number == 2


def test_only_a_passed_candidate_goes_on(world):
    digest = world.write_candidate(GOOD)
    with pytest.raises(NotPromoted, match=r"has no decision; .*visionloop gate") as caught:
        require_passed(world.store, "fake", digest)
    assert caught.value.exit_code == 3
    judge(world)
    assert require_passed(world.store, "fake", digest).number == 1
    judge(world, world.with_gate(floors={"accuracy": 0.99}))
    with pytest.raises(
        NotPromoted, match=r"decision 2 is refused \(floor accuracy: accuracy 75\.00 %, expected at least"
    ):
        require_passed(world.store, "fake", digest)


def test_a_candidate_of_another_version_or_name_is_an_error(world):
    world.write_candidate(GOOD, dataset={"version": 0, "digest": "f" * 64})
    with pytest.raises(DatasetError, match=r"was trained on dataset version 0 \(ffffffffffff\); expected version 1"):
        judge(world)
    world.write_candidate(GOOD, name="other")
    with pytest.raises(PromotionError, match=r"was trained as 'other'; expected 'fake'"):
        judge(world)
    assert latest_decision(world.store, "fake") is None


def test_no_test_image_is_an_error(tmp_path):
    world = make_world(tmp_path, test_sides=0)
    world.write_candidate(GOOD)
    with pytest.raises(DatasetError, match="has no labelled test image"):
        judge(world)


def test_a_champion_that_is_not_whole_in_the_store_stops_the_gate(world, tmp_path):
    digest = crown(world, tmp_path, POOR)
    world.store.delete(f"bundles/{digest}/model.onnx")
    world.write_candidate(GOOD)
    with pytest.raises(BundleError, match="is not whole in"):
        judge(world)
    assert latest_decision(world.store, "fake") is None


def test_a_damaged_decision_is_named(world):
    world.store.put("decisions/fake/000001.json", b'{"rules": 3}')
    with pytest.raises(PromotionError, match=r"decisions/fake/000001\.json: is damaged"):
        latest_decision(world.store, "fake")
