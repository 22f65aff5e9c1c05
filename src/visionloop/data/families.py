"""Families: images that must be on one side, because they share a group or are near duplicates. Pure.

A side may be given by an earlier version or by the image's source. Such an image never moves, and the rest of its
family takes the same side. A family without a given side gets one from the hash of its key. An image that would join
two families of different sides is excluded: it is not used, and it joins nothing.

Members are in order: images of earlier versions first, then the new ones as the sources offered them. A side is decided
once, when an image is first seen, and stored in the manifest.
"""

from array import array
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

# Where given sides leak into each other, the image on the weaker side is named first (and excluded, if so asked).
WEAKEST_FIRST = ("learn", "train", "val", "test")


@dataclass(frozen=True, slots=True)
class Member:
    """One image before its side is known. `key` is that of its earlier version, else its group, else its sha256.

    `side` is given by an earlier version (`is_old`) or by the source; None: still to be decided. `learn`: it may become
    train or val, but not test, because its source has a test folder of its own. `excluded_near_test`: it is excluded
    then, whatever `exclude_leaks` says.
    """

    sha256: str
    key: str
    group: str | None = None
    side: str | None = None
    learn: bool = False
    excluded_near_test: bool = False
    is_old: bool = False


@dataclass(frozen=True, slots=True)
class Pair:
    """Two confirmed near duplicates, as positions in the list of members.

    `distance` counts the different bits of their hashes; `difference` is that of the pixels (`duplicates.py`).
    """

    one: int
    other: int
    distance: int
    difference: float


@dataclass(frozen=True, slots=True)
class FamilyLeak:
    """A tie between two sides. `across`: both images stay. `excluded`: image `one` is not used because of `other`.

    `pair` is None where a group ties them. `side` is that of the family of `one` at this moment; None: none yet.
    """

    kind: str
    one: int
    other: int
    pair: Pair | None
    side: str | None


@dataclass(frozen=True)
class Families:
    """The side and the key of each member, in their order, and the ties between sides."""

    sides: list[str]
    keys: list[str]
    leaks: list[FamilyLeak]


def place_members(
    members: Sequence[Member], pairs: Iterable[Pair], choose: Callable[[str, bool], str], *, exclude_leaks: bool = False
) -> Families:
    """Give every member a side. `choose(key, learn)` decides for a family without a given side.

    Given sides may leak into each other. With `exclude_leaks` the new image on the weaker side is then excluded (train
    is weaker than val, val weaker than test). Otherwise both images stay, and the leak is listed.
    """
    # Worked example (tests/unit/data/test_families.py runs it). C to F are new, and E and F are one film:
    #
    #   0 A   train, of an earlier version        pairs, with their difference:
    #   1 B   test, of an earlier version         (C, A) 0.1   (C, B) 0.2   (D, C) 0.3   (F, D) 0.4
    #   2 C   3 D   4 E "film"   5 F "film"
    #
    # 1. Pairs in which a side is given come first: C joins A, so C is train. C also looks like B, which is test. A
    #    and B cannot be one family, and C is the newer image: C is excluded.
    # 2. Groups: E and F become one family.
    # 3. The other pairs: (D, C) joins nothing, because C is excluded. (F, D) makes D, E and F one family.
    # 4. D, E and F have no side yet. Their key is the group, "film". Its hash is at 0.559, which is train.
    #
    #   sides   train  test  excluded  train  train  train
    #   keys    a      b     c         film   film   film       leaks   C is excluded because of B
    work = _Placing(members, exclude_leaks)
    by_rank: dict[int, list[Pair]] = defaultdict(list)
    for pair in sorted(pairs, key=lambda p: (p.difference, max(p.one, p.other), min(p.one, p.other))):
        by_rank[work.rank(pair)].append(pair)
    for rank in (0, 1):
        for pair in by_rank[rank]:
            work.link(pair)
    work.join_groups()
    for pair in by_rank[2]:
        work.link(pair)
    return work.finish(choose)


