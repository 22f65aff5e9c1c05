"""Everything of a card that is tuned on the validation side: temperature, biases, thresholds, when to abstain. Pure.

First the scale of the logits, then the thresholds on these probabilities, then the rule of when the model does not
know: answers depend on both. All is fitted on one side, which also chose the epoch. So a promise is a little too good,
and `evaluate` shows what became of it on the test side.

Dimensions: n images, k classes, d embedding size, r reference embeddings.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from visionloop.confidence import (
    compute_distances,
    compute_probs,
    describe_limit,
    pick_reference,
    pick_rows,
    scale_to_one,
)
from visionloop.evaluation.calibration import FIGURES, IntArray, fit_scale, number_keys
from visionloop.evaluation.promises import Promise, find_promise, keep_one_of_a_key
from visionloop.evaluation.thresholds import PLAIN, Chosen, choose_threshold
from visionloop.params.train import Abstain, Threshold
from visionloop.predictor import Choices, choose_classes, compute_confidence
from visionloop.records import Card

NEIGHBOURS = 5
MAX_NAMED = 5
SATURATED = 0.999  # of a limit of confidence: above it next to nothing tells images apart


@dataclass(frozen=True)
class Validation:
    """What a model says of the validation images, in the order of sha256, and what is true.

    `truth` holds classes (n,), or for several labels which ones (n, k). `key_n` says which images belong together.
    """

    logits_nk: NDArray[np.float32]
    embedding_nd: NDArray[np.float32]
    truth: Choices
    key_n: IntArray


def tune_card(
    card: Card, validation: Validation, threshold: Threshold, abstain: Abstain | None, *, with_biases: bool
) -> tuple[Card, list[str]]:
    """Return the card with all that was tuned, and lines for people. `with_biases`: the training weighed classes."""
    num_images, num_keys = len(validation.key_n), number_keys(validation.key_n)[1]
    facts: dict[str, Any] = {"on": "val", "num_images": num_images, "num_keys": num_keys}
    card, lines = _tune_scale(card, validation, facts, with_biases=with_biases)
    probs_nk = compute_probs(validation.logits_nk, card)
    card, more = _tune_thresholds(card, validation, probs_nk, threshold, facts)
    lines += more
    if abstain is not None:
        card, more = _tune_abstain(card, validation, probs_nk, abstain, facts)
        lines += more
    return replace(card, tuning=facts), lines


def _tune_scale(
    card: Card, validation: Validation, facts: dict[str, Any], *, with_biases: bool
) -> tuple[Card, list[str]]:
    fit = fit_scale(validation.logits_nk, validation.truth, validation.key_n, with_biases=with_biases)
    facts |= {"kept": fit.kept, "before": fit.before, "after": fit.after}
    scale = fit.scale
    biases = None
    if scale.bias_k is not None:
        biases = {name: float(b) for name, b in zip(card.classes, scale.bias_k, strict=True)}
    if fit.why:
        line = f"confidence: probabilities stay as they are: {fit.why}"
    else:
        figures = ", ".join(f"{FIGURES[n]} {fit.before[n]:.3f} -> {fit.after[n]:.3f}" for n in fit.before)
        line = f"confidence: {fit.kept} fitted on validation (T {scale.temperature:.3g}); held-out images: {figures}"
    return replace(card, temperature=scale.temperature, biases=biases), [line]


def _tune_thresholds(
    card: Card, validation: Validation, probs_nk: NDArray[np.float32], wanted: Threshold, facts: dict[str, Any]
) -> tuple[Card, list[str]]:
    """Choose the threshold of a binary model, or that of each class of a multilabel one."""
    if card.task == "multiclass":
        return card, []
    single_n = keep_one_of_a_key(validation.key_n)
    if card.task == "binary":
        names, columns = [card.classes[1]], [(probs_nk[:, 1], validation.truth == 1)]
    else:
        names = list(card.classes)
        columns = [(probs_nk[:, k], validation.truth[:, k].astype(bool)) for k in range(len(names))]
    chosen = {name: choose_threshold(*col, single_n, wanted) for name, col in zip(names, columns, strict=True)}
    values = {name: one.threshold for name, one in chosen.items()}
    if wanted.at is None:
        facts["threshold"] = {
            "wanted": wanted.model_dump(mode="json"),
            "promised": {name: one.promised for name, one in chosen.items()},
            "kept": {name: one.is_kept for name, one in chosen.items()},
        }
    lines = [] if wanted.at == PLAIN else _describe_thresholds(chosen)
    if card.task == "binary":
        return replace(card, threshold=values[card.classes[1]]), lines
    return replace(card, thresholds=values), lines


def _describe_thresholds(chosen: dict[str, Chosen]) -> list[str]:
    """Name the classes, those first whose wish was not met; at most five, and the number of the others."""
    ordered = sorted(chosen.items(), key=lambda item: (item[1].is_kept, item[0]))
    lines = [
        f"{'' if one.is_kept else 'LOOK: '}threshold of {name}: {describe_limit(one.threshold)} ({one.words})"
        for name, one in ordered[:MAX_NAMED]
    ]
    return lines + [f"threshold: {len(ordered) - MAX_NAMED} more classes, on the card"] * (len(ordered) > MAX_NAMED)


def _tune_abstain(
    card: Card, validation: Validation, probs_nk: NDArray[np.float32], wanted: Abstain, facts: dict[str, Any]
) -> tuple[Card, list[str]]:
    """Find when the model does not know. Where the wanted share of errors cannot be promised, it has no such rule."""
    chosen = choose_classes(probs_nk, card)
    same = np.equal(validation.truth, chosen)
    hits_n = np.asarray(same.all(axis=1) if same.ndim == 2 else same)
    confidence_n = compute_confidence(probs_nk, chosen).astype(np.float32)
    rule: dict[str, Any] = {"confidence": None, "distance": None}
    lines: list[str] = []
    single_n = keep_one_of_a_key(validation.key_n)
    if wanted.coverage is not None:
        distance_n = compute_left_out_distances(validation.embedding_nd, validation.key_n)
        limit = choose_distance(distance_n[single_n], wanted.coverage)
        if limit is None:
            lines.append(
                f"LOOK: abstain: {len(single_n)} independent validation images are too few for a limit that keeps "
                f"{wanted.coverage:.0%} of images like them: no rule by distance"
            )
        else:
            rule |= {"distance": limit, "neighbours": NEIGHBOURS, "coverage": wanted.coverage}
            confidence_n = np.where(distance_n <= limit, confidence_n, -np.inf).astype(np.float32)
    facts["abstain"] = {"wanted": wanted.model_dump(mode="json"), "promised": None}
    if wanted.error is not None:
        promise = find_promise(confidence_n[single_n], hits_n[single_n], wanted.error, wanted.delta)
        facts["abstain"] |= _to_facts(promise)
        if not promise.kept:
            return card, [*lines, describe_refusal(promise, wanted)]
        rule |= {"confidence": promise.limit, "error": wanted.error, "delta": wanted.delta}
        share = promise.num_answered / len(single_n)
        lines.append(
            f"abstain: answers from confidence {describe_limit(promise.limit)} on, {share:.1%} of the validation "
            f"images; of these {promise.num_wrong} of {promise.num_answered} were wrong, at most {promise.bound:.2%} "
            "is promised"
        )
        if promise.limit > SATURATED:
            lines.append(
                f"LOOK: abstain: nearly all confidences are close to 1, and the limit is above {SATURATED:g}: which "
                "images are answered is near to a lottery. More validation images, or a larger train.abstain.error, "
                "bring the limit down"
            )
    if rule["distance"] is not None:
        lines.append(f"abstain: where the {NEIGHBOURS}th nearest validation image is farther than {limit:.3g}")
    return replace(card, abstain=rule if any(rule[n] is not None for n in ("confidence", "distance")) else None), lines


def _to_facts(promise: Promise) -> dict[str, Any]:
    return {
        "promised": promise.bound if promise.kept else None,
        "best_bound": promise.bound,
        "num_answered": promise.num_answered,
        "num_wrong": promise.num_wrong,
    }


def describe_refusal(promise: Promise, wanted: Abstain) -> str:
    """Say why no share of wrong answers can be promised, and what it would take."""
    assert wanted.error is not None
    number = promise.num_images
    flawless = find_promise(
        np.arange(number, dtype=np.float64), np.ones(number, bool), wanted.error, wanted.delta
    ).bound
    least = f"; it takes {promise.least} without a mistake, and these could promise {flawless:.2%} at best"
    return (
        f"LOOK: abstain: at most {wanted.error:.2%} wrong cannot be promised with {promise.num_images} independent "
        f"validation images{least if promise.num_images < promise.least else ''}. The lowest bound that was reached is "
        f"{promise.bound:.2%} ({promise.num_wrong} wrong among the surest {promise.num_answered}). The model answers "
        "everything. Add images, or raise train.abstain.error"
    )


def compute_left_out_distances(embedding_nd: NDArray[np.float32], key_n: IntArray) -> NDArray[np.float32]:
    """Return how far each validation image is from the others, those of its own key left out: as a new one would be.

    inf where there are fewer than NEIGHBOURS others.
    """
    rows_r = pick_rows(len(embedding_nd))
    reference_rd, unit_nd = pick_reference(embedding_nd), scale_to_one(embedding_nd)
    distance_n = np.full(len(embedding_nd), np.inf, np.float32)
    for start in range(0, len(embedding_nd), 1000):
        block = slice(start, start + 1000)
        mine_nr = key_n[block, None] == key_n[rows_r]
        distance_n[block] = compute_distances(unit_nd[block], reference_rd, NEIGHBOURS, without_nr=mine_nr)
    return distance_n


def choose_distance(distance_n: NDArray[np.float32], coverage: float) -> float | None:
    """Return the distance that keeps a share of images like these: the ceil((n + 1) coverage)-th smallest.

    That rank makes the chance of one more image to be kept at least `coverage` (conformal prediction: Papadopoulos et
    al. 2002). None: there are too few images for it.
    """
    rank = math.ceil((len(distance_n) + 1) * coverage - 1e-9)
    if rank > len(distance_n):
        return None
    limit = float(np.sort(distance_n)[rank - 1])
    return limit if math.isfinite(limit) else None
