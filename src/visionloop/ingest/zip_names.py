"""The names in a zip, which says of them only whether they are UTF-8: how they are decoded, or who must be asked. Pure.

Names of the fields: PKWARE's APPNOTE.TXT, version 6.3.10.
"""

import re
import struct
import zlib
from collections import Counter
from collections.abc import Sequence
from zipfile import ZipInfo

from visionloop.errors import SourceError
from visionloop.ingest.paths.names import is_text

UTF8_FLAG = 0x800
UNIX = 3
UNICODE_PATH = 0x7075
SAMPLE = 200
# Encodings of names that are offered, the most frequent first; and the letters of code page 437.
ENCODINGS = ("gbk", "shift_jis", "cp866", "euc_kr", "big5", "cp1252", "cp850", "cp437", "utf-8")
DOS_LETTERS = frozenset((*range(0x80, 0x9B), *range(0xA0, 0xA6), 0xE1))
DOS_CAPITALS = frozenset((0x80, 0x8E, 0x8F, 0x90, 0x92, 0x99, 0x9A, 0xA5))


class ZipNames:
    """How the names of one archive are read: their encoding, and whether `\\` stands between folders.

    Names without the mark of UTF-8 are UTF-8 all the same if all of them can be (macOS writes them so).
    """

    def __init__(self, infos: Sequence[ZipInfo], encoding: str | None, where: str) -> None:
        self._is_windows = not any("/" in info.orig_filename for info in infos)
        unmarked = [data for info in infos if (data := _find_unmarked(info))]
        self._encoding, self.guessed = encoding or "utf-8", ""
        if encoding is None and unmarked and not _are_utf8(unmarked):
            if not all(map(_is_dos_name, unmarked)):
                raise _ask_encoding(unmarked, where)
            self._encoding = "cp437"
            self.guessed = unmarked[0].decode("cp437")
        self._check(unmarked, where)

    def decode(self, info: ZipInfo) -> str:
        """Return a name with `/` between its parts: by its UTF-8 field or as UTF-8 where it is, else as encoded."""
        data = _find_unmarked(info)
        name = data.decode(self._encoding) if data else _find_unicode_path(info) or info.orig_filename
        if "\\" in name and (info.create_system != UNIX or self._is_windows):  # as .NET writes them on Windows
            name = name.replace("\\", "/")
        if name != "./" and (name.startswith("./") or "/./" in name):
            name = "/".join(part for part in name.split("/") if part != ".")
        return name

    def _check(self, names: Sequence[bytes], where: str) -> None:
        try:
            for name in names:
                name.decode(self._encoding)
        except (UnicodeDecodeError, LookupError) as exc:
            found = "fits not all names" if isinstance(exc, UnicodeDecodeError) else "is no encoding"
            expected = "that of the names: gbk, shift_jis, cp866, utf-8"
            raise SourceError(
                f"{where} encoding", f"{self._encoding!r} {found}", expected, "Change `encoding`."
            ) from exc


def _find_unmarked(info: ZipInfo) -> bytes | None:
    """Return the bytes of a name that is not ASCII and not marked as UTF-8; None for any other."""
    if info.flag_bits & UTF8_FLAG or info.orig_filename.isascii() or _find_unicode_path(info):
        return None
    return encode_name(info)


def _are_utf8(names: Sequence[bytes]) -> bool:
    """Say whether names are UTF-8: all can be, and none is a word of Latin-1 letters alone.

    By chance some short names in another encoding can be: the character for cat in GBK has the bytes of `è`.
    """
    try:
        texts = [name.decode("utf-8") for name in names]
    except UnicodeDecodeError:
        return False
    return not any(part and all("\x80" <= c <= "\xff" for c in part) for text in texts for part in text.split("/"))


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
    sample = sorted(names[:SAMPLE], key=lambda name: -sum(byte > 127 for byte in name))
    readings = {}
    for encoding in ENCODINGS:
        try:
            texts = [name.decode(encoding) for name in sample]
        except UnicodeDecodeError:
            continue
        if all(map(is_text, texts)):
            readings[encoding] = texts
    order = sorted(readings, key=lambda encoding: -_rate("".join(readings[encoding])))
    shown = "; ".join(f"{readings[encoding][0][:60]} in {encoding}" for encoding in order[:5]) or repr(sample[0][:60])
    return SourceError(
        where,
        f"does not say the encoding of {len(names):,} of its names, such as {shown}",
        "an encoding",
        f"Say --encoding {next(iter(order), 'gbk')} (in params.yaml: `encoding`), or the one that reads right.",
    )


def _rate(text: str) -> float:
    """Return how much a text looks like one language: the share of its letters that belong together, kana first."""
    blocks = Counter(_find_block(c) for c in text if c > "\x7f")
    mixed = len(re.findall(r"[a-zA-Z][Ѐ-ӿ]|[Ѐ-ӿ][a-zA-Z]", text))
    good = (
        3 * blocks["kana"] + 2 * blocks["common"] + 1.5 * blocks["latin"] + blocks["han"] - blocks["other"] - 2 * mixed
    )
    return good / max(1, blocks.total())


def _find_block(character: str) -> str:
    if "\u3040" <= character <= "\u30ff":
        return "kana"
    if "\u0400" <= character <= "\u04ff" or "\uac00" <= character <= "\ud7a3":
        return "common"
    if "\u4e00" <= character <= "\u9fff":
        try:
            character.encode("gb2312")
        except UnicodeEncodeError:
            return "han"
        return "common"
    return "latin" if "\xc0" <= character <= "\u024f" and character.isalpha() else "other"


def encode_name(info: ZipInfo) -> bytes:
    """Return the bytes of a name, which `zipfile` decoded by one of these two codecs without loss."""
    return info.orig_filename.encode("utf-8" if info.flag_bits & UTF8_FLAG else "cp437")
