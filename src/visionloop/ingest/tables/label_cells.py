"""What the cells of a label column mean as a whole: one label each, several between marks, or that there is none. Pure.

One cell alone says nothing: `cat,dog` is two labels where `cat` and `dog` are labels of other rows, and one class where
they are not (`O'Hare, Chicago`). Worked example, with how often each cell is there:

    cat 5, dog 4, "cat,dog" 1     ","  divides one cell, its parts are labels of other rows: several labels
    Tomato/healthy 3, Tomato/blight 2, Potato/healthy 3     no part is a label, each stays at its place: one class each
    clear primary 3, haze primary 2, agriculture clear water 1     no part is a label, but they move: several labels
"""

import shlex
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import NamedTuple
from unicodedata import normalize

from visionloop.errors import ImageError, SourceError, shorten
from visionloop.ingest.paths.names import escape_name
from visionloop.ingest.tables.cells import NOTHING, Row, clean_label, get_cell, split_label_cell, to_text

AS_WRITTEN = "none"  # the separator that divides nothing
# What people write between labels, and what names hold as often: there nearly all parts must be labels of other rows.
MARKS = (
    ",",
    ";",
    "|",
    "/",
    "&",
    "+",
    ":",
    "\n",
    "\t",
    "\\",
    "#",
    "、",
    "\uff0c",
    "\uff1b",
    "\uff0f",
    "・",
    "\uff5c",
    "\uff0b",
    " and ",
)
NAME_MARKS = (" ", "_", "-")
LISTS = ("|", ";")  # with `task: multilabel` they divide wherever they are
MOST, NEARLY_ALL = 0.5, 0.8
MOVING, MOVING_WORDS = 0.25, 0.4
MIN_CELLS = 3  # that show parts in other places
NO_LABEL = NOTHING | {"?"}
MAX_TEXTS, SHOWN_TEXTS = 200_000, 10
LARGE_SHARE, SMALL_SHARE, FEW = 0.3, 0.05, 2


@dataclass(frozen=True)
class LabelSurvey:
    """The label cells of a table: texts with their numbers, and where questions about them come from.

    `split` is the column of the split's words, "" when there is none.

    `is_list_name`: the column is called like one of several labels (tags). `several`: the workspace has `task:
    multilabel`. `command` is how the command line names the table.
    """

    column: str
    where: str
    several: bool
    command: str
    is_list_name: bool
    split: str = ""
    texts: Counter[str] = field(default_factory=Counter)

    def add(self, rows: Iterable[Row]) -> frozenset[tuple[str, str]] | None:
        """Count the cells of rows; of very many texts only the first ones.

        Return which cells of label and split stand in one row; None if they are very many, or not all plain texts.
        """
        counts: Counter[tuple[str, str]] = Counter()
        is_whole = True
        for row in rows:
            cell, side = get_cell(row, self.column), get_cell(row, self.split) if self.split else ""
            if isinstance(cell, str) and isinstance(side, str) and cell[:1] not in ("[", "{"):
                counts[cell, side] += 1
                if len(counts) > MAX_TEXTS:
                    self._take(counts)
                    counts.clear()
                    is_whole = False
            else:
                self._take({(text, ""): number for text, number in _count_parts(cell).items()})
                is_whole = False
        self._take(counts)
        return frozenset(counts) if is_whole else None

    def _take(self, counts: Mapping[tuple[str, str], int]) -> None:
        for (text, _), number in counts.items():
            label = clean_label(text)
            if label and (len(self.texts) < MAX_TEXTS or label in self.texts):
                self.texts[label] += number


def _count_parts(cell: object) -> Mapping[str, int]:
    try:
        return Counter(to_text(one) for one in split_label_cell(cell))
    except ImageError:
        return {}


def divide(text: str, mark: str) -> list[str]:
    """Return the parts of a cell between marks, without empty ones."""
    parts = text.split() if mark == " " else text.split(mark)
    return [part for one in parts if (part := one.strip())]


class _Marked(NamedTuple):
    """What a mark divides: the cells with their parts, and which of these are labels of other rows."""

    mark: str
    cells: Mapping[str, Sequence[str]]
    known: list[str]
    num_rows: int


