"""Prepared images on disk: memory-mapped uint8 shards (n, h, w, 3) and the index that says what each row is.

    index.parquet  manifest.parquet  images-00000.npy ...  classes.json  report.json
                   train-00000.npy ...   with `prepare.train_size`: the training side, larger

The rows of the index are sorted by sha256, and so are those of the manifest: the images' own rows of it. Each set of
shards keeps that order: its k-th image is in shard k // rows_per_shard. Dimensions in names: n images, k classes.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from visionloop.data.images import UInt8Array
from visionloop.data.manifest import decode_records
from visionloop.errors import DatasetError
from visionloop.records import ImageRecord, Pin

SHARD_BYTES = 64 * 1024 * 1024
IMAGES, TRAIN = "images", "train"
REPAIR = "Run `visionloop prepare`."
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
    sha256_n: tuple[str, ...]
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

    def load_records(self, rows: IntArray) -> list[ImageRecord]:
        """Read what the manifest says of some rows, in the order asked for. Raises DatasetError."""
        where = f"prepared data {self.folder}"
        try:
            records = decode_records((self.folder / "manifest.parquet").read_bytes(), where)
        except FileNotFoundError as exc:
            raise DatasetError(where, "has no manifest.parquet", "one", "Run `visionloop prepare`.") from exc
        if [r.sha256 for r in records] != list(self.sha256_n):
            raise DatasetError(where, "has a manifest of other images", "its own", "Run `visionloop prepare`.")
        return [records[row] for row in rows]

    def read_record(self, row: int) -> ImageRecord:
        """Read what the manifest says of one row: the group that it is in, and no other. Raises DatasetError."""
        where, first = f"prepared data {self.folder}", 0
        try:
            with pq.ParquetFile(self.folder / "manifest.parquet") as file:
                for group in range(file.num_row_groups):
                    number = file.metadata.row_group(group).num_rows
                    if row < first + number:
                        (found,) = file.read_row_group(group).slice(row - first, 1).to_pylist()
                        record = ImageRecord.from_json(found)
                        if record.sha256 == self.sha256_n[row]:
                            return record
                        break
                    first += number
        except (OSError, TypeError, pa.ArrowInvalid) as exc:
            raise DatasetError(where, "has no manifest.parquet, or a damaged one", "one", REPAIR) from exc
        raise DatasetError(where, "has a manifest of other images", "its own", REPAIR)

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


def compute_places(side_n: Sequence[str], *, train_is_larger: bool) -> IntArray:
    """Return the position of each row among the rows of the same set of shards.

    Example: sides train, val, train give 0, 1, 2 in one set of shards, and 0, 0, 1 if train has its own.
    """
    in_train_n = np.asarray([side == "train" for side in side_n], bool) & train_is_larger
    return np.where(in_train_n, np.cumsum(in_train_n), np.cumsum(~in_train_n)) - 1


def write_index(
    folder: Path,
    *,
    sha256_n: list[str],
    label_n: list[int],
    side_n: list[str],
    labels_n: list[list[int]] | None = None,
) -> None:
    """Write index.parquet, a row an image, in the order of sha256; for multilabel with all its classes (`labels_n`)."""
    columns = {"sha256": sha256_n, "label": pa.array(label_n, pa.int64()), "side": side_n}
    if labels_n is not None:
        columns["labels"] = pa.array(labels_n, pa.list_(pa.int64()))
    pq.write_table(pa.table(columns), folder / "index.parquet")


def load_prepared(folder: Path) -> Prepared:
    """Open prepared data; images stay on disk until they are read.

    Raises:
        DatasetError: it is missing or incomplete.
    """
    try:
        report = json.loads((folder / "report.json").read_text())
        classes = tuple(json.loads((folder / "classes.json").read_text()))
        index = pq.read_table(folder / "index.parquet")
        larger = report.get("train_shards")
        shards = _open_shards(folder, IMAGES, {**report, "size": report["image_size"]})
        train_shards = _open_shards(folder, TRAIN, larger) if larger else None
        targets_nk = _make_targets(index["labels"], len(classes)) if report["task"] == "multilabel" else None
    except (OSError, ValueError, KeyError, pa.ArrowInvalid) as exc:
        raise DatasetError(
            f"prepared data {folder}", "is missing or incomplete", "shards and an index", "Run `visionloop prepare`."
        ) from exc
    sides = index["side"].to_pylist()
    return Prepared(
        folder=folder,
        pin=Pin.from_json(report["dataset"]),
        task=report["task"],
        classes=classes,
        size_hw=shards.size_hw,
        resize=report["resize"],
        sha256_n=tuple(index["sha256"].to_pylist()),
        label_n=index["label"].to_numpy(),
        targets_nk=targets_nk,
        side_n=np.asarray(sides, dtype=np.str_),
        place_n=compute_places(sides, train_is_larger=larger is not None),
        shards=shards,
        train_shards=train_shards,
    )


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
