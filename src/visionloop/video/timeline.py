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

A camera has no end to wait for. There a frame is settled as soon as the cheapest paths to all classes of the newest
frame agree about it: whatever comes, it stays as it is, and it is what the whole film would have given. In the second
line dog is settled at the fourth frame: the cheapest path that ends with a cat then goes through dog as well.

Dimensions: t frames, k classes.
"""

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

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
    end_s: float = 0.0,
) -> Timeline:
    """Join frames, one at least, into segments. `doubts` says of each frame why the model does not know it.

    `times_s` rise; `smooth_s` 0: nothing is smoothed. `end_s` as in `measure_frames`.
    """
    follower = Follower(card, smooth_s)
    seconds_t = measure_frames(times_s, every_s, end_s)
    for time_s, seconds, probs_k, doubt in zip(times_s, seconds_t, probs_tk, doubts, strict=True):
        follower.add(float(time_s), float(seconds), probs_k, doubt)
    return _sum_up(follower.finish(), card)


def measure_frames(times_s: Sequence[float], every_s: float, end_s: float) -> Floats:
    """Return for how long each frame is shown: the last one for `every_s`, or until `end_s` if that comes after it."""
    left_s = end_s - times_s[-1]
    return np.diff([*times_s, times_s[-1] + (min(every_s, left_s) if left_s > 0 else every_s)])


def describe_timeline(timeline: Timeline, num_frames: int, notes: Sequence[str], **asked: float) -> dict[str, Any]:
    """Return a timeline as JSON; `notes` say what is to be known of the reading, `asked` are `every_s` and `smooth_s`.

    These are the words of `POST /predict/video` and of `visionloop predict`.
    """
    whole = {"duration_s": timeline.segments[-1].end_s, "num_frames": num_frames, **asked, "notes": list(notes)}
    return {**asdict(timeline), **whole}


class Follower:
    """Smooths frames as they come, and joins them into segments: the same ones as of all frames at once.

    Without `most_waiting` nothing is settled before `finish`. With it a frame is settled after so many later ones at
    the latest, even if nothing sure was seen in that time.
    """

    def __init__(self, card: Card, smooth_s: float, most_waiting: int | None = None) -> None:
        self._card, self._most_waiting = card, most_waiting
        self._finders = [PathFinder(smooth_s) for _ in range(len(_split(np.zeros(len(card.classes)), card)) + 1)]
        self._columns: list[deque[int]] = [deque() for _ in self._finders]
        self._waiting: deque[_Shown] = deque()
        self._part: _Part | None = None

    @property
    def current(self) -> Segment | None:
        """The segment that goes on, as far as it is settled."""
        return self._part.close(self._card) if self._part else None

    def add(self, time_s: float, seconds: float, probs_k: NDArray[np.floating], doubt: str | None) -> list[Segment]:
        """Take the next frame, which is shown for so long; return the segments that have ended."""
        shown = _Shown(time_s, seconds, np.asarray(probs_k, np.float64), doubt)
        self._waiting.append(shown)
        sides = [*_split(shown.probs_k, self._card), _two_sides(float(doubt is not None))]
        for finder, side_k, columns in zip(self._finders, sides, self._columns, strict=True):
            finder.add(side_k, seconds)
            if self._most_waiting is not None:
                columns.extend(finder.settle(self._most_waiting))
        return self._join()

    def finish(self) -> list[Segment]:
        """Settle every frame; return the segments that were not returned yet. The next frame begins anew."""
        for finder, columns in zip(self._finders, self._columns, strict=True):
            columns.extend(finder.finish())
        segments = self._join()
        if self._part:
            segments.append(self._part.close(self._card))
        self._part = None
        return segments

    def _join(self) -> list[Segment]:
        """Move the frames that are settled into segments."""
        ended = []
        for _ in range(min(map(len, self._columns))):
            *labels, is_unsure = (columns.popleft() for columns in self._columns)
            chosen = tuple(labels) if self._card.task == "multilabel" else tuple(_one_hot(labels[0], self._card))
            if self._part is None or (self._part.chosen, self._part.is_unsure) != (chosen, bool(is_unsure)):
                ended += [self._part.close(self._card)] if self._part else []
                self._part = _Part(chosen, bool(is_unsure), self._waiting[0].time_s)
            self._part.add(self._waiting.popleft(), several=self._card.task == "multilabel")
        return ended


@dataclass(frozen=True)
class _Shown:
    """A frame that is not settled yet."""

    time_s: float
    seconds: float
    probs_k: Floats
    doubt: str | None


@dataclass
class _Part:
    """A segment that grows: which classes it shows (1), whether the model does not know, and what it came to."""

    chosen: tuple[int, ...]
    is_unsure: bool
    start_s: float
    seconds: float = 0.0
    confident_s: float = 0.0  # the sum of probability times seconds
    doubt: str | None = None
    num_frames: int = 0

    def add(self, shown: _Shown, *, several: bool) -> None:
        """Take a frame."""
        chosen_k = np.array(self.chosen, bool)
        sides_k = np.where(chosen_k, shown.probs_k, 1 - shown.probs_k) if several else shown.probs_k[chosen_k]
        self.seconds += shown.seconds
        self.confident_s += float(sides_k.prod()) * shown.seconds
        self.doubt = self.doubt or shown.doubt
        self.num_frames += 1

    def close(self, card: Card) -> Segment:
        """Return it as it is."""
        names = tuple(name for name, is_there in zip(card.classes, self.chosen, strict=True) if is_there)
        return Segment(
            start_s=round(self.start_s, 3),
            end_s=round(self.start_s + self.seconds, 3),
            prediction=LABEL_SEPARATOR.join(names),
            labels=names if card.task == "multilabel" else None,
            confidence=min(1.0, self.confident_s / self.seconds),
            abstained=self.doubt if self.is_unsure else None,
            num_frames=self.num_frames,
        )


class PathFinder:
    """The cheapest path (see the module's docstring), frame by frame. A frame costs O(k), and its settling O(k) each.

    `_links[i]` says of each column of waiting frame i + 1 from which column of frame i its cheapest path comes.
    """

    def __init__(self, smooth_s: float) -> None:
        self._price = smooth_s / 2 * np.log(HIGH / LOW)
        self._best_k: Floats | None = None
        self._links: list[NDArray[np.int64]] = []
        self._num_waiting = 0

    def add(self, probs_k: Floats, seconds: float) -> None:
        """Take the next frame."""
        cost_k = -seconds * np.log(np.clip(probs_k, LOW, HIGH))
        cost_k -= 1e-9 * probs_k  # among those that were cut to the same, the likelier one
        if self._best_k is not None:
            cheapest = int(self._best_k.argmin())
            limit = self._best_k[cheapest] + self._price
            stays_k = self._best_k <= limit
            self._links.append(np.where(stays_k, np.arange(len(probs_k)), cheapest))
            cost_k += np.where(stays_k, self._best_k, limit)
        self._best_k = cost_k - cost_k.min()  # so that the sum of days is as exact as that of a minute
        self._num_waiting += 1

    def settle(self, most_waiting: int) -> list[int]:
        """Return the columns of the frames that are settled, in their order; more than so many never wait."""
        if self._best_k is None:
            return []
        from_k = np.arange(len(self._best_k))
        for number, link_k in enumerate(reversed(self._links), start=1):
            from_k = link_k[from_k]
            if (from_k == from_k[0]).all():
                return self._take(self._num_waiting - number, int(from_k[0]))
            if number == most_waiting:  # the path that is the cheapest now is kept, and those beside it end
                column = int(from_k[self._best_k.argmin()])
                self._best_k = np.where(from_k == column, self._best_k, np.inf)
                return self._take(self._num_waiting - number, column)
        return []

    def finish(self) -> list[int]:
        """Return the columns of all frames that wait. The next frame begins anew."""
        if self._best_k is None:
            return []
        column, self._best_k = int(self._best_k.argmin()), None
        return self._take(self._num_waiting, column)

    def _take(self, number: int, column: int) -> list[int]:
        """Return the columns of the first waiting frames, of which the last has this one."""
        path = [column] if number else []
        for link_k in reversed(self._links[: max(0, number - 1)]):
            path.append(int(link_k[path[-1]]))
        del self._links[:number]
        self._num_waiting -= number
        return path[::-1]


def _split(probs_k: Floats, card: Card) -> list[Floats]:
    """Return what is decided by itself: for several labels each label's two sides, else the classes of a frame."""
    if card.task == "multilabel":
        limits = card.thresholds or {}
        return [
            _two_sides(_centre(float(p), limits.get(name, 0.5))) for name, p in zip(card.classes, probs_k, strict=True)
        ]
    if card.task == "binary" and card.threshold is not None:
        return [_two_sides(_centre(float(probs_k[1]), card.threshold))]
    return [probs_k]


def _centre(p: float, threshold: float) -> float:
    """Move a probability so that the threshold comes to one half, and 0 and 1 stay where they are."""
    above, below = p * (1 - threshold), (1 - p) * threshold
    return above / (above + below) if above + below > 0 else 0.5


def _two_sides(p: float) -> Floats:
    return np.array([1 - p, p])


def _one_hot(column: int, card: Card) -> list[int]:
    return [int(k == column) for k in range(len(card.classes))]


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
