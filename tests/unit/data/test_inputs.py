"""An image in every form that a caller has gives the array of its file; what is no image gets one clear error."""

import io
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps

from visionloop.data.images import convert_image, load_array
from visionloop.data.inputs import is_one_image, load_input
from visionloop.errors import ImageError

SIZE: dict[str, Any] = {"size_hw": (32, 48), "resize": "letterbox"}


def make_photo(width: int = 300, height: int = 200) -> Image.Image:
    """A smooth picture with an edge, different in every corner."""
    coarse = np.random.default_rng(3).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    image = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    image.paste((250, 20, 40), (0, 0, width // 3, height // 4))
    return image


def encode(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def rotated() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


def make_wide() -> Image.Image:
    return Image.fromarray(np.asarray(make_photo().convert("L")).astype(np.uint16) * 257)


def make_alpha() -> Image.Image:
    image = make_photo().convert("RGBA")
    image.putalpha(make_photo().convert("L"))
    return image


FILES: dict[str, Callable[[], bytes]] = {
    "jpeg": lambda: encode(make_photo(), "JPEG", quality=90),
    "jpeg, rotated": lambda: encode(make_photo(), "JPEG", exif=rotated()),
    "jpeg, grey": lambda: encode(make_photo().convert("L"), "JPEG"),
    "jpeg, cmyk": lambda: encode(make_photo().convert("CMYK"), "JPEG"),
    "png": lambda: encode(make_photo(), "PNG"),
    "png, rotated": lambda: encode(make_photo(), "PNG", exif=rotated()),
    "png, palette": lambda: encode(make_photo().quantize(20), "PNG"),
    "png, see-through palette": lambda: encode(make_photo().quantize(20), "PNG", transparency=3),
    "png, alpha": lambda: encode(make_alpha(), "PNG"),
    "png, grey and alpha": lambda: encode(make_alpha().convert("LA"), "PNG"),
    "png, 16 bit": lambda: encode(make_wide(), "PNG"),
    "png, 1 bit": lambda: encode(make_photo().convert("1"), "PNG"),
    "webp": lambda: encode(make_photo(), "WEBP", quality=80),
    "webp, alpha": lambda: encode(make_alpha(), "WEBP", quality=80),
}


@pytest.mark.parametrize("name", FILES)
def test_every_form_gives_the_array_of_the_file(name: str, tmp_path: Path) -> None:
    data = FILES[name]()
    expected = load_array(data, "x", **SIZE)
    assert expected.shape == (32, 48, 3)
    path = tmp_path / "image"
    path.write_bytes(data)
    for form in (path, str(path), data, bytearray(data), memoryview(data)):
        np.testing.assert_array_equal(load_input(form, "x", **SIZE), expected)
    opened = Image.open(path)
    np.testing.assert_array_equal(load_input(opened, "x", **SIZE), expected)
    np.testing.assert_array_equal(load_input(opened, "x", **SIZE), expected)  # and a second time
    assert opened.getpixel((0, 0)) is not None  # whoever owns it can go on with it


@pytest.mark.parametrize("name", [name for name in FILES if "jpeg" not in name])
def test_decoded_pixels_of_other_files_give_the_same_array(name: str) -> None:
    data = FILES[name]()
    image = Image.open(io.BytesIO(data))
    image.load()
    np.testing.assert_array_equal(convert_image(image, "x", **SIZE), load_array(data, "x", **SIZE))


@pytest.mark.parametrize("name", [name for name in FILES if "jpeg" in name])
def test_decoded_pixels_of_a_jpeg_differ_by_little(name: str) -> None:
    data = FILES[name]()
    image = Image.open(io.BytesIO(data))
    image.load()
    ours, expected = convert_image(image, "x", **SIZE), load_array(data, "x", **SIZE)
    assert np.abs(ours.astype(int) - expected).mean() < 2
    turned = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))  # turned by hand: not turned once more
    assert np.abs(convert_image(turned, "x", **SIZE).astype(int) - ours).max() <= 1


def test_a_jpeg_that_was_drawn_on_is_not_read_from_its_file() -> None:
    image = Image.open(io.BytesIO(FILES["jpeg"]()))
    image.paste((0, 255, 0), (0, 0, *image.size))
    array = load_input(image, "x", size_hw=(8, 8), resize="squash")
    assert (array == [0, 255, 0]).all()


def test_an_image_whose_file_is_closed_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(FILES["jpeg"]())
    closed = Image.open(tmp_path / "a.jpg")
    closed.close()
    file = (tmp_path / "a.jpg").open("rb")
    without_file = Image.open(file)
    file.close()
    for image in (closed, without_file):
        with pytest.raises(ImageError, match="it: is damaged") as caught:
            load_input(image, "it", **SIZE)
        assert caught.value.reason_code == "damaged"


def test_another_frame_is_not_taken_for_the_file(tmp_path: Path) -> None:
    make_photo().save(tmp_path / "two.jpg", "MPO", save_all=True, append_images=[Image.new("RGB", (60, 60), "red")])
    image = Image.open(tmp_path / "two.jpg")
    np.testing.assert_array_equal(load_input(image, "x", **SIZE), load_input(tmp_path / "two.jpg", "x", **SIZE))
    image.seek(1)
    assert (load_input(image, "x", size_hw=(8, 8), resize="squash") == [254, 0, 0]).all()


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA"])
def test_an_array_gives_what_its_png_gives(mode: str) -> None:
    image = make_alpha().convert(mode)
    expected = load_array(encode(image, "PNG"), "x", **SIZE)
    pixels = np.asarray(image)
    np.testing.assert_array_equal(load_input(pixels, "x", **SIZE), expected)
    mirrored = np.ascontiguousarray(pixels[:, ::-1])[:, ::-1]  # the same pixels, in another order in memory
    np.testing.assert_array_equal(load_input(mirrored, "x", **SIZE), expected)
    if mode == "L":
        np.testing.assert_array_equal(load_input(pixels[:, :, None], "x", **SIZE), expected)


@pytest.mark.parametrize("name", ["jpeg", "png"])
def test_one_opened_image_can_be_used_by_many_threads(name: str) -> None:
    expected = load_array(FILES[name](), "x", **SIZE)
    for _ in range(5):
        image = Image.open(io.BytesIO(FILES[name]()))
        with ThreadPoolExecutor(8) as pool:
            for array in pool.map(lambda _, image=image: load_input(image, "x", **SIZE), range(16)):
                np.testing.assert_array_equal(array, expected)


@pytest.mark.parametrize(
    ("value", "code", "message"),
    [
        (b"", "empty", r"it: is empty \(0 bytes\); expected an image\."),
        (b"text", "not_an_image", "it: is text, not an image; expected JPEG, PNG, WebP"),
        (FILES["jpeg"]()[:900], "damaged", "it: is damaged"),
        (None, "not_an_image", "it: is None; expected a path, bytes, an image of Pillow, or a numpy array"),
        (3.5, "not_an_image", "it: is of type float; expected a path"),
        (io.BytesIO(b"x"), "not_an_image", r"it: is of type _io.BytesIO; .* Pass its bytes: `file.read\(\)`"),
        ("no.jpg", "unreadable", r"no.jpg: cannot be read \(No such file or directory\); expected an image file"),
        ("", "unreadable", r"image '': cannot be read"),
        ("https://x.test/a.jpg", "unreadable", r"cannot be read .* Fetch it, and pass its bytes"),
        ("a\0b", "unreadable", r"cannot be read \(embedded null byte\)"),
        (os.curdir, "unreadable", r"\.: is a folder; expected an image file\. List its files\."),
        (os.devnull, "unreadable", "is no file; expected an image file"),
        (np.zeros((4, 4, 3)), "not_an_image", "it: is an array of float64; expected an array of uint8. Convert it"),
        (np.zeros((4, 4, 2), np.uint8), "not_an_image", r"shape 4 x 4 x 2; expected height x width \(grey\)"),
        (np.zeros((2, 4, 4, 3), np.uint8), "not_an_image", "shape 2 x 4 x 4 x 3"),
        (np.zeros((), np.uint8), "not_an_image", "is an array of shape no"),
        (np.zeros((0, 4, 3), np.uint8), "empty", "it: is empty"),
        (np.zeros((8000, 8000), np.uint8), "too_large", "it: has 8000 x 8000 pixels; expected at most 50000000"),
        (Image.new("F", (4, 4)), "not_an_image", r"pixels of floating point \(mode F\); expected 8 or 16 bits"),
        (Image.new("L", (0, 4)), "empty", "it: is empty"),
        (Image.new("1", (8000, 8000)), "too_large", "has 8000 x 8000 pixels"),
    ],
)
def test_what_is_no_image_has_one_clear_error(value: Any, code: str, message: str) -> None:
    with pytest.raises(ImageError, match=message) as caught:
        load_input(value, "it", **SIZE)
    assert caught.value.reason_code == code


def test_one_image_and_a_list_are_told_apart() -> None:
    grey, batch = np.zeros((4, 4), np.uint8), np.zeros((2, 4, 4, 3), np.uint8)
    ones: list[Any] = ["a", Path("a"), b"a", grey, np.zeros((4, 4, 3)), make_photo(), None, 1, {"a": 1}, {"a"}]
    assert [is_one_image(one) for one in [*ones, io.BytesIO()]] == [True] * 11
    many: list[Any] = [[], ["a"], ("a",), batch, np.array(["a", "b"]), (name for name in "ab")]
    assert [is_one_image(one) for one in many] == [False] * 6
