"""Figures of an evaluation as PNG bytes. Same input, same bytes: no time, no user settings, no global pyplot state.

Dimensions in names: n images, k classes, h x w pixels. matplotlib is imported when the first figure is drawn (0.5 s).
"""

import contextlib
import io
import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from visionloop.data.fonts import find_families
from visionloop.data.images import UInt8Array
from visionloop.evaluation.label_metrics import LabelCounts
from visionloop.evaluation.metrics import (
    ClassFigures,
    compute_calibration_error,
    compute_confidence_bins,
    compute_equal_bins,
)
from visionloop.evaluation.resampling import IntArray, compute_wilson
from visionloop.records import make_natural_key

DPI = 110
INK, MUTED, GRID = "#1f2733", "#6b7686", "#e3e7ed"
BLUE, PALE_BLUE, RED, GREEN = "#2f6fde", "#a9c5f5", "#d6493a", "#2d9d78"
PALE_GREEN = "#cfe6dd"
STYLE = {
    "font.size": 9,
    "text.color": INK,
    "text.parse_math": False,  # a class may be called "$5"
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 10,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": GRID,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": GRID,
    "xtick.color": MUTED,
    "ytick.color": INK,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "figure.constrained_layout.w_pad": 0.1,
    "figure.constrained_layout.h_pad": 0.1,
}
ANNOTATED_CLASSES = 25
NAMED_CLASSES = 150
SHOWN_BARS = 40
NAME_CHARS = 24
MISTAKE_COLUMNS = 5
MISTAKE_ROWS = 5
CELL_HEIGHT = 1.26
SMOOTH_PX = 100


@dataclass(frozen=True)
class Mistake:
    """One wrong answer: the image, its class or labels, what was answered, and the probability of that answer.

    `verb` is written before the truth: an image `is` a class, or `has` several labels.
    """

    image_hwc: UInt8Array
    actual: str
    predicted: str
    confidence: float
    verb: str = "is"


def draw_confusion(confusion_kk: IntArray, classes: Sequence[str], *, title: str = "") -> bytes:
    """Draw actual (rows) against predicted (columns), coloured by the share of each row."""
    num_classes = len(classes)
    few = num_classes <= ANNOTATED_CLASSES
    share_kk = confusion_kk / np.maximum(confusion_kk.sum(axis=1, keepdims=True), 1)
    names = [_cut(name) for name in classes] if num_classes <= NAMED_CLASSES else []
    size = 9 if few else max(3.5, min(8.0, 620 / num_classes))
    longest = max(map(len, names), default=0)
    upright = longest > (10 if num_classes <= 4 else 4) or not few
    room = 0.009 * size * longest
    side = max(2.8, 0.9 + 0.5 * num_classes) if few else 11.5
    with open_figure(side + room + 1.7, side + (room if upright else 0.2) + 0.9, names) as (figure, sink):
        axes = figure.add_subplot()
        # Cells of a fixed aspect would be laid out after the labels, which then lie partly outside of the picture.
        aspect = "equal" if few else "auto"
        picture = axes.imshow(share_kk, cmap=_make_blues(), vmin=0, vmax=1, interpolation="nearest", aspect=aspect)
        axes.set_xticks(range(len(names)), names, rotation=90 if upright else 0, fontsize=size, color=INK)
        axes.set_yticks(range(len(names)), names, fontsize=size)
        axes.set_xlabel("predicted")
        axes.set_ylabel("actual")
        axes.set_title(title or f"Confusion of {int(confusion_kk.sum()):,} test images")
        axes.spines[:].set_visible(False)
        axes.tick_params(which="both", length=0)
        if few:
            axes.set_xticks(np.arange(-0.5, num_classes), minor=True)
            axes.set_yticks(np.arange(-0.5, num_classes), minor=True)
            axes.grid(which="minor", color="white", linewidth=1.5)
            _annotate(axes, confusion_kk, share_kk)
        bar = figure.colorbar(picture, ax=axes, fraction=0.04, pad=0.03, label="share of the actual class")
        bar.outline.set_visible(False)
    return sink.getvalue()


def draw_classes(figures: Sequence[ClassFigures]) -> bytes:
    """Draw recall and F1 of each class with its support, worst F1 first; of many classes the 40 worst."""
    occurring = [(f, f.f1.value, f.recall.value) for f in figures if f.f1 and f.recall]
    ordered = sorted(occurring, key=lambda row: (*row[1:], make_natural_key(row[0].name)))[:SHOWN_BARS]
    shown = ordered[::-1]
    place_n = np.arange(len(shown))
    with open_figure(8.4, 1.5 + 0.3 * len(shown), [f.name for f, _, _ in shown]) as (figure, sink):
        axes = figure.add_subplot()
        axes.barh(place_n, [recall for _, _, recall in shown], height=0.66, color=PALE_BLUE, label="recall")
        axes.barh(place_n, [f1 for _, f1, _ in shown], height=0.28, color=BLUE, label="F1")
        for place, (row, f1, _) in zip(place_n, shown, strict=True):
            text = f"{f1:.3f}   n={row.support:,}"
            axes.text(1.015, place, text, va="center", fontsize=8, color=MUTED, clip_on=False)
        axes.set_yticks(place_n, [_cut(f.name) for f, _, _ in shown])
        axes.set_ylim(-0.6, len(shown) - 0.4)
        axes.set_xlim(0, 1)
        axes.grid(axis="x")
        axes.spines[:].set_visible(False)
        many = len(occurring) > len(shown)
        axes.set_title(f"The {len(shown)} of {len(occurring)} classes with the lowest F1" if many else "Recall and F1")
        axes.legend(
            loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=2, frameon=False, borderaxespad=0.3, handlelength=1.2
        )
    return sink.getvalue()


