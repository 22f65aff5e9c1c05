"""Labels and sides from where files lie: class folders, split folders above them, or names by a pattern. Pure.

One function for every source whose images have paths: folders, archives, buckets.

`{label}`, `{side}` and `{group}` take the shortest text that fits, at least one character; `{number}` takes digits; `*`
takes anything, also nothing. None of them crosses a `/`. A template without a `/` is compared with the file's name, one
with a `/` with the whole path below the source; one without a dot in its last part, with the name without its suffix.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise

from visionloop.errors import SourceError, shorten
from visionloop.ingest.paths.listing import find_side, is_label

NUMBER = "{number}"
# What each field of a template takes.
GAPS = {f"{{{name}}}": f"(?P<{name}>[^/]+?)" for name in ("label", "side", "group")} | {
    NUMBER: "[0-9]+?",
    "*": "[^/]*?",
}
MAX_TEMPLATE = 500
MAX_PATH = 4096
MAX_WRAPPERS = 3
SAMPLE = 1000
# Usual names of numbered files, in the order in which they are tried.
NUMBERED = ("{label}.{number}.*", "{label}_{number}", "{label}-{number}", "{label} ({number})")
# Before a number these name a camera or nothing, not a class.
NO_CLASSES = frozenset(
    {"img", "image", "images", "dsc", "dscn", "dscf", "pxl", "dji", "gopr", "gp", "vid", "photo", "picture", "pic"}
    | {"frame", "screenshot", "p", "sample", "file"}
)


@dataclass(frozen=True, slots=True)
class Match:
    """What a file's path says. `side`: train, val or test; None without `{side}`, or for another word."""

    label: str
    side: str | None = None
    group: str | None = None


@dataclass(frozen=True, slots=True)
class Pattern:
    """A checked template, as an expression for the name (or for the whole path) of a file."""

    text: str
    expression: re.Pattern[str]
    whole_path: bool
    keeps_suffix: bool

    def match(self, relative_path: str) -> Match | None:
        """Return what a path (`/` between its parts) says, or None."""
        text = relative_path if self.whole_path else relative_path[relative_path.rfind("/") + 1 :]
        if not self.keeps_suffix and text.rfind(".") > text.rfind("/") + 1:
            text = text[: text.rfind(".")]
        found = self.expression.fullmatch(text) if len(text) <= MAX_PATH else None
        if found is None:
            return None
        fields = found.groupdict()
        side = find_side(fields["side"]) if "side" in fields else None
        return Match(fields["label"], side, fields.get("group"))


def make_pattern(text: str, where: str) -> Pattern:
    """Check a template and compile it. Raises SourceError."""
    pieces = _split(text, where)
    fields = [piece[1:-1] for piece in pieces if piece.startswith("{")]
    if "label" not in fields:
        raise _refuse_pattern(text, where, "names no label", "{label} in it, as in {label}.*.jpg")
    if twice := [name for name in fields if fields.count(name) > 1 and name != "number"]:
        raise _refuse_pattern(text, where, f"names {{{twice[0]}}} twice", "each field once")
    for left, right in pairwise(pieces):
        if left in GAPS and right in GAPS and right != NUMBER:
            raise _refuse_pattern(
                text, where, "has two fields side by side", "a character between them, as in {label}_{group}"
            )
    return Pattern(text, re.compile(_make_expression(pieces)), "/" in text, "." in text[text.rfind("/") + 1 :])


def _split(text: str, where: str) -> list[str]:
    """Split a template into fields, stars and plain text. Raises SourceError."""
    if not text or len(text) > MAX_TEMPLATE or not text.isprintable():
        raise _refuse_pattern(
            text[:80], where, "is empty, too long or not printable", f"1 to {MAX_TEMPLATE} characters"
        )
    if text.startswith("/") or "\\" in text or ".." in text.split("/"):
        raise _refuse_pattern(text, where, "leaves the source", "a path below the source, with `/` between its parts")
    pieces = [piece for piece in re.split(r"(\{[^}]*\}?|\*)", re.sub(r"\*+", "*", text)) if piece]
    expected = "{label}, {side}, {group}, {number} or *"
    for piece in pieces:
        if piece.startswith("{") and piece not in GAPS:
            raise _refuse_pattern(text, where, f"has {piece}", expected)
        if "}" in piece and piece not in GAPS:
            raise _refuse_pattern(text, where, "has a } without its {", expected)
    return pieces


def _refuse_pattern(text: str, where: str, found: str, expected: str) -> SourceError:
    return SourceError(f"{where} pattern", f"{text!r} {found}", expected, "Edit the pattern in params.yaml.")


