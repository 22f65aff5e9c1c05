"""Validate the bytes of one file: size, format, pixel limit, full decode, digest, perceptual hash. Pure.

Each file is decoded once, by the decoder that training, judging and serving use (`data/images.py`): what passes here
can be decoded there. A JPEG, by far the most common, is decoded to grey at a reduced scale: all of its data is
unpacked, so that damage is found, in half the time.
"""

import hashlib
from dataclasses import dataclass, replace

from visionloop.data.convert import CONVERTIBLE, convert_to_png
from visionloop.data.duplicates import compute_phash_of_grey
from visionloop.data.encoded import name_other
from visionloop.data.images import decode_grey
from visionloop.errors import ImageError
from visionloop.ingest.sources import Item
from visionloop.params import Ingest
from visionloop.records import Rejected

# Raised by one when the same bytes may get another result or perceptual hash: rows of the journal are then not used.
INSPECTION = 2

# Below 64 px on the shorter side the hash of the reduced image differs from that of the whole one.
_REDUCED_PX = 64


@dataclass(frozen=True, slots=True)
class Facts:
    """What the bytes of a usable file say; depends on the bytes alone. Width and height after EXIF orientation.

    `converted` is the format that it had before `ingest.convert` made a PNG of it; "" otherwise.
    """

    sha256: str
    width: int
    height: int
    format: str
    num_bytes: int
    phash: str
    converted: str = ""


@dataclass(frozen=True, slots=True)
class Inspected:
    """A usable file before its side is decided. `ordinal` is its place among all that this pull has seen."""

    item: Item
    ordinal: int
    facts: Facts


def make_inspected(item: Item, ordinal: int, facts: Facts) -> Inspected:
    """Return a usable file. What is stored of a converted one is not what lies at its place: its origin says so."""
    return Inspected(item._replace(origin=f"{item.origin}#png") if facts.converted else item, ordinal, facts)


def make_rejected(item: Item, exc: ImageError) -> Rejected:
    """Return the row of the quarantine: what was found, what was expected, and what to do."""
    reason = f"{exc.found}; expected {exc.expected}" + (f". {exc.todo}" if exc.todo else "")
    return Rejected(item.origin, exc.reason_code, reason)


def inspect_for_store(data: bytes, where: str, limits: Ingest) -> tuple[Facts, bytes]:
    """Check encoded bytes; return what they say, and the bytes to store: a PNG of them, if it was asked for.

    Raises ImageError.
    """
    limit = limits.max_pixels
    if limits.convert and (png := convert_to_png(data, where, max_pixels=limit)) is not None:
        return replace(inspect_bytes(png, where, max_pixels=limit), converted=name_other(data)[0]), png
    try:
        return inspect_bytes(data, where, max_pixels=limit), data
    except ImageError as exc:
        if name_other(data)[0] in CONVERTIBLE and not limits.convert:
            todo = "Set `ingest.convert: true`, or convert it."
            raise ImageError(where, exc.found, exc.expected, todo, reason_code=exc.reason_code) from exc
        raise


def inspect_bytes(data: bytes, where: str, *, max_pixels: int) -> Facts:
    """Check encoded bytes by a full decode and return what they say. Raises ImageError."""
    facts, grey = decode_grey(data, where, at_least_px=_REDUCED_PX, max_pixels=max_pixels)
    sha256, phash = hashlib.sha256(data).hexdigest(), compute_phash_of_grey(grey)
    return Facts(sha256, facts.width, facts.height, facts.format, len(data), phash)
