"""What lies around a picture costs no picture; what is no picture is named; and one limit on pixels holds."""

import base64
import gzip
import io
import os
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
from PIL import Image

from visionloop.data.encoded import MAX_SCANS, parse_encoded
from visionloop.data.images import decode_grey, decode_image, load_array
from visionloop.errors import ImageError

PNG = b"\x89PNG\r\n\x1a\n"


def make_picture(width: int = 64, height: int = 48) -> Image.Image:
    coarse = np.random.default_rng(5).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def encode(kind: str, image: Image.Image | None = None, **options: object) -> bytes:
    buffer = io.BytesIO()
    (image or make_picture()).save(buffer, kind, **options)
    return buffer.getvalue()


def make_exif(orientation: int = 6) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif.tobytes()


def segment(marker: int, content: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, marker, len(content) + 2) + content


def put_in(data: bytes, *segments: bytes) -> bytes:
    """Put segments behind the start of a JPEG."""
    return data[:2] + b"".join(segments) + data[2:]


def chunk(kind: bytes, content: bytes, crc: int | None = None) -> bytes:
    crc = zlib.crc32(kind + content) if crc is None else crc
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", crc)


def put_in_png(*chunks: bytes, image: Image.Image | None = None) -> bytes:
    """Put chunks behind the header of a PNG."""
    data = encode("PNG", image)
    return data[:33] + b"".join(chunks) + data[33:]


def read_all(data: bytes) -> np.ndarray:
    """Read an image in every way there is; return its pixels."""
    facts, _ = decode_grey(data, "x", at_least_px=64)
    array = load_array(data, "x", size_hw=(48, 64), resize="squash")
    image = decode_image(data, "x")
    assert image.size == (facts.width, facts.height)
    return array


def judge(data: bytes) -> tuple[str, str]:
    with pytest.raises(ImageError) as caught:
        decode_grey(data, "x", at_least_px=64)
    with pytest.raises(ImageError, match=r"^x: ") as other:
        load_array(data, "x", size_hw=(8, 8), resize="squash")
    assert str(other.value) == str(caught.value)
    return caught.value.reason_code, str(caught.value)


FILM = np.random.default_rng(0).bytes(12_000_000)
ODD_JPEGS: dict[str, Callable[[], bytes]] = {
    # Motion photos, and scans that are none.
    "scan-markers-behind-its-end": lambda: encode("JPEG") + b"\xff\xda" * 101,
    "a-film-behind-its-end": lambda: encode("JPEG") + FILM,
    "a-film-behind-a-progressive-one": lambda: encode("JPEG", progressive=True) + FILM + b"\xff\xda" * 200,
    "progressive-pictures-behind-its-end": lambda: encode("JPEG", progressive=True) * 60,
    "scan-markers-in-a-comment": lambda: put_in(encode("JPEG", progressive=True), segment(0xFE, b"\xff\xda" * 300)),
    "scan-markers-in-a-thumbnail": lambda: put_in(encode("JPEG"), segment(0xE1, make_exif(1) + b"\xff\xda" * 300)),
    "an-mpo-of-121-pictures": lambda: encode("MPO", save_all=True, append_images=[make_picture()] * 120),
    # Notes that Pillow's own reading of the header stumbles over.
    "a-short-jfif": lambda: put_in(encode("JPEG")[:2] + encode("JPEG")[20:], segment(0xE0, b"JFIF\0")),
    "a-jfif-without-density": lambda: put_in(encode("JPEG")[:2] + encode("JPEG")[20:], segment(0xE0, b"JFIF\0\1")),
    "photoshop-ends-behind-a-code": lambda: put_in(encode("JPEG"), segment(0xED, b"Photoshop 3.0\x008BIM\4\4")),
    "photoshop-ends-in-a-name": lambda: put_in(encode("JPEG"), segment(0xED, b"Photoshop 3.0\x008BIM\4\4\x20ab")),
    "a-profile-without-number": lambda: put_in(encode("JPEG"), segment(0xE2, b"ICC_PROFILE\0")),
    "adobe-cut-short": lambda: put_in(encode("JPEG"), segment(0xEE, b"Adobe\0")),
    "broken-exif": lambda: put_in(encode("JPEG"), segment(0xE1, b"Exif\0\0II*\0\xff\xff")),
    "broken-index-of-pictures": lambda: put_in(encode("JPEG"), segment(0xE2, b"MPF\0MM\0*\0\0\xff\xff")),
    "a-comment-of-no-length": lambda: put_in(encode("JPEG"), b"\xff\xfe\0\0"),
    "fill-bytes": lambda: put_in(encode("JPEG"), b"\xff\xff\xff" + segment(0xFE, b"x")),
}


