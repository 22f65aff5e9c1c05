"""What a model says: probabilities, answers and confidence, for each task."""

import io
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from PIL import Image

import visionloop.confidence
import visionloop.predictor
from fakes import make_bundle, make_card, make_image
from visionloop.bundle import load_bundle, seal_bundle
from visionloop.confidence import get_tolerance, sigmoid, softmax
from visionloop.errors import BundleError, ImageError
from visionloop.predictor import (
    INT8,
    Outputs,
    Predictor,
    check_card,
    choose_classes,
    compute_confidence,
    name_choices,
)
from visionloop.records import Card, Prediction, canonical_json

PROBS_NK = np.array([[0.9, 0.6, 0.2], [0.4, 0.1, 0.3]], np.float32)
SEVERAL = make_card(task="multilabel")


def test_sigmoid_is_exact_far_out_and_warns_of_nothing() -> None:
    with np.errstate(all="raise", under="ignore"):
        found = sigmoid(np.array([[-1000.0, -2.0, 0.0, 2.0, 1000.0]], np.float32))
    assert found.dtype == np.float32
    assert found[0].tolist() == pytest.approx([0.0, 0.1192029, 0.5, 0.8807970, 1.0])


def test_of_several_labels_each_has_its_threshold() -> None:
    chosen_nk = choose_classes(PROBS_NK, SEVERAL)
    assert chosen_nk.tolist() == [[True, True, False], [False, False, False]]
    tuned = replace(SEVERAL, thresholds={"c": 0.2, "b": 0.7, "a": 0.4})  # by name, whatever the order
    assert choose_classes(PROBS_NK, tuned).tolist() == [[True, False, True], [True, False, True]]
    without = replace(SEVERAL, thresholds=None)
    assert choose_classes(PROBS_NK, without).tolist() == chosen_nk.tolist()


def test_of_one_label_the_likeliest_or_the_one_above_the_threshold() -> None:
    assert choose_classes(PROBS_NK, make_card()).tolist() == [0, 0]
    binary = replace(make_card(("no", "yes")), threshold=0.3)
    assert choose_classes(np.array([[0.69, 0.31], [0.71, 0.29]]), binary).tolist() == [1, 0]


def test_confidence_is_the_probability_of_the_answer() -> None:
    assert compute_confidence(PROBS_NK, np.array([1, 2])).tolist() == pytest.approx([0.6, 0.3])
    chosen_nk = np.array([[True, True, False], [False, False, False]])
    expected = [0.9 * 0.6 * 0.8, 0.6 * 0.9 * 0.7]
    assert compute_confidence(PROBS_NK, chosen_nk).tolist() == pytest.approx(expected)


def test_names_of_choices() -> None:
    assert name_choices(np.array([2, 0]), "abc") == [("c",), ("a",)]
    assert name_choices(np.array([[True, False, True], [False] * 3]), "abc") == [("a", "c"), ()]


def test_answers_of_a_multilabel_bundle(tmp_path: Path) -> None:
    make_bundle(tmp_path / "single", seed=3)
    make_bundle(tmp_path / "several", seed=3, task="multilabel")
    single, several = (Predictor.load(tmp_path / name, threads=1) for name in ("single", "several"))
    images = [make_image(seed) for seed in range(40)]
    logits_nk = single.run(np.stack([single.decode(data, "x") for data in images])).logits_nk
    answers = several.predict(images)
    for answer, logits_k in zip(answers, logits_nk, strict=True):
        probs_k = 1 / (1 + np.exp(-logits_k.astype(float)))
        assert list(answer.probabilities.values()) == pytest.approx(probs_k, abs=1e-6)
        assert answer.labels == tuple(np.array(list("abc"))[probs_k >= 0.5])
        assert answer.prediction == "|".join(answer.labels)
        assert answer.confidence == pytest.approx(np.maximum(probs_k, 1 - probs_k).prod(), abs=1e-6)
    assert {len(answer.labels or ()) for answer in answers} == {0, 1, 2, 3}
    assert list(answers[0].to_json()) == ["prediction", "probabilities", "confidence", "labels", "abstained"]
    assert list(single.predict(images[:1])[0].to_json()) == ["prediction", "probabilities", "confidence", "abstained"]