def find_separator(survey: LabelSurvey) -> str | None:
    """Return what divides several labels in one cell, None where each cell is one label.

    Raises:
        SourceError: cells look like several labels, and an image may have one.
    """
    texts = {text: number for text, number in survey.texts.items() if text.casefold() not in NO_LABEL}
    found = [one for mark in MARKS if (one := _weigh(texts, mark, survey.is_list_name))]
    found = found or [one for mark in NAME_MARKS if (one := _weigh(texts, mark, survey.is_list_name))]
    if not found:
        return next((mark for mark in LISTS if survey.several and any(mark in text for text in texts)), None)
    best = max(found, key=lambda one: one.num_rows)
    if survey.several:
        return best.mark
    shown = shorten([repr(escape_name(text[:60])) for text in best.cells])
    why = (
        f"{shorten([*map(repr, best.known)])} are labels of other rows" if best.known else "their parts come in others"
    )
    raise SourceError(
        survey.where,
        f"column {survey.column} can be read in two ways: {shown} ({best.num_rows:,} rows) may be several labels"
        f" ({why}) or one",
        "one way to read it",
        f"Say `{survey.command} --separator {_quote(best.mark)}` in a workspace with `task: multilabel` for several"
        f" labels, or `{survey.command} --separator {AS_WRITTEN}` for one class as written"
        f" (in params.yaml: `columns: {{separator: ...}}`).",
    )


def _quote(mark: str) -> str:
    escapes = {"\n": "$'\\n'", "\t": "$'\\t'"}
    return escapes.get(mark) or shlex.quote(mark)


def _weigh(texts: Mapping[str, int], mark: str, is_list_name: bool) -> _Marked | None:
    """Return what a mark divides, if its parts are labels; None for a mark that only stands in names."""
    cells = {text: parts for text in texts if mark in text and len(parts := divide(text, mark)) > 1}
    if not cells:
        return None
    alone = {text.casefold() for text in texts if text not in cells}
    parts = [part for one in cells.values() for part in one]
    known = [part for part in parts if normalize("NFC", part).casefold() in alone]
    is_name_mark = mark in NAME_MARKS
    is_set = len(known) > (NEARLY_ALL if is_name_mark else MOST) * len(parts)
    if not is_set and len(cells) >= MIN_CELLS and (not is_name_mark or (mark == " " and is_list_name)):
        is_set = _count_moving(cells.values()) >= (MOVING_WORDS if is_name_mark else MOVING) * len(parts)
    if not is_set:
        return None
    return _Marked(mark, cells, sorted({*known}), sum(texts[text] for text in cells))


def _count_moving(cells: Iterable[Sequence[str]]) -> int:
    """Return how many parts are of those that several cells have, at several places from the left and from the right.

    A part of a name has its place: the plant in `Tomato/healthy`, the city in `O'Hare, Chicago`.
    """
    left: dict[str, set[int]] = defaultdict(set)
    right: dict[str, set[int]] = defaultdict(set)
    number: Counter[str] = Counter()
    for parts in cells:
        for part in {*parts}:
            place = parts.index(part)
            left[part].add(place)
            right[part].add(len(parts) - place)
            number[part] += 1
    return sum(times for part, times in number.items() if len(left[part]) > 1 and len(right[part]) > 1)


def find_no_label(survey: LabelSurvey, separator: str | None) -> tuple[str, ...]:
    """Return the texts, in lower case, that stand for no label: `NA`, `nan`, `None`; none if all labels are such texts.

    Raises:
        SourceError: one is as frequent as a class, so that it may be one.
    """
    labels: Counter[str] = Counter()
    for text, number in survey.texts.items():
        for part in divide(text, separator) if separator else [text]:
            labels[part] += number
    empty = {label: number for label, number in labels.items() if label.casefold() in NO_LABEL}
    others = [number for label, number in labels.items() if label not in empty]
    if not empty or not others:
        return ()
    most, number = max(empty.items(), key=lambda one: one[1])
    share = number / labels.total()
    is_large = share >= LARGE_SHARE or (share >= SMALL_SHARE and number >= median(others))
    if len(others) > 1 and not (number >= FEW and is_large):
        return tuple(sorted({label.casefold() for label in empty}))
    shown = escape_name(most)
    raise SourceError(
        survey.where,
        f"column {survey.column} says {shown!r} in {number:,} of {labels.total():,} rows, which may be a class or no"
        " label",
        "one way to read it",
        f"Say `{survey.command} --no-label {shlex.quote(shown)}` for rows without a label, or `{survey.command}"
        " --no-label ''` for a class (in params.yaml: `columns: {no_label: [...]}`).",
    )


def describe_no_label(survey: LabelSurvey, no_label: Sequence[str]) -> str:
    """Say which texts were taken for no label, and how they become classes; "" when there is none."""
    found = sorted(text for text in survey.texts if text.casefold() in no_label)
    shown = ", ".join(f"{escape_name(text[:40])!r} in {survey.texts[text]:,}" for text in found[:SHOWN_TEXTS])
    return f"cells that stand for no label: {shown} (`--no-label ''` makes classes of them)" if shown else ""