@pytest.mark.parametrize("name", ODD_JPEGS)
def test_what_stands_around_a_jpeg_costs_no_picture(name: str) -> None:
    plain = encode("JPEG", progressive="progressive" in name or "comment" in name)
    expected = load_array(plain, "x", size_hw=(48, 64), resize="squash")
    difference = np.abs(read_all(ODD_JPEGS[name]()).astype(int) - expected)
    assert difference.max() <= 3, "the picture is the same"


@pytest.mark.parametrize(
    "head",
    ["/9j/4AAHSkZJRgD/2wBD", "/9j/7QAWUGhvdG9zaG9wIDMuMAA4QklNBAT/4AAQSkZJRgABAQAAAQABAAD/2wBD"],
    ids=["jfif of 5 bytes", "ends behind an 8BIM code"],
)
def test_jpegs_that_blocked_a_dataset_are_read(head: str) -> None:
    tail = "AFA3PEY8MlBGQUZaVVBfeMiCeG5uePWvuZHI" + "/" * 64 + "wAALCAAQABABAREA/8QAFQABAQAAAAAAAAAAAAAAAAAAAAH/"
    tail += "xAAUEAEAAAAAAAAAAAAAAAAAAAAA/9oACAEBAAA/AIA//9k="
    assert read_all(base64.b64decode(head + tail)).shape == (48, 64, 3)


@pytest.mark.parametrize("factors", [(1, 4), (4, 1), (2, 1), (1, 2), (2, 4), (4, 4), (3, 1)])
def test_every_subsampling_has_one_verdict(factors: tuple[int, int]) -> None:
    """4:4:1 comes from a lossless turn of 4:1:1. What libjpeg-turbo does not know goes to Pillow."""
    data = bytearray(encode("JPEG", Image.new("RGB", (64, 64), (200, 40, 90)), subsampling=0))
    data[data.index(b"\xff\xc0") + 11] = factors[0] << 4 | factors[1]
    try:
        decode_grey(bytes(data), "x", at_least_px=64)
    except ImageError as exc:
        assert judge(bytes(data))[0] == exc.reason_code == "damaged"
    else:
        assert read_all(bytes(data)).shape == (48, 64, 3)


def test_4_4_1_is_read_in_its_own_order() -> None:
    """Four blocks side by side, 4:1:1, with its factors and its sides exchanged: the same blocks one below another."""
    levels = np.repeat(np.array([20, 90, 160, 230], np.uint8), 8)
    data = bytearray(simplejpeg.encode_jpeg(np.tile(levels[None, :, None], (8, 1, 3)), colorsubsampling="411"))
    place = data.index(b"\xff\xc0")
    assert (data[place + 11], data[place + 5 : place + 9]) == (0x41, b"\0\x08\0\x20")
    data[place + 11], data[place + 5 : place + 9] = 0x14, b"\0\x20\0\x08"
    image = np.asarray(decode_image(bytes(data), "x"))
    assert np.abs(image.astype(int) - levels[:, None, None]).max() <= 3
    assert read_all(bytes(data)).shape == (48, 64, 3)


def test_more_scans_than_a_camera_writes_are_counted_up_to_the_end_of_the_picture() -> None:
    data = encode("JPEG", progressive=True)
    start, end = data.rindex(b"\xff\xda"), len(data) - 2
    bomb = data[:end] + data[start:end] * MAX_SCANS + data[end:]
    assert judge(bomb)[0] == "too_large"
    assert judge(put_in(encode("JPEG"), b"\xff\xfe\0\2" * 100_001))[0] == "too_large"


ODD_PNGS: dict[str, Callable[[], bytes]] = {
    "a-profile-of-2-mb": lambda: put_in_png(chunk(b"iCCP", b"p\0\0" + zlib.compress(bytes(2_000_000)))),
    "a-profile-packed-in-another-way": lambda: put_in_png(chunk(b"iCCP", b"p\0\1" + b"what is this")),
    "a-profile-that-is-broken": lambda: put_in_png(chunk(b"iCCP", b"p\0\0" + b"no zlib")),
    "zipped-text-of-2-mb": lambda: put_in_png(chunk(b"zTXt", b"t\0\0" + zlib.compress(b"a" * 2_000_000))),
    "international-text-of-2-mb": lambda: put_in_png(chunk(b"iTXt", b"t\0\0\0\0\0" + b"a" * 2_000_000)),
    "80-texts-of-a-megabyte": lambda: put_in_png(*[chunk(b"tEXt", b"t\0" + b"a" * 900_000)] * 80),
    "text-of-another-alphabet": lambda: put_in_png(chunk(b"iTXt", b"t\0\0\0\xff\xfe\0\0\xff")),
    "a-wrong-checksum-of-a-time": lambda: put_in_png(chunk(b"tIME", bytes(7), crc=1)),
    "a-wrong-checksum-of-exif": lambda: put_in_png(chunk(b"eXIf", make_exif()[6:], crc=1)),
    "chunks-too-short": lambda: put_in_png(*(chunk(k, b"\0") for k in (b"gAMA", b"cHRM", b"pHYs", b"sRGB", b"eXIf"))),
    "an-animation-that-is-none": lambda: put_in_png(chunk(b"acTL", b"\0"), chunk(b"fcTL", b"\0")),
    "bytes-behind-its-end": lambda: encode("PNG") + b"more" * 100,
}


