"""TIFF, BMP, GIF and PPM to PNG, for `ingest.convert`: the first picture, upright, nothing lost but its notes. Pure.

The same bytes give the same PNG with the same version of Pillow; a newer one may pack the same pixels in other bytes.
"""

import io

import numpy as np
from PIL import Image

from visionloop.data.encoded import is_small_copy, name_readable
from visionloop.data.foreign import EXPORT, name_other
from visionloop.data.images import check_pixels, make_damaged, open_image
from visionloop.errors import ImageError

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
