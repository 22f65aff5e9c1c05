"""The sides of new keys that no source and no family has given one: by class at first, then by the hash alone. Pure.

The first version of a dataset divides each class by itself. Its keys are ranked by their hash; the first of them go to
test, the next to val, the others to train. So each side of a class has its fraction, but for less than one key. The
bare hash of 39 images gave 35, 4 and 1. Later images go by the hash alone: their side must not depend on what comes
with them. Only where a class has fewer than `min_train` keys on train, its new keys go there, whatever their hash says.

An image of several labels, and a family of several classes, counts for the rarest of them.
"""

import hashlib
import math
from array import array
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import compress

import numpy as np
from numpy.typing import NDArray

from visionloop.records import SIDES

USED = SIDES[:3]
_TRAIN, _VAL, _TEST = range(3)
Fractions = tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Undecided:
    """A family without a side, by its key. `learn`: its source has a test folder, so it may become train or val."""

    key: str
    labels: frozenset[str]
    learn: bool = False


@dataclass(frozen=True)
class Division:
    """The side of each undecided family, in their order, and how many keys of a class `min_train` brought to train."""

    sides: list[str]
    brought: dict[str, int]


def divide(
    families: Iterable[Undecided],
    seed: int,
    fractions: Fractions,
    *,
    is_first: bool,
    min_train: int = 0,
    num_train: Mapping[str, int] | None = None,
) -> Division:
    """Give each family a side. `num_train` counts the keys that a class has on train already.

    The order of the families does not matter. They are read twice where positions are equal.
    """
    table = _Table(families, seed, None if is_first else fractions)
    if not table.sets:
        return Division([], {})
    side_n = _divide_by_class(table, fractions) if is_first else table.side_n
    brought = _bring(table, side_n, min_train, Counter(num_train or {}))
    return Division([USED[side] for side in side_n.tolist()], brought)


class _Table:
    """Families as columns, for there are millions: positions, numbers of their labels in `sets`, `learn`.

    The sides that the bare hash gives are those of `fractions`; None: they are not asked for. Keys are not held: where
    positions are equal (of 5 million keys once in a thousand datasets) the families are read again, for `tie_n`.
    """

    def __init__(self, families: Iterable[Undecided], seed: int, fractions: Fractions | None) -> None:
        numbers: dict[frozenset[str], int] = {}
        positions, sets, learn, sides = array("d"), array("i"), bytearray(), bytearray()
        for one in families:
            positions.append(compute_position(one.key, seed))
            sets.append(numbers.setdefault(one.labels, len(numbers)))
            learn.append(one.learn)
            if fractions:
                sides.append(USED.index(choose_side(one.key, seed, fractions, test_is_given=one.learn)))
        self.sets = [*numbers]
        self.position_n = np.frombuffer(positions, np.float64)
        self.set_n = np.frombuffer(sets, np.int32)
        self.learn_n = np.frombuffer(learn, np.bool_)
        self.side_n = np.frombuffer(sides, np.uint8)
        self.tie_n = self._rank_ties(families)

    def _rank_ties(self, families: Iterable[Undecided]) -> NDArray[np.int32]:
        """Return what decides between equal positions: the rank of the key."""
        tie_n = np.zeros(len(self.position_n), np.int32)
        in_order = np.sort(self.position_n)
        tied = np.isin(self.position_n, in_order[1:][in_order[1:] == in_order[:-1]])
        if tied.any():
            keys = compress((one.key for one in families), tied.tolist())
            tie_n[tied] = np.unique(np.array([*keys], object), return_inverse=True)[1]
        return tie_n

    def count_labels(self, set_n: NDArray[np.int32]) -> Counter[str]:
        """Return how many of these families have each label."""
        counts = Counter[str]()
        for labels, number in zip(self.sets, np.bincount(set_n, minlength=len(self.sets)).tolist(), strict=True):
            counts.update(dict.fromkeys(labels, number))
        return counts


