"""Zip archives that strangers made: the directory is checked first, entries are read within bounds.

What makes the archive as a whole untrustworthy is a SourceError; an entry that cannot be used says why in `problem`.
Layout of the format: PKWARE's APPNOTE.TXT, version 6.3.10.

`directory.py` has checked places and sizes before; here each entry has to hold what the directory said of it.
"""

import io
import os
import stat
import struct
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import BinaryIO

from visionloop.errors import ImageError, SourceError

MAX_ENTRIES = 2_000_000
MAX_DIRECTORY_BYTES = 512 << 20
MAX_NAME = 4096
MAX_RATIO = 100  # uncompressed to compressed, of what is large enough to hurt
RATIO_FROM_BYTES = 1 << 20
TOTAL_RATIO_FROM_BYTES = 1 << 30
END = struct.Struct("<4s4H2LH")
END64_LOCATOR = struct.Struct("<4sLQL")
END64 = struct.Struct("<4sQ2H2L4Q")
CENTRAL = struct.Struct("<4s6H3L5H2L")
LOCAL = struct.Struct("<4s5H3L2H")
MAX_COMMENT = 0xFFFF
FULL_16, FULL_32 = 0xFFFF, 0xFFFFFFFF
STORED, DEFLATED = 0, 8
METHODS = {
    1: "shrink",
    6: "implode",
    9: "deflate64",
    12: "bzip2",
    14: "lzma",
    93: "zstd",
    95: "xz",
    98: "ppmd",
    99: "AES",
}
ENCRYPTED_FLAGS = 0x1 | 0x40 | 0x2000
SIZES_FOLLOW_FLAG = 0x8
UTF8_FLAG = 0x800
UNIX = 3
ZIP64_EXTRA = 1
TODO = "Make the archive again, with zip or your system's own tool."
BLOCK = 1 << 16


@dataclass(frozen=True, slots=True)
class Entry:
    """One file of an archive. `offset` is that of its local header, `limit` where the next entry begins.

    `problem` says why it cannot be used ("" when it can), `code` is the code of that.
    """

    name: str
    raw_name: bytes
    method: int
    crc: int
    packed_bytes: int
    num_bytes: int
    offset: int
    limit: int
    code: str = ""
    problem: str = ""


def read_directory(file: BinaryIO, size: int, where: str) -> list[Entry]:
    """Return the files of an archive in the order of its directory. Raises SourceError."""
    count, directory_bytes, offset = _find_directory(file, size, where)
    if count > MAX_ENTRIES or directory_bytes > MAX_DIRECTORY_BYTES:
        raise SourceError(where, f"has {count:,} entries", f"at most {MAX_ENTRIES:,}", "Divide it.")
    file.seek(offset)
    entries = list(_parse_entries(file.read(directory_bytes), count, offset, where))
    _check_places(entries, where)
    total = sum(entry.num_bytes for entry in entries)
    if total > max(TOTAL_RATIO_FROM_BYTES, MAX_RATIO * size):
        found = f"would be {total:,} bytes unpacked, {total // size:,} times its size"
        raise SourceError(where, found, f"at most {MAX_RATIO} times", "Do not trust it.")
    return _mark_problems(entries)


def _find_directory(file: BinaryIO, size: int, where: str) -> tuple[int, int, int]:
    """Return (number of entries, bytes of the directory, its offset). Raises SourceError."""
    start = max(0, size - END.size - MAX_COMMENT)
    file.seek(start)
    tail = file.read(size - start)
    place = tail.rfind(b"PK\5\6")
    if place < 0 or len(tail) - place < END.size:
        raise SourceError(where, "is no zip archive, or is cut off", "a zip archive", TODO)
    _, disk, start_disk, here, count, directory_bytes, offset, comment = END.unpack_from(tail, place)
    end = start + place
    if place + END.size + comment != len(tail):
        raise SourceError(where, "has data after its end", "nothing after the archive", TODO)
    if tail[max(0, place - END64_LOCATOR.size) : place][:4] == b"PK\6\7":
        small = (disk, start_disk, here, count, directory_bytes, offset)
        end, *large = _read_end64(file, tail[place - END64_LOCATOR.size : place], end - END64_LOCATOR.size, where)
        if any(a not in (b, FULL_16, FULL_32) for a, b in zip(small, large, strict=True)):
            raise SourceError(where, "has two ends that do not agree", "one truth", TODO)
        disk, start_disk, here, count, directory_bytes, offset = large
    if disk or start_disk or here != count:
        raise SourceError(where, "is one of several parts", "a whole archive", "Join the parts first.")
    if offset + directory_bytes != end:
        raise SourceError(where, "has a directory that is not where its end says", "no data before or between", TODO)
    return count, directory_bytes, offset


def _read_end64(file: BinaryIO, locator: bytes, limit: int, where: str) -> tuple[int, ...]:
    """Return (its offset, disk, start disk, entries here, entries, bytes, offset). Raises SourceError."""
    _, _, offset, _ = END64_LOCATOR.unpack(locator)
    file.seek(min(offset, limit))
    data = file.read(END64.size)
    if len(data) < END64.size or data[:4] != b"PK\6\6":
        raise SourceError(where, "has no zip64 end where it says", "a whole archive", TODO)
    _, record_bytes, _, _, disk, start_disk, here, count, directory_bytes, directory_offset = END64.unpack(data)
    if offset + 12 + record_bytes != limit:
        raise SourceError(where, "has a zip64 end of a size that does not fit", "a whole archive", TODO)
    return offset, disk, start_disk, here, count, directory_bytes, directory_offset


