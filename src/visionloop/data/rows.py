"""Rows of a manifest by column: read, written and held in few bytes, without an object for each row.

A batch is an Arrow RecordBatch with the columns of a manifest. It is made into records (`ImageRecord`) where those are
needed, and as late as possible: a record takes 700 bytes, a row of a file in memory 100.
"""

import json
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from itertools import accumulate, chain, islice, pairwise
from operator import attrgetter, eq
from typing import Any, BinaryIO, Protocol, cast, overload

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from visionloop.errors import DatasetError, StoreError
from visionloop.records import ImageRecord

GROUP_ROWS = 16_384  # that a part has together, and a reader in memory
BATCH_ROWS = 4096
MOST_SHARED = 16_384  # values of a part that are held, for rows that have the same

_TEXT, _TEXTS = pa.string(), pa.list_(pa.string())
SCHEMA = pa.schema(  # in the order of the record's fields
    {
        "sha256": _TEXT,
        "labels": _TEXTS,
        "sources": _TEXTS,
        "origins": _TEXTS,
        "ordinal": pa.int64(),
        "group": _TEXT,
        "key": _TEXT,
        "side": _TEXT,
        "captured_at": _TEXT,
        "width": pa.int32(),
        "height": pa.int32(),
        "format": _TEXT,
        "num_bytes": pa.int64(),
        "phash": _TEXT,
    }
)
COLUMNS = tuple(SCHEMA.names)
get_row = attrgetter(*COLUMNS)
# Columns whose values many rows share: each is held once.
SHARED = ("labels", "sources", "group", "side", "captured_at", "width", "height", "format")
Places = NDArray[np.int64]


