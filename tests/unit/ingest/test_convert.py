"""TIFF, BMP, GIF and PPM become PNGs: the first picture, upright, with the same pixels; the same bytes each time."""

import io
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image

from visionloop.errors import ImageError
from visionloop.ingest.inspect import convert_to_png


def make_picture(mode: str = "RGB") -> Image.Image:
    coarse = np.random.default_rng(5).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((64, 48), Image.Resampling.BICUBIC).convert(mode)


def make_wide(top: int = 65535) -> Image.Image:
    return Image.fromarray(np.linspace(0, top, 64 * 48).astype(np.uint16).reshape(48, 64))


def encode(kind: str, image: Image.Image, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def convert(data: bytes) -> Image.Image:
    png = convert_to_png(data, "x", max_pixels=10_000)
    assert png is not None
    assert png == convert_to_png(data, "x", max_pixels=10_000)
    image = Image.open(io.BytesIO(png))
    assert (image.format, set(image.info) - {"transparency"}) == ("PNG", set())
    return image


LOSSLESS: dict[str, tuple[str, Image.Image, dict[str, object]]] = {
    "tiff": ("TIFF", make_picture(), {"compression": "tiff_lzw", "dpi": (300, 300), "icc_profile": bytes(200)}),
    "tiff-grey": ("TIFF", make_picture("L"), {}),
    "tiff-16-bit": ("TIFF", make_wide(), {}),
    "tiff-alpha": ("TIFF", make_picture("RGBA"), {}),
    "tiff-fax": ("TIFF", make_picture("1"), {"compression": "group4"}),
    "tiff-pages": ("TIFF", make_picture(), {"save_all": True, "append_images": [make_picture("L")]}),
    "bmp": ("BMP", make_picture(), {}),
    "bmp-palette": ("BMP", make_picture("P"), {}),
    "gif": ("GIF", make_picture("L"), {}),
    "gif-animated": ("GIF", make_picture("L"), {"save_all": True, "append_images": [Image.new("L", (64, 48), 7)]}),
    "ppm": ("PPM", make_picture(), {}),
    "pgm": ("PPM", make_picture("L"), {}),
    "pgm-16-bit": ("PPM", make_wide(), {}),
    "pbm": ("PPM", make_picture("1"), {}),
}


@pytest.mark.parametrize("name", LOSSLESS)
def test_every_pixel_of_the_first_picture_stays(name: str) -> None:
    kind, image, options = LOSSLESS[name]
    converted = convert(encode(kind, image, **options))
    if image.mode in ("1", "P") or kind == "GIF":
        image = image.convert("RGB")
        converted = converted.convert("RGB")
    assert np.array_equal(np.asarray(converted), np.asarray(image))


@pytest.mark.parametrize("orientation", [3, 6, 8])
def test_a_tiff_is_turned_upright_once(orientation: int) -> None:
    data = encode("TIFF", make_picture(), tiffinfo={274: orientation})
    turns = {3: Image.Transpose.ROTATE_180, 6: Image.Transpose.ROTATE_270, 8: Image.Transpose.ROTATE_90}
    assert np.array_equal(np.asarray(convert(data)), np.asarray(make_picture().transpose(turns[orientation])))


def test_transparent_parts_of_a_gif_stay_so() -> None:
    image = make_picture("P")
    image.putpixel((3, 3), 9)
    converted = convert(encode("GIF", image, transparency=9)).convert("RGBA")
    assert converted.getpixel((3, 3))[3] == 0
    assert converted.getpixel((60, 40))[3] == (0 if image.getpixel((60, 40)) == 9 else 255)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "AVIF"])
def test_what_is_read_as_it_is_is_not_converted(kind: str) -> None:
    assert convert_to_png(encode(kind, make_picture()), "x", max_pixels=10_000) is None
    assert convert_to_png(b"text", "x", max_pixels=10_000) is None


@pytest.mark.parametrize(
    ("make", "code", "message"),
    [
        (lambda: encode("TIFF", make_picture(), tiffinfo={254: 1}), "not_an_image", "RAW .*small preview"),
        (lambda: encode("TIFF", make_picture(), tiffinfo={50706: b"\1\4\0\0"}), "not_an_image", "RAW"),
        (lambda: encode("TIFF", Image.new("F", (9, 9))), "not_an_image", "floating point"),
        (lambda: encode("TIFF", Image.new("I", (9, 9), 70_000)), "not_an_image", "70000; expected 8 or 16 bits"),
        (lambda: encode("TIFF", make_picture())[:300], "damaged", "damaged"),
        (lambda: encode("BMP", make_picture())[:300], "damaged", "damaged"),
        (lambda: encode("BMP", Image.new("L", (200, 200))), "too_large", "has 200 x 200 pixels"),
        (lambda: b"II*\0" + bytes(40), "damaged", "damaged"),
        (lambda: b"P6 0 0 255 ", "damaged", "damaged"),
    ],
)
def test_what_cannot_become_a_png_says_why(make: Callable[[], bytes], code: str, message: str) -> None:
    with pytest.raises(ImageError, match=message) as caught:
        convert_to_png(make(), "x", max_pixels=10_000)
    assert caught.value.reason_code == code