@pytest.mark.parametrize("name", ODD_PNGS)
def test_what_stands_around_a_png_costs_no_picture(name: str) -> None:
    assert np.array_equal(read_all(ODD_PNGS[name]()), np.asarray(make_picture()))


def test_damage_to_the_picture_of_a_png_is_found_by_all() -> None:
    palette = encode("PNG", make_picture().quantize(8))
    place = palette.index(b"PLTE") + 5
    assert judge(palette[:place] + b"\x99" + palette[place + 1 :])[0] == "damaged"
    assert judge(put_in_png(chunk(b"IDAT", b"\0", crc=1)))[0] == "damaged"
    assert judge(encode("PNG")[:-12]) == ("damaged", "x: is damaged (cut off); expected a whole PNG.")


@pytest.mark.parametrize("content", [b"", b"\0", bytes(5), bytes(7), bytes(300)])
@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "LA", "P"])
def test_a_malformed_transparency_costs_no_png(mode: str, content: bytes) -> None:
    image = make_picture().quantize(8) if mode == "P" else make_picture().convert(mode)
    if mode == "P" and 1 <= len(content) <= 256:
        pytest.skip("a palette may have so many")
    data = encode("PNG", image)
    place = data.index(b"IDAT") - 4
    odd = data[:place] + chunk(b"tRNS", content) + data[place:]
    assert np.array_equal(read_all(odd), read_all(data))


def test_a_transparency_with_a_wrong_checksum_is_left_out_and_a_right_one_counts() -> None:
    grey = Image.new("L", (64, 48), 7)
    assert read_all(put_in_png(chunk(b"tRNS", b"\0\7", crc=1), image=grey)).max() == 7
    assert read_all(put_in_png(chunk(b"tRNS", b"\0\7"), image=grey)).min() == 255


@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
@pytest.mark.parametrize("lossless", [False, True])
def test_a_webp_that_is_cut_off_is_damaged_whatever_is_left(mode: str, lossless: bool) -> None:
    data = encode("WEBP", make_picture().convert(mode), lossless=lossless, exif=make_exif())
    for share in (0.1, 0.4, 0.9):
        code, message = judge(data[: 20 + int(share * (len(data) - 20))])
        assert (code, "cut off" in message) == ("damaged", True)


def test_notes_of_a_webp_cost_no_picture_and_turn_it() -> None:
    data = encode("WEBP", lossless=True, exif=make_exif(3))
    assert np.array_equal(read_all(data), np.asarray(make_picture())[::-1, ::-1])
    for old in (b"EXIF", b"VP8X"):
        place = data.index(old)
        broken = (
            data[: place + 8]
            + (b"\xfd" if old == b"VP8X" else b"\xff" * 8)
            + data[place + (9 if old == b"VP8X" else 16) :]
        )
        assert read_all(broken).shape == (48, 64, 3)


@pytest.mark.parametrize(
    "make", [lambda: encode("JPEG", exif=make_exif(6)), lambda: put_in_png(chunk(b"eXIf", make_exif(6)[6:]))]
)
def test_the_orientation_is_read_without_the_decoder(make: Callable[[], bytes]) -> None:
    facts, grey = decode_grey(make(), "x", at_least_px=64)
    assert (facts.width, facts.height) == (48, 64)
    assert grey.shape[0] > grey.shape[1]


@pytest.mark.parametrize("name", ["tEXt", "zTXt", "iTXt", "packed iTXt"])
def test_the_orientation_in_a_text_of_a_png_counts(name: str) -> None:
    xmp, packed = b'<x tiff:Orientation="6"/>', zlib.compress(b'<x tiff:Orientation="6"/>')
    contents = {"tEXt": b"\0" + xmp, "zTXt": b"\0\0" + packed, "iTXt": b"\0\0\0\0\0" + xmp}
    content = contents.get(name, b"\0\1\0\0\0" + packed)
    data = put_in_png(chunk(name[-4:].encode(), b"XML:com.adobe.xmp" + content))
    assert decode_image(data, "x").size == (48, 64)