def test_temperature_softens_each_label(tmp_path: Path) -> None:
    make_bundle(tmp_path / "b", task="multilabel")
    card = load_bundle(tmp_path / "b").card
    (tmp_path / "b" / "card.json").write_bytes(canonical_json(replace(card, temperature=4.0).to_json()))
    seal_bundle(tmp_path / "b")
    outputs = Predictor.load(tmp_path / "b", threads=1).run(np.zeros((1, 32, 32, 3), np.uint8))
    np.testing.assert_allclose(outputs.probs_nk, sigmoid(outputs.logits_nk / 4), rtol=1e-6)
    assert not np.allclose(outputs.probs_nk, softmax(outputs.logits_nk / 4))


def test_a_card_of_before_there_were_thresholds_is_read() -> None:
    value = make_card(("no", "yes")).to_json()
    del value["thresholds"]
    card = Card.from_json(value)
    assert (card.task, card.threshold, card.thresholds) == ("binary", 0.5, None)
    check_card(card, "card")


@pytest.mark.parametrize(
    ("card", "message"),
    [
        (
            replace(SEVERAL, task="detection"),
            "has the task 'detection'; expected one of binary, multiclass, multilabel",
        ),
        (
            replace(SEVERAL, thresholds={"a": 0.5, "x": 0.5}),
            "has thresholds for a, x; expected one for each of a, b, c",
        ),
        (replace(SEVERAL, thresholds={}), "has thresholds for nothing; expected one for each of a, b, c"),
    ],
)
def test_a_card_that_cannot_be_answered_by_is_refused(card: Card, message: str) -> None:
    with pytest.raises(BundleError, match=message):
        check_card(card, "bundle 0123")


def test_no_image_has_no_answer(tmp_path: Path) -> None:
    make_bundle(tmp_path / "b", task="multilabel")
    predictor = Predictor.load(tmp_path / "b", threads=1)
    empty = np.zeros((0, 3), np.float32)
    assert predictor.answer(Outputs(empty, empty, np.zeros((0, 0), np.float32), np.zeros(0, bool))) == []


def spoil_golden(folder: Path, change: Callable[[np.ndarray], np.ndarray], scale: float = 1.0) -> Predictor:
    """Make a bundle whose network says `scale` times as much, and whose golden logits are then changed."""
    make_bundle(folder)
    path, model = folder / "golden" / "answers.json", onnx.load(folder / "model.onnx")
    (weights,) = [tensor for tensor in model.graph.initializer if tensor.name == "weights"]
    weights.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(weights) * np.float32(scale), "weights"))
    onnx.save(model, folder / "model.onnx")
    answers = json.loads(path.read_text())
    answers["logits"] = change(np.array(answers["logits"]) * scale).tolist()
    path.write_text(json.dumps(answers))
    seal_bundle(folder)
    return Predictor(load_bundle(folder), threads=1)


def test_golden_answers_are_compared_relative_to_the_largest_logit(tmp_path: Path) -> None:
    def move(logits_nk: np.ndarray) -> np.ndarray:
        return logits_nk + 0.5

    assert spoil_golden(tmp_path / "a", move, scale=100).check_golden() == pytest.approx(0.5 / 192, abs=1e-3)
    with pytest.raises(
        BundleError, match=r"golden answers differ by 0\.\d+; expected at most 0\.02 of the largest logit"
    ):
        spoil_golden(tmp_path / "b", move).check_golden()


def test_a_golden_answer_that_is_another_one_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    predictor = spoil_golden(tmp_path / "a", lambda logits_nk: np.concatenate([logits_nk[:1, ::-1], logits_nk[1:]]))
    monkeypatch.setattr(visionloop.confidence, "GOLDEN_TOLERANCE", 1.0)
    assert predictor.bundle.golden_logits()[0].argmax() == 0
    with pytest.raises(
        BundleError, match=r"golden answers differ by 0\.5\d+, and 1 of 4 are other ones; .*the same answers"
    ):
        predictor.check_golden()
    monkeypatch.setattr(visionloop.predictor, "CLOSE_PROBABILITY", 1.0)
    assert predictor.check_golden() > 0.5, "where two are as good as equal, either will do"


