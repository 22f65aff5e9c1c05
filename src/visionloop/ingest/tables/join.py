"""Join the rows of a table with the images beside it (on the same shelf: a folder, zip or bucket).

Rows and images that have no counterpart are listed, not fatal. Folders without labels come last.
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import islice

from visionloop.errors import ImageError, SourceError, shorten
from visionloop.ingest.item import Item, PassedOver
from visionloop.ingest.paths.layout import settle_sides
from visionloop.ingest.paths.listing import (
    IMAGE_FOLDERS,
    UNLABELLED_FOLDERS,
    ImageFolder,
    ListedFile,
    escape_name,
    find_side,
    is_image_name,
    is_outside,
    is_spelled_so,
)
from visionloop.ingest.paths.names import get_suffix, is_system_folder
from visionloop.ingest.tables.label_table import LabelTable, Shelf, make_reading
from visionloop.ingest.tables.rows import (
    BAD_ROW,
    SAMPLE_ROWS,
    Row,
    RowImage,
    RowPlan,
    give_bytes,
    is_url,
    list_sides,
    make_item,
    plan_columns,
)
from visionloop.records import Rejected


def read_shelf_table(table: LabelTable) -> Iterator[Item | Rejected | PassedOver]:
    """Yield the rows of a table, then the images without labels, then the images without a row, then the other files.

    Raises:
        SourceError: the table cannot be read or understood, or none of its images is found.
    """
    sample = list(islice(table.rows(), SAMPLE_ROWS))
    plan = plan_columns(table.columns, sample, table.where, table.tell_once, make_reading(table))
    join = _Join(table, plan, *_find_images(table, plan, sample))
    yield from _join_rows(join)
    unlabelled = _choose_unlabelled(join)
    for folder in unlabelled:
        files = [file for file in table.shelf.index(folder).files.values() if _is_image(file)]
        table.tell_once(f"{table.where}: images of {folder}/ without labels, for prediction only: {len(files):,}")
        for file in files:
            origin = f"{table.source}:{escape_name(f'{folder}/{file.relative}')}"
            yield Item(origin, table.source, (), table.shelf.make_reader(file), file.stamp)
    yield from _list_rest(join, unlabelled)


def _list_rest(join: "_Join", unlabelled: Sequence[str]) -> Iterator[Rejected | PassedOver]:
    """Yield the images that no row names, and how many files of other types there are."""
    table, passed = join.table, PassedOver()
    has_own = join.index is not None and (join.shelf is not table.shelf or not table.is_all)
    places = [(table.shelf, "")] * table.is_all + [(join.shelf, join.folder)] * has_own
    for shelf, folder in places:
        taken = {join.place_of(name) for name in join.used} if shelf is join.shelf else set()
        without = tuple(f"{name}/" for name in unlabelled) if shelf is table.shelf else ()
        images, others = shelf.list_images(folder)
        passed.files.update(others.files)
        passed.folders.update(others.folders)
        for file in images:
            place = f"{folder}/{file.relative}" if folder else file.relative
            if place not in taken and not place.startswith(without or "\0"):
                origin = f"{table.source}:{escape_name(place)}"
                reason = file.problem or f"no row of {table.name} names it"
                yield Rejected(origin, "unreadable" if file.problem else "image_without_row", reason)
        for place in taken:  # of other types, but a row names them
            top, _, name = place[len(folder) + bool(folder) :].rpartition("/")
            if not is_image_name(name):
                passed.files[f"{top}/" if top else "", get_suffix(name)] -= 1
    yield passed


def _join_rows(join: "_Join") -> Iterator[Item | Rejected]:
    table, plan = join.table, join.plan
    sides = plan.sides or frozenset()
    if plan.sides is None and (plan.side or plan.flags):
        sides = list_sides(table.rows(), plan)
    settled = settle_sides(sides, lambda line: table.tell_once(f"{table.where}: {line}"))
    given = any(side == "test" for side, _ in settled.values())
    seen: set[int] = set()  # hashes of place and labels: a table of URLs has as many as rows
    repeated = without = 0
    for place, row in table.placed_rows():
        one = make_item(row, plan, table.source, place, partial(join.find, place, row))
        if isinstance(one, Item):
            if (offer := hash((one.origin, one.labels))) in seen:
                repeated += 1
                continue
            seen.add(offer)
            without += bool(plan.labels and not one.labels)
            side, test_is_given = settled.get(one.side or "", (None, given)) if one.labels else (None, False)
            if (side, test_is_given) != (one.side, False):
                one = one._replace(side=side, test_is_given=test_is_given)
        yield one
    if join.num_respelled:
        found = (
            f"rows that spell their image otherwise (case, spaces, suffix): {join.num_respelled:,}, as {join.respelled}"
        )
        table.tell_once(f"{table.where}: {found}")
    if repeated:
        table.tell_once(f"{table.where}: rows that repeat another one: {repeated:,}")
    if without:
        table.tell_once(f"{table.where}: rows without a label, for prediction only: {without:,}")


@dataclass
class _Join:
    """A table and its images: which ones rows have named so far. `index` is None when no row names a file."""

    table: LabelTable
    plan: RowPlan
    shelf: Shelf
    folder: str
    index: ImageFolder | None
    used: set[str] = field(default_factory=set)
    num_respelled: int = 0
    respelled: str = ""

    def find(self, place: str, row: Row, reference: str | bytes) -> RowImage:
        """Look up what the row at `place` names, first in the folders of its side.

        Raises:
            ImageError: `row_without_image`, `unsafe_path`, `ambiguous`, ...
        """
        if isinstance(reference, bytes):
            return RowImage(place, partial(give_bytes, reference))
        if is_url(reference):
            if self.table.find_url is None:
                raise ImageError("row", "names a URL", "a file", reason_code="refused_url")
            return self.table.find_url(reference)
        has_side = bool(self.plan.side or self.plan.flags)
        file = (
            self.index.look_up(reference, partial(self._read_side, row) if has_side else None) if self.index else None
        )
        if file is None:
            shown = escape_name(reference[:120])
            raise ImageError("row", f"no image {shown}", "one in the folder", reason_code="row_without_image")
        self.used.add(file.relative)
        if not reference.endswith(file.relative) and not is_spelled_so(file.relative, reference):
            self.num_respelled += 1
            self.respelled = self.respelled or f"{escape_name(reference[:80])} is {escape_name(file.relative[-80:])}"
        return RowImage(escape_name(self.place_of(file.relative)), self.shelf.make_reader(file), file.stamp)

    def _read_side(self, row: Row) -> str | None:
        with suppress(ImageError):
            return self.plan.read_side(row)
        return None

    def place_of(self, relative: str) -> str:
        return f"{self.folder}/{relative}" if self.folder else relative


def _find_images(table: LabelTable, plan: RowPlan, sample: Sequence[Row]) -> tuple[Shelf, str, ImageFolder | None]:
    """Return the shelf and the folder that the files of the sample lie in. Raises SourceError when there is none."""
    named = [plan.read_image(row) for row in sample if BAD_ROW not in row]
    texts = [name for name in named if isinstance(name, str)]
    files = [name for name in texts if not is_url(name)]
    if len(files) < len(texts) and table.find_url is None:
        hosts = {
            re.split(r"[/?#]", name.split("//", 1)[1])[0].rpartition("@")[2][:80] for name in texts if is_url(name)
        }
        found = f"names images by URL, at {shorten(list(hosts))}"
        raise SourceError(table.where, found, "`hosts`: where they may be fetched from", "Name them in a table source.")
    if not files:
        return table.shelf, "", None
    if table.is_all and not table.images:
        table.shelf.index("")  # the folders in it are not listed again
    best: tuple[int, Shelf, str, ImageFolder] | None = None
    candidates = (
        [(table.shelf, "")]
        if table.parts and any(map(find_side, table.shelf.list_folders()))
        else _list_candidates(table)
    )
    for shelf, folder in [table.images] if table.images else candidates:
        index = shelf.index(folder)
        hits = sum(_is_there(index, name) for name in files)
        if hits and (best is None or hits > best[0]):
            best = (hits, shelf, folder, index)
        if hits * 2 >= len(files):
            break
    if best is None and all(map(is_outside, files)):
        found = f"names images outside of its folder, such as {escape_name(files[0][:80])!r}"
        todo = "Put the table beside the images, or run `visionloop predict` in the table's folder with names below it."
        raise SourceError(table.where, found, "paths below it: those that lead out are not followed", todo)
    if best is None:
        found = f"none of its first {len(files)} images is there, such as {escape_name(files[0][:80])!r}"
        expected = (
            f"files in {table.images[1] or 'its `images`'}" if table.images else "files beside it or in train/, images/"
        )
        raise SourceError(table.where, found, expected, "Name their folder as `images`, or their column in `columns`.")
    if not best[2] or table.images:
        return best[1:]
    table.tell_once(f"{table.where}: images found in {best[2]}/")
    return (table.shelf, "", whole) if (whole := _find_more(table, plan, best[2], best[3])) else best[1:]


def _find_more(table: LabelTable, plan: RowPlan, folder: str, inside: ImageFolder) -> ImageFolder | None:
    """Return the files of the whole shelf if rows name images outside of the folder in which the first ones lie.

    Where names in the folder are used outside too, rows have to name one that is outside only: else the table is that
    of the folder, as Kaggle's labels.csv for train/ beside test/ with the same names.
    """
    others = [name for name in table.shelf.list_folders() if name != folder and not is_system_folder(name)]
    if not any(table.is_all or find_side(name) or name.lower() in IMAGE_FOLDERS for name in others):
        return None
    whole, place = table.shelf.index(""), f"{folder}/"
    if sum(path.startswith(place) for path in whole.files) < len(inside.files):
        return None  # a link that leads out of the shelf
    if not any(_is_image(one) for path, one in whole.files.items() if "/" in path and not path.startswith(place)):
        return None
    if not (repeated := whole.count_repeated(place)):
        return whole
    for row in table.rows():
        with suppress(ImageError):
            name = plan.read_image(row)
            if isinstance(name, str) and not is_url(name) and not _is_there(inside, name) and _is_named(whole, name):
                return whole
    found = f"names that are in {folder}/ and elsewhere too: {repeated:,}"
    table.tell_once(f"{table.where}: {found}; those in {folder}/ are meant, because no row names an image elsewhere")
    return None


def _list_candidates(table: LabelTable) -> Iterator[tuple[Shelf, str]]:
    there = {folder.lower(): folder for folder in table.shelf.list_folders()}
    for name in dict.fromkeys((table.name.rsplit(".", 1)[0].lower(), *IMAGE_FOLDERS)):
        if name in there:
            yield table.shelf, there[name]
    yield table.shelf, ""


def _choose_unlabelled(join: _Join) -> list[str]:
    """Return the folders without labels: those that params name, or those beside the table that no row names."""
    table = join.table
    if table.unlabelled is not None:
        return [folder.rstrip("/") for folder in table.unlabelled]
    if join.index is None or (table.images and table.images[0] is not table.shelf):
        return []
    tops = {join.place_of(name).partition("/")[0] for name in join.used}
    names = [
        name for name in table.shelf.list_folders() if find_side(name) == "test" or name.lower() in UNLABELLED_FOLDERS
    ]
    return [name for name in names if name not in tops and any(map(_is_image, table.shelf.index(name).files.values()))]


def _is_image(file: ListedFile) -> bool:
    return is_image_name(file.relative.rsplit("/", 1)[-1])


def _is_named(index: ImageFolder, name: str) -> bool:
    """Say whether one file or several have this name."""
    try:
        return index.look_up(name) is not None
    except ImageError as exc:
        return exc.reason_code == "ambiguous"


def _is_there(index: ImageFolder, name: str) -> bool:
    try:
        return index.look_up(name) is not None
    except ImageError:
        return False