# 16 bits


@pytest.mark.parametrize("brightest", [1, 255, 256, 4095, 65535])
def test_the_scale_of_16_bits_is_not_that_of_the_brightest_pixel(brightest: int) -> None:
    values = np.zeros((48, 64), np.uint16)
    values[:24] = brightest
    values[0, 0] = 128
    array = read_all(encode("PNG", Image.fromarray(values)))
    assert array[10, 10].tolist() == [round(brightest / 257)] * 3
    assert (array[0, 0] == 0).all()


@pytest.mark.parametrize("bits", [10, 12, 14])
def test_fewer_bits_are_white_where_they_are_full_however_they_lie(bits: int) -> None:
    ramp = np.linspace(0, (1 << bits) - 1, 48 * 64).round().astype(np.uint16).reshape(48, 64)
    expected = np.round(ramp * (255 / ((1 << bits) - 1)))
    upper = ramp << (16 - bits)
    for values in (ramp, upper, upper | ramp >> (2 * bits - 16)):
        data = put_in_png(chunk(b"sBIT", bytes([bits])), image=Image.fromarray(values))
        assert np.abs(read_all(data)[:, :, 0] - expected).max() <= 1
    assert read_all(put_in_png(image=Image.fromarray(ramp))).max() == round(((1 << bits) - 1) / 257), "no word of bits"
    dark = upper[:1].repeat(48, 0) & ((1 << bits) - 1)  # by the standard, and very dark: the upper bits are all zero
    dark = dark >> (16 - bits) << (16 - bits)
    data = put_in_png(chunk(b"sBIT", bytes([bits])), image=Image.fromarray(dark))
    assert np.abs(read_all(data)[:, :, 0] - np.round(dark / 257)).max() <= 1


MEASURE = """
import io, resource, sys
import numpy as np
from PIL import Image
from visionloop.data.images import load_array
mode, side = sys.argv[1], 4000
small = Image.new("RGBA" if mode == "colour and alpha" else "LA", (8, 8), 9)
small = Image.fromarray(np.zeros((8, 8), np.uint16)) if mode == "grey" else small
def read(data):
    return load_array(data, "x", size_hw=(32, 32), resize="squash")
def encode(image):
    sink = io.BytesIO()
    image.save(sink, "PNG", compress_level=1)
    return sink.getvalue()
read(encode(small))
sys.stdout.write(f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss} ")
data = sys.stdin.buffer.read()
read(data)
sys.stdout.write(f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}")
"""


def make_large(mode: str, side: int) -> bytes:
    """A large black PNG of 16 bits, packed here row by row."""
    colour, each = {"grey": (0, 2), "grey and alpha": (4, 4), "colour and alpha": (6, 8)}[mode]
    packer = zlib.compressobj(1)
    rows = b"".join(packer.compress(bytes(1 + each * side)) for _ in range(side)) + packer.flush()
    header = struct.pack(">IIBBBBB", side, side, 16, colour, 0, 0, 0)
    return PNG + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="ru_maxrss is in other units elsewhere")
@pytest.mark.parametrize("mode", ["grey", "grey and alpha", "colour and alpha"])
def test_16_bits_cost_at_most_six_bytes_a_pixel(mode: str) -> None:
    side = 5000
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, mode],
        input=make_large(mode, side),
        capture_output=True,
        check=True,
        env=os.environ,
    )
    before, after = (int(number) * 1024 for number in done.stdout.split())
    assert (after - before) / side**2 <= 6


# What is no image we read