class _Placing:
    """Families while they grow: a union-find forest whose root is the earliest member. Each has one side at most.

    Arrays, not lists of numbers: all images of a dataset may be in groups.
    """

    def __init__(self, members: Sequence[Member], exclude_leaks: bool) -> None:
        self.members, self.exclude_leaks = members, exclude_leaks
        self.parents = array("q", range(len(members)))
        self.states = [m.side or ("learn" if m.learn else None) for m in members]
        self.excluded: set[int] = set()
        self.leaks: dict[tuple[int, str], FamilyLeak] = {}

    def rank(self, pair: Pair) -> int:
        """Return when a pair is looked at: 0 if both sides are given, 1 if one is, 2 if none is.

        Test beside a member that must not be test counts as two given sides.
        """
        one, other = self.members[pair.one], self.members[pair.other]
        if one.side and other.side:
            return 0
        if one.side or other.side:
            return 0 if "test" in (one.side, other.side) and (one.learn or other.learn) else 1
        return 2

    def link(self, pair: Pair) -> None:
        """Join the families of two near duplicates; if their sides differ, list a leak or exclude an image."""
        if {pair.one, pair.other} & self.excluded or self._join(pair.one, pair.other):
            return
        one, other = sorted((pair.one, pair.other), key=self._rank_of_weakness)
        sides = {self.states[self._find(one)], self.states[self._find(other)]}
        if self._is_given(one, sides):
            self._note_leak(one, other, pair)
        else:
            self._exclude(one, other, pair)

    def join_groups(self) -> None:
        """Join the members of each group, as `link` does with pairs."""
        groups: dict[str, array[int]] = defaultdict(lambda: array("q"))
        for i, member in enumerate(self.members):
            if member.group is not None and i not in self.excluded:
                groups[member.group].append(i)
        for together in groups.values():
            if len(together) > 1:
                self._join_group(together)

    def finish(self, choose: Callable[[str, bool], str]) -> Families:
        """Return the result. A family's key is that of its first old member, else its first group, else its root."""
        keys: dict[int, str] = {}
        roots = array("q", map(self._find, range(len(self.members))))
        for wanted in (lambda m: m.is_old, lambda m: m.group is not None, lambda m: True):
            for i, member in enumerate(self.members):
                if roots[i] not in keys and i not in self.excluded and wanted(member):
                    keys[roots[i]] = member.key
        sides: list[str] = []
        for i, member in enumerate(self.members):
            state = self.states[roots[i]]
            if i in self.excluded:
                sides.append("excluded")
            elif member.side or state in ("train", "val", "test"):
                sides.append(str(member.side or state))
            else:
                sides.append(choose(keys[roots[i]], state == "learn"))
        own = [m.key if m.is_old or i in self.excluded else keys[roots[i]] for i, m in enumerate(self.members)]
        left = [f for f in self.leaks.values() if f.kind == "excluded" or not {f.one, f.other} & self.excluded]
        return Families(sides, own, left)

    def _join_group(self, together: Sequence[int]) -> None:
        """Join the members of one group, those with given sides first.

        If they have several given sides, the first is the group's. Each further one is a leak, and a family of its own.
        """
        heads: list[int] = []
        for i in sorted(together, key=lambda i: (-self._rank_of_weakness(i)[1], i)):
            if i in self.excluded:
                continue
            member = self.members[i]
            given = bool(member.side) or member.learn
            if not heads or ((given or len(heads) == 1) and any(self._join(head, i) for head in heads)):
                heads = heads or [i]
            elif self._is_given(i, {self.states[self._find(j)] for j in (i, heads[0])}):
                self._note_leak(i, heads[0], None)
                if i not in self.excluded:
                    heads.append(i)
            else:
                self._exclude(i, heads[0], None)

    def _rank_of_weakness(self, i: int) -> tuple[bool, int, int]:
        """Return the sort key, weakest first: new before old, no side before train, val, test; later before earlier."""
        member = self.members[i]
        given = member.side or ("learn" if member.learn else None)
        return member.is_old, WEAKEST_FIRST.index(given) if given else -1, -i

    def _is_given(self, i: int, sides: set[str | None]) -> bool:
        """Say whether the member's side comes from its source. Then the conflict is the source's, and it is a leak."""
        return bool(self.members[i].side) or (self.members[i].learn and "test" in sides)

    def _note_leak(self, one: int, other: int, pair: Pair | None) -> None:
        member = self.members[one]
        if (self.exclude_leaks and not member.is_old) or (member.excluded_near_test and member.learn):
            self._exclude(one, other, pair)
        else:
            side = self.members[other].side or "learn"
            self.leaks.setdefault((one, side), FamilyLeak("across", one, other, pair, self.members[one].side))

    def _exclude(self, one: int, other: int, pair: Pair | None) -> None:
        self.excluded.add(one)
        self.leaks[one, "excluded"] = FamilyLeak("excluded", one, other, pair, self.states[self._find(one)])

    def _find(self, i: int) -> int:
        while self.parents[i] != i:
            self.parents[i] = self.parents[self.parents[i]]
            i = self.parents[i]
        return i

    def _join(self, a: int, b: int) -> bool:
        a, b = self._find(a), self._find(b)
        if a == b:
            return True
        pair = {self.states[a], self.states[b]} - {None}
        if len(pair) > 1 and (pair - {"learn"} == {"test"} or len(pair - {"learn"}) > 1):
            return False
        root, leaf = min(a, b), max(a, b)
        self.parents[leaf] = root
        self.states[root] = next(iter(pair - {"learn"} or pair), None)
        return True
