"""Prepared images on disk: memory-mapped uint8 shards (n, h, w, 3) and the index that says what each row is.

    index.parquet  manifest.parquet  images-00000.npy ...  classes.json  report.json
                   train-00000.npy ...   with `prepare.train_size`: the training side, larger

The rows of the index are sorted by sha256, and so are those of the manifest: the images' own rows of it. Each set of
shards keeps that order: its k-th image is in shard k // rows_per_shard. Dimensions in names: n images, k classes.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from visionloop.data.images import UInt8Array
from visionloop.data.rows import Digests, HeldRows, decode_batches, regroup, translate_damage
from visionloop.errors import DatasetError
from visionloop.records import ImageRecord, Pin

SHARD_BYTES = 64 * 1024 * 1024
IMAGES, TRAIN = "images", "train"
REPAIR = "Run `visionloop prepare`."
INDEX = "index.parquet"
INDEX_ROWS, INDEX_BATCH = 1024 * 1024, 16_384  # that a group of it has, and that are read together
IntArray = NDArray[np.int64]
Offset = tuple[int, int]  # pixels from the top and from the left


@dataclass(frozen=True)
class Shards:
    """All images of one size, in files of `rows_per_shard` images each."""

    size_hw: tuple[int, int]
    rows_per_shard: int
    arrays: tuple[UInt8Array, ...]

    def read(self, places: IntArray) -> UInt8Array:
        """Return the images at some places, (n, h, w, 3), in the order asked for."""
        out = np.empty((len(places), *self.size_hw, 3), np.uint8)
        shard_n = places // self.rows_per_shard
        for shard in np.unique(shard_n):
            mine = shard_n == shard
            out[mine] = self.arrays[shard][places[mine] % self.rows_per_shard]
        return out


@dataclass(frozen=True)
class Prepared:
    """The prepared data of one pin. `label_n` is an index into `classes`; `side_n` a name of a side.

    `task` is binary, multiclass or multilabel. For multilabel `targets_nk` says which classes an image has (0 or 1),
    and `label_n` is the first of them, -1 for an image that has none; for the other tasks `targets_nk` is None.
    `labels` and `count_classes` are the same for every task.

    `place_n` is the position of a row in its set of shards. That is `train_shards` for the training side, if there are
    any, else `shards`.
    """

    folder: Path
    pin: Pin
    task: str
    classes: tuple[str, ...]
    size_hw: tuple[int, int]
    resize: str
    sha256_n: Sequence[str]
    label_n: IntArray
    targets_nk: NDArray[np.uint8] | None
    side_n: NDArray[np.str_]
    place_n: IntArray
    shards: Shards
    train_shards: Shards | None

    def rows(self, side: str) -> IntArray:
        """Return the row numbers of one side, ascending."""
        return np.flatnonzero(self.side_n == side)

    def labels(self, row: int) -> tuple[str, ...]:
        """Return the labels of one row: one, or for multilabel any number of them."""
        if self.targets_nk is None:
            return (self.classes[self.label_n[row]],)
        return tuple(self.classes[k] for k in np.flatnonzero(self.targets_nk[row]))

    def count_classes(self, rows: IntArray) -> IntArray:
        """Return how many of some rows have each class, (k,)."""
        if self.targets_nk is None:
            return np.bincount(self.label_n[rows], minlength=len(self.classes)).astype(np.int64)
        return np.asarray(self.targets_nk[rows].sum(axis=0, dtype=np.int64))

    @contextmanager
    def open_rows(self) -> Iterator[HeldRows]:
        """Open what the manifest says of all rows; they are read as they are asked for. Raises DatasetError."""
        with self._open_manifest() as rows:
            if not self._are_of(rows):
                raise self._refuse_manifest()
            yield rows

    @contextmanager
    def _open_manifest(self) -> Iterator[HeldRows]:
        where = f"prepared data {self.folder}"
        try:
            with (self.folder / "manifest.parquet").open("rb") as file, translate_damage(where):
                yield HeldRows(file)
        except FileNotFoundError as exc:
            raise DatasetError(where, "has no manifest.parquet", "one", REPAIR) from exc

    def _refuse_manifest(self) -> DatasetError:
        return DatasetError(f"prepared data {self.folder}", "has a manifest of other images", "its own", REPAIR)

    def load_records(self, rows: IntArray) -> list[ImageRecord]:
        """Read what the manifest says of some rows, in the order asked for. Raises DatasetError."""
        asked, place_n = np.unique(rows, return_inverse=True)
        with self.open_rows() as known:
            records = list(decode_batches(known.pick_batches(asked)))
        return [records[place] for place in place_n]

    def load_keys(self, rows: IntArray) -> list[str]:
        """Read what decides the side of some images, in the order asked for. Raises DatasetError."""
        asked, place_n = np.unique(rows, return_inverse=True)
        with self.open_rows() as known:
            keys = [key for batch in known.pick_batches(asked, ["key"]) for key in batch["key"].to_pylist()]
        return [keys[place] for place in place_n]

    def _are_of(self, rows: HeldRows) -> bool:
        start, total = 0, len(self.sha256_n)
        for batch in rows.iterate_batches(["sha256"]):
            if batch["sha256"].to_pylist() != list(self.sha256_n[start : start + len(batch)]):
                return False
            start += len(batch)
        return start == total

    def read_record(self, row: int) -> ImageRecord:
        """Read what the manifest says of one row: the group that it is in, and no other. Raises DatasetError."""
        with self._open_manifest() as rows:
            record = rows[row] if row < len(rows) else None
        if record is None or record.sha256 != self.sha256_n[row]:
            raise self._refuse_manifest()
        return record

    def read(self, rows: IntArray) -> UInt8Array:
        """Return the images of some rows, (n, h, w, 3), in the order asked for; the middle of those stored larger."""
        return self._read(rows, lambda row, free: (free[0] // 2, free[1] // 2))

    def read_crops(self, rows: IntArray, *, seed: int, epoch: int) -> UInt8Array:
        """Return images as `read`, but of those stored larger a crop. It depends on seed, epoch and image alone."""
        return self._read(rows, lambda row, free: choose_crop(self.sha256_n[row], free, seed=seed, epoch=epoch))

    def _read(self, rows: IntArray, choose: Callable[[int, Offset], Offset]) -> UInt8Array:
        if self.train_shards is None:
            return self.shards.read(self.place_n[rows])
        out = np.empty((len(rows), *self.size_hw, 3), np.uint8)
        is_larger_n = self.side_n[rows] == "train"
        out[~is_larger_n] = self.shards.read(self.place_n[rows[~is_larger_n]])
        height, width = self.size_hw
        free = self.train_shards.size_hw[0] - height, self.train_shards.size_hw[1] - width
        larger = self.train_shards.read(self.place_n[rows[is_larger_n]])
        for i, image in zip(np.flatnonzero(is_larger_n), larger, strict=True):
            top, left = choose(int(rows[i]), free)
            out[i] = image[top : top + height, left : left + width]
        return out


def choose_crop(sha256: str, free: Offset, *, seed: int, epoch: int) -> Offset:
    """Return (top, left) of a crop, uniform over 0 to `free` inclusive: the same for the same image, seed and epoch."""
    random = hashlib.blake2b(f"{seed}/{epoch}/{sha256}".encode(), digest_size=16).digest()
    top, left = int.from_bytes(random[:8], "big"), int.from_bytes(random[8:], "big")
    return top % (free[0] + 1), left % (free[1] + 1)


def compute_rows_per_shard(size_hw: tuple[int, int]) -> int:
    """Return how many images make a shard of about 64 MiB."""
    return max(1, SHARD_BYTES // (size_hw[0] * size_hw[1] * 3))


def make_shard_name(number: int, kind: str = IMAGES) -> str:
    """Return the file name of a shard."""
    return f"{kind}-{number:05d}.npy"


def compute_places(side_n: Sequence[str] | NDArray[np.str_], *, train_is_larger: bool) -> IntArray:
    """Return the position of each row among the rows of the same set of shards.

    Example: sides train, val, train give 0, 1, 2 in one set of shards, and 0, 0, 1 if train has its own.
    """
    in_train_n = (np.asarray(side_n) == "train") & train_is_larger
    return np.where(in_train_n, np.cumsum(in_train_n), np.cumsum(~in_train_n)) - 1


def write_index(folder: Path, rows: Iterable[pa.RecordBatch]) -> None:
    """Write index.parquet: `sha256`, `label`, `side`, for multilabel also `labels`; a row an image, by sha256."""
    tables = regroup(rows, INDEX_ROWS)
    first = next(tables)
    with pq.ParquetWriter(folder / INDEX, first.schema) as writer:
        for table in chain([first], tables):
            writer.write_table(table)


def load_prepared(folder: Path) -> Prepared:
    """Open prepared data; images stay on disk until they are read.

    Raises:
        DatasetError: it is missing or incomplete.
    """
    try:
        report = json.loads((folder / "report.json").read_text())
        classes = tuple(json.loads((folder / "classes.json").read_text()))
        sha256_n, index = _read_index(folder / INDEX)
        larger = report.get("train_shards")
        shards = _open_shards(folder, IMAGES, {**report, "size": report["image_size"]})
        train_shards = _open_shards(folder, TRAIN, larger) if larger else None
        targets_nk = _make_targets(index["labels"], len(classes)) if report["task"] == "multilabel" else None
    except (OSError, ValueError, KeyError, pa.ArrowInvalid) as exc:
        raise DatasetError(
            f"prepared data {folder}", "is missing or incomplete", "shards and an index", "Run `visionloop prepare`."
        ) from exc
    sides = index["side"].combine_chunks()
    side_n = np.asarray(sides.dictionary.to_pylist(), np.str_)[sides.indices.to_numpy()]
    return Prepared(
        folder=folder,
        pin=Pin.from_json(report["dataset"]),
        task=report["task"],
        classes=classes,
        size_hw=shards.size_hw,
        resize=report["resize"],
        sha256_n=sha256_n,
        label_n=index["label"].to_numpy(),
        targets_nk=targets_nk,
        side_n=side_n,
        place_n=compute_places(side_n, train_is_larger=larger is not None),
        shards=shards,
        train_shards=train_shards,
    )


def _read_index(path: Path) -> tuple[Digests, pa.Table]:
    """Return the digests of an index, and its other columns. Raises ValueError, KeyError, ArrowInvalid, OSError."""
    file = pq.ParquetFile(path, read_dictionary=["side"])
    digests = Digests(batch["sha256"] for batch in file.iter_batches(INDEX_BATCH, columns=["sha256"]))
    others = [name for name in file.schema_arrow.names if name != "sha256"]
    return digests, file.read(others, use_threads=False)


def _make_targets(labels_n: pa.ChunkedArray, num_classes: int) -> NDArray[np.uint8]:
    """Turn lists of classes into 0 and 1, (n, k)."""
    lists = labels_n.combine_chunks()
    targets_nk = np.zeros((len(lists), num_classes), np.uint8)
    rows = np.repeat(np.arange(len(lists)), lists.value_lengths().to_numpy())
    targets_nk[rows, lists.flatten().to_numpy()] = 1
    return targets_nk


def _open_shards(folder: Path, kind: str, facts: dict[str, Any]) -> Shards:
    paths = [folder / make_shard_name(i, kind) for i in range(facts["num_shards"])]
    arrays = tuple(np.load(path, mmap_mode="r", allow_pickle=False) for path in paths)
    return Shards((facts["size"][0], facts["size"][1]), facts["rows_per_shard"], arrays)
