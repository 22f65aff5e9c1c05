"""Templates that say where the label is in a path, as `{label}.*.jpg` or `{side}/{label}/`. Pure.

`{label}`, `{side}` and `{group}` take the shortest text that fits, at least one character; `{number}` takes digits; `*`
takes anything, also nothing. None of them crosses a `/`. A template without a `/` is compared with the file's name, one
with a `/` with the whole path below the source; one without a dot in its last part, with the name without its suffix.
One that ends with a `/` is compared with the first folders only; what lies below them does not matter. `**/`, once,
stands for any number of folders: what is behind it is compared with the last ones. `**/{label}/` is the last folder.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from visionloop.errors import SourceError
from visionloop.ingest.paths.names import find_side, find_weak_side, is_label, split_name

NUMBER = "{number}"
# What each field of a template takes.
GAPS = {f"{{{name}}}": f"(?P<{name}>[^/]+?)" for name in ("label", "side", "group")} | {
    NUMBER: "[0-9]+?",
    "*": "[^/]*?",
}
MAX_TEMPLATE = 500
MAX_PATH = 4096
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
    """A checked template, as an expression for the name (or for the whole path) of a file.

    `num_folders`: how many folders it names, if it names folders only. `num_last`: how many of its parts are behind a
    `**/`, and so the last ones of a path; `num_first`: how many are before it.
    """

    text: str
    expression: re.Pattern[str]
    whole_path: bool
    keeps_suffix: bool
    num_folders: int = 0
    num_first: int = 0
    num_last: int = 0

    def match(self, relative_path: str) -> Match | None:
        """Return what a path (`/` between its parts) says, or None."""
        if self.num_last:
            parts = relative_path.split("/")[: -1 if self.num_folders else None]
            if len(parts) < self.num_first + self.num_last:
                return None
            relative_path = "/".join((*parts[: self.num_first], *parts[len(parts) - self.num_last :], ""))
            relative_path = relative_path if self.num_folders else relative_path[:-1]
        if self.num_folders:
            *folders, _ = relative_path.split("/", self.num_folders)
            return self._read("/".join(folders)) if len(folders) == self.num_folders else None
        text = relative_path if self.whole_path else relative_path[relative_path.rfind("/") + 1 :]
        if not self.keeps_suffix and text.rfind(".") > text.rfind("/") + 1:
            text = text[: text.rfind(".")]
        return self._read(text)

    def _read(self, text: str) -> Match | None:
        found = self.expression.fullmatch(text) if len(text) <= MAX_PATH else None
        if found is None:
            return None
        fields = found.groupdict()
        word = fields.get("side", "")
        side = find_side(word) or split_name(word)[0] or find_weak_side(word)
        return Match(fields["label"], side, fields.get("group"))


def make_pattern(text: str, where: str) -> Pattern:
    """Check a template and compile it. Raises SourceError."""
    first, gap, last = text.partition("**/")
    has_gap = bool(gap and last) and not first.rpartition("/")[2]
    shape = first + last if has_gap else text
    pieces = _split(shape, where)
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
    num_folders = shape.count("/") if shape.endswith("/") else 0
    keeps_suffix = "." in shape[shape.rfind("/") + 1 :]
    num_last = last.removesuffix("/").count("/") + 1 if has_gap else 0
    expression = re.compile(_make_expression(pieces))
    return Pattern(text, expression, "/" in text, keeps_suffix, num_folders, first.count("/"), num_last)


def _split(text: str, where: str) -> list[str]:
    """Split a template into fields, stars and plain text. Raises SourceError."""
    if not text.strip("/") or len(text) > MAX_TEMPLATE or not text.isprintable():
        raise _refuse_pattern(
            text[:80], where, "is empty, too long or not printable", f"1 to {MAX_TEMPLATE} characters"
        )
    if text.startswith("/") or "\\" in text or ".." in text.split("/"):
        raise _refuse_pattern(text, where, "leaves the source", "a path below the source, with `/` between its parts")
    text = re.sub(r"\*+", "*", text.removesuffix("/"))
    pieces = [piece for piece in re.split(r"(\{[^}]*\}?|\*)", text) if piece]
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


def guess_pattern(names: Sequence[str]) -> Pattern | None:
    """Return the first pattern of numbered names that the names of files fit, with two classes or more."""
    names = names[:: max(1, len(names) // SAMPLE)]
    for text in NUMBERED if names else ():
        pattern = make_pattern(text, "guess")
        if pattern.match(names[0]) and _fits([pattern.match(name) for name in names]):
            return pattern
    return None


def _fits(matches: Sequence[Match | None]) -> bool:
    labels = {match.label.lower() if match else "" for match in matches}
    believable = all(is_label(label) and not label.isdecimal() for label in labels) and not labels & NO_CLASSES
    return believable and 1 < len(labels) <= len(matches) / 2
