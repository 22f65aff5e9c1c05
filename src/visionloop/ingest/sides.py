"""The side of each new image of a pull, and leaks: near-duplicate families of new images and of old ones near them.

Images of earlier versions are only compared; their side never changes.

Only images whose hash is near another's are read from the store again. Dimensions in names: n rows, p pairs, g groups.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain

import numpy as np
from numpy.typing import NDArray

from visionloop.data.duplicates import THUMB_PX, Int32Array, UInt64Array, compute_difference, find_near_pairs
from visionloop.data.families import Families, FamilyLeak, Member, Pair, place_members
from visionloop.data.images import UInt8Array, load_array
from visionloop.data.leaks import Leak
from visionloop.data.manifest import make_image_key
from visionloop.data.split import Undecided, choose_random_sides, divide, find_lone_films
from visionloop.errors import SHOWN, ImageError, ObjectMissing, SourceError, shorten
from visionloop.ingest.spill import HAS_HASH, LEARN, NAMES, NEAR_TEST, SIDE, Crowd, Row
from visionloop.parallel import map_parallel
from visionloop.params import Ingest, Split
from visionloop.records import DatasetVersion, ImageRecord
from visionloop.store import ObjectStore

_CHUNK = 4096  # pairs; their thumbnails are 25 MB at most
# Decoded larger and averaged: a JPEG decoded at an eighth of its size differs a little from a resized PNG.
_DECODED_PX = 4 * THUMB_PX
FEW_TESTS = 5  # of a class: one wrong answer is 20 points
UNDECIDED, TO_LEARN = "?", "?learn"  # a family without a side, until `divide` gives it one
TRAIN, EXCLUDED = NAMES.index("train"), NAMES.index("excluded")
LEARNS = len(NAMES)  # beside the sides: train or val alone


def find_duplicates(
    store: ObjectStore,
    hashes: tuple[Int32Array, UInt64Array, NDArray[np.int8], int],
    name: Callable[[Iterable[int]], Mapping[int, str]],
) -> tuple[list[Pair], Mapping[int, str]]:
    """Return the confirmed pairs of rows with at least one new one; earlier rows come first.

    Of each row that has a hash: its number, the hash, on which side it is (see `find_near_pairs`); and how many of them
    are not new. `name` gives the sha256 of rows; those of rows with near hashes are returned too. An image that is gone
    from the store, or cannot be decoded, is near nothing. Raises StoreError.
    """
    row_n, hash_n, kind_n, first_new = hashes
    near = find_near_pairs(hash_n, kind_n, first_new)
    order = np.lexsort((near.later_p, near.earlier_p))
    all_later_p, all_earlier_p, distance_p = (
        row_n[near.later_p[order]],
        row_n[near.earlier_p[order]],
        near.distance_p[order],
    )
    names = name({*all_later_p.tolist(), *all_earlier_p.tolist()})
    found: list[Pair] = []
    thumbs: dict[int, UInt8Array | None] = {}
    for start in range(0, len(order), _CHUNK):
        some = slice(start, start + _CHUNK)
        later_p, earlier_p = all_later_p[some].tolist(), all_earlier_p[some].tolist()
        wanted = {*later_p, *earlier_p}
        missing = sorted(wanted - thumbs.keys())
        thumbs = {i: thumb for i, thumb in thumbs.items() if i in wanted}
        thumbs.update(zip(missing, _load_thumbs(store, [names[i] for i in missing]), strict=True))
        usable = [p for p, (a, b) in enumerate(zip(later_p, earlier_p, strict=True)) if _has(thumbs, a, b)]
        if not usable:
            continue
        a, b = (np.stack([thumbs[side[p]] for p in usable]) for side in (later_p, earlier_p))  # type: ignore[misc]
        for p, difference in zip(usable, compute_difference(a, b).tolist(), strict=True):
            if difference <= 1:
                found.append(Pair(later_p[p], earlier_p[p], int(distance_p[start + p]), round(difference, 4)))
    return found, names


def make_thumb(image_hwc: UInt8Array) -> UInt8Array:
    """Average an image of 128 x 128 to 32 x 32."""
    means = image_hwc.reshape(THUMB_PX, 4, THUMB_PX, 4, 3).mean((1, 3))
    return np.asarray(means.round(), np.uint8)


def _load_thumbs(store: ObjectStore, names: Sequence[str]) -> list[UInt8Array | None]:
    def load(sha256: str) -> UInt8Array | None:
        try:
            data = store.get(make_image_key(sha256))
            size_hw = (_DECODED_PX, _DECODED_PX)
            return make_thumb(load_array(data, sha256[:12], size_hw=size_hw, resize="squash", max_pixels=None))
        except (ObjectMissing, ImageError):
            return None

    return list(map_parallel(load, names)) if names else []


def _has(thumbs: dict[int, UInt8Array | None], *rows: int) -> bool:
    return all(thumbs[row] is not None for row in rows)


class Trained:
    """The keys that each class has on train; of those only as many as `min_train` asks for are told apart."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._keys: dict[str, set[str]] = {}

    def add(self, labels: Iterable[str], key: str) -> None:
        """Add an image that is on train."""
        for label in labels:
            keys = self._keys.setdefault(label, set())
            if len(keys) < self._most:
                keys.add(key)

    def count(self) -> dict[str, int]:
        """Return the number of keys by class."""
        return {label: len(keys) for label, keys in self._keys.items()}


