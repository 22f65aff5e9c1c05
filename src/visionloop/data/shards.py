"""Prepared images on disk: memory-mapped uint8 shards (n, h, w, 3) and the index that says what each row is.

    index.parquet  images-00000.npy ...  classes.json  report.json

Rows are in the order of sha256; row i lies in shard i // rows_per_shard.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from visionloop.data.images import UInt8Array
from visionloop.errors import DatasetError
from visionloop.records import Pin

SHARD_BYTES = 64 * 1024 * 1024
IntArray = NDArray[np.int64]


@dataclass(frozen=True)
class Prepared:
    """The prepared data of one pin. `label_n` is an index into `classes`; `side_n` a name of a side."""

    folder: Path
    pin: Pin
    classes: tuple[str, ...]
    size_hw: tuple[int, int]
    resize: str
    sha256_n: tuple[str, ...]
    label_n: IntArray
    side_n: NDArray[np.str_]
    rows_per_shard: int
    shards: tuple[UInt8Array, ...]

    def rows(self, side: str) -> IntArray:
        """Return the row numbers of one side, ascending."""
        return np.flatnonzero(self.side_n == side)

    def read(self, rows: IntArray) -> UInt8Array:
        """Return the images of some rows, (n, h, w, 3), in the order asked for."""
        height, width = self.size_hw
        out = np.empty((len(rows), height, width, 3), np.uint8)
        shard_n = rows // self.rows_per_shard
        for shard in np.unique(shard_n):
            mine = shard_n == shard
            out[mine] = self.shards[shard][rows[mine] % self.rows_per_shard]
        return out


def compute_rows_per_shard(size_hw: tuple[int, int]) -> int:
    """Return how many images make a shard of about 64 MiB."""
    return max(1, SHARD_BYTES // (size_hw[0] * size_hw[1] * 3))


def make_shard_name(number: int) -> str:
    """Return the file name of a shard."""
    return f"images-{number:05d}.npy"


def write_index(folder: Path, *, sha256_n: list[str], label_n: list[int], side_n: list[str]) -> None:
    """Write index.parquet: one row an image, in shard order."""
    columns = {"sha256": sha256_n, "label": pa.array(label_n, pa.int64()), "side": side_n}
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
        paths = [folder / make_shard_name(i) for i in range(report["num_shards"])]
        shards = tuple(np.load(path, mmap_mode="r", allow_pickle=False) for path in paths)
    except (OSError, ValueError, KeyError, pa.ArrowInvalid) as exc:
        raise DatasetError(
            f"prepared data {folder}", "is missing or incomplete", "shards and an index", "Run `visionloop prepare`."
        ) from exc
    return Prepared(
        folder=folder,
        pin=Pin.from_json(report["dataset"]),
        classes=classes,
        size_hw=(report["image_size"][0], report["image_size"][1]),
        resize=report["resize"],
        sha256_n=tuple(index["sha256"].to_pylist()),
        label_n=index["label"].to_numpy(),
        side_n=np.asarray(index["side"].to_pylist(), dtype=np.str_),
        rows_per_shard=report["rows_per_shard"],
        shards=shards,
    )
