"""Grids of labelled images and pairs: positions on the page, read back from its pixels."""

import io
import itertools
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from visionloop.data import contact_sheet
from visionloop.data.contact_sheet import Cell, draw_contact_sheet, draw_pairs

RED, GREEN, BLUE = (200, 0, 0), (0, 200, 0), (0, 0, 200)


def make_cell(color: tuple[int, int, int], label: str = "cat", note: str = "", *, size_hw: tuple[int, int] = (40, 40)):
    return Cell(np.full((*size_hw, 3), color, np.uint8), label, note)


def read_page(data: bytes) -> np.ndarray:
    image = Image.open(io.BytesIO(data))
    assert image.format == "PNG"
    return np.asarray(image.convert("RGB")).astype(int)


def find(page: np.ndarray, color: tuple[int, int, int]) -> tuple[int, int, int, int]:
    """Top, left, height and width of the pixels of one color."""
    rows, columns = np.nonzero((np.abs(page - color) <= 2).all(axis=2))
    return rows.min(), columns.min(), np.ptp(rows) + 1, np.ptp(columns) + 1


def spell(text: str) -> str:
    """Return a text as it is drawn."""
    return "".join(character for character, _ in contact_sheet._choose_fonts(text, 14))


def count_ink(page: np.ndarray) -> int:
    return int((page.max(axis=2) < 100).sum())


def test_cells_stand_in_rows_in_their_order() -> None:
    page = read_page(draw_contact_sheet([make_cell(c) for c in (RED, GREEN, BLUE)], "three", columns=2, cell_px=80))
    red, green, blue = (find(page, c) for c in (RED, GREEN, BLUE))
    assert red[2:] == green[2:] == blue[2:] == (80, 80)
    assert red[0] == green[0] < blue[0] - 80
    assert red[1] == blue[1] == green[1] - 80 - contact_sheet.GAP


@pytest.mark.parametrize(("size_hw", "drawn"), [((40, 10), (80, 20)), ((10, 400), (2, 80)), ((1, 3000), (1, 80))])
def test_an_image_of_any_shape_is_shown_whole_and_in_the_middle(
    size_hw: tuple[int, int], drawn: tuple[int, int]
) -> None:
    top, left, *size = find(read_page(draw_contact_sheet([make_cell(RED, size_hw=size_hw)], "t", cell_px=80)), RED)
    assert tuple(size) == drawn
    assert left == contact_sheet.MARGIN + (80 - drawn[1]) // 2
    assert top == contact_sheet.MARGIN + contact_sheet.TITLE_H + (80 - drawn[0]) // 2


def test_labels_and_notes_are_written_below() -> None:
    blank, label, both = (
        read_page(draw_contact_sheet([make_cell(RED, *texts)], "")) for texts in (("", ""), ("cat",), ("cat", "train"))
    )
    assert count_ink(blank) == 0
    assert count_ink(label) > 20
    assert both.shape[0] == label.shape[0] + contact_sheet.LINE_H


def test_a_long_label_is_cut_in_its_middle_and_stays_in_its_cell() -> None:
    page = read_page(draw_contact_sheet([make_cell(RED, "x" * 100_000), make_cell(GREEN, "")], "", cell_px=80))
    ink = np.nonzero((page.max(axis=2) < 100).any(axis=0))[0]
    assert ink.min() >= contact_sheet.MARGIN
    assert ink.max() < contact_sheet.MARGIN + 80
    written: list[str] = []
    pen = SimpleNamespace(text=lambda at_xy, run, **style: written.append(run))
    width = contact_sheet._write(pen, (0, 0), "german_shorthaired_pointer", contact_sheet.LABEL, 90)
    (run,) = written
    left, _, right = run.partition("…")
    assert "german_shorthaired_pointer".startswith(left)
    assert "german_shorthaired_pointer".endswith(right)
    assert 0 <= len(left) - len(right) <= 1
    assert 70 < width <= 90


