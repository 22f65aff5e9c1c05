"""Bytes to pixels: the one way an image is decoded and resized, for training, judging and serving alike.

Pure: no disk, no network. Shapes: height x width x 3, uint8, RGB. Formats: JPEG, PNG, WebP.
"""

import io
import warnings
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from visionloop.errors import ImageError

FORMATS = ("JPEG", "PNG", "WEBP")
MAX_PIXELS = 50_000_000
_WIDE_MODES = ("I", "I;16", "I;16B", "I;16L", "I;16N")

UInt8Array = NDArray[np.uint8]


@dataclass(frozen=True)
class ImageFacts:
    """What the header and a full decode say about an image; width and height as people see it (EXIF applied)."""

    width: int
    height: int
    format: str


def open_image(data: bytes, where: str, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Read the header of an encoded image, without decoding its pixels.

    Raises:
        ImageError: not an image, a format that is not allowed, or more than `max_pixels`.
    """
    if not data:
        raise ImageError(where, "is empty (0 bytes)", "an image", reason_code="empty")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError as exc:
        raise ImageError(where, "has too many pixels", f"at most {max_pixels}", reason_code="too_large") from exc
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError) as exc:
        raise ImageError(where, "is not an image we read", "JPEG, PNG or WebP", reason_code="not_an_image") from exc
    if image.width * image.height > max_pixels:
        found = f"has {image.width} x {image.height} pixels"
        raise ImageError(where, found, f"at most {max_pixels}", reason_code="too_large")
    return image


def decode_image(
    data: bytes, where: str, *, max_pixels: int = MAX_PIXELS, at_least_hw: tuple[int, int] | None = None
) -> Image.Image:
    """Decode to RGB, upright. Alpha is laid on white; 16-bit grey is scaled to 8; CMYK and palettes are converted.

    With `at_least_hw`, a large JPEG may be decoded at a half, a quarter or an eighth of its size, never below that.

    Raises:
        ImageError: as `open_image`, or the pixels are damaged or cut off.
    """
    image = open_image(data, where, max_pixels=max_pixels)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if at_least_hw and image.format == "JPEG" and image.mode in ("RGB", "L"):
                longest = max(at_least_hw)  # an EXIF turn swaps the sides: ask for the longer both ways
                image.draft(image.mode, (longest, longest))
            image.load()
            return _to_rgb(ImageOps.exif_transpose(image))
    except (OSError, ValueError, SyntaxError, EOFError, IndexError, Image.DecompressionBombError) as exc:
        raise ImageError(where, f"is damaged ({exc})"[:200], "whole pixels", reason_code="damaged") from exc


def inspect_image(data: bytes, where: str, *, max_pixels: int = MAX_PIXELS) -> tuple[ImageFacts, Image.Image]:
    """Decode an image fully and return what is to be known about it, with its RGB pixels. Raises ImageError."""
    kind = str(open_image(data, where, max_pixels=max_pixels).format)
    image = decode_image(data, where, max_pixels=max_pixels)
    return ImageFacts(width=image.width, height=image.height, format=kind), image


def load_array(
    data: bytes, where: str, *, size_hw: tuple[int, int], resize: str, max_pixels: int = MAX_PIXELS
) -> UInt8Array:
    """Decode and resize: bytes to (height, width, 3) uint8. The only preprocessing outside the network.

    `resize`: squash (ignore the aspect), fit_crop (fill, cut the middle out), letterbox (fit, grey bars).
    Antialiased bilinear. Raises ImageError.
    """
    at_least = size_hw if resize == "squash" else None
    image = decode_image(data, where, max_pixels=max_pixels, at_least_hw=at_least)
    height, width = size_hw
    if resize == "fit_crop":
        image = ImageOps.fit(image, (width, height), Image.Resampling.BILINEAR)
    elif resize == "letterbox":
        image = ImageOps.pad(image, (width, height), Image.Resampling.BILINEAR, color=(128, 128, 128))
    elif image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.BILINEAR)
    return np.asarray(image, dtype=np.uint8)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode in _WIDE_MODES:
        values = np.asarray(image).astype(np.float64)
        top = 65535.0 if values.max(initial=0) > 255 else 255.0
        return Image.fromarray((values.clip(0, top) * (255.0 / top)).round().astype(np.uint8)).convert("RGB")
    if "A" in image.mode or "transparency" in image.info:
        rgba = image.convert("RGBA")
        canvas = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(canvas, rgba).convert("RGB")
    return image.convert("RGB")
