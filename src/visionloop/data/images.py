"""Bytes to pixels: the one way an image is decoded and resized, for ingest, training, judging and serving alike.

Pure: no disk, no network. Shapes: height x width x 3, uint8, RGB. What one function here reads, all of them read:
ingest decides by `decode_grey`, with the same decoder, what goes in.

JPEGs take a fast path: libjpeg-turbo decodes at 1/2, 1/4 or 1/8 of the size, if that is still at least as large as
asked. It names lost pixels, and such a file is damaged. What else it refuses or warns about goes to Pillow, which gets
the picture without its notes (`data/encoded.py`): its own reading of them refuses files that libjpeg reads.
"""

import io
import math
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image, ImageFile, features

from visionloop.data.encoded import Size, name_readable, parse_encoded, read_orientation
from visionloop.data.modes import find_brightest, flatten, resize_channels, to_rgb
from visionloop.errors import ImageError
from visionloop.records import MAX_PIXELS

BAR_COLOUR = (128, 128, 128)

UInt8Array = NDArray[np.uint8]
Box = tuple[float, float, float, float]  # left, top, right, bottom

_SCALES = (8, 4, 2)  # libjpeg-turbo has other scales, without SIMD code: slower than the next larger one of these
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
# What libjpeg warns of when pixels are lost. Its other warnings (an odd version, a few bytes too many) lose none.
_DAMAGE = re.compile(
    "remature end|bad Huffman code|bad arithmetic code|instead of RST"
    "|before marker 0x(d[0-7]|da|c4)"  # bytes left over where a part of the picture ends
)
# Pillow's classes by format: `Image.open` has a limit of its own on pixels.
_CLASSES = {
    "JPEG": ("PIL.JpegImagePlugin", "JpegImageFile"),
    "PNG": ("PIL.PngImagePlugin", "PngImageFile"),
    "WEBP": ("PIL.WebPImagePlugin", "WebPImageFile"),
    "AVIF": ("PIL.AvifImagePlugin", "AvifImageFile"),
    "HEIF": ("pi_heif", "HeifImageFile"),
    "TIFF": ("PIL.TiffImagePlugin", "TiffImageFile"),
    "BMP": ("PIL.BmpImagePlugin", "BmpImageFile"),
    "GIF": ("PIL.GifImagePlugin", "GifImageFile"),
    "PPM": ("PIL.PpmImagePlugin", "PpmImageFile"),
}


@dataclass(frozen=True)
class ImageFacts:
    """What the header and a full decode say about an image. Width and height are those after the EXIF rotation.

    `bits` are those that its brightest sample needs, where a sample has 16 bits; else 0.
    """

    width: int
    height: int
    format: str
    bits: int = 0


class _Opened:
    """An encoded image whose header is read, within the limit on pixels. `size` is the size before the orientation."""

    def __init__(self, data: bytes, where: str, max_pixels: int | None, max_decoded: int | None = None) -> None:
        """Raises ImageError: not an image we read, damaged, or too large. `max_pixels` None: any size.

        `max_decoded` is the limit on the pixels that `decode` really makes; None: no other than `max_pixels`.
        """
        self.encoded, self._where, self._image = parse_encoded(data, where), where, None
        size = self.encoded.size
        if size is None:  # only the decoder knows it; it has decoded nothing yet
            self._image = open_image(self.encoded.kind, data, where)
            size = self._image.size
        check_pixels(size, where, max_pixels)
        self.size: Size = size
        self._max_decoded = max_decoded

    @property
    def orientation(self) -> int:
        return read_orientation(self.encoded.info if self._image is None else self._image.info)

    def decode(self, needed: Size) -> tuple[Image.Image, bool]:
        """Return L, RGB or opaque RGBA, no smaller than `needed`, and whether it is scaled. Raises ImageError."""
        if self.encoded.is_streamed:  # rows that are scaled down as they come: the whole is never there
            self._check_decoded(_choose_scale(self.size, needed))
        else:
            self._check_decoded(self.size)
        pixels = self.decode_turbo(needed)
        if pixels is not None:
            return Image.fromarray(pixels), True
        self._check_decoded(self.size)
        image = self._image or open_image(self.encoded.kind, self.encoded.picture, self._where)
        if image.size != self.size:  # the limit was checked on another size
            raise make_damaged(self._where, "two sizes in it")
        return load_pixels(image, self._where, self.encoded.bits, in_place=True), False

    def _check_decoded(self, size: Size) -> None:
        if self._max_decoded is not None and size[0] * size[1] > self._max_decoded:
            found = f"has {self.size[0]} x {self.size[1]} pixels"
            expected = f"at most {self._max_decoded} to decode here (`serve.max_pixels`)"
            todo = "Send it smaller, or as a JPEG that is not progressive: of that fewer pixels are decoded."
            raise ImageError(self._where, found, expected, todo, reason_code="too_large")

    def decode_turbo(self, needed: Size, *, grey: bool = False) -> UInt8Array | None:
        """Decode a JPEG by libjpeg-turbo, to (h, w) or (h, w, 3). Raises ImageError.

        None where Pillow must do it: another format, an unusual kind, or a warning that loses no pixels.
        """
        encoded = self.encoded
        if encoded.num_colours not in (1, 3) or (grey and not encoded.is_usual):
            return None
        width, height = needed if grey else _choose_scale(self.size, needed)
        one = grey or encoded.num_colours == 1
        try:
            pixels = simplejpeg.decode_jpeg(
                encoded.data,
                colorspace="GRAY" if one else "RGB",
                fastupsample=needed[0] < width and needed[1] < height,  # coarse: they are averaged next
                min_height=height,
                min_width=width,
                min_factor=1,
            )
        except (ValueError, KeyError, RuntimeError) as exc:
            if _DAMAGE.search(str(exc)):
                raise make_damaged(self._where, str(exc)) from exc
            return None
        return np.asarray(pixels[:, :, 0] if one else pixels, np.uint8)


