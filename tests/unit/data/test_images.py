"""Decoding and resizing: each kind of image on purpose, and what is refused."""

import io

import numpy as np
import pytest
from PIL import Image

from visionloop.data.images import decode_image, inspect_image, load_array, open_image
from visionloop.errors import ImageError


def encode(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def make_halves(width: int = 64, height: int = 32) -> Image.Image:
    """Left half red, right half blue."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[:, : width // 2, 0] = 255
    pixels[:, width // 2 :, 2] = 255
    return Image.fromarray(pixels)


def test_squash_ignores_the_aspect() -> None:
    array = load_array(encode(make_halves(), "PNG"), "x", size_hw=(32, 32), resize="squash")
    assert array.shape == (32, 32, 3)
    assert array.dtype == np.uint8
    assert array[0, 0].tolist() == [255, 0, 0]
    assert array[0, 31].tolist() == [0, 0, 255]


def test_fit_crop_cuts_the_middle_out() -> None:
    image = Image.new("RGB", (96, 32), (0, 255, 0))
    image.paste((255, 0, 0), (0, 0, 24, 32))
    array = load_array(encode(image, "PNG"), "x", size_hw=(32, 32), resize="fit_crop")
    assert (array == [0, 255, 0]).all()


def test_letterbox_adds_grey_bars() -> None:
    array = load_array(encode(make_halves(), "PNG"), "x", size_hw=(32, 32), resize="letterbox")
    assert array[0, 0].tolist() == [128, 128, 128]
    assert array[16, 0].tolist() == [255, 0, 0]


def test_exif_orientation_is_applied() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turn a quarter right to see it upright
    data = encode(make_halves(), "PNG", exif=exif)
    image = decode_image(data, "x")
    assert image.size == (32, 64)
    assert image.getpixel((16, 2)) == (255, 0, 0)
    facts, _ = inspect_image(data, "x")
    assert (facts.width, facts.height, facts.format) == (32, 64, "PNG")


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (Image.new("L", (40, 40), 100), (100, 100, 100)),
        (Image.new("1", (40, 40), 1), (255, 255, 255)),
        (Image.new("P", (40, 40), 0), (0, 0, 0)),
        (Image.new("RGBA", (40, 40), (255, 0, 0, 0)), (255, 255, 255)),
        (Image.new("LA", (40, 40), (0, 0)), (255, 255, 255)),
        (Image.fromarray(np.full((40, 40), 65535, np.uint16)), (255, 255, 255)),
        (Image.fromarray(np.full((40, 40), 32896, np.uint16)), (128, 128, 128)),
    ],
    ids=["grey", "one-bit", "palette", "alpha", "grey-alpha", "16-bit-white", "16-bit-middle"],
)
def test_every_mode_becomes_rgb(image: Image.Image, expected: tuple[int, int, int]) -> None:
    decoded = decode_image(encode(image, "PNG"), "x")
    assert decoded.mode == "RGB"
    assert decoded.getpixel((5, 5)) == expected


def test_cmyk_jpeg_becomes_rgb() -> None:
    decoded = decode_image(encode(Image.new("CMYK", (40, 40), (0, 0, 0, 0)), "JPEG"), "x")
    assert decoded.mode == "RGB"
    assert min(decoded.getpixel((5, 5))) > 250


def test_large_jpeg_is_near_the_full_decode() -> None:
    noise = Image.effect_noise((800, 600), 60).convert("RGB")
    data = encode(noise, "JPEG", quality=90)
    fast = load_array(data, "x", size_hw=(100, 100), resize="squash").astype(int)
    slow = np.asarray(decode_image(data, "x").resize((100, 100), Image.Resampling.BILINEAR)).astype(int)
    assert np.abs(fast - slow).mean() < 4


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (b"", "empty"),
        (b"just text\n" * 100, "not_an_image"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not_an_image"),
        (encode(Image.new("RGB", (40, 40)), "GIF"), "not_an_image"),
        (encode(Image.new("RGB", (40, 40)), "BMP"), "not_an_image"),
        (encode(make_halves(), "PNG")[:90], "damaged"),
        (encode(Image.effect_noise((200, 200), 50).convert("RGB"), "JPEG")[:3000], "damaged"),
        (b"\x89PNG\r\n\x1a\n" + b"\x00" * 50, "not_an_image"),
    ],
    ids=["empty", "text", "svg", "gif", "bmp", "cut-png", "cut-jpeg", "png-of-zeros"],
)
def test_what_cannot_be_used_has_a_code(data: bytes, code: str) -> None:
    with pytest.raises(ImageError) as caught:
        decode_image(data, "photo.jpg")
    assert caught.value.reason_code == code
    assert str(caught.value).startswith("photo.jpg: ")


def test_too_many_pixels_are_refused_before_they_are_decoded() -> None:
    data = encode(Image.new("1", (20_000, 20_000)), "PNG")
    with pytest.raises(ImageError, match="expected at most 50000000") as caught:
        open_image(data, "bomb.png")
    assert caught.value.reason_code == "too_large"
