"""Pictures for people, as PNG bytes: a grid of labelled images, pairs, answers with bars. Draws only what it is handed.

Pixels are (height, width, 3) uint8, RGB. Equal input gives equal bytes on one machine. Nothing depends on these bytes:
a picture can be drawn again at any time.
"""

import io
import itertools
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from visionloop.data.fonts import find_file
from visionloop.data.images import UInt8Array

INK, FAINT, RULE, GROUND, PAGE = "#1a1a1a", "#6b6b6b", "#e3e3e3", "#f4f4f4", "#ffffff"
MARGIN, GAP, PAD = 16, 12, 6
TITLE, LABEL, NOTE, EMPTY = (20, INK), (14, INK), (12, FAINT), (14, FAINT)  # size in px, ink
TITLE_H, LINE_H = 38, 19
PAIRS_ACROSS = 2
PANELS_ACROSS, PANEL_PX = 3, 150
RIGHT, WRONG, BAR = "#1c7a43", "#c02b2b", "#dbe6fb"
BAR_H, BARS_W, SHARE_W = 15, 190, 40
ANSWERED_PX, ANSWERED_LEAST_PX, ANSWERED_BAND = 800, 256, 58
ELLIPSIS = "…"
LONGEST = 300  # characters; a longer line is cut before it is measured
NOWHERE = "\U0010ffff"  # a character that no font draws
Glyph = tuple[str, ImageFont.FreeTypeFont]


@dataclass(frozen=True)
class Cell:
    """One picture of a sheet: its pixels, what stands below it, and a smaller line below that."""

    image: UInt8Array
    label: str
    note: str = ""


def draw_contact_sheet(cells: Sequence[Cell], title: str, *, columns: int = 5, cell_px: int = 160) -> bytes:
    """Draw a grid of images with their labels, in the order given. Each is scaled to fit a square of `cell_px`."""
    across = max(1, min(columns, len(cells)))
    cell_h = cell_px + PAD + LINE_H * (1 + any(cell.note for cell in cells))

    def draw_cell(page: Image.Image, number: int, x: int, y: int) -> None:
        _draw_cell(page, cells[number], x, y, cell_px)

    return _draw_grid(title, len(cells), across, (cell_h, cell_px), draw_cell)


def draw_pairs(pairs: Sequence[tuple[Cell, Cell, str]], title: str, *, cell_px: int = 160) -> bytes:
    """Draw pairs of images side by side, each pair under its caption."""
    pair_h = LINE_H + PAD + cell_px + PAD + LINE_H * (1 + any(a.note or b.note for a, b, _ in pairs)) + GAP
    pair_w = 2 * cell_px + PAD

    def draw_pair(page: Image.Image, number: int, x: int, y: int) -> None:
        left, right, caption = pairs[number]
        draw = ImageDraw.Draw(page)
        draw.line((x, y, x + pair_w - 1, y), fill=RULE)
        _write(draw, (x, y + PAD), caption, LABEL, pair_w)
        top = y + PAD + LINE_H + PAD
        _draw_cell(page, left, x, top, cell_px)
        _draw_cell(page, right, x + cell_px + PAD, top, cell_px)

    return _draw_grid(title, len(pairs), max(1, min(PAIRS_ACROSS, len(pairs))), (pair_h, pair_w), draw_pair)


@dataclass(frozen=True)
class Panel:
    """One answered image: its pixels, the answer as title, a note below that, and bars (name, share), largest first.

    `is_right`: green or red; None where the truth is not known. `truth` names the bars that are true.
    """

    image: UInt8Array
    title: str
    bars: Sequence[tuple[str, float]]
    is_right: bool | None = None
    truth: frozenset[str] = frozenset()
    note: str = ""


def draw_prediction_sheet(panels: Sequence[Panel], title: str, notes: Sequence[str]) -> bytes:
    """Draw images, each with its answer above and the probabilities of the likeliest classes as bars beside it.

    `notes` stand below them, a line each.
    """
    across = max(1, min(PANELS_ACROSS, len(panels)))
    most = max((len(panel.bars) for panel in panels), default=0)
    size_hw = 2 * LINE_H + PAD + max(PANEL_PX, most * BAR_H), PANEL_PX + PAD + BARS_W

    def draw_panel(page: Image.Image, number: int, x: int, y: int) -> None:
        panel, draw = panels[number], ImageDraw.Draw(page)
        ink = INK if panel.is_right is None else RIGHT if panel.is_right else WRONG
        _write(draw, (x, y), panel.title, (LABEL[0], ink), size_hw[1])
        _write(draw, (x, y + LINE_H), panel.note, NOTE, size_hw[1])
        top, left = y + 2 * LINE_H + PAD, x + PANEL_PX + PAD
        _paste(page, panel.image, x, top, PANEL_PX)
        for place, (name, share) in enumerate(panel.bars):
            at = top + place * BAR_H
            draw.rectangle((left, at, left + round(share * (BARS_W - SHARE_W)), at + BAR_H - 3), fill=BAR)
            ink = INK if name in panel.truth else FAINT
            _write(draw, (left + 3, at), name, (NOTE[0], ink), BARS_W - SHARE_W - PAD)
            _write(draw, (left + BARS_W - SHARE_W + PAD, at), f"{share:.0%}", (NOTE[0], ink), SHARE_W)

    return _draw_grid(title, len(panels), across, size_hw, draw_panel, notes=notes)


