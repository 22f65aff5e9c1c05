"""Rows of a manifest by column: read, merged and checked without an object for each row, and held in few bytes.

A batch is an Arrow RecordBatch with the columns of a manifest. It is made into records (`ImageRecord`) where those are
needed, and as late as possible: a record takes 700 bytes, a row of a file in memory 100.
"""

import hashlib
import json
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from io import BytesIO
from itertools import accumulate, chain, pairwise
from operator import eq
from typing import Any, BinaryIO, cast, overload

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from visionloop.data import manifest
from visionloop.errors import DatasetError, ObjectMissing
from visionloop.records import DatasetVersion, ImageRecord
from visionloop.store import ObjectStore

_TYPES = {"string": pa.string(), "list": pa.list_(pa.string()), "int64": pa.int64(), "int32": pa.int32()}
SCHEMA = pa.schema([(name, _TYPES[kind]) for name, kind in manifest.COLUMNS.items()])
Places = NDArray[np.int64]


class Part:
    """One part of a version, open: its rows in the order of sha256. `number`: of two rows the one of the higher counts.

    `low` is the sha256 that none of its rows is below. Nothing but the end of the file is read before `start`.
    """

    def __init__(self, file: BinaryIO, number: int) -> None:
        self.number, self._file = number, file
        self._head: pa.RecordBatch | None = None
        self._rest: Iterator[pa.RecordBatch] = iter(())
        groups = pq.read_metadata(file)
        first = groups.row_group(0).column(0).statistics if groups.num_row_groups else None
        self.low = str(first.min) if first is not None and first.has_min_max else ""

    def start(self) -> None:
        """Read the first rows."""
        self._rest = iterate_file(self._file)
        self._head = next(self._rest, None)

    @property
    def is_empty(self) -> bool:
        """Say whether all rows were taken."""
        return self._head is None

    @property
    def last(self) -> str:
        """Return the last sha256 of the rows that are in memory."""
        assert self._head is not None
        return str(self._head["sha256"][-1].as_py())

    def take(self, bound: str) -> pa.RecordBatch:
        """Return the rows in memory up to a sha256, and go on behind them."""
        assert self._head is not None
        head = self._head
        number = bisect_right(head["sha256"], bound, key=lambda value: value.as_py())
        self._head = head.slice(number) if number < len(head) else next(self._rest, None)
        return head.slice(0, number)


def iterate_file(file: BinaryIO) -> Iterator[pa.RecordBatch]:
    """Yield the rows of a part in batches. Raises KeyError, ArrowInvalid: they have not the columns of a manifest."""
    for batch in pq.ParquetFile(file).iter_batches(manifest.BATCH_ROWS, use_threads=False):
        if len(batch):
            mine = batch.select(list(manifest.COLUMNS))
            yield mine if mine.schema.equals(SCHEMA) else mine.cast(SCHEMA)


def merge_parts(parts: Iterable[Part]) -> Iterator[pa.RecordBatch]:
    """Yield the rows of parts in the order of sha256; where several have an image, the row of the latest part.

    A part is read from where its first row is due: of parts that follow each other one is in memory at a time.
    """
    waiting = sorted(parts, key=lambda part: part.low, reverse=True)
    reading: list[Part] = []
    while waiting or reading:
        bound = min((part.last for part in reading), default=None)
        while waiting and (bound is None or waiting[-1].low <= bound):
            part = waiting.pop()
            part.start()
            if not part.is_empty:
                reading.append(part)
                bound = part.last if bound is None else min(bound, part.last)
        if bound is not None:
            taken = [(part.number, part.take(bound)) for part in reading]
            yield _merge([(number, batch) for number, batch in taken if len(batch)])
        reading = [part for part in reading if not part.is_empty]


def _merge(batches: Sequence[tuple[int, pa.RecordBatch]]) -> pa.RecordBatch:
    if len(batches) == 1:
        return batches[0][1]
    rows = pa.concat_batches([batch for _, batch in batches])
    rank = np.repeat([number for number, _ in batches], [len(batch) for _, batch in batches])
    keys = pa.table({"sha256": rows["sha256"], "rank": rank})
    rows = rows.take(pc.sort_indices(keys, sort_keys=[("sha256", "ascending"), ("rank", "descending")]))
    is_other = pc.not_equal(rows["sha256"].slice(1), rows["sha256"].slice(0, len(rows) - 1))
    return rows.filter(pa.concat_arrays([pa.array([True]), is_other]))


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
    columns = {name: decode_column(batch[name], shared if name in manifest.SHARED else None) for name in SCHEMA.names}
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
        if len(shared) > manifest.MOST_SHARED:
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

    def iterate_batches(self, columns: Iterable[str] = manifest.COLUMNS) -> Iterator[pa.RecordBatch]:
        """Yield the rows in batches, with some of the columns."""
        names = list(columns)
        for batch in self._parquet.iter_batches(manifest.BATCH_ROWS, columns=names, use_threads=False):
            yield batch.select(names)

    def pick_batches(self, places: Places, columns: Iterable[str] = manifest.COLUMNS) -> Iterator[pa.RecordBatch]:
        """Yield the rows at some places, which must ascend, in batches."""
        names, cuts = list(columns), np.searchsorted(places, [0, *self._ends])
        for group, (low, high) in enumerate(pairwise(cuts.tolist())):
            if high > low:
                first = self._ends[group - 1] if group else 0
                rows = self._parquet.read_row_group(group, columns=names, use_threads=False).select(names)
                yield from rows.take(pa.array(places[low:high] - first)).combine_chunks().to_batches()


