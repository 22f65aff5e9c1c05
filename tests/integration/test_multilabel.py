"""Several labels an image through the whole loop: a table, prepare, train, evaluate, gate, promote, predict, serve."""

import csv
import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from fastapi.testclient import TestClient

from shapes import SHAPES, open_parts, read_runs, write_shape_sets
from visionloop.data.manifest import load_pin
from visionloop.data.parts import iterate_records
from visionloop.data.prepare import prepare
from visionloop.data.shards import load_prepared
from visionloop.evaluation.evaluate import evaluate
from visionloop.evaluation.label_metrics import compute_label_metrics
from visionloop.ingest.pull import PullReport, pull
from visionloop.predict.files import find_images, predict_files
from visionloop.predictor import Predictor
from visionloop.promotion.decide import gate
from visionloop.promotion.models import load_champion
from visionloop.promotion.promote import promote, register
from visionloop.records import Decision, Interval, RunNote
from visionloop.serving.app import make_app
from visionloop.serving.swap import ModelSlot, ServedModel
from visionloop.training.checks import check_training
from visionloop.training.fit import train
from visionloop.training.job import Call
from visionloop.workspace import connect

NOW = "2026-01-01T00:00:00+00:00"
PARAMS = """\
name: sets
task: multilabel
ingest:
  sources:
  - {kind: table, path: SOURCE, name: table, columns: {image: image, label: shapes, separator: "|"}}
prepare: {image_size: 40, unlabelled: negative}
train: {backbone: small_cnn, max_epochs: 8, batch_size: 16, learning_rate: 4.0e-3, patience: 50, precision: fp32}
evaluate: {resamples: 400}
gate: {metric: macro_f1, floors: {accuracy: 0.4}, min_images: {all: 20, per_class: 5}}
"""


@dataclass(frozen=True)
class Loop:
    """A workspace after one turn of the loop, and what each part of it returned."""

    home: Path
    photos: Path
    report: PullReport
    note: RunNote
    metrics: dict[str, Interval]
    decision: Decision


@pytest.fixture(scope="module")
def loop(tmp_path_factory: pytest.TempPathFactory) -> Loop:
    folder = tmp_path_factory.mktemp("sets")
    photos, home = write_shape_sets(folder / "photos"), folder / "ws"
    home.mkdir()
    (home / "params.yaml").write_text(PARAMS.replace("SOURCE", str(photos / "labels.csv")))
    settings, params, store, tracking = open_parts(home)
    report = pull(connect(settings, params, store=store), sources=params.ingest.sources, now=NOW)
    prepare(connect(settings, params, store=store))
    opened = connect(settings, params, store=store, tracking=tracking)
    note = train(opened, check_training(opened), Call(now=NOW))
    assert note is not None
    metrics = evaluate(connect(settings, params))
    decision = gate(connect(settings, params, store=store), state={}, now=NOW)
    return Loop(home, photos, report, note, metrics, decision)


def read_truth(photos: Path) -> dict[str, tuple[str, ...]]:
    with (photos / "labels.csv").open(newline="") as file:
        return {row["image"]: tuple(filter(None, row["shapes"].split("|"))) for row in csv.DictReader(file)}


def test_the_labels_of_the_table_are_what_is_learned(loop: Loop) -> None:
    settings, _, store, _ = open_parts(loop.home)
    truth = read_truth(loop.photos)
    records = list(iterate_records(store, load_pin(settings.pin_path)))
    assert {Path(r.origins[0].split(":")[-1]).name: r.labels for r in records} == truth
    prepared = load_prepared(settings.prepared_dir)
    assert (prepared.task, prepared.classes) == ("multilabel", SHAPES)
    by_sha256 = {r.sha256: r.labels for r in records}
    assert all(prepared.labels(row) == by_sha256[sha256] for row, sha256 in enumerate(prepared.sha256_n))
    assert {len(labels) for labels in truth.values()} == {0, 1, 2, 3}


