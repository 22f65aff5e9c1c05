"""What an evaluation found, as texts: the report, and tables as JSON and CSV. Same input, same bytes. Writes no file.

report.html     one self-contained page, for light and dark screens; loads nothing from the network
metrics.json    the figures that people compare, one number each: as wide as a terminal in `dvc metrics show`
intervals.json  all figures, with their intervals, and those of each class
per_class.csv, slices.csv, predictions.csv

Classes of the tables are in the order in which people count.
"""

import base64
import csv
import io
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from html import escape
from typing import Any

import numpy as np

from visionloop.data.fonts import describe_numbers
from visionloop.evaluation.answers import Answers
from visionloop.evaluation.baselines import Baseline
from visionloop.evaluation.confidence_plots import describe_confidence
from visionloop.evaluation.metrics import ClassFigures
from visionloop.evaluation.resampling import IntArray
from visionloop.evaluation.runtimes import RuntimeCheck
from visionloop.evaluation.slices import SliceFigures
from visionloop.records import LABEL_SEPARATOR, Card, Interval, Pin, make_natural_key

SHARES = ("precision", "recall", "f1")
COMPARED = ("accuracy", "macro_f1", "map", "auc", "log_loss", "ece", "answered", "answered_accuracy")


def sort_classes(class_figures: Sequence[ClassFigures]) -> list[ClassFigures]:
    """Return the classes as people count: 2 before 10."""
    return sorted(class_figures, key=lambda row: make_natural_key(row.name))


def make_metrics_json(metrics: Mapping[str, Interval], num_images: int, num_keys: int) -> str:
    """Return metrics.json: a flat object of a few numbers. `num_groups` is in it where images belong together."""
    values = {name: metrics[name].value for name in COMPARED if name in metrics}
    groups = {"num_groups": num_keys} if num_keys < num_images else {}
    return _encode({**values, "num_test": num_images, **groups})


@dataclass(frozen=True)
class Judged:
    """All that an evaluation found. `confusion_kk` has actual classes as rows (for multilabel: `compute_swaps`)."""

    metrics: Mapping[str, Interval]
    class_figures: Sequence[ClassFigures]
    confusion_kk: IntArray
    slices: Sequence[SliceFigures] = ()
    baselines: Sequence[Baseline] = ()
    runtimes: Sequence[RuntimeCheck] = ()


def make_intervals_json(facts: Mapping[str, Any], judged: Judged) -> str:
    """Return intervals.json. `facts`, JSON values, come first."""
    value = {
        **facts,
        "metrics": {name: interval.to_json() for name, interval in judged.metrics.items()},
        "classes": [_describe_class(row) for row in sort_classes(judged.class_figures)],
        "slices": [asdict(row) for row in judged.slices],
        "baselines": [{**asdict(row), "verdict": row.verdict} for row in judged.baselines],
        "runtimes": [row.to_json() for row in judged.runtimes],
    }
    return _encode(value)


def _describe_class(row: ClassFigures) -> dict[str, Any]:
    shares = {name: share.to_json() if (share := getattr(row, name)) else None for name in SHARES}
    more = {} if row.average_precision is None else {"average_precision": row.average_precision}
    return {"name": row.name, "support": row.support, **shares, **more}


def make_class_table(class_figures: Sequence[ClassFigures]) -> str:
    """Return per_class.csv. What a class has no figure of is empty."""
    is_several = any(row.average_precision is not None for row in class_figures)
    bounds = [f"{name}_{bound}" for name in SHARES for bound in ("low", "high")]
    head = ["class", *SHARES, "support", *["average_precision"][:is_several], *bounds]
    rows = []
    for row in sort_classes(class_figures):
        shares = [getattr(row, name) for name in SHARES]
        values = [share.value if share else None for share in shares]
        limits = [limit for share in shares for limit in ((share.low, share.high) if share else (None, None))]
        rows.append([row.name, *values, row.support, *[row.average_precision][:is_several], *limits])
    return _write_table(head, rows)


def make_slice_table(slices: Sequence[SliceFigures]) -> str:
    """Return slices.csv, the lowest accuracy first."""
    rows = [[s.name, s.num_images, s.num_keys, s.accuracy.value, s.accuracy.low, s.accuracy.high] for s in slices]
    return _write_table(["slice", "images", "groups", "accuracy", "accuracy_low", "accuracy_high"], rows)


def make_prediction_table(sha256_n: Sequence[str], answers: Answers) -> str:
    """Return predictions.csv: one row for each image. Several labels are joined by `|`."""
    columns = zip(sha256_n, answers.name_labels(), answers.name_chosen(), answers.confidence_n, strict=True)
    rows = [[sha256, *map(LABEL_SEPARATOR.join, names), float(confidence)] for sha256, *names, confidence in columns]
    return _write_table(["sha256", "actual", "predicted", "confidence"], rows)


