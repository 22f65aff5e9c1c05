"""Validate the bytes of one file: size, format, pixel limit, full decode, digest, perceptual hash. Pure.

Each file is decoded once. A JPEG, by far the most common, is decoded to grey at a reduced scale: all of its data is
unpacked, so that damage is found, in half the time. Files that this strict decoder does not support, and all other
formats, are decoded as training does it (`data/images.py`): what passes here can be decoded there.
"""

import hashlib
import io
import re
import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from visionloop.data.duplicates import compute_phash_of_grey
from visionloop.data.images import MAX_SCANS, decode_grey
from visionloop.errors import ImageError
from visionloop.ingest.sources import Item

# Raised by one when the same bytes may get another result or perceptual hash: rows of the journal are then not used.
INSPECTION = 1

# Below 64 px on the shorter side the hash of the reduced image differs from that of the whole one.
_REDUCED_PX = 64
_MAX_CHUNKS = 100_000
# What libjpeg warns of when pixels are lost. Its other warnings (an odd version, a few bytes too many) lose none.
_DAMAGE = re.compile(
    "remature end|bad Huffman code|bad arithmetic code|instead of RST"
    "|before marker 0x(d[0-7]|da|c4)"  # bytes left over where a part of the picture ends
)
_PROGRESSIVE = frozenset((0xC2, 0xC6, 0xCA, 0xCE))
_ORIENTATION = 0x0112
_PNG = b"\x89PNG\r\n\x1a\n"

GreyArray = NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Facts:
    """What the bytes of a usable file say; depends on the bytes alone. Width and height after EXIF orientation."""

    sha256: str
    width: int
    height: int
    format: str
    num_bytes: int
    phash: str


@dataclass(frozen=True, slots=True)
class Inspected:
    """A usable file before its side is decided. `ordinal` is its place among all that this pull has seen."""

    item: Item
    ordinal: int
    facts: Facts


def inspect_bytes(data: bytes, where: str, *, max_pixels: int) -> Facts:
    """Check encoded bytes by a full decode and return what they say. Raises ImageError."""
    seen = _inspect_jpeg(data, where, max_pixels) if data.startswith(b"\xff\xd8\xff") else None
    if seen is None:
        if data.startswith(_PNG):
            _check_png_chunks(data, where)
        facts, grey = decode_grey(data, where, at_least_px=_REDUCED_PX, max_pixels=max_pixels)
        seen = facts.width, facts.height, facts.format, compute_phash_of_grey(grey)
    return Facts(hashlib.sha256(data).hexdigest(), *seen[:3], len(data), seen[3])


def _inspect_jpeg(data: bytes, where: str, max_pixels: int) -> tuple[int, int, str, str] | None:
    """Return width, height, format and hash of a JPEG; None when another decoder must try. Raises ImageError."""
    import simplejpeg

    has_metadata, may_have_scans = _walk_segments(data)
    if may_have_scans and data.count(b"\xff\xda") > MAX_SCANS:
        raise ImageError(where, "has too many scans", f"at most {MAX_SCANS}", reason_code="too_large")
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data, strict=False)
        if width * height > max_pixels:
            found = f"has {width} x {height} pixels"
            raise ImageError(where, found, f"at most {max_pixels}", reason_code="too_large")
        if colours in ("CMYK", "YCCK"):
            return None
        grey = simplejpeg.decode_jpeg(data, "GRAY", min_height=_REDUCED_PX, min_width=_REDUCED_PX)[:, :, 0]
    except ImageError:
        raise
    except (ValueError, KeyError, RuntimeError) as exc:
        if _DAMAGE.search(str(exc)):
            raise ImageError(where, f"is damaged ({exc})"[:200], "whole pixels", reason_code="damaged") from exc
        return None
    if has_metadata:
        orientation = _read_orientation(data)
        grey = _turn_upright(grey, orientation)
        if orientation >= 5:
            width, height = height, width
    return width, height, "JPEG", compute_phash_of_grey(grey)


def _walk_segments(data: bytes) -> tuple[bool, bool]:
    """Say whether a JPEG has metadata (EXIF, XMP), and whether it may have more scans than one per colour."""
    has_metadata, place, size = False, 2, len(data)
    while place + 4 <= size and data[place] == 0xFF:
        marker = data[place + 1]
        if marker in _PROGRESSIVE:
            return True, True  # rare: treated as if it had metadata
        if marker == 0xDA:
            return has_metadata, False
        if marker == 0xE1:
            has_metadata = True
        if marker == 0xFF:
            place += 1
        elif marker == 0x01 or 0xD0 <= marker <= 0xD9:
            place += 2
        else:
            place += 2 + (data[place + 2] << 8) + data[place + 3]
    return True, True


def _read_orientation(data: bytes) -> int:
    """Return the orientation, 1 to 8, of a JPEG with metadata; 1 when it says nothing sensible."""
    from PIL import Image

    try:
        value: Any = Image.open(io.BytesIO(data), formats=("JPEG",)).getexif().get(_ORIENTATION, 1)
    except Exception:  # broken metadata; the pixels are whole
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _turn_upright(grey_hw: GreyArray, orientation: int) -> GreyArray:
    """Turn and mirror an image as its EXIF orientation asks."""
    if orientation >= 5:
        grey_hw = grey_hw.T
    if orientation in (3, 4, 7, 8):
        grey_hw = grey_hw[::-1]
    return grey_hw[:, ::-1] if orientation in (2, 3, 6, 7) else grey_hw


def _check_png_chunks(data: bytes, where: str) -> None:
    """Compare the checksum of every chunk with its content; the decoder does not check those of the pixels.

    Raises:
        ImageError: a chunk is damaged, or the file ends before its last chunk.
    """
    place, view = len(_PNG), memoryview(data)
    for _ in range(_MAX_CHUNKS):
        length, kind = int.from_bytes(view[place : place + 4]), bytes(view[place + 4 : place + 8])
        end = place + 12 + length
        if end > len(data):
            raise ImageError(where, "is damaged (cut off)", "a whole PNG", reason_code="damaged")
        if zlib.crc32(view[place + 4 : end - 4]) != int.from_bytes(view[end - 4 : end]):
            found = f"is damaged (wrong checksum of {kind!r})"
            raise ImageError(where, found, "a whole PNG", reason_code="damaged")
        if kind == b"IEND":
            return
        place = end
    raise ImageError(where, "has too many chunks", f"at most {_MAX_CHUNKS}", reason_code="too_large")