def _parse_entries(data: bytes, count: int, limit: int, where: str) -> Iterator[Entry]:
    """Yield the files of a directory; folders are left out. Raises SourceError."""
    place = 0
    for number in range(1, count + 1):
        if len(data) - place < CENTRAL.size or data[place : place + 4] != b"PK\1\2":
            raise SourceError(where, f"has a directory that breaks off at entry {number:,}", f"{count:,}", TODO)
        fields = CENTRAL.unpack_from(data, place)
        (made_by, _, flags, method, _, _) = fields[1:7]
        (crc, packed, size, name_len, extra_len, comment_len, disk, _, mode, offset) = fields[7:]
        place += CENTRAL.size
        raw, extra = data[place : place + name_len], data[place + name_len : place + name_len + extra_len]
        place += name_len + extra_len + comment_len
        if place > len(data):
            raise SourceError(where, f"has a directory that breaks off at entry {number:,}", f"{count:,}", TODO)
        size, packed, offset = _widen((size, packed, offset), extra, where, number)
        if offset + LOCAL.size + name_len + packed > limit or disk not in (0, FULL_16):
            raise SourceError(where, f"has an entry, {number:,}, that lies outside of it", "entries inside", TODO)
        entry = Entry(_decode_name(raw, flags), raw, method, crc, packed, size, offset, limit)
        code, problem = _find_problem(entry, flags, mode >> 16 if made_by >> 8 == UNIX else 0)
        yield replace(entry, code=code, problem=problem) if code else entry
    if place != len(data):
        raise SourceError(where, "has more in its directory than it says", f"{count:,} entries", TODO)


def _widen(values: tuple[int, ...], extra: bytes, where: str, number: int) -> list[int]:
    """Return sizes and offset, from the zip64 field where the header has no room. Raises SourceError."""
    wide = b""
    place = 0
    while place + 4 <= len(extra):
        kind, length = struct.unpack_from("<HH", extra, place)
        if kind == ZIP64_EXTRA:
            wide = extra[place + 4 : place + 4 + length]
        place += 4 + length
    result = []
    for value in values:
        if value != FULL_32:
            result.append(value)
        elif len(wide) < 8:
            raise SourceError(where, f"has no zip64 sizes for entry {number:,}", "a whole archive", TODO)
        else:
            result.append(int.from_bytes(wide[:8], "little"))
            wide = wide[8:]
    return result


def _decode_name(raw: bytes, flags: int) -> str:
    """Return a name as text: UTF-8 where it is, also without the flag (as macOS writes); else code page 437."""
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return raw.decode("utf-8", "backslashreplace") if flags & UTF8_FLAG else raw.decode("cp437")


def _find_problem(entry: Entry, flags: int, mode: int) -> tuple[str, str]:
    """Return (code, why the entry cannot be used); two empty texts when it can."""
    name, packed, size = entry.name, entry.packed_bytes, entry.num_bytes
    method = METHODS.get(entry.method, f"method {entry.method}")
    found = (
        ("unsafe_path", "its name is not printable, too long, or has a backslash", not _is_plain(name)),
        ("unsafe_path", "its name leaves the archive", _leaves(name)),
        ("unsafe_path", "it is a link or a device", stat.S_IFMT(mode) not in (0, stat.S_IFREG, stat.S_IFDIR)),
        ("encrypted", "it is encrypted", flags & ENCRYPTED_FLAGS),
        ("unsupported_compression", f"it is packed by {method}", entry.method not in (STORED, DEFLATED)),
        ("too_large", f"it grows from {packed:,} to {size:,} bytes", size > max(RATIO_FROM_BYTES, MAX_RATIO * packed)),
    )
    return next(((code, problem) for code, problem, holds in found if holds), ("", ""))


def _is_plain(name: str) -> bool:
    return name.isprintable() and "\\" not in name and len(name) <= MAX_NAME


def _leaves(name: str) -> bool:
    return name[1:2] == ":" or not {"", ".", ".."}.isdisjoint(name.removesuffix("/").split("/"))


def _check_places(entries: list[Entry], where: str) -> None:
    """Set where each entry must end. Raises SourceError when two share bytes, or something lies before the first."""
    order = sorted(range(len(entries)), key=lambda i: entries[i].offset)
    if order and entries[order[0]].offset:
        found = f"has {entries[order[0]].offset:,} bytes before its first entry"
        raise SourceError(where, found, "nothing before the archive", TODO)
    for i, following in pairwise(order):
        entry, limit = entries[i], entries[following].offset
        if entry.offset + LOCAL.size + len(entry.raw_name) + entry.packed_bytes > limit:
            raise SourceError(where, "has entries that overlap", "each byte in one entry", "Do not trust it.")
        entries[i] = replace(entry, limit=limit)


def _mark_problems(entries: list[Entry]) -> list[Entry]:
    """Mark all entries that share a name, and drop the folders."""
    files = [entry for entry in entries if not entry.name.endswith("/") or entry.code]
    counts = Counter(entry.name for entry in files)
    return [
        replace(entry, code="duplicate_name", problem=f"{counts[entry.name]} entries have this name")
        if counts[entry.name] > 1
        else entry
        for entry in files
    ]


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
