"""Guess what the columns of a table mean, from their names and from a sample of their values. Pure."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from visionloop.errors import SourceError, shorten
from visionloop.ingest.paths.listing import find_side, is_image_name
from visionloop.ingest.tables.cells import CHOICES, ON_OFF, Row, get_cell, is_on, parse_time, to_text
from visionloop.ingest.tables.split_columns import (
    NUMBERED,
    SIDES,
    are_flags,
    find_flag_side,
    find_numbers,
    find_unknown,
    is_split_name,
)

MAX_DEPTH = 3
IMAGE_NAMES = (
    *("image", "image_path", "img", "img_path", "path", "file", "filename", "file_name", "filepath", "file_path"),
    *("image_file", "image_name", "img_name", "image_url", "url", "uri", "photo", "picture", "fname", "image_index"),
    *("filenames", "filepaths", "image_filename", "img_filename"),
    *("image_id", "img_id", "id", "key"),
)
LABEL_NAMES = (
    *("label", "labels", "class", "class_name", "classname", "category", "categories", "target", "breed", "species"),
    *("tags", "diagnosis", "dx", "finding_labels", "emotion", "choice", "choices", "classes", "y", "label_name"),
    *("class_id", "label_id"),
)
SEVERAL_NAMES = ("labels", "tags", "classes", "categories")
GROUP_NAMES = (
    *("group", "group_id", "patient", "patient_id", "subject", "subject_id", "video", "video_id", "session"),
    *("session_id", "sequence", "sequence_id", "seq_id", "camera", "camera_id", "lesion_id"),
)
TIME_NAMES = ("captured_at", "taken_at", "time", "timestamp", "datetime", "date", "created_at", "date_taken")
NO_CLASSES = ("unlabeled", "unlabelled")  # Roboflow's one-hot column of images without a label
SECONDS_FROM = 1e8


class ColumnGuess:
    """The columns of a sample of rows: which have a meaning already, and what the others may mean."""

    def __init__(
        self,
        rows: Sequence[Row],
        where: str,
        named: Mapping[str, str],
        read_all: Callable[[], Iterable[Row]] | None = None,
        command: str = "visionloop ingest TABLE",
    ) -> None:
        """Take the columns that params name (column -> key of `columns`). `read_all` gives more rows than the sample.

        Raises:
            SourceError: a named column is missing.
        """
        self._rows, self._where, self._taken = rows, where, set(named)
        self._read_all, self._command = read_all or (lambda: rows), command
        self.numbers: tuple[str, ...] = ()  # the sides that 0, 1, 2 mean in the split column
        self.asks_numbers = True
        self.notes: list[str] = []  # why a column was not used for what its name says
        self._columns = list(dict.fromkeys(name for row in rows for name in _list_columns(row)))
        if any(map(_is_image, self._columns)):
            raise SourceError(where, "has an image where a column's name should be", "a header", "Write one above.")
        for name, key in named.items():
            if name not in self._columns and all(get_cell(row, name) is None for row in rows):
                shown = shorten([column[:60] for column in self._columns])
                raise SourceError(f"{where} columns.{key}", f"no column {name!r}", f"one of {shown}", "Edit it.")

    def refuse(self, key: str, what: str) -> SourceError:
        return SourceError(
            self._where,
            f"cannot tell which column is {what}: {shorten([name[:60] for name in self._columns])}",
            f"a header with a column named {key}",
            f"Name it in the source's columns.{key}.",
        )

    def _values(self, name: str) -> list[Any]:
        """The cells of a column in the sample, without the empty ones."""
        cells = (get_cell(row, name) for row in self._rows)
        return [cell for cell in cells if cell is not None and cell != "" and cell == cell]  # noqa: PLR0124

    def find(self, key: str) -> str | None:
        """Take the first free column that has a name for this key (group, time) and values that fit."""
        names, fits = FITTING[key]
        for name in self._by_name(names):
            values = self._values(name)
            if values and all(fits(value) for value in values):
                self._taken.add(name)
                return name
        return None

    def find_split(self) -> tuple[str, ...]:
        """Take the column of the split's words, or those of yes and no (`is_valid`, `is_test`); () when there is none.

        A column is one by its name and the words of most rows, or by its values alone: train and another side.
        """
        named = [name for name in self._free() if is_split_name(_plain_name(name)) or _plain_name(name) in NUMBERED]
        for name in named:
            unknown, known = find_unknown(values := self._values(name))
            if known and known * 2 >= len(values):
                return self._take_split(name)
            if values and self._find_numbers(name):
                return self._take_split(name)
            if values:
                shown = shorten([ascii(word) for word in unknown])
                self.notes.append(f"column {name} is not used as the split: {shown} are not train, val or test")
        flags = [name for name in self._free() if find_flag_side(_plain_name(name)) and are_flags(self._values(name))]
        if flags:
            sides = [find_flag_side(_plain_name(name)) for name in flags]
            return self._take_split(*(name for i, name in enumerate(flags) if sides.index(sides[i]) == i))
        for name in self._free():
            sides = [find_side(value) if isinstance(value, str) else None for value in self._values(name)]
            if None not in sides and "train" in sides and len({*sides}) > 1 and _plain_name(name) not in LABEL_NAMES:
                return self._take_split(name)
        return ()

    def _find_numbers(self, name: str) -> bool:
        """Say whether the numbers of a split column mean sides. Raises SourceError when it is not clear."""
        if not all(isinstance(v, str | int | float) and to_text(v) in ("0", "1", "2") for v in self._values(name)):
            return False
        if not self.asks_numbers:
            return bool(self.numbers)
        cells = (get_cell(row, name) for row in self._read_all())
        values = {cell for cell in cells if isinstance(cell, str | int | float) and to_text(cell)}
        try:
            self.numbers = find_numbers(_plain_name(name), values)
        except LookupError as exc:
            shown = sorted(map(to_text, values))
            answers = (
                ("train,test", "test,train") if len(shown) == len(SIDES) - 1 else ("train,val,test", "train,test,val")
            )
            raise SourceError(
                self._where,
                f"column {name} holds {', '.join(shown)}, which may be sides or no split",
                "what they mean",
                f"Say `{self._command} --sides {answers[0]}` or `{self._command} --sides {answers[1]}` for the sides of"
                f" {', '.join(shown)}, or `{self._command} --sides none` not to use it (in params.yaml: `columns:"
                " {sides: [...]}`).",
            ) from exc
        return bool(self.numbers)

    def check_split(self, name: str) -> tuple[str, ...]:
        """Return the split column that params name. Raises SourceError when no value of it names a side."""
        values = self._values(name)
        if self._find_numbers(name):
            return (name,)
        if values and not (find_flag_side(_plain_name(name)) and are_flags(values)) and not find_unknown(values)[1]:
            found = f"column {name!r} holds {shorten([*{ascii(value)[:40] for value in values}])}"
            todo = "Write these words into the table, or leave columns.side out."
            expected = "train, val or test, or yes and no in a column like is_valid or is_test"
            raise SourceError(f"{self._where} columns.side", found, expected, todo)
        return (name,)

    def flag_sides(self, names: Sequence[str]) -> tuple[str, ...]:
        """Return the sides that split columns mean if they are columns of yes and no, () if they hold words."""
        sides = [side for name in names if (side := find_flag_side(_plain_name(name)))]
        return tuple(sides) if len(sides) == len(names) and all(are_flags(self._values(n)) for n in names) else ()

    def list_unused(self, used: Sequence[str]) -> list[str]:
        """Return the columns that mean nothing to us, in the order of the table."""
        return [n for n in self._columns if n not in used and not any(n.startswith(f"{one}.") for one in used)]

    def _take_split(self, *names: str) -> tuple[str, ...]:
        self._taken.update(names)
        return names

    def _free(self) -> list[str]:
        return [name for name in self._columns if name not in self._taken]

    def find_image(self) -> str | None:
        """Take the column whose values are image files, URLs or bytes; else one by its name."""
        free = self._free()
        sure = [name for name in free if _are_images(self._values(name))]
        named = self._by_name(IMAGE_NAMES)
        blobs = [name for name in sure if _are_blobs(self._values(name))]
        for name in [*blobs, *(name for name in named if name in sure), *sure, *named]:
            values = self._values(name)
            if values and all(isinstance(value, str | int | bytes | bytearray | memoryview) for value in values):
                self._taken.add(name)
                return name
        return None

    def find_labels(self) -> tuple[str, ...]:
        """The column (or the one-hot columns) of the label; () when no column is left that could be it."""
        for name in self._by_name(LABEL_NAMES):
            if all(_is_label_cell(value) for value in self._values(name)):
                return (name,)
        free = [name for name in self._free() if not _is_number_of_row(name)]
        flat = [name for name in free if all(_is_label_cell(value) for value in self._values(name))]
        on_off = [name for name in flat if all(_is_cell_one_hot(get_cell(row, name)) for row in self._rows)]
        if len(on_off) > 1 and any(_count_on(row, on_off) for row in self._rows):
            return tuple(name for name in on_off if _plain_name(name) not in NO_CLASSES)
        if len(flat) > 1:
            raise self.refuse("label", "the label")
        return tuple(flat)

    def _by_name(self, names: Sequence[str]) -> list[str]:
        """The free columns that have one of these names (of a dotted one, its last part), in this order."""
        free = self._free()
        places = {name: index for index, name in enumerate(names)}
        found = [(places[plain], name) for name in free if (plain := _plain_name(name)) in places]
        return [name for _, name in sorted(found, key=lambda pair: pair[0])]


def is_list_name(name: str) -> bool:
    """Say whether a column is called like one that holds several labels in a cell."""
    return _plain_name(name) in SEVERAL_NAMES


def _plain_name(name: str) -> str:
    return name.rsplit(".", 1)[-1].strip().lower().replace(" ", "_").replace("-", "_")


def _list_columns(row: Row, depth: int = 1) -> list[str]:
    """Return the keys of a row, those of objects inside with dots."""
    names: list[str] = []
    for key, value in row.items():
        if isinstance(value, Mapping) and value and depth < MAX_DEPTH:
            names += [f"{key}.{name}" for name in _list_columns(value, depth + 1)]
        else:
            names.append(str(key))
    return names


def _are_blobs(values: Sequence[Any]) -> bool:
    return bool(values) and all(isinstance(value, bytes | bytearray | memoryview) for value in values)


def _are_images(values: Sequence[Any]) -> bool:
    return _are_blobs(values) or (bool(values) and all(isinstance(value, str) and _is_image(value) for value in values))


def _is_image(text: str) -> bool:
    return text.startswith(("http://", "https://")) or is_image_name(text.strip().replace("\\", "/").rsplit("/", 1)[-1])


def _is_number_of_row(name: str) -> bool:
    """Say whether a column only counts rows: the index that pandas writes, or an id beside the image."""
    return name.startswith(("column ", "Unnamed: ", "__index")) or _plain_name(name) in ("id", "index", "idx")


def _is_label_cell(value: object) -> bool:
    value = value.get(CHOICES) if isinstance(value, Mapping) else value
    parts = value if isinstance(value, list | tuple) else [value]
    return all(isinstance(part, str | int | float) for part in parts)


def _count_on(row: Row, names: Sequence[str]) -> int:
    return sum(is_on(get_cell(row, name), name) for name in names)


def _is_group(value: object) -> bool:
    return isinstance(value, str | int)


def _is_time(value: object) -> bool:
    """Say whether this is a time; a number that would be before 1973 is none."""
    return not (isinstance(value, int | float) and abs(value) < SECONDS_FROM) and parse_time(value) is not None


def _is_cell_one_hot(value: object) -> bool:
    return not isinstance(value, dict | list | bytes) and to_text(value).lower() in ON_OFF


FITTING: Mapping[str, tuple[Sequence[str], Callable[[object], bool]]] = {
    "group": (GROUP_NAMES, _is_group),
    "time": (TIME_NAMES, _is_time),
}
