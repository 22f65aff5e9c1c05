"""The rules of the gate: each returns a `RuleResult` with its numbers. Pure: no disk, clock or global random.

`docs/judging.md` explains them with examples. The tests and intervals are in `paired.py`, the rules that hold plain
figures against a line in `limits.py`.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import ceil
from typing import Any

import numpy as np

from visionloop.errors import shorten
from visionloop.evaluation.resampling import count_keys, describe_images, find_t_quantile
from visionloop.params import Gate
from visionloop.params.gate import Drop
from visionloop.promotion.advice import LOWER
from visionloop.promotion.paired import (
    MIN_KEYS,
    FloatArray,
    Hits,
    Pair,
    draw_f1_differences,
    estimate_images,
    find_dropped,
    widen_tail,
)
from visionloop.records import RuleResult

PASSED, REFUSED, INCONCLUSIVE, WAITING = "passed", "refused", "inconclusive", "waiting"
APPROVAL = "approval"
LARGE_DROP = 0.10  # of a class: from here on it is told, although it may be luck
MIN_GUESS = 30  # images from which the number that would tell can be guessed
APPROVABLE = frozenset({APPROVAL, "champion_runs", "removed_class"})  # what a person may allow
APPROVED = "approved by "
WAITS = "waits for `visionloop approve --why ...` by a person"


@dataclass(frozen=True)
class Difference:
    """One metric of candidate and champion, and their difference against a line.

    `low` and `high` are its 1 - 2 alpha interval. `p_above` is the p-value of "it is above the line", `p_below` of the
    opposite: at most alpha says so. `error` is its standard error.
    """

    metric: str
    candidate: float
    champion: float
    low: float
    high: float
    line: float
    p_above: float
    p_below: float
    error: float
    num_images: int
    num_keys: int

    @property
    def value(self) -> float:
        return self.candidate - self.champion


def get_line(section: Gate) -> float:
    """Return what the difference to the champion has to be above."""
    return 0.0 if section.rule == "better" else -section.margin


def compute_difference(pair: Pair, metric: str, line: float, alpha: float, *, resamples: int, seed: int) -> Difference:
    """Compare two models on the same images: accuracy by exact tests, macro F1 by a paired bootstrap over keys.

    Of several labels an image, accuracy is the share of exact matches.
    """
    if metric == "accuracy":
        return _compare_hits(pair.count_hits(), metric, line, alpha)
    candidate, champion, drawn_r = draw_f1_differences(pair, resamples=resamples, seed=seed)
    num_keys, error = count_keys(pair.key_n), float(drawn_r.std())
    low, high = _bound_draws(candidate - champion, drawn_r, num_keys, alpha)
    p_above, p_below = (0.0 if low > line else 1.0), (0.0 if high < line else 1.0)
    bounds = (low, high, line, p_above, p_below, error)
    return Difference(metric, candidate, champion, *bounds, len(pair.labels), num_keys)


def check_difference(difference: Difference, rule: str, alpha: float) -> RuleResult:
    """Say whether the difference is above its line (passed), below it (refused), or cannot be told.

    Then the number of images that would tell is said.
    """
    passed = True if difference.p_above <= alpha else False if difference.p_below <= alpha else None
    line = difference.line
    return RuleResult(
        rule=rule,
        passed=passed,
        found=(
            f"{difference.metric} {percent(difference.candidate)} against {percent(difference.champion)} on "
            f"{describe_images(difference.num_images, difference.num_keys)}: difference {points(difference.value)} "
            f"points, {100 * (1 - 2 * alpha):.4g} % interval {points(difference.low)} ... {points(difference.high)}"
            f"{_describe_p(difference) if passed is not False else ''}"
            f"{_describe_more(difference, alpha) if passed is None else ''}"
        ),
        expected="a difference above 0" if line == 0 else f"a difference above {points(line)} points",
        value=difference.value,
        low=difference.low,
        high=difference.high,
        line=line,
    )


def check_min_images(
    pair: Pair, classes: Sequence[str], known: Sequence[int], section: Gate, *, is_shown: bool = False
) -> RuleResult | None:
    """Say what is missing for a comparison: images in all, or of a class, or groups. None if nothing is.

    `known` are the places of the classes that both models know. `is_shown`: the comparison passes on so few already;
    only then a lower number helps, and is named.
    """
    labels, least = pair.labels, section.min_images
    counts = {classes[k]: int((labels == k).sum() if labels.ndim == 1 else labels[:, k].sum()) for k in known}
    few = sorted((number, name) for name, number in counts.items() if number < least.per_class)
    num_keys = count_keys(pair.key_n)
    groups = f", at least {MIN_KEYS} groups" if num_keys < min(MIN_KEYS, len(labels)) else ""
    if len(labels) >= least.all and not few and not groups:
        return None
    missing = max(least.all - len(labels), sum(least.per_class - number for number, _ in few))
    keys = ["gate.min_images"] * (len(labels) < least.all) + ["gate.min_images.per_class"] * bool(few)
    more = f": about {missing} more test images" if missing > 0 else ""
    if more and is_shown and not groups:
        more += f", or {LOWER}{' and '.join(keys)}"
    of = f", of them {shorten([f'{number} {name}' for number, name in few])}" if few else ""
    return RuleResult(
        rule="min_images",
        passed=None,
        found=f"{describe_images(len(labels), num_keys, 'test images')} to compare on{of}",
        expected=f"at least {least.all} and {least.per_class} of each class{groups}{more}",
        value=float(len(labels)),
        line=float(least.all),
    )


def check_drops(rule: str, parts: Mapping[str, Hits], section: Drop, alpha: float) -> RuleResult | None:
    """Refuse if a class (or a slice) is answered worse than by the champion. None if there is no part at all.

    Each part has its exact test; together they are wrong in at most `alpha` (Holm). What they cannot show passes, and a
    large drop among it is told. But a class that is in fewer than `MIN_KEYS` groups can never be shown to be worse: if
    it seems to lose `LARGE_DROP` or more, the rule cannot tell.
    """
    if not parts or section.mode == "off":
        return None
    names, hits = list(parts), list(parts.values())
    dropped = find_dropped([each.compute_p_below(-section.most) for each in hits], alpha)
    untold = [i for i, one in enumerate(hits) if _is_untold(one, section.most)] if rule == "class_drop" else []
    worst = min(dropped or untold or range(len(names)), key=lambda i: hits[i].value)
    one, each = hits[worst], 1 - 2 * alpha / len(names)
    low, high = one.compute_interval(each)
    shares = [float(right_g.sum() / one.num_images) for right_g in (one.candidate_g, one.champion_g)]
    others = [names[i] for i in dropped or untold if i != worst]
    more = f"; also {shorten(others)}" if others else "" if dropped else _describe_unshown(one, section.most, alpha)
    what, plural = ("class", "es") if rule == "class_drop" else ("slice", "s")
    number = f"{len(names)} {what}{plural * (len(names) > 1)}"
    allowed = f" by more than {100 * section.most:g} points" if section.most else ""
    return RuleResult(
        rule=rule,
        passed=False if dropped else None if untold else True,
        found=(
            f"{'worse' if dropped else 'too few groups' if untold else 'lowest'}: {names[worst]} "
            f"{percent(shares[0])} against {percent(shares[1])} on "
            f"{describe_images(one.num_images, len(one.count_g))}, difference {points(one.value)} points, "
            f"{100 * each:.4g} % interval {points(low)} ... {points(high)}{more}"
        ),
        expected=f"no {what} worse{allowed} ({number}, {100 * alpha:g} % in all)",
        value=one.value,
        low=low,
        high=high,
        line=-section.most,
        mode=section.mode,
    )


def _is_untold(hits: Hits, most: float) -> bool:
    """Say whether a class seems to lose much, and is in too few groups for any test to show it."""
    return not hits.are_images and len(hits.count_g) < MIN_KEYS and hits.value <= -most - LARGE_DROP


def _describe_unshown(hits: Hits, most: float, alpha: float) -> str:
    """Tell of a large drop that may be luck, and how many images would show it if it is as large as it looks."""
    if hits.value > -most - LARGE_DROP:
        return ""
    keys, number = len(hits.count_g), hits.num_images
    needed = estimate_images(-hits.value, hits.compute_error(), number, most, alpha) or number
    more = f"{max(needed - number, 10):,} more test images"
    if not hits.are_images:
        more = f"{max(ceil(needed * keys / number), MIN_KEYS, keys + 1) - keys:,} more test groups"
    what = f"that it is more than {100 * most:g} points" if most else "this"
    return f"; LOOK: {what} may be luck, about {more} of it would tell"


def make_looks_rule(looks: int, on_these: int, section: Gate) -> RuleResult | None:
    """Tell how many candidates this champion has been compared with, and what luck does among them.

    `on_these`: how many of them on these very test images. None for the first one. With `spend` each look has its own
    alpha (`spend_alpha`), so the risk stays.
    """
    if looks <= 1 and section.looks == "tell":
        return None
    where = " on these images" if on_these == looks else f" ({on_these} of them on these images)"
    luck = "an equal one" if section.rule == "better" else f"one that is {100 * section.margin:g} points worse"
    found = f"{_ordinal(looks)} candidate against this champion{where}"
    if section.looks == "spend":
        share = 100 * spend_alpha(section.alpha, looks)
        expected = f"a risk of at most {100 * section.alpha:g} % over all of them: this one is judged at {share:.2g} %"
    else:
        risk = 100 * (1 - (1 - section.alpha) ** looks)
        found += f": {luck} passes by luck with {risk:.0f} %"
        expected = f"a verdict read with that in mind; `gate.looks: spend` keeps the risk at {100 * section.alpha:g} %"
    return RuleResult("looks", True, found, expected, value=float(looks))


def spend_alpha(alpha: float, looks: int) -> float:
    """Return the level of the i-th look: alpha / (i (i + 1)). Over any number of looks they sum to at most alpha.

    By Bonferroni's inequality no more than alpha passes by luck, whatever the candidates have in common (Foster &
    Stine 2008 spend alpha over a stream of tests). Example at 5 %: 2.5 %, 0.83 %, 0.42 %, ...
    """
    return alpha / (looks * (looks + 1))


def make_first_rule() -> RuleResult:
    """Return the rule that replaces the comparison while there is no champion: floors and baseline decide."""
    return RuleResult("first", True, "no champion yet", "the floors and the baseline to hold")


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


def make_apart_rule(candidate: Sequence[str], champion: Sequence[str]) -> RuleResult:
    """Refuse a candidate that has no class in common with the champion: it is for something else."""
    found = f"the candidate knows {shorten(candidate)}, the champion {shorten(champion)}: nothing in common"
    return RuleResult("shared_classes", False, found, "a class that both know; for another task choose another `name`")


def make_removed_rule(names: Sequence[str]) -> RuleResult:
    """Return the rule that a person has to allow a candidate which no longer knows some classes."""
    return RuleResult(
        "removed_class",
        None,
        f"the candidate no longer knows {shorten(names)}: {WAITS}",
        "every class of the champion",
    )


def make_broken_rule(reason: str) -> RuleResult:
    """Return the rule of a champion that cannot answer here: a person may let it be replaced without a comparison."""
    found = f"the champion cannot be asked ({reason}): {WAITS}, or `visionloop doctor`"
    return RuleResult("champion_runs", None, found, "a champion to compare with")


def make_approval_rule() -> RuleResult:
    """Return the rule of `gate.approval: required`."""
    return RuleResult(APPROVAL, None, WAITS, "a person's word (`gate.approval: required`)")


def approve_rules(rules: Sequence[RuleResult], by: str, why: str) -> tuple[RuleResult, ...]:
    """Return the rules after a person has allowed what a person may allow: who and why stand for the waiting."""
    return tuple(
        replace(rule, passed=True, found=f"{rule.found.partition(WAITS)[0]}{APPROVED}{by}: {why}")
        if rule.rule in APPROVABLE and rule.passed is None
        else rule
        for rule in rules
    )


def compute_verdict(rules: Sequence[RuleResult]) -> str:
    """Return the strictest of the rules' answers: refused, inconclusive, waiting (for a person), passed."""
    held = [rule for rule in rules if rule.holds_back]
    if any(rule.passed is False for rule in held):
        return REFUSED
    if any(rule.rule not in APPROVABLE for rule in held):
        return INCONCLUSIVE
    return WAITING if held else PASSED


