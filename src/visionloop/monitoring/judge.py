"""From what is known of a window to its verdict. Pure.

Broken data beats drift: where a check of the data fails, nothing is compared, and nothing is said of the model.

    broken    the data is not sound; no retrain helps             drift    the images are not like the reference
    quality   by labels the accuracy is too low                   service  volume, latency, age, alias
    fine      nothing of these                                    learning too little to compare with, or too few images
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import numpy as np
from numpy.typing import NDArray

from visionloop.confidence import compute_distances, pick_reference
from visionloop.monitoring.drift import Basis, Detector, Drift, FloatArray, IntArray, Sample, find_drift, keep_one_each
from visionloop.monitoring.health import Check, State
from visionloop.monitoring.quality import (
    ClassShare,
    LabelledAccuracy,
    compute_class_shares,
    compute_expected_accuracy,
)
from visionloop.monitoring.window import Span
from visionloop.params.loop import Monitor
from visionloop.records import Interval, Record

VERDICTS = ("broken", "drift", "quality", "service", "fine", "learning")
ALERTS = VERDICTS[:4]
NEIGHBOURS = 5
SHOWN_FARTHEST = 24


@dataclass(frozen=True)
class Known:
    """What the bundle of the model says: its classes, its validation side as a sample, and its mistakes there.

    `accuracy` is that of the validation side. `confusion_kk` is None for several labels an image.
    """

    classes: tuple[str, ...]
    validation: Sample
    accuracy: Interval
    confusion_kk: IntArray | None


@dataclass(frozen=True)
class Facts:
    """What is known of a window. `sample` holds the images that are compared; `reference` those of accepted windows.

    `checks` are those of data and service, made before. `reference` None: there is no such window yet.
    """

    num_images: int
    sample: Sample
    known: Known
    reference: Sample | None
    checks: Sequence[Check]
    labelled: LabelledAccuracy
    seed: int = 0


@dataclass(frozen=True)
class Judged:
    """The judgement of a window. `drift` None: it was not looked for. `farthest`: rows of the sample, and how far.

    `trusted`: whether the expected accuracy can be believed.
    """

    verdict: str
    checks: tuple[Check, ...]
    drift: Drift | None
    expected: Interval | None
    trusted: bool
    shares: tuple[ClassShare, ...] = ()
    farthest: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Verdict(Record):
    """The record of a judged window, as it is stored."""

    name: str
    window: str
    start: str
    end: str
    verdict: str
    bundle: str
    entry: int
    num_images: int
    num_looked_at: int
    reference: tuple[str, ...]
    p: float | None
    level: float
    expected_accuracy: float | None
    expected_is_trusted: bool
    labelled_accuracy: dict[str, Any] | None
    num_labels: int
    checks: tuple[dict[str, Any], ...]
    judged_at: str
    damaged: tuple[str, ...] = field(default=())

    @property
    def span(self) -> Span:
        """The time of the window. Raises ValueError, TypeError."""
        return Span(datetime.fromisoformat(self.start), datetime.fromisoformat(self.end))

    @property
    def is_alert(self) -> bool:
        return self.verdict in ALERTS

    def list_alerts(self) -> list[Mapping[str, Any]]:
        """Return the checks that alert."""
        return [check for check in self.checks if check["state"] == "alert"]


def judge_window(facts: Facts, section: Monitor) -> Judged:
    """Return the judgement of a window by its facts."""
    broken = any(check.kind == "broken" and check.state == "alert" for check in facts.checks)
    sample, enough = facts.sample, len(facts.sample) >= section.min_images
    drift = None if broken or not enough else _look_for_drift(facts, section)
    checks = [*facts.checks, *_tell_drift(facts, drift, section)]
    checks.append(_check_labels(facts, section))
    expected = compute_expected_accuracy(sample.confidence_n, sample.block_n) if len(sample) else None
    shares: Sequence[ClassShare] = ()
    if facts.known.confusion_kk is not None and enough and not broken:
        before = facts.known.validation if facts.reference is None else facts.reference
        parts = (before.chosen_nk, sample.chosen_nk, sample.block_n)
        shares = compute_class_shares(facts.known.classes, facts.known.confusion_kk, *parts, seed=facts.seed)
    return Judged(
        verdict=_choose(checks, drift),
        checks=tuple(checks),
        drift=drift,
        expected=expected,
        trusted=drift is not None and drift.can_tell and not drift.found,
        shares=tuple(shares),
        farthest=() if drift is None else _find_farthest(facts),
    )


def _look_for_drift(facts: Facts, section: Monitor) -> Drift:
    """Compare with accepted windows, or before there are any with the validation side.

    Validation images are not in blocks of an hour, so one image of each block of the window is compared with them. Half
    of them give the axes, the other half is compared.
    """
    validation = facts.known.validation
    if facts.reference is not None:
        basis = Basis.fit(validation.embedding_nd) if validation.embedding_nd is not None else None
        return find_drift(facts.reference, facts.sample, basis, section.level, seed=facts.seed)
    half = validation.take(np.arange(len(validation)) % 2 == 0)
    basis = Basis.fit(half.embedding_nd) if half.embedding_nd is not None and len(half) else None
    others = validation.take(np.arange(len(validation)) % 2 == 1)
    return find_drift(others, keep_one_each(facts.sample, facts.seed), basis, section.level, seed=facts.seed)


def _tell_drift(facts: Facts, drift: Drift | None, section: Monitor) -> list[Check]:
    if drift is None:
        number = len(facts.sample)
        found = (
            "not looked for: the data is broken" if number >= section.min_images else f"{number:,} images are too few"
        )
        return [Check("drift", "drift", "unknown", found, f"{section.min_images} images of sound data")]
    inside, outside = drift.num_blocks[1], drift.num_blocks[0]
    each = f" (each of {drift.together} put together)" if drift.together > 1 else ""
    blocks = f"{inside} blocks in the window and {outside} in the reference{each}"
    told = f"p {drift.p:.2g} with {blocks}"
    expected = f"above {drift.level:.2g}, one false alarm in {section.false_alarm_days:g} days"
    if not drift.can_tell:
        told = f"{blocks} cannot give a p below {drift.floor:.2g}"
        return [Check("drift", "drift", "unknown", told, f"{expected}: more windows, or a smaller monitor.block_hours")]
    state: State = "alert" if drift.found else "fine"
    before = facts.reference if facts.reference is not None else facts.known.validation
    blind = Check(
        "embeddings",
        "drift",
        "unknown",
        "the log has none for this window or the reference",
        "an embedding of each image",
    )
    return [
        Check("drift", "drift", state, told, expected, drift.p, drift.level),
        *([blind] if facts.sample.embedding_nd is None or before.embedding_nd is None else []),
        *(_tell_detector(one, before, facts.sample, drift) for one in drift.detectors),
    ]


def _tell_detector(one: Detector, before: Sample, now: Sample, drift: Drift) -> Check:
    if one.name == "classifier":
        share = _tell_apart(one.value, now, before)
        found = f"a classifier puts {100 * share:.0f} % of the pairs in the right order (50 %: no difference)"
    elif one.name == "mmd":
        found = "how far the embeddings have moved on the whole"
    elif one.name == "classes":
        gap = np.abs(now.chosen_nk.mean(axis=0) - before.chosen_nk.mean(axis=0)).sum() / 2
        found = f"{100 * gap:.0f} % of the answers are of another class than before"
    elif one.name == "abstained":
        found = f"no answer to {100 * now.abstained_n.mean():.1f} %, before {100 * before.abstained_n.mean():.1f} %"
    else:
        values = [s.confidence_n if one.name == "confidence" else s.quality[one.name] for s in (now, before)]
        found = "mean {:.3g}, before {:.3g}".format(*(_mean(value_n) for value_n in values))
    state: State = "alert" if one.alarmed and drift.found else "fine"
    return Check(
        one.name,
        "drift",
        state,
        f"{found}; score {one.value:.3g}, p {one.p:.2g}",
        f"a score of at most {one.limit:.3g}",
        one.value,
        one.limit,
    )


def _mean(value_n: FloatArray) -> float:
    known_n = value_n[np.isfinite(value_n)]
    return float(known_n.mean()) if len(known_n) else float("nan")


def _tell_apart(value: float, now: Sample, before: Sample) -> float:
    """Return the share of pairs (AUC) of two normal scores so many standard deviations apart: Phi(d / sqrt 2)."""
    from scipy.special import ndtr

    effective = len(now) * len(before) / (len(now) + len(before))
    return float(ndtr(max(value, 0.0) / np.sqrt(effective) / np.sqrt(2)))


def _check_labels(facts: Facts, section: Monitor) -> Check:
    """Alert if the accuracy by labels is below the line for sure: with its whole interval."""
    labelled = facts.labelled
    line, usual = section.min_accuracy, facts.known.accuracy.value
    words = "monitor.min_accuracy"
    if line is None:
        line = max(0.0, usual - section.accuracy_drop)
        words = (
            f"{100 * facts.known.accuracy.value:.1f} % of the validation side less {100 * section.accuracy_drop:.0f} %"
        )
    if labelled.accuracy is None or labelled.accuracy.high is None:
        found = f"{labelled.num_labels} labels of kept images are too few"
        return Check("accuracy", "quality", "unknown", found, "30 or more", None, line)
    value, low, high = labelled.accuracy.value, labelled.accuracy.low or 0.0, labelled.accuracy.high
    found = f"{100 * value:.1f} % ({100 * low:.1f} ... {100 * high:.1f}) by {labelled.num_labels:,} labels"
    if labelled.covered < 0.95:
        found = f"{found}, which speak for {100 * labelled.covered:.0f} % of the traffic only"
        return Check(
            "accuracy", "quality", "unknown", found, "labels of the random share", labelled.accuracy.value, line
        )
    state: State = "alert" if high < line else "fine"
    return Check(
        "accuracy", "quality", state, found, f"at least {100 * line:.1f} % ({words})", labelled.accuracy.value, line
    )


def _choose(checks: Sequence[Check], drift: Drift | None) -> str:
    for kind in ALERTS:
        if any(check.kind == kind and check.state == "alert" for check in checks):
            return kind
    return "fine" if drift is not None and drift.can_tell else "learning"


def _find_farthest(facts: Facts) -> tuple[tuple[int, float], ...]:
    """Return the images of the sample that are least like the reference, the farthest first, and how far they are."""
    before = facts.reference if facts.reference is not None else facts.known.validation
    if facts.sample.embedding_nd is None or before.embedding_nd is None:
        return ()
    reference_rd = pick_reference(np.asarray(before.embedding_nd, np.float32))
    embedding_nd: NDArray[np.float32] = np.asarray(facts.sample.embedding_nd, np.float32)
    distance_n = compute_distances(embedding_nd, reference_rd, min(NEIGHBOURS, len(reference_rd)))
    order_n = np.argsort(-distance_n, kind="stable")[:SHOWN_FARTHEST]
    return tuple((int(row), float(distance_n[row])) for row in order_n)


def describe_verdict(verdict: Verdict) -> list[str]:
    """Tell a verdict check by check, those that alert first."""
    marks = {"alert": "ALERT", "fine": "fine", "unknown": "cannot tell"}
    order = {"alert": 0, "unknown": 1, "fine": 2}
    start, end = (text[:16].replace("T", " ") for text in (verdict.start, verdict.end))
    lines = [f"window {start} to {end} UTC, {verdict.num_images:,} images"]
    for check in sorted(verdict.checks, key=lambda one: order[one["state"]]):
        expected = f"; expected {check['expected']}" if check["expected"] else ""
        lines.append(f"  {marks[check['state']]:<11}  {check['name']:<12}  {check['found']}{expected}")
    if verdict.expected_accuracy is not None:
        trust = "" if verdict.expected_is_trusted else ", not to be trusted now"
        lines.append(f"expected accuracy by the confidence: {100 * verdict.expected_accuracy:.1f} %{trust}")
    return [*lines, f"verdict: {verdict.verdict}"]


def describe_late(verdict: Verdict) -> str:
    """Tell the verdict of a window that was missed, in a line."""
    alerts = ", ".join(str(check["name"]) for check in verdict.list_alerts())
    return f"missed before: {describe_verdict(verdict)[0]}: {verdict.verdict}{f' ({alerts})' if alerts else ''}"
