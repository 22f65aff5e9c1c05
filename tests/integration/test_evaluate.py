"""The stage `evaluate`: its files, its errors, and that it judges the answers that are served."""

import csv
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from sklearn import metrics as reference

from fakes import make_card
from visionloop import predictor
from visionloop.bundle import load_run_note
from visionloop.data.shards import load_prepared
from visionloop.errors import BundleError, DatasetError
from visionloop.evaluation.answers import Answers
from visionloop.evaluation.evaluate import OUTS, describe_gap, describe_threshold, evaluate
from visionloop.evaluation.report import COMPARED
from visionloop.predictor import Predictor
from visionloop.records import Interval
from worlds import GOOD, make_world


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("evaluate"), prepared=True)


def read_outs(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_writes_what_the_served_predictor_says(world):
    digest = world.write_candidate(GOOD)
    found = evaluate(world)
    tests = [r for r in world.records if r.side == "test"]
    loaded = Predictor.load(world.settings.candidate_dir)
    served = loaded.predict([world.store.get(f"images/{r.sha256[:2]}/{r.sha256}") for r in tests])
    expected = reference.accuracy_score([r.labels[0] for r in tests], [p.prediction for p in served])
    assert found["accuracy"].value == pytest.approx(expected)
    assert 0.7 < expected < 0.95
    summary = json.loads((world.settings.reports_dir / "metrics.json").read_text())
    assert summary == {**{n: i.value for n, i in found.items() if n in COMPARED}, "num_test": len(tests)}
    assert {"accuracy", "macro_f1", "log_loss"} <= set(summary)
    intervals = json.loads((world.settings.reports_dir / "intervals.json").read_text())
    assert intervals["metrics"]["accuracy"] == found["accuracy"].to_json()
    assert (intervals["num_test"], intervals["bundle"], intervals["dataset"]) == (len(tests), digest, world.pin.digest)
    with (world.settings.reports_dir / "predictions.csv").open(newline="") as file:
        rows = {row["sha256"]: row for row in csv.DictReader(file)}
    for record, answer in zip(tests, served, strict=True):
        row = rows.pop(record.sha256)
        assert (row["actual"], row["predicted"]) == (record.labels[0], answer.prediction)
        assert float(row["confidence"]) == pytest.approx(answer.confidence, abs=1e-4)
    assert rows == {}
    with (world.settings.reports_dir / "per_class.csv").open(newline="") as file:
        assert [row["class"] for row in csv.DictReader(file)] == list(world.pin.classes)


def test_same_input_gives_same_bytes_and_other_files_stay(world):
    world.write_candidate(GOOD)
    evaluate(world)
    reports = world.settings.reports_dir
    first = read_outs(reports)
    (reports / "notes.txt").write_text("mine")
    (reports / "figures" / "old.png").write_bytes(b"of an older run")
    evaluate(world)
    assert read_outs(reports) == {**first, "notes.txt": b"mine"}
    assert {name.split("/")[0] for name in first} == set(OUTS)
    [work] = world.settings.work_dir("evaluate").glob("*/")
    assert sorted(path.name for path in work.iterdir()) == ["done.json", "engines"]


def test_the_same_network_with_another_card_is_run_on_no_test_image(world, monkeypatch):
    run_on = []
    open_it = predictor._open

    class Counting:
        def __init__(self, *args):
            self.session = open_it(*args)

        def run(self, names, inputs):
            run_on.append(len(inputs["images"]))
            return self.session.run(names, inputs)

    monkeypatch.setattr(predictor, "_open", Counting)
    world.write_candidate(GOOD)
    golden = len(Predictor.load(world.settings.candidate_dir).bundle.golden_images())
    evaluate(world)
    before = read_outs(world.settings.reports_dir)
    world.write_candidate(GOOD, temperature=3.0, abstain={"confidence": 0.6, "distance": None})
    run_on.clear()
    evaluate(world)
    assert run_on == [golden], "only the check of the bundle"
    taken = read_outs(world.settings.reports_dir)
    assert taken["predictions.csv"] != before["predictions.csv"]
    shutil.rmtree(world.settings.work_dir("evaluate"))
    evaluate(world)
    assert read_outs(world.settings.reports_dir) == taken, "as without what was kept"
    assert sum(run_on) > 2 * golden + 80


def test_reads_a_batch_at_a_time_and_reports_progress(world, monkeypatch):
    world.write_candidate(GOOD)
    monkeypatch.setattr("visionloop.evaluation.evaluate.BATCH_BYTES", 32 * 32 * 3 * 30)
    seen = []
    evaluate(world, on_progress=lambda done, total: seen.append((done, total)))
    assert seen == [(30, 80), (60, 80), (80, 80)]


def test_a_threshold_decides_for_two_classes(tmp_path):
    world = make_world(tmp_path, prepared=True, classes=("no", "yes"))
    world.write_candidate(GOOD, threshold=0.0)
    found = evaluate(world)
    prepared = load_prepared(world.settings.prepared_dir)
    share = float(np.mean(prepared.label_n[prepared.rows("test")] == 1))
    assert found["recall"].value == 1.0
    assert found["accuracy"].value == pytest.approx(share)


def test_no_test_image_is_an_error(tmp_path):
    world = make_world(tmp_path, prepared=True, test_sides=0)
    world.write_candidate(GOOD)
    with pytest.raises(DatasetError, match="has no test image"):
        evaluate(world)


@pytest.mark.parametrize(
    ("card", "message"),
    [
        (
            {"dataset": {"version": 7, "digest": "f" * 64}},
            "was trained on dataset version 7 .*Run `visionloop train`",
        ),
        ({"classes": ("a", "b", "d")}, "knows the classes a, b, d; expected a, b, c"),
        ({"resize": "letterbox"}, "takes 32 x 32 pixels by letterbox; expected 32 x 32 by squash"),
    ],
)
def test_a_candidate_of_other_data_is_refused_and_reports_stay(world, card, message):
    world.settings.reports_dir.mkdir(exist_ok=True)
    (world.settings.reports_dir / "metrics.json").write_text("of an older run")
    before = read_outs(world.settings.reports_dir)
    world.write_candidate(GOOD, **card)
    with pytest.raises(DatasetError, match=message):
        evaluate(world)
    assert read_outs(world.settings.reports_dir) == before


def test_a_flipped_byte_is_refused(world):
    world.write_candidate(GOOD)
    path = world.settings.candidate_dir / "model.onnx"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(BundleError, match=r"model\.onnx differs from its digest"):
        evaluate(world)


def test_a_damaged_note_is_named(world):
    digest = world.write_candidate(GOOD, note="run-1")
    (world.settings.runs_dir / f"{digest}.json").write_text("[")
    with pytest.raises(BundleError, match=f"run note {digest}.json: is damaged"):
        load_run_note(world.settings.runs_dir, digest)
    assert load_run_note(world.settings.runs_dir, "0" * 64) is None


@pytest.mark.parametrize(
    ("val", "test", "told"), [(0.95, 0.80, "15 points"), (0.7, 0.85, "15 points"), (0.9, 0.81, ""), (None, 0.1, "")]
)
def test_a_gap_between_val_and_test_is_told(val: float | None, test: float, told: str) -> None:
    line = describe_gap(val, test)
    assert bool(line) == bool(told)
    assert told in line


def test_a_threshold_that_spoils_a_good_network_is_named():
    truth_n, score_n = np.arange(30) % 2, np.where(np.arange(30) % 2, 0.9, 0.2)
    probs_nk = np.column_stack([1 - score_n, score_n])
    card = replace(make_card(("horses", "humans")), threshold=0.99999)
    figures = {"accuracy": Interval(0.5, None, None), "auc": Interval(1.0, None, None)}
    answers = Answers(truth_n, probs_nk, np.zeros(30, int), card.classes, np.arange(30))
    line = describe_threshold(card, answers, figures)
    assert line.startswith("LOOK: accuracy is 0.500 at the card's threshold of humans, 0.99999, and would be 1.000 at ")
    assert "the threshold is the cause" in line
    assert describe_threshold(card, answers, {**figures, "accuracy": Interval(0.95, None, None)}) == ""
    assert describe_threshold(card, answers, {**figures, "auc": Interval(0.7, None, None)}) == ""
    assert describe_threshold(replace(card, threshold=None), answers, figures) == ""


@pytest.mark.parametrize("threshold", [0.5, 0.99999])
def test_the_epochs_accuracy_is_held_against_the_test_side_at_the_same_threshold(tmp_path, monkeypatch, threshold):
    """The epochs' accuracy is that at 0.5. And what a threshold spoils is not told as a network without learning."""
    world = make_world(tmp_path, prepared=True, classes=("a", "b"), turned=0)
    world.write_candidate(GOOD, threshold=threshold)
    best = {"best/val_accuracy": 0.1 if threshold == 0.5 else 1.0}
    monkeypatch.setattr("visionloop.evaluation.evaluate._log_to_run", lambda *facts: best)
    said: list[str] = []
    evaluate(world, tell=said.append)
    told = [any(words in line for line in said) for words in ("sides differ", "threshold is the cause", "was learned")]
    assert told == [threshold == 0.5, threshold != 0.5, False], said


def test_the_number_of_test_images_is_told(tmp_path):
    world = make_world(tmp_path, prepared=True)
    world.write_candidate(GOOD)
    said: list[str] = []
    evaluate(world, tell=said.append)
    assert re.fullmatch(r"on \d+ test images", said[0])
