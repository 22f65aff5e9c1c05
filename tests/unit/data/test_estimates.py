"""What an image will take in memory, by its header alone."""

import io
import time

import pytest
from PIL import Image

from visionloop.data.encoded import UNKNOWN_BYTES, estimate_bytes

PNG = b"\x89PNG\r\n\x1a\n"


def encode(kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (70, 50), "red").save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("data", "each"),
    [
        (encode("PNG"), 6),
        (encode("JPEG"), 1),
        (encode("JPEG", progressive=True), 6),
        (encode("WEBP"), 8),
        (encode("WEBP", lossless=True), 8),
        (encode("AVIF"), 8),
        (encode("JPEG", exif=b"Exif\0\0" + bytes(60_000)), 1),
    ],
    ids=["png", "jpeg", "progressive", "webp", "lossless", "avif", "a note before the size"],
)
def test_the_header_says_how_much_memory_the_pixels_take(data: bytes, each: int) -> None:
    width, height = Image.open(io.BytesIO(data)).size
    assert estimate_bytes(data) == width * height * each


def test_what_says_no_size_is_taken_for_large_and_no_image_for_nothing() -> None:
    assert [estimate_bytes(data) for data in (b"", b"hello" * 100, b"{}")] == [0, 0, 0]
    cut = (encode("JPEG")[:30], encode("AVIF")[:30], PNG, b"RIFF\0\0\0\0WEBP", b"\xff\xd8\xff" + b"\xff\xe0\0\2" * 9999)
    assert {estimate_bytes(data) for data in cut} == {UNKNOWN_BYTES}


def test_a_hostile_header_is_passed_by_quickly() -> None:
    started = time.process_time()
    for data in (b"\xff\xd8\xff" + bytes(20_000_000), b"\0\0\0\x18ftypavif" + b"ispe" * 5_000_000):
        estimate_bytes(data)
    assert time.process_time() - started < 0.5
