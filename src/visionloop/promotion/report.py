"""The report of a retrain: one self-contained HTML page about a decision of the gate. Pure: reads and writes nothing.

The verdict first, each rule with its numbers; candidate beside champion; the images whose verdict changed; classes and
slices; how far the confidence can be believed; what the data and the params changed. Every text is escaped by Jinja.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from typing import Any

import numpy as np
from jinja2 import Environment, StrictUndefined, Template
from markupsafe import escape

from visionloop.data.compare import Diff
from visionloop.evaluation.answers import Answers, join_names
from visionloop.evaluation.metrics import compute_equal_bins
from visionloop.evaluation.promises import compute_risk_curve
from visionloop.evaluation.report import TITLES
from visionloop.evaluation.resampling import IntArray, compute_share_interval, describe_images, sum_keys
from visionloop.evaluation.slices import Slice
from visionloop.params.gate import LOWER_IS_BETTER
from visionloop.promotion.drawings import ROLES, Span, choose_span, draw_curves, draw_reliability, draw_strip
from visionloop.promotion.gate import APPROVED
from visionloop.records import Card, Decision, Interval, RuleResult

SHOWN_CHANGED = 24  # images of each way
SHOWN_SHEET = 9
TOP_BARS = 10
SHOWN_ROWS = 30
# What a verdict means, with a champion and without one.
VERDICTS = {
    "passed": ("Passed: the candidate may replace the champion", "Passed: the candidate may be the first champion"),
    "refused": ("Refused: the champion stays", "Refused: there is still no champion"),
    "inconclusive": ("Inconclusive: the data cannot tell, so the champion stays", "Inconclusive: the data cannot tell"),
    "waiting": ("Waiting: a person has to approve", "Waiting: a person has to approve"),
}
SAME = "The candidate is the champion itself: nothing moves"
NOTHING = "\N{EN DASH}"
MARKS = {True: "pass", False: "fail", None: "unsure"}
WORDS = {True: "passed", False: "failed", None: "cannot tell"}


@dataclass(frozen=True)
class Judged:
    """One model on the test side: its card, and its answers in the order of classes that both models share."""

    digest: str
    card: Card
    answers: Answers


@dataclass(frozen=True)
class RetrainFacts:
    """All that a report shows. `slices` are places among the test images; `sha256_n` names them in the same order.

    `curves` are loss by epoch: role-free names such as `train/loss`. `origin` is told as it is: what -> found. `names`
    is how candidate and champion are called; others than these two words make it a comparison that decides nothing.
    """

    decision: Decision
    candidate: Judged
    champion: Judged | None
    sha256_n: Sequence[str]
    origins: Sequence[str]
    slices: Sequence[Slice] = ()
    diff: Diff | None = None
    leaks: Mapping[str, int] = field(default_factory=dict)
    curves: Mapping[str, Sequence[tuple[float, float]]] = field(default_factory=dict)
    origin: Mapping[str, str] = field(default_factory=dict)
    names: tuple[str, str] = ROLES

    @property
    def decides(self) -> bool:
        return self.names == ROLES


def choose_pictures(facts: RetrainFacts) -> list[str]:
    """Return the sha256 of the images that the page shows, each once."""
    rows = [row for _, rows_n in _list_changed(facts) for row in rows_n]
    rows += [int(row) for row in _choose_sheet(facts.candidate.answers)]
    return list(dict.fromkeys(facts.sha256_n[row] for row in rows))


def make_retrain_report(facts: RetrainFacts, shown: Mapping[str, str]) -> str:
    """Return the page as HTML. `shown`: sha256 -> data URI, of the images that `choose_pictures` names."""
    decision = facts.decision
    models = {"candidate": facts.candidate, **({"champion": facts.champion} if facts.champion else {})}
    return load_template("visionloop.promotion", "report.html").render(
        decision=decision,
        headline=_make_headline(facts),
        alone=_tell_alone(decision),
        decides=facts.decides,
        names=dict(zip(ROLES, facts.names, strict=True)),
        images=describe_images(decision.num_test, decision.num_keys or decision.num_test, "test images"),
        rules=[_make_rule(rule) for rule in decision.rules],
        metrics=_make_metrics(decision),
        changed=[(title, [_make_changed(facts, row, shown) for row in rows]) for title, rows in _list_changed(facts)],
        sheet=[_make_sheet_cell(facts, int(row), shown) for row in _choose_sheet(facts.candidate.answers)],
        classes=_make_class_rows(models),
        slices=_make_slice_rows(models, facts.slices),
        shown_rows=SHOWN_ROWS,
        reliability=draw_reliability(
            {role: compute_equal_bins(m.answers.confidence_n, m.answers.hits_n) for role, m in models.items()}
        ),
        risk=draw_curves(
            {role: _make_risk(m.answers) for role, m in models.items()}, "answered", "wrong among them", shares=True
        ),
        curves=draw_curves(_name_curves(facts.curves), "epoch", "loss", shares=False) if facts.curves else "",
        diff=facts.diff,
        new_classes=_list_new(models),
        leaks=facts.leaks,
        settings=_compare_settings(models),
        origin=facts.origin,
        models=models,
        has_champion=facts.champion is not None,
    )


def approve_page(page: str, decision: Decision) -> str:
    """Return the page about a decision that waited, with who let it pass and why before all else. The rest stays."""
    words = [rule.found.partition(APPROVED)[2] for rule in decision.rules if APPROVED in rule.found]
    told = escape(f"Decision {decision.number}, {decision.decided_at}: approved by {'; '.join(dict.fromkeys(words))}")
    passed = VERDICTS[decision.verdict][decision.champion is None]
    page = page.replace(f"<h1>{VERDICTS['waiting'][0]}</h1>", f'<h1>{passed}</h1>\n<p class="lead">{told}</p>', 1)
    return page.replace('class="verdict waiting"', f'class="verdict {decision.verdict}"', 1)


def _make_headline(facts: RetrainFacts) -> str:
    decision = facts.decision
    if not facts.decides:
        return " against ".join(facts.names)
    return SAME if decision.is_same_model else VERDICTS[decision.verdict][decision.champion is None]


def _tell_alone(decision: Decision) -> str:
    """Say why there are no answers of a champion, where there are none."""
    if decision.champion is None:
        return "There was no champion to compare with."
    if decision.champion == decision.candidate:
        return "It is the champion itself, so there is nothing to compare with."
    return "The champion could not be asked here, so nothing was compared: the rules say why."


@cache
def load_template(package: str, name: str) -> Template:
    """Return a page of a package of ours, in which every text is escaped, and a name that is not given is an error."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(files(package).joinpath(name).read_text(encoding="utf-8").strip())


