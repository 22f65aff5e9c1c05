"""The store in a local folder. Writes go to a hidden file first and are linked into place: whole or absent."""

import contextlib
import os
import re
import secrets
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote, urlparse

from visionloop.errors import ObjectMissing, StoreError

_KEY = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*(/[A-Za-z0-9_-][A-Za-z0-9._-]*)*")


class LocalStore:
    """An `ObjectStore` over a folder of one file system."""

    def __init__(self, root: Path) -> None:
        self.root = root

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
        try:
            return self._path(key).read_bytes()
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as exc:
            raise ObjectMissing(
                f"store {self.url}", f"no object {key}", "it to be there", "Check VISIONLOOP_STORE."
            ) from exc
        except OSError as exc:
            raise self._error(key, exc) from exc

    def put(self, key: str, data: bytes) -> None:
        path = self._path(key)
        staged = self._stage(path, data)
        try:
            os.replace(staged, path)
        except OSError as exc:
            raise self._error(key, exc) from exc

    def create(self, key: str, data: bytes) -> bool:
        path = self._path(key)
        if path.exists():
            return self.get(key) == data
        staged = self._stage(path, data)
        try:
            os.link(staged, path)
        except FileExistsError:
            return self.get(key) == data
        except OSError as exc:
            raise self._error(key, exc) from exc
        finally:
            staged.unlink(missing_ok=True)
        return True

    def add(self, key: str, data: bytes) -> bool:
        path = self._path(key)
        if path.exists():
            return False
        staged = self._stage(path, data)
        try:
            os.replace(staged, path)
        except OSError as exc:
            raise self._error(key, exc) from exc
        return True

    def sync(self) -> None:
        if self.root.is_dir():
            os.sync()

    def exists(self, key: str) -> bool:
        return self._path(key).is_file()

    def list(self, prefix: str) -> Iterator[str]:
        folder = self.root / prefix.rpartition("/")[0]
        if not folder.is_dir():
            return
        keys = (p.relative_to(self.root).as_posix() for p in folder.rglob("*") if p.is_file())
        yield from sorted(k for k in keys if k.startswith(prefix) and _KEY.fullmatch(k))

    def delete(self, key: str) -> None:
        self._path(key).unlink(missing_ok=True)

    def purge(self, key: str) -> None:
        self.delete(key)

    def _path(self, key: str) -> Path:
        if not _KEY.fullmatch(key):
            raise StoreError(f"store {self.url}", f"got the key {key!r}", "parts of letters, digits, '.', '_', '-'")
        return self.root / key

    def _stage(self, path: Path, data: bytes) -> Path:
        staged = path.parent / f".staged-{secrets.token_hex(8)}"
        try:
            try:
                staged.write_bytes(data)
            except FileNotFoundError:
                path.parent.mkdir(parents=True, exist_ok=True)
                staged.write_bytes(data)
        except OSError as exc:
            with contextlib.suppress(OSError):
                staged.unlink(missing_ok=True)
            raise self._error(path.name, exc) from exc
        return staged

    def _error(self, key: str, exc: OSError) -> StoreError:
        return StoreError(
            f"store {self.url}",
            f"cannot reach {key}: {exc.strerror or exc}",
            "a writable folder with free space",
            "Run `visionloop doctor`.",
        )
