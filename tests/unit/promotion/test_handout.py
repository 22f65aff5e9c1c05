"""A model for people without visionloop: it answers as the predictor does, and needs nothing of us."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from fakes import make_bundle, make_image
from visionloop.bundle import seal_bundle
from visionloop.errors import DiskError
from visionloop.predictor import FP32, Predictor
from visionloop.promotion.handout import describe_engines, write_handout
from visionloop.records import canonical_json

ENGINES = (FP32, "onnxruntime int8", "openvino fp32")


def make_predictor(folder: Path, **changes: object) -> Predictor:
    task = "multilabel" if changes.get("task") == "multilabel" else None
    make_bundle(folder, task=task, seed=1)
    card = replace(Predictor.load(folder).card, **changes)  # type: ignore[arg-type]
    (folder / "card.json").write_bytes(canonical_json(card.to_json()))
    seal_bundle(folder)
    return Predictor.load(folder)


def run(folder: Path, *arguments: str) -> tuple[int, list[str]]:
    code = "import runpy, sys; sys.modules['visionloop'] = None; sys.argv = sys.argv[1:]; "
    code += "runpy.run_path(sys.argv[0], run_name='__main__')"
    command = [sys.executable, "-I", "-c", code, str(folder / "predict.py"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.stderr == ""
    return done.returncode, done.stdout.splitlines()


@pytest.mark.parametrize(
    "changes",
    [
        {"temperature": 2.5, "biases": {"a": 0.5, "b": 0.0, "c": -1.0}},
        {"resize": "letterbox"},
        {"resize": "fit_crop"},
        {"task": "multilabel", "thresholds": {"a": 0.9, "b": 0.1, "c": 0.5}},
    ],
    ids=["squash", "letterbox", "fit_crop", "multilabel"],
)
def test_it_answers_as_the_predictor_does(tmp_path: Path, changes: dict[str, object]) -> None:
    predictor = make_predictor(tmp_path / "bundle", **changes)
    names = write_handout(predictor, tmp_path / "out", (FP32,))
    assert names == ["README.md", "card.json", "examples/", "labels.txt", "model.onnx", "predict.py"]
    photo = tmp_path / "photo.png"
    photo.write_bytes(make_image(4, size_hw=(48, 40)))
    (tmp_path / "broken.jpg").write_bytes(b"x")
    code, lines = run(tmp_path / "out", str(photo), str(tmp_path / "broken.jpg"))
    answers, wanted = [json.loads(line) for line in lines], predictor.predict([photo])[0]
    assert code == 0
    assert answers[0]["labels"] == list(wanted.labels if wanted.labels is not None else (wanted.prediction,))
    assert answers[0]["probabilities"] == pytest.approx(wanted.probabilities, abs=2e-2)
    assert "error" in answers[1]
    assert run(tmp_path / "out", str(tmp_path / "broken.jpg"), str(tmp_path))[0] == 2


@pytest.mark.parametrize("approved", [(FP32, "onnxruntime int8"), (FP32, "openvino fp32"), ()])
def test_the_graph_in_int8_is_handed_out_only_if_it_was_approved(tmp_path: Path, approved: tuple[str, ...]) -> None:
    make_bundle(tmp_path / "bundle", engines=ENGINES)
    tried = {"onnxruntime int8": {"approved": True}, "openvino int8": {"approved": False, "changed": 9, "images": 300}}
    card = replace(Predictor.load(tmp_path / "bundle").card, engines=tried)
    (tmp_path / "bundle" / "card.json").write_bytes(canonical_json(card.to_json()))
    seal_bundle(tmp_path / "bundle")
    predictor = Predictor.load(tmp_path / "bundle")
    names = write_handout(predictor, tmp_path / "out", approved)
    has_int8 = "onnxruntime int8" in approved
    assert ("model.int8.onnx" in names) is has_int8
    assert ("model.int8.onnx" in (tmp_path / "out" / "README.md").read_text()) is has_int8
    said = describe_engines(predictor, approved)
    assert said[0] == f"approved for {', '.join(approved or (FP32,))}"
    assert "not approved for openvino int8: 9 of 300 answers differ" in said
    assert (
        "not approved for onnxruntime int8: its card approves of it, but evaluate did not, by the test side" in said
    ) is not has_int8
    assert (said[-1] == "model.int8.onnx is left out") is not has_int8


def test_only_files_that_are_all_broken_are_a_failure_as_with_visionloop_predict(tmp_path: Path) -> None:
    write_handout(make_predictor(tmp_path / "bundle"), tmp_path / "out", (FP32,))
    (tmp_path / "photo.png").write_bytes(make_image(4, size_hw=(40, 40)))
    (tmp_path / "broken.jpg").write_bytes(b"x")
    broken, photo = str(tmp_path / "broken.jpg"), str(tmp_path / "photo.png")
    assert [run(tmp_path / "out", *some)[0] for some in ([broken, photo], [broken], [broken, broken])] == [0, 2, 2]
    assert "Exit code 2: none could be read" in "".join(run(tmp_path / "out")[1])


def test_an_image_beyond_the_limit_of_the_model_is_refused(tmp_path: Path) -> None:
    write_handout(make_predictor(tmp_path / "bundle", max_pixels=1000), tmp_path / "out", (FP32,))
    (tmp_path / "photo.png").write_bytes(make_image(4, size_hw=(40, 40)))
    code, lines = run(tmp_path / "out", str(tmp_path / "photo.png"))
    assert (code, json.loads(lines[0])["error"]) == (2, "has 40 x 40 pixels; at most 1,000 are read")


@pytest.mark.parametrize(("least", "is_sure"), [(0.0, True), (1.0, False)])
def test_it_says_whether_it_is_sure(tmp_path: Path, least: float, is_sure: bool) -> None:
    write_handout(make_predictor(tmp_path / "bundle", abstain={"confidence": least}), tmp_path / "out", (FP32,))
    (tmp_path / "photo.png").write_bytes(make_image(4))
    answer = json.loads(run(tmp_path / "out", str(tmp_path / "photo.png"))[1][0])
    assert answer["is_sure"] is is_sure


def test_the_examples_show_whether_it_works_there(tmp_path: Path) -> None:
    write_handout(make_predictor(tmp_path / "bundle"), tmp_path / "out", (FP32,))
    code, lines = run(tmp_path / "out", "--check")
    assert (code, lines[0][:42]) == (0, "4 examples: the largest difference of a pr")
    answers = tmp_path / "out" / "examples" / "answers.json"
    changed = {name: {c: 1 - p for c, p in one.items()} for name, one in json.loads(answers.read_text()).items()}
    answers.write_text(json.dumps(changed))
    assert run(tmp_path / "out", "--check")[0] == 1


def test_a_folder_with_something_in_it_is_left_alone(tmp_path: Path) -> None:
    predictor = make_predictor(tmp_path / "bundle")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(DiskError, match="out: is not empty; expected a new or empty folder"):
        write_handout(predictor, tmp_path / "out", (FP32,))
    with pytest.raises(DiskError, match="is a file"):
        write_handout(predictor, tmp_path / "out" / "mine.txt", (FP32,))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bundle", "out"]
    (tmp_path / "empty").mkdir()
    write_handout(predictor, tmp_path / "empty", (FP32,))
    assert (tmp_path / "empty" / "labels.txt").read_text() == "a\nb\nc\n"