def _divide_by_class(table: _Table, fractions: Fractions) -> NDArray[np.uint8]:
    """Rank the families of each class by their hash, and cut the ranking where the fractions say."""
    counts = table.count_labels(table.set_n)
    rarest = [min(labels, key=lambda label: (counts[label], label), default="") for labels in table.sets]
    pairs = np.unique(2 * table.set_n.astype(np.int64) + table.learn_n).tolist()
    strata = sorted({(bool(pair % 2), rarest[pair // 2]) for pair in pairs})
    number_of = {stratum: number for number, stratum in enumerate(strata)}
    # By the number of the labels, once without and once with `learn`.
    number_ls = np.array([[number_of.get((learn, label), 0) for label in rarest] for learn in (False, True)], np.int32)
    stratum_n = number_ls[table.learn_n.astype(np.int8), table.set_n]
    order = np.lexsort((table.tie_n, table.position_n, stratum_n))
    side_n = np.empty(len(order), np.uint8)
    owed = {learn: dict.fromkeys(USED, 0.0) for learn in (False, True)}
    start = 0
    for (learn, _), size in zip(strata, np.bincount(stratum_n, minlength=len(strata)).tolist(), strict=True):
        numbers = _count_sides(size, _without_test(fractions) if learn else fractions, owed[learn])
        for side in (_TEST, _VAL, _TRAIN):
            end = start + numbers[USED[side]]
            side_n[order[start:end]] = side
            start = end
    return side_n


def _bring(table: _Table, side_n: NDArray[np.uint8], min_train: int, have: Counter[str]) -> dict[str, int]:
    """Bring the nearest keys of classes that have too few on train there, in `side_n`; return how many."""
    have.update(table.count_labels(table.set_n[side_n == _TRAIN]))
    sets_of: dict[str, list[int]] = defaultdict(list)
    for number, labels in enumerate(table.sets):
        for label in labels:
            sets_of[label].append(number)
    order = np.argsort(table.set_n, kind="stable")
    ends = np.cumsum(np.bincount(table.set_n, minlength=len(table.sets)))
    brought: Counter[str] = Counter()
    for label in sorted(label for label in sets_of if have[label] < min_train):
        rows = np.concatenate([order[ends[number - 1] if number else 0 : ends[number]] for number in sets_of[label]])
        rows = np.sort(rows[side_n[rows] != _TRAIN])
        nearest = rows[np.lexsort((table.tie_n[rows], -table.position_n[rows]))]
        for row in nearest[: max(0, min_train - have[label])].tolist():
            side_n[row] = _TRAIN
            have.update(table.sets[table.set_n[row]])
            brought[label] += 1
    return dict(brought)


def _count_sides(number: int, fractions: Fractions, owed: dict[str, float]) -> dict[str, int]:
    """Return how many of `number` keys of a class go to each side, less than one from its fraction.

    `owed` is what earlier classes have rounded away, and is brought up to date: many small classes together have the
    fractions too. Two classes of three keys: 2.1, 0.45, 0.45 is 2, 0, 1 for the first, and 2, 1, 0 for the second.
    """
    quotas = {side: number * fraction for side, fraction in zip(USED, fractions, strict=True)}
    numbers = {side: math.floor(quota + 1e-9) for side, quota in quotas.items()}
    for side, quota in quotas.items():
        owed[side] += quota - numbers[side]
    open_sides = [side for side, quota in quotas.items() if quota - numbers[side] > 1e-9]
    order = sorted(open_sides, key=lambda side: (-round(owed[side], 9), ("test", "val", "train").index(side)))
    for side in order[: number - sum(numbers.values())]:
        numbers[side] += 1
        owed[side] -= 1
    return numbers


def _without_test(fractions: Fractions) -> Fractions:
    train, val, _ = fractions
    return train / (train + val), val / (train + val), 0.0


def find_lone_films(rows: Iterable[tuple[str | None, str, Sequence[str]]]) -> dict[str, tuple[str, str]]:
    """Return the classes whose images (group, side, labels) are all of one group: class -> (group, side)."""
    seen: dict[str, set[tuple[str | None, str]]] = defaultdict(set)
    for group, side, labels in rows:
        if side in USED:
            for label in labels:
                if len(seen[label]) < 2:  # it is not alone, whatever else there is
                    seen[label].add((group, side))
    lone = {label: next(iter(places)) for label, places in seen.items() if len(places) == 1}
    return {label: (group, side) for label, (group, side) in sorted(lone.items()) if group is not None}


def compute_position(key: str, seed: int) -> float:
    """Return a number in [0, 1) that depends on seed and key alone (the first 53 bits of a sha256)."""
    digest = hashlib.sha256(f"{seed}:{key}".encode()).digest()
    return (int.from_bytes(digest[:8], "big") >> 11) / 2**53


def choose_side(key: str, seed: int, fractions: tuple[float, ...], *, test_is_given: bool = False) -> str:
    """Return train, val or test for a key, in proportion to `fractions` (train, val, test).

    With `test_is_given` the source has its own test folder: only train and val are given, in their proportion.
    """
    train, val, test = fractions
    position = compute_position(key, seed)
    if test_is_given:
        return "val" if position < val / (train + val) else "train"
    if position < test:
        return "test"
    return "val" if position < test + val else "train"


def choose_random_sides(number: int, seed: int, test_fraction: float) -> list[str]:
    """Return train or test for each of `number` rows, as scikit-learn's `train_test_split` divides them.

    The same as `train_test_split(range(number), test_size=test_fraction, random_state=seed, shuffle=True)`: a
    permutation of NumPy's legacy generator, of which the first ceil(number * test_fraction) rows are the test side.
    """
    num_test = math.ceil(test_fraction * number)
    sides = ["train"] * number
    for row in np.random.RandomState(seed).permutation(number)[:num_test]:
        sides[row] = "test"
    return sides
