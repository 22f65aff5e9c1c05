"""The page about a decision on a real test side, and two models side by side."""

import json
import re

import pytest
from test_decide import NOW, crown, get_rule, judge

from memory_tracking import MemoryTracking
from visionloop.data.manifest import make_image_key
from visionloop.errors import BundleError, BusyError, DatasetError, PromotionError
from visionloop.predictor import Predictor
from visionloop.promotion.decide import compare_models
from visionloop.promotion.evidence import make_page
from visionloop.promotion.ledger import latest_decision
from visionloop.promotion.models import find_bundle_of_run, load_candidate
from visionloop.workfolder import lock_work
from visionloop.workspace import connect
from worlds import GOOD, POOR, make_world, write_bundle

PICTURE = re.compile(r'<img alt="" src="data:image/')  # a figure says what it shows


@pytest.fixture
def world(tmp_path):
    return make_world(tmp_path / "home")


def open_world(world):
    return connect(world.settings, world.params, store=world.store)


def test_the_page_shows_the_images_whose_verdict_changed(world, tmp_path):
    crown(world, tmp_path, POOR)
    world.write_candidate(GOOD)
    decision = judge(world)
    page = (world.settings.decisions_dir / f"{decision.number:06d}.html").read_text(encoding="utf-8")
    assert page == (world.settings.decisions_dir / "latest.html").read_text(encoding="utf-8")
    facts = compare_models(
        open_world(world),
        (Predictor.load(world.settings.candidate_dir), Predictor.load(tmp_path / f"champion-{POOR}")),
        ("a", "b"),
        now=NOW,
    )
    assert facts.champion is not None
    ours, theirs = facts.candidate.answers.hits_n, facts.champion.answers.hits_n
    assert f"Right now, wrong before: {(ours & ~theirs).sum()}" in page
    assert f"Wrong now, right before: {(theirs & ~ours).sum()}" in page or not (theirs & ~ours).any()
    shown = set(re.findall(r'data-image="([0-9a-f]{64})"', page))
    changed = {facts.sha256_n[row] for row in (ours != theirs).nonzero()[0][:5]}
    assert changed <= shown
    assert len(PICTURE.findall(page)) == page.count("data-image=")


def test_a_picture_that_is_gone_is_left_out_of_the_page(world, tmp_path):
    crown(world, tmp_path, POOR)
    world.write_candidate(GOOD)
    judge(world)
    page = (world.settings.decisions_dir / "latest.html").read_text(encoding="utf-8")
    gone = re.findall(r'data-image="([0-9a-f]{64})"', page)[0]
    world.store.purge(make_image_key(gone))
    judge(world, now="2026-02-05T00:00:00Z")
    page = (world.settings.decisions_dir / "latest.html").read_text(encoding="utf-8")
    assert len(PICTURE.findall(page)) < page.count("data-image=")


def test_two_models_are_compared_and_nothing_is_stored(world, tmp_path):
    for seed in (GOOD, POOR):
        write_bundle(tmp_path / str(seed), world.pin, seed)
    models = (Predictor.load(tmp_path / str(GOOD)), Predictor.load(tmp_path / str(POOR)))
    facts = compare_models(open_world(world), models, ("good", "poor"), now=NOW)
    good, poor = (figures["accuracy"]["value"] for figures in (facts.decision.metrics, facts.decision.champion_metrics))
    assert good > poor
    page = make_page(world.store, facts)
    assert "good against poor" in page
    assert "The rules</h2>" not in page and "What the rules of the gate would say" in page
    assert latest_decision(world.store, "fake") is None
    assert not world.settings.decisions_dir.exists()
    with pytest.raises(PromotionError, match="good and good: are one model"):
        compare_models(open_world(world), (models[0], models[0]), ("good", "good"), now=NOW)


def test_a_run_is_found_by_its_bundle(world):
    digest = world.write_candidate(GOOD)
    workspace = connect(world.settings, world.params, store=world.store, tracking=MemoryTracking())
    run_id = workspace.tracking.open_run("a", run_id=None, tags={"visionloop.bundle": digest}, params={})
    assert find_bundle_of_run(workspace, run_id) == world.settings.candidate_dir
    world.write_candidate(POOR)
    with pytest.raises(PromotionError, match="is in neither the workspace nor the store"):
        find_bundle_of_run(workspace, run_id)
    with pytest.raises(PromotionError, match="run 0: is not in MLflow"):
        find_bundle_of_run(workspace, "0")


def test_what_evaluate_found_of_simple_heads_is_a_rule(world):
    digest, reports = world.write_candidate(GOOD), world.settings.reports_dir
    on = world.with_gate(floors={}, baseline={"mode": "off", "heads": "on"})
    assert judge(world, on).verdict == "inconclusive", "there is no report"
    interval = {"value": 0.9, "low": 0.8, "high": 0.95}
    row = {"name": "linear head", "accuracy": interval, "gain": {"value": -0.1, "low": -0.15, "high": -0.05}}
    report = {"bundle": digest, "baselines": [row, {**row, "name": "majority class"}]}
    reports.mkdir(parents=True, exist_ok=True)
    for value, verdict in (
        (report, "refused"),
        ({**report, "bundle": "another"}, "inconclusive"),
        ({**report, "baselines": [7]}, "inconclusive"),
        ([], "inconclusive"),
    ):
        (reports / "intervals.json").write_text(json.dumps(value))
        assert judge(world, on).verdict == verdict, value
    (reports / "intervals.json").write_text(json.dumps(report))
    shown = judge(world, world.with_gate(floors={}, baseline={"mode": "off", "heads": "dry_run"}))
    assert (shown.verdict, get_rule(shown, "simple_head").passed) == ("passed", False)


@pytest.mark.parametrize("is_there", [False, True])
def test_while_a_training_runs_that_is_told(world, tmp_path, is_there):
    crown(world, tmp_path, POOR)
    if is_there:  # an old candidate, of another dataset version
        world.write_candidate(GOOD, dataset={"name": "fake", "version": 7, "digest": "f" * 64})
    workspace = connect(world.settings, world.params, store=world.store)
    with lock_work(world.settings.work_dir("train"), "key"):
        with pytest.raises(
            BusyError, match=r"models/candidate: is not there yet: a training is running; .*Wait for it"
        ):
            judge(world)
        if not is_there:
            with pytest.raises(BusyError, match="a training is running"):
                load_candidate(workspace)
    with pytest.raises((BundleError, DatasetError)):
        judge(world)
