"""The rules of the gate: floors, and a paired comparison with the champion. Pure: no disk, clock or global random.

Dimensions in names: n images (the same ones, in the same order, for both models), k classes, r resamples.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from visionloop.evaluation.label_metrics import Statistic, make_macro_f1
from visionloop.evaluation.metrics import compute_macro_f1, draw_rows
from visionloop.params import Gate
from visionloop.predictor import Choices
from visionloop.records import Interval, RuleResult

PASSED, REFUSED, INCONCLUSIVE = "passed", "refused", "inconclusive"


@dataclass(frozen=True)
class Difference:
    """One metric of candidate and champion. `low` and `high` bound the difference (quantiles alpha and 1 - alpha)."""

    metric: str
    candidate: float
    champion: float
    low: float
    high: float

    @property
    def value(self) -> float:
        return self.candidate - self.champion


def compute_difference(
    labels: Choices,
    candidate: Choices,
    champion: Choices,
    num_classes: int,
    section: Gate,
    *,
    resamples: int,
    seed: int,
) -> Difference:
    """Compare two models' answers by a paired percentile bootstrap: each resample holds the same images for both.

    Answers are one class for each image (n,), or several labels (n, k). Then accuracy is the share of exact matches.

    Efron & Tibshirani 1993, chapters 13 and 16; paired on test images, as Koehn 2004 does on sentences. The bounds are
    values that were drawn, never interpolated, so a bound above 0 means at least one image.
    """
    scores = [make_score(labels, chosen, num_classes, section) for chosen in (candidate, champion)]
    drawn_r = np.concatenate(
        [scores[0](rows_rn) - scores[1](rows_rn) for rows_rn in draw_rows(len(labels), resamples, seed)]
    )
    drawn_r = drawn_r.round(12)  # so that rounding errors do not make equal values differ
    everything = np.arange(len(labels))[None]
    return Difference(
        metric=section.metric,
        candidate=float(scores[0](everything)[0]),
        champion=float(scores[1](everything)[0]),
        low=float(np.quantile(drawn_r, section.alpha, method="lower")),
        high=float(np.quantile(drawn_r, 1 - section.alpha, method="higher")),
    )


def make_score(labels: Choices, chosen: Choices, num_classes: int, section: Gate) -> Statistic:
    """Return the metric of the gate as a function of resamples (r, n), as row numbers."""
    if section.metric == "accuracy":
        hits_n = labels == chosen if labels.ndim == 1 else (labels == chosen).all(axis=1)
        return lambda rows_rn: np.asarray(hits_n[rows_rn].mean(axis=1))
    if labels.ndim == 2:
        return make_macro_f1(labels.astype(bool), chosen.astype(bool))
    return lambda rows_rn: compute_macro_f1(labels[rows_rn], chosen[rows_rn], num_classes)


def check_floors(floors: Mapping[str, float], metrics: Mapping[str, Interval]) -> list[RuleResult]:
    """Compare each figure of the candidate with its floor: passed if it is at least the floor, else refused."""
    return [
        RuleResult(
            rule=f"floor {name}",
            passed=metrics[name].value >= floor,
            found=f"{name} {_percent(metrics[name].value)}",
            expected=f"at least {_percent(floor)}",
        )
        for name, floor in sorted(floors.items())
    ]


def check_difference(difference: Difference, section: Gate) -> RuleResult:
    """Apply `better` (the whole interval above 0) or `no_worse` (above -margin).

    Refused if the whole interval is below that line. None (inconclusive) if the line is inside the interval.
    """
    line = 0.0 if section.rule == "better" else -section.margin
    passed = True if difference.low > line else False if difference.high < line else None
    return RuleResult(
        rule=section.rule,
        passed=passed,
        found=(
            f"{difference.metric} {_percent(difference.candidate)} against {_percent(difference.champion)}: "
            f"difference {_points(difference.value)} points, {100 * (1 - 2 * section.alpha):g} % interval "
            f"{_points(difference.low)} ... {_points(difference.high)}"
        ),
        expected="an interval above 0" if section.rule == "better" else f"an interval above {_points(line)} points",
    )


def make_first_rule() -> RuleResult:
    """Return the rule that replaces the comparison while there is no champion: only the floors decide."""
    return RuleResult("first", True, "no champion yet", "the floors to hold")


def make_task_rule(candidate_task: str, champion_task: str) -> RuleResult:
    """Return the note that models of different tasks are compared by their label sets: one label is a set of one."""
    return RuleResult(
        "task",
        True,
        f"the candidate is {candidate_task}, the champion {champion_task}",
        "a comparison of whole sets of labels, where one answer is a set of one",
    )


def make_same_rule(section: Gate) -> RuleResult:
    """Return the answer for a candidate that is the champion: there is nothing to compare."""
    return RuleResult(section.rule, None, "the candidate is the champion itself", "another model")


def compute_verdict(rules: Sequence[RuleResult]) -> str:
    """Return refused if any rule refuses, else inconclusive if any rule is, else passed."""
    answers = [rule.passed for rule in rules]
    if False in answers:
        return REFUSED
    return INCONCLUSIVE if None in answers else PASSED


def _percent(share: float) -> str:
    return f"{100 * share:.2f} %"


def _points(share: float) -> str:
    return f"{100 * share + 0.0:+.2f}"
