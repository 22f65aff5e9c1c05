"""What is not as the dataset has it: images that a pull finds under another label, elsewhere, twice, or nowhere. Pure.

A source that lists a whole place (a folder, a zip, a table, a bucket, films) shows what is gone. An answer of a
database, a server or a function may hold only what is new: of these only another label is seen.
"""

import json
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from visionloop.errors import SHOWN, shorten
from visionloop.ingest.check import Checked
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
Offers = Mapping[str, Sequence[tuple[Inspected, Labels]]]


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


@dataclass(frozen=True)
class Moves:
    """What differs. `gone` are rows of the dataset, by sha256; of these `replaced` lie where other bytes are now."""

    relabelled: Sequence[Relabelled] = ()
    renamed: Sequence[tuple[str, str]] = ()
    gone: Mapping[str, ImageRecord] = field(default_factory=dict)
    replaced: frozenset[str] = frozenset()


def list_whole(sources: Iterable[Source]) -> frozenset[str]:
    """Return the names of the sources that offer all they have at each pull."""
    return frozenset(source.name for source in sources if source.kind in WHOLE)


def find_moves(
    rows: Mapping[str, ImageRecord],
    offers: Offers,
    checked: Checked,
    refused: Sequence[Rejected],
    whole: Collection[str],
) -> Moves:
    """Compare the rows of a dataset with what a pull offers, by content. `whole` as in `list_whole`.

    What lies at the places that were rejected, or `refused` for their labels, is not judged.
    """
    taken = {find_place(one.item.origin) for one in checked.inspected}
    unclear = {find_place(one.origin) for one in (*checked.rejected, *refused) if not one.is_row}

    def has_left(origin: str) -> bool:
        """Say whether an image that is not offered at a place lies there no longer."""
        if origin.partition(":")[0] not in whole or _LIVE in origin:
            return False
        place = find_place(origin)
        return place not in unclear and (_FRAME not in origin or place not in taken)

    relabelled, renamed, gone = list[Relabelled](), list[tuple[str, str]](), dict[str, ImageRecord]()
    for sha256, row in rows.items():
        same = offers.get(sha256, ())
        places = {one.item.origin for one, _ in same}
        lost = [origin for origin in row.origins if origin not in places]
        are_lost = all(map(has_left, lost))
        if not same:
            if are_lost and row.origins:
                gone[sha256] = row
            continue
        after = tuple(sorted({label for _, labels in same for label in labels}))
        if {*row.labels} <= {*after}:
            if lost and are_lost and (new := places - {*row.origins}):
                renamed.append((lost[0], min(new)))
        elif are_lost and len({labels for _, labels in same}) == 1:
            relabelled.append(Relabelled(sha256, row.labels, after, row.origins[0], tuple(sorted(places))))
    replaced = {s for s, row in gone.items() if any(find_place(origin) in taken for origin in row.origins)}
    gone = dict(sorted(gone.items(), key=lambda one: one[1].origins))
    return Moves(sorted(relabelled, key=lambda one: one.old), sorted(renamed), gone, frozenset(replaced))


def relabel_rows(rows: dict[str, ImageRecord], moves: Moves) -> None:
    """Give the images the labels and places that their sources give them now."""
    for one in moves.relabelled:
        sources = tuple(sorted({place.partition(":")[0] for place in one.places}))
        rows[one.sha256] = replace(rows[one.sha256], labels=one.after, origins=one.places, sources=sources)


def find_saved_again(
    moves: Moves, rows: Mapping[str, ImageRecord], offered: Iterable[str]
) -> list[tuple[ImageRecord, ImageRecord]]:
    """Return pairs of near duplicates: one that is gone, and one that is offered under another label.

    Near duplicates have the same key, unless a group gave it.
    """
    gone = {row.key: row for row in moves.gone.values() if row.group is None}
    now = (rows[sha256] for sha256 in offered if sha256 in rows)
    return [
        (gone[row.key], row)
        for row in now
        if row.group is None and row.key in gone and row.labels and not {*row.labels} & {*gone[row.key].labels}
    ]


def explain_relabelled(moves: Moves) -> dict[str, str]:
    """Return by sha256 what is said of an image whose label in the dataset stands, with the line that changes it."""
    return {
        one.sha256: f"was {_name(one.before)}, and is {_name(one.after)} in its source now; "
        f"{format_correction(one.sha256, one.before, one.after)}"
        for one in moves.relabelled
    }


def explain_conflict(sha256: str, known: Labels, offered: Iterable[Labels]) -> str:
    """Say under which labels the same bytes came, which of them stands, and the line that settles it."""
    names = sorted({label for labels in (known, *offered) for label in labels})
    first, *others = [*known, *(name for name in names if name not in known)]
    stands = f"{first} stands" if known else "none is taken"
    return f"same bytes labelled {shorten(names)}: {stands}; {format_correction(sha256, (first,), (others[0],))}"


def advise_relabel(moves: Moves, offers: Offers, say: Callable[[str], str]) -> list[str]:
    """Tell which labels the sources have changed, and how the dataset gets them. `say` makes a command of an option."""
    if not moves.relabelled:
        return []
    first = moves.relabelled[0]
    offered = {label for same in offers.values() for _, labels in same for label in labels}
    targets: dict[str, set[str]] = {}
    for one in moves.relabelled:
        for old in {*one.before} - {*one.after}:
            targets.setdefault(old, set()).add(_name(one.after))
    renamed = {old: min(new) for old, new in targets.items() if old not in offered and len(new) == 1}
    lines = [
        f"moved: {_count(len(moves.relabelled))} have another label in their source now: {first.old} ("
        f"{_name(first.before)}) is {first.places[0]} ({_name(first.after)}); until you say so the old label stands.",
        f"  {say('--relabel')} takes the new labels (the quarantine holds a line of each for ingest.corrections)",
    ]
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
    if moves.renamed:
        old, new = map(_shorten, moves.renamed[0])
        what = _count(len(moves.renamed), "lies", "lie")
        lines.append(f"renamed: {what} elsewhere now, with the same label ({old} is {new})")
    return lines


def describe_copies(alike: Iterable[Sequence[Inspected]]) -> list[str]:
    """Tell how many files are byte copies of others: an image counts once. `alike`: the files of each image."""
    places = [sorted({one.item.origin for one in same if _FRAME not in one.item.origin}) for same in alike]
    several = [some for some in places if len(some) > 1]
    if not several:
        return []
    number = sum(map(len, several)) - len(several)
    what = "file is a byte copy of another" if number == 1 else "files are byte copies of others"
    return [f"copies: {number:,} {what}, counted once ({_shorten(several[0][1])} is {_shorten(several[0][0])})"]


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
    return re.split(f"{_FRAME}|{_CONVERTED}$", origin, maxsplit=1)[0]


def _name(labels: Labels) -> str:
    return ", ".join(labels) or "unlabelled"


def _count(number: int, one: str = "", many: str = "") -> str:
    return f"1 image {one}".rstrip() if number == 1 else f"{number:,} images {many}".rstrip()


def _shorten(origin: str) -> str:
    return origin if len(origin) <= MAX_SHOWN else f"{origin[:12]}...{origin[15 - MAX_SHOWN :]}"
