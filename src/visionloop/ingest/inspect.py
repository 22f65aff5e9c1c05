"""Validate the bytes of one file: size, format, pixel limit, full decode, digest, perceptual hash. Pure.

Each file is decoded once, by the decoder that training, judging and serving use (`data/images.py`): what passes here
can be decoded there. A JPEG, by far the most common, is decoded to grey at a reduced scale: all of its data is
unpacked, so that damage is found, in half the time.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, replace

from visionloop.data.convert import CONVERTIBLE, convert_to_png
from visionloop.data.duplicates import compute_phash_of_grey
from visionloop.data.foreign import name_other
from visionloop.data.images import decode_grey
from visionloop.errors import ImageError
from visionloop.ingest.sources import Item
from visionloop.params import Ingest
from visionloop.records import Rejected

# Raised by one when the same bytes may get another result or perceptual hash: rows of the journal are then not used.
INSPECTION = 2

# Below 64 px on the shorter side the hash of the reduced image differs from that of the whole one.
_REDUCED_PX = 64
# Of 16 bits a sample: where no image of a source uses more, its camera has probably no more; so many are always dark.
MOST_BITS, DARK_BITS = 14, 12


@dataclass(frozen=True, slots=True)
class Facts:
    """What the bytes of a usable file say; depends on the bytes alone. Width and height after EXIF orientation.

    `converted` is the format that it had before `ingest.convert` made a PNG of it; "" otherwise. `bits` are those that
    the brightest sample needs, of an image with 16 bits a sample; 0: it has 8.
    """

    sha256: str
    width: int
    height: int
    format: str
    num_bytes: int
    phash: str
    converted: str = ""
    bits: int = 0


@dataclass(frozen=True, slots=True)
class Inspected:
    """A usable file before its side is decided. `ordinal` is its place among all that this pull has seen."""

    item: Item
    ordinal: int
    facts: Facts


def make_inspected(item: Item, ordinal: int, facts: Facts) -> Inspected:
    """Return a usable file. What is stored of a converted one is not what lies at its place: its origin says so."""
    return Inspected(item._replace(origin=f"{item.origin}#png") if facts.converted else item, ordinal, facts)


def describe_bits(inspected: Iterable[Inspected]) -> list[str]:
    """Tell of images with 16 bits a sample that use the lower ones alone, as of a camera of 12 bits: they are dark.

    They are scaled as all others, by the bits of the file: by the brightest sample each picture would get a scale of
    its own, and a night would be as bright as a day.
    """
    wide: dict[str, list[Inspected]] = {}
    for one in inspected:
        if one.facts.bits:
            wide.setdefault(one.item.source, []).append(one)
    lines = []
    for source, some in wide.items():
        most = max(one.facts.bits for one in some)
        dark = [one for one in some if one.facts.bits <= (most if most <= MOST_BITS else DARK_BITS)]
        if dark:
            bits = max(one.facts.bits for one in dark)
            number = f"{len(dark):,} of the {len(some):,} images of {source} with 16 bits a sample"
            lines += [
                f"dark: {number} use the lowest {bits} alone, such as {dark[0].item.origin}:",
                f"  of 256 levels {2 ** (bits - 8) + 1} are left. If the camera has no more, write its bits into the "
                f"PNG (chunk sBIT), or multiply by {2 ** (16 - bits)}",
            ]
    return lines


def make_rejected(item: Item, exc: ImageError) -> Rejected:
    """Return the row of the quarantine: what was found, what was expected, and what to do."""
    todo = exc.todo
    if exc.reason_code == "too_large" and not todo:  # the limit has a name that only the ingest knows
        key = "max_pixels" if exc.found.endswith(" pixels") else "max_file_bytes" if " bytes" in exc.expected else ""
        todo = key and f"Or raise ingest.{key}."
    reason = f"{exc.found}; expected {exc.expected}" + (f". {todo}" if todo else "")
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
    return Facts(sha256, facts.width, facts.height, facts.format, len(data), phash, bits=facts.bits)
