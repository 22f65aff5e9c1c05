"""What a stage takes: memory at its peak, processor time, the objects and bytes that it reads of a store."""

import ctypes
import gc
import io
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Lock
from typing import Any, BinaryIO

from visionloop.store import LocalStore

HEADER = (
    "| what | rows | memory, MB | bytes a row | processor, s | objects read | MB read |\n|---|---|---|---|---|---|---|"
)


class CountedStore(LocalStore):
    """A store that counts the objects that are opened, and the bytes that are read of them."""

    num_read = num_bytes = 0

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self._lock = Lock()

    def open(self, key: str) -> BinaryIO:
        with super().open(key) as file:
            name = file.name
        self.add(1, 0)
        return io.BufferedReader(_CountedFile(name, self))

    def add(self, num_read: int, num_bytes: int) -> None:
        """Count what was read; called by several threads."""
        with self._lock:
            self.num_read, self.num_bytes = self.num_read + num_read, self.num_bytes + num_bytes


class _CountedFile(io.FileIO):
    def __init__(self, name: str, store: CountedStore) -> None:
        super().__init__(name)
        self._store = store

    def readinto(self, buffer: Any) -> int | None:
        number = super().readinto(buffer)
        self._store.add(0, number or 0)
        return number

    def readall(self) -> bytes:
        data = super().readall()
        self._store.add(0, len(data or b""))
        return data


_peaks: list[int] = []  # of the stages that are open: the most memory that was seen in each


@contextmanager
def stage(what: str, rows: int, store: CountedStore | None = None) -> Iterator[None]:
    """Print the row of a stage: its peak of memory above the start, its processor time, the objects it read.

    There may be stages in a stage.
    """
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what is free goes back, so that it counts when it is taken again
    before, started = _mark_peak(), time.process_time()
    _peaks.append(0)
    num_read, num_bytes = (store.num_read, store.num_bytes) if store else (0, 0)
    yield
    seconds = time.process_time() - started
    _mark_peak()
    used = max(0, _peaks.pop() - before)
    read = f"{store.num_read - num_read:,} | {(store.num_bytes - num_bytes) / 1e6:,.1f}" if store else "|"
    print(f"| {what} | {rows:,} | {used / 1e6:,.0f} | {used / rows:,.0f} | {seconds:,.2f} | {read} |", flush=True)


def _mark_peak() -> int:
    """Note the peak until now for all open stages, and let it count from here; return what is held now."""
    peak = _read_memory("VmHWM")
    _peaks[:] = [max(one, peak) for one in _peaks]
    Path("/proc/self/clear_refs").write_text("5")
    return _read_memory("VmRSS")


def _read_memory(name: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024
