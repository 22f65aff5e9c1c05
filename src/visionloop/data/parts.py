"""The rows of a version: read from all of its parts at once, and written as one more.

manifests/<digest>.parquet        rows that came with a version, at most 250,000 of them; in the order of their sha256

Whoever needs the rows one after the other (`iterate_version`) never holds all of them.
"""

import hashlib
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from io import BytesIO
from itertools import groupby
from operator import itemgetter
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from visionloop.data.manifest import load_pinned, make_version_key
from visionloop.data.rows import (
    COLUMNS,
    HeldRows,
    Rows,
    decode_batches,
    decode_column,
    encode_rows,
    hold_rows,
    iterate_file,
    translate_damage,
)
from visionloop.errors import DatasetError, ObjectMissing
from visionloop.records import SIDES, DatasetVersion, ImageRecord, Pin, canonical_json
from visionloop.store import ObjectStore

# One more place where an image was found does not change what is learned from it.
IN_DIGEST = tuple(name for name in COLUMNS if name not in {"sources", "origins"})
PART_ROWS = 250_000
MOST_PARTS = 100  # of a version: a pull that finds so many writes all rows into new ones
MOST_OPEN = 64  # parts that are read where they lie; of more the bytes are held


def make_part_key(digest: str) -> str:
    """Return the store key of a part, whose name is the digest of its rows."""
    return f"manifests/{digest}.parquet"


def load_version_records(store: ObjectStore, version: DatasetVersion) -> list[ImageRecord]:
    """Return the rows of a version, sorted by sha256, checked against its digest. Raises DatasetError."""
    return list(iterate_version(store, version))


def iterate_records(store: ObjectStore, pin: Pin) -> Iterator[ImageRecord]:
    """Yield the rows of the pinned version, as `iterate_version`, checked against the pin. Raises DatasetError."""
    yield from iterate_version(store, load_pinned(store, pin))


def iterate_version(store: ObjectStore, version: DatasetVersion) -> Iterator[ImageRecord]:
    """Yield the rows of a version, sorted by sha256; a few of them are in memory. Raises as `iterate_batches`."""
    return decode_batches(iterate_batches(store, version))


def hold_version(store: ObjectStore, version: DatasetVersion) -> HeldRows:
    """Return the rows of a version, held by column, about 100 bytes each. Raises DatasetError as below."""
    return hold_rows(iterate_batches(store, version))


def iterate_batches(store: ObjectStore, version: DatasetVersion) -> Iterator[pa.RecordBatch]:
    """Yield the rows of a version by column, sorted by sha256; of each part that is being read a few are in memory.

    Raises:
        DatasetError: a part is missing or damaged; or, behind the last row, all of them are not what the digest says.
    """
    where, total = f"dataset {version.name} version {version.version}", hashlib.sha256()
    with ExitStack() as stack, translate_damage(where):
        files = (stack.enter_context(file) for file in _open_parts(store, version, where))
        for batch in merge_parts([Part(file, number) for number, file in enumerate(files)]):
            total.update(encode_rows(batch, IN_DIGEST, "\n"))
            yield batch
    if total.hexdigest() != version.digest:
        found = f"rows have digest {total.hexdigest()[:12]}"
        raise DatasetError(where, found, version.digest[:12], "The store was changed.")


def _open_parts(store: ObjectStore, version: DatasetVersion, where: str) -> Iterator[BinaryIO]:
    for part in version.parts:
        key = make_part_key(part)
        try:
            yield store.open(key) if len(version.parts) <= MOST_OPEN else BytesIO(store.get(key))
        except ObjectMissing as exc:
            raise DatasetError(where, f"its part {part[:12]} is not in the store", "every part of it") from exc


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


def rank_rows(rows: Iterable[ImageRecord], rank: int) -> Iterator[tuple[str, int, ImageRecord]]:
    """Yield rows with what `heapq.merge` compares: the sha256, then the rank of where they are from."""
    for row in rows:
        yield row.sha256, rank, row


def make_version(
    name: str, parent: DatasetVersion | None, records: Rows, changed: Rows, *, is_whole: bool = False, **facts: Any
) -> DatasetVersion:
    """Describe the version after `parent` that holds `records`, of which `changed` are new or differ.

    The digest over all rows is the data version everywhere. `is_whole`: `changed` are all of them, and the parts of the
    parent are not among those of the version.
    """
    digest, kinds, sources = _sum_up(records.iterate_batches())
    parts = map(digest_rows, _split_parts(changed))
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for (side, labels), number in kinds.items():
        counts[side].update(dict.fromkeys(labels or ("(unlabelled)",), number))
    return DatasetVersion(
        name=name,
        version=parent.version + 1 if parent else 1,
        digest=digest,
        parent=parent.version if parent else None,
        parts=(*(parent.parts if parent and not is_whole else ()), *parts),
        num_images=kinds.total(),
        classes=tuple(sorted({label for _, labels in kinds for label in labels})),
        counts={side: dict(sorted(counts[side].items())) for side in SIDES if counts[side]},
        sources=tuple(sorted(sources)),
        **facts,
    )


def _sum_up(batches: Iterable[pa.RecordBatch]) -> tuple[str, Counter[tuple[str, tuple[str, ...]]], set[str]]:
    """Return what a version says of its rows: their digest, the images by side and labels, and the sources."""
    total, kinds, sources = hashlib.sha256(), Counter[tuple[str, tuple[str, ...]]](), set[str]()
    for batch in batches:
        total.update(encode_rows(batch, IN_DIGEST, "\n"))
        kinds.update(zip(decode_column(batch["side"]), decode_column(batch["labels"]), strict=True))
        sources.update(batch["sources"].flatten().unique().to_pylist())
    return total.hexdigest(), kinds, sources


def digest_rows(batches: Iterable[pa.RecordBatch]) -> str:
    """Return the sha256 over all fields of rows, in their order: the name of a part. As `compute_digest` of a list."""
    total, between = hashlib.sha256(b"["), b""
    for batch in batches:
        total.update(between)
        total.update(encode_rows(batch, COLUMNS, ",")[:-1])
        between = b","
    total.update(b"]")
    return total.hexdigest()


def _split_parts(rows: Rows) -> Iterator[Iterable[pa.RecordBatch]]:
    """Yield the rows of each part, to be read at once; of one without rows, if there are none."""
    if not len(rows):
        yield ()
    for _, some in groupby(_number_parts(rows.iterate_batches()), key=itemgetter(0)):
        yield (batch for _, batch in some)


def _number_parts(batches: Iterable[pa.RecordBatch]) -> Iterator[tuple[int, pa.RecordBatch]]:
    """Yield the number of a part with the rows that are in it, cut from those of the next one."""
    place = 0
    for batch in batches:
        rest = batch
        while len(rest):
            number, start = divmod(place, PART_ROWS)
            some = rest.slice(0, PART_ROWS - start)
            yield number, some
            place, rest = place + len(some), rest.slice(len(some))


def commit_version(store: ObjectStore, version: DatasetVersion, changed: Rows) -> bool:
    """Write a version: its rows first, then the commit object. False if another process took the number."""
    number = max(1, -(-len(changed) // PART_ROWS))
    for part, batches in zip(version.parts[-number:], _split_parts(changed), strict=True):
        write_part(store, part, batches)
    store.sync()
    return store.create(make_version_key(version.name, version.version), canonical_json(version.to_json()))


def write_part(store: ObjectStore, digest: str, batches: Iterable[pa.RecordBatch]) -> None:
    """Write rows into the store under their digest."""
    sink = BytesIO()
    hold_rows(batches, sink)
    store.put(make_part_key(digest), sink.getvalue())