def decode_image(data: bytes, where: str, *, max_pixels: int | None = MAX_PIXELS) -> Image.Image:
    """Decode to RGB, upright. Alpha is laid on white; 16-bit grey is scaled to 8; CMYK and palettes are converted.

    `max_pixels` None, here and below: an image that ingest has let in. Raises ImageError.
    """
    opened = _Opened(data, where, max_pixels)
    return _turn(to_rgb(opened.decode(opened.size)[0]), opened.orientation)


def decode_grey(
    data: bytes, where: str, *, at_least_px: int, max_pixels: int | None = MAX_PIXELS
) -> tuple[ImageFacts, UInt8Array]:
    """Check an image by a full decode of its data and return its facts and its grey pixels (h, w), upright.

    The pixels may be scaled down, but no side goes below `at_least_px`. This is for hashes: it costs a third of
    `decode_image`. Raises ImageError.
    """
    opened = _Opened(data, where, max_pixels)
    grey_hw, bits = opened.decode_turbo((at_least_px, at_least_px), grey=True), 0
    if grey_hw is None:
        pixels = opened.decode(opened.size)[0]
        if opened.encoded.is_wide:  # 4095 of 65535 is 16 of 255
            bits = 8 + max(0, find_brightest(pixels) - 1).bit_length()
        grey = pixels.convert("L")
        if (factor := min(grey.size) // at_least_px) > 1:
            grey = grey.resize((grey.width // factor, grey.height // factor), Image.Resampling.BOX)
        grey_hw = np.asarray(grey)
    orientation = opened.orientation
    if orientation > 1:
        grey_hw = np.asarray(_turn(Image.fromarray(grey_hw), orientation))
    width, height = _swap(opened.size, orientation)
    return ImageFacts(width, height, opened.encoded.kind, bits), grey_hw


def load_array(
    data: bytes, where: str, *, size_hw: tuple[int, int], resize: str, max_pixels: int | None = MAX_PIXELS
) -> UInt8Array:
    """Decode and resize: bytes to (height, width, 3) uint8. The only preprocessing outside the network.

    `resize`: squash (ignore the aspect ratio), fit_crop (fill, cut out the middle), letterbox (fit, grey bars). Of a
    JPEG that is larger than asked each new pixel is the mean of 2 x 2 or more samples: that costs half, and differs
    by one to two grey levels from Pillow's antialiased bilinear filter, which resizes all others. The same bytes give
    the same array in every thread and process of a machine. Raises ImageError.
    """
    return load_sized_array(data, where, size_hw=size_hw, resize=resize, max_pixels=max_pixels)[0]


def load_sized_array(
    data: bytes,
    where: str,
    *,
    size_hw: tuple[int, int],
    resize: str,
    max_pixels: int | None = MAX_PIXELS,
    max_decoded: int | None = None,
) -> tuple[UInt8Array, Size]:
    """Do what `load_array` does; return the width and height of the whole image too, as it is shown.

    `max_decoded` is a limit on the pixels that are decoded: of a large JPEG that is not progressive, a part of all.
    """
    opened = _Opened(data, where, max_pixels, max_decoded)
    orientation = opened.orientation
    array = _make_array(opened.size, orientation, opened.decode, size_hw, resize)
    return array, _swap(opened.size, orientation)


def convert_image(
    image: Image.Image, where: str, *, size_hw: tuple[int, int], resize: str, max_pixels: int | None = MAX_PIXELS
) -> UInt8Array:
    """Do what `load_array` does, for an image that Pillow has opened: the same array as from its file.

    The exception is a JPEG whose pixels are decoded already, at full size: it may differ by one to two grey levels.
    Two threads may call this with the same image. Raises ImageError.
    """
    check_pixels(image.size, where, max_pixels)
    if image.mode == "F":
        todo = "Scale it, and convert it to mode L or RGB."
        raise ImageError(where, "has pixels of floating point (mode F)", "8 or 16 bits", todo)
    with _DECODING[id(image) // 64 % len(_DECODING)]:
        data = _read_undecoded(image)
        if data is None:
            pixels = load_pixels(image, where)  # a PNG may have its EXIF behind its pixels
            orientation = read_orientation(image.info)
            return _make_array(pixels.size, orientation, lambda needed: (pixels, False), size_hw, resize)
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


def check_pixels(size: Size, where: str, max_pixels: int | None) -> None:
    """Raise ImageError if an image has no pixels, or more than `max_pixels`; None is no limit."""
    if max_pixels is not None and size[0] * size[1] > max_pixels:
        found = f"has {size[0]} x {size[1]} pixels"
        raise ImageError(where, found, f"at most {max_pixels}", reason_code="too_large")
    if not size[0] * size[1]:
        raise ImageError(where, f"is empty ({size[0]} x {size[1]} pixels)", "an image", reason_code="empty")


def _read_undecoded(image: Image.Image) -> bytes | None:
    """Return the bytes of a JPEG that is opened and not decoded: its pixels cannot have been changed. Else None."""
    # MPO: a phone's JPEG with a second picture behind the first
    if not isinstance(image, ImageFile.ImageFile) or image.format not in ("JPEG", "MPO") or image.tell():
        return None
    if image.fp is None or image.fp.closed:  # it is decoded, or its owner has closed it
        return None
    image.fp.seek(0)
    return image.fp.read()


def _make_array(
    source: Size,
    orientation: int,
    decode: Callable[[Size], tuple[Image.Image, bool]],
    size_hw: tuple[int, int],
    resize: str,
) -> UInt8Array:
    """Turn an image of the size `source` into (height, width, 3). `decode` gives pixels of a size at least."""
    upright = size_hw[1], size_hw[0]
    share, size = _fit(source, _swap(upright, orientation), resize)
    needed = math.ceil(size[0] / (share[2] - share[0])), math.ceil(size[1] / (share[3] - share[1]))
    pixels, may_sample = decode(needed)
    small = _turn(to_rgb(_resize(pixels, share, size, may_sample=may_sample)), orientation)
    if small.size != upright:
        canvas = Image.new("RGB", upright, BAR_COLOUR)
        canvas.paste(small, (round((upright[0] - small.width) / 2), round((upright[1] - small.height) / 2)))
        small = canvas
    return np.asarray(small, dtype=np.uint8)


class _ShortFirst(io.BytesIO):
    """A file whose first read is short: of 16 bytes Pillow's WebP reader cannot tell the size, nor apply its limit."""

    def read(self, size: int | None = -1) -> bytes:
        return super().read(16 if self.tell() == 0 else size)


def open_image(kind: str, data: bytes, where: str) -> Image.Image:
    """Read the header by Pillow, which decodes nothing yet. Raises ImageError."""
    module, name = _CLASSES[kind]
    try:
        file = _ShortFirst(data) if kind == "WEBP" else io.BytesIO(data)
        opened: Image.Image = getattr(import_module(module), name)(file)
    except MemoryError:
        raise
    except ImportError as exc:
        todo = "Install visionloop with the extra `heic`, or export it as JPEG."
        raise ImageError(where, "is HEIC, and pi-heif is not installed", name_readable(), todo) from exc
    except SyntaxError as exc:
        if kind == "AVIF" and not features.check("avif"):
            todo = "Install one of Pillow's own wheels, or export it as JPEG."
            raise ImageError(where, "is AVIF, and this Pillow is built without it", name_readable(), todo) from exc
        raise make_damaged(where, str(exc) or "its header") from exc
    except Exception as exc:  # a malformed file can make the parser raise anything
        raise make_damaged(where, str(exc) or "its header") from exc
    return opened


def make_damaged(where: str, why: str) -> ImageError:
    """Return the error of an image whose pixels are not whole."""
    return ImageError(where, f"is damaged ({why})"[:200], "whole pixels", reason_code="damaged")


def load_pixels(image: Image.Image, where: str, bits: int = 0, *, in_place: bool = False) -> Image.Image:
    """Decode with Pillow, without the EXIF rotation, to what `modes.flatten` returns. Raises ImageError."""
    try:
        image.load()
        return flatten(image, bits, in_place=in_place)
    except MemoryError:
        raise
    except Exception as exc:  # a malformed file can make the decoder raise anything
        raise make_damaged(where, str(exc)) from exc


def _choose_scale(size: Size, needed: Size) -> Size:
    """Return the smallest size at which libjpeg-turbo can decode without going below `needed`."""
    for scale in _SCALES:
        width, height = -(-size[0] // scale), -(-size[1] // scale)
        if width >= needed[0] and height >= needed[1]:
            return width, height
    return size


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
        return resize_channels(image, size, box)
    each_x, each_y = max(2, round(ratio_x)), max(2, round(ratio_y))
    samples = image.resize((each_x * size[0], each_y * size[1]), Image.Resampling.NEAREST, box=box)
    return samples.reduce((each_x, each_y))
