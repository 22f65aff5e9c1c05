"""Where a model looks: how much each part of an image holds up its answer. The network is only asked, never opened.

Occlusion (Zeiler & Fergus 2014, section 4.2): a square hides one place after the other. Where the logit of the answer
falls most, the model saw what it answers by. The square shows the image blurred (Fong & Vedaldi 2017, section 4.1): a
grey one would add edges that are no part of any photo. A worked example, one row of an image, square of 2, step of 1:

    logit without the square   3.0
    with it at places 0 1 2    3.0  1.0  2.0      the fall is  0.0  2.0  1.0
    pixel 0 is under square 0: 0.0; pixel 1 under 0 and 1: (0 + 2) / 2 = 1.0; pixel 2: (2 + 1) / 2; pixel 3: 1.0

Dimensions: h height, w width, s squares.
"""

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from visionloop.data.contact_sheet import Cell, draw_contact_sheet
from visionloop.data.fonts import number_names
from visionloop.data.images import UInt8Array
from visionloop.errors import ParamsError, shorten
from visionloop.predictor import Predictor, choose_batch_size

ACROSS = 14  # steps of the square along the longer side
COVERED = 3  # steps that the square is wide
BLUR = 10  # the blur's radius is this part of the longer side
Box = tuple[int, int, int, int]  # top, bottom, left, right
WARM, COLD = np.array([214.0, 39.0, 40.0]), np.array([31.0, 119.0, 180.0])


@dataclass(frozen=True)
class Explanation:
    """What holds up a class: `falls_hw` is by how much its logit falls where a place is hidden (below 0: it rises)."""

    name: str
    probability: float
    logit: float
    falls_hw: NDArray[np.float64]


def explain(predictor: Predictor, image_hwc: UInt8Array, name: str | None = None) -> Explanation:
    """Cover each part of a decoded image in turn. `name` is the class that is asked about; None: the answer.

    Raises:
        ParamsError: the model knows no such class.
    """
    size = choose_batch_size(image_hwc.shape[:2])
    return next(found for found in explain_in_pieces(predictor, image_hwc, name, size=size) if found is not None)


def explain_in_pieces(
    predictor: Predictor, image_hwc: UInt8Array, name: str | None = None, *, size: int, across: int = ACROSS
) -> Iterator[Explanation | None]:
    """As `explain`, for who has other work between: yields None after each `size` images, and then the explanation.

    `across` steps of the square along the longer side: half as many ask a quarter of the images. Raises ParamsError.
    """
    classes = predictor.card.classes
    if name is not None and name not in classes:
        raise ParamsError("--class", f"got {name!r}", f"one of {shorten(classes)}")
    whole = predictor.run(image_hwc[None])
    k = classes.index(name) if name is not None else int(whole.probs_nk[0].argmax())
    boxes = list_squares(*image_hwc.shape[:2], across=across)
    blurred = np.asarray(Image.fromarray(image_hwc).filter(ImageFilter.GaussianBlur(max(image_hwc.shape) / BLUR)))
    logit = float(_get_logits(whole.logits_nk, k, predictor.card.task)[0])
    falls = []
    for start in range(0, len(boxes), size):
        covered = np.stack([_cover(image_hwc, box, blurred) for box in boxes[start : start + size]])
        falls.append(logit - _get_logits(predictor.run(covered).logits_nk, k, predictor.card.task))
        yield None
    falls_hw = spread_falls(image_hwc.shape[:2], boxes, np.concatenate(falls))
    yield Explanation(classes[k], float(whole.probs_nk[0, k]), logit, falls_hw)


def _cover(image_hwc: UInt8Array, box: Box, blurred: UInt8Array) -> UInt8Array:
    top, bottom, left, right = box
    covered = image_hwc.copy()
    covered[top:bottom, left:right] = blurred[top:bottom, left:right]
    return covered


def get_step(height: int, width: int, across: int = ACROSS) -> int:
    """Return the step of the square in pixels. Falls are equal in each block of so many pixels."""
    return max(1, -(-max(height, width) // across))


def list_squares(height: int, width: int, *, across: int = ACROSS) -> list[Box]:
    """Return the places of the square as (top, bottom, left, right), overlapping, cut at the edges."""
    step = get_step(height, width, across)
    side = COVERED * step
    starts = [range(-(COVERED - 1) * step, length, step) for length in (height, width)]
    return [
        (max(0, top), min(height, top + side), max(0, left), min(width, left + side))
        for top in starts[0]
        for left in starts[1]
    ]


def spread_falls(size_hw: tuple[int, ...], boxes: list[Box], falls_s: NDArray[np.floating]) -> NDArray[np.float64]:
    """Return for each pixel the mean fall of all squares that cover it."""
    total, count = np.zeros(size_hw), np.zeros(size_hw)
    for (top, bottom, left, right), fall in zip(boxes, falls_s, strict=True):
        total[top:bottom, left:right] += fall
        count[top:bottom, left:right] += 1
    return np.asarray(total / count)


def draw_heat(image_hwc: UInt8Array, found: Explanation) -> UInt8Array:
    """Return the image in grey under its heat: red holds the answer up, blue speaks against it."""
    strength = np.abs(found.falls_hw) / (np.abs(found.falls_hw).max() or 1.0)
    colour = np.where(found.falls_hw[..., None] >= 0, WARM, COLD)
    grey = np.asarray(Image.fromarray(image_hwc).convert("L"), np.float64)[..., None]
    mixed = grey * (1 - 0.7 * strength[..., None]) + colour * 0.7 * strength[..., None]
    return np.asarray(mixed.round(), np.uint8)


def encode_heat(image_hwc: UInt8Array, found: Explanation, side_px: int) -> bytes:
    """Return the heat alone as a PNG of `side_px` at most."""
    picture, sink = Image.fromarray(draw_heat(image_hwc, found)), io.BytesIO()
    picture.thumbnail((side_px, side_px))
    picture.save(sink, "PNG")
    return sink.getvalue()


def draw_explanation(image_hwc: UInt8Array, found: Explanation, classes: Sequence[str], title: str) -> bytes:
    """Draw the image, and the image under its heat. PNG."""
    cells = [
        Cell(image_hwc, f"{number_names(classes)[found.name]} {found.probability:.1%}"),
        Cell(draw_heat(image_hwc, found), "red: holds it up, blue: speaks against it", describe_falls(found)),
    ]
    return draw_contact_sheet(cells, title, columns=2, cell_px=360)


def describe_falls(found: Explanation) -> str:
    """Say how much a single place matters: a faint picture is drawn as strong as a clear one."""
    low, high = -found.falls_hw.max(), -found.falls_hw.min()
    return f"logit {found.logit:+.2f}; a hidden part changes it by {low:+.2f} to {high:+.2f}"


def _get_logits(logits_nk: NDArray[np.floating], k: int, task: str) -> NDArray[np.float64]:
    """Return the logit of a class; where classes exclude each other, against the mean of the others."""
    logits = logits_nk.astype(np.float64)
    if task == "multilabel":
        return np.asarray(logits[:, k])
    others = (logits.sum(axis=1) - logits[:, k]) / max(1, logits.shape[1] - 1)
    return np.asarray(logits[:, k] - others)
