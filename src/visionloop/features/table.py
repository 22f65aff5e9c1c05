"""The embedding table in the store: an embedding is computed once, and then read by every run and workspace.

    embeddings/<encoder digest>/<sha256 of the part>    Parquet: sha256, vector; the encoder's digest in its metadata

A part is immutable, and whole or absent. Many small parts are merged into few. A part is removed only after its rows
are in another part, so readers and writers need no lock. Dimensions: n images, d features.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from visionloop.data.rows import Digests
from visionloop.errors import DatasetError, ObjectMissing
from visionloop.features.view import ENCODER_KEY, FloatArray, make_schema, make_table, to_matrix
from visionloop.parallel import map_parallel
from visionloop.store import ObjectStore

PREFIX = "embeddings/"
READERS = 4
# More than MANY small parts are merged into parts of about MERGED_BYTES.
MANY = 64
MERGED_BYTES = 8 * 1024 * 1024
ATTEMPTS = 3


@dataclass(frozen=True)
class Part:
    """One part: its key, the images it has, their embeddings (n, d), and its size."""

    key: str
    sha256_n: Digests
    embedding_nd: FloatArray
    num_bytes: int


class EmbeddingTable:
    """The embeddings of one encoder in a store. `damaged` are the parts that were passed over while reading."""

    def __init__(self, store: ObjectStore, encoder: str, *, tell: Callable[[str], None] = lambda line: None) -> None:
        self.store, self.encoder, self._tell = store, encoder, tell
        self.damaged: set[str] = set()
        self._small: set[str] = set()

    def list_parts(self) -> list[str]:
        """Return the keys of all parts."""
        return list(self.store.list(f"{PREFIX}{self.encoder}/"))

    def read(self) -> Iterator[Part]:
        """Yield the parts that can be read, a few in memory at a time. An image may be in several.

        If another process merges parts meanwhile, the list is read again, so that no row is missed. Raises StoreError.
        """
        done: set[str] = set()
        for _ in range(ATTEMPTS):
            waiting = [key for key in self.list_parts() if key not in done]
            missing = False
            for key, part in zip(waiting, map_parallel(self._read, waiting, workers=READERS), strict=True):
                missing |= part is None
                done.add(key)
                if isinstance(part, Part):
                    yield part
            if not missing:
                return

    def lookup(self, sha256_n: Sequence[str]) -> tuple[FloatArray | None, "np.ndarray[tuple[int], np.dtype[np.bool_]]"]:
        """Return embeddings (n, d) of images in the order asked for, and which of them the table has (n).

        Rows of images that it does not have are undefined. If it has none at all, None stands for the embeddings. If
        several parts hold an image, the first one by key counts.
        """
        wanted = sha256_n if isinstance(sha256_n, Digests) else Digests([pa.array(sha256_n, pa.string())])
        has_n = np.zeros(len(sha256_n), np.bool_)
        embedding_nd: FloatArray | None = None
        for part in self.read():
            row_p = wanted.find(part.sha256_n)
            places = np.flatnonzero((row_p >= 0) & ~has_n[row_p])
            if not len(places):
                continue
            if embedding_nd is None:
                embedding_nd = np.empty((len(sha256_n), part.embedding_nd.shape[1]), np.float32)
            if embedding_nd.shape[1] != part.embedding_nd.shape[1]:
                self._pass_over(part.key, "has vectors of another length")
                continue
            embedding_nd[row_p[places]], has_n[row_p[places]] = part.embedding_nd[places], True
        return embedding_nd, has_n

    def write(self, sha256_n: Sequence[str], embedding_nd: FloatArray) -> str:
        """Add a part; return its key. Raises StoreError."""
        data = encode_part(sha256_n, embedding_nd, self.encoder)
        key = f"{PREFIX}{self.encoder}/{hashlib.sha256(data).hexdigest()}"
        # Not `add`: a damaged part of the same size is to be replaced.
        self.store.put(key, data)
        self.damaged.discard(key)
        self._note(key, len(data))
        return key

    def drop_damaged(self) -> None:
        """Remove the damaged parts. Call it after their rows were computed again."""
        for key in sorted(self.damaged):
            self.store.delete(key)
        self.damaged.clear()

    def merge(self, *, many: int = MANY) -> int:
        """Merge the small parts that were read or written here, if there are more than `many`. Return their number.

        Several processes may do this at once: each removes a part only after it has written its rows to another one.
        """
        small, self._small = sorted(self._small), set()
        if len(small) <= many:
            return 0
        waiting: list[Part] = []
        num_merged = 0
        for part in map_parallel(self._read, small, workers=READERS):
            if not isinstance(part, Part):
                continue
            waiting.append(part)
            if sum(p.num_bytes for p in waiting) >= MERGED_BYTES:
                num_merged += self._merge(waiting)
                waiting = []
        return num_merged + self._merge(waiting)

    def _merge(self, parts: Sequence[Part]) -> int:
        """Write some parts as one, each image once, in the order of sha256; then remove them."""
        if len(parts) < 2 or len({part.embedding_nd.shape[1] for part in parts}) > 1:
            return 0
        everything = [sha256 for part in parts for sha256 in part.sha256_n]
        _, first = np.unique(np.asarray(everything), return_index=True)
        stacked = np.concatenate([part.embedding_nd for part in parts])
        merged = self.write([everything[i] for i in first], stacked[first])
        self.store.sync()
        for part in parts:
            if part.key != merged:
                self.store.delete(part.key)
        return len(parts)

    def _read(self, key: str) -> Part | str | None:
        """Return a part; its key if it is damaged; None if it is gone."""
        try:
            data = self.store.get(key)
        except ObjectMissing:
            return None
        try:
            sha256_n, embedding_nd = decode_part(data, key, self.encoder)
        except DatasetError as exc:
            self._pass_over(key, exc.found)
            return key
        self._note(key, len(data))
        return Part(key, sha256_n, embedding_nd, len(data))

    def _note(self, key: str, num_bytes: int) -> None:
        if num_bytes <= MERGED_BYTES // 2:
            self._small.add(key)

    def _pass_over(self, key: str, found: str) -> None:
        if key not in self.damaged:
            self.damaged.add(key)
            self._tell(f"part {key.rpartition('/')[2][:12]} of the embedding table {found}: passed over")


def encode_part(sha256_n: Sequence[str], embedding_nd: FloatArray, encoder: str) -> bytes:
    """Encode rows as Parquet. Equal input gives equal bytes."""
    sink = pa.BufferOutputStream()
    table = make_table(sha256_n, embedding_nd, make_schema(embedding_nd.shape[1], encoder))
    pq.write_table(table, sink, compression="NONE", use_dictionary=False)
    return bytes(sink.getvalue().to_pybytes())


def decode_part(data: bytes, key: str, encoder: str) -> tuple[Digests, FloatArray]:
    """Decode a part and check it: its bytes by its key, its encoder, its numbers. Raises DatasetError."""
    if hashlib.sha256(data).hexdigest() != key.rpartition("/")[2]:
        raise DatasetError(key, "is damaged", "the bytes that its key is the digest of")
    try:
        table = pq.read_table(pa.BufferReader(data))
        sha256_n, embedding_nd = Digests(table["sha256"].chunks), to_matrix(table["vector"])
    except (pa.ArrowInvalid, OSError, KeyError, ValueError) as exc:
        raise DatasetError(key, "is damaged", "embeddings in Parquet") from exc
    if (table.schema.metadata or {}).get(ENCODER_KEY) != encoder.encode():
        raise DatasetError(key, "is of another encoder", encoder)
    if not np.isfinite(embedding_nd).all():
        raise DatasetError(key, "holds vectors that are no numbers", "finite vectors")
    return sha256_n, embedding_nd


def find_parts(store: ObjectStore, sha256s: frozenset[str]) -> list[str]:
    """Return the parts of all encoders that hold one of the images, or that cannot be read. For `forget`."""

    def holds(key: str) -> bool:
        try:
            return bool(sha256s.intersection(decode_part(store.get(key), key, key.split("/")[1])[0]))
        except ObjectMissing:
            return False
        except DatasetError:
            return True

    keys = list(store.list(PREFIX)) if sha256s else []
    return [key for key, found in zip(keys, map_parallel(holds, keys, workers=READERS), strict=True) if found]


def remove_rows(store: ObjectStore, keys: Iterable[str], sha256s: frozenset[str]) -> None:
    """Take images out of parts for good: the rest of each is written first, then the part purged. For `forget`."""
    for key in keys:
        encoder = key.split("/")[1]
        try:
            sha256_n, embedding_nd = decode_part(store.get(key), key, encoder)
        except ObjectMissing:
            continue
        except DatasetError:
            store.purge(key)
            continue
        kept = [i for i, sha256 in enumerate(sha256_n) if sha256 not in sha256s]
        if len(kept) == len(sha256_n):
            continue
        if kept:
            EmbeddingTable(store, encoder).write([sha256_n[i] for i in kept], embedding_nd[kept])
        store.purge(key)
