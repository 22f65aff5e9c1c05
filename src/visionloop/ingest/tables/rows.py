"""What the columns of a table mean, for every source that has rows: tables, archives, databases, listings.

What params name is checked; the rest is guessed from names and values, and each guess is told. Values become what an
item needs: labels as text, sides as train, val or test, times as ISO 8601 in UTC.
"""

import re
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

from visionloop.errors import ImageError, SourceError, shorten
from visionloop.ingest.item import Item, SourceContext
from visionloop.ingest.paths.listing import escape_name, is_label
from visionloop.ingest.tables.cells import (
    NOTHING,
    Row,
    clean_label,
    get_cell,
    is_on,
    parse_time,
    split_label_cell,
    to_text,
)
from visionloop.ingest.tables.column_guess import ColumnGuess, is_list_name
from visionloop.ingest.tables.files import BAD_ROW, TableKind, guess_table_kind, read_rows
from visionloop.ingest.tables.label_cells import (
    AS_WRITTEN,
    LabelSurvey,
    describe_no_label,
    divide,
    find_no_label,
    find_separator,
)
from visionloop.ingest.tables.split_columns import read_flags, read_word
from visionloop.params import Columns
from visionloop.records import Rejected

__all__ = ["BAD_ROW", "SAMPLE_ROWS", "Row", "RowPlan", "TableKind", "guess_table_kind", "plan_columns", "read_rows"]
SAMPLE_ROWS = 200
MAX_LABELS = 1000
MAX_NAMED = 20
MAX_KNOWN = 10_000
# Paths as Label Studio exports them: of uploaded files, and of files below its local folder.
UPLOADED = re.compile(r"/data/(?:upload/|local-files/\?d=)")
# Names of columns that change when the image does, the most reliable first.
STAMP_NAMES = (
    *("sha256", "sha1", "md5", "digest", "checksum", "hash", "etag", "e_tag", "version_id", "revision"),
    *("updated_at", "updated", "modified_at", "modified", "last_modified", "mtime"),
)
URL_STARTS = ("http://", "https://")


@dataclass(frozen=True)
class RowPlan:
    """Which column means what. `labels` is one column, or several one-hot columns; empty: the table has no labels.

    `side` holds the split's words; `flags` are columns of yes and no instead, `flag_sides` what they mean.
    `no_label` are texts, in lower case, that stand for no label. `numbers` are the sides that 0, 1, 2 mean.
    `sides` are those of rows with a label, None: not looked for.
    Each `read_x` takes a row as the table has it; a column that a row lacks is an empty cell.
    """

    image: str | None
    labels: tuple[str, ...] = ()
    one_hot: bool = False
    side: str | None = None
    group: str | None = None
    time: str | None = None
    separator: str | None = None
    flags: tuple[str, ...] = ()
    flag_sides: tuple[str, ...] = ()
    no_label: tuple[str, ...] = ()
    numbers: tuple[str, ...] = ()
    sides: frozenset[str] | None = None

    @cached_property
    def _known_labels(self) -> dict[str, tuple[str, ...]]:
        """What cells were read as: a million rows hold few of them. No field: a plan is stored in a cursor."""
        return {}

    @cached_property
    def _known_sides(self) -> dict[str, str | None]:
        return {}

    def read_image(self, row: Row) -> str | bytes | None:
        """Return a path, a URL, or the bytes of the image; None when the cell is empty.

        Raises:
            ImageError: `bad_row`: the line of the file was no row, or the cell holds no text and no bytes.
        """
        if BAD_ROW in row:
            raise ImageError("row", str(row[BAD_ROW]), "a row of the table", reason_code="bad_row")
        value = get_cell(row, self.image) if self.image else None
        if isinstance(value, dict):  # as Hugging Face's datasets store images
            value = value.get("bytes") or value.get("path") or value.get("url")
        if isinstance(value, bytes | bytearray | memoryview):
            return bytes(value) or None
        text = to_text(value)
        return (UPLOADED.sub("", text, count=1) if "/data/" in text else text) or None

    def read_labels(self, row: Row) -> tuple[str, ...]:
        """Return the labels, each once; () when there is none. Raises ImageError (`bad_label`)."""
        if self.one_hot:
            return tuple(clean_label(name) for name in self.labels if is_on(get_cell(row, name), name))
        value = get_cell(row, self.labels[0]) if self.labels else None
        if isinstance(value, str):
            if (known := self._known_labels.get(value)) is None:
                known = self._read_label_cell(value)
                if len(self._known_labels) < MAX_KNOWN:
                    self._known_labels[value] = known
            return known
        return self._read_label_cell(value)

    def _read_label_cell(self, value: object) -> tuple[str, ...]:
        texts = [to_text(one) for one in split_label_cell(value)]
        if self.separator:
            texts = [part for text in texts for part in divide(text, self.separator)]
        labels = tuple(dict.fromkeys(label for text in texts if (label := clean_label(text))))
        if self.no_label:
            labels = tuple(label for label in labels if label.casefold() not in self.no_label)
        for label in labels:
            if not is_label(label):
                shown = escape_name(label[:60])
                expected = "at most 256 printable characters"
                raise ImageError("label", f"cannot be {shown!r}", expected, reason_code="bad_label")
        if len(labels) > MAX_LABELS:
            raise ImageError("label", f"has {len(labels)} values", f"at most {MAX_LABELS}", reason_code="bad_label")
        return labels

    def read_side(self, row: Row) -> str | None:
        """Return train, val or test; None when the cell is empty. Raises ImageError (`unknown_side`)."""
        if self.flags:
            return read_flags(row, self.flags, self.flag_sides)
        if self.side is None:
            return None
        cell = get_cell(row, self.side)
        if not isinstance(cell, str) or cell not in self._known_sides:
            side = read_word(cell, self.side, self.numbers)
            if isinstance(cell, str) and len(self._known_sides) < MAX_KNOWN:
                self._known_sides[cell] = side
            return side
        return self._known_sides[cell]

    def read_group(self, row: Row) -> str | None:
        """Return the group, whose images must stay on one side, or None."""
        text = to_text(get_cell(row, self.group)) if self.group else ""
        return None if text.lower() in NOTHING else escape_name(text)

    def read_time(self, row: Row) -> str | None:
        """Return the time as ISO 8601 in UTC; a time without a zone is taken as UTC. None when it is no time."""
        return parse_time(get_cell(row, self.time)) if self.time else None


