"""The names in a zip, which says of them only whether they are UTF-8: how they are decoded, or who must be asked. Pure.

Names of the fields: PKWARE's APPNOTE.TXT, version 6.3.10.
"""

import struct
import zlib
from collections.abc import Sequence
from zipfile import ZipInfo

from visionloop.errors import SourceError
from visionloop.ingest.encodings import choose_example, cut_pieces, guess_encoding, make_encoding_question

UTF8_FLAG = 0x800
UNIX = 3
UNICODE_PATH = 0x7075
# What the encodings that are guessed are a part of.
WIDER = {"shift_jis": "cp932", "euc_kr": "cp949", "gbk": "gb18030"}


class ZipNames:
    """How the names of one archive are read: their encoding, and whether `\\` stands between folders.

    Names without the mark of UTF-8 may be UTF-8 all the same (macOS writes them so), and others by chance.
    """

    def __init__(
        self, infos: Sequence[ZipInfo], encoding: str | None, where: str, command: str = "visionloop ingest ZIP"
    ) -> None:
        self._is_windows = not any("/" in info.orig_filename for info in infos)
        unmarked = [data for info in infos if (data := _find_unmarked(info))]
        self._encoding, self.guessed = encoding or "utf-8", ""
        if encoding is None and unmarked:
            self._encoding, self.guessed = _guess_encoding(unmarked, where, command)
        self._check(unmarked, where)

    def decode(self, info: ZipInfo) -> str:
        """Return a name with `/` between its parts: by its UTF-8 field or as UTF-8 where it is, else as encoded."""
        data = _find_unmarked(info)
        name = data.decode(self._encoding) if data else _find_unicode_path(info) or info.orig_filename
        if "\\" in name and (info.create_system != UNIX or self._is_windows):  # as .NET writes them on Windows
            name = name.replace("\\", "/")
        if name != "./" and (name.startswith("./") or "/./" in name or "//" in name):
            first, *parts = name.split("/")  # nothing before the first `/`: an absolute path, which stays one
            inner = [part for part in (first, *parts[:-1]) if part not in ("", ".")]
            name = "/".join([*([""] if name.startswith("/") else []), *inner, *parts[-1:]])
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


def _guess_encoding(names: Sequence[bytes], where: str, command: str) -> tuple[str, str]:
    """Return the encoding of names, and what to tell of it, "" for UTF-8.

    Raises:
        SourceError: two encodings are about as probable and read differently, or none fits all names.
    """
    guess = guess_encoding(cut_pieces(names), in_zip=True)
    example = choose_example(names)
    found = f"does not say the encoding of {len(names):,} of its names"
    if guess.best is None or guess.best.is_poor or not guess.is_sure:
        raise make_encoding_question(where, found, guess, example, command)
    encoding = guess.best.encoding
    fits = [name for name in (encoding, WIDER.get(encoding, encoding)) if _fits(names, name)]
    if not fits:
        raise make_encoding_question(where, f"{found}, and {encoding} fits not all", guess, example, command)
    if encoding == "utf-8":
        return encoding, ""
    best, others = guess.show(example)[0].rpartition(" in ")[0], "; ".join(guess.show(example, first=1))
    shown = f"{best} ({others})" if others else best
    return fits[0], f"names that are not UTF-8 are read as {encoding}, such as {shown}; else `encoding` (--encoding)"


def _fits(names: Sequence[bytes], encoding: str) -> bool:
    try:
        for name in names:
            name.decode(encoding)
    except UnicodeDecodeError:
        return False
    return True


def encode_name(info: ZipInfo) -> bytes:
    """Return the bytes of a name, which `zipfile` decoded by one of these two codecs without loss."""
    return info.orig_filename.encode("utf-8" if info.flag_bits & UTF8_FLAG else "cp437")
