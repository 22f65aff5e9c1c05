"""Archives that were made to harm: each is refused in the way that is expected, and writes nothing."""

import io
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fakes import make_image
from source_runs import Run, run_source
from visionloop.errors import ImageError, SourceError
from visionloop.ingest import zips

PHOTO = make_image(1)
LINK, DEVICE = 0o120777 << 16, 0o060666 << 16


def pack(*entries: tuple[Any, bytes], method: int = zipfile.ZIP_STORED) -> bytearray:
    """Make a zip of (name or ZipInfo, bytes), with a good photo of each class in front."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, data in (("cat/1.png", PHOTO), ("dog/1.png", make_image(2)), *entries):
            archive.writestr(name, data)
    return bytearray(buffer.getvalue())


def info(name: str, *, mode: int = 0, flags: int = 0) -> zipfile.ZipInfo:
    made = zipfile.ZipInfo(name)
    made.create_system, made.external_attr, made.flag_bits = 3, mode, flags
    return made


def rename(data: bytearray, old: bytes, new: bytes) -> bytearray:
    """Write another name of the same length into both headers, as no tool would."""
    assert len(old) == len(new)
    return data.replace(old, new)


def central(data: bytearray, number: int) -> int:
    """The offset of a directory entry; -1 is the last."""
    found, place = [], data.find(b"PK\1\2")
    while place >= 0:
        found.append(place)
        place = data.find(b"PK\1\2", place + 4)
    return found[number]


def local(data: bytearray, number: int) -> int:
    return int.from_bytes(data[central(data, number) + 42 :][:4], "little")


def poke(data: bytearray, offset: int, layout: str, *values: Any) -> bytearray:
    struct.pack_into(layout, data, offset, *values)
    return data


def end(data: bytearray) -> int:
    return data.rfind(b"PK\5\6")


def deflate_bomb() -> bytearray:
    return pack(("cat/bomb.png", b"\0" * (10 << 20)), method=zipfile.ZIP_DEFLATED)


def lying_bomb() -> bytearray:
    """Says 1,000 bytes in both headers, inflates to 10 MB."""
    data = deflate_bomb()
    poke(data, central(data, -1) + 24, "<L", 1000)
    return poke(data, local(data, -1) + 22, "<L", 1000)


def overlapping() -> bytearray:
    """All entries of the directory point into one body, as in D. Fifield's zip bomb."""
    data = pack(("cat/2.png", PHOTO), ("cat/3.png", PHOTO))
    return poke(data, central(data, -1) + 42, "<L", local(data, -2))


def quoting() -> bytearray:
    """One entry's body takes in the next entry's header."""
    data = pack(("cat/2.png", PHOTO), ("cat/3.png", PHOTO))
    size = len(PHOTO) + 60
    poke(data, central(data, -2) + 20, "<2L", size, size)
    return poke(data, local(data, -2) + 18, "<2L", size, size)


def zip64(*, count: int, offset: int = 0, size: int = 44, end_count: int = 2) -> bytearray:
    """Put a zip64 end before the end, which then disagrees with it unless `count` is right."""
    data = pack()
    place = end(data)
    poke(data, place + 8, "<2H", end_count, end_count)
    directory_bytes, directory = struct.unpack_from("<2L", data, place + 12)
    record = struct.pack("<4sQ2H2L4Q", b"PK\6\6", size, 45, 45, 0, 0, count, count, directory_bytes, directory + offset)
    locator = struct.pack("<4sLQL", b"PK\6\7", 0, place, 1)
    return data[:place] + record + locator + data[place:]


def after_a_program() -> bytes:
    """A script in front, with all offsets right."""
    buffer = io.BytesIO(b"#!/bin/sh\nexit 0\n")
    with zipfile.ZipFile(buffer, "a") as archive:
        archive.writestr("cat/1.png", PHOTO)
    return buffer.getvalue()


def many_entries() -> bytearray:
    data = pack()
    return poke(data, end(data) + 8, "<2H", 60_000, 60_000)


