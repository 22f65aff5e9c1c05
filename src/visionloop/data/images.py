"""Bytes to pixels: the one way an image is decoded and resized, for training, judging and serving alike.

Pure: no disk, no network. Shapes: height x width x 3, uint8, RGB. Formats: JPEG, PNG, WebP.

JPEGs take a fast path: libjpeg-turbo decodes at 1/2, 1/4 or 1/8 of the size, if that is still at least as large as
asked. If it refuses the file or warns, Pillow decodes it instead, and decides whether the file is damaged.
"""

import io
import math
import threading
from dataclasses import dataclass
from typing import Any

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image, ImageFile

from visionloop.errors import ImageError

FORMATS = ("JPEG", "PNG", "WEBP")
MAX_PIXELS = 50_000_000
MAX_SCANS = 100
BAR_COLOUR = (128, 128, 128)

UInt8Array = NDArray[np.uint8]
Size = tuple[int, int]  # (width, height), as Pillow has it
Box = tuple[float, float, float, float]  # left, top, right, bottom

_WIDE_MODES = ("I", "I;16", "I;16B", "I;16L", "I;16N")
_SCALES = (8, 4, 2)  # libjpeg-turbo has other scales, without SIMD code: slower than the next larger one of these
_ORIENTATION = 0x0112
_EXIF_KEYS = frozenset({"exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp"})
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SIDEWAYS = (5, 6, 7, 8)
_DECODING = tuple(threading.Lock() for _ in range(16))  # two threads may have the same image, and one file behind it


@dataclass(frozen=True)
class ImageFacts:
    """What the header and a full decode say about an image. Width and height are those after the EXIF rotation."""

    width: int
    height: int
    format: str


