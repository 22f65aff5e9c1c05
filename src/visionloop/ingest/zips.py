"""Zip archives from strangers: the standard library's `zipfile` reads them, the rules here decide what is accepted.

An archive that cannot be trusted as a whole is a SourceError; a member that cannot be used says why in `problem`.
`zipfile` leaves these checks to its caller (some of them until Python 3.11.8): bytes before, between and behind the
archive, members that share bytes, the number of members, and whether a member's own header and length agree with the
directory. Names of the fields: PKWARE's APPNOTE.TXT, version 6.3.10. Nothing is ever extracted to disk.
"""

import copy
import io
import os
import stat
import struct
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import BinaryIO, NamedTuple
from zipfile import ZIP_DEFLATED, ZIP_STORED, BadZipFile, ZipExtFile, ZipFile, ZipInfo

from visionloop.errors import ImageError, SourceError
from visionloop.ingest.paths.names import is_text
from visionloop.ingest.zip_names import UNIX, ZipNames, encode_name

MAX_MEMBERS = 2_000_000
MAX_DIRECTORY_BYTES = 512 << 20
MAX_NAME = 4096
MAX_RATIO = 100  # unpacked to packed bytes, of what is large enough to hurt
RATIO_FROM_BYTES = 1 << 20
TOTAL_RATIO_FROM_BYTES = 1 << 30
END = struct.Struct("<4s4H2LH")
END64_LOCATOR = struct.Struct("<4sLQL")
END64 = struct.Struct("<4sQ2H2L4Q")
LOCAL = struct.Struct("<4s5H3L2H")
MEMBER_SIGNATURE = b"PK\1\2"
MAX_COMMENT = 0xFFFF
FULL_16, FULL_32 = 0xFFFF, 0xFFFFFFFF
METHODS = {9: "deflate64", 12: "bzip2", 14: "lzma", 93: "zstd", 95: "xz", 98: "ppmd"}
ENCRYPTED_FLAGS = 0x1 | 0x40 | 0x2000
SIZES_FOLLOW_FLAG = 0x8
TODO = "Make the archive again, with zip or your system's own tool."
BLOCK = 1 << 16


@dataclass(frozen=True, slots=True)
class ZipMember:
    """One file of an archive; its bytes end before `limit`, where the next one begins.

    `problem` says why it cannot be used ("" when it can), `code` is the code of that.
    """

    name: str
    info: ZipInfo
    limit: int
    code: str = ""
    problem: str = ""


class _Directory(NamedTuple):
    """What the end of an archive says of its directory."""

    disk: int
    start_disk: int
    num_here: int
    num_members: int
    directory_bytes: int
    offset: int


def read_members(
    file: BinaryIO, size: int, where: str, encoding: str | None = None, command: str = "visionloop ingest ZIP"
) -> tuple[list[ZipMember], str]:
    """Return the files of an archive in the order of its directory, and what to tell of a guessed encoding, or "".

    `encoding` is that of names that are not UTF-8; None: guessed. `command` names the archive on the command line.

    Raises:
        SourceError: the archive is not to be trusted, or the encoding of its names is not clear.
    """
    end = _read_end(file, size, where)
    _check_directory_size(file, end, where)
    try:
        infos = ZipFile(file).infolist()
    except (BadZipFile, NotImplementedError, UnicodeDecodeError, struct.error) as exc:
        raise SourceError(where, f"has a directory that cannot be read ({exc})", "a zip archive", TODO) from exc
    # The end has 16 bits for the number, and macOS makes no zip64 end: it writes 70,000 as 4,464.
    if end.num_members not in (len(infos), len(infos) & FULL_16):
        raise SourceError(where, f"has {len(infos):,} entries", f"{end.num_members:,}, as its end says", TODO)
    names = ZipNames(infos, encoding, where, command)
    members = _make_members(infos, end.offset, where, names)
    total = sum(info.file_size for info in infos)
    if total > max(TOTAL_RATIO_FROM_BYTES, MAX_RATIO * size):
        found = f"would be {total:,} bytes unpacked, {total // size:,} times its size"
        raise SourceError(where, found, f"at most {MAX_RATIO} times", "Do not trust it.")
    return _mark_problems(members), names.guessed


