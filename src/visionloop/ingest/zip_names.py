"""The names in a zip, which says of them only whether they are UTF-8: how they are decoded, or who must be asked. Pure.

Names of the fields: PKWARE's APPNOTE.TXT, version 6.3.10.
"""

import struct
import zlib
from collections.abc import Sequence
from zipfile import ZipInfo

from visionloop.errors import SourceError

UTF8_FLAG = 0x800
UNIX = 3
UNICODE_PATH = 0x7075
SAMPLE = 200
# Encodings of names that are offered, the most frequent first; and the letters of code page 437.
ENCODINGS = ("gbk", "shift_jis", "cp866", "euc_kr", "big5", "cp1252", "cp850", "cp437")
DOS_LETTERS = frozenset((*range(0x80, 0x9B), *range(0xA0, 0xA6), 0xE1))
DOS_CAPITALS = frozenset((0x80, 0x8E, 0x8F, 0x90, 0x92, 0x99, 0x9A, 0xA5))


class ZipNames:
    """How the names of one archive are read: their encoding, and whether `\\` stands between folders."""

    def __init__(self, infos: Sequence[ZipInfo], encoding: str | None, where: str) -> None:
        self._encoding = encoding or "cp437"
        self._is_windows = not any("/" in info.orig_filename for info in infos)
        other = [name for info in infos if (name := _find_other(info))]
        if encoding:
            self._check(other, where)
        elif doubtful := [name for name in other if not _is_dos_name(name)]:
            raise _ask_encoding(doubtful, where)
        self.guessed = self.decode_bytes(other[0]) if other and not encoding else ""

    def decode(self, info: ZipInfo) -> str:
        """Return a name with `/` between its parts: by its UTF-8 field or as UTF-8 where it is, else as encoded."""
        other = _find_other(info)
        name = self.decode_bytes(other) if other else _decode_utf8(info)
        if "\\" in name and (info.create_system != UNIX or self._is_windows):  # as .NET writes them on Windows
            name = name.replace("\\", "/")
        if name.startswith("./") or "/./" in name:
            name = "/".join(part for part in name.split("/") if part != ".")
        return name

    def decode_bytes(self, name: bytes) -> str:
        return name.decode(self._encoding)

    def _check(self, names: Sequence[bytes], where: str) -> None:
        try:
            for name in names:
                self.decode_bytes(name)
        except (UnicodeDecodeError, LookupError) as exc:
            found = (
                f"has a name that is no {self._encoding}" if isinstance(exc, UnicodeDecodeError) else "cannot be used"
            )
            raise SourceError(
                f"{where} encoding", found, "a text encoding: gbk, shift_jis, cp866", "Change `encoding`."
            ) from exc


def _find_other(info: ZipInfo) -> bytes | None:
    """Return the bytes of a name that is neither ASCII nor UTF-8; None for any other."""
    if info.flag_bits & UTF8_FLAG or info.orig_filename.isascii() or _find_unicode_path(info):
        return None
    data = encode_name(info)
    try:
        data.decode("utf-8")
    except UnicodeDecodeError:
        return data
    return None


def _decode_utf8(info: ZipInfo) -> str:
    """Return a name that is UTF-8, also without the flag (as macOS writes)."""
    if info.flag_bits & UTF8_FLAG or info.orig_filename.isascii():
        return info.orig_filename
    return _find_unicode_path(info) or encode_name(info).decode("utf-8")


def _find_unicode_path(info: ZipInfo) -> str:
    """Return the name of the extra field 0x7075 (APPNOTE 4.6.9), if it belongs to this name; else ""."""
    place, extra = 0, info.extra
    while place + 4 <= len(extra):
        kind, length = struct.unpack_from("<HH", extra, place)
        field = extra[place + 4 : place + 4 + length]
        crc = zlib.crc32(encode_name(info)).to_bytes(4, "little")
        if kind == UNICODE_PATH and field[:1] == b"\1" and field[1:5] == crc:
            return field[5:].decode("utf-8", "replace")
        place += 4 + length
    return ""


def _is_dos_name(name: bytes) -> bool:
    """Say whether bytes look like a name in code page 437: single letters with accents between plain ones.

    Names in GBK, Shift-JIS or cp866 have other bytes, or several of them side by side, or capitals behind them.
    """
    lone = [(byte, name[i + 1 : i + 2]) for i, byte in enumerate(name) if byte > 127]
    return all(byte in DOS_LETTERS and (after < b"\x80") for byte, after in lone) and not any(
        after.isupper() and byte not in DOS_CAPITALS for byte, after in lone
    )


def _ask_encoding(names: Sequence[bytes], where: str) -> SourceError:
    sample = max(names[:SAMPLE], key=lambda name: sum(byte > 127 for byte in name))
    readings = {}
    for encoding in ENCODINGS:
        try:
            texts = [name.decode(encoding) for name in names[:SAMPLE]]
        except UnicodeDecodeError:
            continue
        if all(text.isprintable() for text in texts):
            readings[encoding] = sample.decode(encoding)[:60]
    shown = "; ".join(f"{text} as {encoding}" for encoding, text in readings.items()) or repr(sample[:60])
    return SourceError(
        where,
        f"has {len(names):,} names that are not UTF-8, such as {shown}",
        "the encoding of its names",
        f"Say --encoding {next(iter(readings), 'gbk')} (in params.yaml: `encoding`), or the one that reads right.",
    )


def encode_name(info: ZipInfo) -> bytes:
    """Return the bytes of a name, which `zipfile` decoded by one of these two codecs without loss."""
    return info.orig_filename.encode("utf-8" if info.flag_bits & UTF8_FLAG else "cp437")
