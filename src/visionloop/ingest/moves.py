"""What is not as the dataset has it: images that a pull finds under another label, elsewhere, twice, or nowhere. Pure.

A source that lists a whole place (a folder, a zip, a table, a bucket, films) shows what is gone. An answer of a
database, a server or a function may hold only what is new: of these only another label is seen.
"""

import json
import re
from array import array
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from visionloop.errors import SHOWN, shorten
from visionloop.ingest.inspect import Inspected
from visionloop.ingest.labels import Labels, format_correction
from visionloop.params import Source
from visionloop.records import ImageRecord, Rejected

# Kinds of sources that offer all they have at each pull.
WHOLE = frozenset({"folder", "table", "archive", "bucket", "digits", "video"})
SHOWN_GONE = 2
MAX_SHOWN = 36  # letters of an origin
_CONVERTED = "#png"
_FRAME, _LIVE = "#t=", ":live#t="
# Example: version 1 holds cat/1.png, cat/2.png, dog/3.png and dog/4.png.
#
#     mv cat/1.png dog/           relabelled: the same bytes, cat/1.png is no longer theirs, and all places say dog
#     mv cat/2.png cat/two.png    renamed
#     rm dog/3.png                gone
#     crop dog/4.png              gone, and replaced: its place holds other bytes
#     crop cat/1.png, save as dog/1.png    gone; and saved again under another label, if the two are near duplicates
# What is offered of one content, in the order of the sources, with the labels that hold.
Offers = Sequence[tuple[Inspected, Labels]]


def say_option(option: str) -> str:
    """Name a pull with an option, where the command of the pull is not known."""
    return f"`{option}` with the same command"


@dataclass(frozen=True)
class Wishes:
    """What a person has said yes to, and how a message names the command that says yes.

    `relabel`: take the labels that sources give now. `prune`: take out what is no longer in its source. `whole` are the
    sources that offer all they have. `answers`: the labels that people gave images by hand, by sha256, which count more
    than those of any source.
    """

    allow_new_classes: bool = False
    relabel: bool = False
    prune: bool = False
    whole: Collection[str] = ()
    say: Callable[[str], str] = say_option
    answers: Mapping[str, Labels] = field(default_factory=dict)


@dataclass(frozen=True)
class Relabelled:
    """An image that its sources give another label than the dataset has; `places` are all where it lies now."""

    sha256: str
    before: Labels
    after: Labels
    old: str
    places: tuple[str, ...]


@dataclass
class Moves:
    """What differs. `gone` are rows of the dataset, by sha256; of these `replaced` lie where other bytes are now.

    Of the `num_renamed` images that lie elsewhere `renamed` is the first place, before and now.
    """

    relabelled: list[Relabelled] = field(default_factory=list)
    num_renamed: int = 0
    renamed: tuple[str, str] = ("", "")
    gone: dict[str, ImageRecord] = field(default_factory=dict)
    replaced: set[str] = field(default_factory=set)


def list_whole(sources: Iterable[Source]) -> frozenset[str]:
    """Return the names of the sources that offer all they have at each pull."""
    return frozenset(source.name for source in sources if source.kind in WHOLE)


class Places:
    """Where the files of a pull lie: those that can be used, and those that are not judged, for they were rejected.

    There are millions: of each of the first only Python's hash is held, which tells them apart.
    """

    def __init__(self, rejected: Iterable[Rejected]) -> None:
        self._taken, self._sorted = array("q"), np.array([], np.int64)
        self._unclear = {find_place(one.origin) for one in rejected if not one.is_row}

    def add(self, origin: str) -> None:
        """Add a file that can be used."""
        self._taken.append(hash(find_place(origin)))

    def close(self, refused: Iterable[Rejected]) -> None:
        """Add those that were refused for their labels; now the others are complete."""
        self._unclear.update(find_place(one.origin) for one in refused)
        self._sorted, self._taken = np.frombuffer(self._taken, np.int64).copy(), array("q")
        self._sorted.sort()

    def is_taken(self, origin: str) -> bool:
        """Say whether a file that can be used lies where `origin` is."""
        value = np.int64(hash(find_place(origin)))
        place = int(np.searchsorted(self._sorted, value))
        return place < len(self._sorted) and bool(self._sorted[place] == value)

    def has_left(self, origin: str, whole: Collection[str]) -> bool:
        """Say whether an image that is not offered at a place lies there no longer. `whole` as in `list_whole`."""
        if origin.partition(":")[0] not in whole or _LIVE in origin or find_place(origin) in self._unclear:
            return False
        return _FRAME not in origin or not self.is_taken(origin)