def draw_outcomes(outcomes: Sequence[LabelCounts], *, title: str = "Found, missed and wrongly given") -> bytes:
    """Draw how often each class is found, missed and wrongly given, worst first; of many classes the 40 worst.

    All as a share of the images that have the class: to the right found and missed, to the left wrongly given.
    """
    occurring = [o for o in outcomes if o.found + o.missed > 0]
    ordered = sorted(occurring, key=lambda o: (2 * o.found / (2 * o.found + o.missed + o.extra), o.name))
    shown = ordered[:SHOWN_BARS][::-1]
    place_n, support_n = np.arange(len(shown)), np.array([o.found + o.missed for o in shown])
    found_n = np.array([o.found for o in shown]) / support_n
    extra_n = np.minimum(np.array([o.extra for o in shown]) / support_n, 1.0)
    reach = max(0.1, float(extra_n.max(initial=0.0)))
    with open_figure(8.4, 1.9 + 0.3 * len(shown), [o.name for o in shown]) as (figure, sink):
        axes = figure.add_subplot()
        axes.barh(place_n, found_n, height=0.62, color=GREEN, label="found")
        axes.barh(place_n, 1 - found_n, left=found_n, height=0.62, color=PALE_GREEN, label="missed")
        axes.barh(place_n, -extra_n, height=0.62, color=RED, label="wrongly given")
        for place, one in zip(place_n, shown, strict=True):
            text = f"{one.found:,} of {one.found + one.missed:,}" + (f", {one.extra:,} too many" if one.extra else "")
            axes.text(1.02, place, text, va="center", fontsize=8, color=MUTED)
        axes.axvline(0, color=INK, linewidth=0.8)
        axes.set_yticks(place_n, [_cut(o.name) for o in shown])
        axes.set_ylim(-0.6, len(shown) - 0.4)
        ticks = [t for t in (-1, -0.75, -0.5, -0.25, 0, 0.25, 0.5, 0.75, 1) if t >= -reach]
        axes.set(xlim=(-reach, 1), xlabel="share of the images that have the class")
        axes.set_xticks(ticks, ["≥ 100 %" if t == -1 else f"{100 * abs(t):.0f} %" for t in ticks])
        axes.grid(axis="x")
        axes.spines[:].set_visible(False)
        many = f"the {len(shown)} of {len(occurring)} classes with the lowest F1"
        axes.set_title(title + (f": {many}" if len(occurring) > len(shown) else ""))
        if shown:
            figure.legend(loc="outside lower center", ncols=3, frameon=False, handlelength=1.2)
    return sink.getvalue()


def draw_confidence(confidence_n: NDArray[np.floating], hits_n: NDArray[np.bool_]) -> bytes:
    """Draw how often an answer of some confidence is right, and how many answers have which confidence.

    Each dot holds (nearly) equally many images, with its 95 % interval (Wilson); no line leads to a dot of one image.
    """
    bins = compute_equal_bins(confidence_n, hits_n)
    error = compute_calibration_error(compute_confidence_bins(confidence_n, hits_n))
    with open_figure(9.6, 4.2) as (figure, sink):
        left, right = figure.subplots(1, 2)
        left.plot([0, 1], [0, 1], color=MUTED, linewidth=1, linestyle=(0, (4, 3)), label="perfectly calibrated")
        joined = [b for b in bins if b.count > 1]
        left.plot(
            [b.confidence for b in joined], [b.accuracy for b in joined], color=PALE_BLUE, linewidth=1.5, zorder=2
        )
        for b in bins:
            bar = compute_wilson(round(b.accuracy * b.count), b.count)
            left.vlines(b.confidence, bar.low, bar.high, color=PALE_BLUE, linewidth=3, zorder=2)
        left.scatter([b.confidence for b in bins], [b.accuracy for b in bins], s=36, color=BLUE, zorder=3)
        left.set(xlim=(0, 1.03), ylim=(0, 1.03), xlabel="confidence", ylabel="share that is right")
        left.set_title(f"Reliability (calibration error {error:.3f})")
        left.legend(loc="upper left", frameon=False)
        left.grid()
        edges = np.linspace(0, 1, 11)
        groups = [confidence_n[hits_n], confidence_n[~hits_n]]
        labels = [f"right ({len(groups[0]):,})", f"wrong ({len(groups[1]):,})"]
        for group, color, label in zip(groups, (GREEN, RED), labels, strict=True):  # each over the whole of its bins
            right.hist(group, bins=edges, color=color, alpha=0.6, label=label, rwidth=0.95)
        right.set_yscale("symlog", linthresh=1)
        right.set(xlim=(0, 1), xlabel="confidence", ylabel="images (logarithmic)")
        ticks = [t for t in (0, 1, 10, 100, 1_000, 10_000, 100_000, 1_000_000) if t <= 2 * len(hits_n)]
        right.set_yticks(ticks, [f"{t:,}" for t in ticks], minor=False)
        right.set_yticks([], minor=True)
        right.set_title("Confidence of the answers")
        right.legend(loc="upper left", frameon=False)
        right.grid(axis="y")
    return sink.getvalue()


