"""From the answers of candidate and champion to the result of every rule of the gate. Pure: nothing is read or stored.

Dimensions in names: n test images, k classes (of both models and of the labels, the candidate's first).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from visionloop.evaluation.answers import Answers, compute_answer_metrics, compute_answered
from visionloop.evaluation.label_metrics import compute_label_losses
from visionloop.evaluation.metrics import compute_log_losses
from visionloop.evaluation.resampling import code_keys
from visionloop.evaluation.slices import make_slices
from visionloop.params import Params
from visionloop.predictor import Choices
from visionloop.promotion.gate import (
    check_difference,
    check_drops,
    check_min_images,
    compute_difference,
    get_line,
    make_apart_rule,
    make_first_rule,
    make_looks_rule,
    make_removed_rule,
    make_same_rule,
    spend_alpha,
)
from visionloop.promotion.limits import (
    check_answered,
    check_baseline,
    check_floors,
    check_log_loss,
    check_new_classes,
)
from visionloop.promotion.paired import Hits, Pair, count_hits
from visionloop.promotion.score import Scores, map_scores, to_sets
from visionloop.records import ImageRecord, Interval, RuleResult

Metrics = dict[str, Interval]
IntArray = NDArray[np.int64]


@dataclass(frozen=True)
class Case:
    """What is judged: answers of the candidate, and of the champion if there is one that was asked.

    `is_champion`: the candidate is the champion. `is_broken`: there is a champion that could not be asked. `looks`
    candidates were compared with this champion, this one included, `on_these` of them on these images.
    """

    params: Params
    tests: Sequence[ImageRecord]
    candidate: Scores
    champion: Scores | None = None
    is_champion: bool = False
    looks: int = 1
    on_these: int = 1
    is_broken: bool = False


@dataclass(frozen=True)
class Aligned:
    """The same answers in one order of classes: the truth, then candidate and champion."""

    classes: tuple[str, ...]
    labels: Choices
    models: tuple[Scores, ...]
    key_n: IntArray

    @property
    def is_several(self) -> bool:
        return self.labels.ndim == 2


def judge(case: Case) -> tuple[list[RuleResult], list[Metrics]]:
    """Return the result of each rule, and the figures of the candidate, then of the champion if it was asked."""
    aligned = align(case)
    metrics = [_compute_metrics(aligned, scores, case.params) for scores in aligned.models]
    floors = {str(name): floor for name, floor in case.params.gate.floors.items()}
    answered = {"answered": metrics[0].get("answered", Interval(1.0, 1.0, 1.0))}  # without a rule it always answers
    rules = [*check_floors(floors, metrics[0] | answered), _check_baseline(aligned, metrics[0], case.params)]
    if case.candidate.abstained_n is not None:
        rules.append(check_answered(answered["answered"], _count_answered(aligned), case.params.gate))
    if case.is_champion:
        rules.append(make_same_rule(case.params.gate))
    elif case.champion is not None:
        rules += _compare(case, case.champion, aligned)
    elif not case.is_broken:
        rules.append(make_first_rule())
    return [rule for rule in rules if rule is not None], metrics


def align(case: Case) -> Aligned:
    """Put both models' answers and the truth into one order of classes."""
    scores = [case.candidate, *([case.champion] if case.champion else [])]
    # The candidate's classes come first. An answer with a class that only the champion knows is wrong, but no error.
    names = [name for record in case.tests for name in record.labels]
    classes = tuple(dict.fromkeys([c for s in scores for c in s.classes] + names))
    models = [map_scores(s, classes) for s in scores]
    labels: Choices
    if any(s.chosen.ndim == 2 for s in scores) or any(len(r.labels) != 1 for r in case.tests):
        models = [to_sets(s) for s in models]
        labels = np.array([[name in r.labels for name in classes] for r in case.tests])
    else:
        labels = np.array([classes.index(name) for name in names])
    return Aligned(classes, labels, tuple(models), code_keys([r.key for r in case.tests]))


def _compute_metrics(aligned: Aligned, scores: Scores, params: Params) -> Metrics:
    answers = Answers(aligned.labels, scores.probs_nk, scores.chosen, scores.classes, aligned.key_n, scores.abstained_n)
    return compute_answer_metrics(answers, params.evaluate) | compute_answered(answers)