def no_directory() -> bytearray:
    data = pack()
    return poke(data, central(data, 0), "<4s", b"PK\1\3")


def broken_extra() -> bytearray:
    """The last name's final bytes become an extra field that claims to be longer than it is."""
    data = pack(("cat/2.png" + "\xff" * 4, PHOTO))
    place = central(data, -1)
    size = int.from_bytes(data[place + 28 : place + 30], "little")
    return poke(data, place + 28, "<2H", size - 4, 4)


def encrypted() -> bytearray:
    data = pack(("cat/2.png", PHOTO))
    poke(data, central(data, -1) + 8, "<H", 1)
    return poke(data, local(data, -1) + 6, "<H", 1)


def method(number: int) -> bytearray:
    data = pack(("cat/2.png", PHOTO))
    poke(data, central(data, -1) + 10, "<H", number)
    return poke(data, local(data, -1) + 8, "<H", number)


def broken_body() -> bytearray:
    data = pack(("cat/2.png", PHOTO), method=zipfile.ZIP_DEFLATED)
    start = local(data, -1) + 30 + len("cat/2.png")
    data[start : start + 8] = b"\xff" * 8
    return data


def changed_byte() -> bytearray:
    data = pack(("cat/2.png", PHOTO))
    data[local(data, -1) + 30 + len("cat/2.png") + 5] ^= 1
    return data


def another_local_name() -> bytearray:
    data = pack(("cat/2.png", PHOTO))
    data[local(data, -1) + 30 : local(data, -1) + 39] = b"etc/2.png"
    return data


def local_size() -> bytearray:
    data = pack(("cat/2.png", PHOTO))
    return poke(data, local(data, -1) + 22, "<L", 5)


def stored_with_two_sizes() -> bytearray:
    data = pack(("cat/2.png", PHOTO))
    return poke(data, central(data, -1) + 24, "<L", len(PHOTO) * 2)


def with_more_than_its_size() -> bytearray:
    """A deflated body that goes on after the stated size, with the checksum of the first bytes."""
    data = pack(("cat/2.png", PHOTO + b"payload"), method=zipfile.ZIP_DEFLATED)
    for place in (central(data, -1) + 16, local(data, -1) + 14):
        poke(data, place, "<L", zlib.crc32(PHOTO))
        poke(data, place + 8, "<L", len(PHOTO))
    return data


def duplicate() -> bytearray:
    return rename(pack(("cat/2.png", PHOTO), ("cat/3.png", make_image(3))), b"cat/3.png", b"cat/2.png")


def nested() -> bytearray:
    inner = bytes(pack())
    return pack(("cat/inner.zip", inner), ("dog/quine.zip", inner))


