"""Read the directory of zip archives that strangers made: every size, place and name is checked before it is believed.

What makes the archive as a whole untrustworthy is a SourceError; an entry that cannot be used says why in `problem`.
Layout of the format: PKWARE's APPNOTE.TXT, version 6.3.10.
"""

import stat
import struct
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import BinaryIO

from visionloop.errors import SourceError

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