def seal_with_limit(folder: Path, max_pixels: int) -> Predictor:
    """Make a bundle whose golden images have 32 x 32 pixels, and another limit on its card."""
    make_bundle(folder)
    card = replace(load_bundle(folder).card, max_pixels=max_pixels)
    (folder / "card.json").write_bytes(canonical_json(card.to_json()))
    seal_bundle(folder)
    return Predictor.load(folder, threads=1)


def test_the_limit_on_pixels_is_that_of_the_ingest_and_not_for_golden_images(tmp_path: Path) -> None:
    predictor = seal_with_limit(tmp_path / "b", 1000)
    small, large = make_image(1, size_hw=(25, 40)), make_image(1, size_hw=(25, 41))
    answer, refused = predictor.predict_each([small, large])
    assert isinstance(answer, Prediction)
    assert isinstance(refused, ImageError)
    assert (refused.reason_code, "has 41 x 25 pixels; expected at most 1000" in str(refused)) == ("too_large", True)
    assert predictor.decode(large, "x", max_pixels=1025).shape == (32, 32, 3), "an operator may set another one"


def test_what_a_raised_limit_let_in_is_golden_and_answered(tmp_path: Path) -> None:
    sink = io.BytesIO()
    Image.new("L", (8000, 8000), 99).save(sink, "JPEG")
    predictor = seal_with_limit(tmp_path / "b", 100_000_000)
    assert [one.prediction in "abc" for one in predictor.predict([sink.getvalue()])] == [True]
    usual = seal_with_limit(tmp_path / "c", 50_000_000)
    (refused,) = usual.predict_each([sink.getvalue()])
    assert isinstance(refused, ImageError)
    assert np.all(usual.decode_golden([sink.getvalue()]) == 99), "a golden image was let in"


def test_a_card_of_before_there_was_a_limit_has_the_usual_one() -> None:
    old = {key: value for key, value in make_card().to_json().items() if key != "max_pixels"}
    assert Card.from_json(old).max_pixels == 50_000_000


@pytest.mark.parametrize(
    ("said", "passes"),
    [(0.0, False), (0.06, True), (0.04, False), (1e9, True), (float("nan"), False), ("0.06", False), (None, False)],
)
def test_a_graph_in_int8_may_be_as_far_off_as_the_card_says(tmp_path: Path, said: object, passes: bool) -> None:
    """The network is the same here, so the golden logits are moved: by a twentieth of the largest one."""
    folder = tmp_path / "b"
    make_bundle(folder, engines=[INT8])
    path = folder / "golden" / "answers.json"
    answers = json.loads(path.read_text())
    logits_nk = np.array(answers["logits"])
    moved = (logits_nk - 0.05 * max(1.0, np.abs(logits_nk).max())).tolist()
    path.write_text(json.dumps({**answers, "logits": moved}))
    seal_bundle(folder)
    card = replace(make_card(), runtimes=(INT8,), engines={INT8: {"tolerance": said}})
    bundle = replace(load_bundle(folder), card=card)
    if passes:
        assert Predictor(bundle, threads=1, engine=INT8).check_golden() == pytest.approx(0.05, abs=5e-3)
    else:
        with pytest.raises(BundleError, match=r"golden answers differ by 0\.0"):
            Predictor(bundle, threads=1, engine=INT8).check_golden()
    with pytest.raises(BundleError, match=r"expected at most 0\.02 of the largest logit"):
        Predictor(bundle, threads=1).check_golden()


def test_no_card_lets_int8_be_anything(tmp_path: Path) -> None:
    for engines, tolerance in (({INT8: {"tolerance": 1e9}}, 0.5), ([1], 0.02), ({INT8: 1}, 0.02), (None, 0.02)):
        assert get_tolerance(replace(make_card(), engines=engines), INT8) == tolerance


def test_a_graph_that_is_not_there_is_said(tmp_path: Path) -> None:
    make_bundle(tmp_path / "b")
    with pytest.raises(BundleError, match=r"has no model\.int8\.onnx; expected the graph that is asked for"):
        Predictor(load_bundle(tmp_path / "b"), engine=INT8)