@dataclass(frozen=True)
class Reading:
    """What decides beside params and a sample how columns are read.

    `several`: an image may have several labels. `command` names the table on the command line. `rows` reads all rows,
    None: only the sample can be looked at. `needs_image`: there must be a column of images. `own` are columns that the
    source itself uses.
    """

    several: bool = False
    command: str = "visionloop ingest TABLE"
    rows: Callable[[], Iterable[Row]] | None = None
    needs_image: bool = True
    own: Sequence[str | None] = ()


def plan_columns(
    columns: Columns,
    sample: Sequence[Row],
    where: str,
    tell: Callable[[str], None],
    reading: Reading = Reading(),
) -> RowPlan:
    """Say which column means what: as params name them, the rest by names and values of the sample, each guess told.

    What nobody uses is told too.

    Raises:
        SourceError: a named column is missing, it is unclear which holds the image or the label, or cells of the label
            can be read in two ways.
    """
    rows = [row for row in sample if BAD_ROW not in row]
    if not rows:
        todo = "Check the table." if sample else "Remove the source until it has rows."
        raise SourceError(where, "has no row" if not sample else str(sample[0][BAD_ROW]), "a row for each image", todo)
    guess = ColumnGuess(rows, where, _list_named(columns), reading.rows, reading.command)
    guess.numbers, guess.asks_numbers = columns.sides or (), columns.sides is None
    image = columns.image or guess.find_image()
    if image is None and reading.needs_image:
        raise guess.refuse("image", "the image's path, URL or bytes")
    split = guess.check_split(columns.side) if columns.side else guess.find_split()
    flag_sides = guess.flag_sides(split)
    group, time = (getattr(columns, key) or guess.find(key) for key in ("group", "time"))
    labels = (columns.label,) if isinstance(columns.label, str) else columns.label or guess.find_labels()
    one_hot = len(labels) > 1
    words, flags = (None, split) if flag_sides else (next(iter(split), None), ())
    cells = _LabelCells()
    if labels and not one_hot:
        cells = _read_label_cells(columns, (labels[0], words or ""), rows, where, reading)
    known = (cells.separator, flags, flag_sides, cells.no_label, guess.numbers)
    plan = RowPlan(image, labels, one_hot, words, group, time, *known)
    unused = guess.list_unused([name for name in (image, *labels, *split, group, time, *reading.own) if name])
    for line in (_describe_guesses(columns, plan), *guess.notes, cells.note, _describe_unused(unused)):
        if line:
            tell(f"{where}: {line}")
    if words and cells.beside is not None:
        plan = replace(plan, sides=list_sides(({labels[0]: cell, words: side} for cell, side in cells.beside), plan))
    return plan


class _LabelCells(NamedTuple):
    """What divides label cells, the texts that stand for no label, what to tell of these, and the split cells beside.

    `beside`: label and split cell of each row, each pair once; None when not all rows were looked at.
    """

    separator: str | None = None
    no_label: tuple[str, ...] = ()
    note: str = ""
    beside: Collection[tuple[str, str]] | None = None


def _read_label_cells(
    columns: Columns, label_and_split: tuple[str, str], sample: Sequence[Row], where: str, reading: Reading
) -> _LabelCells:
    """Read the cells of a label column as a whole.

    Raises:
        SourceError: cells can be read in two ways.
    """
    label, split = label_and_split
    separator, no_label, note = columns.separator, tuple(text.strip().casefold() for text in columns.no_label or ()), ""
    beside: Collection[tuple[str, str]] | None = None
    if separator is None or columns.no_label is None:
        survey = LabelSurvey(label, where, reading.several, reading.command, is_list_name(label), split)
        whole = (row for row in reading.rows() if BAD_ROW not in row) if reading.rows else sample
        found = survey.add(whole)
        beside = found if reading.rows else None
        separator = find_separator(survey) if separator is None else separator
        mark = None if separator == AS_WRITTEN else separator
        if columns.no_label is None:
            no_label = find_no_label(survey, mark)
            note = describe_no_label(survey, no_label)
    return _LabelCells(None if separator == AS_WRITTEN else separator, no_label, note, beside)


