"""Labels from file names, by a template that people can write: `{label}.*.jpg`. No regular expression of a user runs.

`{label}`, `{side}` and `{group}` take the shortest text that fits, at least one character; `{number}` takes digits; `*`
takes anything. None of them crosses a `/`. A template without a `/` is held against the file's name, one with a `/`
against the whole path below the source; one without a dot in its last part, against the name without its suffix.
"""

from dataclasses import dataclass
from itertools import pairwise

from visionloop.errors import SourceError
from visionloop.ingest.paths.names import find_side

FIELDS = ("label", "side", "group", "number")
ANY = "*"
MAX_TEMPLATE = 500
MAX_PATH = 4096


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
        raise _refuse(text, where, "names no label", "{label} in it, as in {label}.*.jpg")
    if twice := [name for name in fields if fields.count(name) > 1 and name != "number"]:
        raise _refuse(text, where, f"names {{{twice[0]}}} twice", "each field once")
    for left, right in pairwise(tokens):
        if left.field and right.field and right.field != "number":
            raise _refuse(text, where, "has two fields side by side", "a character between them, as in {label}_{group}")
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
        raise _refuse(text[:80], where, "is empty, too long or not printable", f"1 to {MAX_TEMPLATE} characters")
    if text.startswith("/") or "\\" in text or ".." in text.split("/"):
        raise _refuse(text, where, "leaves the source", "a path below the source, with `/` between its parts")
    tokens: list[Token] = []
    rest = text
    while rest:
        if rest.startswith(ANY):
            token, rest = Token(field=ANY), rest.lstrip(ANY)
        elif rest.startswith("{"):
            name, end, rest = rest[1:].partition("}")
            if not end or name not in FIELDS:
                raise _refuse(text, where, f"has {{{name}{end}", "{label}, {side}, {group}, {number} or *")
            token = Token(field=name)
        else:
            stop = min((i for i in (rest.find(ANY), rest.find("{")) if i >= 0), default=len(rest))
            token, rest = Token(text=rest[:stop]), rest[stop:]
            if "}" in token.text:
                raise _refuse(text, where, "has a } without its {", "{label}, {side}, {group}, {number} or *")
        tokens.append(token)
    return tokens


def _refuse(text: str, where: str, found: str, expected: str) -> SourceError:
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
