"""Validate one file: size, format, full decode, digest. A file that cannot be used becomes a quarantine row."""

import hashlib
from dataclasses import dataclass

from visionloop.data.duplicates import compute_phash
from visionloop.data.images import inspect_image
from visionloop.data.manifest import make_image_key
from visionloop.errors import ImageError
from visionloop.ingest.sources.item import Item
from visionloop.records import Rejected
from visionloop.store import ObjectStore


@dataclass(frozen=True)
class Inspected:
    """A usable file: what is known of it before its side is decided."""

    item: Item
    sha256: str
    width: int
    height: int
    format: str
    num_bytes: int
    phash: str


def store_item(item: Item, store: ObjectStore, *, max_file_bytes: int, max_pixels: int) -> Inspected | Rejected:
    """Read, check and store one file; what is there already is not sent again. Raises StoreError."""
    try:
        num_bytes = item.path.stat().st_size
        if num_bytes > max_file_bytes:
            found = f"has {num_bytes} bytes"
            raise ImageError(item.origin, found, f"at most {max_file_bytes}", reason_code="too_large")
        data = item.path.read_bytes()
        facts, image = inspect_image(data, item.origin, max_pixels=max_pixels)
    except ImageError as exc:
        return Rejected(item.origin, exc.reason_code, f"{exc.found}; expected {exc.expected}")
    except OSError as exc:
        return Rejected(item.origin, "unreadable", f"cannot be read ({exc.strerror})")
    sha256 = hashlib.sha256(data).hexdigest()
    key = make_image_key(sha256)
    if not store.exists(key):
        store.put(key, data)
    return Inspected(item, sha256, facts.width, facts.height, facts.format, len(data), compute_phash(image))
