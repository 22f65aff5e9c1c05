"""The side of each new image of a pull, and leaks: near-duplicate families of new images and of old ones near them.

Images of earlier versions are only compared; their side never changes.

Only images whose hash is near another's are read from the store again. Dimensions in names: n rows, p pairs.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from visionloop.data.duplicates import THUMB_PX, Pairs, compute_difference, find_near_pairs
from visionloop.data.families import Families, FamilyLeak, Member, Pair, place_members
from visionloop.data.images import UInt8Array, load_array
from visionloop.data.leaks import Leak
from visionloop.data.manifest import make_image_key
from visionloop.data.split import Undecided, choose_random_sides, divide, find_lone_films
from visionloop.errors import SHOWN, ImageError, ObjectMissing, SourceError, shorten
from visionloop.parallel import map_parallel
from visionloop.params import Ingest, Split
from visionloop.records import DatasetVersion, ImageRecord
from visionloop.store import ObjectStore

_CHUNK = 4096  # pairs; their thumbnails are 25 MB at most
# Decoded larger and averaged: a JPEG decoded at an eighth of its size differs a little from a resized PNG.
_DECODED_PX = 4 * THUMB_PX
FEW_TESTS = 5  # of a class: one wrong answer is 20 points
UNDECIDED, TO_LEARN = "?", "?learn"  # a family without a side, until `divide` gives it one
_KINDS = {"train": 0, "val": 1, "test": 2, "learn": 3, None: 4}


def find_duplicates(
    store: ObjectStore,
    sha256_n: Sequence[str],
    phash_n: Sequence[str],
    kind_n: Sequence[int],
    first_new: int,
) -> list[Pair]:
    """Return the confirmed pairs of rows with at least one at or after `first_new`; earlier rows come first.

    `kind_n` says on which side a row is (see `find_near_pairs`). An image that is gone from the store, or cannot be
    decoded, is near nothing. Raises StoreError.
    """
    row_of = [i for i, phash in enumerate(phash_n) if phash]
    hashes = np.array([int(phash_n[i], 16) for i in row_of], np.uint64)
    kinds = np.array([kind_n[i] for i in row_of], np.int64)
    near = find_near_pairs(hashes, kinds, sum(i < first_new for i in row_of))
    order = np.lexsort((near.later_p, near.earlier_p))
    near = Pairs(near.later_p[order], near.earlier_p[order], near.distance_p[order])
    found: list[Pair] = []
    thumbs: dict[int, UInt8Array | None] = {}
    for start in range(0, len(order), _CHUNK):
        some = slice(start, start + _CHUNK)
        later_p, earlier_p = near.later_p[some].tolist(), near.earlier_p[some].tolist()
        wanted = {*later_p, *earlier_p}
        missing = sorted(wanted - thumbs.keys())
        names = [sha256_n[row_of[i]] for i in missing]
        thumbs = {i: thumb for i, thumb in thumbs.items() if i in wanted}
        thumbs.update(zip(missing, _load_thumbs(store, names), strict=True))
        usable = [p for p, (a, b) in enumerate(zip(later_p, earlier_p, strict=True)) if _has(thumbs, a, b)]
        if not usable:
            continue
        a, b = (np.stack([thumbs[side[p]] for p in usable]) for side in (later_p, earlier_p))  # type: ignore[misc]
        for p, difference in zip(usable, compute_difference(a, b).tolist(), strict=True):
            if difference <= 1:
                distance = int(near.distance_p[start + p])
                found.append(Pair(row_of[later_p[p]], row_of[earlier_p[p]], distance, round(difference, 4)))
    return found


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


@dataclass(frozen=True, slots=True)
class Newcomer:
    """An image that no earlier version has. `side` is its source's own; `learn`: its source has a test folder.

    `excluded_near_test` as in `Item`.
    """

    sha256: str
    phash: str
    origins: tuple[str, ...]
    labels: tuple[str, ...]
    group: str | None
    side: str | None
    learn: bool
    excluded_near_test: bool = False


@dataclass(frozen=True)
class Sides:
    """The side and the key of each new image by its sha256, the new leaks, and what `min_train` brought to train."""

    of: dict[str, tuple[str, str]]
    leaks: list[Leak]
    brought: dict[str, int]


def describe_sides(version: DatasetVersion, records: Sequence[ImageRecord], added: Sides, split: Split) -> list[str]:
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
    store: ObjectStore, section: Ingest, before: Sequence[ImageRecord], newcomers: Sequence[Newcomer], *, is_first: bool
) -> Sides:
    """Decide the sides of newcomers, in their order, beside the rows of earlier versions.

    Raises:
        SourceError: near-duplicates have different given sides and `on_leak` is `fail`; or too few images to split.
        StoreError: images cannot be read again to compare their pixels.
    """
    split = section.split
    if split.method == "random":
        newcomers, excluded = _divide_at_random(newcomers, split, is_first)
    else:
        excluded = []
    old = sorted((r for r in before if r.side != "excluded"), key=lambda r: r.ordinal) if newcomers else []
    everyone: list[ImageRecord | Newcomer] = [*old, *newcomers]
    kinds = [_KINDS[r.side or ("learn" if isinstance(r, Newcomer) and r.learn else None)] for r in everyone]
    names, hashes = [r.sha256 for r in everyone], [r.phash for r in everyone]
    pairs = find_duplicates(store, names, hashes, kinds, len(old))
    touched = _find_touched(old, newcomers, pairs)
    people: list[ImageRecord | Newcomer] = [*(old[i] for i in touched), *newcomers]
    place_of = {i: place for place, i in enumerate(touched)}  # of the old ones; all newcomers stand behind them
    near = [
        replace(pair, **{end: place_of.get(i, i - len(old) + len(touched)) for end, i in ends})
        for pair in pairs
        for ends in [(("one", pair.one), ("other", pair.other))]
    ]
    families = place_members(
        [_make_member(p) for p in people],
        near,
        lambda key, learn: TO_LEARN if learn else UNDECIDED,
        exclude_leaks=split.on_leak == "exclude",
    )
    families, brought = _decide(families, people, before, split, is_first=is_first)
    leaks = [_make_leak(f, people, families) for f in families.leaks if max(f.one, f.other) >= len(touched)]
    if split.on_leak == "fail" and (across := [leak for leak in leaks if leak.kind == "across"]):
        raise make_leak_error(across)
    placed = zip(people[len(touched) :], families.sides[len(touched) :], families.keys[len(touched) :], strict=True)
    sides = {p.sha256: (side, key) for p, side, key in placed}
    return Sides(sides | {p.sha256: ("excluded", p.group or p.sha256) for p in excluded}, leaks, brought)


def _decide(
    families: Families,
    people: Sequence[ImageRecord | Newcomer],
    before: Sequence[ImageRecord],
    split: Split,
    *,
    is_first: bool,
) -> tuple[Families, dict[str, int]]:
    """Give the families without a side one; return them, and how many keys of a class `min_train` brought to train."""
    labels: dict[tuple[str, str], frozenset[str]] = {}
    shared: dict[object, frozenset[str]] = {}  # a set for each row would take more memory than all the rest
    on_train = {(label, r.key) for r in before if r.side == "train" for label in r.labels}
    for one, side, key in zip(people, families.sides, families.keys, strict=True):
        if side in (UNDECIDED, TO_LEARN):
            own = shared.get(one.labels) or shared.setdefault(one.labels, frozenset(one.labels))
            both = labels.get((key, side), own) | own
            labels[key, side] = shared.setdefault(both, both)
        elif side == "train":
            on_train.update((label, key) for label in one.labels)
    undecided = [Undecided(key, names, mark == TO_LEARN) for (key, mark), names in labels.items()]
    division = divide(
        undecided,
        split.seed,
        split.fractions,
        is_first=is_first,
        min_train=split.min_train,
        num_train=Counter(label for label, _ in on_train),
    )
    side_of = dict(zip(labels, division.sides, strict=True))
    sides = [side_of.get((key, side), side) for key, side in zip(families.keys, families.sides, strict=True)]
    return replace(families, sides=sides), division.brought


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


def _divide_at_random(
    newcomers: Sequence[Newcomer], split: Split, is_first: bool
) -> tuple[list[Newcomer], list[Newcomer]]:
    """Give sides to the labelled images of the first version as scikit-learn does; return these and the rest."""
    labelled = [n for n in newcomers if n.labels] if is_first else []
    if is_first and split.first is not None and len(labelled) < split.first:
        raise SourceError(
            "ingest.split.first", f"the sources have {len(labelled)} labelled images", f"{split.first} or more"
        )
    chosen = labelled[: split.first]
    sides = choose_random_sides(len(chosen), split.seed, split.fractions[-1])
    divided = [replace(n, side=side) for n, side in zip(chosen, sides, strict=True)]
    names = {n.sha256 for n in chosen}
    return divided, [n for n in newcomers if n.sha256 not in names]


def _find_touched(old: Sequence[ImageRecord], newcomers: Sequence[Newcomer], pairs: Sequence[Pair]) -> list[int]:
    """Return the old rows that new images belong with: near-duplicates, and for each group one row per side."""
    groups = {n.group for n in newcomers} - {None}
    touched = {min(pair.one, pair.other) for pair in pairs}
    seen: set[tuple[str, str]] = set()
    for i, record in enumerate(old):
        if record.group in groups and (tie := (str(record.group), record.side)) not in seen:
            seen.add(tie)
            touched.add(i)
    return sorted(i for i in touched if i < len(old))


def _make_member(one: ImageRecord | Newcomer) -> Member:
    if isinstance(one, ImageRecord):
        return Member(one.sha256, one.key, one.group, one.side, is_old=True)
    learn = one.learn and not one.side
    return Member(one.sha256, one.group or one.sha256, one.group, one.side, learn, one.excluded_near_test)


def _make_leak(finding: FamilyLeak, people: Sequence[ImageRecord | Newcomer], families: Families) -> Leak:
    one, other, pair = people[finding.one], people[finding.other], finding.pair
    sides = families.sides[finding.one], families.sides[finding.other]
    tie = f"near duplicates, {pair.distance} bits apart" if pair else f"the same group, {one.group}"
    if finding.kind == "across":
        reason = f"{tie}, on {sides[0]} and on {sides[1]}"
    else:
        own = {None: "", "learn": "train or val"}.get(finding.side, str(finding.side))
        reason = f"not used, because it would link {own or 'its family'} to {sides[1]}: {tie}"
    return Leak(
        kind=finding.kind,
        sha256=one.sha256,
        origins=one.origins,
        side=sides[0],
        other=other.sha256,
        other_origins=other.origins,
        other_side=sides[1],
        distance=pair.distance if pair else None,
        difference=pair.difference if pair else None,
        reason=reason,
    )
