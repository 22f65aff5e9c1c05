"""Validate one file: size, format, full decode, digest. A file that cannot be used becomes a quarantine row."""

import hashlib
from dataclasses import dataclass

from visionloop.data.duplicates import compute_phash
from visionloop.data.images import inspect_image
from visionloop.data.manifest import make_image_key
from visionloop.errors import ImageError
from visionloop.ingest.sources import Item
from visionloop.params import Ingest
from visionloop.records import Rejected
from visionloop.store import ObjectStore


@dataclass(frozen=True, slots=True)
class Facts:
    """What the bytes of a usable file say: a function of the bytes alone."""

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


def store_item(item: Item, ordinal: int, store: ObjectStore, limits: Ingest) -> Inspected | Rejected:
    """Read, check and store one file; what is there already is not sent again. Raises StoreError."""
    try:
        data = item.read(limits.max_file_bytes)
        facts = inspect_bytes(data, item.origin, max_pixels=limits.max_pixels)
    except ImageError as exc:
        return Rejected(item.origin, exc.reason_code, f"{exc.found}; expected {exc.expected}")
    store.add(make_image_key(facts.sha256), data)
    return Inspected(item, ordinal, facts)


def inspect_bytes(data: bytes, where: str, *, max_pixels: int) -> Facts:
    """Check encoded bytes by a full decode and return what they say. Raises ImageError."""
    facts, image = inspect_image(data, where, max_pixels=max_pixels)
    sha256 = hashlib.sha256(data).hexdigest()
    return Facts(sha256, facts.width, facts.height, facts.format, len(data), compute_phash(image))
