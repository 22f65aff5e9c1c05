"""Where frames wait on disk between the decoder and the check: so many bytes at most, gone when the process is."""

import atexit
import contextlib
import os
import shutil
import threading
from pathlib import Path

MAX_BYTES = 4_000_000_000


class Spool:
    """A folder of frames that were decoded and not read yet. Safe for threads."""

    def __init__(self, folder: Path, max_bytes: int = MAX_BYTES) -> None:
        self._folder = folder / str(os.getpid())
        self._max_bytes, self._num_bytes, self._count = max_bytes, 0, 0
        self._lock = threading.Lock()
        _sweep(folder)

    def put(self, data: bytes) -> Path | None:
        """Keep a frame and return where; None when there is no room."""
        with self._lock:
            if self._num_bytes + len(data) > self._max_bytes:
                return None
            path = self._name(".jpg")
            self._num_bytes += len(data)
        path.write_bytes(data)
        return path

    def reserve(self, suffix: str) -> Path:
        """Return a path for a file that lasts as long as this process."""
        with self._lock:
            return self._name(suffix)

    def _name(self, suffix: str) -> Path:
        if not self._count:
            self._folder.mkdir(parents=True, exist_ok=True)
            atexit.register(shutil.rmtree, self._folder, ignore_errors=True)
        self._count += 1
        return self._folder / f"{id(self):x}-{self._count}{suffix}"

    def take(self, path: Path) -> bytes:
        """Return a frame and forget it."""
        data = path.read_bytes()
        path.unlink()
        with self._lock:
            self._num_bytes -= len(data)
        return data


def _sweep(folder: Path) -> None:
    """Remove what processes left that are gone."""
    if not folder.is_dir():
        return
    for left in folder.iterdir():
        if left.name.isdecimal() and not _is_alive(int(left.name)):
            shutil.rmtree(left, ignore_errors=True)


def _is_alive(pid: int) -> bool:
    with contextlib.suppress(ProcessLookupError):
        try:
            os.kill(pid, 0)
        except PermissionError:
            return True
        return True
    return False
