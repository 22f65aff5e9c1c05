"""The rules of the gate that hold a figure against a line, without a comparison by tests. Pure."""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike

from visionloop.errors import shorten
from visionloop.evaluation.baselines import MAJORITY, Baseline
from visionloop.evaluation.resampling import IntArray, compute_key_interval, count_keys, sum_keys
from visionloop.params import Gate
from visionloop.params.gate import LOWER_IS_BETTER, Floor, Latency
from visionloop.promotion.advice import LOWER
from visionloop.promotion.gate import percent, points
from visionloop.promotion.paired import MIN_KEYS, Hits
from visionloop.records import Interval, RuleResult


def check_floors(floors: Mapping[str, Floor], metrics: Mapping[str, Interval]) -> list[RuleResult]:
    """Hold figures of the candidate, or the worse ends of their intervals, against their lines.

    A figure that this task has not, or a bound that too few images tell, cannot be told.
    """
    return [
        _check_floor(name, floor, metrics.get(name)) for name, floor in sorted(floors.items()) if floor.mode != "off"
    ]


def _check_floor(name: str, floor: Floor, figure: Interval | None) -> RuleResult:
    is_low = name in LOWER_IS_BETTER
    show = _write if is_low else percent
    expected = f"at {'most' if is_low else 'least'} {show(floor.line)}"
    if figure is None:
        return RuleResult(f"floor {name}", None, f"these answers have no {name}", expected, mode=floor.mode)
    worse = figure.high if is_low else figure.low
    held = figure.value if floor.bound == "value" else worse
    shown = f"{name} {show(figure.value)}"
    if floor.bound == "interval":
        known = f"{'up to' if is_low else 'from'} {show(worse)}" if worse is not None else ""
        shown += f", its 95 % interval {known or 'cannot be told: too few images'}"
    return RuleResult(
        rule=f"floor {name}",
        passed=None if held is None else held <= floor.line if is_low else held >= floor.line,
        found=shown,
        expected=expected,
        value=figure.value,
        low=figure.low,
        high=figure.high,
        line=floor.line,
        mode=floor.mode,
    )


def check_baseline(accuracy: Interval, share: float, told: str, section: Gate) -> RuleResult:
    """Hold the accuracy's 95 % interval against the share of images that one constant answer has right.

    The labels of the test side are taken as given, so the share is a plain number.
    """
    low, high = accuracy.low, accuracy.high
    interval = f"{percent(low)} ... {percent(high)}" if low is not None and high is not None else "cannot be told"
    passed = True if low is not None and low > share else False if high is not None and high < share else None
    more = "; more test images make it narrower" if passed is None and accuracy.value > share else ""
    return RuleResult(
        rule="baseline",
        passed=passed,
        found=f"accuracy {percent(accuracy.value)}, its 95 % interval {interval}",
        expected=f"an interval above {percent(share)}, the answer {told}{more}",
        value=accuracy.value,
        low=low,
        high=high,
        line=share,
        mode=section.baseline.mode,
    )


def check_simple_heads(baselines: Sequence[Baseline] | None, section: Gate) -> RuleResult | None:
    """Refuse a network that a simple head on its own embeddings is shown to beat (`evaluation/baselines.py`).

    `baselines` are those of reports/intervals.json; None if it is about another model. Each head is held against its
    95 % interval, so one of the two is wrongly found better in at most 5 % of cases.
    """
    mode, rule = section.baseline.heads, "simple_head"
    heads = [(one.gain.high, one) for one in baselines or () if one.name != MAJORITY and one.gain.high is not None]
    if mode == "off" or (mode == "dry_run" and not heads):
        return None
    if not heads:
        found = "reports/ is not about this candidate" if baselines is None else "reports/ has no head with an interval"
        expected = "`evaluate.baseline_images` above 0 and six groups or more"
        expected = f"`visionloop evaluate` first, with {expected}" if baselines is None else expected
        return RuleResult(rule, None, found, expected, mode=mode)
    high, worst = min(heads, key=lambda pair: pair[0])
    gain, share = worst.gain, worst.accuracy.value
    return RuleResult(
        rule=rule,
        passed=worst.verdict != "better",
        found=(
            f"accuracy {percent(share + gain.value)} against {percent(share)} of a simple head ({worst.name}) on "
            f"its own embeddings: difference {points(gain.value)} points, 95 % interval {points(gain.low or 0.0)} ... "
            f"{points(high)}"
        ),
        expected="no simple head shown to be better",
        value=gain.value,
        low=gain.low,
        high=gain.high,
        line=0.0,
        mode=mode,
    )


