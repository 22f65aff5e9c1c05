"""Prepared data cut into chunks, and what one worker does with a chunk, in a thread or a process.

A chunk is some consecutive rows of one shard. Everything here is picklable. Dimensions in names: n images.

images-00000.npy ...   every side, or all but the training side
train-00000.npy ...    with `prepare.train_size`: the training side, larger
"""

import contextlib
import hashlib
import io
import os
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from visionloop.data.images import UInt8Array, load_array
from visionloop.data.manifest import make_image_key, make_lost_error
from visionloop.data.rows import HeldRows, Places, decode_column
from visionloop.data.shards import IMAGES, TRAIN, compute_rows_per_shard, make_shard_name
from visionloop.errors import DatasetError, ImageError, ObjectMissing
from visionloop.params import Prepare
from visionloop.records import SIDES
from visionloop.store import ObjectStore, open_store

# Objects read at the same time, and bytes read ahead: this hides the latency of a network store.
READERS = 16
AHEAD_BYTES = 32 * 1024 * 1024
CHUNK_IMAGES = 64
CHUNK_BYTES = 16 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class ChunkImage:
    """One image to prepare."""

    sha256: str
    origin: str
    num_bytes: int


@dataclass(frozen=True)
class Chunk:
    """Consecutive rows of the shard `file`, from `first_row` on. `offset` is the position of their first byte.

    They are the images from the `first` on of all shards of one size, `length` of them.
    """

    file: str
    first_row: int
    offset: int
    size_hw: tuple[int, int]
    resize: str
    first: int
    length: int
    images: tuple[ChunkImage, ...] = ()

    @property
    def num_bytes(self) -> int:
        return self.length * self.size_hw[0] * self.size_hw[1] * 3


@dataclass(frozen=True)
class ChunkMaker:
    """Reads and decodes the images of a chunk; with `folder`, writes them into their shard there.

    `store` is an open store (for threads), or an address that each process opens itself.
    """

    store: ObjectStore | str
    folder: Path | None = None

    def __call__(self, chunk: Chunk) -> tuple[Chunk, UInt8Array | int]:
        """Return the chunk with its images (n, h, w, 3); if they are written, with their checksum instead.

        Raises:
            DatasetError: an image is missing from the store or damaged there, or the disk is full.
        """
        store = _open_once(self.store) if isinstance(self.store, str) else self.store
        images_nhwc = np.empty((len(chunk.images), *chunk.size_hw, 3), np.uint8)
        with contextlib.closing(_read_ahead(store, chunk.images)) as encoded:
            for row, (image, data) in enumerate(zip(chunk.images, encoded, strict=True)):
                images_nhwc[row] = _decode(image, data, chunk)
        if self.folder is None:
            return chunk, images_nhwc
        write_chunk(self.folder, chunk, images_nhwc)
        return chunk, compute_checksum(images_nhwc)


def write_chunk(folder: Path, chunk: Chunk, images_nhwc: UInt8Array) -> None:
    """Write a chunk's rows into its shard, which is there already. Raises DatasetError when the disk is full."""
    rest, offset = memoryview(images_nhwc.data).cast("B"), chunk.offset
    try:
        descriptor = os.open(folder / chunk.file, os.O_WRONLY)
        try:
            while rest:
                written = os.pwrite(descriptor, rest, offset)
                rest, offset = rest[written:], offset + written
        finally:
            os.close(descriptor)
    except OSError as exc:
        raise make_disk_error(folder, exc.strerror or str(exc)) from exc


def make_disk_error(folder: Path, found: str, expected: str = "room for the prepared images") -> DatasetError:
    """Return the error of a folder in which prepared data cannot be written."""
    todo = "Free some space, or lower prepare.image_size; then run it again: it goes on where it stopped."
    return DatasetError(f"prepared data {folder}", f"cannot be written ({found})", expected, todo)


def read_checksum(folder: Path, chunk: Chunk) -> int | None:
    """Return the checksum of the bytes at a chunk's position, None if they cannot be read."""
    try:
        with (folder / chunk.file).open("rb") as file:
            file.seek(chunk.offset)
            return compute_checksum(np.frombuffer(file.read(chunk.num_bytes), np.uint8))
    except OSError:
        return None


def compute_checksum(images: UInt8Array) -> int:
    """Return the sum of an array's 64-bit words. It is as fast as memory, and finds data lost in a power failure."""
    flat = images.reshape(-1)
    whole = len(flat) // 8 * 8
    return int(flat[:whole].view(np.uint64).sum(dtype=np.uint64)) + int(flat[whole:].sum(dtype=np.uint64))


def _decode(image: ChunkImage, data: bytes, chunk: Chunk) -> UInt8Array:
    """Decode an image after a check of its sha256: a damaged JPEG often decodes without an error."""
    try:
        if hashlib.sha256(data).hexdigest() != image.sha256:
            raise make_lost_error(image.sha256, image.origin)
        return load_array(data, image.origin, size_hw=chunk.size_hw, resize=chunk.resize, max_pixels=None)
    except ImageError as exc:
        raise make_lost_error(image.sha256, image.origin) from exc


@lru_cache(maxsize=4)
def _open_once(url: str) -> ObjectStore:
    return open_store(url)