@pytest.mark.parametrize(
    ("label", "with_dejavu", "without"),
    [
        ("café", "café", "cafe"),
        ("кот", "кот", r"\u043a\u043e\u0442"),
        ("猫", r"\u732b", r"\u732b"),
        ("a\x00\u202eb", r"a\x00\u202eb", r"a\x00\u202eb"),
        ("cat", "cat", "cat"),
    ],
)
def test_what_the_font_cannot_draw_is_spelt_out(
    label: str, with_dejavu: str, without: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(contact_sheet, "find_file", lambda text: None)  # a machine without other fonts
    assert spell(label) == with_dejavu
    monkeypatch.setattr(contact_sheet, "_load_dejavu", lambda size_px: None)
    assert spell(label) == without


def test_a_font_of_the_machine_draws_what_ours_lack_but_no_control_characters(monkeypatch: pytest.MonkeyPatch) -> None:
    dejavu = contact_sheet._load_dejavu(14)
    assert dejavu is not None
    monkeypatch.setattr(contact_sheet, "find_file", lambda text: dejavu.path)  # as if that font had every character
    assert spell("猫") == "猫"
    assert spell("a\x00\u202eb猫") == r"a\x00\u202eb猫"


def test_names_in_two_scripts_that_no_font_has_together_are_both_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    dejavu = contact_sheet._load_dejavu(14)
    assert dejavu is not None
    other = str(dejavu.path).replace("Sans.ttf", "Sans-Bold.ttf")
    monkeypatch.setattr(contact_sheet, "find_file", lambda text: other if set(text) <= set("猫马") else None)
    glyphs = contact_sheet._choose_fonts("猫马 87 % (кот)", 14)
    runs = contact_sheet._join_runs(glyphs)
    assert [run for run, _ in runs] == ["猫马", " 87 % (кот)"]
    written: list[tuple[tuple[int, int], str, str]] = []
    pen = SimpleNamespace(text=lambda at_xy, run, anchor, **style: written.append((at_xy, run, anchor)))
    contact_sheet._write(pen, (5, 7), "猫马 87 % (кот)", contact_sheet.LABEL, 1000)
    (first, _, anchor), (second, _, _) = written
    assert anchor == "ls", "on one line"
    assert (first[0], second[0]) == (5, 5 + round(runs[0][1].getlength("猫马")))
    assert first[1] == second[1] > 7


def test_pixels_of_a_tiny_image_are_all_enlarged_alike() -> None:
    stripes = np.zeros((28, 28, 3), np.uint8)
    stripes[:, ::2] = RED
    page = read_page(draw_contact_sheet([Cell(stripes, "")], "", cell_px=160))
    row = page[contact_sheet.MARGIN + contact_sheet.TITLE_H + 80]
    reds = [len(list(run)) for red, run in itertools.groupby((row == RED).all(axis=1)) if red]
    assert reds == [5] * 14


def test_pairs_stand_side_by_side_under_their_caption() -> None:
    page = read_page(draw_pairs([(make_cell(RED), make_cell(GREEN), "distance 2")], "worst", cell_px=80))
    red, green = find(page, RED), find(page, GREEN)
    assert red[0] == green[0]
    assert green[1] - red[1] == 80 + contact_sheet.PAD
    without = read_page(draw_pairs([(make_cell(RED), make_cell(GREEN), "")], "worst", cell_px=80))
    caption = count_ink(page) - count_ink(without)
    assert caption > 50
    assert (page != without).any(axis=(1, 2)).nonzero()[0].max() < red[0]


def test_nothing_to_show_is_said() -> None:
    assert count_ink(read_page(draw_contact_sheet([], ""))) == 0  # faint
    assert (read_page(draw_contact_sheet([], "")) < 200).sum() > 100
    assert draw_pairs([], "t").startswith(b"\x89PNG")


def test_equal_cells_give_equal_bytes(tmp_path: Path) -> None:
    cells = [make_cell(RED, "a"), make_cell(GREEN, "b", "n")]
    assert draw_contact_sheet(cells, "t") == draw_contact_sheet(cells, "t")