def hold_rows(batches: Iterable[pa.RecordBatch], file: BinaryIO | None = None) -> HeldRows:
    """Write rows, in the order of sha256, into a file, as `manifest.write_records` does; without one into memory."""
    file = BytesIO() if file is None else file
    with pq.ParquetWriter(file, SCHEMA, compression="zstd") as writer:
        groups = regroup(batches, manifest.GROUP_ROWS)
        for table in chain([next(groups, SCHEMA.empty_table())], groups):
            writer.write_table(table)
    file.flush()
    return HeldRows(file)


def sum_up(rows: HeldRows) -> tuple[str, Counter[tuple[str, tuple[str, ...]]], set[str]]:
    """Return what a version says of its rows: their digest, the images by side and labels, and the sources."""
    total, last = hashlib.sha256(), ""
    kinds, sources = Counter[tuple[str, tuple[str, ...]]](), set[str]()
    for batch in rows.iterate_batches():
        sha256s = batch["sha256"].to_pylist()
        assert last <= sha256s[0] and sha256s == sorted(sha256s), "rows are in the order of their sha256"
        last = sha256s[-1]
        total.update(encode_rows(batch, manifest.IN_DIGEST, "\n"))
        kinds.update(zip(decode_column(batch["side"]), decode_column(batch["labels"]), strict=True))
        sources.update(batch["sources"].flatten().unique().to_pylist())
    return total.hexdigest(), kinds, sources


def iterate_parts(rows: HeldRows) -> Iterator[Iterator[pa.RecordBatch]]:
    """Yield the rows of each part of a version, as `manifest.commit_version` divides them."""
    for start in range(0, max(1, len(rows)), manifest.PART_ROWS):
        yield rows.pick_batches(np.arange(start, min(start + manifest.PART_ROWS, len(rows))))


def digest_parts(rows: HeldRows) -> Iterator[str]:
    """Yield the name of each part: as `manifest.compute_rows_digest`."""
    for batches in iterate_parts(rows):
        total, between = hashlib.sha256(b"["), b""
        for batch in batches:
            total.update(between)
            total.update(encode_rows(batch, manifest.COLUMNS, ",")[:-1])
            between = b","
        total.update(b"]")
        yield total.hexdigest()


def hold_version(store: ObjectStore, version: DatasetVersion) -> HeldRows:
    """Return the rows of a version, held by column, about 100 bytes each. Raises DatasetError as below."""
    return hold_rows(iterate_batches(store, version))


def iterate_batches(store: ObjectStore, version: DatasetVersion) -> Iterator[pa.RecordBatch]:
    """Yield the rows of a version by column, sorted by sha256; of each part that is being read a few are in memory.

    Raises:
        DatasetError: a part is missing or damaged; or, behind the last row, all of them are not what the digest says.
    """
    where, total = f"dataset {version.name} version {version.version}", hashlib.sha256()
    with ExitStack() as stack, manifest.translate_damage(where):
        files = (stack.enter_context(file) for file in _open_parts(store, version, where))
        for batch in merge_parts([Part(file, number) for number, file in enumerate(files)]):
            total.update(encode_rows(batch, manifest.IN_DIGEST, "\n"))
            yield batch
    if total.hexdigest() != version.digest:
        found = f"rows have digest {total.hexdigest()[:12]}"
        raise DatasetError(where, found, version.digest[:12], "The store was changed.")


def _open_parts(store: ObjectStore, version: DatasetVersion, where: str) -> Iterator[BinaryIO]:
    for part in version.parts:
        key = f"manifests/{part}.parquet"
        try:
            yield store.open(key) if len(version.parts) <= manifest.MOST_OPEN else BytesIO(store.get(key))
        except ObjectMissing as exc:
            raise DatasetError(where, f"its part {part[:12]} is not in the store", "every part of it") from exc


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
