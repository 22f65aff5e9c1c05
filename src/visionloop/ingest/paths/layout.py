"""Labels and sides from where files lie: class folders, split folders above them, or names by a pattern. Pure.

One function for every source whose images have paths: folders, archives, buckets.

`{label}`, `{side}` and `{group}` take the shortest text that fits, at least one character; `{number}` takes digits; `*`
takes anything. None of them crosses a `/`. A template without a `/` is held against the file's name, one with a `/`
against the whole path below the source; one without a dot in its last part, against the name without its suffix.
"""

from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise

from visionloop.errors import SourceError, shorten
from visionloop.ingest.paths.listing import find_side, is_label

FIELDS = ("label", "side", "group", "number")
ANY = "*"
MAX_TEMPLATE = 500
MAX_PATH = 4096
MAX_WRAPPERS = 3
SAMPLE = 1000
# Names that people and machines give to numbered files, in the order in which they are tried.
NUMBERED = ("{label}.{number}.*", "{label}_{number}", "{label}-{number}", "{label} ({number})")
# Before a number these name a camera or nothing, not a class.
NO_CLASSES = frozenset(
    {"img", "image", "images", "dsc", "dscn", "dscf", "pxl", "dji", "gopr", "gp", "vid", "photo", "picture", "pic"}
    | {"frame", "screenshot", "p", "sample", "file"}
)


@dataclass(frozen=True, slots=True)
class Match:
    """What a file's path says. `side` is train, val or test; None when the template has none, or it is another word."""

    label: str
    side: str | None = None
    group: str | None = None


@dataclass(frozen=True, slots=True)
class Token:
    """A piece of a template: a `field` (of FIELDS, or `*`), or a literal `text`."""

    text: str = ""
    field: str = ""


@dataclass(frozen=True, slots=True)
class Pattern:
    """A checked template. `tokens` of the middle; `suffix` is the literal at its end, in lower case."""

    text: str
    tokens: tuple[Token, ...]
    suffix: str
    whole_path: bool
    keeps_suffix: bool

    def match(self, relative_path: str) -> Match | None:
        """Return what a path (`/` between its parts) says, or None. Takes time linear in the length of the path."""
        text = relative_path if self.whole_path else relative_path[relative_path.rfind("/") + 1 :]
        if not self.keeps_suffix and text.rfind(".") > text.rfind("/") + 1:
            text = text[: text.rfind(".")]
        if len(text) > MAX_PATH or (self.suffix and not text.lower().endswith(self.suffix)):
            return None
        text = text[: len(text) - len(self.suffix)]
        fields = _match_nearest(self.tokens, text) or _match_tokens(self.tokens, text)
        if fields is None:
            return None
        side = find_side(fields["side"]) if "side" in fields else None
        return Match(fields["label"], side, fields.get("group"))


def make_pattern(text: str, where: str) -> Pattern:
    """Check a template. Raises SourceError."""
    tokens = _split(text, where)
    fields = [token.field for token in tokens if token.field and token.field != ANY]
    if "label" not in fields:
        raise _refuse_pattern(text, where, "names no label", "{label} in it, as in {label}.*.jpg")
    if twice := [name for name in fields if fields.count(name) > 1 and name != "number"]:
        raise _refuse_pattern(text, where, f"names {{{twice[0]}}} twice", "each field once")
    for left, right in pairwise(tokens):
        if left.field and right.field and right.field != "number":
            raise _refuse_pattern(
                text, where, "has two fields side by side", "a character between them, as in {label}_{group}"
            )
    last = text[text.rfind("/") + 1 :]
    suffix = ""
    if not tokens[-1].field:
        # The case of a suffix says nothing: `.JPG` is `.jpg`.
        dot = tokens[-1].text.rfind(".")
        if dot >= 0:
            suffix = tokens[-1].text[dot:].lower()
            head = tokens[-1].text[:dot]
            tokens = [*tokens[:-1], *([Token(text=head)] if head else [])]
    return Pattern(text, tuple(tokens), suffix, "/" in text, "." in last)