def _make_rule(rule: RuleResult) -> dict[str, Any]:
    drawing = ""
    if rule.value is not None:
        interval, lines = Interval(rule.value, rule.low, rule.high), [] if rule.line is None else [rule.line]
        drawing = draw_strip({"candidate": interval}, choose_span([interval], *lines), rule.line)
    is_on = rule.mode == "on"
    return {
        "name": rule.rule.replace("_", " "),
        "mark": MARKS[rule.passed] if is_on else "dry",
        "word": WORDS[rule.passed] + ("" if is_on else " (dry run)"),
        "found": rule.found,
        "expected": rule.expected,
        "drawing": drawing,
    }


def _make_metrics(decision: Decision) -> list[dict[str, Any]]:
    """A figure that only one of them has (how often it answers, say) is a dash for the other."""
    rows, models = [], {"candidate": decision.metrics, "champion": decision.champion_metrics}
    for name in decision.metrics | decision.champion_metrics:
        marks = {role: Interval.from_json(found[name]) for role, found in models.items() if name in found}
        is_loss = name in LOWER_IS_BETTER
        span = choose_span(list(marks.values()))
        rows.append(
            {
                "title": TITLES.get(name, name.replace("_", " ")) + (" (lower is better)" if is_loss else ""),
                "texts": {r: format_interval(name, marks[r]) if r in marks else NOTHING for r in models},
                "drawing": draw_strip(marks, span),
            }
        )
    return rows


