"""The stage `gate`: verdicts on small real models, and the decisions it stores."""

import json
from dataclasses import replace

import numpy as np
import pytest

from fakes import run_here
from visionloop.bundle import load_bundle, upload_bundle
from visionloop.errors import BundleError, DatasetError, NotPromoted, PromotionError, StoreError
from visionloop.predictor import Predictor
from visionloop.promotion.decide import approve, gate
from visionloop.promotion.ledger import append_entry, latest_decision, require_passed
from visionloop.records import Decision
from visionloop.words import describe_decision
from visionloop.workspace import connect
from worlds import GOOD, POOR, make_world, write_bundle

STATE = {"dataset": "d1", "params": "p1", "code": "c1"}
NOW = "2026-02-03T04:05:06Z"
LATER = "2026-02-03T05:00:00Z"


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


def get_rule(decision, name):
    (rule,) = [rule for rule in decision.rules if rule.rule == name]
    return rule


def give_word(world, number=None, why="looked at it"):
    return approve(
        connect(world.settings, world.params, store=world.store), number=number, by="ann", why=why, now=LATER
    )


def judge(world, params=None, state=STATE, now=NOW):
    return gate(connect(world.settings, params or world.params, store=world.store), state=state, now=now)


def test_the_first_candidate_passes_by_its_floors(world):
    digest = world.write_candidate(GOOD)
    decision = judge(world, world.with_gate(floors={"accuracy": 0.7}, baseline={}))
    assert (decision.verdict, decision.candidate, decision.champion) == ("passed", digest, None)
    assert [(r.rule, r.passed) for r in decision.rules] == [
        ("floor accuracy", True),
        ("baseline", True),
        ("first", True),
    ]
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
    assert describe_decision(decision)[0].endswith(", 80 test images")
    assert describe_decision(replace(decision, num_keys=5))[0].endswith(", 80 test images in 5 groups")
    assert decision.metrics["accuracy"]["value"] > decision.champion_metrics["accuracy"]["value"] + 0.2
    points = 100 * (decision.metrics["accuracy"]["value"] - decision.champion_metrics["accuracy"]["value"])
    rule = get_rule(decision, "better")
    assert f"difference {points:+.2f} points" in rule.found
    assert (100 * rule.value, rule.line) == (pytest.approx(points), 0.0)
    assert 0 < rule.low < rule.value < rule.high
    assert (decision.entry, decision.num_keys, decision.looks) == (1, 80, 1)


def test_a_worse_candidate_is_refused(world, tmp_path):
    crown(world, tmp_path, GOOD)
    world.write_candidate(POOR)
    for rule in ("better", "no_worse"):
        assert judge(world, world.with_gate(rule=rule)).verdict == "refused"


def test_equal_answers_are_inconclusive_for_better_and_pass_no_worse(world, tmp_path):
    crown(world, tmp_path, GOOD)
    world.write_candidate(GOOD, params={"seed": "another"})
    assert judge(world).verdict == "inconclusive"
    assert judge(world, world.with_gate(rule="no_worse", margin=0.05)).verdict == "passed"
    decision = judge(world, world.with_gate(rule="no_worse"))
    assert decision.verdict == "inconclusive"
    assert (
        "on 80 images: difference +0.00 points, 90 % interval -3.27 ... +3.27, p 0.1; about" in decision.rules[0].found
    )


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
    assert decision.verdict == "waiting"
    assert "the candidate no longer knows x" in get_rule(decision, "removed_class").found
    assert get_rule(decision, "new_class").found.startswith("b is found in ")
    known = [r for r in world.records if r.side == "test" and r.labels[0] in ("a", "c")]
    assert f"on {len(known)} images" in get_rule(decision, "better").found
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
    assert sorted(p.name for p in folder.iterdir()) == [
        f"{name}.{kind}" for name in ("000001", "000002", "latest") for kind in ("html", "json")
    ]
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


def test_a_champion_that_is_not_whole_in_the_store_is_replaced_only_by_a_persons_word(world, tmp_path):
    digest = crown(world, tmp_path, POOR)
    world.store.delete(f"bundles/{digest}/model.onnx")
    candidate = world.write_candidate(GOOD)
    waiting = judge(world)
    assert (waiting.verdict, waiting.champion, waiting.entry) == ("waiting", digest, 1)
    assert waiting.champion_metrics == {}
    assert waiting.rules[0].rule == "champion_runs"
    assert "is not whole in" in waiting.rules[0].found
    assert [r.rule for r in waiting.rules] == ["champion_runs"], "`first: no champion yet` would be wrong"
    with pytest.raises(NotPromoted, match=r"decision 1 is waiting .*`visionloop approve .*The champion stays\.$"):
        require_passed(world.store, "fake", candidate)
    passed = give_word(world, why="the disk is gone")
    assert (passed.number, passed.verdict) == (2, "passed")
    assert passed.rules[0].found.endswith("): approved by ann: the disk is gone")
    assert require_passed(world.store, "fake", candidate) == passed