@dataclass(frozen=True)
class Sides:
    """What was decided of the new images: by their places, the side, and the key where it is not their own.

    An image's own key is its group, else its sha256. `brought` is what `min_train` brought to train.
    """

    of: UInt8Array
    keys: Mapping[int, str]
    leaks: Sequence[Leak]
    brought: Mapping[str, int]

    def get(self, place: int, row: Row) -> tuple[str, str]:
        """Return the side and the key of an image, by its place and its row."""
        return NAMES[self.of[place]], self.keys.get(place) or row[5] or row[0]


def describe_sides(version: DatasetVersion, records: Iterable[ImageRecord], added: Sides, split: Split) -> list[str]:
    """Return what people should know of the sides."""
    lines = []
    if added.brought:
        total = sum(added.brought.values())
        named = shorten([f"{label}: {number}" for label, number in added.brought.items()])
        keys = "image" if total == 1 else "images or groups"
        lines.append(
            f"{total:,} {keys} of classes without {split.min_train} on train went there, whatever their hash says "
            f"({named}; ingest.split.min_train)"
        )
    tests = version.counts.get("test", {})
    if few := [f"{name} {tests.get(name, 0)}" for name in version.classes if tests.get(name, 0) < FEW_TESTS]:
        lines.append(f"fewer than {FEW_TESTS} test images, whose figures say little: {shorten(few)}")
    lone = find_lone_films((r.group, r.side, r.labels) for r in records)
    return lines + [
        f"all images of {label} are of one group ({group}), so they are all on {side}: add another one to judge it"
        for label, (group, side) in [*lone.items()][:SHOWN]
    ]


def decide_sides(
    store: ObjectStore, section: Ingest, old: Crowd, new: Crowd, trained: Trained, *, is_first: bool
) -> Sides:
    """Decide the sides of new images, in the order of their ordinals, beside the rows of earlier versions.

    `trained` are the earlier rows on train.

    Raises:
        SourceError: near-duplicates have different given sides and `on_leak` is `fail`; or too few images to split.
        StoreError: images cannot be read again to compare their pixels.
    """
    split = section.split
    desk = _Desk(old, new)
    if split.method == "random":
        desk.divide_at_random(split, is_first)
    pairs, names = find_duplicates(store, desk.list_hashes(), desk.name)
    desk.choose_people(pairs)
    families = desk.place(pairs, names, exclude_leaks=split.on_leak == "exclude")
    families, brought = desk.decide(families, trained, split, is_first=is_first)
    leaks = desk.make_leaks(families)
    if split.on_leak == "fail" and (across := [leak for leak in leaks if leak.kind == "across"]):
        raise make_leak_error(across)
    return Sides(desk.sides, desk.keys, leaks, brought)


