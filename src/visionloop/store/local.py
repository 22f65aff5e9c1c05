"""The store in a local folder. An object is written to a hidden file, then moved into place: it is whole or absent."""

import contextlib
import ctypes
import errno
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO
from urllib.parse import unquote, urlparse

from visionloop.errors import ObjectMissing, StoreError
from visionloop.store.keys import check_key, is_key


class LocalStore:
    """An `ObjectStore` over a folder of one file system."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._folder = os.path.abspath(root)
        self._where = f"store {self.url}"
        self._was_there = os.path.isdir(self._folder)

    @classmethod
    def from_url(cls, url: str) -> "LocalStore":
        """Open `file:///folder`."""
        return cls(Path(unquote(urlparse(url).path)))

    @property
    def url(self) -> str:
        return self.root.as_uri()

    @property
    def num_writers(self) -> int:
        return 8

    def get(self, key: str) -> bytes:
        with self.open(key) as file:
            try:
                return file.read()
            except OSError as exc:
                raise self._error(key, exc) from exc

    def open(self, key: str) -> BinaryIO:
        try:
            return open(self._path(key), "rb")
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as exc:
            raise ObjectMissing(self._where, f"no object {key}", "it to be there", "Check VISIONLOOP_STORE.") from exc
        except OSError as exc:
            raise self._error(key, exc) from exc

    def put(self, key: str, data: bytes) -> None:
        path = self._path(key)
        self._move(self._stage(path, data), path)

    def create(self, key: str, data: bytes) -> bool:
        path = self._path(key)
        if os.path.exists(path):
            return self._holds(key, data)
        staged = self._stage(path, data, durable=True)
        try:
            os.link(staged, path)
            _sync_folder(os.path.dirname(path))
        except FileExistsError:
            return self._holds(key, data)
        except OSError as exc:
            raise self._error(key, exc) from exc
        finally:
            with contextlib.suppress(OSError):
                os.unlink(staged)
        return True

    def add(self, key: str, data: bytes) -> bool:
        path = self._path(key)
        try:
            # A power failure may leave a file without its content. Its size shows that.
            if os.stat(path).st_size == len(data):
                return False
        except OSError:
            pass
        self._move(self._stage(path, data), path)
        return True

    def sync(self) -> None:
        if os.path.isdir(self._folder):
            _sync_file_system(self._folder)

    def exists(self, key: str) -> bool:
        return os.path.isfile(self._path(key))

    def list(self, prefix: str, after: str = "") -> Iterator[str]:
        start = prefix.rpartition("/")[0]
        for key in _walk(os.path.join(self._folder, start), f"{start}/" if start else "", prefix, after):
            if key.startswith(prefix) and key > after and is_key(key):
                yield key

    def delete(self, key: str) -> None:
        try:
            os.unlink(self._path(key))
        except (FileNotFoundError, NotADirectoryError):
            pass
        except OSError as exc:
            raise self._error(key, exc) from exc

    def purge(self, key: str) -> None:
        self.delete(key)

    def _holds(self, key: str, data: bytes) -> bool:
        try:
            return self.get(key) == data
        except ObjectMissing:  # another writer created it, and it was removed since
            return False

    def _path(self, key: str) -> str:
        return f"{self._folder}/{check_key(key, self._where)}"

    def _stage(self, path: str, data: bytes, *, durable: bool = False) -> str:
        """Write a hidden file beside `path`; return its path."""
        staged = f"{os.path.dirname(path)}/.staged-{secrets.token_hex(8)}"
        try:
            try:
                _write_file(staged, data, durable)
            except FileNotFoundError:
                self._make_folder(os.path.dirname(path))
                _write_file(staged, data, durable)
        except OSError as exc:
            with contextlib.suppress(OSError):
                os.unlink(staged)
            raise self._error(os.path.basename(path), exc) from exc
        return staged

    def _make_folder(self, folder: str) -> None:
        """Make a folder of the store, but never the store anew: one that is gone was moved, or is not mounted."""
        if self._was_there and not os.path.isdir(self._folder):
            raise FileNotFoundError(errno.ENOENT, "the folder of the store is gone")
        os.makedirs(folder, exist_ok=True)
        self._was_there = True

    def _move(self, staged: str, path: str) -> None:
        try:
            os.rename(staged, path)
        except OSError as exc:
            with contextlib.suppress(OSError):
                os.unlink(staged)
            raise self._error(os.path.basename(path), exc) from exc

    def _error(self, key: str, exc: OSError) -> StoreError:
        if exc.errno in (errno.ENOSPC, errno.EDQUOT):
            return StoreError(
                self._where,
                f"no space left for {key}",
                "a disk with free space",
                "Free some, and run the same command again: what is stored already is kept.",
            )
        return StoreError(
            self._where,
            f"cannot reach {key}: {exc.strerror or exc}",
            "a writable folder with free space",
            "Run `visionloop doctor`.",
        )


def _write_file(path: str, data: bytes, durable: bool) -> None:
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        written = os.write(file, data)
        while written < len(data):
            written += os.write(file, memoryview(data)[written:])
        if durable:
            os.fsync(file)
    finally:
        os.close(file)


def _sync_folder(folder: str) -> None:
    file = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def _sync_file_system(folder: str) -> None:
    """Flush the file system of a folder, or all file systems where `syncfs` does not exist."""
    syncfs = getattr(ctypes.CDLL(None, use_errno=True), "syncfs", None)
    if syncfs is None:
        os.sync()
        return
    file = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        if syncfs(file) != 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))
    finally:
        os.close(file)


def _walk(folder: str, prefix: str, wanted: str, after: str) -> Iterator[str]:
    """Yield the files below a folder as keys, in the order of keys: folder names are compared with their slash.

    Folders without a key that begins with `wanted`, or without one behind `after`, are not entered.
    """
    try:
        with os.scandir(folder) as found:
            names = sorted([f"{entry.name}/" if entry.is_dir() else entry.name for entry in found])
    except (FileNotFoundError, NotADirectoryError):
        return
    for name in names:
        key = prefix + name
        if name[-1] != "/":
            yield key
        elif (key.startswith(wanted) or wanted.startswith(key)) and (key > after or after.startswith(key)):
            yield from _walk(f"{folder}/{name[:-1]}", key, wanted, after)