# What is wrong, the archive, and how it is refused: the message of the whole, or the code of the entry.
WHOLE: dict[str, tuple[Callable[[], bytes], str]] = {
    "empty": (lambda: b"", "is no zip archive, or is cut off"),
    "text": (lambda: b"not a zip" * 100, "is no zip archive, or is cut off"),
    "tar": (lambda: b"cat/1.png".ljust(257, b"\0") + b"ustar" + bytes(2000), "is no zip archive"),
    "cut off": (lambda: pack()[:-30], "is no zip archive, or is cut off"),
    "data after its end": (lambda: pack() + b"#!/bin/sh", "has data after its end; expected nothing after"),
    "data before it": (lambda: b"#!/bin/sh\n" + pack(), "has a directory that is not where its end says"),
    "overlapping entries": (overlapping, "has entries that overlap; expected each byte in one entry"),
    "quoting bomb": (quoting, "has entries that overlap"),
    "zip64 that lies": (lambda: zip64(count=3), "has two ends that do not agree"),
    "zip64 that points elsewhere": (lambda: zip64(count=2, offset=-20), "has two ends that do not agree"),
    "zip64 end of another size": (lambda: zip64(count=2, size=45), "has a zip64 end that is not where it says"),
    "more entries than it has": (many_entries, "has 2 entries; expected 60,000, as its end says"),
    "fewer entries than it has": (lambda: poke(d := pack(), end(d) + 8, "<2H", 1, 1), "has 2 entries; expected 1, as"),
    "more entries in a zip64 end": (lambda: zip64(count=2 + (1 << 16), end_count=2), "has two ends that do not agree"),
    "Finder's count in a zip64 end": (
        lambda: zip64(count=2 + (1 << 16), end_count=0xFFFF),
        "has 2 entries; expected 65,538",
    ),
    "no directory where it should be": (no_directory, r"cannot be read \(Bad magic number for central directory"),
    "a name that is not the UTF-8 it says": (
        lambda: rename(pack(("cat/ü.png", PHOTO)), b"\xc3\xbc", b"\xff\xff"),
        "'utf-8' codec",
    ),
    "a version of the future": (lambda: poke(d := pack(), central(d, -1) + 6, "<H", 99), "zip file version 9.9"),
    "a broken extra field": (broken_extra, r"cannot be read \(Corrupt extra field"),
    "entry of another disk": (lambda: poke(d := pack(), central(d, -1) + 34, "<H", 3), "entry, 2, that lies outside"),
    "several disks": (lambda: poke(d := pack(), end(d) + 4, "<2H", 1, 1), "is one of several parts"),
    "entry outside": (lambda: poke(d := pack(), central(d, -1) + 42, "<L", 1 << 30), "entry, 2, that lies outside"),
    "zip64 sizes missing": (lambda: poke(d := pack(), central(d, -1) + 24, "<L", 0xFFFFFFFF), "has no zip64 sizes"),
    "a program before it": (after_a_program, "has 17 bytes before its first entry"),
}
ENTRIES: dict[str, tuple[Callable[[], bytes], str, str]] = {
    "path upwards": (lambda: pack(("../../evil.png", PHOTO)), "../../evil.png", "unsafe_path"),
    "path upwards inside": (lambda: pack(("cat/../../evil.sh", b"x")), "cat/../../evil.sh", "unsafe_path"),
    "absolute path": (lambda: pack(("/etc/evil.png", PHOTO)), "/etc/evil.png", "unsafe_path"),
    "drive": (lambda: pack(("C:/evil.png", PHOTO)), "C:/evil.png", "unsafe_path"),
    "backslashes": (
        lambda: rename(pack(("cat/_._evil.png", PHOTO)), b"cat/_._", b"..\\..\\/"),
        "..\\..\\/evil.png",
        "unsafe_path",
    ),
    "NUL": (lambda: rename(pack(("cat/a_b.png", PHOTO)), b"a_b", b"a\0b"), "cat/a\\x00b.png", "unsafe_path"),
    "line end": (lambda: pack(("cat/a\nb.png", PHOTO)), "cat/a\\nb.png", "unsafe_path"),
    "link": (lambda: pack((info("cat/2.png", mode=LINK), b"/etc/passwd")), "cat/2.png", "unsafe_path"),
    "device": (lambda: pack((info("cat/2.png", mode=DEVICE), b"")), "cat/2.png", "unsafe_path"),
    "two of one name": (duplicate, "cat/2.png", "duplicate_name"),
    "encrypted": (encrypted, "cat/2.png", "encrypted"),
    "bzip2": (lambda: method(12), "cat/2.png", "unsupported_compression"),
    "unknown method": (lambda: method(77), "cat/2.png", "unsupported_compression"),
    "bomb": (deflate_bomb, "cat/bomb.png", "too_large"),
    "bomb that lies": (lying_bomb, "cat/bomb.png", "unreadable"),
    "broken body": (broken_body, "cat/2.png", "unreadable"),
    "changed byte": (changed_byte, "cat/2.png", "unreadable"),
    "another name in its header": (another_local_name, "cat/2.png", "unreadable"),
    "another size in its header": (local_size, "cat/2.png", "unreadable"),
    "two sizes": (stored_with_two_sizes, "cat/2.png", "unreadable"),
    "more than its size": (with_more_than_its_size, "cat/2.png", "unreadable"),
}


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Path]:
    """A workspace; nothing may be written outside of it, nor into it."""
    (tmp_path / "ws").mkdir()
    yield tmp_path / "ws"
    assert {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")} <= {"ws", "ws/a.zip"}


def read_all(run: Run) -> list[tuple[str, str]]:
    """Read every item, as the engine does; return what was refused, then or before."""
    refused = run.codes()
    for item in run.items:
        try:
            item.read(50_000_000)
        except ImageError as exc:
            refused.append((item.origin.partition(":")[2], exc.reason_code))
    return refused


@pytest.mark.parametrize("case", WHOLE)
def test_archive_that_is_refused_as_a_whole(home: Path, case: str) -> None:
    make, message = WHOLE[case]
    (home / "a.zip").write_bytes(make())
    with pytest.raises(SourceError, match=message):
        run_source(home, kind="archive", path="a.zip")


@pytest.mark.parametrize("case", ENTRIES)
def test_archive_with_an_entry_that_is_refused(home: Path, case: str) -> None:
    make, name, code = ENTRIES[case]
    (home / "a.zip").write_bytes(make())
    run = run_source(home, kind="archive", path="a.zip")
    assert read_all(run) == [(name, code)]
    assert {i.origin for i in run.items} >= {"archive:cat/1.png", "archive:dog/1.png"}


def test_archive_of_many_small_bombs_is_refused_as_a_whole(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bombs = [(f"cat/{i}.bmp", bytes(1 << 20)) for i in range(4)]  # each just small enough to pass by itself
    (home / "a.zip").write_bytes(pack(*bombs, method=zipfile.ZIP_DEFLATED))
    assert len(run_source(home, kind="archive", path="a.zip").items) == 6
    monkeypatch.setattr(zips, "TOTAL_RATIO_FROM_BYTES", 2 << 20)
    with pytest.raises(
        SourceError, match=r"would be 4,19\d,\d+ bytes unpacked, \d+ times its size; expected at most 100"
    ):
        run_source(home, kind="archive", path="a.zip")


def finder(names: list[str]) -> bytes:
    """An archive as macOS makes it: of the number of entries only the last 16 bits, and no zip64 end."""
    files, directory = bytearray(), bytearray()
    for name in names:
        fields = (20, 0, 0, 0, 0, 0, 0, 0, len(name), 0)
        directory += struct.pack("<4s6H3L5H2L", b"PK\1\2", 20, *fields, 0, 0, 0, 0, len(files)) + name.encode()
        files += struct.pack("<4s5H3L2H", b"PK\3\4", *fields) + name.encode()
    count = len(names) & 0xFFFF
    end_record = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, count, count, len(directory), len(files), 0)
    return bytes(files + directory + end_record)


def test_archive_of_finder_with_more_entries_than_it_can_count(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [f"{'cat' if i % 2 else 'dog'}/{i:05}.png" for i in range(65_600)]
    (home / "a.zip").write_bytes(finder(names))
    run = run_source(home, kind="archive", path="a.zip")
    assert [i.origin for i in run.items] == [f"archive:{name}" for name in sorted(names)]
    assert run.items[-1].read(10) == b""
    monkeypatch.setattr(zips, "MAX_MEMBERS", 65_599)
    with pytest.raises(SourceError, match="has a directory of 3,870,400 bytes; expected at most 65,599 entries"):
        run_source(home, kind="archive", path="a.zip")


def test_archives_inside_an_archive_stay_closed(home: Path) -> None:
    (home / "a.zip").write_bytes(nested())
    run = run_source(home, kind="archive", path="a.zip")
    assert [i.origin for i in run.items] == ["archive:cat/1.png", "archive:dog/1.png"]
    assert "archives inside, which are not opened: 2" in run.told[0]
