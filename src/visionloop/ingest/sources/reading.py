"""Which labels count where images lie beside tables: those of class folders, of one table, or of one in each split.

A table in each split folder: Roboflow's `train/_classes.csv`, Hugging Face's `train/metadata.jsonl`, and what
`visionloop datasets export` wrote. Each is read by itself; its folder gives the side.
"""

import re
import shlex
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import NamedTuple

from visionloop.errors import SourceError, shorten
from visionloop.ingest.item import Item, PassedOver, SourceContext
from visionloop.ingest.paths.layout import count_classes, find_unlabelled, settle_sides
from visionloop.ingest.paths.names import escape_name, find_side, is_image_name
from visionloop.ingest.paths.tree import find_flat_splits
from visionloop.ingest.tables.choose import ALL_TABLES, choose_table, choose_tables, find_side_tables, list_tables
from visionloop.ingest.tables.files import FOREIGN_TABLES
from visionloop.ingest.tables.join import read_shelf_table
from visionloop.ingest.tables.label_cells import AS_WRITTEN
from visionloop.ingest.tables.label_table import LabelTable, Shelf
from visionloop.ingest.tables.rows import Row
from visionloop.params import Columns
from visionloop.records import Rejected

MAX_ROWS = 20_000
SAMPLE = 100
OTHER_ARCHIVES = (".tar", ".gz", ".tgz", ".bz2", ".xz", ".zst", ".7z", ".rar")
SHEETS = (".xlsx", ".xls", ".ods", ".numbers")
EXPORT_LIST, EXPORT_TABLE = "images.csv", "metadata.jsonl"
EXPORT_COLUMNS = Columns(
    image="file_name",
    label="labels",
    side="side",
    group="group",
    time="captured_at",
    separator=AS_WRITTEN,
    no_label=("",),
)


class SplitTable(NamedTuple):
    """A folder (its path with a `/` at the end), its side, and the table in it; "" when there is none."""

    folder: str
    side: str | None
    table: str
    columns: Columns | None = None


@dataclass(frozen=True)
class Place:
    """A source's place: `enter` returns what lies below a folder, `list_names` the names of the files in it.

    `columns` are those of its tables, `encoding` that of tables that are not UTF-8, `command` names it on the command
    line.
    """

    source: str
    where: str
    enter: Callable[[str], Shelf]
    list_names: Callable[[str], Sequence[str]]
    columns: Columns
    command: str
    encoding: str | None


def find_split_tables(paths: Sequence[str], list_names: Callable[[str], Sequence[str]]) -> list[SplitTable]:
    """Return the tables in split folders, if they hold the labels of these images; else [].

    `list_names` returns the names of the files in a folder. Class folders in the split folders win, but an export's own
    tables: their labels are exact, where the name of a folder was made safe.
    """
    tops = sorted({path[: path.find("/") + 1] for path in paths if "/" in path})
    if len(tops) == 1 and EXPORT_LIST in list_names(tops[0]):  # a zip of the export's folder
        depth = len(tops[0])
        tops = sorted({path[: path.find("/", depth) + 1] for path in paths if "/" in path[depth:]})
    elif EXPORT_LIST not in list_names(""):
        tops = []
    if tops and all(EXPORT_TABLE in list_names(top) for top in tops):
        return [SplitTable(top, find_side(top.split("/")[-2]), EXPORT_TABLE, EXPORT_COLUMNS) for top in tops]
    sides = find_flat_splits(paths)
    names = {folder: list_tables(list_names(folder)) for folder in sides}
    if not any(names.values()) or count_classes(paths):
        return []
    return [SplitTable(folder, sides[folder], (names[folder] or [""])[0]) for folder in sorted(sides)]