def draw_mistakes(mistakes: Sequence[Mistake], num_wrong: int, num_test: int) -> bytes:
    """Draw up to 25 wrong answers, worst first: actual class above, answered class and confidence below."""
    shown = mistakes[: MISTAKE_COLUMNS * MISTAKE_ROWS]
    rows = math.ceil(len(shown) / MISTAKE_COLUMNS)
    title = (
        f"The {len(shown)} worst of {num_wrong:,} mistakes" if num_wrong > len(shown) else f"All {num_wrong} mistakes"
    )
    title = title if num_wrong else "No mistakes"
    names = [name for m in shown for name in (m.actual, m.predicted)]
    with open_figure(9.6, 0.6 + CELL_HEIGHT * 1.88 * rows, names) as (figure, sink):
        # One pair of axes for all images, each 1 wide: 25 pairs of axes take three times as long.
        axes = figure.add_subplot(aspect="equal")
        axes.axis("off")
        axes.set_title(f"{title} on {num_test:,} test images")
        for number, mistake in enumerate(shown):
            row, column = divmod(number, MISTAKE_COLUMNS)
            _place_mistake(axes, mistake, column + 0.5, row * CELL_HEIGHT + CELL_HEIGHT / 2)
        axes.set(xlim=(0, MISTAKE_COLUMNS), ylim=(max(rows, 0.01) * CELL_HEIGHT, 0))
    return sink.getvalue()


def _place_mistake(axes: Any, mistake: Mistake, x: float, y: float) -> None:
    """Put an image into a square around (x, y), its class above and the answer below."""
    height, width = mistake.image_hwc.shape[:2]
    half_w, half_h = (0.47 * side / max(height, width) for side in (width, height))
    smooth = "antialiased" if max(height, width) >= SMOOTH_PX else "nearest"
    extent = (x - half_w, x + half_w, y + half_h, y - half_h)
    axes.imshow(mistake.image_hwc, extent=extent, interpolation=smooth, aspect="equal")
    said = f"said {_cut(mistake.predicted, 15)}  {mistake.confidence:.2f}"
    style = {"ha": "center", "va": "center", "fontsize": 8}
    axes.text(x, y - 0.54, f"{mistake.verb} {_cut(mistake.actual, 20)}", color=GREEN, fontweight="bold", **style)
    axes.text(x, y + 0.54, said, color=RED, **style)


def _annotate(axes: Any, confusion_kk: IntArray, share_kk: NDArray[np.float64]) -> None:
    size = 10 if len(confusion_kk) <= 6 else 8 if len(confusion_kk) <= 14 else 6.5
    for row, column in np.argwhere(confusion_kk > 0):
        color = "white" if share_kk[row, column] > 0.55 else INK
        axes.text(column, row, f"{confusion_kk[row, column]:,}", ha="center", va="center", fontsize=size, color=color)


def _make_blues() -> Any:
    """Return a colour map on which 1 % can still be told from 0 %."""
    from matplotlib.colors import LinearSegmentedColormap

    stops = [(0.0, "#f3f5f8"), (0.001, "#d5e3fa"), (0.2, "#9dbdf3"), (0.6, "#3f7be0"), (1.0, "#123c86")]
    return LinearSegmentedColormap.from_list("shares", stops, N=1024)


def _cut(name: str, chars: int = NAME_CHARS) -> str:
    flat = " ".join(name.split())
    return flat if len(flat) <= chars else f"{flat[: chars - 1]}…"


@contextlib.contextmanager
def open_figure(width: float, height: float, texts: Sequence[str] = ()) -> Iterator[tuple[Any, io.BytesIO]]:
    """Yield an empty figure (size in inches) and the buffer that holds its PNG afterwards. Ignores user settings.

    `texts` are names that may need other fonts than ours.
    """
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    sink = io.BytesIO()
    with matplotlib.rc_context(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing", category=UserWarning)
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(cast(Any, {**STYLE, "font.family": find_families(texts)}))
        figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained", facecolor="white")
        FigureCanvasAgg(figure)
        yield figure, sink
        figure.savefig(sink, format="png", metadata={"Software": None})
