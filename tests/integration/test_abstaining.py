"""A trained model that may say it does not know: from params.yaml to card, answers, server and report."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from fastapi.testclient import TestClient
from PIL import Image

from fakes import make_image
from shapes import write_shapes
from trainings import Ear, Place, make_place
from visionloop.bundle import load_bundle
from visionloop.cli.predict import describe_answer
from visionloop.errors import ParamsError
from visionloop.evaluation.evaluate import evaluate
from visionloop.features.embed import embed
from visionloop.params.train import check_threshold
from visionloop.predict.files import FilePrediction
from visionloop.predictor import Predictor
from visionloop.serving.app import make_app
from visionloop.serving.swap import ModelSlot, ServedModel
from visionloop.training.package import describe_untuned

COUNTS = {"disc": (30, 60, 30), "ring": (30, 60, 30)}
RULES = {"threshold": "max_f1", "abstain": {"error": 0.1}}


def draw_stripes(folder: Path, number: int, seed: int) -> list[Path]:
    """Photos of another kind: waves of two colours over the whole image, of any direction and width."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    rows, columns = np.indices((40, 40))
    for i in range(number):
        angle, width = rng.random() * np.pi, rng.uniform(3, 9)
        wave = 0.5 + 0.5 * np.sin((rows * np.cos(angle) + columns * np.sin(angle)) * 2 * np.pi / width)
        inks = rng.integers(0, 256, (2, 3))
        pixels = wave[..., None] * inks[0] + (1 - wave[..., None]) * inks[1]
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i:03d}.png")
    return sorted(folder.glob("*.png"))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """A workspace in which a network with ImageNet's weights has learned discs and rings."""
    home = tmp_path_factory.mktemp("abstaining")
    keys = {"backbone": "efficientnet_lite0", "weights": "default", "way": "frozen", **RULES}
    place = make_place(home / "ws", counts=COUNTS, size=64, **keys)
    embed(place)
    place.train(Ear())
    return place


@pytest.fixture(scope="module")
def predictor(place: Place) -> Predictor:
    return Predictor.load(place.settings.candidate_dir, threads=1)


def test_photos_of_another_data_set_are_not_answered(predictor: Predictor, tmp_path: Path) -> None:
    write_shapes(tmp_path / "same", 100, seed=77)
    same = predictor.predict(sorted((tmp_path / "same").rglob("*.png")))
    other = predictor.predict(draw_stripes(tmp_path / "other", 200, seed=5))
    assert np.mean([one.abstained is not None for one in other]) >= 0.95
    assert np.mean([one.abstained is None for one in same]) >= 0.90
    assert all("unlike the validation images: distance" in one.abstained for one in other if one.abstained)


def test_card_has_the_rule_the_promise_and_what_tuning_brought(predictor: Predictor) -> None:
    card = predictor.card
    assert card.abstain is not None and card.tuning is not None
    assert set(card.abstain) == {"confidence", "distance", "neighbours", "coverage", "error", "delta"}
    assert card.tuning["abstain"]["promised"] <= 0.1
    assert (card.tuning["on"], card.tuning["num_images"], card.tuning["num_keys"]) == ("val", 120, 120)
    assert card.tuning["after"]["log_loss"] <= card.tuning["before"]["log_loss"]
    assert card.tuning["threshold"]["wanted"] == "max_f1"
    assert card.params["train"]["abstain"] == {"error": 0.1, "delta": 0.05, "coverage": 0.95}


def test_all_who_answer_say_it_alike(predictor: Predictor, tmp_path: Path) -> None:
    path = draw_stripes(tmp_path, 1, seed=6)[0]
    answer = predictor.predict([path])[0]
    assert answer.abstained
    with TestClient(make_app(ModelSlot(ServedModel(predictor)))) as client:
        served = client.post("/predict", content=path.read_bytes()).json()
        assert served["abstained"] == answer.abstained
        assert served["prediction"] == answer.prediction
        assert client.get("/model").json()["abstain"] == predictor.card.abstain
        assert "visionloop_abstained_images_total 1.0" in client.get("/metrics").text
    lines = describe_answer(FilePrediction("a.png", answer), 5, 2)
    assert lines[0] == f"a.png  ? don't know ({answer.abstained})"
    assert len(lines) == 3


