"""How `visionloop predict` shows an answer."""

from visionloop.cli.predict import describe_answer
from visionloop.predict.files import FilePrediction
from visionloop.records import Prediction

PROBABILITIES = {"disc": 0.61, "ring": 0.9, "bar": 0.2, "star": 0.55}


def test_one_label_is_marked() -> None:
    answer = FilePrediction("a.png", Prediction("ring", {"disc": 0.25, "ring": 0.75}, 0.75))
    assert describe_answer(answer, 6, 2) == [
        "a.png   * ring  ███████████████·····  75.0%",
        "          disc  █████···············  25.0%",
    ]
    assert len(describe_answer(answer, 6, 1)) == 1


def test_names_in_chinese_stand_in_columns() -> None:
    lines = describe_answer(FilePrediction("马.png", Prediction("马", {"马": 0.75, "mule": 0.25}, 0.75)), 8, 2)
    assert lines == [
        "马.png    * 马    ███████████████·····  75.0%",
        "            mule  █████···············  25.0%",
    ]


def test_all_labels_are_shown_and_marked() -> None:
    labels = ("disc", "ring", "star")
    answer = FilePrediction("a.png", Prediction("disc|ring|star", PROBABILITIES, 0.24, labels))
    lines = describe_answer(answer, 5, 1)
    assert [line[7:13] for line in lines] == ["* ring", "* disc", "* star"]
    assert [line[:5] for line in lines] == ["a.png", "     ", "     "]
    assert describe_answer(answer, 5, 9)[3] == "         bar   ████················  20.0%"


def test_no_label_is_said() -> None:
    lines = describe_answer(FilePrediction("a.png", Prediction("", {"disc": 0.3, "ring": 0.1}, 0.63, ())), 5, 1)
    assert lines == ["a.png  -- no label", "         disc  ██████··············  30.0%"]


def test_an_image_that_cannot_be_used_has_its_reason() -> None:
    assert describe_answer(FilePrediction("a.png", None, "is empty"), 7, 3) == ["a.png    -- is empty"]
