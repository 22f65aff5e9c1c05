"""Decoding and resizing: every kind of image, and what is refused."""

import io
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import numpy as np
import pytest
import simplejpeg
from PIL import Image, ImageOps, features

from visionloop.data import encoded
from visionloop.data.encoded import MAX_SCANS, name_readable, parse_encoded
from visionloop.data.images import ImageFacts, convert_image, decode_grey, decode_image, load_array, load_sized_array
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


@cache
def make_photo(width: int, height: int, seed: int = 1) -> Image.Image:
    """A picture with the spectrum of a photo: amplitude falls as a power of the frequency."""
    rng = np.random.default_rng(seed)
    y, x = np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width)[None, :]
    falling = 1 / np.maximum(np.hypot(x, y), 1 / width) ** 1.5
    bands = [np.fft.ifft2(np.fft.fft2(rng.normal(size=(height, width))) * falling).real for _ in range(4)]
    values = np.stack([bands[3] + 0.4 * bands[i] for i in range(3)], -1)
    return Image.fromarray((values / values.std() * 50 + 120).clip(0, 255).astype(np.uint8))


def with_orientation(number: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = number
    return exif


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "AVIF"])
@pytest.mark.parametrize(("orientation", "size"), [(1, (64, 32)), (3, (64, 32)), (6, (32, 64))])
def test_the_size_is_that_of_the_whole_image_as_it_is_shown(kind: str, orientation: int, size: tuple[int, int]) -> None:
    if kind in ("WEBP", "AVIF") and not features.check(kind.lower()):
        pytest.skip(f"this Pillow has no {kind}")
    data = encode(make_halves(), kind, exif=with_orientation(orientation))
    array, found = load_sized_array(data, "x", size_hw=(16, 16), resize="squash")
    assert (found, array.shape) == (size, (16, 16, 3))
    np.testing.assert_array_equal(array, load_array(data, "x", size_hw=(16, 16), resize="squash"))


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


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_exif_orientation_is_applied(kind: str) -> None:
    data = encode(make_halves(), kind, exif=with_orientation(6))  # turn a quarter right to see it upright
    image = decode_image(data, "x")
    assert image.size == (32, 64)
    assert np.abs(np.subtract(image.getpixel((16, 2)), (255, 0, 0))).max() <= 3
    facts, grey = decode_grey(data, "x", at_least_px=32)
    assert facts == ImageFacts(32, 64, kind)
    assert grey.shape == (64, 32)
    assert abs(int(grey[2, 16]) - 76) <= 2, "red in grey, on top"
    assert abs(int(grey[61, 16]) - 29) <= 2, "blue in grey, below"


@pytest.mark.parametrize("resize", ["squash", "fit_crop", "letterbox"])
@pytest.mark.parametrize("number", range(1, 9))
def test_a_turned_jpeg_gives_the_array_of_the_upright_one(number: int, resize: str) -> None:
    exif, image = with_orientation(number), make_photo(400, 260)
    turned = load_array(encode(image, "JPEG", exif=exif, quality=95), "x", size_hw=(96, 64), resize=resize)
    stored = Image.open(io.BytesIO(encode(image, "PNG", exif=exif)))
    upright = load_array(encode(ImageOps.exif_transpose(stored), "PNG"), "x", size_hw=(96, 64), resize=resize)
    assert np.abs(turned.astype(int) - upright).mean() < 3
    assert (turned == 128).all(2).mean() == pytest.approx((upright == 128).all(2).mean(), abs=0.01)


@pytest.mark.filterwarnings("ignore")
def test_an_orientation_that_cannot_be_read_costs_no_image() -> None:
    for exif in (b"Exif\x00\x00garbage", b"Exif\x00\x00II*\x00\xff\xff\xff\xff", with_orientation(77).tobytes()):
        image = decode_image(encode(make_halves(), "JPEG", exif=exif), "x")
        assert image.size == (64, 32)


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