def _read_ahead(store: ObjectStore, images: Sequence[ChunkImage]) -> Generator[bytes, None, None]:
    """Yield the bytes of images in their order. From a network store the next ones are read in the background."""

    def read(image: ChunkImage) -> bytes:
        try:
            return store.get(make_image_key(image.sha256))
        except ObjectMissing as exc:
            raise make_lost_error(image.sha256, image.origin) from exc

    if store.url.startswith("file:"):
        yield from map(read, images)
        return
    waiting: deque[tuple[int, Future[bytes]]] = deque()
    held = 0
    with ThreadPoolExecutor(READERS, thread_name_prefix="read") as pool:
        try:
            for image in images:
                while waiting and (len(waiting) >= 2 * READERS or held + image.num_bytes > AHEAD_BYTES):
                    num_bytes, first = waiting.popleft()
                    held -= num_bytes
                    yield first.result()
                waiting.append((image.num_bytes, pool.submit(read, image)))
                held += image.num_bytes
            while waiting:
                yield waiting.popleft()[1].result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


@dataclass(frozen=True)
class Selected:
    """The rows to prepare, in the order of sha256, with what must be known of all of them at once.

    `side_n` are places in `SIDES`; `set_n` places in `label_sets`, the different sets of labels.
    """

    rows: HeldRows
    side_n: NDArray[np.int8]
    set_n: NDArray[np.int32]
    label_sets: tuple[tuple[str, ...], ...]

    @property
    def classes(self) -> list[str]:
        """Return the labels of all rows, sorted."""
        return sorted({label for place in np.unique(self.set_n) for label in self.label_sets[place]})

    def count(self, side: str) -> int:
        """Return how many rows are on a side."""
        return int((self.side_n == SIDES.index(side)).sum())


@dataclass(frozen=True)
class Layout:
    """The shards of images of one size, named `kind`-00000.npy. `places_n` are the rows whose images they hold."""

    kind: str
    size_hw: tuple[int, int]
    rows: HeldRows
    places_n: Places

    @property
    def rows_per_shard(self) -> int:
        return compute_rows_per_shard(self.size_hw)

    @property
    def image_bytes(self) -> int:
        return self.size_hw[0] * self.size_hw[1] * 3

    def describe(self) -> dict[str, int]:
        """Return the number of shards and of rows in each, for the report that readers use."""
        return {"num_shards": -(-len(self.places_n) // self.rows_per_shard), "rows_per_shard": self.rows_per_shard}

    def list_chunks(self, resize: str) -> Iterator[Chunk]:
        """Yield the chunks of every shard, in order, without images. None crosses a shard or has more than 16 MiB."""
        per_chunk = max(1, min(CHUNK_IMAGES, CHUNK_BYTES // self.image_bytes))
        for name, start, number in self._list_shards():
            header = len(_make_header(number, self.size_hw))
            for row in range(0, number, per_chunk):
                offset, length = header + row * self.image_bytes, min(per_chunk, number - row)
                yield Chunk(name, row, offset, self.size_hw, resize, start + row, length)

    def fill(self, chunks: Sequence[Chunk]) -> Iterator[Chunk]:
        """Yield chunks, in their order, with their images; these are read as they are needed."""
        images = (
            ChunkImage(sha256, origins[0], num_bytes)
            for batch in self.rows.pick_batches(self._find_places(chunks), ("sha256", "origins", "num_bytes"))
            for sha256, origins, num_bytes in zip(*map(decode_column, batch.columns), strict=True)
        )
        for chunk in chunks:
            yield replace(chunk, images=tuple(islice(images, chunk.length)))

    def count_pixels(self, chunks: Sequence[Chunk]) -> int:
        """Return how many pixels the images of chunks have."""
        batches = self.rows.pick_batches(self._find_places(chunks), ("width", "height"))
        return sum(int(batch["width"].to_numpy().astype(np.int64) @ batch["height"].to_numpy()) for batch in batches)

    def make_files(self, folder: Path) -> None:
        """Create each missing shard file in its full length, because chunks are written in any order.

        Raises:
            DatasetError: the folder cannot be written.
        """
        for name, _, number in self._list_shards():
            header, path = _make_header(number, self.size_hw), folder / name
            length = len(header) + number * self.image_bytes
            try:
                if not path.is_file() or path.stat().st_size != length:
                    with path.open("wb") as file:
                        file.write(header)
                        file.truncate(length)
            except OSError as exc:
                raise make_disk_error(folder, exc.strerror or str(exc)) from exc

    def _list_shards(self) -> Iterator[tuple[str, int, int]]:
        """Yield the name of each shard, the number of its first image, and how many it has."""
        for number, start in enumerate(range(0, len(self.places_n), self.rows_per_shard)):
            yield make_shard_name(number, self.kind), start, min(self.rows_per_shard, len(self.places_n) - start)

    def _find_places(self, chunks: Sequence[Chunk]) -> Places:
        places = [self.places_n[chunk.first : chunk.first + chunk.length] for chunk in chunks]
        return np.concatenate(places) if places else self.places_n[:0]


def make_layouts(selected: Selected, section: Prepare) -> tuple[Layout, ...]:
    """Return one set of shards, or two if the training side is stored larger."""
    train_hw, rows = get_train_size(section), selected.rows
    if train_hw is None:
        return (Layout(IMAGES, section.size_hw, rows, np.arange(len(rows))),)
    is_train_n = selected.side_n == SIDES.index("train")
    others, train = np.flatnonzero(~is_train_n), np.flatnonzero(is_train_n)
    return Layout(IMAGES, section.size_hw, rows, others), Layout(TRAIN, train_hw, rows, train)


def get_train_size(section: Prepare) -> tuple[int, int] | None:
    """Return the size of the training side as (height, width), None if it has the same size as the others."""
    size = section.train_size
    return (size, size) if isinstance(size, int) else size


def _make_header(num_rows: int, size_hw: tuple[int, int]) -> bytes:
    """Return the header of an .npy file of uint8, as NumPy writes it."""
    sink = io.BytesIO()
    facts = {"descr": "|u1", "fortran_order": False, "shape": (num_rows, *size_hw, 3)}
    np.lib.format.write_array_header_1_0(sink, facts)
    return sink.getvalue()