class _Again:
    """Families that are made anew each time they are read."""

    def __init__(self, make: Callable[[], Iterator[Undecided]]) -> None:
        self._make = make

    def __iter__(self) -> Iterator[Undecided]:
        return self._make()


class _Desk:
    """The images that are compared, as n: those of earlier versions, then the new ones, each by their ordinals.

    `old_n` and `new_n` lead to places in the crowds; `sides` and `keys` are by the place of a new image. Most new ones
    are alone: near no other image, and in no group of several. The others are `people` (positions in n), with the
    earlier images that they belong with: near duplicates, and for each group one a side.
    """

    # Example: earlier a and b; new c to f, where c is near a, and d and e are one film; none is near b or f.
    #
    #   n        0 a   1 b   2 c   3 d   4 e   5 f        people: 0 a   2 c   3 d   4 e       alone: 5 f
    def __init__(self, old: Crowd, new: Crowd) -> None:
        self.old, self.new = old, new
        self.sides: UInt8Array = np.bitwise_and(new.mark_n, np.uint8(SIDE))
        self.keys: dict[int, str] = {}
        self.new_n = new.sort()
        order = old.sort() if len(new) else np.array([], np.int32)
        self.old_n = order[old.mark_n[order] & SIDE != EXCLUDED]
        self.people = np.array([], np.int64)

    def list_hashes(self) -> tuple[Int32Array, UInt64Array, NDArray[np.int8], int]:
        """Return n, the perceptual hash and the kind of those that have a hash; and how many of them are earlier ones.

        The kind is the side; LEARNS: it may be train or val alone; 0: it is open.
        """
        num_old = len(self.old_n)
        mark_n = np.append(self.old.mark_n[self.old_n], self.new.mark_n[self.new_n])
        row_n = np.flatnonzero(mark_n & HAS_HASH).astype(np.int32)
        kind_n = np.append(mark_n[:num_old] & SIDE, self.sides[self.new_n]).astype(np.int8)
        kind_n[(kind_n == 0) & (mark_n & LEARN > 0)] = LEARNS
        hash_n = np.append(self.old.hash_n[self.old_n], self.new.hash_n[self.new_n])
        if len(row_n) < len(hash_n):
            hash_n, kind_n = hash_n[row_n], kind_n[row_n]
        return row_n, hash_n, kind_n, int(np.searchsorted(row_n, num_old))

    def name(self, some: Iterable[int]) -> dict[int, str]:
        """Return the sha256 of some images."""
        return {n: row[0] for n, row in self._pick(some)}

    def divide_at_random(self, split: Split, is_first: bool) -> None:
        """Give sides to the labelled images of the first version as scikit-learn does; the rest is excluded."""
        has_label = np.array([bool(labels) for labels in self.new.label_sets] or [False])
        labelled = self.new_n[has_label[self.new.label_n[self.new_n]]] if is_first else self.new_n[:0]
        if is_first and split.first is not None and len(labelled) < split.first:
            raise SourceError(
                "ingest.split.first", f"the sources have {len(labelled)} labelled images", f"{split.first} or more"
            )
        self.new_n = labelled[: split.first]
        chosen = choose_random_sides(len(self.new_n), split.seed, split.fractions[-1])
        self.sides[:] = EXCLUDED
        self.sides[self.new_n] = [NAMES.index(side) for side in chosen]

    def choose_people(self, pairs: Sequence[Pair]) -> None:
        """Find those that are not alone, and the earlier images that they belong with."""
        num_old, num_groups = len(self.old_n), 1 + len(self.new.groups)
        old_group, new_group = self.old.group_n[self.old_n], self.new.group_n[self.new_n]  # -1 is the last one, of none
        num_new_g = np.bincount(new_group[new_group >= 0], minlength=num_groups)
        has_old_g = np.bincount(old_group[old_group >= 0], minlength=num_groups) > 0
        has_several_g = (num_new_g > 1) | ((num_new_g > 0) & has_old_g)
        is_tied = np.append(np.zeros(num_old, bool), has_several_g[new_group])
        seen: set[tuple[int, int]] = set()
        for n in np.flatnonzero((num_new_g > 0)[old_group]).tolist():
            tie = int(old_group[n]), int(self.old.mark_n[self.old_n[n]] & SIDE)
            is_tied[n] = tie not in seen
            seen.add(tie)
        is_tied[[end for pair in pairs for end in (pair.one, pair.other)]] = True
        self.people = np.flatnonzero(is_tied)

    def place(self, pairs: Sequence[Pair], names: Mapping[int, str], *, exclude_leaks: bool) -> Families:
        """Make families of the people."""
        position = dict(zip(self.people.tolist(), range(len(self.people)), strict=True)) if pairs else {}
        near = [replace(pair, one=position[pair.one], other=position[pair.other]) for pair in pairs]
        members = self._make_members(names)
        return place_members(
            members, near, lambda key, learn: TO_LEARN if learn else UNDECIDED, exclude_leaks=exclude_leaks
        )

    def _make_members(self, names: Mapping[int, str]) -> list[Member]:
        """Return the people as members; equal ones of a group are one object, for there may be very many."""
        num_old, groups, shared = len(self.old_n), [*self.new.groups], dict[tuple[int, int, int], Member]()
        rows = self._pick(self.people[self.people < num_old].tolist())
        olds = {n: Member(row[0], row[6], row[5], row[7], is_old=True) for n, row in rows}
        members = [olds[n] for n in sorted(olds)]
        for n in self.people[self.people >= num_old].tolist():
            place = self.new_n[n - num_old]
            group, mark, code = int(self.new.group_n[place]), int(self.new.mark_n[place]), int(self.sides[place])
            side, learn, near_test = NAMES[code] or None, bool(mark & LEARN) and not code, bool(mark & NEAR_TEST)
            if group < 0:
                members.append(Member(names[n], names[n], None, side, learn, near_test))
            else:
                equal = Member("", groups[group], groups[group], side, learn, near_test)
                members.append(shared.setdefault((group, mark, code), equal))
        return members

    def decide(
        self, families: Families, trained: Trained, split: Split, *, is_first: bool
    ) -> tuple[Families, Mapping[str, int]]:
        """Give all that have no side one; return the families, and how many keys of a class went to train for that."""
        sets, num_old = [*map(frozenset, self.new.label_sets)], len(self.old_n)
        is_alone = np.zeros(len(self.new), bool)
        is_alone[self.new_n] = True
        together: dict[tuple[str, str], frozenset[str]] = {}
        for n, side, key in zip(self.people.tolist(), families.sides, families.keys, strict=True):
            if n < num_old:
                continue
            place = int(self.new_n[n - num_old])
            own, is_alone[place] = sets[self.new.label_n[place]], False
            if side in (UNDECIDED, TO_LEARN):
                both = together.get((key, side), own)
                together[key, side] = both if own <= both else both | own
            elif side == "train":
                trained.add(own, key)
        self._count_trained(is_alone & (self.sides == TRAIN), trained)
        is_open = is_alone & (self.sides == 0)
        division = divide(
            _Again(
                lambda: chain(
                    (Undecided(key, labels, side == TO_LEARN) for (key, side), labels in together.items()),
                    self._list_alone(is_open, sets),
                )
            ),
            split.seed,
            split.fractions,
            is_first=is_first,
            min_train=split.min_train,
            num_train=trained.count(),
        )
        self.sides[is_open] = [NAMES.index(side) for side in division.sides[len(together) :]]
        return self._settle(families, dict(zip(together, division.sides, strict=False))), division.brought

    def _count_trained(self, is_meant: NDArray[np.bool_], trained: Trained) -> None:
        for place, row in enumerate(self.new.rows if is_meant.any() else ()):
            if is_meant[place]:
                trained.add(row[1], row[5] or row[0])

    def _list_alone(self, is_open: NDArray[np.bool_], sets: Sequence[frozenset[str]]) -> Iterator[Undecided]:
        for place, row in enumerate(self.new.rows if is_open.any() else ()):
            if is_open[place]:
                learn = bool(self.new.mark_n[place] & LEARN)
                yield Undecided(row[5] or row[0], sets[self.new.label_n[place]], learn)

    def _settle(self, families: Families, side_of: Mapping[tuple[str, str], str]) -> Families:
        """Note the sides and keys of the people; return the families with their sides."""
        both = zip(families.keys, families.sides, strict=True)
        families = replace(families, sides=[side_of.get((key, side), side) for key, side in both])
        num_old, groups = len(self.old_n), [*self.new.groups]
        for n, side, key in zip(self.people.tolist(), families.sides, families.keys, strict=True):
            if n >= num_old:
                place = int(self.new_n[n - num_old])
                self.sides[place] = NAMES.index(side)
                group = int(self.new.group_n[place])
                if group < 0 or key != groups[group]:
                    self.keys[place] = key
        return families

    def make_leaks(self, families: Families) -> list[Leak]:
        """Return the leaks with new images."""
        num_touched = int(np.searchsorted(self.people, len(self.old_n)))
        found = [leak for leak in families.leaks if max(leak.one, leak.other) >= num_touched]
        ends = {end: int(self.people[end]) for leak in found for end in (leak.one, leak.other)}
        rows = dict(self._pick(ends.values()))
        return [_make_leak(leak, rows[ends[leak.one]], rows[ends[leak.other]], families) for leak in found]

    def _pick(self, some: Iterable[int]) -> Iterator[tuple[int, Row]]:
        """Yield the rows of some images, in the order in which they lie."""
        num_old, wanted = len(self.old_n), np.unique(np.fromiter(some, np.int64))
        for crowd, place_n, first, n in (
            (self.old, self.old_n, 0, wanted[wanted < num_old]),
            (self.new, self.new_n, num_old, wanted[wanted >= num_old]),
        ):
            lying = n[np.argsort(place_n[n - first])]
            yield from zip(lying.tolist(), crowd.rows.pick(place_n[lying - first].tolist()), strict=True)


