"""What lies around the pixels of an encoded image: its format, size and orientation, and its picture alone. Pure.

Cameras and editing programs write notes around a picture: a profile, a thumbnail, a whole film behind its end. Decoders
refuse whole pictures for what these notes hold. So JPEG, PNG and WebP are walked here, by the rules of their formats,
and whoever decodes gets the picture alone. Nothing is decoded here.
"""

import re
import struct
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.util import find_spec
from typing import Any

from PIL import Image, features

from visionloop.data.foreign import name_other
from visionloop.errors import ImageError

MAX_SCANS = 100  # no camera or program writes so many, and each costs a pass over all pixels
MAX_PARTS = 100_000  # segments or chunks
MAX_PEEKS, MAX_GAP = 500, 4096  # how many segments, and bytes between two, are passed by in search of the size
UNKNOWN_BYTES = 100_000_000
MAX_NOTE_BYTES = 4_000_000  # of one note, unpacked

Size = tuple[int, int]  # (width, height), as Pillow has it

_ORIENTATION = 0x0112
_PNG = b"\x89PNG\r\n\x1a\n"
# A marker of libjpeg: it skips all bytes between segments, and those without a length (restarts, a second start).
_MARKER = re.compile(rb"\xff[^\x00\x01\xd0-\xd8\xff]")
_BASELINE = (b"\xc0", b"\xc1")
_FRAMES = frozenset({*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC})
_NOTES = frozenset({*range(0xE0, 0xF0), 0xFE})  # APP0 to APP15, and the comment
_SCAN, _END = 0xDA, 0xD9
# Sampling of the three colours that libjpeg-turbo decodes to grey and to RGB alike: 444, 422, 440, 420, 411, 441.
_SAMPLINGS = frozenset({0x11, 0x21, 0x12, 0x22, 0x41, 0x14})
_PICTURE_PNG = frozenset({b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"})
_PICTURE_WEBP = frozenset({b"VP8X", b"VP8 ", b"VP8L", b"ALPH", b"ANIM", b"ANMF"})
_PICTURE_OF_VP8X = 0x10 | 0x02  # alpha, animation; the others are ICC, EXIF, XMP, and bits that must be zero
_XMP = "XML:com.adobe.xmp"
_HEX_EXIF = "Raw profile type exif"  # ImageMagick's, in PNG
_EXTENTS = re.compile(b"ispe")  # the box of a size, in AVIF and HEIC; a picture may have several, of its tiles too
_AVIF = frozenset({b"avif", b"avis"})
_HEIC = frozenset({b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"mif1", b"msf1"})

_SUBFILE, _DNG, _SMALL_COPY = 254, 50706, 1  # TIFF tags, and the value that says: a small copy of another image


@dataclass(frozen=True)
class Encoded:
    """An encoded image. `picture` is what a decoder needs of `data`; `info` its notes, by Pillow's names.

    `size` is the size before the orientation; None where only the decoder knows it. For a JPEG `is_usual` says that its
    kind of pixels is one that libjpeg-turbo decodes to grey and to RGB alike, and `num_colours` how many there are.
    `is_streamed`: libjpeg decodes it row by row, where other JPEGs need all their coefficients at once.
    `bits` are the bits that each sample of a PNG holds, by its own word; 0: all. `is_wide`: a sample has 16 bits.
    """

    kind: str
    data: bytes
    size: Size | None = None
    info: dict[Any, Any] = field(default_factory=dict)
    pieces: Sequence[bytes | slice] = ()
    is_usual: bool = False
    num_colours: int = 0
    is_streamed: bool = False
    bits: int = 0
    is_wide: bool = False

    @property
    def picture(self) -> bytes:
        """The bytes without notes."""
        if not self.pieces:
            return self.data
        view = memoryview(self.data)
        return b"".join([view[one] if isinstance(one, slice) else one for one in self.pieces])


def parse_encoded(data: bytes, where: str) -> Encoded:
    """Find out what an encoded image is, from its first bytes, and walk through it.

    Raises:
        ImageError: not an image we read (its format is named, and how to convert it), its walk shows damage, or it has
            more than 100 JPEG scans, or more than 100,000 segments or chunks.
    """
    if data.startswith(b"\xff\xd8\xff"):
        return _parse_jpeg(data, where)
    if data.startswith(_PNG):
        return _parse_png(data, where)
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return _parse_webp(data, where)
    if kind := _find_modern(data):
        return Encoded(kind, data)
    if not data:
        raise ImageError(where, "is empty (0 bytes)", "an image", reason_code="empty")
    name, todo = name_other(data)
    if name:
        raise ImageError(where, f"is {name}", name_readable(), todo)
    raise ImageError(where, "is not an image we read", name_readable())


@cache
def name_readable() -> str:
    """Return the formats that are read on this installation, and how to read HEIC where that is not one."""
    kinds = ["JPEG", "PNG", "WebP", *(["AVIF"] if features.check("avif") else [])]
    if find_spec("pi_heif"):
        return f"{', '.join(kinds)} or HEIC"
    return f"{', '.join(kinds[:-1])} or {kinds[-1]} (HEIC with the extra `heic`)"


def estimate_bytes(data: bytes) -> int:
    """Return about how much memory the pixels take while an image is decoded, by what its header says of its size.

    It reads no more than the first few parts, and believes them. 0: no image; a lot: the size is not found there.
    """
    if data.startswith(_PNG):
        size, each = (int.from_bytes(data[16:20]), int.from_bytes(data[20:24])), 6
    elif data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        size, each = _read_webp_size(data[12:16], data[20:30]) or (0, 0), 8
    elif data.startswith(b"\xff\xd8\xff"):
        size, each = _peek_jpeg(data)
    elif _find_modern(data):
        sizes = [data[found.end() + 4 : found.end() + 12] for found in _EXTENTS.finditer(data, 0, MAX_GAP)]
        size, each = max((int.from_bytes(one[:4]), int.from_bytes(one[4:])) for one in [b"", *sizes]), 8
    else:
        return 0
    return size[0] * size[1] * each or UNKNOWN_BYTES


def _peek_jpeg(data: bytes) -> tuple[Size, int]:
    """Return the size, and bytes a pixel: one where libjpeg-turbo halves it, six where all coefficients are kept."""
    place = 2
    for _ in range(MAX_PEEKS):
        found = _MARKER.search(data, place, place + MAX_GAP)
        if found is None or found.end() + 8 > len(data):
            break
        marker, start = data[found.end() - 1], found.end()
        if marker in _FRAMES:
            size = data[start + 5] << 8 | data[start + 6], data[start + 3] << 8 | data[start + 4]
            return size, 1 if bytes([marker]) in _BASELINE else 6
        place = start + max(2, int.from_bytes(data[start : start + 2]))
    return (0, 0), 0


def is_small_copy(tags: Any) -> bool:
    """Say whether the first image of a TIFF is the preview of a camera's RAW file, by its tags."""
    return _DNG in tags or bool(int(tags.get(_SUBFILE, 0)) & _SMALL_COPY)


def read_orientation(info: dict[Any, Any]) -> int:
    """Return the EXIF (or XMP) orientation, 1 to 8; 1 where there is none, or it cannot be read."""
    if not info:
        return 1
    carrier = Image.Image()
    carrier.info = info
    try:
        value = carrier.getexif().get(_ORIENTATION, 1)
    except Exception:  # broken EXIF is no reason to reject an image whose pixels are good
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _damaged(where: str, why: str, kind: str) -> ImageError:
    return ImageError(where, f"is damaged ({why})", f"a whole {kind}", reason_code="damaged")


def _too_many(where: str, what: str, limit: int) -> ImageError:
    return ImageError(where, f"has too many {what}", f"at most {limit}", reason_code="too_large")


# JPEG: segments (marker, length, content), of which a scan is followed by its data, up to the next marker.
#
#     FFD8   FFE1 note   FFDB table   FFC0 size   FFC4 table   FFDA scan, data ...   FFD9   FFD8 ... a second picture
#            left out                                          the first scan        end    left out


def _parse_jpeg(data: bytes, where: str) -> Encoded:
    kept: list[bytes | slice] = [data[:2]]
    notes: list[slice] = []
    frame, first_scan, num_scans, end, is_streamed = b"", 0, 0, len(data), False
    for marker, start, stop in _walk_jpeg(data, where):
        if marker == _SCAN:
            num_scans += 1
            first_scan = first_scan or start
            if frame[:1] in _BASELINE and data[start + 4 : start + 5] == frame[8:9]:
                is_streamed = num_scans == 1
                break  # it holds all colours: libjpeg allows no further scan
        elif marker == _END:
            end = stop
        elif first_scan:
            continue
        elif marker not in _NOTES or _is_about_colour(marker, data, start, stop):
            kept.append(slice(start, stop))
            if marker in _FRAMES and not frame and stop >= start + 10:
                frame = data[start + 1 : stop]
        elif marker == 0xE1:
            notes.append(slice(start + 4, stop))
    _check_jpeg(frame, num_scans, where)
    kept.append(slice(first_scan, end))
    width, height, colours = frame[6] << 8 | frame[7], frame[4] << 8 | frame[5], frame[8]
    info = _read_notes(data, notes) if notes else {}
    return Encoded(
        "JPEG", data, (width, height), info, kept, _is_usual(frame), num_colours=colours, is_streamed=is_streamed
    )


def _walk_jpeg(data: bytes, where: str) -> Iterator[tuple[int, int, int]]:
    """Yield (marker, start, stop) of the segments, as libjpeg reads them, up to the end of the first picture."""
    place, size, search = 2, len(data), _MARKER.search
    for _ in range(MAX_PARTS):
        found = search(data, place)
        if found is None:
            return
        start = found.start()
        marker = data[start + 1]
        length = 0 if marker == _END else max(2, int.from_bytes(data[start + 2 : start + 4]))
        place = start + 2 + length
        if place > size:
            return
        yield marker, start, place
        if marker == _END:
            return
    raise _too_many(where, "segments", MAX_PARTS)


def _check_jpeg(frame: bytes, num_scans: int, where: str) -> None:
    if not frame or not num_scans:
        raise _damaged(where, "no picture in it", "JPEG")
    if num_scans > MAX_SCANS:
        raise _too_many(where, "scans", MAX_SCANS)
    if frame[3] != 8:
        raise ImageError(where, f"is a JPEG with {frame[3]} bits a colour", "8 bits", "Convert it to PNG.")


def _read_notes(data: bytes, notes: list[slice]) -> dict[Any, Any]:
    """Return EXIF, which may be in several parts, and XMP."""
    info: dict[Any, Any] = {}
    for note in notes:
        text = data[note]
        if text.startswith(b"Exif\0\0"):
            info["exif"] = info["exif"] + text[6:] if "exif" in info else text
        elif text.startswith(b"http://ns.adobe.com/xap/1.0/\0"):
            info["xmp"] = text[29:]
    return info


def _is_about_colour(marker: int, data: bytes, start: int, stop: int) -> bool:
    """Say whether libjpeg reads from a note how the colours are stored."""
    if marker == 0xE0:
        return stop - start >= 18 and data.startswith(b"JFIF\0", start + 4)
    return marker == 0xEE and stop - start >= 16 and data.startswith(b"Adobe", start + 4)


def _is_usual(frame: bytes) -> bool:
    """Say whether a frame (its marker, length and content) is Huffman coded, in grey or three colours."""
    if frame[0] > 0xC2:
        return False
    if frame[8] == 1:
        return True
    return frame[8] == 3 and len(frame) >= 18 and frame[10] in _SAMPLINGS and frame[13] == frame[16] == 0x11


# PNG and WebP: chunks. Those that are no part of the picture are left out, whatever they hold.


def _parse_png(data: bytes, where: str) -> Encoded:
    kept: list[bytes | slice] = [_PNG]
    info: dict[Any, Any] = {}
    header, bits, size, is_whole, view = b"", 0, None, False, memoryview(data)
    for kind, start, stop in _walk_png(data, where):
        is_good = zlib.crc32(view[start + 4 : stop - 4]) == int.from_bytes(view[stop - 4 : stop])
        content = view[start + 8 : stop - 4]
        if kind == b"tRNS" and not (is_good and _fits_transparency(header, len(content))):
            continue  # as libpng does: what is transparent is not known, the pixels are whole
        if kind in _PICTURE_PNG:
            if not is_good:
                raise _damaged(where, f"wrong checksum of {kind!r}", "PNG")
            if kind == b"IHDR" and len(content) >= 8:
                size, header = (int.from_bytes(content[:4]), int.from_bytes(content[4:8])), bytes(content)
            kept.append(slice(start, stop))
            is_whole = kind == b"IEND"
        elif not is_good:
            continue
        elif kind == b"eXIf":
            info["exif"] = bytes(content)
        elif kind == b"sBIT" and content:
            bits = content[0]
        elif kind in (b"tEXt", b"zTXt", b"iTXt"):
            info.update(_read_text(kind, bytes(content)))
    if not is_whole:
        raise _damaged(where, "cut off", "PNG")
    return Encoded("PNG", data, size, info, kept, bits=bits, is_wide=header[8:9] == b"\x10")


def _fits_transparency(header: bytes, length: int) -> bool:
    """Say whether a chunk tRNS has a length that fits the kind of pixels: grey, RGB, a palette."""
    lengths = {b"\0": range(2, 3), b"\2": range(6, 7), b"\3": range(1, 257)}
    return length in lengths.get(header[9:10], ())


def _walk_png(data: bytes, where: str) -> Iterator[tuple[bytes, int, int]]:
    """Yield (kind, start, stop) of the chunks up to the last one, or to where the file is cut off."""
    place = len(_PNG)
    for _ in range(MAX_PARTS):
        kind = data[place + 4 : place + 8]
        stop = place + 12 + int.from_bytes(data[place : place + 4])
        if stop > len(data):
            return
        yield kind, place, stop
        if kind == b"IEND":
            return
        place = stop
    raise _too_many(where, "chunks", MAX_PARTS)


def _read_text(kind: bytes, content: bytes) -> Iterable[tuple[str, Any]]:
    """Return what a text chunk says about the orientation; nothing for any other text, or one that is broken."""
    key, _, rest = content.partition(b"\0")
    name = key.decode("latin-1")
    if name not in (_XMP, _HEX_EXIF):
        return ()
    is_packed = kind == b"zTXt" or (kind == b"iTXt" and rest[:1] == b"\1")
    if kind == b"iTXt":
        rest = rest[2:].partition(b"\0")[2].partition(b"\0")[2]
    elif kind == b"zTXt":
        rest = rest[1:]
    try:
        text = zlib.decompressobj().decompress(rest, MAX_NOTE_BYTES) if is_packed else rest
    except zlib.error:
        return ()
    return ((name, text.decode("utf-8", "replace")),)


def _parse_webp(data: bytes, where: str) -> Encoded:
    stop = 8 + int.from_bytes(data[4:8], "little")
    if stop > len(data):
        raise _damaged(where, "cut off", "WebP")
    kept: list[bytes | slice] = []
    info: dict[Any, Any] = {}
    size, place, num_bytes = None, 12, 4
    for _ in range(MAX_PARTS):
        if place + 8 > stop:
            break
        kind, end = data[place : place + 4], place + 8 + int.from_bytes(data[place + 4 : place + 8], "little")
        if end > stop:
            raise _damaged(where, f"{kind!r} is cut off", "WebP")
        content = data[place + 8 : place + 18]
        if kind == b"VP8X" and len(content) == 10:
            content = bytes([content[0] & _PICTURE_OF_VP8X]) + content[1:]
            kept.append(b"VP8X\x0a\0\0\0" + content)
            num_bytes += 18
        elif kind in _PICTURE_WEBP:
            kept += [slice(place, end), b"\0" * ((end - place) & 1)]
            num_bytes += end - place + ((end - place) & 1)
        elif kind in (b"EXIF", b"XMP "):
            info.setdefault("exif" if kind == b"EXIF" else "xmp", data[place + 8 : end])
        size = size or _read_webp_size(kind, content)
        place = end + ((end - place) & 1)
    else:
        raise _too_many(where, "chunks", MAX_PARTS)
    if size is None:
        raise _damaged(where, "no picture in it", "WebP")
    head = b"RIFF" + num_bytes.to_bytes(4, "little") + b"WEBP"
    return Encoded("WEBP", data, size, info, [head, *kept])


def _read_webp_size(kind: bytes, content: bytes) -> Size | None:
    """Return the size that the first chunk of a picture says."""
    if len(content) < 10 and kind != b"VP8L":
        return None
    if kind == b"VP8X":
        return 1 + int.from_bytes(content[4:7], "little"), 1 + int.from_bytes(content[7:10], "little")
    if kind == b"VP8 ":
        width, height = struct.unpack_from("<HH", content, 6)
        return width & 0x3FFF, height & 0x3FFF
    if kind == b"VP8L" and len(content) >= 5:
        packed = int.from_bytes(content[1:5], "little")
        return 1 + (packed & 0x3FFF), 1 + (packed >> 14 & 0x3FFF)
    return None


def _find_modern(data: bytes) -> str | None:
    """Return AVIF or HEIF where the first box of an ISO media file names that brand."""
    if data[4:8] != b"ftyp":
        return None
    length = min(int.from_bytes(data[:4]), 256)
    brands = [data[8:12], *(data[place : place + 4] for place in range(16, length - 3, 4))]
    if brands[0] in _AVIF or (brands[0] in (b"mif1", b"msf1") and _AVIF.intersection(brands)):
        return "AVIF"
    return "HEIF" if brands[0] in _HEIC else None
