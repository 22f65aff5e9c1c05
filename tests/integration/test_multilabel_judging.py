"""Several labels an image, judged: the stage `evaluate`, its files and figures, and the gate. Small real models."""

import csv
import json

import numpy as np
import pytest
from sklearn import metrics as reference

from visionloop.bundle import load_bundle, upload_bundle
from visionloop.data.prepare import prepare
from visionloop.data.shards import load_prepared
from visionloop.errors import DatasetError
from visionloop.evaluation.evaluate import evaluate
from visionloop.evaluation.report import COMPARED
from visionloop.params import make_params
from visionloop.predictor import Predictor
from visionloop.promotion.decide import gate
from visionloop.promotion.ledger import append_entry
from visionloop.workspace import connect
from worlds import GOOD, POOR, make_label_facts, make_world, write_bundle

NOW = "2026-02-03T04:05:06Z"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("several"), prepared=True, task="multilabel")


@pytest.fixture
def fresh(tmp_path):
    return make_world(tmp_path / "home", task="multilabel")


def crown(world, folder, seed, **card):
    digest = write_bundle(folder, world.pin, seed, **card)
    upload_bundle(world.store, load_bundle(folder))
    facts = {"decision": None, "dataset": {}, "run_id": None, "by": "test", "why": "test", "at": NOW}
    append_entry(world.store, "fake", None, action="promote", bundle=digest, model_version="1", **facts)
    return digest


def judge(world, params=None):
    return gate(connect(world.settings, params or world.params, store=world.store), state={}, now=NOW)


def to_sets(lists, classes):
    return np.array([[name in labels for name in classes] for labels in lists])


def test_evaluate_writes_what_the_served_predictor_says(world):
    world.write_candidate(GOOD)
    found = evaluate(world)
    tests = [r for r in world.records if r.side == "test"]
    predictor = Predictor.load(world.settings.candidate_dir)
    served = predictor.predict([world.store.get(f"images/{r.sha256[:2]}/{r.sha256}") for r in tests])
    truth_nk, said_nk = (to_sets(x, world.pin.classes) for x in ([r.labels for r in tests], [p.labels for p in served]))
    expected = {
        "accuracy": reference.accuracy_score(truth_nk, said_nk),
        "macro_f1": reference.f1_score(truth_nk, said_nk, average="macro"),
        "micro_f1": reference.f1_score(truth_nk, said_nk, average="micro"),
    }
    assert {name: found[name].value for name in expected} == pytest.approx(expected)
    assert 0.7 < expected["accuracy"] < 0.95
    assert {(), ("a",)} < {r.labels for r in tests}, "negatives are judged too"
    summary = json.loads((world.settings.reports_dir / "metrics.json").read_text())
    assert summary == {**{n: i.value for n, i in found.items() if n in COMPARED}, "num_test": len(tests)}
    assert {"accuracy", "macro_f1", "log_loss"} <= set(summary)
    with (world.settings.reports_dir / "predictions.csv").open(newline="") as file:
        rows = {row["sha256"]: row for row in csv.DictReader(file)}
    for record, answer in zip(tests, served, strict=True):
        row = rows.pop(record.sha256)
        assert (row["actual"], row["predicted"]) == ("|".join(record.labels), answer.prediction)
        assert float(row["confidence"]) == pytest.approx(answer.confidence, abs=1e-4)
    assert rows == {}
    with (world.settings.reports_dir / "per_class.csv").open(newline="") as file:
        classes = list(csv.DictReader(file))
    assert list(classes[0])[:6] == ["class", "precision", "recall", "f1", "support", "average_precision"]
    recalls = reference.recall_score(truth_nk, said_nk, average=None)
    assert [float(row["recall"]) for row in classes] == pytest.approx(list(recalls), abs=1e-6)


def test_evaluate_draws_and_tells_of_several_labels(world):
    world.write_candidate(POOR)
    evaluate(world)
    reports = world.settings.reports_dir
    figures = sorted(p.name for p in (reports / "figures").iterdir())
    assert figures == ["confidence.png", "mistakes.png", "outcomes.png", "per_class.png"]
    page = (reports / "report.html").read_text()
    for words in ("Accuracy (exact match)", "Mean average precision", "said instead", "0.500 for every class"):
        assert words in page
    assert "Confusion" not in page
    first = {p.name: p.read_bytes() for p in reports.rglob("*") if p.is_file()}
    evaluate(world)
    assert {p.name: p.read_bytes() for p in reports.rglob("*") if p.is_file()} == first