def make_leak_error(leaks: Sequence[Leak]) -> SourceError:
    """Return the error of `on_leak: fail`, with the worst pairs."""
    worst = sorted(leaks, key=lambda leak: (leak.difference or 0, leak.sha256))
    shown = "; ".join(f"{w.origins[0]} ({w.side}) and {w.other_origins[0]} ({w.other_side})" for w in worst[:5])
    more = f" and {len(leaks) - 5} more" if len(leaks) > 5 else ""
    return SourceError(
        "ingest",
        f"{len(leaks)} images leak to another side: {shown}{more}",
        "sides that share no image, no near duplicate and no group (ingest.split.on_leak: fail)",
        "Mend the sources, or set on_leak to report or exclude.",
    )


def _make_leak(finding: FamilyLeak, one: Row, other: Row, families: Families) -> Leak:
    sides, pair = (families.sides[finding.one], families.sides[finding.other]), finding.pair
    tie = f"near duplicates, {pair.distance} bits apart" if pair else f"the same group, {one[5]}"
    if finding.kind == "across":
        reason = f"{tie}, on {sides[0]} and on {sides[1]}"
    else:
        own = {None: "", "learn": "train or val"}.get(finding.side, str(finding.side))
        reason = f"not used, because it would link {own or 'its family'} to {sides[1]}: {tie}"
    return Leak(
        kind=finding.kind,
        sha256=one[0],
        origins=one[3],
        side=sides[0],
        other=other[0],
        other_origins=other[3],
        other_side=sides[1],
        distance=pair.distance if pair else None,
        difference=pair.difference if pair else None,
        reason=reason,
    )