class MoveFinder:
    """Compare the rows of a dataset with what a pull offers, one after the other, by content."""

    def __init__(self, places: Places, whole: Collection[str]) -> None:
        self._places, self._whole, self._moves = places, whole, Moves()

    def look(self, row: ImageRecord, offers: Offers) -> Relabelled | None:
        """Compare a row with all that is offered of its content; return the other label that it has now, if so."""
        places = {one.origin for one, _ in offers}
        lost = [origin for origin in row.origins if origin not in places]
        are_lost = all(self._places.has_left(origin, self._whole) for origin in lost)
        if not offers:
            if are_lost and row.origins:
                self._moves.gone[row.sha256] = row
            return None
        after = tuple(sorted({label for _, labels in offers for label in labels}))
        if {*row.labels} <= {*after}:
            if lost and are_lost and (new := places - {*row.origins}):
                self._note_renamed((lost[0], min(new)))
        elif are_lost and len({labels for _, labels in offers}) == 1:
            one = Relabelled(row.sha256, row.labels, after, row.origins[0], tuple(sorted(places)))
            self._moves.relabelled.append(one)
            return one
        return None

    def close(self) -> Moves:
        """Return what was found, in its order."""
        moves = self._moves
        moves.relabelled.sort(key=lambda one: one.old)
        moves.gone = dict(sorted(moves.gone.items(), key=lambda one: one[1].origins))
        moves.replaced = {s for s, row in moves.gone.items() if any(map(self._places.is_taken, row.origins))}
        return moves

    def _note_renamed(self, pair: tuple[str, str]) -> None:
        first = self._moves.renamed if self._moves.num_renamed else pair
        self._moves.renamed = min(first, pair)
        self._moves.num_renamed += 1


def relabel_row(row: ImageRecord, one: Relabelled) -> ImageRecord:
    """Give an image the label and the places that its sources give it now."""
    sources = tuple(sorted({place.partition(":")[0] for place in one.places}))
    return replace(row, labels=one.after, origins=one.places, sources=sources)


def is_saved_again(old: ImageRecord, new: ImageRecord) -> bool:
    """Say whether an image is a near duplicate of one that is gone, under another label; they have the same key.

    Near duplicates have the same key, unless a group gave it.
    """
    return old.group is None and new.group is None and bool(new.labels) and not {*new.labels} & {*old.labels}


def explain_relabelled(one: Relabelled) -> str:
    """Return what is said of an image whose label in the dataset stands, with the line that changes it."""
    return (
        f"was {_name(one.before)}, and is {_name(one.after)} in its source now; "
        f"{format_correction(one.sha256, one.before, one.after)}"
    )


def explain_conflict(sha256: str, known: Labels, offered: Iterable[Labels]) -> str:
    """Say under which labels the same bytes came, which of them stands, and the line that settles it."""
    names = sorted({label for labels in (known, *offered) for label in labels})
    first, *others = [*known, *(name for name in names if name not in known)]
    stands = f"{first} stands" if known else "none is taken"
    return f"same bytes labelled {shorten(names)}: {stands}; {format_correction(sha256, (first,), (others[0],))}"


def advise_relabel(moves: Moves, offered: Collection[str], say: Callable[[str], str]) -> list[str]:
    """Tell which labels the sources have changed, and how the dataset gets them. `say` makes a command of an option.

    `offered` are all labels of this pull.
    """
    if not moves.relabelled:
        return []
    first = moves.relabelled[0]
    targets: dict[str, set[str]] = {}
    for one in moves.relabelled:
        for old in {*one.before} - {*one.after}:
            targets.setdefault(old, set()).add(_name(one.after))
    renamed = {old: min(new) for old, new in targets.items() if old not in offered and len(new) == 1}
    lines = [
        f"moved: {_count(len(moves.relabelled), 'has', 'have')} another label in the source now; the old one stands:",
        f"  {_shorten(first.old)} ({_name(first.before)}) is now {_shorten(first.places[0])} ({_name(first.after)})",
        f"  {say('--relabel')} takes the new labels; so does a line of the quarantine in ingest.corrections",
    ]
    pairs = ", ".join(f"{json.dumps(old)}: {json.dumps(new)}" for old, new in [*renamed.items()][:SHOWN])
    if renamed and all(one.after for one in moves.relabelled):
        lines.append(f"  and, where a class has a new name, this under `ingest` in params.yaml: label_map: {{{pairs}}}")
    return lines


