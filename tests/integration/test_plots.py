"""Figures: whole PNG files, the same bytes each time, whatever the class names or the user's matplotlib settings."""

import io
import struct

import numpy as np
import pytest
from PIL import Image

from visionloop.evaluation.label_metrics import LabelCounts
from visionloop.evaluation.metrics import ClassFigures, compute_class_figures, compute_confusion
from visionloop.evaluation.plots import (
    Mistake,
    draw_classes,
    draw_confidence,
    draw_confusion,
    draw_mistakes,
    draw_outcomes,
)

ODD_NAMES = ("$5 bill", "$\\frac{$", "日本", "<b>", "x" * 300, "two\nlines", " ")


def read_chunks(png: bytes) -> set[str]:
    chunks, place = set(), 8
    while place < len(png):
        (size,) = struct.unpack(">I", png[place : place + 4])
        chunks.add(png[place + 4 : place + 8].decode())
        place += 12 + size
    return chunks


def make_confusion(num_classes: int) -> np.ndarray:
    generator = np.random.default_rng(0)
    labels_n = generator.integers(0, num_classes, 400)
    chosen_n = np.where(generator.random(400) < 0.8, labels_n, generator.integers(0, num_classes, 400))
    return compute_confusion(labels_n, chosen_n, num_classes)


def make_mistakes(count: int) -> list[Mistake]:
    images_nhwc = np.random.default_rng(0).integers(0, 255, (count, 20, 30, 3)).astype(np.uint8)
    return [Mistake(image, ODD_NAMES[i % 7], "b", 0.75) for i, image in enumerate(images_nhwc)]


def make_figures(confusion_kk: np.ndarray, names: list[str]) -> list[ClassFigures]:
    """The figures of images that have this confusion matrix, each a key of its own."""
    labels_n, chosen_n = (np.repeat(axis.ravel(), confusion_kk.ravel()) for axis in np.indices(confusion_kk.shape))
    return compute_class_figures(labels_n, chosen_n, names, np.arange(len(labels_n)))


def draw_all() -> dict[str, bytes]:
    confusion_kk = make_confusion(len(ODD_NAMES))
    confidence_n = np.random.default_rng(1).random(200)
    return {
        "confusion": draw_confusion(confusion_kk, ODD_NAMES),
        "classes": draw_classes(make_figures(confusion_kk, ODD_NAMES)),
        "confidence": draw_confidence(confidence_n, confidence_n > 0.4),
        "mistakes": draw_mistakes(make_mistakes(7), 9, 200),
        "outcomes": draw_outcomes([LabelCounts(name, 9 - i, i, 3 * i) for i, name in enumerate(ODD_NAMES)]),
    }


@pytest.mark.parametrize(("num_classes", "name"), [(2, "c"), (25, "cat"), (26, "c"), (120, "c"), (120, "breed" * 6)])
def test_no_word_is_cut_off_at_the_border(num_classes: int, name: str):
    png = draw_confusion(np.eye(num_classes, dtype=int) * 5, [f"{i}{name}" for i in range(num_classes)])
    pixels = np.asarray(Image.open(io.BytesIO(png)).convert("L"))
    assert min(pixels[0].min(), pixels[-1].min(), pixels[:, 0].min(), pixels[:, -1].min()) == 255


def test_same_input_gives_same_bytes_whatever_the_users_settings():
    import matplotlib

    first = draw_all()
    before = matplotlib.rcParams["font.size"]
    matplotlib.rcParams["font.size"] = 30
    matplotlib.rcParams["savefig.dpi"] = 50
    try:
        assert draw_all() == first
        assert matplotlib.rcParams["font.size"] == 30
    finally:
        matplotlib.rcParams.update({"font.size": before, "savefig.dpi": "figure"})
    for png in first.values():
        assert read_chunks(png) <= {"IHDR", "pHYs", "IDAT", "IEND"}
        image = Image.open(io.BytesIO(png))
        image.load()
        assert len(image.convert("L").getcolors()) > 20


@pytest.mark.parametrize(("num_classes", "least_px"), [(2, 400), (10, 600), (120, 1400)])
def test_confusion_grows_with_the_classes(num_classes, least_px):
    names = [f"breed number {i}" for i in range(num_classes)]
    image = Image.open(io.BytesIO(draw_confusion(make_confusion(num_classes), names)))
    assert least_px < image.width < 1800
    assert least_px < image.height < 1800


def test_classes_shows_the_worst_forty_of_many():
    tall = Image.open(io.BytesIO(draw_classes(make_figures(make_confusion(40), [str(i) for i in range(40)]))))
    taller = Image.open(io.BytesIO(draw_classes(make_figures(make_confusion(90), [str(i) for i in range(90)]))))
    assert tall.height == taller.height


def test_mistakes_of_a_perfect_model_is_one_line():
    image = Image.open(io.BytesIO(draw_mistakes([], 0, 10)))
    assert image.height < 100


def test_a_bar_of_confidence_is_as_wide_as_its_bin(monkeypatch):
    from matplotlib.figure import Figure

    seen, save = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda figure, *a, **b: (seen.append(figure), save(figure, *a, **b)))
    draw_confidence(np.full(9, 0.9995), np.full(9, True))
    [bar] = [patch for patch in seen[0].axes[1].patches if patch.get_height()]
    assert (bar.get_x(), bar.get_x() + bar.get_width()) == pytest.approx((0.9, 1.0), abs=0.004)


def test_confidence_without_a_single_right_answer_is_drawn():
    png = draw_confidence(np.array([0.5, 0.9]), np.array([False, False]))
    assert Image.open(io.BytesIO(png)).width > 900


@pytest.mark.parametrize(
    "outcomes",
    [[], [LabelCounts("a", 0, 3, 0)], [LabelCounts("a", 0, 0, 5), LabelCounts("b", 1, 0, 900)]],
    ids=["none", "all missed", "only wrongly said"],
)
def test_outcomes_of_odd_classes_are_drawn(outcomes):
    image = Image.open(io.BytesIO(draw_outcomes(outcomes)))
    image.load()
    assert image.width == 924


def test_outcomes_shows_the_worst_forty_of_many():
    forty, ninety = ([LabelCounts(str(i), i + 1, 90 - i, i) for i in range(number)] for number in (40, 90))
    heights = [Image.open(io.BytesIO(draw_outcomes(outcomes))).height for outcomes in (forty, ninety)]
    assert heights[0] == heights[1]
