"""Which tables in a folder hold the labels: one, one for each side (`train.csv`, `test.csv`), or parts of one."""

import re
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import suppress
from functools import partial
from itertools import islice

from visionloop.errors import SourceError, shorten
from visionloop.ingest.paths.names import is_image_name, split_name
from visionloop.ingest.tables.cells import Row, get_cell
from visionloop.ingest.tables.column_guess import LABEL_NAMES, ColumnGuess
from visionloop.ingest.tables.files import BAD_ROW, guess_table_kind
from visionloop.params import Columns

SAMPLE_ROWS = 200
# Which of several tables in a folder is taken, by its name without suffix.
TABLE_NAMES = ("labels", "train_labels", "metadata", "annotations", "train")
PART = re.compile(r"(.+?)-\d+-of-\d+(?:-\w+)?\.parquet")  # as Hugging Face's `datasets` names them
# Words beside a side's word in the name of a table that say nothing more.
_TABLE_WORDS = frozenset(
    (
        *("labels", "label", "labeled", "labelled", "annotations", "annotation", "metadata", "meta", "list", "info"),
        *("df", "y", "classes", "class", "csv", "json", "ids", "instances", "gt", "groundtruth", "ground", "truth"),
        *("set", "data", "images", "image", "files", "split", "final", "new", "full", "table"),
    )
)
ALL_TABLES = "*"  # in the place of a table's name: those that `choose_tables` takes
IGNORED = ("sample_submission", "samplesubmission", "submission")
# What programs write beside images, and what visionloop itself writes: no tables of labels.
SIDE_FILES = frozenset(
    (
        *("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "features.json", "state.json"),
        *("class_indices.json", "class_names.json", "id2label.json", "label_map.json", "classes.json"),
        *("dataset.json", "code.json", "corrections.csv", "cat_to_name.json", "config.json", "package.json"),
        *("card.json", "metrics.json", "intervals.json", "report.json", "leaks.json", "answers.json"),
        *("predictions.csv", "per_class.csv", "slices.csv"),
    )
)


def list_tables(names: Sequence[str]) -> list[str]:
    """Return the names of tables among the files of a folder, sorted.

    Left out are text lists, hidden files, submissions, our own, and what lies beside an image: `x.jpg.json`, `x.json`.
    """
    tables = [name for name in names if guess_table_kind(name) not in (None, "list")]
    tables = [name for name in tables if not name.lower().startswith((".", *IGNORED)) and name not in SIDE_FILES]
    images = {name for name in names if is_image_name(name)} if tables else set()
    images |= {name.rsplit(".", 1)[0] for name in images}
    return sorted(name for name in tables if not _is_sidecar(name, images))


def _is_sidecar(name: str, images: Collection[str]) -> bool:
    """Say whether a file's name is that of an image, with or without suffix, and more: Google Takeout, Lightroom."""
    parts = name.split(".")
    return is_image_name(".".join(parts[:-1])) or any(".".join(parts[:i]) in images for i in range(1, len(parts)))


def choose_table(names: Sequence[str], where: str, tell: Callable[[str], None]) -> str:
    """Return which of these files is the table. Raises SourceError when none or several could be."""
    tables = list_tables(names)
    for wanted in TABLE_NAMES if len(tables) > 1 else ():
        chosen = [name for name in tables if name.rsplit(".", 1)[0].lower() == wanted]
        if len(chosen) == 1:
            tell(f"{where}: of {len(tables)} tables {chosen[0]} is taken")
            return chosen[0]
    if len(tables) != 1:
        found = f"holds {len(tables)} tables: {shorten(tables)}" if tables else "holds no table"
        raise SourceError(where, found, "one, or one named labels.csv", "Give the path of the table itself.")
    return tables[0]


def choose_tables(
    names: Sequence[str],
    where: str,
    tell: Callable[[str], None],
    read: Callable[[str], Iterator[Row]],
    named: Columns,
) -> list[str]:
    """Return which of these files is the table, or all that are one: a table for each side, or parts of one.

    `read` returns the rows of a table, `named` are the columns that params name. Tables without labels (Kaggle's
    test.csv) are told, and left out.

    Raises:
        SourceError: none or several could be the table.
    """
    if forms := sorted(name for name in names if name.lower().startswith(IGNORED) and guess_table_kind(name)):
        tell(f"{where}: not read, because it is a form for answers: {shorten(forms)}")
    tables = list_tables(names)
    if len(tables) > 1 and all(PART.fullmatch(name) and find_table_side(name) for name in tables):
        tell(f"{where}: {len(tables)} parts of one table, their names say the split: {shorten(tables)}")
        return sorted(tables, key=_rank_part)
    chosen = find_side_tables(tables, where, read)
    if not chosen:
        return [choose_table(names, where, tell)]
    samples = {name: _read_sample(read, name) for name in chosen}
    columns = _find_columns(samples[chosen[0]], where, named)
    labelled = [name for name in chosen if _has_labels(samples[name], columns)] or chosen[:1]
    if len(labelled) > 1:
        tell(f"{where}: {len(labelled)} tables, their names say the split: {', '.join(labelled)}")
        _check_columns({name: samples[name] for name in labelled}, columns, where)
    for name in chosen:
        if name not in labelled:
            tell(f"{where}: {name} has no labels, and is not read")
    if others := [name for name in tables if name not in chosen]:
        tell(f"{where}: not read: {shorten(others)} (to read it, name it as a table)")
    return labelled


def find_table_side(name: str) -> str | None:
    """Return the side that a table's name means: `train_labels.csv`, `instances_val2017.json`; None without one."""
    return split_name(_cut_suffix(name))[0]


def find_side_tables(tables: Sequence[str], where: str, read: Callable[[str], Iterator[Row]]) -> list[str]:
    """Return the tables that are one for each side, train first; [] when there are none, or one for all of them.

    Raises:
        SourceError: there are several for one side.
    """
    groups: dict[tuple[str, ...], dict[str, list[str]]] = {}
    for name in tables:
        side, rest = split_name(_cut_suffix(name))
        if side:
            key = tuple(word for word in rest if word not in _TABLE_WORDS)
            groups.setdefault(key, {}).setdefault(side, []).append(name)
    group = max(groups.values(), key=len, default={})
    plain = [name for name in tables if not find_table_side(name) and _cut_suffix(name).lower() in TABLE_NAMES]
    if len(group) < 2 or any(_names_images(name, where, read) for name in plain):
        return []
    return [name for side in ("train", "val", "test") for name in _choose_of_side(group.get(side, []), where)]


def _choose_of_side(names: Sequence[str], where: str) -> list[str]:
    """Return the tables of one side: the one with the labels, or all that differ in a number only."""
    for word in ("labels", "label", "annotations", "metadata"):
        named = [name for name in names if word in _cut_suffix(name).lower()]
        if len(names) > 1 and len(named) == 1:
            return named
    if len({re.sub(r"\d+", "", name) for name in names}) > 1:
        found = f"holds {len(names)} tables of one side: {shorten(names)}"
        raise SourceError(where, found, "one for each side", "Give the path of the table itself.")
    return sorted(names)


def _cut_suffix(name: str) -> str:
    return PART.sub(r"\1", name) if PART.fullmatch(name) else name.rsplit(".", 1)[0]


def _rank_part(name: str) -> tuple[bool, str]:
    return find_table_side(name) != "train", name


def _read_sample(read: Callable[[str], Iterator[Row]], name: str) -> list[Row]:
    return [row for row in islice(read(name), SAMPLE_ROWS) if BAD_ROW not in row]


def _names_images(name: str, where: str, read: Callable[[str], Iterator[Row]]) -> bool:
    with suppress(SourceError):
        rows = _read_sample(read, name)
        return bool(rows) and ColumnGuess(rows, where, {}).find_image() is not None
    return False


def _find_columns(rows: Sequence[Row], where: str, named: Columns) -> tuple[str | None, tuple[str, ...]]:
    """Return the column of the image and those of the label, as they are guessed from the first table."""
    labels = (named.label,) if isinstance(named.label, str) else tuple(named.label or ())
    with suppress(SourceError):
        guess = ColumnGuess(rows, where, dict.fromkeys(labels, "label"))
        image = named.image or guess.find_image()
        for taken in (guess.find_split, partial(guess.find, "group"), partial(guess.find, "time")):
            taken()
        return image, labels or guess.find_labels()
    return named.image, labels


def _has_labels(rows: Sequence[Row], columns: tuple[str | None, tuple[str, ...]]) -> bool:
    """Say whether a table holds a label, in a column of the first table or in one that is called so."""
    labels = columns[1] or tuple(key for row in rows[:1] for key in row if key != columns[0])
    named = {key for row in rows for key in row if str(key).strip().lower().replace(" ", "_") in LABEL_NAMES}
    return any(_is_full(get_cell(row, name)) for row in rows for name in {*labels, *named})


def _is_full(value: object) -> bool:
    return value is not None and value == value and str(value).strip() not in ("", "[]", "{}")  # noqa: PLR0124


def _check_columns(samples: dict[str, list[Row]], columns: tuple[str | None, tuple[str, ...]], where: str) -> None:
    """Raise SourceError when a table has not the columns of the first one."""
    first, *others = samples
    keys = [key for key in (columns[0], *columns[1]) if key]
    for name in others:
        if missing := [key for key in keys if not any(_is_there(row, key) for row in samples[name])]:
            raise SourceError(
                f"{where} {name}",
                f"has no column {shorten(missing)}, which {first} has",
                "the same columns in the tables of all sides",
                "Give them the same names, or give the path of one table.",
            )


def _is_there(row: Row, key: str) -> bool:
    return key in row or get_cell(row, key) is not None