def describe_moves(
    moves: Moves, again: Sequence[tuple[ImageRecord, ImageRecord]], say: Callable[[str], str]
) -> list[str]:
    """Tell what is gone from the sources, or was saved again under another label, and what takes it out."""
    lines = []
    if again:
        old, new = again[0]
        lines += [
            f"saved again: {_count(len(again), 'is a near duplicate', 'are near duplicates')} of ones that are gone, "
            "under another label; the dataset has both:",
            f"  {_shorten(new.origins[0])} ({_name(new.labels)}) of {_shorten(old.origins[0])} ({_name(old.labels)})",
        ]
    if moves.gone:
        first = ", ".join(_shorten(row.origins[0]) for row in [*moves.gone.values()][:SHOWN_GONE])
        replaced = f"; where {len(moves.replaced):,} lay are other bytes now" if moves.replaced else ""
        lines += [
            f"gone: {_count(len(moves.gone), 'is', 'are')} no longer in the source, and in the dataset all the same:",
            f"  {first}{' ...' if len(moves.gone) > SHOWN_GONE else ''}{replaced}",
            f"  versions are cumulative; {say('--prune')} takes out what is gone",
        ]
    return lines


def describe_done(moves: Moves, number: int, wishes: Wishes) -> list[str]:
    """Tell what a new version has of this: other labels, images taken out and how they come back, other names."""
    lines = []
    if wishes.relabel and moves.relabelled:
        kinds = Counter((_name(one.before), _name(one.after)) for one in moves.relabelled)
        shown = shorten([f"{old} -> {new} {some:,}" for (old, new), some in kinds.items()])
        lines.append(f"relabelled as the source says now: {_count(len(moves.relabelled))} ({shown})")
    if wishes.prune and moves.gone:
        what = _count(len(moves.gone), "that is", "that are")
        lines.append(f"taken out: {what} no longer in the source; `visionloop datasets drop {number}` takes that back")
    if moves.num_renamed:
        old, new = map(_shorten, moves.renamed)
        what = _count(moves.num_renamed, "lies", "lie")
        lines.append(f"renamed: {what} elsewhere now, with the same label ({old} is {new})")
    return lines


class Copies:
    """Files that are byte copies of others: an image counts once."""

    def __init__(self) -> None:
        self._number = 0
        self._first: tuple[int, str, str] | None = None

    def add(self, same: Sequence[Inspected]) -> None:
        """Count the files of one content, the first one first."""
        places = sorted({one.origin for one in same if _FRAME not in one.origin}) if len(same) > 1 else ()
        if len(places) > 1:
            self._number += len(places) - 1
            found = same[0].ordinal, places[1], places[0]
            self._first = min(self._first or found, found)

    def describe(self) -> list[str]:
        """Tell how many there are."""
        if self._first is None:
            return []
        what = "file is a byte copy of another" if self._number == 1 else "files are byte copies of others"
        _, copy, place = self._first
        return [f"copies: {self._number:,} {what}, counted once ({_shorten(copy)} is {_shorten(place)})"]


def describe_unusable_classes(offered: Mapping[str, int], usable: Collection[str]) -> list[str]:
    """Tell which classes have files, and no image that can be used; `offered` counts the files of each."""
    bad = sorted(label for label in offered if label not in usable)
    lines = [
        f"class {name!r}: {number:,} {'file, and it cannot' if number == 1 else 'files, none of which can'} be used"
        for name in bad[:SHOWN]
        for number in [offered[name]]
    ]
    return lines + ([f"  and {len(bad) - SHOWN:,} more classes like that"] if len(bad) > SHOWN else [])


def find_place(origin: str) -> str:
    """Return the place of a file: without what is said of a frame, or of a format."""
    return re.split(f"{_FRAME}|{_CONVERTED}$", origin, maxsplit=1)[0] if "#" in origin else origin


def _name(labels: Labels) -> str:
    return ", ".join(labels) or "unlabelled"


def _count(number: int, one: str = "", many: str = "") -> str:
    return f"1 image {one}".rstrip() if number == 1 else f"{number:,} images {many}".rstrip()


def _shorten(origin: str) -> str:
    return origin if len(origin) <= MAX_SHOWN else f"{origin[:12]}...{origin[15 - MAX_SHOWN :]}"