def make_see_through(mode: str) -> Image.Image:
    rng = np.random.default_rng(7)
    image = Image.fromarray(rng.integers(0, 256, (90, 70, 4), np.uint8))
    if mode == "RGBA":
        return image
    image = image.convert("RGB").quantize(16) if mode == "P" else image.convert(mode)
    image.info["transparency"] = bytes(range(0, 256, 16)) if mode == "P" else (9, 9, 9) if mode == "RGB" else 9
    image.paste(9 if mode in "PL" else (9, 9, 9), (5, 5, 40, 60))
    return image


@pytest.mark.parametrize("mode", ["RGBA", "RGB", "P", "L"])
def test_alpha_laid_on_white_some_rows_at_a_time_is_as_at_once(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("visionloop.data.modes._BAND_PIXELS", 500)
    data = encode(make_see_through(mode), "PNG")
    opened = Image.open(io.BytesIO(data))
    alpha = opened.convert("RGBA")
    assert np.asarray(alpha)[:, :, 3].min() < 255
    flat = Image.new("RGB", alpha.size, "white")
    flat.paste(alpha, mask=alpha)
    assert np.array_equal(np.asarray(decode_image(data, "x")), np.asarray(flat))
    small = np.asarray(flat.resize((33, 21), Image.Resampling.BILINEAR))
    assert np.array_equal(load_array(data, "x", size_hw=(21, 33), resize="squash"), small)
    before = np.asarray(opened).copy()
    assert np.array_equal(convert_image(opened, "x", size_hw=(21, 33), resize="squash"), small)
    assert np.array_equal(np.asarray(opened), before), "the caller's image is not changed"
    grey = flat.convert("L")
    assert np.array_equal(decode_grey(data, "x", at_least_px=70)[1], np.asarray(grey))


@pytest.mark.parametrize(
    ("ink", "expected"),
    [((0, 0, 0, 0), (255, 255, 255)), ((0, 255, 255, 0), (255, 0, 0)), ((0, 0, 0, 255), (0, 0, 0))],
)
def test_cmyk_jpeg_becomes_rgb(ink: tuple[int, ...], expected: tuple[int, int, int]) -> None:
    """Pillow writes what Adobe writes: the four inks, inverted."""
    data = encode(Image.new("CMYK", (400, 400), ink), "JPEG", quality=95)
    assert b"Adobe" in data
    assert np.abs(np.subtract(decode_image(data, "x").getpixel((5, 5)), expected)).max() <= 3
    array = load_array(data, "x", size_hw=(32, 32), resize="squash")
    assert np.abs(array.astype(int) - expected).max() <= 3


def test_grey_jpeg_becomes_rgb() -> None:
    array = load_array(encode(Image.new("L", (300, 200), 77), "JPEG"), "x", size_hw=(32, 32), resize="letterbox")
    assert array.shape == (32, 32, 3)
    assert (array[16] == 77).all()
    assert (array[0] == 128).all()


@pytest.mark.parametrize("resize", ["squash", "fit_crop", "letterbox"])
@pytest.mark.parametrize("size", [(500, 375), (1024, 768), (300, 300), (230, 900), (3000, 240), (150, 100), (224, 224)])
def test_a_jpeg_is_near_what_pillow_makes_of_it(size: tuple[int, int], resize: str) -> None:
    """Scaled decoding and sampled means stay within three levels of the full decode, resized antialiased."""
    data = encode(make_photo(*size), "JPEG", quality=85)
    image = Image.open(io.BytesIO(data)).convert("RGB")
    bilinear, wanted = Image.Resampling.BILINEAR, (224, 224)
    expected = {
        "squash": lambda: image.resize(wanted, bilinear),
        "fit_crop": lambda: ImageOps.fit(image, wanted, bilinear),
        "letterbox": lambda: ImageOps.pad(image, wanted, bilinear, color=(128, 128, 128)),
    }[resize]()
    apart = np.abs(load_array(data, "x", size_hw=wanted, resize=resize).astype(int) - np.asarray(expected))
    assert apart.mean() < 3
    assert np.median(apart) <= 2


@pytest.mark.parametrize(
    ("size", "wanted", "resize", "decoded"),
    [
        ((1024, 768), (224, 224), "squash", (384, 512)),
        ((500, 375), (224, 224), "squash", (375, 500)),
        ((1024, 512), (256, 256), "fit_crop", (256, 512)),
        ((1024, 512), (257, 257), "fit_crop", (512, 1024)),
        ((1024, 512), (256, 256), "letterbox", (128, 256)),
        ((8000, 240), (240, 240), "squash", (240, 8000)),
        ((8000, 240), (240, 240), "letterbox", (30, 1000)),
    ],
)
def test_decoding_is_scaled_but_never_below_what_is_asked(
    size: tuple[int, int],
    wanted: tuple[int, int],
    resize: str,
    decoded: tuple[int, int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen, decode = [], simplejpeg.decode_jpeg

    def watch(*args: object, **options: object) -> np.ndarray:
        pixels = decode(*args, **options)
        seen.append(pixels.shape[:2])
        return pixels

    monkeypatch.setattr(simplejpeg, "decode_jpeg", watch)
    load_array(encode(Image.new("RGB", size), "JPEG"), "x", size_hw=wanted, resize=resize)
    assert seen == [decoded]


@pytest.mark.parametrize(
    ("size", "options", "is_read"),
    [
        ((640, 480), {}, True),  # at a quarter: 160 x 120
        ((640, 480), {"restart_marker_rows": 1, "quality": 95, "subsampling": 0}, True),
        ((640, 480), {"progressive": True}, False),  # all its coefficients are there at once
        ((320, 240), {}, True),  # at a half
        ((160, 120), {}, True),
        ((161, 120), {}, False),  # at full size: half of it is too small
    ],
)
def test_a_limit_on_decoded_pixels_counts_those_that_are_made(
    size: tuple[int, int], options: dict[str, Any], is_read: bool
) -> None:
    data = encode(make_photo(*size), "JPEG", **options)
    wanted: dict[str, Any] = {"size_hw": (100, 120), "resize": "squash"}
    if not is_read:
        with pytest.raises(ImageError, match=f"has {size[0]} x {size[1]} pixels; expected at most 19200 .*max_pixels"):
            load_sized_array(data, "x", **wanted, max_decoded=160 * 120)
        return
    array, shown = load_sized_array(data, "x", **wanted, max_decoded=160 * 120)
    assert shown == size
    np.testing.assert_array_equal(array, load_array(data, "x", **wanted))
    with pytest.raises(ImageError, match="at most 1000"):
        load_sized_array(data, "x", **wanted, max_pixels=1000, max_decoded=160 * 120)


def test_a_limit_on_decoded_pixels_counts_all_of_a_format_that_is_decoded_whole() -> None:
    data = encode(make_photo(640, 480), "PNG")
    with pytest.raises(ImageError, match="has 640 x 480 pixels; expected at most 307199"):
        load_sized_array(data, "x", size_hw=(32, 32), resize="squash", max_decoded=640 * 480 - 1)
    assert load_sized_array(data, "x", size_hw=(32, 32), resize="squash", max_decoded=640 * 480)[1] == (640, 480)


def test_the_same_bytes_give_the_same_array_in_every_thread() -> None:
    data = [encode(make_photo(333, 251, seed), "JPEG", quality=80, progressive=seed % 2 == 0) for seed in range(6)]
    alone = [load_array(d, "x", size_hw=(96, 96), resize="fit_crop") for d in data]
    with ThreadPoolExecutor(8) as pool:
        many = list(pool.map(lambda d: load_array(d, "x", size_hw=(96, 96), resize="fit_crop"), data * 8))
    assert all((array == alone[i % 6]).all() for i, array in enumerate(many))


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
        (b"\x89PNG\r\n\x1a\n" + b"\x00" * 50, "damaged"),
    ],
    ids=["empty", "text", "svg", "gif", "bmp", "cut-png", "cut-jpeg", "png-of-zeros"],
)
def test_what_cannot_be_used_has_a_code(data: bytes, code: str) -> None:
    with pytest.raises(ImageError) as caught:
        decode_image(data, "photo.jpg")
    assert caught.value.reason_code == code
    assert str(caught.value).startswith("photo.jpg: ")


def test_a_jpeg_has_one_verdict_however_it_is_decoded() -> None:
    """What libjpeg-turbo only warns about goes to Pillow: trailing bytes are no damage, missing ones are."""
    for progressive in (False, True):
        data = encode(make_photo(160, 120), "JPEG", progressive=progressive)
        for end in (0, 1, 2, 3, 40, 400, len(data) // 2):
            for shown in (data[: len(data) - end], data + b"\x00" * end):
                verdicts = set()
                for call in (
                    lambda d: decode_image(d, "x"),
                    lambda d: decode_grey(d, "x", at_least_px=16),
                    lambda d: load_array(d, "x", size_hw=(32, 32), resize="squash"),
                    lambda d: load_array(d, "x", size_hw=(99, 99), resize="letterbox"),
                ):
                    try:
                        call(shown)
                        verdicts.add("whole")
                    except ImageError as exc:
                        verdicts.add(exc.reason_code)
                assert verdicts == {"whole" if len(shown) >= len(data) else "damaged"}, (progressive, end)


def test_a_phones_jpeg_with_a_second_picture_is_a_jpeg() -> None:
    first, second = make_halves(320, 160), Image.new("RGB", (320, 160), (0, 255, 0))
    data = encode(first, "MPO", save_all=True, append_images=[second])
    assert Image.open(io.BytesIO(data)).format == "MPO"
    assert decode_image(data, "x").getpixel((5, 5))[0] > 250
    assert decode_grey(data, "x", at_least_px=32)[0] == ImageFacts(320, 160, "JPEG")
    array = load_array(data, "x", size_hw=(32, 32), resize="squash")
    assert np.abs(array[5, 5].astype(int) - (255, 0, 0)).max() <= 3


def test_more_scans_than_a_camera_writes_are_refused() -> None:
    data = encode(make_photo(64, 64), "JPEG", progressive=True)
    start, end = data.rindex(b"\xff\xda"), len(data) - 2
    bomb = data[:end] + data[start:end] * MAX_SCANS + data[end:]
    with pytest.raises(ImageError, match=r"has too many scans; expected at most 100") as caught:
        decode_grey(bomb, "bomb.jpg", at_least_px=32)
    assert caught.value.reason_code == "too_large"


def test_grey_pixels_are_small_but_not_smaller_than_asked() -> None:
    image = make_photo(800, 400)
    expected = np.asarray(image.convert("L").resize((16, 8), Image.Resampling.BOX)).astype(int)
    for kind, shape in (("JPEG", (50, 100)), ("PNG", (33, 66)), ("WEBP", (33, 66))):
        facts, grey = decode_grey(encode(image, kind, quality=95), "x", at_least_px=33)
        assert facts == ImageFacts(800, 400, kind)
        assert grey.shape == shape
        small = np.asarray(Image.fromarray(grey).resize((16, 8), Image.Resampling.BOX)).astype(int)
        assert np.abs(small - expected).mean() < 3


def test_too_many_pixels_are_refused_before_they_are_decoded() -> None:
    data = encode(Image.new("1", (8_000, 8_000)), "PNG")
    with pytest.raises(ImageError, match="expected at most 50000000") as caught:
        decode_image(data, "bomb.png")
    assert caught.value.reason_code == "too_large"


@pytest.mark.parametrize(
    ("has_avif", "has_heif", "named"),
    [
        (True, True, "JPEG, PNG, WebP, AVIF or HEIC"),
        (True, False, "JPEG, PNG, WebP or AVIF (HEIC with the extra `heic`)"),
        (False, True, "JPEG, PNG, WebP or HEIC"),
        (False, False, "JPEG, PNG or WebP (HEIC with the extra `heic`)"),
    ],
)
def test_what_is_read_is_named_as_it_is_on_this_installation(
    monkeypatch: pytest.MonkeyPatch, has_avif: bool, has_heif: bool, named: str
) -> None:
    monkeypatch.setattr(features, "check", lambda name: has_avif)
    monkeypatch.setattr(encoded, "find_spec", lambda name: object() if has_heif else None)
    name_readable.cache_clear()
    try:
        for data in (b"text", b"\0\1\2\3no idea"):
            with pytest.raises(ImageError) as caught:
                parse_encoded(data, "a.jpg")
            assert caught.value.expected == named
    finally:
        name_readable.cache_clear()