def check_answered(answered: Interval, hits: Hits | None, section: Gate) -> RuleResult | None:
    """Refuse a candidate that answers too few images, or far fewer than the champion.

    `hits` counts the images that each model answers, "right" being "answered"; None without a champion that may say
    "don't know" too: who asks for that for the first time wants fewer answers. That fewer are answered than the
    champion's share less the margin has to be shown, as by `class_drop`.
    """
    rule = section.answered
    if rule.mode == "off":
        return None
    found, expected = f"answers {percent(answered.value)} of the images", f"at least {percent(rule.least)}"
    is_fewer = False
    if hits is not None:
        is_fewer = hits.compute_p_below(-rule.margin) <= section.alpha
        found += f", the champion {percent(float(hits.champion_g.sum()) / hits.num_images)}"
        expected += f", and not shown to be {100 * rule.margin:g} points or more below the champion"
    return RuleResult(
        rule="answered",
        passed=answered.value >= rule.least and not is_fewer,
        found=found,
        expected=expected,
        value=answered.value,
        low=answered.low,
        high=answered.high,
        line=rule.least,
        mode=rule.mode,
    )


def check_new_classes(recalls: Mapping[str, tuple[int, int]], section: Gate) -> RuleResult | None:
    """Hold what the candidate finds of the classes new to it (found, images) against a line. None without any."""
    if not recalls or section.new_class.mode == "off":
        return None
    line, least = section.new_class.recall, section.min_images.per_class
    shares = {name: found / number if number else 0.0 for name, (found, number) in recalls.items()}
    few = [name for name, (_, number) in recalls.items() if number < max(least, 1)]
    low = [name for name in recalls if name not in few and shares[name] < line]
    worst = min(low or few or recalls, key=lambda name: shares[name])
    found, number = recalls[worst]
    more = f"; also {shorten([name for name in low if name != worst])}" if len(low) > 1 else ""
    images = ""
    if few and not low:
        is_enough = all(recalls[name][1] and shares[name] >= line for name in few)  # for a lower number
        others = f"{LOWER}`gate.min_images.per_class`, " if is_enough else ""
        images = (
            f" on at least {max(least, 1)} images: more test images of it, {others}or `gate.new_class: {{mode: off}}`"
        )
    return RuleResult(
        rule="new_class",
        passed=False if low else None if few else True,
        found=f"{worst} is found in {found} of {number} test images{more}",
        expected=f"each class that the champion does not know found in at least {percent(line)}{images}",
        value=shares[worst],
        line=line,
        mode=section.new_class.mode,
    )


def check_log_loss(excess_n: ArrayLike, key_n: IntArray, section: Gate) -> RuleResult | None:
    """Refuse if the candidate's log loss is shown to be above the champion's by more than the margin.

    `excess_n` is the difference for each image (n,). Its mean has the t interval over keys.
    """
    rule, key_count = section.log_loss, count_keys(key_n)
    if rule.mode == "off" or key_count < MIN_KEYS:
        return None
    sums_g, count_g = sum_keys(excess_n, key_n), sum_keys(np.ones(len(key_n)), key_n)
    excess = compute_key_interval(sums_g, count_g, 1 - 2 * section.alpha)
    assert excess.low is not None and excess.high is not None, "there are two keys or more"
    return RuleResult(
        rule="log_loss",
        passed=excess.low <= rule.margin,
        found=(
            f"log loss {_sign(excess.value)} against the champion's, {100 * (1 - 2 * section.alpha):.4g} % interval "
            f"{_sign(excess.low)} ... {_sign(excess.high)}"
        ),
        expected=f"not shown to be higher than the champion's{f' by more than {rule.margin:g}' if rule.margin else ''}",
        value=excess.value,
        low=excess.low,
        high=excess.high,
        line=rule.margin,
        mode=rule.mode,
    )


def check_limit(rule: str, value: float, line: float, unit: str, mode: str) -> RuleResult:
    """Hold a plain number against the most that it may be."""
    return RuleResult(rule, value <= line, f"{value:,.4g} {unit}", f"at most {line:,.4g}", value, line=line, mode=mode)


def check_latency(candidate_ms: float, champion_ms: float | None, section: Latency) -> RuleResult:
    """Hold the time for one image against a budget in ms, and against a multiple of the champion's."""
    limits = {f"{section.ms:g} ms": section.ms} if section.ms else {}
    if section.ratio and champion_ms is not None:
        limits[f"{section.ratio:g} times the champion's"] = section.ratio * champion_ms
    line = min(limits.values(), default=None)
    rival = f", the champion {champion_ms:.4g} ms" if champion_ms is not None else ""
    return RuleResult(
        rule="latency",
        passed=line is None or candidate_ms <= line,
        found=f"{candidate_ms:.4g} ms for one image here{rival}",
        expected=f"at most {' and '.join(limits) or 'that of the champion, once there is one'}",
        value=candidate_ms,
        line=line,
        mode=section.mode,
    )


def _write(value: float) -> str:
    return f"{value:.4f}"


def _sign(value: float) -> str:
    return f"{round(value, 4) + 0.0:+.4f}"  # never -0.0000
