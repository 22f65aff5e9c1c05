"""A table that only grows, as Parquet parts by day in the store. Many writers add to it at once, without a lock.

KIND/NAME/date=2026-11-28/101500-3f9a-000001.parquet    a part: it was written once, and never changes
KIND/NAME/date=2026-11-28/merged-000001.parquet         many parts in one; its metadata names those that it replaces

pandas and DuckDB read the folder as it lies. A part that another one names as replaced does not count here: so a merge
or a forget that is killed before it has removed the old parts leaves nothing that is read twice.
"""

import contextlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from visionloop.errors import DatasetError, ObjectMissing, StoreError
from visionloop.store import ObjectStore

if TYPE_CHECKING:
    import pyarrow as pa

IMAGE = "image_sha256"  # the column that says of which image a row is
MERGED = "merged-"
REPLACES = b"visionloop.replaces"
MERGE_BYTES = 64_000_000  # of the parts that become one
GROUP_ROWS = 16_384  # that a part has together: of a window of time only those groups are read that lie in it
Span = tuple[datetime | None, datetime | None]  # from, and until: not with it
_DAY = re.compile(r"/date=(\d{4}-\d{2}-\d{2})/")


@dataclass(frozen=True)
class DayTable:
    """A kind of table: its first folder, and the types of its columns. One column is `time`."""

    kind: str
    columns: Mapping[str, str]

    def make_key(self, name: str, day: date, part: str) -> str:
        """Return the store key of a part."""
        return f"{self.kind}/{name}/date={day.isoformat()}/{part}.parquet"

    def make_schema(self) -> "pa.Schema":
        """Return the columns as a schema of Arrow."""
        import pyarrow as pa

        types = {
            "text": pa.string(),
            "texts": pa.list_(pa.string()),
            "time": pa.timestamp("us", tz="UTC"),
            "bool": pa.bool_(),
            "int": pa.int64(),
            "float": pa.float32(),
            "double": pa.float64(),
            "floats": pa.list_(pa.float32()),
        }
        return pa.schema([(name, types[kind]) for name, kind in self.columns.items()])

    def encode(self, rows: Sequence[Mapping[str, Any]]) -> bytes:
        """Encode rows as a part. A column that a row lacks is null."""
        import pyarrow as pa

        columns: dict[str, Any] = {name: [row.get(name) for row in rows] for name in self.columns}
        columns |= {name: _pack_floats(columns[name]) for name, kind in self.columns.items() if kind == "floats"}
        return encode_table(pa.table(columns, schema=self.make_schema()))

    def decode(
        self, data: bytes | BinaryIO, where: str, columns: Sequence[str] | None = None, span: Span = (None, None)
    ) -> "pa.Table":
        """Decode a part, or some columns of it. One that it lacks is null: parts of older versions are read too.

        Of a file only these columns are read, and only the groups of rows that have a time within `span`.

        Raises:
            DatasetError: it is no such part. StoreError: it cannot be read.
        """
        import pyarrow as pa
        import pyarrow.parquet as pq

        schema = self.make_schema()
        wanted = [name for name in self.columns if columns is None or name in columns]
        try:
            file = pq.ParquetFile(pa.BufferReader(data) if isinstance(data, bytes) else data, pre_buffer=True)
            groups = [group for group in range(file.num_row_groups) if _is_within(file.metadata.row_group(group), span)]
            table = file.read_row_groups(groups, [name for name in wanted if name in file.schema_arrow.names])
            found = {
                name: table[name].cast(schema.field(name).type)
                if name in table.column_names
                else pa.nulls(len(table), schema.field(name).type)
                for name in wanted
            }
        except StoreError:
            raise
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError, OSError, KeyError) as exc:
            raise DatasetError(where, "is damaged", f"a part of the {self.kind} in Parquet", "Remove it.") from exc
        return pa.table(found, schema=pa.schema([schema.field(name) for name in wanted]))


def _find_same(first: date, last: date) -> str:
    """Return with what the names of both days begin: that of the day, of its month or of its year."""
    names = (f"date={first.isoformat()}/", f"date={first:%Y-%m-}", f"date={first:%Y-}")
    return next((name for name in names if f"date={last.isoformat()}/".startswith(name)), "")


def _is_within(group: Any, span: Span) -> bool:
    """Say whether a group of rows may have a time within a span: by its smallest and largest, if they are known."""
    names = [group.column(number).path_in_schema for number in range(group.num_columns)]
    known = group.column(names.index("time")).statistics if "time" in names else None
    if known is None or not known.has_min_max:
        return True
    since, until = span
    try:
        return not ((since and known.max < since) or (until and known.min >= until))
    except TypeError:  # these are no times of ours: whether they can be read as such is seen when they are
        return True


