"""Small drawings for the report of a retrain, as SVG text: they follow the page's colours, light and dark. Pure.

And photos as they stand in a page. Numbers alone stand in the drawings. Names of classes are in the page itself, whose
fonts the reader's browser chooses.
"""

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup
from PIL import Image

from visionloop.evaluation.metrics import ConfidenceBin
from visionloop.evaluation.resampling import compute_wilson
from visionloop.records import Interval

LEAST_ROOM = 0.005  # of a scale: figures that read the same must not fill it
SIDE, LEFT, BELOW, ABOVE = 300, 38, 30, 10
ROLES = ("candidate", "champion")
FRAME_PX, PICTURE_PX, PICTURE_QUALITY = 120, 280, 80  # the least frame of a page; twice the largest, for sharp screens


@dataclass(frozen=True)
class Span:
    """The part of a scale that a strip shows."""

    low: float
    high: float

    def place(self, value: float) -> float:
        """Return where a value lies, from 0 (left end) to 1; values beyond an end lie on it."""
        return min(max((value - self.low) / ((self.high - self.low) or 1.0), 0.0), 1.0)


def encode_picture(image: Image.Image) -> str:
    """Return an image as a data URI that a page shows at its own size at most.

    One that is small in its frame is enlarged by a whole factor, and a PNG: the page's style leaves its pixels sharp.
    """
    image, sink = image.convert("RGB"), io.BytesIO()
    factor = FRAME_PX // max(image.size)
    if factor >= 2:
        image.resize((factor * image.width, factor * image.height), Image.Resampling.NEAREST).save(sink, "PNG")
    else:
        image.thumbnail((PICTURE_PX, PICTURE_PX))
        image.save(sink, "JPEG", quality=PICTURE_QUALITY)
    kind = "png" if factor >= 2 else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(sink.getvalue()).decode()}"


def choose_span(intervals: Sequence[Interval], *lines: float) -> Span:
    """Return the part of the scale that holds all figures, their bounds and the lines, with a little room."""
    values = [v for i in intervals for v in (i.value, i.low, i.high) if v is not None] + list(lines)
    low, high = min(values, default=0.0), max(values, default=1.0)
    room = max(0.06 * (high - low), LEAST_ROOM)
    return Span(low - room, high + room)


def draw_strip(marks: Mapping[str, Interval | None], span: Span, line: float | None = None) -> Markup:
    """Draw intervals as bars with a dot, one below the other, by role; `line` is what the rule asks for."""
    shown = [(role, one) for role, one in marks.items() if one is not None]
    height = 10 * max(1, len(shown)) + 4
    parts = []
    if line is not None:
        x = 200 * span.place(line)
        parts.append(f'<line class="limit" x1="{x:.1f}" x2="{x:.1f}" y1="0" y2="{height}"/>')
    for number, (role, one) in enumerate(shown):
        y = 7 + 10 * number
        if one.low is not None and one.high is not None:
            left, right = 200 * span.place(one.low), 200 * span.place(one.high)
            parts.append(f'<line class="bar {role}" x1="{left:.1f}" x2="{right:.1f}" y1="{y}" y2="{y}"/>')
        parts.append(f'<circle class="dot {role}" cx="{200 * span.place(one.value):.1f}" cy="{y}" r="3.5"/>')
    head = f'<svg class="strip" viewBox="-4 0 208 {height}" width="208" height="{height}" aria-hidden="true">'
    return Markup(f"{head}{''.join(parts)}</svg>")


def draw_reliability(bins: Mapping[str, Sequence[ConfidenceBin]]) -> Markup:
    """Draw the share of right answers over their mean confidence, bars of 95 % (Wilson); the diagonal is ideal.

    A bin of one image is a dot of its own: no line leads to it.
    """
    parts = ['<line class="limit" x1="0" y1="0" x2="1" y2="1"/>']
    for role, several in bins.items():
        joined = [f"{b.confidence:.4f},{b.accuracy:.4f}" for b in several if b.count > 1]
        parts.append(f'<polyline class="curve {role}" points="{" ".join(joined)}"/>')
        for b in several:
            bar = compute_wilson(round(b.accuracy * b.count), b.count)
            x = f"{b.confidence:.4f}"
            parts.append(f'<line class="bar {role}" x1="{x}" x2="{x}" y1="{bar.low:.4f}" y2="{bar.high:.4f}"/>')
            parts.append(f'<circle class="dot {role}" cx="{x}" cy="{b.accuracy:.4f}" r="0.012"/>')
    ticks = [(share, f"{share:.0%}") for share in (0.0, 0.25, 0.5, 0.75, 1.0)]
    return _draw_frame(parts, ticks, ticks, "confidence", "right answers")


def draw_curves(curves: Mapping[str, Sequence[tuple[float, float]]], across: str, up: str, *, shares: bool) -> Markup:
    """Draw lines through points (x, y), by role; both axes begin at 0. `shares`: both are shares of one."""
    points = [point for curve in curves.values() for point in curve]
    most_x = 1.0 if shares else max((x for x, _ in points), default=1.0) or 1.0
    most_y = max((y for _, y in points), default=1.0) * 1.08 or 1.0
    parts = []
    for role, curve in curves.items():
        line = " ".join(f"{x / most_x:.4f},{y / most_y:.4f}" for x, y in curve)
        parts.append(f'<polyline class="curve {role}" points="{line}"/>')
        if len(curve) == 1:
            parts.append(f'<circle class="dot {role}" cx="{curve[0][0] / most_x:.4f}" cy="{1 / 1.08:.4f}" r="0.012"/>')
    x_ticks = [(s, f"{s:.0%}" if shares else f"{s * most_x:.3g}") for s in (0.0, 0.5, 1.0)]
    y_ticks = [(s, f"{s * most_y:.2%}" if shares else f"{s * most_y:.3g}") for s in (0.0, 0.5, 1.0)]
    return _draw_frame(parts, x_ticks, y_ticks, across, up)


def _draw_frame(
    parts: Sequence[str],
    x_ticks: Sequence[tuple[float, str]],
    y_ticks: Sequence[tuple[float, str]],
    across: str,
    up: str,
) -> Markup:
    """Put a drawing in the unit square into a frame with ticks and titles. The names of axes are our own words."""
    width, height = LEFT + SIDE + 14, ABOVE + SIDE + BELOW
    texts = [
        f'<text class="tick" x="{LEFT + SIDE * s:.0f}" y="{ABOVE + SIDE + 14}" text-anchor="middle">{name}</text>'
        for s, name in x_ticks
    ]
    texts += [
        f'<text class="tick" x="{LEFT - 5}" y="{ABOVE + SIDE * (1 - s) + 4:.0f}" text-anchor="end">{name}</text>'
        for s, name in y_ticks
    ]
    texts.append(f'<text class="tick" x="{LEFT + SIDE / 2:.0f}" y="{height - 2}" text-anchor="middle">{across}</text>')
    texts.append(f'<text class="tick" x="{LEFT + 8}" y="{ABOVE + 16}">{up}</text>')
    frame = f'<rect class="frame" x="{LEFT}" y="{ABOVE}" width="{SIDE}" height="{SIDE}"/>'
    moved = f'<g transform="translate({LEFT} {ABOVE + SIDE}) scale({SIDE} {-SIDE})">{"".join(parts)}</g>'
    head = f'<svg class="plot" viewBox="0 0 {width} {height}" role="img" aria-label="{up} over {across}">'
    return Markup(f"{head}{frame}{moved}{''.join(texts)}</svg>")
