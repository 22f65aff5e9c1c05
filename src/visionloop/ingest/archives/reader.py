"""Read the entries of zip archives that strangers made. Nothing is extracted to disk.

`directory.py` has checked places and sizes before; here each entry has to hold what the directory said of it.
"""

import io
import os
import zlib
from pathlib import Path
from typing import BinaryIO

from visionloop.errors import ImageError, SourceError
from visionloop.ingest.archives.directory import (
    DEFLATED,
    ENCRYPTED_FLAGS,
    FULL_32,
    LOCAL,
    SIZES_FOLLOW_FLAG,
    TODO,
    Entry,
    read_directory,
)

BLOCK = 1 << 16


class ZipReader:
    """A zip archive whose directory was read and checked. Entries may be read by several threads at once."""

    def __init__(self, path: Path, where: str) -> None:
        """Read the directory. Raises SourceError."""
        self._path, self.where = path, where
        try:
            with path.open("rb") as file:
                self._facts = os.fstat(file.fileno())
                self.entries = read_directory(file, self._facts.st_size, where)
        except OSError as exc:
            raise SourceError(where, f"cannot be read ({exc.strerror})", "a zip archive", "Check the file.") from exc

    @property
    def stamp(self) -> str:
        """What changes when the archive does."""
        return f"{self._facts.st_size}-{self._facts.st_mtime_ns}-{self._facts.st_ino}"

    def read(self, entry: Entry, max_bytes: int) -> bytes:
        """Return the bytes of an entry. Raises ImageError (`too_large`, `unreadable`)."""
        if entry.num_bytes > max_bytes:
            raise ImageError(entry.name, "is too large", f"at most {max_bytes} bytes", reason_code="too_large")
        with self.open(entry) as stream:
            data = stream.read(entry.num_bytes)
            stream.read(1)  # only at the end are size and checksum compared
            return data

    def open(self, entry: Entry) -> BinaryIO:
        """Open an entry as a stream, no longer than its stated size. Raises ImageError, also while it is read."""
        if entry.problem:
            raise ImageError(entry.name, entry.problem, "a plain file", reason_code=entry.code)
        try:
            file = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as exc:
            raise _unreadable(entry, f"is in an archive that cannot be opened ({exc.strerror})") from exc
        try:
            facts = os.fstat(file)
            if (facts.st_size, facts.st_mtime_ns, facts.st_ino) != _key(self._facts):
                raise _unreadable(entry, "is in an archive that has changed meanwhile")
            start = _check_local(file, entry)
        except BaseException:
            os.close(file)
            raise
        return io.BufferedReader(_EntryStream(file, entry, start), BLOCK)


class _EntryStream(io.RawIOBase):
    """The bytes of one entry, inflated block by block; at the end size and checksum must be what the directory says."""

    def __init__(self, file: int, entry: Entry, start: int) -> None:
        self._file, self._entry = file, entry
        self._place, self._end = start, start + entry.packed_bytes
        self._inflate = zlib.decompressobj(-zlib.MAX_WBITS) if entry.method == DEFLATED else None
        self._pending = b""
        self._given = self._crc = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        wanted = min(len(buffer), self._entry.num_bytes - self._given)
        data = self._next(wanted) if wanted else b""
        buffer[: len(data)] = data
        self._given += len(data)
        self._crc = zlib.crc32(data, self._crc)
        if not data and len(buffer):
            self._check_end()
        return len(data)

    def _next(self, wanted: int) -> bytes:
        """Return 1 to `wanted` bytes, b"" at the end."""
        while True:
            if not self._pending and self._place < self._end:
                self._pending = os.pread(self._file, min(BLOCK, self._end - self._place), self._place)
                self._place += len(self._pending)
                if not self._pending:
                    raise _unreadable(self._entry, "is cut off")
            if self._inflate is None:
                data, self._pending = self._pending[:wanted], self._pending[wanted:]
                return data
            try:
                data = self._inflate.decompress(self._pending, wanted)
            except zlib.error as exc:
                raise _unreadable(self._entry, f"cannot be inflated ({exc})") from exc
            self._pending = self._inflate.unconsumed_tail
            if data or self._inflate.eof or (not self._pending and self._place >= self._end):
                return data

    def _check_end(self) -> None:
        entry = self._entry
        left_over = False
        if self._inflate is not None:
            # Exactly the stated size was taken; the stream's own end has to follow, and nothing else.
            left_over = bool(not self._inflate.eof and self._next(1)) or not self._inflate.eof
            left_over |= bool(self._inflate.unused_data)
        left_over |= self._place < self._end or bool(self._pending)
        if left_over or self._given != entry.num_bytes:
            raise _unreadable(entry, "does not have the size that the archive says")
        if self._crc != entry.crc:
            raise _unreadable(entry, "does not have the checksum that the archive says")

    def close(self) -> None:
        if not self.closed:
            os.close(self._file)
        super().close()


def _key(facts: os.stat_result) -> tuple[int, int, int]:
    return facts.st_size, facts.st_mtime_ns, facts.st_ino


def _unreadable(entry: Entry, found: str) -> ImageError:
    return ImageError(entry.name, found, "a whole entry", TODO, reason_code="unreadable")


def _check_local(file: int, entry: Entry) -> int:
    """Compare the entry's own header with the directory's; return where its data begin. Raises ImageError."""
    data = os.pread(file, LOCAL.size + len(entry.raw_name), entry.offset)
    if len(data) < LOCAL.size or data[:4] != b"PK\3\4":
        raise _unreadable(entry, "has no header where the archive says")
    _, _, flags, method, _, _, crc, packed, size, name_len, extra_len = LOCAL.unpack_from(data)
    if data[LOCAL.size :] != entry.raw_name or name_len != len(entry.raw_name) or method != entry.method:
        raise _unreadable(entry, "has a header that tells of another file than the archive's directory")
    start: int = entry.offset + LOCAL.size + name_len + extra_len
    stated = (crc, entry.packed_bytes if packed == FULL_32 else packed, entry.num_bytes if size == FULL_32 else size)
    if flags & ENCRYPTED_FLAGS or (
        not flags & SIZES_FOLLOW_FLAG and stated != (entry.crc, entry.packed_bytes, entry.num_bytes)
    ):
        raise _unreadable(entry, "has a header that tells of other sizes than the archive's directory")
    if start + entry.packed_bytes > entry.limit:
        raise _unreadable(entry, "reaches into the next entry")
    return start