def test_evaluate_respects_the_threshold_of_each_class(world):
    world.write_candidate(GOOD, thresholds={"a": 0.0, "b": 1.1, "c": 0.5})
    evaluate(world)
    with (world.settings.reports_dir / "per_class.csv").open(newline="") as file:
        recalls = {row["class"]: float(row["recall"]) for row in csv.DictReader(file)}
    assert (recalls["a"], recalls["b"]) == (1.0, 0.0)
    assert 0.5 < recalls["c"] < 1.0


def test_evaluate_refuses_a_candidate_of_another_task(world):
    world.write_candidate(GOOD, task="multiclass", thresholds=None)
    with pytest.raises(DatasetError, match="models/candidate: is multiclass; expected multilabel, as data/prepared is"):
        evaluate(world)


def test_gate_compares_sets_of_labels(fresh, tmp_path):
    facts = make_label_facts(fresh.pin.classes)
    poor = crown(fresh, tmp_path / "poor", POOR, **facts)
    fresh.write_candidate(GOOD)
    for metric in ("accuracy", "macro_f1"):
        decision = judge(fresh, fresh.with_gate(metric=metric, floors={metric: 0.5}))
        assert (decision.verdict, decision.champion) == ("passed", poor)
        assert [r.rule for r in decision.rules] == [f"floor {metric}", "better", "class_drop", "log_loss"]
        gained = decision.metrics[metric]["value"] - decision.champion_metrics[metric]["value"]
        assert gained > 0.2
        assert f"difference {100 * gained:+.2f} points" in decision.rules[1].found
    assert decision.num_test == 80, "images without a label are negatives here"
    assert set(decision.metrics) >= {"accuracy", "macro_f1", "micro_f1", "map", "log_loss"}


def test_gate_and_evaluate_agree(fresh):
    fresh.write_candidate(GOOD)
    prepare(fresh)
    found = evaluate(fresh)
    decision = judge(fresh)
    assert decision.metrics.keys() == found.keys()
    for name, interval in found.items():
        assert decision.metrics[name] == pytest.approx(interval.to_json()), name


def test_gate_leaves_unlabelled_images_out_unless_they_are_negatives(fresh):
    fresh.write_candidate(GOOD)
    params = make_params({"name": "fake", "task": "multilabel", "prepare": {"image_size": 32}})
    unlabelled = sum(r.side == "test" and not r.labels for r in fresh.records)
    assert unlabelled > 0
    assert judge(fresh, params).num_test == 80 - unlabelled


@pytest.mark.parametrize("single_is_champion", [True, False])
def test_gate_compares_one_label_and_several_as_sets(fresh, tmp_path, single_is_champion):
    facts = make_label_facts(fresh.pin.classes)
    several = {**facts, "params": {"seed": "x"}}
    single = {"task": "multiclass", "threshold": None, "thresholds": None}
    crown(fresh, tmp_path / "champion", GOOD, **(single if single_is_champion else several))
    fresh.write_candidate(GOOD, **(several if single_is_champion else single))
    decision = judge(fresh)
    assert (decision.rules[0].rule, decision.rules[0].passed) == ("task", True)
    words = ("multilabel", "multiclass") if single_is_champion else ("multiclass", "multilabel")
    assert decision.rules[0].found == f"the candidate is {words[0]}, the champion {words[1]}"
    # One answer an image is right only where the image has just that label.
    tests = [r for r in fresh.records if r.side == "test"]
    predictor = Predictor(load_bundle(tmp_path / "champion"), threads=1)
    served = predictor.predict([fresh.store.get(f"images/{r.sha256[:2]}/{r.sha256}") for r in tests])
    right = [
        (p.labels or (p.prediction,) if p.labels != () else ()) == r.labels for p, r in zip(served, tests, strict=True)
    ]
    assert decision.champion_metrics["accuracy"]["value"] == pytest.approx(np.mean(right))
    assert decision.verdict == ("passed" if single_is_champion else "refused")


def test_gate_knows_classes_that_only_one_model_has(fresh, tmp_path):
    facts = make_label_facts(("c", "x", "a"))
    crown(fresh, tmp_path / "champion", GOOD, model_classes=("c", "x", "a"), **facts)
    fresh.write_candidate(GOOD)
    decision = judge(fresh, fresh.with_gate(min_images={"all": 40}))
    assert decision.verdict == "waiting", "a class that only the champion knows is gone"
    assert 0 <= decision.champion_metrics["accuracy"]["value"] < decision.metrics["accuracy"]["value"]


def test_a_world_of_several_labels_has_sets_of_all_sizes(world):
    prepared = load_prepared(world.settings.prepared_dir)
    assert {len(prepared.labels(row)) for row in range(len(prepared.sha256_n))} == {0, 1, 2, 3}