def find_held(verdict: str, rules: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return the rules that made a verdict other than `passed`, in their order."""
    held = [r for r in rules if r["passed"] is (False if verdict == REFUSED else None) and r.get("mode") != "dry_run"]
    return [r for r in held if verdict != INCONCLUSIVE or r["rule"] not in APPROVABLE]


def _compare_hits(hits: Hits, metric: str, line: float, alpha: float) -> Difference:
    number = hits.num_images
    candidate, champion = (float(right_g.sum() / number) for right_g in (hits.candidate_g, hits.champion_g))
    low, high = hits.compute_interval(1 - 2 * alpha)
    p_above, p_below, num_keys = hits.compute_p_above(line), hits.compute_p_below(line), len(hits.count_g)
    bounds = (low, high, line, p_above, p_below, hits.compute_error())
    return Difference(metric, candidate, champion, *bounds, number, num_keys)


def _bound_draws(value: float, drawn_r: FloatArray, num_keys: int, alpha: float) -> tuple[float, float]:
    """Return the 1 - 2 alpha interval of a difference from its resamples: the wider of two counts.

    One is the expanded percentile interval (`widen_tail`), where 10 draws or more lie beyond each end. The other is the
    value with Student's t of its standard error (Efron & Tibshirani 1993, section 12.4), the safer one for few groups.
    """
    if num_keys < MIN_KEYS:
        return -1.0, 1.0
    half, tail = find_t_quantile(num_keys - 1, 1 - 2 * alpha) * float(drawn_r.std()), widen_tail(alpha, num_keys)
    low, high = value - half, value + half
    if tail * len(drawn_r) >= 10:
        # Values that were drawn, never between two: a bound above 0 means at least one image.
        low = min(low, float(np.quantile(drawn_r, tail, method="lower")))
        high = max(high, float(np.quantile(drawn_r, 1 - tail, method="higher")))
    return low, high


def _describe_p(difference: Difference) -> str:
    return f", p {difference.p_above:.2g}" if difference.metric == "accuracy" else ""


def _describe_more(difference: Difference, alpha: float) -> str:
    """Tell how many more images would show the difference, if it is as large as it looks."""
    number, line = difference.num_images, difference.line
    if number < MIN_GUESS:
        return "; too few images to say how many would tell"
    needed = estimate_images(difference.value, difference.error, number, line, alpha)
    if needed is None:
        behind = "is not ahead" if line == 0 else f"is behind by {100 * abs(line):g} points or more"
        return f"; the candidate {behind}: more test images would hardly help it"
    missing = max(needed - number, 10)
    rounded = int(float(f"{missing:.2g}"))
    return f"; about {rounded:,} more test images would tell"


def _ordinal(number: int) -> str:
    ending = "th" if number % 100 in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number}{ending}"


def percent(share: float) -> str:
    """Write a share from 0 to 1."""
    return f"{100 * share:.2f} %"


def points(share: float) -> str:
    """Write a difference of shares with its sign, in points."""
    return f"{100 * share + 0.0:+.2f}"
