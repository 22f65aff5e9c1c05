"""Which image lies where in the shards: files, rows and bytes, before any of them is made.

images-00000.npy ...   every side, or all but the training side
train-00000.npy ...    with `prepare.train_size`: the training side, larger
"""

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from visionloop.data.chunks import Chunk, make_disk_error, make_wanted
from visionloop.data.shards import IMAGES, TRAIN, compute_rows_per_shard, make_shard_name
from visionloop.params import Prepare
from visionloop.records import ImageRecord

CHUNK_IMAGES = 64
CHUNK_BYTES = 16 * 1024 * 1024


@dataclass(frozen=True)
class Layout:
    """The shards of images of one size, named `kind`-00000.npy."""

    kind: str
    size_hw: tuple[int, int]
    records: Sequence[ImageRecord]

    @property
    def rows_per_shard(self) -> int:
        return compute_rows_per_shard(self.size_hw)

    @property
    def image_bytes(self) -> int:
        return self.size_hw[0] * self.size_hw[1] * 3

    def describe(self) -> dict[str, int]:
        """Return what a reader needs to know."""
        return {"num_shards": -(-len(self.records) // self.rows_per_shard), "rows_per_shard": self.rows_per_shard}

    def list_chunks(self, resize: str) -> Iterator[Chunk]:
        """Yield the chunks of every shard, in order: each within one shard, and of a size that any core can hold."""
        per_chunk = max(1, min(CHUNK_IMAGES, CHUNK_BYTES // self.image_bytes))
        for name, records in self._list_shards():
            header = len(_make_header(len(records), self.size_hw))
            for row in range(0, len(records), per_chunk):
                images = tuple(make_wanted(r) for r in records[row : row + per_chunk])
                yield Chunk(name, row, header + row * self.image_bytes, self.size_hw, resize, images)

    def make_files(self, folder: Path) -> None:
        """Make every shard in its full length, as far as it is not there: chunks are written in any order.

        Raises:
            DatasetError: the folder cannot be written.
        """
        for name, records in self._list_shards():
            header, path = _make_header(len(records), self.size_hw), folder / name
            length = len(header) + len(records) * self.image_bytes
            try:
                if not path.is_file() or path.stat().st_size != length:
                    with path.open("wb") as file:
                        file.write(header)
                        file.truncate(length)
            except OSError as exc:
                raise make_disk_error(folder, exc.strerror or str(exc)) from exc

    def _list_shards(self) -> Iterator[tuple[str, Sequence[ImageRecord]]]:
        for number, start in enumerate(range(0, len(self.records), self.rows_per_shard)):
            yield make_shard_name(number, self.kind), self.records[start : start + self.rows_per_shard]


def make_layouts(records: Sequence[ImageRecord], section: Prepare) -> tuple[Layout, ...]:
    """Return one set of shards; two where the training side is stored larger."""
    train_hw = get_train_size(section)
    if train_hw is None:
        return (Layout(IMAGES, section.size_hw, records),)
    others, train = ([r for r in records if (r.side == "train") == is_train] for is_train in (False, True))
    return Layout(IMAGES, section.size_hw, others), Layout(TRAIN, train_hw, train)


def get_train_size(section: Prepare) -> tuple[int, int] | None:
    """Return the size of the training side as (height, width), None where it has that of the others."""
    size = section.train_size
    return (size, size) if isinstance(size, int) else size


def _make_header(num_rows: int, size_hw: tuple[int, int]) -> bytes:
    """Return the header of an .npy file of uint8, as NumPy writes it."""
    sink = io.BytesIO()
    facts = {"descr": "|u1", "fortran_order": False, "shape": (num_rows, *size_hw, 3)}
    np.lib.format.write_array_header_1_0(sink, facts)
    return sink.getvalue()
