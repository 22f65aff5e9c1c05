"""Where a model looks: a model that sees one corner only is found out."""

import io
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fakes import make_card
from visionloop.confidence import sigmoid, softmax
from visionloop.errors import ParamsError
from visionloop.explain import describe_falls, draw_explanation, explain, list_squares, spread_falls
from visionloop.predictor import Outputs
from visionloop.records import Card


class CornerModel:
    """Says `b` by how uneven the upper left corner is: a blurred corner tells it nothing. `c` is always so likely."""

    def __init__(self, card: Card) -> None:
        self.card = card

    def run(self, images_nhwc: np.ndarray) -> Outputs:
        spread_n = images_nhwc[:, :16, :16].std(axis=(1, 2, 3))
        logits = np.stack([np.zeros_like(spread_n), spread_n / 10, np.ones_like(spread_n)], axis=1).astype(np.float32)
        squash = sigmoid if self.card.task == "multilabel" else softmax
        return Outputs(logits, squash(logits), np.zeros((len(logits), 2), np.float32), np.zeros(len(logits), bool))


NOISE = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)


@pytest.mark.parametrize("task", ["multiclass", "multilabel"])
def test_the_part_that_decides_is_found(task: str) -> None:
    model: Any = CornerModel(make_card(size_hw=(64, 64), task=task))
    found = explain(model, NOISE)
    assert found.name == "b"
    assert found.probability == pytest.approx(float(model.run(NOISE[None]).probs_nk[0, 1]))
    corner, rest = found.falls_hw[:16, :16], found.falls_hw[32:, 32:]
    assert corner.mean() > 1
    assert np.abs(rest).max() == pytest.approx(0, abs=1e-6)
    assert describe_falls(found).startswith(f"logit {found.logit:+.2f}; a hidden part changes it by -")


def test_another_class_can_be_asked_about() -> None:
    model: Any = CornerModel(make_card(size_hw=(64, 64)))
    against = explain(model, NOISE, "c")
    assert against.name == "c"
    assert against.falls_hw[:16, :16].mean() < -0.5  # hiding the corner speaks for c
    with pytest.raises(ParamsError, match=r"--class: got 'z'; expected one of a, b, c"):
        explain(model, NOISE, "z")


def test_falls_are_spread_over_the_pixels_of_each_square() -> None:
    boxes = [(0, 1, 0, 2), (0, 1, 1, 3), (0, 1, 2, 4)]
    assert spread_falls((1, 4), boxes, np.array([0.0, 2.0, 1.0])).tolist() == [[0.0, 1.0, 1.5, 1.0]]


@pytest.mark.parametrize("size_hw", [(32, 32), (64, 48), (33, 100), (1, 1)])
def test_squares_cover_every_pixel(size_hw: tuple[int, int]) -> None:
    covered = np.zeros(size_hw, int)
    for top, bottom, left, right in list_squares(*size_hw):
        assert bottom > top and right > left
        covered[top:bottom, left:right] += 1
    assert covered.min() >= 4


def test_the_picture_is_red_where_the_answer_stands() -> None:
    model: Any = CornerModel(replace(make_card(size_hw=(64, 64))))
    grey = np.full((64, 64, 3), 128, np.uint8)
    grey[:16, :16] = NOISE[:16, :16]
    picture = np.asarray(
        Image.open(io.BytesIO(draw_explanation(grey, explain(model, grey), model.card.classes, "a photo"))).convert(
            "RGB"
        )
    )
    left, right = picture[:, : picture.shape[1] // 2].astype(int), picture[:, picture.shape[1] // 2 :].astype(int)
    redness = [int(((half[..., 0] - half[..., 2]) > 60).sum()) for half in (left, right)]
    assert redness[1] > redness[0] + 1000
