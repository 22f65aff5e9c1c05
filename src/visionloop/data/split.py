"""The sides of new keys that no source and no family has given one: by class at first, then by the hash alone. Pure.

The first version of a dataset divides each class by itself. Its keys are ranked by their hash; the first of them go to
test, the next to val, the others to train. So each side of a class has its fraction, but for less than one key. The
bare hash of 39 images gave 35, 4 and 1. Later images go by the hash alone: their side must not depend on what comes
with them. Only where a class has fewer than `min_train` keys on train, its new keys go there, whatever their hash says.

An image of several labels, and a family of several classes, counts for the rarest of them.
"""

import hashlib
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from visionloop.records import SIDES

USED = SIDES[:3]
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
    families: Sequence[Undecided],
    seed: int,
    fractions: Fractions,
    *,
    is_first: bool,
    min_train: int = 0,
    num_train: Mapping[str, int] | None = None,
) -> Division:
    """Give each family a side. `num_train` counts the keys that a class has on train already.

    The order of the families does not matter.
    """
    if is_first:
        sides = _divide_by_class(families, seed, fractions)
    else:
        sides = [choose_side(one.key, seed, fractions, test_is_given=one.learn) for one in families]
    brought: Counter[str] = Counter()
    have = Counter(num_train or {})
    have.update(label for one, side in zip(families, sides, strict=True) if side == "train" for label in one.labels)
    by_label: dict[str, list[int]] = defaultdict(list)
    for i, one in enumerate(families):
        for label in one.labels:
            by_label[label].append(i)
    for label in sorted(by_label):
        nearest = sorted(by_label[label], key=lambda i: (-compute_position(families[i].key, seed), families[i].key))
        for i in [i for i in nearest if sides[i] != "train"][: max(0, min_train - have[label])]:
            sides[i] = "train"
            have.update(families[i].labels)
            brought[label] += 1
    return Division(sides, dict(brought))


def _divide_by_class(families: Sequence[Undecided], seed: int, fractions: Fractions) -> list[str]:
    """Rank the families of each class by their hash, and cut the ranking where the fractions say."""
    counts = Counter(label for one in families for label in one.labels)
    strata: dict[tuple[bool, str], list[int]] = defaultdict(list)
    for i, one in enumerate(families):
        strata[one.learn, min(one.labels, key=lambda label: (counts[label], label), default="")].append(i)
    sides = [""] * len(families)
    owed = {learn: dict.fromkeys(USED, 0.0) for learn in (False, True)}
    for learn, label in sorted(strata):
        ranked = sorted(strata[learn, label], key=lambda i: (compute_position(families[i].key, seed), families[i].key))
        numbers = _count_sides(len(ranked), _without_test(fractions) if learn else fractions, owed[learn])
        given = [side for side in ("test", "val", "train") for _ in range(numbers[side])]
        for i, side in zip(ranked, given, strict=True):
            sides[i] = side
    return sides


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