def format_interval(name: str, interval: Interval) -> str:
    """Return a figure with its bounds, as shares are told: `97.9 % (95.5 … 99.0)`."""
    plain = name in LOWER_IS_BETTER or name in {"auc", "pr_auc"}
    factor, digits = (1, 3) if plain else (100, 1)
    text = f"{factor * interval.value:.{digits}f}" + ("" if plain else " %")
    if interval.low is None or interval.high is None:
        return text if name == "ece" else f"{text} (too few to say how sure)"
    return f"{text} ({factor * interval.low:.{digits}f} … {factor * interval.high:.{digits}f})"


def _list_changed(facts: RetrainFacts) -> list[tuple[str, list[int]]]:
    """Return the images that only one of the models has right, the clearest first, in both directions."""
    if facts.champion is None:
        return []
    ours, theirs = facts.candidate.answers, facts.champion.answers
    one, other = facts.names
    wrong, right = f"{one} wrong, {other} right", f"{one} right, {other} wrong"
    if facts.decides:
        wrong, right = "Wrong now, right before", "Right now, wrong before"
    gain_n = ours.merit_n - theirs.merit_n
    ways = []
    for title, mine_n, order in (
        (wrong, theirs.hits_n & ~ours.hits_n, gain_n),
        (right, ours.hits_n & ~theirs.hits_n, -gain_n),
    ):
        rows_n = np.flatnonzero(mine_n)
        rows_n = rows_n[np.argsort(order[rows_n], kind="stable")]
        more = f": {len(rows_n):,}" + (f", {SHOWN_CHANGED} of them here" if len(rows_n) > SHOWN_CHANGED else "")
        ways.append((title + more, [int(row) for row in rows_n[:SHOWN_CHANGED]]))
    return ways


def _make_changed(facts: RetrainFacts, row: int, shown: Mapping[str, str]) -> dict[str, Any]:
    assert facts.champion is not None
    cell: dict[str, Any] = {
        "truth": _name_truth(facts, row),
        "file": facts.origins[row],
        **_make_picture(facts, row, shown),
    }
    for role, answers in (("candidate", facts.candidate.answers), ("champion", facts.champion.answers)):
        cell[role] = _name_answer(answers, row)
    return cell


def _name_truth(facts: RetrainFacts, row: int) -> str:
    return join_names(_name_one(facts.candidate.answers, facts.candidate.answers.labels, row))


def _name_answer(answers: Answers, row: int) -> dict[str, Any]:
    names = join_names(_name_one(answers, answers.chosen, row))
    return {"name": names, "confidence": float(answers.confidence_n[row]), "is_right": bool(answers.hits_n[row])}


def _name_one(answers: Answers, choices: Any, row: int) -> tuple[str, ...]:
    if choices.ndim == 1:
        return (answers.classes[int(choices[row])],)
    return tuple(answers.classes[int(k)] for k in np.flatnonzero(choices[row]))


def _choose_sheet(answers: Answers) -> IntArray:
    """Return a few images from the surest to the least sure answer, evenly spaced."""
    order_n = np.argsort(-answers.confidence_n, kind="stable")
    places = np.linspace(0, len(order_n) - 1, min(SHOWN_SHEET, len(order_n))).round().astype(np.int64)
    return order_n[places]


def _make_sheet_cell(facts: RetrainFacts, row: int, shown: Mapping[str, str]) -> dict[str, Any]:
    answers = facts.candidate.answers
    probs_k = answers.probs_nk[row]
    top = np.argsort(-probs_k, kind="stable")[:TOP_BARS]
    true = set(_name_one(answers, answers.labels, row))
    bars = [
        {"name": answers.classes[int(k)], "share": float(probs_k[k]), "is_true": answers.classes[int(k)] in true}
        for k in top
    ]
    answer = _name_answer(answers, row)
    return {"truth": _name_truth(facts, row), "bars": bars, **answer, **_make_picture(facts, row, shown)}


def _make_picture(facts: RetrainFacts, row: int, shown: Mapping[str, str]) -> dict[str, Any]:
    """The page names each image that it shows: `forget` finds it by that."""
    sha256 = facts.sha256_n[row]
    return {"picture": shown.get(sha256), "sha256": sha256}


def _make_class_rows(models: Mapping[str, Judged]) -> list[dict[str, Any]]:
    """Return each class with both models' recall, the largest loss first."""
    answers = models["candidate"].answers
    rows = []
    for k, name in enumerate(answers.classes):
        has_n = answers.labels[:, k].astype(bool) if answers.is_several else answers.labels == k
        rows.append(_make_part(models, name, np.flatnonzero(has_n), k))
    rows.sort(key=lambda row: (row["change"] is None, row["change"] or 0.0, row["value"] or 0.0))
    return _draw_rows(rows)