def test_the_model_is_far_better_than_guessing(loop: Loop) -> None:
    settings, params, _, _ = open_parts(loop.home)
    prepared = load_prepared(settings.prepared_dir)
    assert prepared.targets_nk is not None
    targets_nk = prepared.targets_nk[prepared.rows("test")].astype(bool)
    everything_nk = np.ones(targets_nk.shape)  # the best that can be said without looking, by macro F1
    draw = {"resamples": params.evaluate.resamples, "seed": 0, "key_n": np.arange(len(targets_nk))}
    guessed = compute_label_metrics(targets_nk, everything_nk / 2, everything_nk > 0, **draw)
    assert 0.5 < guessed["macro_f1"].value < 0.8
    assert loop.metrics["macro_f1"].low > guessed["macro_f1"].value + 0.05
    assert loop.metrics["accuracy"].value > 0.6  # an exact match: one in eight by chance
    assert loop.metrics["map"].value > 0.9
    assert loop.metrics["log_loss"].value < 0.45  # 0.69 without looking


def test_the_run_in_mlflow_has_its_figures(loop: Loop) -> None:
    run = read_runs(loop.home)[loop.note.run_id]
    assert run.info.status == "FINISHED"
    figures = run.data.metrics
    for name, interval in loop.metrics.items():
        assert figures[f"test/{name}"] == pytest.approx(interval.value)
    assert {"train/loss", "val/loss", "val/accuracy", "val/f1", "val/map"} <= set(figures)
    assert 0 < figures["val/f1"] <= 1


def test_the_bundle_answers_with_sets(loop: Loop) -> None:
    folder = open_parts(loop.home)[0].candidate_dir
    predictor = Predictor.load(folder)
    card = predictor.card
    assert (card.task, card.classes, card.threshold) == ("multilabel", SHAPES, None)
    assert card.thresholds == dict.fromkeys(SHAPES, 0.5)
    assert predictor.run(np.zeros((2, 40, 40, 3), np.uint8)).logits_nk.shape == (2, 3)
    golden = json.loads((folder / "golden" / "answers.json").read_text())
    assert all(isinstance(labels, list) and set(labels) <= {*SHAPES} for labels in golden["labels"])
    with np.load(folder / "reference.npz", allow_pickle=False) as reference:
        assert reference["targets_nk"].shape == (len(reference["label_n"]), 3)


def test_the_gate_judges_as_evaluate_does_and_the_champion_answers(loop: Loop, tmp_path: Path) -> None:
    assert loop.decision.verdict == "passed"
    assert [r.rule for r in loop.decision.rules] == ["floor accuracy", "baseline", "first", "simple_head"]
    assert loop.decision.metrics["macro_f1"]["value"] == pytest.approx(loop.metrics["macro_f1"].value)
    shutil.copytree(loop.home, tmp_path / "ws")
    settings, params, store, tracking = open_parts(tmp_path / "ws")
    register(connect(settings, params, store=store, tracking=tracking))
    promote(connect(settings, params, store=store, tracking=tracking), by="test", why="test", now=NOW)
    again = gate(connect(settings, params, store=store), state={"code": "2"}, now=NOW)
    assert (again.verdict, again.champion) == ("inconclusive", loop.note.bundle)
    champion = load_champion(connect(settings, params, store=store))
    answers = list(predict_files(champion, find_images([str(loop.photos / "images")])))
    truth = read_truth(loop.photos)
    right = [a.prediction is not None and a.prediction.labels == truth[Path(a.path).name] for a in answers]
    assert np.mean(right) > 0.6
    said = {len(a.prediction.labels or ()) for a in answers if a.prediction}
    assert said == {0, 1, 2, 3}


def test_the_server_gives_the_same_answers(loop: Loop) -> None:
    predictor = Predictor.load(open_parts(loop.home)[0].candidate_dir, threads=1)
    paths = sorted((loop.photos / "images").iterdir())[:8]
    expected = predictor.predict([path.read_bytes() for path in paths])
    with TestClient(make_app(ModelSlot(ServedModel(predictor)))) as client:
        results = client.post("/predict", files=[("file", (p.name, p.read_bytes())) for p in paths]).json()["results"]
        assert client.get("/model").json()["thresholds"] == dict.fromkeys(SHAPES, 0.5)
    for result, answer in zip(results, expected, strict=True):
        assert result["labels"] == list(answer.labels or ())
        assert result["probabilities"] == pytest.approx(answer.probabilities, abs=1e-6)