def draw_answered(image: Image.Image, title: Sequence[str], note: Sequence[str], *, is_unsure: bool = False) -> bytes:
    """Draw one image, no larger than ANSWERED_PX, with a line and a smaller one below it.

    The lines come in pieces: a number beside an Arabic name would else change its place.
    """
    ratio = min(1.0, ANSWERED_PX / max(image.size))
    # A tiny image keeps visible pixels, and a long one has room for the lines.
    ratio = max(ratio, float(ANSWERED_LEAST_PX // max(image.size)))
    width, height = (max(1, round(side * ratio)) for side in image.size)
    picture = image.resize((width, height), Image.Resampling.NEAREST if ratio >= 2 else Image.Resampling.LANCZOS)
    page_w = max(width, ANSWERED_LEAST_PX)
    page = Image.new("RGB", (page_w, height + ANSWERED_BAND), PAGE)
    page.paste(GROUND, (0, 0, page_w, height))
    page.paste(picture, ((page_w - width) // 2, 0))
    draw = ImageDraw.Draw(page)
    lines = ((title, (TITLE[0], WRONG if is_unsure else INK), 0), (note, LABEL, TITLE[0] + PAD + 2))
    for pieces, style, below in lines:
        x = PAD
        for piece in pieces:
            if page_w - PAD - x > LABEL[0]:
                x += _write(draw, (x, height + PAD + below), piece, style, page_w - PAD - x) + PAD
    buffer = io.BytesIO()
    page.save(buffer, "PNG")
    return buffer.getvalue()


def _draw_grid(
    title: str,
    number: int,
    across: int,
    size_hw: tuple[int, int],
    draw_one: Callable[[Image.Image, int, int, int], None],
    *,
    notes: Sequence[str] = (),
) -> bytes:
    """Draw `number` panels of one size below a title, row by row, and lines below them."""
    height, width = size_hw
    rows = -(-number // across)
    page_w = max(2 * MARGIN + across * width + (across - 1) * GAP, 2 * MARGIN + 360)
    notes_y = MARGIN + TITLE_H + (rows * (height + GAP) - GAP if rows else LINE_H) + MARGIN
    page_h = notes_y + (len(notes) * LINE_H + MARGIN if notes else 0)
    page = Image.new("RGB", (page_w, page_h), PAGE)
    draw = ImageDraw.Draw(page)
    _write(draw, (MARGIN, MARGIN), title, TITLE, page_w - 2 * MARGIN)
    for i in range(number):
        row, column = divmod(i, across)
        draw_one(page, i, MARGIN + column * (width + GAP), MARGIN + TITLE_H + row * (height + GAP))
    if not number:
        _write(draw, (MARGIN, MARGIN + TITLE_H), "no images", EMPTY, page_w)
    for i, note in enumerate(notes):
        _write(draw, (MARGIN, notes_y + i * LINE_H), note, LABEL, page_w - 2 * MARGIN)
    buffer = io.BytesIO()
    page.save(buffer, "PNG")
    return buffer.getvalue()


def _draw_cell(page: Image.Image, cell: Cell, x: int, y: int, cell_px: int) -> None:
    draw = ImageDraw.Draw(page)
    _paste(page, cell.image, x, y, cell_px)
    _write(draw, (x, y + cell_px + PAD), cell.label, LABEL, cell_px)
    if cell.note:
        _write(draw, (x, y + cell_px + PAD + LINE_H), cell.note, NOTE, cell_px)


def _paste(page: Image.Image, image: UInt8Array, x: int, y: int, cell_px: int) -> None:
    ImageDraw.Draw(page).rectangle((x, y, x + cell_px - 1, y + cell_px - 1), fill=GROUND)
    picture = Image.fromarray(image)
    ratio = cell_px / max(picture.size)
    ratio = ratio if ratio < 2 else int(ratio)  # by a whole factor, so that all its pixels are alike
    width, height = (max(1, round(side * ratio)) for side in picture.size)
    # Small images keep visible pixels: a digit of 8 x 8 that is scaled up smoothly looks out of focus.
    picture = picture.resize((width, height), Image.Resampling.NEAREST if ratio >= 2 else Image.Resampling.LANCZOS)
    page.paste(picture, (x + (cell_px - width) // 2, y + (cell_px - height) // 2))


def _write(draw: ImageDraw.ImageDraw, at_xy: tuple[int, int], text: str, style: tuple[int, str], width: int) -> int:
    """Write one line, and return its width.

    If it is wider than `width` pixels its middle is cut, because names often differ at the end.
    """
    size_px, ink = style
    text = " ".join(text.split())
    if len(text) > LONGEST:
        text = text[: LONGEST - LONGEST // 2] + ELLIPSIS + text[-(LONGEST // 2) :]
    glyphs = _choose_fonts(text, size_px)
    runs, keep = _join_runs(glyphs), len(glyphs)
    while keep > 1 and _measure(runs) > width:
        keep -= 1
        tail = keep // 2
        runs = _join_runs([*glyphs[: keep - tail], (ELLIPSIS, glyphs[0][1]), *glyphs[len(glyphs) - tail :]])
    x, y = at_xy
    if len(runs) > 1:
        y += runs[0][1].getmetrics()[0]  # scripts beside each other stand on one line, however high their fonts are
    for run, font in runs:
        draw.text((x, y), run, fill=ink, font=font, anchor="la" if len(runs) == 1 else "ls")
        x += round(font.getlength(run))
    return round(_measure(runs))


def _join_runs(glyphs: Sequence[Glyph]) -> list[Glyph]:
    """Join neighbours of one font: letters are shaped by those beside them."""
    return [("".join(c for c, _ in run), font) for font, run in itertools.groupby(glyphs, key=lambda glyph: glyph[1])]


def _measure(runs: Sequence[Glyph]) -> float:
    return sum(font.getlength(run) for run, font in runs)


def _choose_fonts(text: str, size_px: int) -> list[Glyph]:
    """Return the characters of a text as they can be drawn, each with its font: one for all, if there is one.

    Pillow's own font has ASCII only. Other scripts (Latin, Greek, Cyrillic, Arabic, Hebrew) use DejaVu Sans, if
    matplotlib is installed, and what that has not a font of this machine. A character that no font has is written
    without its accents, else as its escape code; so is one that is not for the eye (some fonts draw U+202E as a box).
    """
    text = "".join(c if c.isprintable() else _escape(c) for c in text)
    fonts = [font for font in (_load_pillow_font(size_px), _load_dejavu(size_px)) if font]
    for font in fonts:
        if all(_has(font, character) for character in text):
            return [(c, font) for c in text]
    if len(fonts) > 1 and (path := find_file(text)):
        return [(c, _load_font(path, size_px)) for c in text]
    return [_choose_glyph(character, fonts, size_px) for character in text]


def _choose_glyph(character: str, fonts: Sequence[ImageFont.FreeTypeFont], size_px: int) -> Glyph:
    ours = fonts[-1]
    if _has(ours, character):
        return character, ours
    if len(fonts) > 1 and (path := find_file(character)):
        return character, _load_font(path, size_px)
    return _spell(ours, character), ours


def _spell(font: ImageFont.FreeTypeFont, character: str) -> str:
    plain = "".join(c for c in unicodedata.normalize("NFKD", character) if not unicodedata.combining(c))
    if plain and all(_has(font, c) for c in plain):
        return plain
    return _escape(character)


def _escape(character: str) -> str:
    return character.encode("unicode_escape").decode()


@cache
def _load_pillow_font(size_px: int) -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(size_px)
    assert isinstance(font, ImageFont.FreeTypeFont)  # Pillow's wheels hold FreeType
    return font


@cache
def _load_dejavu(size_px: int) -> ImageFont.FreeTypeFont | None:
    found = find_spec("matplotlib")  # not imported: that takes half a second, and only its font file is needed
    if not found or not found.origin:
        return None
    path = Path(found.origin).parent / "mpl-data" / "fonts" / "ttf" / "DejaVuSans.ttf"
    return _load_font(str(path), size_px) if path.is_file() else None


@cache
def _load_font(path: str, size_px: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(path, size_px)


@cache
def _has(font: ImageFont.FreeTypeFont, character: str) -> bool:
    if character == " ":
        return True
    drawn, missing = font.getmask(character), font.getmask(NOWHERE)
    return (drawn.size, bytes(drawn)) != (missing.size, bytes(missing))