@pytest.mark.parametrize(
    ("data", "found", "todo"),
    [
        (b"II*\0" + bytes(60), "is TIFF", "Convert it to PNG"),
        (b"MM\0*" + bytes(60), "is TIFF", "Convert it to PNG"),
        (b"GIF89a" + bytes(60), "is GIF", "Convert it to PNG"),
        (b"P6 2 2 255 " + bytes(12), "is PPM", "Convert it to PNG"),
        (encode("BMP"), "is BMP", "Convert it to PNG"),
        (b"II*\0\x10\0\0\0CR\2\0" + bytes(60), r"is a camera's RAW file \(CR2\)", "Export it as JPEG or PNG"),
        (b"\0\0\0\x18ftypcrx \0\0\0\1", r"is a camera's RAW file \(CR3\)", "Export"),
        (b"FUJIFILMCCD-RAW 0201", r"is a camera's RAW file \(RAF\)", "Export"),
        (b"\0\0\0\x0cJXL \r\n\x87\n", "is JPEG XL", "Export"),
        (b"\0\0\0\x0cjP  \r\n\x87\n", "is JPEG 2000", "Export"),
        (b"\0\0\0\x18ftypmp42\0\0\0\0", "is a film", "kind `video`"),
        (b"PK\3\4" + bytes(60), "is a zip", "a source of images"),
        (b"%PDF-1.7", "is a PDF", "Export"),
        (b"  <!DOCTYPE html><html>", "is a web page", "downloaded"),
        (b"version https://git-lfs.github.com/spec/v1", "Git LFS", "git lfs pull"),
        (b"BM and other words of a letter, no picture", "is text, not an image", "downloaded"),
        (b"P65 is a name", "is text, not an image", "downloaded"),
        (b"404: Not Found\n", "is text, not an image", "downloaded"),
        (bytes(128) + b"DICM" + bytes(60), "is a DICOM file", "PNG"),
        (gzip.compress(b"x" * 99, mtime=0), "is gzip data", "Unpack"),
        (b'\n{"error": "no such image"}', "is JSON text", "downloaded"),
        (b'\xef\xbb\xbf[ {"a": 1}]', "is JSON text", "downloaded"),
        (b"[1, 2]", "is JSON text", "downloaded"),
        (b"\xef\xbb\xbf<html>", "is a web page", "downloaded"),
        (b"<!-- saved --><html>", "is a web page", "downloaded"),
        (b"<Error><Code>AccessDenied</Code>", "is a web page or XML", "downloaded"),
        (b"data:image/jpeg;base64,/9j/4AAQSkZJRg", "is an image as base64", "Decode"),
        (b"/9j/4AAQSkZJRgABAQAAAQ", "is an image as base64", "Decode"),
        (bytes(257) + b"ustar\0" + bytes(60), "is a tar archive", "Unpack"),
        (b"\x93NUMPY\1\0", "is an array of NumPy", "PNG"),
        (b"RIFF\0\0\0\0AVI LIST", "is a film", "kind `video`"),
        (b"\x1aE\xdf\xa3" + bytes(40), "is a film", "kind `video`"),
        (bytes(5000), "is zero bytes, at least where it begins", "Copy it again"),
        (b"\0\1\2\3no idea", "is not an image we read", ""),
        (b"{no json", "is text", ""),
    ],
)
def test_what_people_have_beside_images_is_named_by_its_first_bytes(data: bytes, found: str, todo: str) -> None:
    with pytest.raises(ImageError, match=found) as caught:
        parse_encoded(data, "a.jpg")
    assert caught.value.reason_code == "not_an_image"
    assert todo in caught.value.todo


@pytest.mark.parametrize("kind", ["AVIF", "HEIF"])
@pytest.mark.parametrize("orientation", [1, 6])
def test_what_phones_write_is_read(kind: str, orientation: int) -> None:
    if kind == "HEIF":
        # Written once by an encoder: what is installed only reads. 6 is a quarter turn.
        data = (Path(__file__).parent / ("phone.heic" if orientation == 1 else "phone-turned.heic")).read_bytes()
    else:
        data = encode(kind, exif=make_exif(orientation), quality=95)
    facts, _ = decode_grey(data, "x", at_least_px=64)
    assert (facts.format, facts.width, facts.height) == (kind, *((64, 48) if orientation == 1 else (48, 64)))
    size_hw = facts.height, facts.width
    array = load_array(data, "x", size_hw=size_hw, resize="squash")
    expected = np.asarray(make_picture() if orientation == 1 else make_picture().transpose(Image.Transpose.ROTATE_270))
    assert np.abs(array.astype(int) - expected).mean() < 6
    assert judge(data[: len(data) // 2])[0] == "damaged"


# One limit on pixels


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "AVIF"])
def test_our_limit_on_pixels_is_the_only_one(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data = encode(kind)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)  # Pillow refuses twice as many
    assert read_all(data).shape == (48, 64, 3)
    for limit in (64 * 48, None):
        assert load_array(data, "x", size_hw=(8, 8), resize="squash", max_pixels=limit).shape == (8, 8, 3)
    with pytest.raises(ImageError, match="has 64 x 48 pixels; expected at most 3071") as caught:
        decode_grey(data, "x", at_least_px=64, max_pixels=64 * 48 - 1)
    assert caught.value.reason_code == "too_large"
