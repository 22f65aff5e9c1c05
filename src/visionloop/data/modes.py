"""Pixels of any mode to grey or RGB, in little memory. Pure.

`flatten` returns L, RGB, or RGBA whose alpha is 255 everywhere: to drop that channel, a large image would have to be in
memory twice. Pillow holds four bytes a pixel for RGB too.
"""

import numpy as np
from numpy.typing import NDArray
from PIL import Image

WIDE_MODES = ("I", "I;16", "I;16B", "I;16L", "I;16N")
_BAND_PIXELS = 1 << 20  # of a large image so many are converted at a time, to hold it in memory once

Box = tuple[int, int, int, int]


def flatten(image: Image.Image, bits: int, *, in_place: bool) -> Image.Image:
    """Turn any mode into L, RGB or opaque RGBA: alpha is laid on white, 16 bits become 8.

    `bits` as in `Encoded`. `in_place`: the image may be changed, for it is the caller's own.
    """
    if image.mode in WIDE_MODES:
        return _narrow(image, bits)
    if not image.has_transparency_data:
        return image if image.mode == "L" else to_rgb(image)
    if image.mode == "LA":
        flat = Image.new("L", image.size, "white")
        flat.paste(image.getchannel("L"), mask=image)
        return flat
    if image.mode not in ("RGB", "RGBA") or not in_place:
        image = image.copy() if image.mode == "RGBA" else image.convert("RGBA")
    return _lay_on_white(image)


def to_rgb(image: Image.Image) -> Image.Image:
    """Return the image as RGB. `convert` alone copies even where there is nothing to do."""
    return image if image.mode == "RGB" else image.convert("RGB")


def find_brightest(image: Image.Image) -> int:
    """Return the highest sample of what `flatten` returned."""
    ranges = np.array(image.getextrema()).reshape(-1, 2)
    return int(ranges[:3, 1].max())


def resize_channels(image: Image.Image, size: tuple[int, int], box: tuple[float, float, float, float]) -> Image.Image:
    """Resize what `flatten` returned, antialiased. Of RGBA each channel alone: Pillow would copy the whole image."""
    if image.mode != "RGBA":
        return image.resize(size, Image.Resampling.BILINEAR, box=box)
    channels = [image.getchannel(name).resize(size, Image.Resampling.BILINEAR, box=box) for name in "RGB"]
    return Image.merge("RGB", channels)


def _lay_on_white(image: Image.Image) -> Image.Image:
    """Lay RGBA, or RGB with a transparent colour, on white, some rows at a time, in its own memory."""
    for band in _split_bands(image):
        part = image.crop(band)
        alpha = part if part.mode == "RGBA" else part.convert("RGBA")
        flat = Image.new("RGB", alpha.size, "white")
        flat.paste(alpha, mask=alpha)
        image.paste(flat, band)
    image.info.pop("transparency", None)
    return image


def _split_bands(image: Image.Image) -> list[Box]:
    rows = max(1, _BAND_PIXELS // image.width)
    return [(0, top, image.width, min(image.height, top + rows)) for top in range(0, image.height, rows)]


# A 16-bit sample of a PNG fills its 16 bits: 65535 is white, whatever the brightest sample of this picture is. A file
# may say (chunk sBIT) that its camera had fewer bits. By the standard they are then the upper ones, and the lower ones
# are zero or repeat them. Some programs store them as the lower ones:
#
#     12 bits, the value 4095 (white)   0xFFF0 or 0xFFFF: by the standard   0x0FFF: as the lower bits, white too


def _narrow(image: Image.Image, bits: int) -> Image.Image:
    """Scale 16-bit grey to 8 bits, some rows at a time."""
    bands = _split_bands(image)
    top_value = (1 << bits) - 1 if 8 <= bits < 16 and _holds_lower_bits(image, bands, bits) else 65535
    table = (np.arange(65536, dtype=np.int64).clip(0, top_value) * 510 + top_value) // (2 * top_value)
    table = table.astype(np.uint8)
    grey = Image.new("L", image.size)
    for band in bands:
        grey.paste(Image.fromarray(table[_read_wide(image, band)]), band)
    return grey


def _read_wide(image: Image.Image, band: Box) -> NDArray[np.uint16]:
    values = np.asarray(image.crop(band))
    return values if values.dtype == np.uint16 else values.clip(0, 65535).astype(np.uint16)


def _holds_lower_bits(image: Image.Image, bands: list[Box], bits: int) -> bool:
    """Say whether samples of `bits` bits lie in the lower bits: no upper one is in use, and the lower ones are."""
    spare = (1 << (16 - bits)) - 1
    uses_spare = False
    for band in bands:
        values = _read_wide(image, band)
        if (values >> bits).any():
            return False
        uses_spare = uses_spare or bool((values & spare).any())
    return uses_spare