def _read_end(file: BinaryIO, size: int, where: str) -> _Directory:
    """Return what the end says, or the zip64 end where there is one. Raises SourceError when both do not agree."""
    start = max(0, size - END.size - MAX_COMMENT)
    file.seek(start)
    tail = file.read(size - start)
    place = tail.rfind(b"PK\5\6")
    if place < 0 or len(tail) - place < END.size:
        raise SourceError(where, "is no zip archive, or is cut off", "a zip archive", TODO)
    *fields, comment = END.unpack_from(tail, place)[1:]
    small = end = _Directory(*fields)
    place_of_end = start + place
    if place + END.size + comment != len(tail):
        raise SourceError(where, "has data after its end", "nothing after the archive", TODO)
    locator = tail[max(0, place - END64_LOCATOR.size) : place]
    if locator[:4] == b"PK\6\7":
        place_of_end -= END64_LOCATOR.size + END64.size
        file.seek(max(0, place_of_end))
        _, record_bytes, _, _, *fields = END64.unpack(file.read(END64.size).ljust(END64.size, b"\0"))
        end = _Directory(*fields)
        if END64_LOCATOR.unpack(locator)[2] != place_of_end or record_bytes != END64.size - 12:
            raise SourceError(where, "has a zip64 end that is not where it says", "a whole archive", TODO)
        if any(a not in (b, FULL_16, FULL_32) for a, b in zip(small, end, strict=True)):
            raise SourceError(where, "has two ends that do not agree", "two that say the same", TODO)
    if end.disk or end.start_disk or end.num_here != end.num_members:
        raise SourceError(where, "is one of several parts", "a whole archive", "Join the parts first.")
    if end.offset + end.directory_bytes != place_of_end:
        raise SourceError(where, "has a directory that is not where its end says", "no data before or between", TODO)
    return end


def _check_directory_size(file: BinaryIO, end: _Directory, where: str) -> None:
    """Raise SourceError for a directory that would take too much memory; the stated number may be a lie."""
    file.seek(end.offset)
    if end.directory_bytes <= MAX_DIRECTORY_BYTES:
        most = file.read(end.directory_bytes).count(MEMBER_SIGNATURE)
    if end.directory_bytes > MAX_DIRECTORY_BYTES or most > MAX_MEMBERS:
        found = f"has a directory of {end.directory_bytes:,} bytes"
        raise SourceError(where, found, f"at most {MAX_MEMBERS:,} entries", "Divide it.")


def _make_members(infos: list[ZipInfo], end: int, where: str, names: ZipNames) -> list[ZipMember]:
    """Return all members, folders too. Raises SourceError when one lies outside, or two share bytes."""
    for number, info in enumerate(infos, start=1):
        if FULL_32 in (info.file_size, info.compress_size, info.header_offset):
            raise SourceError(where, f"has no zip64 sizes for entry {number:,}", "a whole archive", TODO)
        if _find_earliest_end(info) > end or info.volume not in (0, FULL_16):
            raise SourceError(where, f"has an entry, {number:,}, that lies outside of it", "entries inside", TODO)
    order = sorted(range(len(infos)), key=lambda i: infos[i].header_offset)
    if order and infos[order[0]].header_offset:
        found = f"has {infos[order[0]].header_offset:,} bytes before its first entry"
        raise SourceError(where, found, "nothing before the archive", TODO)
    limits = [end] * len(infos)
    for i, following in pairwise(order):
        limits[i] = infos[following].header_offset
        if _find_earliest_end(infos[i]) > limits[i]:
            raise SourceError(where, "has entries that overlap", "each byte in one entry", "Do not trust it.")
    return [_make_member(info, names.decode(info), limit) for info, limit in zip(infos, limits, strict=True)]


def _find_earliest_end(info: ZipInfo) -> int:
    """Return where a member ends if its own header has no extra field, whose length only that header tells."""
    return info.header_offset + LOCAL.size + len(encode_name(info)) + info.compress_size


def _make_member(info: ZipInfo, name: str, limit: int) -> ZipMember:
    packed, size = info.compress_size, info.file_size
    mode = info.external_attr >> 16 if info.create_system == UNIX else 0
    method = METHODS.get(info.compress_type, f"method {info.compress_type}")
    is_known = info.compress_type in (ZIP_STORED, ZIP_DEFLATED)
    found = (
        ("unsafe_path", "its name has control characters or a backslash, or is too long", not _is_plain(name)),
        ("unsafe_path", "its name leaves the archive", _leaves(name)),
        ("unsafe_path", "it is a link or a device", stat.S_IFMT(mode) not in (0, stat.S_IFREG, stat.S_IFDIR)),
        ("encrypted", "it is encrypted", info.flag_bits & ENCRYPTED_FLAGS),
        ("unsupported_compression", f"it is packed by {method}", not is_known),
        ("too_large", f"it grows from {packed:,} to {size:,} bytes", size > max(RATIO_FROM_BYTES, MAX_RATIO * packed)),
    )
    code, problem = next(((code, problem) for code, problem, holds in found if holds), ("", ""))
    return ZipMember(name, info, limit, code, problem)


def _is_plain(name: str) -> bool:
    return is_text(name) and "\\" not in name and len(name) <= MAX_NAME


def _leaves(name: str) -> bool:
    return name[1:2] == ":" or (name != "./" and not {"", ".", ".."}.isdisjoint(name.removesuffix("/").split("/")))


def _mark_problems(members: list[ZipMember]) -> list[ZipMember]:
    """Mark all members that share a name, and drop the folders."""
    files = [member for member in members if not member.name.endswith("/") or member.code]
    counts = Counter(member.name for member in files)
    return [
        replace(member, code="duplicate_name", problem=f"{counts[member.name]} entries have this name")
        if counts[member.name] > 1
        else member
        for member in files
    ]


