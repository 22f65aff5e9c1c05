"""A store in a folder that counts what is asked of it."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from visionloop.store import LocalStore


class CountingStore(LocalStore):
    """`reads` counts the objects that were read, by their first folder; `keys` those that were listed.

    `num_bytes` were read; at most `most_open` objects were open at a time.
    """

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.reads: Counter[str] = Counter()
        self.keys: Counter[str] = Counter()
        self.num_bytes = 0
        self.num_open = self.most_open = 0

    def open(self, key: str) -> BinaryIO:
        self.reads[key.partition("/")[0]] += 1
        self.num_open += 1
        self.most_open = max(self.most_open, self.num_open)
        return _CountedFile(super().open(key), self)  # type: ignore[return-value]

    def list(self, prefix: str, after: str = "") -> Iterator[str]:
        for key in super().list(prefix, after):
            self.keys[key.partition("/")[0]] += 1
            yield key

    def forget_counts(self) -> None:
        self.reads.clear()
        self.keys.clear()
        self.num_bytes = 0


class _CountedFile:
    """A file whose bytes are counted when they are read."""

    def __init__(self, file: BinaryIO, store: CountingStore) -> None:
        self._file, self._store = file, store

    def read(self, size: int = -1) -> bytes:
        data = self._file.read(size)
        self._store.num_bytes += len(data)
        return data

    def __enter__(self) -> "_CountedFile":
        return self

    def __exit__(self, *told: object) -> None:
        self._file.close()
        self._store.num_open -= 1

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)