def _make_expression(pieces: Sequence[str]) -> str:
    """Return the expression of a template: each field takes the shortest text with which the rest still fits.

    Plain lazy fields would try every division of a long name (`*a*a*a...` for 4,000 times `a` would never end). But a
    field that ends at the first place where the text behind it fits leaves the most to the next field, so no later
    place needs to be tried. Atomic groups `(?>...)` say so: what is in them is not tried again. A number belongs to
    the text behind a field, because it cannot take whatever is left over. The last field has to reach the end of the
    name, so it stays a plain one:

        *x{label}_{number}y*.jpg   ->   (?>[^/]*?x)(?>(?P<label>[^/]+?)_(?>[0-9]+?y))[^/]*?(?i:\\.jpg)
    """
    groups = [[""]]  # each begins with a field or star, the first with the start of the name; then its numbers
    for i, piece in enumerate(pieces):
        if piece == NUMBER:
            groups[-1].append(GAPS[piece])
        elif piece in GAPS:
            groups.append([GAPS[piece]])
        else:
            groups[-1][-1] += _escape(piece, is_last=i == len(pieces) - 1)
    *firm, last = groups
    held = [f"(?>{first}{_hold(numbers)})" for first, *numbers in firm if first or numbers]
    first, *numbers = last
    return "".join(held) + first + _hold(numbers[:-1]) + "".join(numbers[-1:])


def _escape(text: str, *, is_last: bool) -> str:
    """Return an expression for plain text. The case of a suffix says nothing: `.JPG` is `.jpg`."""
    dot = text.rfind(".") if is_last else -1
    return f"{re.escape(text[:dot])}(?i:{re.escape(text[dot:])})" if dot >= 0 else re.escape(text)


def _hold(parts: Sequence[str]) -> str:
    return "".join(f"(?>{part})" for part in parts)


@dataclass(frozen=True, slots=True)
class Placement:
    """What a path says about its image. No `labels`: for prediction only. `side` and `test_is_given` as in `Item`."""

    labels: tuple[str, ...]
    side: str | None = None
    test_is_given: bool = False
    group: str | None = None


@dataclass(frozen=True, slots=True)
class _Layout:
    """How paths are read. `wrapper` is a folder above everything; `splits` are the split folders, `labelled` those
    with labels inside."""

    wrapper: str
    pattern: Pattern | None
    splits: Mapping[str, str]
    labelled: frozenset[str]


def place_all(
    paths: Sequence[str], where: str, tell: Callable[[str], None], *, pattern: str | None = None, loose: bool = False
) -> list[Placement | str]:
    """Return for each path what it says, or a sentence why it has no label. Guesses are told.

    Paths have `/` between their parts. `loose`: a folder above everything is an archive's own name, not a class.

    Raises:
        SourceError: the pattern is not valid, or no path has a label.
    """
    given = make_pattern(pattern, where) if pattern else None
    plan = _make_plan(paths, where, tell, given, loose)
    found = [_place(path, plan) for path in paths] if plan.pattern else _place_folders(paths, plan)
    if not any(isinstance(one, Placement) and one.labels for one in found):
        raise _refuse(paths, where, given)
    sides = {one.side for one in found if isinstance(one, Placement) and one.side and one.labels}
    settled = settle_sides(sides, lambda line: tell(f"{where}: {line}"))
    return [
        Placement(one.labels, *settled[one.side], one.group) if isinstance(one, Placement) and one.side else one
        for one in found
    ]


def settle_sides(sides: Collection[str], tell: Callable[[str], None]) -> dict[str, tuple[str | None, bool]]:
    """Return for each side that a source names its side here, and whether the source has a test side of its own.

    With `train` and exactly one held-out side, that one becomes `test`, whatever its name, because people report
    figures on it. It is told when that is a side for validation. Without a side for validation, part of train is used;
    `train` alone is divided into all three sides.
    """
    held_out = [side for side in sides if side != "train"]
    if "train" in sides and len(held_out) == 1:
        if held_out == ["val"]:
            tell("no test side is given, so the images for validation are the test side; validation gets part of train")
        return {"train": (None, True), held_out[0]: ("test", False)}
    has_val, has_test = "val" in sides, "test" in sides
    return {side: (None if side == "train" and not has_val else side, has_test) for side in sides}


def _place(path: str, plan: _Layout) -> Placement | str:
    inner = path[len(plan.wrapper) :]
    top, slash, rest = inner.partition("/")
    side = plan.splits.get(top) if slash else None
    if side and top not in plan.labelled:
        return Placement(())
    if plan.pattern:
        match = plan.pattern.match(inner)
        if match is None or not is_label(match.label):
            return f"its name does not fit the pattern {plan.pattern.text}"
        return Placement((match.label,), match.side or side, False, match.group)
    if side:
        top, slash, _ = rest.partition("/")
    elif plan.labelled:
        return f"it lies outside of the split folders {shorten(list(plan.labelled))}"
    if not slash:
        return "it lies in no class folder"
    return Placement((top,), side) if is_label(top) else "the name of its folder cannot be a class"