def read_split_tables(tables: Sequence[SplitTable], place: Place, context: SourceContext) -> Iterator[Item | Rejected]:
    """Yield the rows of each table with the side of its folder.

    Raises:
        SourceError: a table cannot be read, or it is unclear which of several is meant.
    """
    where, tell = place.where, context.tell
    sides = {one.side for one in tables if one.side and one.table}
    settled = settle_sides(sides, lambda line: tell(f"{where}: {line}"))
    for one in tables:
        shelf = place.enter(one.folder)
        if not one.table:
            yield from _read_unlabelled(one.folder, shelf, place, tell)
            continue
        is_export = one.columns is EXPORT_COLUMNS
        name = one.table if is_export else choose_table(place.list_names(one.folder), f"{where} {one.folder}", tell)
        tell(f"{where}: the labels of {one.folder} are those of {one.folder}{name}")
        table = LabelTable(
            place.source,
            f"{where} {one.folder}{name}",
            shelf,
            name,
            one.columns or place.columns,
            tell,
            several=context.several,
            command=place.command,
            fallback=place.encoding,
        )
        for found in read_shelf_table(table):
            if isinstance(found, PassedOver):
                continue  # counted for the whole place
            origin = f"{place.source}:{one.folder}{found.origin[len(place.source) + 1 :]}"
            if isinstance(found, Rejected):
                yield replace(found, origin=origin)
            elif found.labels and one.side:
                side, test_is_given = settled[one.side]
                yield found._replace(origin=origin, side=side, test_is_given=test_is_given)
            else:
                yield found._replace(origin=origin)


def _read_unlabelled(folder: str, shelf: Shelf, place: Place, tell: Callable[[str], None]) -> Iterator[Item]:
    files = [file for file in shelf.index("").files.values() if is_image_name(file.relative.rsplit("/", 1)[-1])]
    tell(f"{place.where}: images of {folder} without labels, for prediction only: {len(files):,}")
    for file in files:
        origin = f"{place.source}:{escape_name(folder + file.relative)}"
        yield Item(origin, place.source, (), shelf.make_reader(file), file.stamp)


def is_read_by_table(
    paths: Sequence[str], names: Sequence[str], read: Callable[[str], Iterator[Row]], where: str, place: str
) -> bool:
    """Say whether the labels of images are those of a table among the files `names`, and not of class folders.

    `read` returns the rows of a table. `place` is how a command names what holds the images.

    Raises:
        SourceError: there are class folders, and a table that names most of the images and has other labels.
    """
    tables = list_tables(names)
    if not tables or not paths or count_classes(paths) < 2:
        return bool(tables)
    are_sided = len(tables) > 1 and _are_sided(tables, where, read)
    several = choose_tables(names, where, lambda line: None, read, Columns()) if are_sided else []
    for offer in [several] if len(several) > 1 else [[name] for name in tables]:
        found = _compare(paths, offer, read)
        are_alike = 10 * found.num_alike >= 9 * (found.num_named - found.num_without)
        if are_alike and found.num_without and len(offer) > 1:
            return True  # they say what the folders say, and label images that lie in none
        if 2 * found.num_named < min(len(paths), MAX_ROWS) or are_alike:
            continue
        pattern = "{side}/{label}/" if find_flat_splits(paths) else "{label}/"
        option = shlex.quote(ALL_TABLES if len(offer) > 1 else offer[0])
        is_file = len(offer) == 1 and not place.endswith(".zip")
        table = f"{place}/{offer[0]}" if is_file else f"{place} --table {option}"
        raise SourceError(
            where,
            f"can be read in two ways: it holds class folders, and {shorten(offer)} names {found.num_named:,} of"
            f" {len(paths):,} images in {found.num_rows:,} rows",
            "one way to read it",
            f"Say `visionloop ingest {table}` for the labels of the table, or"
            f" `visionloop ingest {place} --pattern '{pattern}'` for those of the folders.",
        )
    return False


def _are_sided(tables: Sequence[str], where: str, read: Callable[[str], Iterator[Row]]) -> bool:
    try:
        return bool(find_side_tables(tables, where, read))
    except SourceError:
        return False  # several for one side: a folder of other tables beside class folders


class Comparison(NamedTuple):
    """How many rows of tables name an image, how many of these have its folder's name in a cell, or lie in no class."""

    num_named: int = 0
    num_alike: int = 0
    num_without: int = 0
    num_rows: int = 0


