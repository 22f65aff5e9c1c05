"""Validate the bytes of one file: size, format, pixel limit, full decode, digest, perceptual hash. Pure.

Each file is decoded once, by the decoder that training, judging and serving use (`data/images.py`): what passes here
can be decoded there. A JPEG, by far the most common, is decoded to grey at a reduced scale: all of its data is
unpacked, so that damage is found, in half the time.

With `ingest.convert` a TIFF, BMP, GIF or PPM becomes a PNG first: the first picture, upright, nothing lost but its
notes. The same bytes give the same PNG with the same version of Pillow; a newer one may pack them differently.
"""

import hashlib
import io
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from operator import attrgetter
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from visionloop.data.duplicates import compute_phash_of_grey
from visionloop.data.encoded import is_small_copy, name_readable
from visionloop.data.foreign import EXPORT, name_other
from visionloop.data.images import check_pixels, decode_grey, make_damaged, open_image
from visionloop.errors import ImageError
from visionloop.ingest.sources import Item
from visionloop.ingest.spill import Spill
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


_get_facts = attrgetter(*(field.name for field in fields(Facts)))


class Inspected(NamedTuple):
    """A usable file before its side is decided: what its source says of it (as in `Item`), and its bytes (`Facts`).

    `ordinal` is its place among all that this pull has seen.
    """

    sha256: str
    ordinal: int
    origin: str
    source: str
    labels: tuple[str, ...]
    side: str | None
    test_is_given: bool
    group: str | None
    captured_at: str | None
    excluded_near_test: bool
    width: int
    height: int
    format: str
    num_bytes: int
    phash: str
    converted: str
    bits: int


class Inspections:
    """The usable files of a pull in the order of their sha256, and those of one content as the sources offered them."""

    def __init__(self, folder: Path) -> None:
        self._rows = Spill(folder, is_sorted=True)

    @property
    def folder(self) -> Path:
        """Where what cannot be held is put down."""
        return self._rows.folder

    def add(self, item: Item, ordinal: int, facts: Facts) -> None:
        """Add a file. What is stored of a converted one is not what lies at its place: its origin says so."""
        origin = f"{item.origin}#png" if facts.converted else item.origin
        _, source, labels, _, _, side, test_is_given, group, captured_at, excluded_near_test = item
        sha256, *others = _get_facts(facts)
        said = (side, test_is_given, group, captured_at, excluded_near_test)
        self._rows.add((sha256, ordinal, origin, source, labels, *said, *others))

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[Inspected]:
        return map(Inspected._make, self._rows)


class Depths:
    """Images with 16 bits a sample that use the lower ones alone, as of a camera of 12 bits: they are dark.

    They are scaled as all others, by the bits of the file: by the brightest sample each picture would get a scale of
    its own, and a night would be as bright as a day.
    """

    def __init__(self) -> None:
        # source -> bits -> the number of images, the ordinal and the origin of the first one
        self._seen: dict[str, dict[int, tuple[int, tuple[int, str]]]] = {}

    def add(self, one: Inspected) -> None:
        """Count an image, if it has 16 bits a sample."""
        if one.bits:
            seen, place = self._seen.setdefault(one.source, {}), (one.ordinal, one.origin)
            number, first = seen.get(one.bits, (0, place))
            seen[one.bits] = number + 1, min(first, place)

    def describe(self) -> list[str]:
        """Tell of the dark ones, a source at a time."""
        lines = []
        for source, seen in sorted(self._seen.items(), key=lambda pair: min(first for _, first in pair[1].values())):
            most = max(seen)
            dark = {bits: found for bits, found in seen.items() if bits <= (most if most <= MOST_BITS else DARK_BITS)}
            if dark:
                num_dark, total = (sum(number for number, _ in some.values()) for some in (dark, seen))
                _, first = min(place for _, place in dark.values())
                bits = max(dark)
                lines += [
                    f"dark: {num_dark:,} of the {total:,} images of {source} with 16 bits a sample use the lowest "
                    f"{bits} alone, such as {first}:",
                    f"  of 256 levels {2 ** (bits - 8) + 1} are left. If the camera has no more, write its bits into "
                    f"the PNG (chunk sBIT), or multiply by {2 ** (16 - bits)}",
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


CONVERTIBLE = ("TIFF", "BMP", "GIF", "PPM")


def convert_to_png(data: bytes, where: str, *, max_pixels: int | None) -> bytes | None:
    """Return the PNG of an image in one of these formats; None for anything else.

    Raises:
        ImageError: damaged, too large, a camera's RAW file in the clothes of a TIFF (its first picture is a small
            preview), or pixels that a PNG cannot hold.
    """
    kind, _ = name_other(data)
    if kind not in CONVERTIBLE:
        return None
    image = open_image(kind, data, where)
    if is_small_copy(getattr(image, "tag_v2", {})):
        raise ImageError(where, "is a camera's RAW file: a TIFF with a small preview", name_readable(), EXPORT)
    check_pixels(image.size, where, max_pixels)
    try:
        image.load()  # a TIFF is turned upright by it
    except MemoryError:
        raise
    except Exception as exc:  # a malformed file can make the decoder raise anything
        raise make_damaged(where, str(exc)) from exc
    pixels = _fit_png(image, where)
    pixels.info = {}  # a profile, or a resolution, would be written too
    sink = io.BytesIO()
    pixels.save(sink, "PNG", compress_level=6)
    return sink.getvalue()


def _fit_png(image: Image.Image, where: str) -> Image.Image:
    """Return an image in a mode that PNG has: L, RGB, LA, RGBA, or 16-bit grey. Raises ImageError."""
    if image.mode.startswith("I"):
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            found = f"has pixels from {values.min()} to {values.max()}"
            raise ImageError(where, found, "8 or 16 bits", "Scale it, and save it as PNG.")
        return Image.fromarray(values.astype(np.uint16))
    if image.mode == "F":
        raise ImageError(where, "has pixels of floating point", "8 or 16 bits", "Scale it, and save it as PNG.")
    if image.mode in ("L", "LA", "RGBA") or (image.mode == "RGB" and not image.has_transparency_data):
        return image
    if image.mode == "1":
        return image.convert("L")
    return image.convert("RGBA" if image.has_transparency_data else "RGB")
