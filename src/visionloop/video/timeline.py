"""What a video shows when: the answers for its frames, smoothed over time, and joined into segments. Pure.

A network that sees one frame at a time flickers. Here each frame speaks for a class by its probability and for as long
as it is shown, and each change costs something. The cheapest path is found by Viterbi's algorithm (Rabiner 1989,
section III B), with one price for every change (the Potts model; Storath & Weinmann 2014, for signals over time):

    cost = sum of seconds_t * -log p_t(class_t) + price * number of changes,   price = smooth_s / 2 * log(HIGH / LOW)

Probabilities are cut to LOW and HIGH: no frame is surer than that. So whatever contradicts its surroundings for less
than `smooth_s`, however surely, is taken for a flicker, and what does so surely for longer is believed. An example,
a frame every second, smooth_s = 1.5, LOW = 0.02, so a change costs 1.5 / 2 * log(0.98 / 0.02) = 2.92:

    p(cat)   .9  .9  .02  .9  .9  .9     dog for 1 s saves 3.89, and costs 2 * 2.92:   cat cat cat cat cat cat
    p(cat)   .9  .9  .02  .02 .9  .9     dog for 2 s saves 7.78:                       cat cat dog dog cat cat

Dimensions: t frames, k classes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from visionloop.records import LABEL_SEPARATOR, Card

LOW, HIGH = 0.02, 0.98
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Segment:
    """A part of a video with one answer. `confidence` is the mean probability of it over the time.

    `abstained` says why the model does not know what most of it shows; None: it does. `labels`: of multilabel.
    """

    start_s: float
    end_s: float
    prediction: str
    labels: tuple[str, ...] | None
    confidence: float
    abstained: str | None
    num_frames: int


@dataclass(frozen=True)
class Timeline:
    """The segments of a video, without gaps, and the answer for all of it: what it shows for the longest time.

    `shares` are the parts of the time (0 to 1) for which the model knows the label to be seen, the largest first; with
    several labels they may add up to more than 1. The overall `labels` are all of those.
    """

    segments: tuple[Segment, ...]
    prediction: str
    labels: tuple[str, ...] | None
    confidence: float
    abstained: str | None
    shares: Mapping[str, float]


def make_timeline(
    times_s: Sequence[float],
    probs_tk: NDArray[np.floating],
    doubts: Sequence[str | None],
    card: Card,
    *,
    every_s: float,
    smooth_s: float,
) -> Timeline:
    """Join frames, one at least, into segments. `doubts` says of each frame why the model does not know it.

    `times_s` rise; the last frame is taken to be shown for `every_s`. `smooth_s` 0: nothing is smoothed.
    """
    seconds_t = np.diff([*times_s, times_s[-1] + every_s])
    labels_tk = _choose(probs_tk.astype(np.float64), seconds_t, card, smooth_s)
    unsure_t = find_path(_two_sides(np.array([doubt is not None for doubt in doubts], float)), seconds_t, smooth_s)
    state_tk = np.column_stack([labels_tk, unsure_t])
    starts = [0, *(np.flatnonzero((state_tk[1:] != state_tk[:-1]).any(axis=1)) + 1).tolist(), len(seconds_t)]
    segments = []
    for first, end in pairwise(starts):
        part = slice(first, end)
        chosen_k = labels_tk[first].astype(bool)
        names = tuple(name for name, is_there in zip(card.classes, chosen_k, strict=True) if is_there)
        several = card.task == "multilabel"
        sides_tk = np.where(chosen_k, probs_tk[part], 1 - probs_tk[part]) if several else probs_tk[part][:, chosen_k]
        segments.append(
            Segment(
                start_s=round(float(times_s[first]), 3),
                end_s=round(float(times_s[first] + seconds_t[part].sum()), 3),
                prediction=LABEL_SEPARATOR.join(names),
                labels=names if several else None,
                confidence=float(np.average(sides_tk.prod(axis=1), weights=seconds_t[part])),
                abstained=next((doubt for doubt in doubts[part] if doubt), None) if unsure_t[first] else None,
                num_frames=end - first,
            )
        )
    return _sum_up(segments, card)


def find_path(probs_tk: Floats, seconds_t: Floats, smooth_s: float) -> NDArray[np.int64]:
    """Return the column of the cheapest path at each frame (see the module's docstring). O(t k)."""
    cost_tk = -seconds_t[:, None] * np.log(np.clip(probs_tk, LOW, HIGH))
    cost_tk -= 1e-9 * probs_tk  # among those that were cut to the same, the likelier one
    price = smooth_s / 2 * np.log(HIGH / LOW)
    places = np.arange(probs_tk.shape[1])
    best_k, came_from = cost_tk[0], []
    for cost_k in cost_tk[1:]:
        cheapest = int(best_k.argmin())
        stays_k = best_k <= best_k[cheapest] + price
        came_from.append(np.where(stays_k, places, cheapest))
        best_k = np.where(stays_k, best_k, best_k[cheapest] + price) + cost_k
    path = [int(best_k.argmin())]
    for from_k in reversed(came_from):
        path.append(int(from_k[path[-1]]))
    return np.array(path[::-1])


def _choose(probs_tk: Floats, seconds_t: Floats, card: Card, smooth_s: float) -> NDArray[np.int64]:
    """Return 1 for each class that a frame shows after smoothing, else 0."""
    if card.task == "multilabel":
        limits = card.thresholds or {}
        sides = [
            find_path(_two_sides(_centre(probs_tk[:, k], limits.get(name, 0.5))), seconds_t, smooth_s)
            for k, name in enumerate(card.classes)
        ]
        return np.column_stack(sides)
    if card.task == "binary" and card.threshold is not None:
        probs_tk = _two_sides(_centre(probs_tk[:, 1], card.threshold))
    path_t = find_path(probs_tk, seconds_t, smooth_s)
    return np.asarray(path_t[:, None] == np.arange(probs_tk.shape[1]), np.int64)


def _centre(p_t: Floats, threshold: float) -> Floats:
    """Move probabilities so that the threshold comes to one half, and 0 and 1 stay where they are."""
    above, below = p_t * (1 - threshold), (1 - p_t) * threshold
    return np.asarray(np.divide(above, above + below, out=np.full_like(p_t, 0.5), where=above + below > 0))


def _two_sides(p_t: Floats) -> Floats:
    return np.column_stack([1 - p_t, p_t])


def _sum_up(segments: Sequence[Segment], card: Card) -> Timeline:
    whole_s = sum(_length(each) for each in segments)
    known = [each for each in segments if each.abstained is None]
    known_s = sum(_length(each) for each in known)
    judged = known if known_s >= whole_s / 2 else segments
    lengths: dict[str, float] = {}
    for each in judged:
        lengths[each.prediction] = lengths.get(each.prediction, 0.0) + _length(each)
    prediction = max(lengths, key=lambda name: lengths[name])
    seen: dict[str, float] = {}
    for each in known:
        for label in each.labels if each.labels is not None else (each.prediction,):
            seen[label] = seen.get(label, 0.0) + _length(each) / whole_s
    labels = None
    if card.task == "multilabel":
        labels = tuple(name for name in card.classes if name in seen)
        prediction = LABEL_SEPARATOR.join(labels)
        chosen = judged
    else:
        chosen = [each for each in judged if each.prediction == prediction]
    weights = [_length(each) for each in chosen]
    doubt = None
    if judged is segments and known_s < whole_s / 2:
        first = next(each.abstained for each in segments if each.abstained)
        doubt = f"it does not know for {1 - known_s / whole_s:.0%} of the time: {first}"
    return Timeline(
        segments=tuple(segments),
        prediction=prediction,
        labels=labels,
        confidence=float(np.average([each.confidence for each in chosen], weights=weights)),
        abstained=doubt,
        shares=dict(sorted(seen.items(), key=lambda item: -item[1])),
    )


def _length(segment: Segment) -> float:
    return max(1e-3, segment.end_s - segment.start_s)