def test_a_floor_still_holds_back_where_the_champion_cannot_be_asked(world, tmp_path):
    digest = crown(world, tmp_path, POOR)
    world.store.delete(f"bundles/{digest}/model.onnx")
    world.write_candidate(GOOD)
    assert judge(world, world.with_gate(floors={"accuracy": 0.99})).verdict == "refused"
    with pytest.raises(PromotionError, match="decision 1 of fake: is refused; expected one that is waiting"):
        give_word(world)


def test_a_store_that_is_away_is_an_error_and_no_verdict(world, tmp_path, monkeypatch):
    crown(world, tmp_path, POOR)
    world.write_candidate(GOOD)
    get = world.store.get

    def get_away(key):
        if key.startswith("bundles/"):
            raise StoreError("store", "is away")
        return get(key)

    monkeypatch.setattr(world.store, "get", get_away)
    with pytest.raises(StoreError, match="is away"):
        judge(world)
    assert latest_decision(world.store, "fake") is None


def test_a_candidate_waits_for_approval_where_it_is_required(world, tmp_path):
    crown(world, tmp_path, POOR)
    world.write_candidate(GOOD)
    params = world.with_gate(approval="required")
    waiting = judge(world, params)
    assert (waiting.verdict, waiting.number) == ("waiting", 1)
    assert judge(world, params) == waiting
    passed = give_word(world, why="looked at <b>it")
    assert (passed.number, passed.verdict, passed.decided_at) == (2, "passed", LATER)
    assert [(a.rule, a.passed) for a in passed.rules] == [(b.rule, b.passed or True) for b in waiting.rules]
    page = (world.settings.decisions_dir / "latest.html").read_text()
    assert "<h1>Passed: the candidate may replace the champion</h1>" in page and "Waiting: a person" not in page
    assert f'<p class="lead">Decision 2, {LATER}: approved by ann: looked at &lt;b&gt;it</p>' in page
    # The word stays with this candidate, against this champion, on these images.
    assert judge(world, params) == passed
    assert judge(world, params, state={**STATE, "code": "c2"}).verdict == "passed"
    world.write_candidate(GOOD, params={"seed": "another"})
    assert judge(world, params).verdict == "waiting"


def test_the_command_approve_says_what_it_did_and_what_it_cannot_do(world, monkeypatch, capsys):
    world.write_candidate(GOOD)
    judge(world, world.with_gate(approval="required"))
    (world.settings.home / "params.yaml").write_text("name: fake\n")
    monkeypatch.setenv("VISIONLOOP_HOME", str(world.settings.home))
    monkeypatch.setenv("VISIONLOOP_STORE", world.store.url)
    assert run_here(monkeypatch, "approve", "--why", "  ") == 2
    assert "visionloop approve --why: is empty; expected a reason" in capsys.readouterr().err
    assert run_here(monkeypatch, "approve") == 2
    assert "approve: --why is missing" in capsys.readouterr().err
    assert run_here(monkeypatch, "approve", "1", "--why", "looked\nat it") == 0
    told = capsys.readouterr().out
    assert ": looked at it; expected a person's word (`gate.approval: required`)" in told
    assert "pass  approval  approved by " in told
    assert "verdict: passed (decision 2)\nnext: `visionloop register`, then `visionloop promote`" in told
    assert run_here(monkeypatch, "approve", "--why", "again") == 2
    assert "decision 2 of fake: is passed; expected one that is waiting" in capsys.readouterr().err


@pytest.mark.parametrize("of_candidate", [True, False])
def test_a_model_that_may_not_know_is_compared_with_one_that_always_answers(world, tmp_path, of_candidate):
    rule = {"abstain": {"confidence": 0.6, "distance": None, "neighbours": None}}
    crown(world, tmp_path, POOR, **({} if of_candidate else rule))
    world.write_candidate(GOOD, **(rule if of_candidate else {}))
    decision = judge(world, world.with_gate(answered={"least": 0.2}))
    assert decision.verdict == "passed"
    assert ("answered" in decision.metrics, "answered" in decision.champion_metrics) == (of_candidate, not of_candidate)
    assert "<td>Answered</td>" in (world.settings.decisions_dir / "latest.html").read_text()


def test_a_word_is_for_what_waits_now(world, tmp_path):
    with pytest.raises(PromotionError, match="decisions fake: has no decision; expected one that waits"):
        give_word(world)
    world.write_candidate(GOOD)
    params = world.with_gate(approval="required")
    judge(world, params)
    with pytest.raises(PromotionError, match="has no decision 7"):
        give_word(world, number=7)
    judge(world, params, state={})
    with pytest.raises(PromotionError, match=r"is not the newest about its candidate: decision 2 is \(waiting\)"):
        give_word(world, number=1)
    crown(world, tmp_path, POOR)
    with pytest.raises(PromotionError, match="compared with ledger entry 0, and the champion moved"):
        give_word(world, number=2)