def _split(text: str, where: str) -> list[Token]:
    """Split a template into literals and fields. Raises SourceError."""
    if not text or len(text) > MAX_TEMPLATE or not text.isprintable():
        raise _refuse_pattern(
            text[:80], where, "is empty, too long or not printable", f"1 to {MAX_TEMPLATE} characters"
        )
    if text.startswith("/") or "\\" in text or ".." in text.split("/"):
        raise _refuse_pattern(text, where, "leaves the source", "a path below the source, with `/` between its parts")
    tokens: list[Token] = []
    rest = text
    while rest:
        if rest.startswith(ANY):
            token, rest = Token(field=ANY), rest.lstrip(ANY)
        elif rest.startswith("{"):
            name, end, rest = rest[1:].partition("}")
            if not end or name not in FIELDS:
                raise _refuse_pattern(text, where, f"has {{{name}{end}", "{label}, {side}, {group}, {number} or *")
            token = Token(field=name)
        else:
            stop = min((i for i in (rest.find(ANY), rest.find("{")) if i >= 0), default=len(rest))
            token, rest = Token(text=rest[:stop]), rest[stop:]
            if "}" in token.text:
                raise _refuse_pattern(text, where, "has a } without its {", "{label}, {side}, {group}, {number} or *")
        tokens.append(token)
    return tokens


def _refuse_pattern(text: str, where: str, found: str, expected: str) -> SourceError:
    return SourceError(f"{where} pattern", f"{text!r} {found}", expected, "Edit the pattern in params.yaml.")


def _match_nearest(tokens: tuple[Token, ...], text: str) -> dict[str, str] | None:
    """Return the fields if each can end where the next literal first comes: what `_match_tokens` finds too, sooner."""
    fields: dict[str, str] = {}
    start, field = 0, ""
    for token in (*tokens, Token()):
        if token.field and field:
            return None
        if token.field:
            field = token.field
            continue
        end = text.find(token.text, start + (field not in ("", ANY))) if token.text else len(text)
        value = text[start:end]
        if end < start or "/" in value or (value and not field) or (field == "number" and not _is_number(value)):
            return None
        if field:
            if not value and field != ANY:
                return None
            fields[field] = value
        start, field = end + len(token.text), ""
    return fields


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdecimal()


def _match_tokens(tokens: tuple[Token, ...], text: str) -> dict[str, str] | None:
    """Return the text of each field, the shortest first, or None.

    First from the end: at which places can the rest of the tokens begin? Then from the start, the nearest such place
    each time. So nothing is ever tried twice, whatever the template and the name.
    """
    size = len(text)
    reach = [b""] * len(tokens) + [bytes(size) + b"\1"]
    for i in range(len(tokens) - 1, -1, -1):
        reach[i] = _reach_before(tokens[i], text, reach[i + 1])
    if not reach[0][0]:
        return None
    fields: dict[str, str] = {}
    start = 0
    for i, token in enumerate(tokens):
        if not token.field:
            start += len(token.text)
            continue
        end = reach[i + 1].index(1, start + (token.field != ANY))
        fields[token.field] = text[start:end]
        start = end
    return fields


def _reach_before(token: Token, text: str, after: bytes) -> bytes:
    """Return for each place of the text whether the token fits there and ends at a place marked in `after`."""
    size = len(text)
    marks = bytearray(size + 1)
    if not token.field:
        place = text.find(token.text)
        while place >= 0:
            marks[place] = after[place + len(token.text)]
            place = text.find(token.text, place + 1)
        return bytes(marks)
    skips = token.field == ANY  # may be empty
    digits_only = token.field == "number"
    reachable = 0  # whether a marked end lies after this place, with nothing between that the field may not take
    for place in range(size, -1, -1):
        if place < size and (text[place] == "/" or (digits_only and not "0" <= text[place] <= "9")):
            reachable = 0
        marks[place] = reachable | (after[place] if skips else 0)
        reachable |= after[place]
    return bytes(marks)


@dataclass(frozen=True, slots=True)
class Place:
    """What a path says of its image. No `labels`: for prediction only. `side` and `test_is_given` as in `Item`."""

    labels: tuple[str, ...]
    side: str | None = None
    test_is_given: bool = False
    group: str | None = None