class ZipReader:
    """A zip archive whose directory was read and checked. Members may be read by several threads at once."""

    def __init__(
        self, path: Path, where: str, encoding: str | None = None, command: str = "visionloop ingest ZIP"
    ) -> None:
        """Read the directory. Raises SourceError."""
        self._path = path
        try:
            with path.open("rb") as file:
                self._state = _read_state(file)
                self.members, self.guessed = read_members(file, self._state[0], where, encoding, command)
        except OSError as exc:
            raise SourceError(where, f"cannot be read ({exc.strerror})", "a zip archive", "Check the file.") from exc

    @property
    def stamp(self) -> str:
        """What changes when the archive does."""
        return "-".join(map(str, self._state))

    def read(self, member: ZipMember, max_bytes: int) -> bytes:
        """Return the bytes of a member. Raises ImageError (`too_large`, `unreadable`)."""
        size = member.info.file_size
        if size > max_bytes:
            raise ImageError(member.name, "is too large", f"at most {max_bytes} bytes", reason_code="too_large")
        with self.open(member) as stream:
            return stream.read(size + 1)  # only at its end are length and checksum compared

    def open(self, member: ZipMember) -> BinaryIO:
        """Open a member as a stream, no longer than its stated size. Raises ImageError, also while it is read."""
        if member.problem:
            raise ImageError(member.name, member.problem, "a plain file", reason_code=member.code)
        try:
            file = self._path.open("rb", buffering=0)
        except OSError as exc:
            raise _unreadable(member, f"is in an archive that cannot be opened ({exc.strerror})") from exc
        try:
            if _read_state(file) != self._state:
                raise _unreadable(member, "is in an archive that has changed meanwhile")
            _skip_header(file, member)
            return io.BufferedReader(_Body(file, member), BLOCK)
        except BaseException:
            file.close()
            raise


class _Body(io.RawIOBase):
    """The unpacked bytes of one member; at the end length and checksum must be what the directory says."""

    def __init__(self, file: io.FileIO, member: ZipMember) -> None:
        self._member, self._num_read = member, 0
        # `zipfile` stops at the stated length, whatever follows. With room for one byte more a longer one shows.
        info = copy.copy(member.info)
        info.file_size += 1
        self._stream = ZipExtFile(file, "r", info, None, True)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        with _translated(self._member):
            data = self._stream.read(len(buffer))
        buffer[: len(data)] = data
        self._num_read += len(data)
        size = self._member.info.file_size
        if self._num_read > size or (not data and len(buffer) and self._num_read < size):
            raise _unreadable(self._member, "does not have the size that the archive says")
        return len(data)

    def close(self) -> None:
        self._stream.close()
        super().close()


@contextmanager
def _translated(member: ZipMember) -> Iterator[None]:
    """Turn what `zipfile` raises into an ImageError."""
    try:
        yield
    except BadZipFile as exc:
        raise _unreadable(member, "does not have the size or the checksum that the archive says") from exc
    except zlib.error as exc:
        raise _unreadable(member, f"cannot be inflated ({exc})") from exc
    except (EOFError, OSError) as exc:
        raise _unreadable(member, "is cut off, or cannot be read") from exc


def _read_state(file: io.IOBase) -> tuple[int, int, int]:
    """Return what changes when a file is written again."""
    facts = os.fstat(file.fileno())
    return facts.st_size, facts.st_mtime_ns, facts.st_ino


def _unreadable(member: ZipMember, found: str) -> ImageError:
    return ImageError(member.name, found, "a whole entry", TODO, reason_code="unreadable")


def _skip_header(file: io.FileIO, member: ZipMember) -> None:
    """Compare the member's own header with the directory's, and go to where its bytes begin. Raises ImageError."""
    info, name = member.info, encode_name(member.info)
    file.seek(info.header_offset)
    data = file.read(LOCAL.size + len(name))
    if len(data) < LOCAL.size or data[:4] != b"PK\3\4":
        raise _unreadable(member, "has no header where the archive says")
    _, _, flags, method, _, _, crc, packed, size, name_len, extra_len = LOCAL.unpack_from(data)
    if data[LOCAL.size :] != name or name_len != len(name) or method != info.compress_type:
        raise _unreadable(member, "has a header that tells of another file than the archive's directory")
    stated = (crc, info.compress_size if packed == FULL_32 else packed, info.file_size if size == FULL_32 else size)
    if flags & ENCRYPTED_FLAGS or (
        not flags & SIZES_FOLLOW_FLAG and stated != (info.CRC, info.compress_size, info.file_size)
    ):
        raise _unreadable(member, "has a header that tells of other sizes than the archive's directory")
    start = info.header_offset + LOCAL.size + name_len + extra_len
    if start + info.compress_size > member.limit:
        raise _unreadable(member, "reaches into the next entry")
    file.seek(start)