def open_image(data: bytes, where: str, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Read the header of an encoded image, without decoding its pixels.

    Raises:
        ImageError: not an image, a format that is not allowed, more than `max_pixels`, or more than 100 JPEG scans
            (no camera or program writes so many, and each costs a pass over all pixels).
    """
    if not data:
        raise ImageError(where, "is empty (0 bytes)", "an image", reason_code="empty")
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError as exc:
        found, limit = "has too many pixels", min(max_pixels, 2 * (Image.MAX_IMAGE_PIXELS or max_pixels))
        raise ImageError(where, found, f"at most {limit}", reason_code="too_large") from exc
    except MemoryError:
        raise
    except Exception as exc:  # a malformed file can make the parser raise anything
        raise ImageError(where, "is not an image we read", "JPEG, PNG or WebP", reason_code="not_an_image") from exc
    _check_pixels(image.size, where, max_pixels)
    if _is_jpeg(image) and (scans := data.count(b"\xff\xda")) > MAX_SCANS:
        raise ImageError(where, f"has {scans} scans", f"at most {MAX_SCANS}", reason_code="too_large")
    return image


def decode_image(data: bytes, where: str, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode to RGB, upright. Alpha is laid on white; 16-bit grey is scaled to 8; CMYK and palettes are converted.

    Raises:
        ImageError: as `open_image`, or the pixels are damaged or cut off.
    """
    header = open_image(data, where, max_pixels=max_pixels)
    pixels = _decode_jpeg(data, header, header.size) or _load(header, where)
    return _turn(_to_rgb(pixels), _read_orientation(header))


def decode_grey(
    data: bytes, where: str, *, at_least_px: int, max_pixels: int = MAX_PIXELS
) -> tuple[ImageFacts, UInt8Array]:
    """Check an image by a full decode of its data and return its facts and its grey pixels (h, w), upright.

    The pixels may be scaled down, but no side goes below `at_least_px`. This is for hashes: it costs a third of
    `decode_image`. Raises ImageError.
    """
    header = open_image(data, where, max_pixels=max_pixels)
    grey = _decode_jpeg(data, header, (at_least_px, at_least_px), grey=True)
    if grey is None:
        grey = _load(header, where).convert("L")
        if (factor := min(grey.size) // at_least_px) > 1:
            grey = grey.resize((grey.width // factor, grey.height // factor), Image.Resampling.BOX)
    orientation = _read_orientation(header)
    width, height = _swap(header.size, orientation)
    kind = "JPEG" if _is_jpeg(header) else str(header.format)
    return ImageFacts(width, height, kind), np.asarray(_turn(grey, orientation), dtype=np.uint8)


def load_array(
    data: bytes, where: str, *, size_hw: tuple[int, int], resize: str, max_pixels: int = MAX_PIXELS
) -> UInt8Array:
    """Decode and resize: bytes to (height, width, 3) uint8. The only preprocessing outside the network.

    `resize`: squash (ignore the aspect ratio), fit_crop (fill, cut out the middle), letterbox (fit, grey bars). PNG and
    WebP are resized by Pillow's antialiased bilinear filter. In a JPEG that is larger than asked each new pixel is the
    mean of 2 x 2 or more samples. That costs half, and differs from Pillow's filter by one to two grey levels. The same
    bytes give the same array in every thread and process of a machine. Raises ImageError.
    """
    header = open_image(data, where, max_pixels=max_pixels)
    return _make_array(header, data if _is_jpeg(header) else None, where, size_hw, resize)


def convert_image(
    image: Image.Image, where: str, *, size_hw: tuple[int, int], resize: str, max_pixels: int = MAX_PIXELS
) -> UInt8Array:
    """Do what `load_array` does, for an image that Pillow has opened: the same array as from its file.

    The exception is a JPEG whose pixels are decoded already, at full size: it may differ by one to two grey levels.
    Two threads may call this with the same image. Raises ImageError.
    """
    _check_pixels(image.size, where, max_pixels)
    if image.mode == "F":
        todo = "Scale it, and convert it to mode L or RGB."
        raise ImageError(where, "has pixels of floating point (mode F)", "8 or 16 bits", todo)
    with _DECODING[id(image) // 64 % len(_DECODING)]:
        data = _read_undecoded(image)
        if data is None:
            return _make_array(image, None, where, size_hw, resize)
    return load_array(data, where, size_hw=size_hw, resize=resize, max_pixels=max_pixels)


def make_image(pixels: NDArray[Any], where: str) -> Image.Image:
    """Return pixels as an image: uint8, (h, w) grey, (h, w, 3) RGB or (h, w, 4) RGB and alpha. Raises ImageError."""
    shape = " x ".join(map(str, pixels.shape)) or "no"
    if pixels.dtype != np.uint8:
        todo = "Convert it: values from 0 to 255, then `.astype('uint8')`."
        raise ImageError(where, f"is an array of {pixels.dtype}", "an array of uint8", todo)
    if pixels.ndim == 3 and pixels.shape[2] == 1:
        pixels = pixels[:, :, 0]
    if pixels.ndim not in (2, 3) or (pixels.ndim == 3 and pixels.shape[2] not in (3, 4)):
        expected = "height x width (grey), height x width x 3 (RGB), or x 4 (RGB and alpha)"
        raise ImageError(where, f"is an array of shape {shape}", expected)
    if 0 in pixels.shape:
        raise ImageError(where, f"is empty ({shape} pixels)", "an image", reason_code="empty")
    return Image.fromarray(pixels)


def _check_pixels(size: Size, where: str, max_pixels: int) -> None:
    if size[0] * size[1] > max_pixels:
        found = f"has {size[0]} x {size[1]} pixels"
        raise ImageError(where, found, f"at most {max_pixels}", reason_code="too_large")
    if not size[0] * size[1]:
        raise ImageError(where, f"is empty ({size[0]} x {size[1]} pixels)", "an image", reason_code="empty")


def _read_undecoded(image: Image.Image) -> bytes | None:
    """Return the bytes of a JPEG that is opened and not decoded: its pixels cannot have been changed. Else None."""
    if not isinstance(image, ImageFile.ImageFile) or not _is_jpeg(image) or image.tell():
        return None
    if image.fp is None or image.fp.closed:  # it is decoded, or its owner has closed it
        return None
    image.fp.seek(0)
    return image.fp.read()


def _make_array(
    image: Image.Image, jpeg: bytes | None, where: str, size_hw: tuple[int, int], resize: str
) -> UInt8Array:
    """Turn an image into (height, width, 3). `jpeg` are the bytes for the fast path."""
    upright = size_hw[1], size_hw[0]
    pixels = None if jpeg else _load(image, where)  # a PNG may have its EXIF behind its pixels
    orientation = _read_orientation(image)
    wanted = _swap(upright, orientation)
    share, size = _fit(image.size, wanted, resize)
    may_sample = False
    if pixels is None:
        needed = math.ceil(size[0] / (share[2] - share[0])), math.ceil(size[1] / (share[3] - share[1]))
        pixels = _decode_jpeg(jpeg or b"", image, needed)
        may_sample = pixels is not None
        pixels = pixels or _load(image, where)
    small = _turn(_to_rgb(_resize(pixels, share, size, may_sample=may_sample)), orientation)
    if small.size != upright:
        canvas = Image.new("RGB", upright, BAR_COLOUR)
        canvas.paste(small, (round((upright[0] - small.width) / 2), round((upright[1] - small.height) / 2)))
        small = canvas
    return np.asarray(small, dtype=np.uint8)


def _is_jpeg(image: Image.Image) -> bool:
    return image.format in ("JPEG", "MPO")  # MPO: a phone's JPEG with a second picture behind the first


def _load(image: Image.Image, where: str) -> Image.Image:
    """Decode with Pillow to grey or RGB, without the EXIF rotation. Raises ImageError."""
    try:
        image.load()
        return _flatten(image)
    except MemoryError:
        raise
    except Exception as exc:  # a malformed file can make the decoder raise anything
        raise ImageError(where, f"is damaged ({exc})"[:200], "whole pixels", reason_code="damaged") from exc


def _flatten(image: Image.Image) -> Image.Image:
    """Turn any mode into L or RGB."""
    if image.mode in _WIDE_MODES:
        values = np.asarray(image).astype(np.float64)
        top = 65535.0 if values.max(initial=0) > 255 else 255.0
        return Image.fromarray((values.clip(0, top) * (255.0 / top)).round().astype(np.uint8))
    if "A" in image.mode or "transparency" in image.info:
        rgba = image.convert("RGBA")
        canvas = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(canvas, rgba).convert("RGB")
    return image if image.mode == "L" else _to_rgb(image)


def _to_rgb(image: Image.Image) -> Image.Image:
    return image if image.mode == "RGB" else image.convert("RGB")  # `convert` copies even where there is nothing to do


def _decode_jpeg(data: bytes, header: Image.Image, needed: Size, *, grey: bool = False) -> Image.Image | None:
    """Decode with libjpeg-turbo, as small as it can be and no smaller than `needed`.

    None where Pillow must decide: other formats, CMYK, and data that libjpeg-turbo refuses or warns about.
    """
    if not _is_jpeg(header) or header.mode not in ("L", "RGB"):
        return None
    width, height = _choose_scale(header.size, needed)
    one = grey or header.mode == "L"
    try:
        if simplejpeg.decode_jpeg_header(data)[:2] != (header.height, header.width):
            return None  # two parsers read two sizes, and the pixel limit was checked on one of them
        pixels = simplejpeg.decode_jpeg(
            data,
            colorspace="GRAY" if one else "RGB",
            fastupsample=needed[0] < width and needed[1] < height,  # coarse colours are enough: they are averaged next
            min_height=height,
            min_width=width,
            min_factor=1,
        )
    except ValueError:
        return None
    return Image.fromarray(pixels[:, :, 0] if one else pixels)


def _choose_scale(size: Size, needed: Size) -> Size:
    """Return the smallest size at which libjpeg-turbo can decode without going below `needed`."""
    for scale in _SCALES:
        width, height = -(-size[0] // scale), -(-size[1] // scale)
        if width >= needed[0] and height >= needed[1]:
            return width, height
    return size


def _read_orientation(image: Image.Image) -> int:
    """Return the EXIF (or XMP) orientation, 1 to 8; 1 where there is none, or it cannot be read."""
    if image.info.keys().isdisjoint(_EXIF_KEYS):
        return 1
    try:
        value = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # broken EXIF is no reason to reject an image whose pixels are good
        return 1
    return value if isinstance(value, int) and value in _TURNS else 1


def _turn(image: Image.Image, orientation: int) -> Image.Image:
    return image.transpose(_TURNS[orientation]) if orientation in _TURNS else image


def _swap(size: Size, orientation: int) -> Size:
    """Swap width and height where the orientation is a quarter turn."""
    return (size[1], size[0]) if orientation in _SIDEWAYS else size


def _fit(source: Size, wanted: Size, rule: str) -> tuple[Box, Size]:
    """Return the part of the image that is used (edges from 0 to 1), and the size that it is resized to.

    With letterbox that size may be smaller than `wanted`: bars fill the rest.
    """
    if rule == "squash":
        return (0.0, 0.0, 1.0, 1.0), wanted
    wider = source[0] * wanted[1] - source[1] * wanted[0]  # above 0: wider than wanted
    if rule == "fit_crop":
        share_x = source[1] * wanted[0] / (wanted[1] * source[0]) if wider > 0 else 1.0
        share_y = source[0] * wanted[1] / (wanted[0] * source[1]) if wider < 0 else 1.0
        return ((1 - share_x) / 2, (1 - share_y) / 2, (1 + share_x) / 2, (1 + share_y) / 2), wanted
    width = max(1, round(source[0] * wanted[1] / source[1])) if wider < 0 else wanted[0]
    height = max(1, round(source[1] * wanted[0] / source[0])) if wider > 0 else wanted[1]
    return (0.0, 0.0, 1.0, 1.0), (width, height)


def _resize(image: Image.Image, share: Box, size: Size, *, may_sample: bool) -> Image.Image:
    """Resize a part of an image, antialiased. `may_sample`: if it becomes smaller, take the mean of samples."""
    box = (share[0] * image.width, share[1] * image.height, share[2] * image.width, share[3] * image.height)
    if box == (0, 0, *size) and image.size == size:
        return image
    ratio_x, ratio_y = (box[2] - box[0]) / size[0], (box[3] - box[1]) / size[1]
    if not may_sample or min(ratio_x, ratio_y) < 1:
        return image.resize(size, Image.Resampling.BILINEAR, box=box)
    each_x, each_y = max(2, round(ratio_x)), max(2, round(ratio_y))
    samples = image.resize((each_x * size[0], each_y * size[1]), Image.Resampling.NEAREST, box=box)
    return samples.reduce((each_x, each_y))