def test_candidates_against_one_champion_are_counted_and_told(world, tmp_path):
    crown(world, tmp_path, GOOD)
    told = []
    for number in range(3):
        world.write_candidate(GOOD, params={"seed": f"night {number}"})
        told.append(judge(world))
    assert [decision.looks for decision in told] == [1, 2, 3]
    assert [len([r for r in decision.rules if r.rule == "looks"]) for decision in told] == [0, 1, 1]
    looks = get_rule(told[2], "looks")
    assert (looks.passed, looks.value) == (True, 3.0)
    expected = "3rd candidate against this champion on these images: an equal one passes by luck with 14 %"
    assert looks.found == expected
    again = judge(world, state={})
    assert (again.looks, again.number) == (3, 4), "the same candidate keeps its place"
    spent = judge(world, world.with_gate(looks="spend"))
    assert get_rule(spent, "looks").expected.endswith("over all of them: this one is judged at 0.42 %")
    assert "99.17 % interval" in get_rule(spent, "better").found


def test_the_first_model_must_beat_the_most_frequent_class(world):
    world.write_candidate(POOR)
    decision = judge(world, world.with_gate(baseline={}))
    rule = get_rule(decision, "baseline")
    assert (decision.verdict, rule.passed) == ("refused", False)
    assert rule.expected.startswith("an interval above 47.50 %, the answer always 'a'")
    shown = judge(world, world.with_gate(baseline={"mode": "dry_run"}))
    assert (shown.verdict, get_rule(shown, "baseline").passed) == ("passed", False)


def test_few_test_images_are_inconclusive_and_say_how_many_are_missing(world, tmp_path):
    crown(world, tmp_path, POOR)
    world.write_candidate(GOOD)
    decision = judge(world, world.with_gate(min_images={}))
    rule = get_rule(decision, "min_images")
    assert (decision.verdict, get_rule(decision, "better").passed) == ("inconclusive", True)
    assert rule.found == "80 test images to compare on"
    assert rule.expected == "at least 100 and 10 of each class: about 20 more test images, or a lower gate.min_images"
    advice = r"The champion stays\. Ingest more images, of more groups .*; or lower `gate\.min_images`\.$"
    with pytest.raises(NotPromoted, match=rf"decision 1 is inconclusive \(min_images: .*{advice}"):
        require_passed(world.store, "fake", decision.candidate)


def test_a_model_that_answers_no_numbers_is_named(world, tmp_path, monkeypatch):
    run = Predictor.run

    def run_badly(predictor, images_nhwc):
        out = run(predictor, images_nhwc)
        if predictor.card.params == {"seed": "bad"}:
            out.probs_nk[3] = np.nan
        return out

    monkeypatch.setattr(Predictor, "run", run_badly)
    world.write_candidate(GOOD, params={"seed": "bad"})
    with pytest.raises(BundleError, match=r"answers 2 of 80 test images with no number, first [0-9a-f]{12}"):
        judge(world)
    crown(world, tmp_path, POOR, params={"seed": "bad"})
    world.write_candidate(GOOD)
    assert "with no number" in get_rule(judge(world), "champion_runs").found


def test_time_is_measured_once_beside_the_champion(world, tmp_path):
    crown(world, tmp_path, POOR)
    world.write_candidate(GOOD)
    params = world.with_gate(latency={"ms": 1e-6, "ratio": 1000, "mode": "on"})
    decision = judge(world, params)
    rule = get_rule(decision, "latency")
    assert (decision.verdict, rule.passed, rule.line) == ("refused", False, 1e-6)
    assert 0 < rule.value < 1000
    assert rule.expected == "at most 1e-06 ms and 1000 times the champion's"
    assert judge(world, params) == decision, "the same times, so the same decision"
    shown = judge(world, world.with_gate(latency={"ms": 1e-6}))
    assert (shown.verdict, get_rule(shown, "latency").mode) == ("passed", "dry_run")
    (path,) = (world.settings.hidden_dir / "latency").iterdir()
    path.write_text("{")
    assert get_rule(judge(world, params), "latency").passed is False


def test_size_is_held_against_its_budget(world):
    world.write_candidate(GOOD)
    for mb, verdict in ((0.0001, "refused"), (5, "passed")):
        decision = judge(world, world.with_gate(model_size={"mb": mb}))
        assert (decision.verdict, get_rule(decision, "model_size").line) == (verdict, mb)
    assert judge(world, world.with_gate(model_size={"mb": 0.0001, "mode": "dry_run"})).verdict == "passed"


def test_a_damaged_decision_is_named(world):
    world.store.put("decisions/fake/000001.json", b'{"rules": 3}')
    with pytest.raises(PromotionError, match=r"decisions/fake/000001\.json: is damaged"):
        latest_decision(world.store, "fake")