def list_sides(rows: Iterable[Row], plan: RowPlan) -> frozenset[str]:
    """Return the sides of the rows that have a label."""
    sides: set[str] = set()
    for row in rows:
        with suppress(ImageError):
            side = plan.read_side(row)
            if side and side not in sides and plan.read_labels(row):
                sides.add(side)
    return frozenset(sides)


def _list_named(columns: Columns) -> dict[str, str]:
    """Return the columns that params name, each with the key that names it."""
    labels = (columns.label,) if isinstance(columns.label, str) else columns.label or ()
    named = dict.fromkeys(labels, "label")
    for key in ("image", "side", "group", "time"):
        if name := getattr(columns, key):
            named[name] = key
    return named


def _describe_guesses(columns: Columns, plan: RowPlan) -> str:
    """Say in one line what was guessed, "" when nothing was."""
    parts: dict[str, str] = {}
    if columns.label is None:
        parts["label"] = shorten(plan.labels) if plan.labels else "none, for prediction only"
        if plan.one_hot:
            parts["label"] += " (one-hot)"
        if plan.separator and columns.separator is None:
            parts["label"] += f" (several, divided by {plan.separator!r})"
    for key in ("image", "side", "group", "time"):
        name = getattr(plan, key) or (shorten(plan.flags) if key == "side" else "")
        if name and getattr(columns, key) is None:
            parts[key] = name
    guesses = ", ".join(f"{key} = {parts[key]}" for key in ("image", "label", "side", "group", "time") if key in parts)
    return f"columns guessed: {guesses} (name them under `columns` to be sure)" if parts else ""


def _describe_unused(names: Sequence[str]) -> str:
    """Say in one line which columns mean nothing to us, "" when there are none."""
    shown = ", ".join(escape_name(name[:60]) for name in names[:MAX_NAMED])
    more = f" and {len(names) - MAX_NAMED:,} more" if len(names) > MAX_NAMED else ""
    return f"columns not used: {shown}{more}" if names else ""


@dataclass(frozen=True)
class RowImage:
    """Where the image of a row is: its place for messages, its reader, and its stamp if the source knows one."""

    place: str
    read: Callable[[int], bytes]
    stamp: str | None = None


def make_item(
    row: Row, plan: RowPlan, source: str, place: str, find: Callable[[str | bytes], RowImage]
) -> Item | Rejected:
    """Return the item of a row. `place` names the row where its image does not; `find` looks its image up.

    What is wrong in the row of an image that was found is a rejection of that image, not of the row.
    """
    found: RowImage | None = None
    try:
        reference = plan.read_image(row)
        if reference is None:
            return Rejected(f"{source}:{place}", "row_without_image", f"no value in column {plan.image}", is_row=True)
        found = find(reference)
        return Item(
            origin=f"{source}:{found.place}",
            source=source,
            labels=plan.read_labels(row),
            read=found.read,
            stamp=found.stamp,
            side=plan.read_side(row),
            group=plan.read_group(row),
            captured_at=plan.read_time(row),
        )
    except ImageError as exc:
        reason = str(exc).removeprefix("row: ")
        if found is None or found.place == place:
            return Rejected(f"{source}:{place}", exc.reason_code, reason, is_row=found is None)
        return Rejected(f"{source}:{found.place}", exc.reason_code, f"{place}: {reason}")


def find_stamp_column(rows: Sequence[Row]) -> str | None:
    """Return the column that changes when the image does, if every row of the sample has a value there."""
    names = {name.lower(): name for name in rows[0]} if rows else {}
    for name in (names[stamp] for stamp in STAMP_NAMES if stamp in names):
        if all(read_stamp(row, name) for row in rows):
            return name
    return None


def read_stamp(row: Row, column: str) -> str | None:
    """Return the stamp of a row, or None when the cell is empty."""
    try:
        text = to_text(get_cell(row, column))
    except ImageError:
        return None
    return f"{column} {text}" if text else None


def is_url(text: str) -> bool:
    """Say whether a cell is a URL that an image may be fetched from."""
    return text.lower().startswith(URL_STARTS)


def make_url_finder(hosts: Sequence[str], context: SourceContext) -> Callable[[str], RowImage]:
    """Return what makes the reader of a URL, once its host was checked. Raises SourceError when a host is none."""
    from visionloop.web.download import make_fetcher

    fetcher = make_fetcher(context.env, hosts)

    def find(url: str) -> RowImage:
        address = fetcher.check(url)
        return RowImage(fetcher.describe_address(address), fetcher.make_reader(url))

    return find


def give_bytes(data: bytes, max_bytes: int) -> bytes:
    """Return the bytes of a cell. Raises ImageError."""
    if len(data) > max_bytes:
        raise ImageError("cell", f"holds {len(data):,} bytes", f"at most {max_bytes:,}", reason_code="too_large")
    return data
