"""Class names in any script are drawn by a font that has them, or as numbers that the report explains."""

from pathlib import Path

import matplotlib
import pytest
from matplotlib import font_manager

from visionloop.data import contact_sheet, fonts
from visionloop.data.fonts import describe_numbers, find_families, number_names
from visionloop.evaluation.metrics import ClassFigures
from visionloop.evaluation.plots import draw_classes
from visionloop.evaluation.report import _make_legend
from visionloop.records import Interval

OURS = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"

HALF = Interval(0.5, 0.2, 0.8)


@pytest.fixture
def only_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that has matplotlib's fonts alone."""
    mine = [f for f in font_manager.fontManager.ttflist if Path(f.fname).parent == OURS.parent]
    monkeypatch.setattr(font_manager.fontManager, "ttflist", mine)
    for cached in (fonts._find_family, fonts._list_charmaps):
        cached.cache_clear()


@pytest.mark.parametrize("name", ["猫", "हिन्दी", "ภาษา", "犬 dog"])
def test_a_name_that_no_font_has_is_a_number_with_a_legend(only_ours: None, name: str) -> None:
    assert number_names(["cat", name, "Ünï-ж"]) == {"cat": "cat", name: "#2", "Ünï-ж": "Ünï-ж"}
    assert describe_numbers(["cat", name]) == f"#2 is {name}"
    assert f"In the figures #2 is {name}." in _make_legend(["cat", name])
    assert _make_legend(["cat", "Кот", "γάτα"]) == ""
    assert find_families([name, "cat"]) == ["DejaVu Sans"]


def make_font(path: Path, text: str) -> Path:
    """Write a font that draws each of these characters as a square."""
    from fontTools.fontBuilder import FontBuilder
    from fontTools.pens.ttGlyphPen import TTGlyphPen

    pen = TTGlyphPen(None)
    pen.moveTo((0, 0))
    for point in ((0, 900), (900, 900), (900, 0)):
        pen.lineTo(point)
    pen.closePath()
    square, names = pen.glyph(), [f"u{ord(char):04x}" for char in text]
    builder = FontBuilder(1000, isTTF=True)
    builder.setupGlyphOrder([".notdef", *names])
    builder.setupCharacterMap({ord(char): name for char, name in zip(text, names, strict=True)})
    builder.setupGlyf({".notdef": TTGlyphPen(None).glyph(), **dict.fromkeys(names, square)})
    builder.setupHorizontalMetrics(dict.fromkeys((".notdef", *names), (1000, 0)))
    builder.setupHorizontalHeader(ascent=900, descent=0)
    builder.setupNameTable({"familyName": "Squares", "styleName": "Regular"})
    builder.setupOS2()
    builder.setupPost()
    builder.save(path)
    return path


def test_a_picture_takes_a_font_of_this_machine(
    only_ours: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert "".join(drawn for drawn, _ in contact_sheet._choose_fonts("马 87%", 14)) == "\\u9a6c 87%"
    font = make_font(tmp_path / "squares.ttf", "马 87%")
    font_manager.fontManager.addfont(font)
    for cached in (fonts._find_family, fonts._list_charmaps):
        cached.cache_clear()
    glyphs = contact_sheet._choose_fonts("马 87%", 14)
    assert [(drawn, found.path) for drawn, found in glyphs] == [(char, str(font)) for char in "马 87%"]
    assert number_names(["cat", "马"]) == {"cat": "cat", "马": "马"}


def test_a_system_font_that_has_the_characters_is_used(only_ours: None, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = draw_classes([ClassFigures("猫", HALF, HALF, HALF, 4)])
    entry = font_manager.FontEntry(fname=str(OURS), name="Noto Sans CJK", style="normal")
    listed = [("DejaVu Sans", frozenset(range(32, 127))), ("Noto Sans CJK", frozenset({ord("猫")}))]
    monkeypatch.setattr(fonts, "_list_charmaps", lambda: listed)
    fonts._find_family.cache_clear()
    monkeypatch.setattr(font_manager.fontManager, "ttflist", [*font_manager.fontManager.ttflist, entry])
    assert number_names(["猫", "cat"]) == {"猫": "猫", "cat": "cat"}
    assert find_families(["猫", "cat"]) == ["DejaVu Sans", "Noto Sans CJK"]
    assert draw_classes([ClassFigures("猫", HALF, HALF, HALF, 4)])[:8] == plain[:8] == b"\x89PNG\r\n\x1a\n"
    fonts._find_family.cache_clear()