def _make_slice_rows(models: Mapping[str, Judged], slices: Sequence[Slice]) -> list[dict[str, Any]]:
    rows = [_make_part(models, each.name, each.rows_n, None) for each in slices]
    rows.sort(key=lambda row: (row["change"] or 0.0, row["value"] or 0.0))
    return _draw_rows(rows)


def _draw_rows(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Add a drawing to each row, all on one scale: from the lowest bound, in steps of a tenth, to all."""
    bounds = [b for row in rows for one in row["marks"].values() if one for b in (one.value, one.low) if b is not None]
    low = max(0, int(10 * min(bounds, default=0.0)))
    scale = f"{10 * low} … 100 %"
    return [{**row, "drawing": draw_strip(row["marks"], Span(low / 10, 1)), "scale": scale} for row in rows]


def _make_part(models: Mapping[str, Judged], name: str, rows_n: IntArray, class_k: int | None) -> dict[str, Any]:
    """Return the share of right answers on some images, of both models. `class_k`: whether that class is found."""
    marks: dict[str, Interval | None] = {}
    for role, model in models.items():
        if name not in model.card.classes and class_k is not None:
            marks[role] = None
        else:
            marks[role] = _compute_share(model.answers, rows_n, class_k)
    ours, theirs = marks["candidate"], marks.get("champion")
    change = ours.value - theirs.value if ours and theirs else None
    return {
        "name": name,
        "images": len(rows_n),
        "texts": {role: format_interval("", one) if one else NOTHING for role, one in marks.items()},
        "marks": marks,
        "change": change,
        "value": ours.value if ours else None,
    }


def _compute_share(answers: Answers, rows_n: IntArray, class_k: int | None) -> Interval | None:
    if not len(rows_n):
        return None
    if class_k is None:
        hits_n = answers.hits_n[rows_n]
    else:
        chosen = answers.chosen
        hits_n = chosen[rows_n, class_k].astype(bool) if chosen.ndim == 2 else chosen[rows_n] == class_k
    key_n = answers.key_n[rows_n]
    return compute_share_interval(sum_keys(hits_n, key_n), sum_keys(np.ones(len(rows_n)), key_n))


def _make_risk(answers: Answers) -> list[tuple[float, float]]:
    """Return at most 200 points (share that is answered, share of wrong answers among them)."""
    coverage_n, risk_n = compute_risk_curve(answers.confidence_n, answers.hits_n)
    places = np.unique(np.linspace(0, len(coverage_n) - 1, 200).round().astype(int))
    return [(float(coverage_n[i]), float(risk_n[i])) for i in places]


def _name_curves(curves: Mapping[str, Sequence[tuple[float, float]]]) -> dict[str, Sequence[tuple[float, float]]]:
    """The validation curve is drawn as the candidate's, that of training fainter."""
    roles = {"val/loss": "candidate", "train/loss": "champion"}
    return {role: curves[name] for name, role in roles.items() if curves.get(name)}


def _list_new(models: Mapping[str, Judged]) -> list[str]:
    if "champion" not in models:
        return []
    return [name for name in models["candidate"].card.classes if name not in models["champion"].card.classes]


def _compare_settings(models: Mapping[str, Judged]) -> list[tuple[str, str, str]]:
    """Return the settings in which the two models differ: (key, champion, candidate)."""
    if "champion" not in models:
        return []
    ours, theirs = (dict(_flatten(models[role].card.params)) for role in ("candidate", "champion"))
    keys = sorted(ours.keys() | theirs.keys())
    return [(k, str(theirs.get(k, NOTHING)), str(ours.get(k, NOTHING))) for k in keys if ours.get(k) != theirs.get(k)]


def _flatten(sections: Mapping[str, Any], before: str = "") -> list[tuple[str, Any]]:
    flat: list[tuple[str, Any]] = []
    for key, value in sections.items():
        name = f"{before}{key}"
        flat += _flatten(value, f"{name}.") if isinstance(value, Mapping) else [(name, value)]
    return flat