@dataclass(frozen=True, slots=True)
class _Plan:
    """How paths are read. `wrapper` is a folder above everything; `splits` are the split folders, `labelled` those
    with labels inside."""

    wrapper: str
    pattern: Pattern | None
    splits: Mapping[str, str]
    labelled: frozenset[str]


def place_all(
    paths: Sequence[str], where: str, tell: Callable[[str], None], *, pattern: str | None = None, loose: bool = False
) -> list[Place | str]:
    """Return for each path its place, or in words why it has no label. What had to be guessed is told.

    Paths have `/` between their parts. `loose`: a folder above everything is an archive's own name, not a class.

    Raises:
        SourceError: the pattern is none, or no path has a label.
    """
    given = make_pattern(pattern, where) if pattern else None
    plan = _make_plan(paths, where, tell, given, loose)
    found = [_place(path, plan) for path in paths] if plan.pattern else _place_folders(paths, plan)
    if not any(isinstance(one, Place) and one.labels for one in found):
        raise _refuse(paths, where, given)
    sides = {one.side for one in found if isinstance(one, Place) and one.side and one.labels}
    settled = settle_sides(sides)
    return [
        Place(one.labels, *settled[one.side], one.group) if isinstance(one, Place) and one.side else one
        for one in found
    ]


def settle_sides(sides: Collection[str]) -> dict[str, tuple[str | None, bool]]:
    """Return for each side that a source names its side here, and whether the source has a test side of its own.

    With `train` and exactly one held-out side that one is what people report on: `test`, whatever its name. Without a
    side for validation it is carved out of train; `train` alone gives up all three sides.
    """
    held_out = [side for side in sides if side != "train"]
    if "train" in sides and len(held_out) == 1:
        return {"train": (None, True), held_out[0]: ("test", False)}
    has_val, has_test = "val" in sides, "test" in sides
    return {side: (None if side == "train" and not has_val else side, has_test) for side in sides}


def _place(path: str, plan: _Plan) -> Place | str:
    inner = path[len(plan.wrapper) :]
    top, slash, rest = inner.partition("/")
    side = plan.splits.get(top) if slash else None
    if side and top not in plan.labelled:
        return Place(())
    if plan.pattern:
        match = plan.pattern.match(inner)
        if match is None or not is_label(match.label):
            return f"its name does not fit the pattern {plan.pattern.text}"
        return Place((match.label,), match.side or side, False, match.group)
    if side:
        top, slash, _ = rest.partition("/")
    elif plan.labelled:
        return f"it lies outside of the split folders {shorten(list(plan.labelled))}"
    if not slash:
        return "it lies in no class folder"
    return Place((top,), side) if is_label(top) else "the name of its folder cannot be a class"


def _place_folders(paths: Sequence[str], plan: _Plan) -> list[Place | str]:
    """Place paths without a pattern: what lies in one folder has one place."""
    places: dict[str, Place | str] = {}
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
) -> _Plan:
    wrapper = ""
    tree = _Tree(paths)
    for _ in range(MAX_WRAPPERS):
        if not (name := tree.find_wrapper(given, loose)):
            break
        wrapper += f"{name}/"
        tree = _Tree([path[len(wrapper) :] for path in paths])
    if wrapper:
        tell(f"{where}: everything lies in {wrapper}; that is taken as no class")
    pattern = given
    if pattern is None and not tree.has_classes():
        pattern = tree.guess_pattern()
        if pattern:
            tell(f"{where}: no class folders, labels guessed from names by the pattern {pattern.text}")
    labelled = tree.find_labelled(pattern)
    splits = tree.splits if labelled or len(tree.splits) < len(tree.tops) else {}
    for name in sorted(set(splits) - labelled):
        tell(f"{where}: images of {name}/ without labels, for prediction only: {len(tree.tops[name]):,}")
    return _Plan(wrapper, pattern, splits, frozenset(labelled))


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
            # A single folder of another name holds images that somebody had to put somewhere: test/unknown/.
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