def _write_table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return a table as CSV: numbers with six places, None as nothing."""
    sink = io.StringIO()
    writer = csv.writer(sink, lineterminator="\n")
    writer.writerow(head)
    writer.writerows([f"{value:.6f}" if isinstance(value, float) else value for value in row] for row in rows)
    return sink.getvalue()


def _encode(value: Mapping[str, Any]) -> str:
    return json.dumps(value, indent=2, allow_nan=False) + "\n"


SHOWN_CONFUSIONS = 15
TITLES = {
    "accuracy": "Accuracy",
    "balanced_accuracy": "Balanced accuracy",
    "macro_f1": "Macro F1",
    "micro_f1": "Micro F1",
    "weighted_f1": "Weighted F1",
    "top_3": "Top 3",
    "top_5": "Top 5",
    "map": "Mean average precision",
    "log_loss": "Log loss",
    "brier": "Brier score",
    "ece": "Calibration error",
    "auc": "Area under ROC",
    "pr_auc": "Area under precision-recall",
    "precision": "Precision",
    "recall": "Recall",
    "answered": "Answered",
    "answered_accuracy": "Accuracy of the answered",
}
CAPTIONS = {
    "confusion": "Confusion matrix: actual and predicted classes",
    "outcomes": "How often each class is found, missed, and wrongly given",
    "per_class": "Recall and F1 of each class",
    "confidence": "How reliable the confidence is",
    "risk": "What not answering brings: the share of wrong answers when only the surest are answered",
    "threshold": "What a threshold gives on the validation side",
    "mistakes": "Wrong answers: the truth above, the answer and its confidence below",
}
VERDICTS = {"beaten": "beaten", "unclear": "no clear difference", "better": "better than the network"}
STYLE = """
:root { color-scheme: light dark; --page: #f5f6f8; --card: #fff; --ink: #1f2733; --muted: #6b7686; --line: #e3e7ed;
  --accent: #2f6fde; --bar: #dbe6fb; }
@media (prefers-color-scheme: dark) { :root { --page: #12161c; --card: #1b2129; --ink: #e6eaf0; --muted: #98a3b3;
  --line: #2c343f; --accent: #7ba6f5; --bar: #24406f; }
  img.chart { filter: invert(1) hue-rotate(180deg); mix-blend-mode: screen; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 32px 20px 64px; }
h1 { font-size: 26px; margin: 0 0 4px; } h2 { font-size: 18px; margin: 40px 0 12px; }
.lead, .note { color: var(--muted); margin: 0; }
.note { font-size: 13px; margin-bottom: 16px; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 12px; margin: 24px 0 8px; }
.card, figure, .table { background: var(--card); border: 1px solid var(--line); border-radius: 10px; }
.card { padding: 14px 16px; } .card b { display: block; font-size: 26px; font-weight: 650; line-height: 1.25; }
.card span, small { color: var(--muted); font-size: 13px; }
figure { margin: 0 0 16px; padding: 16px; overflow: hidden; }
figure img { display: block; max-width: 100%; margin: 0 auto; }
figcaption { color: var(--muted); font-size: 13px; margin-bottom: 12px; }
img.photos { background: #fff; border-radius: 6px; }
.table { overflow-x: auto; padding: 4px 0; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: 6px 16px; text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
th { color: var(--muted); font-weight: 500; font-size: 13px; border-bottom: 1px solid var(--line); }
tr + tr td { border-top: 1px solid var(--line); }
td.text, th.text { text-align: left; }
td.share { background: linear-gradient(90deg, var(--bar) var(--w), transparent var(--w)); }
code { font: 13px ui-monospace, monospace; overflow-wrap: anywhere; white-space: normal; }
td.value { text-align: left; white-space: normal; }
@media (max-width: 560px) { main { padding: 20px 12px 48px; }
  figure { overflow-x: auto; } figure img { max-width: 640px; }
  th, td { padding: 6px 8px; white-space: normal; } td small { display: block; } td.value { min-width: 55vw; } }
"""


@dataclass(frozen=True)
class ReportFacts:
    """What a report shows. `images` says how many test images there are; `figures` is a name of CAPTIONS -> PNG."""

    card: Card
    bundle_digest: str
    pin: Pin
    images: str
    judged: Judged
    figures: Mapping[str, bytes]


def make_report(facts: ReportFacts) -> str:
    """Return the page as HTML. All names are escaped."""
    title = f"{escape(facts.pin.name)}: evaluation of {facts.bundle_digest[:12]}"
    backbone = facts.card.network.get("backbone")
    lead = f"{len(facts.card.classes)} classes, {facts.images} of dataset version {facts.pin.version}"
    if backbone:
        lead += f", {escape(str(backbone))}"
    parts = [
        f'<h1>{title}</h1><p class="lead">{lead}</p>',
        f'<div class="cards">{"".join(_make_card(n, i, facts.card) for n, i in facts.judged.metrics.items())}</div>',
        '<p class="note">Below each figure is its 95 % interval: how far it could differ on other test images.</p>',
        _make_legend(facts.card.classes),
        *(_make_figure(name, facts.figures[name]) for name in CAPTIONS if name in facts.figures),
        f"<h2>Most frequent confusions</h2>{_make_confusions(facts)}",
        f"<h2>Classes</h2>{_make_classes(facts.judged.class_figures)}",
        *_make_comparisons(facts.judged),
        f"<h2>Where it comes from</h2>{_make_origin(facts)}",
    ]
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{title}</title>'
    body = "\n".join(parts)
    page = f'<html lang="en"><head>{head}<style>{STYLE}</style></head>\n<body><main>\n{body}\n</main></body></html>'
    return f"<!doctype html>\n{page}\n"


def _make_card(name: str, interval: Interval, card: Card) -> str:
    low, high = interval.low, interval.high
    bounds = (
        f"{_format(name, low)} … {_format(name, high)}" if low is not None and high is not None else "too few images"
    )
    bounds = "no interval" if name == "ece" else bounds
    of_class = f" of {card.classes[1]}" if name in {"precision", "recall"} else ""
    if name == "accuracy" and card.task == "multilabel":
        of_class = " (exact match)"
    title = escape(TITLES.get(name, name) + of_class)
    return f'<div class="card"><span>{title}</span><b>{_format(name, interval.value)}</b><span>{bounds}</span></div>'


def _make_figure(name: str, png: bytes) -> str:
    data = base64.b64encode(png).decode()
    kind = "photos" if name == "mistakes" else "chart"
    caption = CAPTIONS[name]
    image = f'<img class="{kind}" alt="{caption}" src="data:image/png;base64,{data}">'
    return f"<figure><figcaption>{caption}</figcaption>{image}</figure>"


def _make_confusions(facts: ReportFacts) -> str:
    off_kk = facts.judged.confusion_kk * ~np.eye(len(facts.judged.confusion_kk), dtype=bool)
    order = np.argsort(-off_kk, axis=None, kind="stable")[:SHOWN_CONFUSIONS]
    rows = []
    for actual, predicted in zip(*np.unravel_index(order, off_kk.shape), strict=True):
        if count := int(off_kk[actual, predicted]):
            share = count / facts.judged.class_figures[actual].support
            names = [escape(facts.card.classes[k]) for k in (actual, predicted)]
            rows.append(f'<td>{names[0]}</td><td class="text">{names[1]}</td><td>{count:,}</td>{_make_share(share)}')
    if not rows:
        return '<p class="note">None.</p>'
    several = facts.card.task == "multilabel"
    left, right = ("missed", "said instead") if several else ("actual", "predicted")
    head = f'<th>{left}</th><th class="text">{right}</th><th>images</th><th>share of the {left} class</th>'
    return _make_table(head, rows)


def _make_legend(classes: Sequence[str]) -> str:
    """Return what the numbers in the figures mean, where no font of this machine has the names."""
    numbers = describe_numbers(classes)
    return f'<p class="note">In the figures {escape(numbers)}.</p>' if numbers else ""


def _make_classes(class_figures: Sequence[ClassFigures]) -> str:
    ordered = sorted(class_figures, key=lambda f: (f.f1 is None, f.f1.value if f.f1 else 0, make_natural_key(f.name)))
    several = any(f.average_precision is not None for f in class_figures)
    rows = []
    for f in ordered:
        shares = "".join(_make_bounded(share) for share in (f.precision, f.recall, f.f1))
        average = f.average_precision
        shares += _make_bounded(None if average is None else Interval(average, None, None)) * several
        rows.append(f"<td>{escape(f.name)}</td>{shares}<td>{f.support:,}</td>")
    more = "<th>average precision</th>" if several else ""
    return _make_table(f"<th>class</th><th>precision</th><th>recall</th><th>F1</th>{more}<th>test images</th>", rows)


def _make_comparisons(judged: Judged) -> Iterator[str]:
    """Yield the tables of slices, baselines and runtimes, those that have rows."""
    if judged.slices:
        chance = f"Of {len(judged.slices)} slices a few look bad by chance."
        yield f'<h2>Slices</h2><p class="note">Parts of 30 or more test images, lowest accuracy first. {chance}</p>'
        rows = [
            f"<td>{escape(s.name)}</td>{_make_bounded(s.accuracy)}<td>{s.num_images:,}</td><td>{s.num_keys:,}</td>"
            for s in judged.slices
        ]
        yield _make_table("<th>slice</th><th>accuracy</th><th>images</th><th>groups</th>", rows)
    if judged.baselines:
        yield "<h2>Baselines</h2>"
        rows = [
            f"<td>{escape(b.name)}</td>{_make_bounded(b.accuracy)}<td>{_describe_gain(b.gain)}</td>"
            f"<td>{VERDICTS[b.verdict]}</td>"
            for b in judged.baselines
        ]
        yield _make_table("<th>baseline</th><th>accuracy</th><th>gain of the network</th><th></th>", rows)
    if judged.runtimes:
        yield "<h2>Runtimes</h2>"
        rows = [
            f"<td>{escape(r.name)}</td><td>{r.difference:.0e}</td><td>{r.num_changed:,}</td>"
            f"<td>{'&ndash;' if r.rise is None else f'{r.rise:+.3f}'}</td>"
            f"<td>{'approved' if r.is_approved else 'not approved' if r.predictor else 'does not load'}</td>"
            for r in judged.runtimes
        ]
        head = "<th>runtime</th><th>largest difference of a probability</th><th>other answers</th>"
        yield _make_table(f"{head}<th>log loss</th><th></th>", rows)


def _describe_gain(gain: Interval) -> str:
    bounds = "" if gain.low is None or gain.high is None else f" ({100 * gain.low:+.1f} … {100 * gain.high:+.1f})"
    return f"{100 * gain.value:+.1f} points{bounds}"


def _make_origin(facts: ReportFacts) -> str:
    height, width = facts.card.image_size
    values = {
        "Model (bundle digest)": f"<code>{escape(facts.bundle_digest)}</code>",
        "Dataset": f"{escape(facts.pin.name)} version {facts.pin.version}, {facts.pin.num_images:,} images",
        "Dataset digest": f"<code>{escape(facts.pin.digest)}</code>",
        "Input": f"{height} x {width} pixels, {escape(facts.card.resize)}",
        "Task": escape(facts.card.task),
    }
    if facts.card.threshold is not None:
        values["Threshold"] = f"{facts.card.threshold:.3f} for {escape(facts.card.classes[1])}"
    if facts.card.task == "multilabel":
        values["Thresholds"] = escape(_describe_thresholds(facts.card.thresholds or {}))
    values |= {escape(key): escape(value) for key, value in describe_confidence(facts.card).items()}
    values |= {escape(key): escape(str(value)) for key, value in _flatten(facts.card.params)}
    return _make_table("", [f'<td>{key}</td><td class="value">{value}</td>' for key, value in values.items()])


def _flatten(sections: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the keys of nested sections as params.yaml names them, `train.seed`, with their values."""
    for key, value in sorted(sections.items()):
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{before}{key}.")
        else:
            yield f"{before}{key}", "-" if value is None else value


def _describe_thresholds(thresholds: Mapping[str, float]) -> str:
    """One figure if all are equal, else each by its class."""
    if len(set(thresholds.values())) <= 1:
        return f"{next(iter(thresholds.values()), 0.5):.3f} for every class"
    return ", ".join(f"{name} {value:.3f}" for name, value in sorted(thresholds.items()))


def _make_table(head: str, rows: Sequence[str]) -> str:
    top = f"<thead><tr>{head}</tr></thead>" if head else ""
    body = "\n".join(f"<tr>{row}</tr>" for row in rows)
    return f'<div class="table"><table>{top}<tbody>{body}</tbody></table></div>'


def _make_share(share: float) -> str:
    return f'<td class="share" style="--w:{100 * share:.1f}%">{_format("", share)}</td>'


def _make_bounded(share: Interval | None) -> str:
    """Return a cell with a share and its interval; a dash where there is nothing to divide by."""
    if share is None:
        return "<td>&ndash;</td>"
    bounds = ""
    if share.low is not None and share.high is not None:
        bounds = f" <small>{100 * share.low:.0f} … {100 * share.high:.0f}</small>"
    return f'<td class="share" style="--w:{100 * share.value:.1f}%">{_format("", share.value)}{bounds}</td>'


def _format(name: str, value: float) -> str:
    return f"{value:.3f}" if name in {"log_loss", "auc", "pr_auc", "brier", "ece"} else f"{100 * value:.1f} %"