def _pack_floats(lists: Sequence[Any]) -> "pa.Array":
    """Return lists of numbers, or None, as a column. Arrow's own way holds all threads for half a second or more."""
    import pyarrow as pa

    parts = [np.zeros(0, np.float32) if one is None else np.asarray(one, np.float32) for one in lists]
    offsets = np.cumsum([0, *map(len, parts)], dtype=np.int32)
    is_null = np.array([*(one is None for one in lists), False])
    flat = np.concatenate([np.zeros(0, np.float32), *parts])
    return pa.ListArray.from_arrays(pa.array(offsets, mask=is_null), pa.array(flat))


def encode_table(table: "pa.Table", replaces: Iterable[str] = ()) -> bytes:
    """Encode a table as a part that stands for the parts `replaces` too."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    metadata = {REPLACES: json.dumps(sorted(replaces)).encode()}
    sink = pa.BufferOutputStream()
    # Numbers that were rounded (embeddings) have bytes of zeros: apart from the others, they take no space.
    numbers = [field.name for field in table.schema if pa.types.is_list(field.type) and _is_float(field.type)]
    pq.write_table(
        table.replace_schema_metadata(metadata),
        sink,
        compression="zstd",
        row_group_size=GROUP_ROWS,
        use_dictionary=[name for name in table.column_names if name not in numbers],
        column_encoding={f"{name}.list.element": "BYTE_STREAM_SPLIT" for name in numbers},
    )
    return bytes(sink.getvalue().to_pybytes())


def _concat(tables: Sequence["pa.Table"]) -> "pa.Table":
    import pyarrow as pa

    return pa.concat_tables(tables)


def _is_float(kind: Any) -> bool:
    import pyarrow as pa

    return bool(pa.types.is_float32(kind.value_type))


@dataclass
class DayReader:
    """Reads the parts of one name. `damaged` are the keys of those that could not be read, and were passed over."""

    table: DayTable
    store: ObjectStore
    name: str
    damaged: set[str] = field(default_factory=set)

    def list_parts(self, first: date | None = None, last: date | None = None) -> dict[date, list[str]]:
        """Return the keys of all parts of some days, both ends with them, by day. Other days are not listed."""
        days: dict[date, list[str]] = {}
        folder = f"{self.table.kind}/{self.name}/"
        same = _find_same(first, last) if first and last else ""
        before = f"{folder}date={(first - timedelta(days=1)).isoformat()}/~" if first else ""
        for key in self.store.list(folder + same, before):
            day = find_day(key)
            if day and last and day > last:
                break
            if day and key.endswith(".parquet") and (first or day) <= day <= (last or day):
                days.setdefault(day, []).append(key)
        return days

    def read(
        self, since: datetime | None = None, until: datetime | None = None, columns: Sequence[str] | None = None
    ) -> Iterator["pa.Table"]:
        """Yield the rows of a window of time, `until` not with it, part by part. Raises StoreError."""
        import pyarrow.compute as pc

        wanted = None if columns is None else [*columns, "time"]
        last = (until - timedelta(microseconds=1)).astimezone(UTC).date() if until else None
        for keys in self.list_parts(since.astimezone(UTC).date() if since else None, last).values():
            for _, rows in self._load(keys, wanted, (since, until)):
                inside = rows
                if since:
                    inside = inside.filter(pc.field("time") >= since)
                if until:
                    inside = inside.filter(pc.field("time") < until)
                yield inside if columns is None else inside.select(list(columns))

    def merge(self, before: date, forgotten: Callable[[], frozenset[str]] = frozenset) -> int:
        """Merge the small parts of each day before one; return how many parts are gone. Several may do this at once.

        Each merged part gets the next free number. Who loses the race for it leaves the day to the winner. `forgotten`
        is asked before and after: what was forgotten in between is not written back.

        Raises:
            StoreError: the store cannot be written.
        """
        return sum(self._merge_day(day, keys, forgotten) for day, keys in self.list_parts().items() if day < before)

    def find_parts(self, sha256s: frozenset[str]) -> list[str]:
        """Return the keys of the parts that hold a row of one of the images, or cannot be read. For `forget`."""
        found = []
        for key in [key for keys in self.list_parts().values() for key in keys] if sha256s else []:
            try:
                rows = self._decode(key, [IMAGE])
            except DatasetError:
                found.append(key)
                continue
            found += [key] if rows is not None and len(drop_images(rows, sha256s)) < len(rows) else []
        return found

    def remove_rows(self, keys: Iterable[str], sha256s: frozenset[str]) -> None:
        """Take the rows of images out of parts for good. What cannot be read goes whole. Raises StoreError."""
        for key in keys:
            day = find_day(key)
            try:
                data = self.store.get(key)
            except ObjectMissing:
                continue
            if day is None:
                continue
            with contextlib.suppress(DatasetError):
                kept = drop_images(self.table.decode(data, key), sha256s)
                replaces = {name_part(key), *_read_replaced(data)}
                while len(kept) and not self._create(day, kept, replaces):
                    pass
            self.store.purge(key)

    def _merge_day(self, day: date, keys: Sequence[str], forgotten: Callable[[], frozenset[str]]) -> int:
        replaced = self.list_replaced(keys)
        gone = [key for key in keys if name_part(key) in replaced]
        small = [key for key in keys if key not in gone and not name_part(key).startswith(MERGED)]
        for group in self._group(small) if len(small) > 1 else ():
            before = forgotten()
            tables = [drop_images(rows, before) for _, rows in self._load(group)]
            read = [key for key in group if key not in self.damaged]
            made = self._create(day, _concat(tables), map(name_part, read)) if tables else None
            if made is None:
                break
            if fresh := forgotten() - before:
                self.remove_rows([made], fresh)
            gone += read
        for key in gone:
            self.store.purge(key)
        return len(gone)

    def _group(self, keys: Sequence[str]) -> Iterator[list[str]]:
        """Yield the keys in groups of two or more, each of about MERGE_BYTES."""
        group: list[str] = []
        size = 0
        for key in keys:
            group.append(key)
            size += self._measure(key)
            if size >= MERGE_BYTES:
                yield group
                group, size = [], 0
        if len(group) > 1:
            yield group

    def _create(self, day: date, rows: "pa.Table", replaces: Iterable[str]) -> str | None:
        """Write rows under the next free number of a day; None: another one was faster."""
        folder = self.table.make_key(self.name, day, MERGED)[: -len(".parquet")]
        numbers = [name_part(key).removeprefix(MERGED) for key in self.store.list(folder)]
        number = max((int(text) for text in numbers if text.isdecimal()), default=0) + 1
        key = self.table.make_key(self.name, day, f"{MERGED}{number:06d}")
        return key if self.store.create(key, encode_table(rows, replaces)) else None

    def list_replaced(self, keys: Sequence[str]) -> frozenset[str]:
        """Return the names of the parts of a day that others stand for."""
        if len(keys) < 2:
            return frozenset()
        found: set[str] = set()
        for key in keys:
            if name_part(key).startswith(MERGED):
                with contextlib.suppress(ObjectMissing), self.store.open(key) as file:
                    found.update(_read_replaced(file))
        return frozenset(found)

    def _load(
        self, keys: Sequence[str], columns: Sequence[str] | None = None, span: Span = (None, None)
    ) -> Iterator[tuple[str, "pa.Table"]]:
        replaced = self.list_replaced(keys)
        for key in keys:
            if name_part(key) in replaced:
                continue
            try:
                rows = self._decode(key, columns, span)
            except DatasetError:
                self.damaged.add(key)
                continue
            if rows is not None:
                yield key, rows

    def _decode(self, key: str, columns: Sequence[str] | None = None, span: Span = (None, None)) -> "pa.Table | None":
        """Return some of a part; None: it was merged or expired since it was listed. Raises DatasetError."""
        try:
            with self.store.open(key) as file:
                return self.table.decode(file, key, columns, span)
        except ObjectMissing:
            return None

    def _measure(self, key: str) -> int:
        with contextlib.suppress(ObjectMissing), self.store.open(key) as file:
            return file.seek(0, 2)
        return 0


def drop_images(rows: "pa.Table", sha256s: frozenset[str]) -> "pa.Table":
    """Return the rows that are not of these images; a table without images stays as it is."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if not sha256s or IMAGE not in rows.column_names:
        return rows
    return rows.filter(pc.invert(pc.is_in(rows[IMAGE], value_set=pa.array(sorted(sha256s), pa.string()))))


def expire(store: ObjectStore, folder: str, before: date) -> int:
    """Remove for good all that lies under the days before one, below a folder; return how many objects that were."""
    gone = 0
    for key in list(store.list(f"{folder}/")):
        day = find_day(key)
        if day and day < before:
            store.purge(key)
            gone += 1
    return gone


def name_part(key: str) -> str:
    """Return the name of a part, without folders and ending."""
    return key.rpartition("/")[2].removesuffix(".parquet")


def find_day(key: str) -> date | None:
    """Return the day that a key lies under; None if it has none."""
    match = _DAY.search(key)
    try:
        return date.fromisoformat(match[1]) if match else None
    except ValueError:
        return None


def _read_replaced(data: bytes | BinaryIO) -> list[str]:
    """Return the names of the parts that a part stands for; none if it cannot be read."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        schema = pq.read_schema(pa.BufferReader(data) if isinstance(data, bytes) else data)
        return [str(name) for name in json.loads((schema.metadata or {})[REPLACES])]
    except StoreError:
        raise
    except (pa.ArrowInvalid, OSError, KeyError, ValueError, TypeError):
        return []
