"""Rows of a listing or a query as items. A row that cannot be used is `Rejected`; it never stops the others."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from visionloop.errors import ImageError
from visionloop.ingest.sources.item import Item
from visionloop.ingest.tables.cells import Row, get_cell, to_text
from visionloop.ingest.tables.rows import RowPlan
from visionloop.records import Rejected

# A column that changes when the image does, the surest first.
STAMP_NAMES = (
    *("sha256", "sha1", "md5", "digest", "checksum", "hash", "etag", "e_tag", "version_id", "revision"),
    *("updated_at", "updated", "modified_at", "modified", "last_modified", "mtime"),
)


@dataclass(frozen=True)
class Found:
    """Where the image of a row is: its place for people, how it is read, and its stamp if the source knows one."""

    place: str
    read: Callable[[int], bytes]
    stamp: str | None = None


def make_item(
    row: Row, plan: RowPlan, source: str, place: str, find: Callable[[str | bytes], Found]
) -> Item | Rejected:
    """Return the item of a row. `place` names the row where its image does not; `find` looks its image up."""
    try:
        reference = plan.read_image(row)
        if reference is None:
            return Rejected(f"{source}:{place}", "row_without_image", f"no value in column {plan.image}")
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
        return Rejected(f"{source}:{place}", exc.reason_code, str(exc).removeprefix("row: "))


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