class Rows(Protocol):
    """Rows in the order of their sha256 that may be read again and again, by column or as records."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[ImageRecord]: ...

    def iterate_batches(self) -> Iterator[pa.RecordBatch]: ...


def iterate_file(file: BinaryIO) -> Iterator[pa.RecordBatch]:
    """Yield the rows of a part in batches. Raises KeyError, ArrowInvalid: they have not the columns of a manifest."""
    for batch in pq.ParquetFile(file).iter_batches(BATCH_ROWS, use_threads=False):
        if len(batch):
            mine = batch.select(COLUMNS)
            yield mine if mine.schema.equals(SCHEMA) else mine.cast(SCHEMA)


def iterate_part(file: BinaryIO, where: str) -> Iterator[ImageRecord]:
    """Yield the rows of a manifest part, in the order of their sha256. Raises DatasetError, StoreError."""
    with translate_damage(where):
        yield from decode_batches(iterate_file(file))


@contextmanager
def translate_damage(where: str) -> Iterator[None]:
    """Say of a part that cannot be read as rows where it is. Raises DatasetError."""
    try:
        yield
    except StoreError:
        raise
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, OSError, TypeError, KeyError) as exc:
        raise DatasetError(where, "is damaged", "a manifest in Parquet", "Restore the store from its backup.") from exc


def make_batches(records: Iterable[ImageRecord]) -> Iterator[pa.RecordBatch]:
    """Yield records, which are in the order of their sha256, by column; those of one batch are held."""
    last, rows = "", map(get_row, records)
    while some := [*islice(rows, BATCH_ROWS)]:
        columns = dict(zip(COLUMNS, zip(*some, strict=True), strict=True))
        sha256s = (last, *columns["sha256"])
        assert all(a <= b for a, b in pairwise(sha256s)), "rows are in the order of their sha256"
        last = sha256s[-1]
        yield pa.record_batch(columns, schema=SCHEMA)


def encode_rows(batch: pa.RecordBatch, names: Iterable[str], end: str) -> memoryview:
    """Return rows as the canonical JSON of some fields, `end` behind each. By column this takes a tenth of the time."""
    pieces: list[Any] = []
    for name in sorted(names):
        pieces += [f'{"," if pieces else "{"}"{name}":', _encode_column(batch[name])]
    return _get_bytes(pc.binary_join_element_wise(*pieces, "}" + end, ""))


def _encode_column(column: pa.Array) -> pa.Array:
    if pa.types.is_list(column.type):
        ends = np.concatenate(([0], np.cumsum(column.value_lengths().to_numpy())))
        lists = pa.ListArray.from_arrays(pa.array(ends, pa.int32()), _encode_column(column.flatten()))
        return pc.binary_join_element_wise("[", pc.binary_join(lists, ","), "]", "")
    if not pa.types.is_string(column.type):
        return pc.fill_null(pc.cast(column, pa.string()), "null")
    characters = np.frombuffer(_get_bytes(column), np.uint8)
    if ((characters < ord(" ")) | (characters == ord('"')) | (characters == ord("\\"))).any():
        values = (None if text is None else json.dumps(text, ensure_ascii=False) for text in column.to_pylist())
        return pc.fill_null(pa.array(values, pa.string()), "null")
    return pc.fill_null(pc.binary_join_element_wise('"', column, '"', ""), "null")


def _get_bytes(column: pa.StringArray) -> memoryview:
    """Return the text of all rows, one behind the other."""
    _, offsets, data = column.buffers()
    ends = np.frombuffer(offsets, np.int32)[column.offset : column.offset + len(column) + 1] if len(column) else [0]
    return memoryview(data or b"")[ends[0] : ends[-1]]


def decode_batch(batch: pa.RecordBatch, shared: dict[Hashable, Any]) -> Iterator[ImageRecord]:
    """Yield the rows of a batch as records; values that many rows have are taken from `shared`, and put there."""
    columns = {name: decode_column(batch[name], shared if name in SHARED else None) for name in SCHEMA.names}
    columns["key"] = [s if key == s else key for s, key in zip(columns["sha256"], columns["key"], strict=True)]
    return map(ImageRecord, *(columns[name] for name in SCHEMA.names))


def decode_column(column: pa.Array, shared: dict[Hashable, Any] | None = None) -> list[Any]:
    """Return the values of a column, lists as tuples: of values that rows share only different ones are made."""
    if pa.types.is_list(column.type):
        values, lengths = decode_column(column.flatten(), shared), column.value_lengths().to_numpy()
        ends = [0, *np.cumsum(lengths).tolist()]
        found = (tuple(values[low:high]) for low, high in pairwise(ends))
        return list(found) if shared is None else [shared.setdefault(value, value) for value in found]
    if shared is None:
        return cast(list[Any], column.to_pylist())
    coded = column.dictionary_encode("encode")
    different = [shared.setdefault(value, value) for value in coded.dictionary.to_pylist()]
    return [different[place] for place in coded.indices.to_numpy().tolist()]


def decode_batches(batches: Iterable[pa.RecordBatch]) -> Iterator[ImageRecord]:
    """Yield the rows of batches as records. Few of the values that rows share are held at a time."""
    shared: dict[Hashable, Any] = {}
    for batch in batches:
        yield from decode_batch(batch, shared)
        if len(shared) > MOST_SHARED:
            shared.clear()


class Digests(Sequence[str]):
    """The sha256 of many images, 32 bytes each; equal to any sequence of the same texts."""

    def __init__(self, columns: Iterable[pa.Array]) -> None:
        """Read them from columns of text. Raises ValueError: one is no sha256."""
        self._data = b"".join(map(_read_digests, columns))

    def __len__(self) -> int:
        return len(self._data) // 32

    def __iter__(self) -> Iterator[str]:
        return (self._data[at : at + 32].hex() for at in range(0, len(self._data), 32))

    @overload
    def __getitem__(self, row: int) -> str: ...
    @overload
    def __getitem__(self, row: slice) -> list[str]: ...
    def __getitem__(self, row: int | slice) -> str | list[str]:
        if isinstance(row, slice):
            return [self[i] for i in range(*row.indices(len(self)))]
        if not -len(self) <= row < len(self):
            raise IndexError(row)
        at = int(row % len(self)) * 32
        return self._data[at : at + 32].hex()

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Digests):
            return self._data == other._data
        return isinstance(other, Sequence) and len(other) == len(self) and all(map(eq, self, other))

    __hash__ = None  # type: ignore[assignment]

    def find(self, others: "Digests") -> Places:
        """Return the row of each of the others, -1 where it is none. Fast if these here are in order."""
        mine, theirs = (np.frombuffer(one._data, "S32") for one in (self, others))
        if not len(mine):
            return np.full(len(theirs), -1)
        order = None if (mine[1:] >= mine[:-1]).all() else np.argsort(mine)
        place = np.maximum(np.searchsorted(mine, theirs, side="right", sorter=order) - 1, 0)
        place = place if order is None else order[place]
        return np.where(mine[place] == theirs, place, -1)


def _read_digests(column: pa.Array) -> bytes:
    if not (pc.fill_null(pc.equal(pc.binary_length(column), 64), False).to_numpy(zero_copy_only=False)).all():
        raise ValueError("not all are sha256")
    return bytes.fromhex(str(_get_bytes(column), "ascii"))


class HeldRows(Sequence[ImageRecord]):
    """The rows of a manifest in a file, on disk or in memory: there about 100 bytes each.

    They are meant to be read one after the other: one from the middle costs as much as all of its group.
    """

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self._parquet = pq.ParquetFile(file)
        groups = self._parquet.metadata
        self._ends = list(accumulate(groups.row_group(i).num_rows for i in range(groups.num_row_groups)))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __iter__(self) -> Iterator[ImageRecord]:
        return decode_batches(self.iterate_batches())

    @overload
    def __getitem__(self, place: int) -> ImageRecord: ...
    @overload
    def __getitem__(self, place: slice) -> list[ImageRecord]: ...
    def __getitem__(self, place: int | slice) -> ImageRecord | list[ImageRecord]:
        if isinstance(place, slice):
            return list(decode_batches(self.pick_batches(np.arange(*place.indices(len(self))))))
        if not -len(self) <= place < len(self):
            raise IndexError(place)
        return next(decode_batches(self.pick_batches(np.asarray([place % len(self)]))))

    def iterate_batches(self, columns: Iterable[str] = COLUMNS) -> Iterator[pa.RecordBatch]:
        """Yield the rows in batches, with some of the columns."""
        names = list(columns)
        for batch in self._parquet.iter_batches(BATCH_ROWS, columns=names, use_threads=False):
            yield batch.select(names)

    def pick_batches(self, places: Places, columns: Iterable[str] = COLUMNS) -> Iterator[pa.RecordBatch]:
        """Yield the rows at some places, which must ascend, in batches."""
        names, cuts = list(columns), np.searchsorted(places, [0, *self._ends])
        for group, (low, high) in enumerate(pairwise(cuts.tolist())):
            if high > low:
                first = self._ends[group - 1] if group else 0
                rows = self._parquet.read_row_group(group, columns=names, use_threads=False).select(names)
                yield from rows.take(pa.array(places[low:high] - first)).combine_chunks().to_batches()


def hold_rows(batches: Iterable[pa.RecordBatch], file: BinaryIO | None = None) -> HeldRows:
    """Write rows, in the order of sha256, into a file; without one into memory."""
    file = BytesIO() if file is None else file
    with pq.ParquetWriter(file, SCHEMA, compression="zstd") as writer:
        groups = regroup(batches, GROUP_ROWS)
        for table in chain([next(groups, SCHEMA.empty_table())], groups):
            writer.write_table(table)
    file.flush()
    return HeldRows(file)


def hold_records(records: Iterable[ImageRecord]) -> HeldRows:
    """Hold records in memory by column, sorted by sha256."""
    return hold_rows(make_batches(sorted(records, key=lambda record: record.sha256)))


def regroup(batches: Iterable[pa.RecordBatch], number: int) -> Iterator[pa.Table]:
    """Yield the same rows in tables of so many; the last one may have fewer."""
    waiting: list[pa.RecordBatch] = []
    num_waiting = 0
    for batch in batches:
        rest = batch
        while num_waiting + len(rest) >= number:
            missing = number - num_waiting
            yield pa.Table.from_batches([*waiting, rest.slice(0, missing)])
            rest, waiting, num_waiting = rest.slice(missing), [], 0
        if len(rest):
            waiting.append(rest)
            num_waiting += len(rest)
    if waiting:
        yield pa.Table.from_batches(waiting)


@dataclass
class Tally:
    """What rows add up to. `counts` is label -> side -> images; `num_bytes_n` of each image, ascending."""

    sides: Counter[str]
    counts: dict[str, Counter[str]]
    sources: Counter[str]
    formats: Counter[str]
    sizes: Counter[tuple[int, int]]
    num_bytes_n: NDArray[np.int64]
    num_forgotten: int


def tally_rows(batches: Iterable[pa.RecordBatch], forgotten: Iterable[str] = ()) -> Tally:
    """Add up rows in one pass: 8 bytes are held of each."""
    tally = Tally(Counter(), defaultdict(Counter), Counter(), Counter(), Counter(), np.zeros(0, np.int64), 0)
    num_bytes, tombstones = [tally.num_bytes_n], pa.array(sorted(forgotten), pa.string())
    kinds: Counter[tuple[str, tuple[str, ...]]] = Counter()
    for batch in batches:
        kinds.update(zip(decode_column(batch["side"]), decode_column(batch["labels"]), strict=True))
        tally.sources.update(decode_column(batch["sources"].flatten()))
        tally.formats.update(decode_column(batch["format"]))
        tally.sizes.update(zip(*(batch[name].to_numpy().tolist() for name in ("width", "height")), strict=True))
        num_bytes.append(batch["num_bytes"].to_numpy())
        tally.num_forgotten += pc.sum(pc.is_in(batch["sha256"], tombstones)).as_py() if len(tombstones) else 0
    for (side, labels), number in kinds.items():
        tally.sides[side] += number
        for label in labels or ("(unlabelled)",):
            tally.counts[label][side] += number
    tally.num_bytes_n = np.sort(np.concatenate(num_bytes))
    return tally
