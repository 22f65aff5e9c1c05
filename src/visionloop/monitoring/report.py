"""The page about a window: the verdict, each check with its numbers, which class grew, the strangest images. Pure.

One HTML file that needs nothing else. Every text is escaped by Jinja. The styles are those of the report of a retrain.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from markupsafe import Markup

from visionloop.monitoring.judge import Verdict
from visionloop.monitoring.quality import ClassShare, LabelledAccuracy
from visionloop.promotion.drawings import Span, choose_span, draw_strip
from visionloop.promotion.report import format_interval, load_template
from visionloop.records import Interval

SHOWN_CLASSES = 30
HEADLINES = {
    "broken": "Broken: the data is not sound, so nothing is said of the model",
    "drift": "Drift: the images are not like those before",
    "quality": "Quality: by its labels the model is right too seldom",
    "service": "Service: the images are as before, the service is not",
    "fine": "Fine: nothing has changed",
    "learning": "Learning: too little to compare with yet",
}
TODO = {
    "broken": "Look at what sends the images. A retrain does not help: it would learn from broken data.",
    "drift": "Look at the images below. If they are to stay: label some of them, ingest, retrain. If this is normal: "
    "`visionloop monitor --accept --why ...`.",
    "quality": "Look at what was answered wrong, ingest these labels, retrain.",
    "service": "Look at the server, the ledger and MLflow.",
    "fine": "Nothing is to be done.",
    "learning": "Nothing is to be done yet: it learns from windows with enough images.",
}
# As in the report of a retrain: green, red, and what cannot be told.
STYLES = {"fine": "passed", "learning": "inconclusive", "service": "inconclusive"}
MARKS = {"alert": "fail", "fine": "pass", "unknown": "unsure"}
WORDS = {"alert": "alert", "fine": "fine", "unknown": "cannot tell"}
KINDS = {
    "broken": "Is the data sound?",
    "drift": "Is it like before?",
    "quality": "Is it right?",
    "service": "Is the service well?",
}


@dataclass(frozen=True)
class Page:
    """All that a page shows. `pictures`: sha256 -> data URI, of those of `farthest` that were kept."""

    verdict: Verdict
    shares: Sequence[ClassShare]
    farthest: Sequence[Mapping[str, Any]]
    pictures: Mapping[str, str]
    expected: Interval | None
    labelled: LabelledAccuracy


def make_monitor_report(page: Page) -> str:
    """Return the page as HTML."""
    verdict = page.verdict
    shares = page.shares[:SHOWN_CLASSES]
    span = choose_span([one.now for one in shares], *(one.before for one in shares)) if shares else Span(0, 1)
    return load_template("visionloop.monitoring", "report.html").render(
        style=_load_style(),
        verdict=verdict,
        headline=HEADLINES[verdict.verdict],
        todo=TODO[verdict.verdict],
        style_class=STYLES.get(verdict.verdict, "refused"),
        start=verdict.start[:16].replace("T", " "),
        end=verdict.end[:16].replace("T", " "),
        against=_tell_reference(verdict),
        groups=[(title, _make_rows(verdict, kind)) for kind, title in KINDS.items()],
        expected=format_interval("accuracy", page.expected) if page.expected else None,
        labelled=format_interval("accuracy", page.labelled.accuracy) if page.labelled.accuracy else None,
        labels=page.labelled,
        shares=[
            {
                "name": one.name,
                "before": f"{100 * one.before:.1f} %",
                "now": format_interval("share", one.now),
                "grew": one.grew,
                "drawing": draw_strip({"candidate": one.now}, span, one.before),
            }
            for one in shares
        ],
        more_classes=len(page.shares) - len(shares),
        farthest=[{**one, "picture": page.pictures.get(one["image_sha256"], "")} for one in page.farthest],
    )


def _tell_reference(verdict: Verdict) -> str:
    if not verdict.reference:
        return "the validation side of the model, because no window of it has been accepted yet"
    number = len(verdict.reference)
    noun = f"accepted window{'s' * (number != 1)} of this model"
    return f"{number} {noun}, {verdict.reference[0]} to {verdict.reference[-1]}"


def _make_rows(verdict: Verdict, kind: str) -> list[dict[str, Any]]:
    order = {"alert": 0, "unknown": 1, "fine": 2}
    rows = [check for check in verdict.checks if check["kind"] == kind]
    return [
        {
            **check,
            "title": check["name"].replace("_", " "),
            "mark": MARKS[check["state"]],
            "word": WORDS[check["state"]],
        }
        for check in sorted(rows, key=lambda one: order[one["state"]])
    ]


@cache
def _load_style() -> Markup:
    """Return the styles of the report of a retrain, so that both pages look alike."""
    text = files("visionloop.promotion").joinpath("report.html").read_text(encoding="utf-8")
    return Markup(text.partition("<style>")[2].partition("</style>")[0])