def _check_baseline(aligned: Aligned, metrics: Metrics, params: Params) -> RuleResult | None:
    """Compare the candidate with the best answer that is the same for every image.

    That is the most frequent class; for macro F1 of several labels, all of them (nothing else is as good a constant).
    Several labels are always compared by macro F1: with rare labels "nothing" is exactly right on most images.
    """
    section, labels = params.gate, aligned.labels
    if section.baseline.mode == "off":
        return None
    if aligned.is_several:
        metric, constant, told = "macro_f1", np.ones_like(labels), "every label for every image"
    else:
        counts_k = np.bincount(labels.astype(np.int64), minlength=len(aligned.classes))
        most = int(counts_k.argmax())
        metric, constant = section.metric, np.full_like(labels, most)
        told = f"always {aligned.classes[most]!r} (the test side's most frequent class)"
    if metric == "accuracy":
        share = float(np.equal(labels, constant).mean())
        return check_baseline(metrics["accuracy"], share, told, section)
    pair = Pair(labels, aligned.models[0].chosen, constant, aligned.key_n, len(aligned.classes))
    draw = {"resamples": params.evaluate.resamples, "seed": params.evaluate.seed}
    rule = check_difference(compute_difference(pair, metric, 0.0, section.alpha, **draw), "baseline", section.alpha)
    return replace(rule, expected=f"more than the answer {told}", mode=section.baseline.mode)


def _count_answered(aligned: Aligned) -> Hits | None:
    """Count the images that each of two models answers; None unless both may say that they do not know."""
    silent = [scores.abstained_n for scores in aligned.models if scores.abstained_n is not None]
    return count_hits(~silent[0], ~silent[1], aligned.key_n) if len(silent) == 2 else None


def _compare(case: Case, champion: Scores, aligned: Aligned) -> list[RuleResult | None]:
    """Apply the rules that compare. Images with a label that the champion does not know have rules of their own."""
    section, classes = case.params.gate, aligned.classes
    known = [k for k, name in enumerate(classes) if name in champion.classes and name in case.candidate.classes]
    if not known:
        return [make_apart_rule(case.candidate.classes, champion.classes)]
    rules: list[RuleResult | None] = []
    if removed := [name for name in champion.classes if name not in case.candidate.classes]:
        rules.append(make_removed_rule(removed))
    rules.append(check_new_classes(_count_new(aligned, champion, case.candidate), section))
    rows_n = _find_comparable(aligned, champion)
    pair = Pair(aligned.labels, aligned.models[0].chosen, aligned.models[1].chosen, aligned.key_n, len(classes)).take(
        rows_n
    )
    if not len(rows_n):
        return [*rules, check_min_images(pair, classes, known, section)]
    alpha = spend_alpha(section.alpha, case.looks) if section.looks == "spend" else section.alpha
    draw = {"resamples": case.params.evaluate.resamples, "seed": case.params.evaluate.seed}
    difference = compute_difference(pair, section.metric, get_line(section), alpha, **draw)
    shown = check_difference(difference, section.rule, alpha)
    rules += [check_min_images(pair, classes, known, section, is_shown=shown.passed is True), shown]
    by_class = {classes[k]: pair.count_class_hits(k) for k in known}
    parts = {name: hits for name, hits in by_class.items() if hits is not None}
    rules.append(check_drops("class_drop", parts, section.class_drop, section.alpha))
    tests = [case.tests[row] for row in rows_n]
    measures = {name: values_n[rows_n] for name, values_n in case.candidate.measures.items()}
    slices = {each.name: pair.take(each.rows_n).count_hits() for each in make_slices(tests, measures)}
    rules.append(check_drops("slice_drop", slices, section.slice_drop, section.alpha))
    if case.candidate.chosen.ndim == champion.chosen.ndim:
        losses = [_compute_losses(aligned, scores)[rows_n] for scores in aligned.models]
        rules.append(check_log_loss(losses[0] - losses[1], pair.key_n, section))
    rules.append(make_looks_rule(case.looks, case.on_these, section))
    return rules


def _find_comparable(aligned: Aligned, champion: Scores) -> IntArray:
    """Return the rows whose labels the champion knows, all of them."""
    is_known_k = np.array([name in champion.classes for name in aligned.classes])
    if aligned.is_several:
        return np.flatnonzero(~(aligned.labels.astype(bool) & ~is_known_k).any(axis=1))
    return np.flatnonzero(is_known_k[aligned.labels.astype(np.int64)])


def _count_new(aligned: Aligned, champion: Scores, candidate: Scores) -> dict[str, tuple[int, int]]:
    """Return for each class that only the candidate knows: test images in which it is found, and all that have it."""
    counts, chosen = {}, aligned.models[0].chosen
    for k, name in enumerate(aligned.classes):
        if name in candidate.classes and name not in champion.classes:
            wanted_n, given_n = (part[:, k] if part.ndim == 2 else part == k for part in (aligned.labels, chosen))
            counts[name] = (int((wanted_n & given_n).sum()), int(wanted_n.sum()))
    return counts


def _compute_losses(aligned: Aligned, scores: Scores) -> NDArray[np.float64]:
    if aligned.is_several:
        return np.asarray(compute_label_losses(aligned.labels.astype(bool), scores.probs_nk).sum(axis=1))
    return compute_log_losses(aligned.labels.astype(np.int64), scores.probs_nk)
