"""What evaluate says beside the figures: slices, baselines, and the runtimes that give the same answers."""

import csv
import io
import json
import shutil
from dataclasses import replace
from functools import partial

import numpy as np
import pytest

from visionloop.data.rows import HeldRows, hold_records
from visionloop.errors import BundleError, DatasetError
from visionloop.evaluation import runtimes
from visionloop.evaluation.evaluate import evaluate
from visionloop.evaluation.slices import make_slices
from visionloop.predictor import FP32, Predictor
from worlds import GOOD, POOR, make_world


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("runtimes"), prepared=True)


def read_intervals(world):
    return json.loads((world.settings.reports_dir / "intervals.json").read_text())


def test_the_other_runtime_gives_the_same_answers(world):
    pytest.importorskip("openvino")
    world.write_candidate(GOOD, runtimes=(FP32, "openvino fp32"))
    evaluate(world)
    [found] = read_intervals(world)["runtimes"]
    assert found.pop("largest_difference") < 1e-3
    expected = {"runtime": "openvino fp32", "approved": True, "loads": True, "num_changed": 0, "log_loss_rise": 0.0}
    assert found == expected


def test_a_runtime_that_answers_otherwise_is_not_approved(world, monkeypatch, tmp_path):
    world.write_candidate(GOOD)
    other = make_world(tmp_path)
    other.write_candidate(POOR)
    poor = Predictor.load(other.settings.candidate_dir)
    check = runtimes.RuntimeCheck("odd", poor)
    monkeypatch.setattr("visionloop.evaluation.evaluate.open_runtimes", lambda *args: [check])
    said = []
    evaluate(world, tell=said.append)
    [found] = read_intervals(world)["runtimes"]
    assert (found["approved"], found["loads"]) == (False, True)
    assert found["num_changed"] > 20
    assert any(line.startswith("LOOK: odd is not approved for this model: ") for line in said)


def test_a_runtime_that_cannot_load_the_model_is_told(world, monkeypatch):
    def fail(*args, **options):
        raise BundleError("bundle", "does not load")

    monkeypatch.setattr("visionloop.evaluation.runtimes.has_openvino", lambda: True)
    monkeypatch.setattr("visionloop.predictor._open_openvino", fail)
    world.write_candidate(GOOD, runtimes=(FP32, "openvino fp32"))
    shutil.rmtree(world.settings.work_dir("evaluate"), ignore_errors=True)  # what it gave before is not asked again
    said = []
    evaluate(world, tell=said.append)
    assert "LOOK: openvino fp32 is not approved for this model: it does not load it" in said
    world.write_candidate(GOOD, runtimes=(FP32,))
    evaluate(world)
    assert read_intervals(world)["runtimes"] == [], "what the card does not list is never served"


def test_slices_and_baselines_are_in_the_reports(world, monkeypatch):
    monkeypatch.setattr("visionloop.evaluation.evaluate.make_slices", partial(make_slices, min_support=20))
    world.write_candidate(GOOD)
    said = []
    evaluate(world, tell=said.append)
    found = read_intervals(world)
    baselines = {row["name"]: row for row in found["baselines"]}
    assert list(baselines) == ["majority class", "neighbours", "linear head"]
    prepared_labels = np.array([r.labels[0] for r in world.records if r.side == "train"])
    names, counts = np.unique(prepared_labels, return_counts=True)
    tests = [r.labels[0] for r in world.records if r.side == "test"]
    majority = np.mean([label == names[counts.argmax()] for label in tests])
    assert baselines["majority class"]["accuracy"]["value"] == pytest.approx(majority)
    assert baselines["majority class"]["verdict"] == "beaten"
    gain = found["metrics"]["accuracy"]["value"] - majority
    assert baselines["majority class"]["gain"]["value"] == pytest.approx(gain)
    assert {row["name"] for row in found["slices"]} == {"bytes=low", "bytes=middle", "bytes=high"} | {
        f"{name}={third}" for name in ("brightness", "sharpness") for third in ("low", "middle", "high")
    }
    with (world.settings.reports_dir / "slices.csv").open(newline="") as file:
        shares = [float(row["accuracy"]) for row in csv.DictReader(file)]
    assert shares == sorted(shares)
    assert not [line for line in said if "most frequent class" in line]


def test_a_network_that_has_learned_nothing_is_told_so(world):
    world.write_candidate(POOR)
    said = []
    evaluate(world, tell=said.append)
    assert any(
        "not clearly better than the training side's most frequent class for every image" in line for line in said
    )


def test_without_baseline_images_only_the_majority_is_judged(tmp_path):
    world = make_world(tmp_path, prepared=True)
    section = world.params.evaluate.model_copy(update={"baseline_images": 0})
    world = replace(world, params=world.params.model_copy(update={"evaluate": section}))
    world.write_candidate(GOOD)
    evaluate(world)
    assert [row["name"] for row in read_intervals(world)["baselines"]] == ["majority class"]


def test_images_in_groups_are_told_and_widen_every_interval(tmp_path):
    world = make_world(tmp_path, prepared=True)
    world.write_candidate(GOOD)
    alone = evaluate(world)
    manifest = world.settings.prepared_dir / "manifest.parquet"
    records = list(HeldRows(io.BytesIO(manifest.read_bytes())))
    names = [f"film {record.labels} {i % 3}" for i, record in enumerate(records)]
    films = [replace(record, group=name, key=name) for record, name in zip(records, names, strict=True)]
    manifest.write_bytes(hold_records(films).file.getvalue())
    said = []
    found = evaluate(world, tell=said.append)
    groups = len({f.key for f in films if f.side == "test"})
    assert said[0] == f"on 80 test images in {groups} groups"
    page = (world.settings.reports_dir / "report.html").read_text()
    assert f"80 test images in {groups} groups of dataset version" in page
    assert (read_intervals(world)["num_test"], read_intervals(world)["num_groups"]) == (80, groups)
    assert found["accuracy"].value == alone["accuracy"].value
    assert found["accuracy"].high - found["accuracy"].low > alone["accuracy"].high - alone["accuracy"].low
    assert found["macro_f1"].low is None, "three films a class tell no interval"


def test_prepared_data_without_its_manifest_is_an_error_that_says_what_to_do(tmp_path):
    world = make_world(tmp_path, prepared=True)
    world.write_candidate(GOOD)
    manifest = world.settings.prepared_dir / "manifest.parquet"
    whole = list(HeldRows(io.BytesIO(manifest.read_bytes())))
    for data, message in (
        (None, "has no manifest.parquet"),
        (b"", "is damaged"),
        (hold_records(whole[1:]).file.getvalue(), "has a manifest of other images"),
    ):
        manifest.unlink() if data is None else manifest.write_bytes(data)
        with pytest.raises(DatasetError, match=message):
            evaluate(world)