def _place_folders(paths: Sequence[str], plan: _Layout) -> list[Placement | str]:
    """Place paths without a pattern: what lies in one folder has one place."""
    places: dict[str, Placement | str] = {}
    found = []
    for path in paths:
        folder = path.rpartition("/")[0]
        place = places.get(folder)
        if place is None:
            place = places[folder] = _place(path, plan)
        found.append(place)
    return found


def _make_plan(
    paths: Sequence[str], where: str, tell: Callable[[str], None], given: Pattern | None, loose: bool
) -> _Layout:
    wrapper = ""
    tree = _Tree(paths)
    for _ in range(MAX_WRAPPERS):
        if not (name := tree.find_wrapper(given, loose)):
            break
        wrapper += f"{name}/"
        tree = _Tree([path[len(wrapper) :] for path in paths])
    if wrapper:
        tell(f"{where}: all images are inside {wrapper}, so this name is not taken for a class")
    pattern = given
    if pattern is None and not tree.has_classes():
        pattern = tree.guess_pattern()
        if pattern:
            tell(f"{where}: no class folders, labels guessed from names by the pattern {pattern.text}")
    labelled = tree.find_labelled(pattern)
    splits = tree.splits if labelled or len(tree.splits) < len(tree.tops) else {}
    for name in sorted(set(splits) - labelled):
        tell(f"{where}: images of {name}/ without labels, for prediction only: {len(tree.tops[name]):,}")
    return _Layout(wrapper, pattern, splits, frozenset(labelled))


class _Tree:
    """Paths by their top folder ("" for those that lie in none)."""

    def __init__(self, paths: Sequence[str]) -> None:
        self.tops: dict[str, list[str]] = defaultdict(list)
        for path in paths:
            top, slash, rest = path.partition("/")
            self.tops[top if slash else ""].append(rest if slash else path)
        self.splits = {top: side for top in self.tops if top and (side := find_side(top))}

    def find_wrapper(self, given: Pattern | None, loose: bool) -> str:
        """Return the one folder that everything lies in, if it is no class and no split; else ""."""
        if len(self.tops) != 1 or self.splits or "" in self.tops:
            return ""
        name, inside = next(iter(self.tops.items()))
        tree = _Tree(inside)
        if any(tree.classes_of(top) for top in tree.splits):
            return name
        is_flat = "" in tree.tops
        if loose and (
            tree.guess_pattern() or given if is_flat else len(tree.tops) > 1 or tree.find_wrapper(given, True)
        ):
            return name
        return ""

    def classes_of(self, top: str) -> set[str]:
        """Return the folders in a top folder."""
        return {path.partition("/")[0] for path in self.tops[top] if "/" in path}

    def has_classes(self) -> bool:
        """Say whether there are class folders, at the top or in split folders."""
        return any(top not in self.splits for top in self.tops if top) or any(
            self.classes_of(top) for top in self.splits
        )

    def find_labelled(self, pattern: Pattern | None) -> set[str]:
        """Return the split folders with labels inside: class folders, or names that fit the pattern."""
        if pattern:
            return {
                top
                for top in self.splits
                if any(pattern.match(f"{top}/{path}") for path in islice(self.tops[top], 100))
            }
        classes = {top: self.classes_of(top) for top in self.splits}
        labelled = {top for top in self.splits if classes[top]}
        known = set().union(*(classes[top] for top in labelled if self.splits[top] == "train"))
        if len(known) > 1:
            # A single folder that is no class of train only holds unlabelled images: test/unknown/.
            labelled -= {top for top in labelled if len(classes[top]) == 1 and not classes[top] <= known}
        return labelled

    def guess_pattern(self) -> Pattern | None:
        """Return the first pattern of numbered names that the flat files fit, with two classes or more."""
        train = [top for top, side in self.splits.items() if side == "train"]
        names = [path for top in train or self.tops for path in self.tops[top]]
        if not names or any("/" in name for name in names):
            return None
        names = names[:: max(1, len(names) // SAMPLE)]
        for text in NUMBERED:
            pattern = make_pattern(text, "guess")
            if pattern.match(names[0]) and _fits([pattern.match(name) for name in names]):
                return pattern
        return None


def _fits(matches: Sequence[Match | None]) -> bool:
    labels = {match.label.lower() if match else "" for match in matches}
    believable = all(is_label(label) and not label.isdecimal() for label in labels) and not labels & NO_CLASSES
    return believable and 1 < len(labels) <= len(matches) / 2


def _refuse(paths: Sequence[str], where: str, given: Pattern | None) -> SourceError:
    if given:
        found = f"no file fits the pattern {given.text}" + (f", as {paths[0]!r} does not" if paths else "")
        return SourceError(where, found, "names like the pattern", "Edit the pattern in params.yaml.")
    return SourceError(
        where,
        "no image in any class folder",
        "CLASS/IMAGE.jpg or train/CLASS/IMAGE.jpg",
        "Put the images of each class into a folder of its name, or give the source a `pattern` for their names.",
    )
