"""Perceptual hashes: near for re-saved images, far for others, none for tiny ones."""

import io

import numpy as np
from PIL import Image

from visionloop.data.duplicates import compute_phash


def make_photo(seed: int) -> Image.Image:
    """A picture with the spectrum of a photo: amplitude falls as 1/frequency."""
    rng = np.random.default_rng(seed)
    y, x = np.fft.fftfreq(200)[:, None], np.fft.fftfreq(300)[None, :]
    falling = 1 / np.maximum(np.hypot(x, y), 1 / 300)
    values = np.fft.ifft2(np.fft.fft2(rng.normal(size=(200, 300))) * falling).real
    values = 255 * (values - values.min()) / (values.max() - values.min())
    return Image.fromarray(values.astype(np.uint8)).convert("RGB")


def count_bits(a: str, b: str) -> int:
    return (int(a, 16) ^ int(b, 16)).bit_count()


def test_a_resaved_and_resized_image_is_near_and_another_is_far() -> None:
    image = make_photo(1)
    buffer = io.BytesIO()
    image.resize((150, 100)).save(buffer, "JPEG", quality=60)
    assert len(compute_phash(image)) == 16
    assert count_bits(compute_phash(image), compute_phash(Image.open(buffer))) <= 4
    assert count_bits(compute_phash(image), compute_phash(make_photo(2))) > 12


def test_a_tiny_image_has_none() -> None:
    assert compute_phash(Image.new("RGB", (8, 8))) == ""