def test_batches_of_any_size_abstain_alike(predictor: Predictor) -> None:
    images = [predictor.decode(make_image(seed), "x") for seed in range(9)]
    whole = predictor.run_batches(np.stack(images), batch_size=9)
    parts = predictor.run_batches(np.stack(images), batch_size=2)
    assert whole.abstained_n.tolist() == parts.abstained_n.tolist()
    assert whole.distance_n is not None and parts.distance_n == pytest.approx(whole.distance_n, abs=1e-4)
    assert predictor.run_batches(np.zeros((0, 64, 64, 3), np.uint8)).abstained_n.shape == (0,)


def test_evaluate_tells_and_draws_what_became_of_the_promise(place: Place) -> None:
    lines: list[str] = []
    metrics = evaluate(place, tell=lines.append)
    assert 0.8 <= metrics["answered"].value <= 1.0
    assert metrics["answered_accuracy"].value >= 0.9
    said = f"answers {metrics['answered'].value:.1%} of the test images; "
    assert any(said in line and "(wanted: 10.00%)" in line for line in lines)
    reports = place.settings.reports_dir
    assert {"risk.png", "threshold.png"} <= {path.name for path in (reports / "figures").iterdir()}
    page = (reports / "report.html").read_text()
    assert "Does not know" in page and "Temperature" in page


def test_bundle_is_the_same_each_time(place: Place, tmp_path: Path) -> None:
    before = load_bundle(place.settings.candidate_dir)
    shutil.rmtree(place.settings.work_dir("train"))
    place.train(Ear())
    after = load_bundle(place.settings.candidate_dir)
    assert (after.digest, after.files) == (before.digest, before.files)


def test_nothing_is_tuned_where_validation_was_learned_from(place: Place, tmp_path: Path) -> None:
    ear = Ear()
    whole = place.with_train(on="all", monitor="train/loss")
    whole = replace(whole, settings=replace(place.settings, home=place.settings.home))
    whole.train(ear, code="another")
    card = Predictor.load(place.settings.candidate_dir).card
    assert (card.temperature, card.threshold, card.abstain) == (1.0, 0.5, None)
    assert card.tuning == {
        "on": None,
        "why": "with `train.on: all` the model has learned from the validation images too",
    }
    assert ear.said("confidence: nothing is tuned: with `train.on: all` the model has learned")
    assert ear.said("LOOK: train.threshold and train.abstain cannot be followed")
    assert describe_untuned("train", "test").startswith("a random split has no validation side, and the test side")


def test_a_threshold_without_a_meaning_is_refused(place: Place) -> None:
    section = place.params.train
    check_threshold(section, "binary")
    check_threshold(section, "multilabel")
    with pytest.raises(ParamsError, match=r"train\.threshold: got 'max_f1' with a multiclass task; expected no thresh"):
        check_threshold(section, "multiclass")


def test_an_old_card_opens_and_never_abstains(place: Place, tmp_path: Path) -> None:
    from visionloop.bundle import seal_bundle

    shutil.copytree(place.settings.candidate_dir, tmp_path / "old")
    card = json.loads((tmp_path / "old" / "card.json").read_text())
    old = {key: value for key, value in card.items() if key not in {"biases", "abstain", "tuning"}} | {"schema": 1}
    (tmp_path / "old" / "card.json").write_text(json.dumps(old))
    seal_bundle(tmp_path / "old")
    predictor = Predictor.load(tmp_path / "old", threads=1)
    assert (predictor.card.schema, predictor.card.biases, predictor.card.abstain) == (1, None, None)
    outputs = predictor.run(np.zeros((2, 64, 64, 3), np.uint8))
    assert (outputs.abstained_n.any(), outputs.distance_n) == (False, None)
