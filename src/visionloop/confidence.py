"""From logits to probabilities, and when a model does not know. Pure: what is on a card, put to use. numpy only.

Dimensions: n images, k classes, d embedding size, r reference embeddings.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from visionloop.errors import BundleError
from visionloop.records import Card

MAX_REFERENCE = 5000  # embeddings that distances are taken to: 26 MB at 1,280 numbers each
GOLDEN_TOLERANCE, MOST_TOLERANCE = 2e-2, 0.5  # of a logit, relative to the largest one; with less than fp32 at most
FloatArray = NDArray[np.float32]
BoolArray = NDArray[np.bool_]


def compute_probs(logits_nk: NDArray[np.floating], card: Card) -> FloatArray:
    """Return the probabilities (n, k) of logits, by the card's temperature and biases."""
    scaled_nk = logits_nk.astype(np.float64) / card.temperature
    if card.biases is not None:
        scaled_nk += np.array([card.biases[name] for name in card.classes])
    return (sigmoid if card.task == "multilabel" else softmax)(scaled_nk)


def softmax(logits_nk: NDArray[np.floating]) -> FloatArray:
    """Softmax over the last axis, in float64 inside."""
    shifted = logits_nk.astype(np.float64) - logits_nk.max(axis=-1, keepdims=True)
    exp = np.exp(shifted)
    return np.asarray(exp / exp.sum(axis=-1, keepdims=True), dtype=np.float32)


def sigmoid(logits_nk: NDArray[np.floating]) -> FloatArray:
    """Return 1 / (1 + exp(-z)) of each logit, in float64 inside. The exponent is never positive: no overflow."""
    small = np.exp(-np.abs(logits_nk.astype(np.float64)))
    return np.where(logits_nk >= 0, 1 / (1 + small), small / (1 + small)).astype(np.float32)


def get_limit(card: Card, name: str) -> float | None:
    """Return a limit of the card's rule of when it does not know: `confidence` or `distance`. None: it has none."""
    value = (card.abstain or {}).get(name)
    return None if value is None else float(value)


def compute_distances(
    embedding_nd: FloatArray, reference_rd: FloatArray, neighbours: int, *, without_nr: BoolArray | None = None
) -> FloatArray:
    """Return the distance of each embedding to its `neighbours`-th nearest of the reference (rows of length 1), (n,).

    Embeddings are scaled to length 1, so it is 0 for the same direction and 2 for the opposite one. Sun, Ming, Zhu and
    Li, "Out-of-distribution detection with deep nearest neighbors", ICML 2022. `without_nr` says which of the reference
    do not count; inf where fewer than `neighbours` are left.
    """
    if len(reference_rd) < neighbours:
        return np.full(len(embedding_nd), np.inf, np.float32)
    cosine_nr = scale_to_one(embedding_nd) @ reference_rd.T
    if without_nr is not None:
        cosine_nr[without_nr] = -np.inf
    nearest_n = np.partition(cosine_nr, -neighbours, axis=1)[:, -neighbours]
    return np.asarray(np.sqrt(np.maximum(2 - 2 * nearest_n, 0)), dtype=np.float32)


def scale_to_one(embedding_nd: FloatArray) -> FloatArray:
    """Return embeddings as float32 vectors of length 1; a zero vector stays one."""
    embedding_nd = embedding_nd.astype(np.float32)
    length_n1 = np.linalg.norm(embedding_nd, axis=1, keepdims=True)
    return np.asarray(embedding_nd / np.where(length_n1 > 0, length_n1, 1))


def pick_rows(num_images: int) -> NDArray[np.int64]:
    """Return the rows of the validation images that distances are taken to: evenly picked, at most MAX_REFERENCE."""
    return np.linspace(0, num_images - 1, min(MAX_REFERENCE, num_images)).round().astype(np.int64)


def pick_reference(embedding_nd: FloatArray) -> FloatArray:
    """Return the embeddings that distances are taken to, scaled to length 1."""
    return scale_to_one(embedding_nd[pick_rows(len(embedding_nd))])


def find_abstained(
    confidence_n: NDArray[np.floating], distance_n: NDArray[np.floating] | None, card: Card
) -> BoolArray:
    """Say for which images the model does not know, by the rule of its card: too unsure, or unlike what it has seen."""
    abstained_n = np.zeros(len(confidence_n), bool)
    if (least := get_limit(card, "confidence")) is not None:
        abstained_n |= ~(confidence_n.astype(np.float64) >= least)
    if (most := get_limit(card, "distance")) is not None and distance_n is not None:
        abstained_n |= ~(distance_n.astype(np.float64) <= most)
    return abstained_n


def describe_doubt(confidence: float, distance: float | None, card: Card) -> str:
    """Say why the model does not know: `confidence 0.61 < 0.83`, or that the image is unlike those it has seen."""
    least, most = get_limit(card, "confidence"), get_limit(card, "distance")
    reasons = []
    if least is not None and not confidence >= least:
        reasons.append(f"confidence {_tell_apart(confidence, least, '<')}")
    if most is not None and distance is not None and not distance <= most:
        reasons.append(f"unlike the validation images: distance {_tell_apart(distance, most, '>')}")
    return "; ".join(reasons)


def describe_limit(limit: float) -> str:
    """Return `0.83`, and of a limit just below 1 as many digits as it takes not to read 1: `0.99999`."""
    digits = next((d for d in range(3, 17) if limit == 1 or float(f"{limit:.{d}g}") < 1), 17)
    return f"{limit:.{digits}g}"


def _tell_apart(value: float, limit: float, sign: str) -> str:
    """Return `0.61 < 0.83`, with as many digits as it takes to see the difference."""
    digits = next((d for d in range(2, 9) if f"{value:.{d}f}" != f"{limit:.{d}f}"), 9)
    return f"{value:.{digits}f} {sign} {limit:.{digits}f}"


def check_abstain(rule: Any, where: str, todo: str) -> None:
    """Raise BundleError for a rule of when to abstain that cannot be followed."""
    known = isinstance(rule, dict) and all(
        rule.get(name) is None or is_number(rule[name]) for name in ("confidence", "distance")
    )
    neighbours = rule.get("neighbours") if known else None
    is_count = isinstance(neighbours, int) and not isinstance(neighbours, bool) and neighbours >= 1
    if not known or (rule.get("distance") is not None and not is_count):
        expected = "numbers `confidence` and `distance`, and with a distance a count of `neighbours`"
        raise BundleError(where, f"has the abstain rule {rule!r}"[:120], expected, todo)


def compute_difference(logits_nk: NDArray[np.floating], golden_nk: NDArray[np.floating]) -> float:
    """Return the largest difference of a logit, relative to the largest golden one, if that is above 1."""
    return float(np.abs(logits_nk - golden_nk).max()) / max(1.0, float(np.abs(golden_nk).max()))


def get_tolerance(card: Card, engine: str) -> float:
    """Return how far an engine's golden logits may be off: as far as the card says, which is more for int8."""
    value: Any = get_engine_facts(card, engine).get("tolerance")
    return min(max(GOLDEN_TOLERANCE, float(value)), MOST_TOLERANCE) if is_number(value) else GOLDEN_TOLERANCE


def get_engine_facts(card: Card, engine: str) -> Mapping[str, Any]:
    """Return what the card says of an engine; empty where it says nothing, or nothing that can be read."""
    found = card.engines.get(engine) if isinstance(card.engines, Mapping) else None
    return found if isinstance(found, Mapping) else {}


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
