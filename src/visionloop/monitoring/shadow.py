"""A shadow beside the champion: how often they agree, how fast both are, and by labels whether it is better.

Each image counts once, by its newest answer: the same file again tells nothing new. Pure, but for `load_comparison`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any

import numpy as np

from visionloop.data.prediction_log import Order, join_feedback, read_feedback, read_predictions, read_shadow
from visionloop.evaluation.resampling import compute_wilson
from visionloop.promotion.paired import Hits, count_hits, estimate_images

if TYPE_CHECKING:
    from visionloop.store import ObjectStore

COLUMNS = ("request_id", "time", "image_sha256", "model_digest", "prediction", "network_ms", "cached", "image_kept")


@dataclass(frozen=True)
class Verdict:
    """By the labels of people. `difference` is that of the shares of right answers, shadow minus champion.

    `verdict` is better, worse or cannot tell. `num_more`: how many labels more would tell, if the difference is as
    found; None: there is none to tell, or it is told.
    """

    verdict: str
    num_labels: int
    champion: float
    shadow: float
    difference: float
    low: float
    high: float
    only_shadow: int
    only_champion: int
    num_more: int | None


@dataclass(frozen=True)
class Difference:
    """An image on which the two differ. `is_kept`: its bytes are in the store."""

    image_sha256: str
    request_id: str
    champion: str
    shadow: str
    is_kept: bool


@dataclass(frozen=True)
class Comparison:
    """`num_unmatched` answers have no row in the prediction log, or another champion's. Times: p50 and p99, in ms."""

    num_answered: int
    num_failed: int
    problems: tuple[str, ...]
    num_unmatched: int
    num_images: int
    num_agreeing: int
    agreement: tuple[float, float] | None
    champion_ms: tuple[float, float] | None
    shadow_ms: tuple[float, float] | None
    differences: tuple[Difference, ...]
    labels: Verdict | None


def load_comparison(store: "ObjectStore", name: str, order: Order, alpha: float) -> Comparison:
    """Read what the shadow of an order answered, and compare it. Raises StoreError."""
    since = datetime.fromisoformat(order.started_at)
    answers = read_shadow(store, name, order).to_pylist()
    wanted = {row["request_id"] for row in answers}
    predictions = read_predictions(store, name, since, columns=COLUMNS).table
    feedback = read_feedback(store, name, since).table
    rows = [row for row in join_feedback(predictions, feedback).to_pylist() if row["request_id"] in wanted]
    return compare(answers, rows, alpha)


def compare(answers: Sequence[dict[str, Any]], predictions: Sequence[dict[str, Any]], alpha: float) -> Comparison:
    """Compare rows of a shadow with those of the prediction log, with feedback, by `request_id`.

    Of several champions the newest counts.
    """
    good = {row["request_id"]: row for row in answers if row["prediction"] is not None}
    matched = sorted((row for row in predictions if row["request_id"] in good), key=lambda row: row["time"])
    matched = [row for row in matched if row["model_digest"] == matched[-1]["model_digest"]]
    pairs = list({row["image_sha256"]: (row, good[row["request_id"]]) for row in matched}.values())
    differ = [(one, other) for one, other in pairs if one["prediction"] != other["prediction"]]
    agreement = compute_wilson(len(pairs) - len(differ), len(pairs)) if pairs else None
    failed = [row["problem"] or "?" for row in answers if row["prediction"] is None]
    return Comparison(
        num_answered=len(good),
        num_failed=len(failed),
        problems=tuple(sorted(set(failed))),
        num_unmatched=len(good) - len(matched),
        num_images=len(pairs),
        num_agreeing=len(pairs) - len(differ),
        agreement=(agreement.low or 0.0, agreement.high or 0.0) if agreement else None,
        champion_ms=_find_times([row["network_ms"] for row in matched if not row["cached"]]),
        shadow_ms=_find_times([row["network_ms"] for row in good.values()]),
        differences=tuple(
            Difference(
                one["image_sha256"], one["request_id"], one["prediction"], other["prediction"], bool(one["image_kept"])
            )
            for one, other in differ
        ),
        labels=_judge(pairs, alpha),
    )


def judge_hits(hits: Hits, alpha: float) -> Verdict:
    """Say by the gate's paired test which model is better. Both claims together are false in `alpha` of cases."""
    low, high = hits.compute_interval(1 - alpha)
    verdict = "cannot tell"
    if hits.compute_p_above() <= alpha / 2:
        verdict = "better"
    elif hits.compute_p_below() <= alpha / 2:
        verdict = "worse"
    more = None
    if verdict == "cannot tell":
        number = hits.num_images
        needed = estimate_images(abs(hits.value), hits.compute_error(), number, 0.0, alpha / 2)
        more = None if needed is None else max(1, needed - number)
    return Verdict(
        verdict,
        hits.num_images,
        float(hits.champion_g.sum() / hits.num_images),
        float(hits.candidate_g.sum() / hits.num_images),
        hits.value,
        low,
        high,
        hits.only_candidate,
        hits.only_champion,
        more,
    )


def _judge(pairs: Sequence[tuple[dict[str, Any], dict[str, Any]]], alpha: float) -> Verdict | None:
    labelled = [(one, other) for one, other in pairs if one["feedback_labels"] is not None]
    if not labelled:
        return None
    truth = [_make_set("|".join(one["feedback_labels"])) for one, _ in labelled]
    rights = [
        np.array([_make_set(row["prediction"]) == label for row, label in zip(rows, truth, strict=True)])
        for rows in zip(*labelled, strict=True)
    ]
    champion_n, shadow_n = rights
    return judge_hits(count_hits(shadow_n, champion_n, np.arange(len(truth))), alpha)


def _make_set(text: str) -> frozenset[str]:
    """Return the labels of an answer, which has several as one text."""
    return frozenset(text.split("|")) - {""}


def _find_times(values: Sequence[float | None]) -> tuple[float, float] | None:
    known = [value for value in values if value is not None]
    return (float(np.quantile(known, 0.5)), float(np.quantile(known, 0.99))) if known else None