def _compare(paths: Sequence[str], tables: Sequence[str], read: Callable[[str], Iterator[Row]]) -> Comparison:
    folders: dict[str, str] = {}  # of several images of one name: all of their folders' names
    without = find_unlabelled(paths) if len(tables) > 1 else set()
    for path in paths:
        folder, _, file = path.rpartition("/")
        name = "" if path in without else folder.rpartition("/")[2].lower()
        for key in {path, file, path.rpartition(".")[0], file.rpartition(".")[0]}:
            known = folders.setdefault(key, name)
            if name != known and name not in known.split("\0"):
                folders[key] = f"{known}\0{name}"
    try:
        rows = [row for table in tables for row in islice(read(table), MAX_ROWS // len(tables))]
    except SourceError:
        return Comparison()
    hits = Counter(key for row in rows[:SAMPLE] for key, cell in row.items() if str(cell).strip() in folders)
    if not hits:
        return Comparison(num_rows=len(rows))
    column = hits.most_common(1)[0][0]
    named = alike = num_without = 0
    for row in rows:
        own = folders.get(str(row.get(column, "")).strip())
        if own is None:
            continue
        named += 1
        num_without += not own
        cells = {str(cell).strip().lower() for key, cell in row.items() if key != column}
        alike += bool(own) and not cells.isdisjoint(own.split("\0"))
    return Comparison(named, alike, num_without, len(rows))


def tell_unread(names: Sequence[str], where: str, tell: Callable[[str], None]) -> None:
    """Tell which tables lie beside images whose paths give the labels."""
    if tables := list_tables(names):
        tell(f"{where}: labels are those of the paths; not read: {shorten(tables)} (to read it, name it as a table)")


def is_shard(name: str) -> bool:
    """Say whether a file's name is one of a WebDataset shard: `train-000000.tar`."""
    return re.search(r"\d\.tar$", name.lower()) is not None


def explain_shards(shards: Sequence[str], place: str, *, is_export: bool) -> str:
    """Return the commands that unpack WebDataset shards in the folder `place`, and take the images in.

    Each is unpacked into a folder of its own: shards may use the same keys. `is_export`: visionloop wrote them.
    """
    inside, several = shlex.quote(place), len(shards) > 1
    table, name = "images.csv", "*.tar" if several else shlex.quote(shards[0])
    make = "cp ../images.csv ."
    if not is_export:
        table = "labels.csv"
        read = 'echo "${f%.cls},$(cat "$f")"'
        make = f"(echo id,label; find . -name '*.cls' | while read -r f; do {read}; done) > labels.csv"
    unpack = 'mkdir -p "unpacked/$f" && tar -xf "$f" -C "unpacked/$f"'
    more = "" if is_export else " Where labels are in .json files, write that CSV of id and label from them."
    return (
        f"{shorten(shards)} {'look like WebDataset shards' if several else 'looks like a WebDataset shard'}."
        f" Say `(cd {inside} && for f in {name}; do {unpack}; done && cd unpacked && {make})`, then `visionloop ingest"
        f" {shlex.quote(f'{place}/unpacked/{table}')}{' --no-label ' + repr('') if is_export else ''}`.{more}"
    )


def explain_no_image(where: str, names: Sequence[str], passed: PassedOver, place: str = "") -> SourceError:
    """Return the error for a place without an image: what lies there, and what to do with it. `names`: of its files.

    `place` is the path of the folder; "": it is no folder.
    """
    todo = "Check the path."
    lone = sorted(name for name in names if "/" not in name)
    zips = [name for name in lone if name.lower().endswith(".zip")]
    packed = [name for name in lone if name.lower().endswith(OTHER_ARCHIVES)]
    sheets = [name for name in lone if name.lower().endswith(SHEETS)]
    if not names and not passed.files and {name for _, name in passed.folders} == {"__MACOSX"}:
        todo = "__MACOSX holds only what macOS writes beside files: make the zip again, of the folder with the images."
    elif zips:
        todo = f"Take the zip itself: give the path of {shorten(zips)}; a zip inside a zip has to be unpacked first."
    elif shards := [name for name in packed if is_shard(name)]:
        todo = explain_shards(shards, place or "FOLDER", is_export=EXPORT_LIST in lone)
        todo = todo if place else f"Unpack the zip first, into FOLDER. {todo}"
    elif packed:
        todo = f"Unpack {shorten(packed)}, or make a zip of it."
    elif sheets:
        todo = f"Save {shorten(sheets)} as CSV, beside the images."
    elif foreign := [
        (name, FOREIGN_TABLES[suffix]) for name in lone if (suffix := name[name.rfind(".") :].lower()) in FOREIGN_TABLES
    ]:
        name, (what, answer) = foreign[0]
        todo = f"{escape_name(name)} is {what}. {answer}"
    kinds = passed.describe()
    return SourceError(where, f"no image in any class folder; it holds {kinds or 'no file'}", "CLASS/IMAGE.jpg", todo)
