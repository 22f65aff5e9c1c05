"""Perceptual hashes: near for images saved again, far for others; all near pairs are found; pixels decide."""

import io
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from visionloop.data.duplicates import (
    MAX_DISTANCE,
    THUMB_PX,
    compute_difference,
    compute_phash_of_grey,
    find_near_pairs,
)


def make_photo(seed: int) -> Image.Image:
    """A picture with the spectrum of a photo: amplitude falls as 1/frequency."""
    rng = np.random.default_rng(seed)
    y, x = np.fft.fftfreq(200)[:, None, None], np.fft.fftfreq(300)[None, :, None]
    falling = 1 / np.maximum(np.hypot(x, y), 1 / 300)
    values = np.fft.ifft2(np.fft.fft2(rng.normal(size=(200, 300, 3)), axes=(0, 1)) * falling, axes=(0, 1)).real
    values = 255 * (values - values.min()) / (values.max() - values.min())
    return Image.fromarray(values.astype(np.uint8))


def save(image: Image.Image, kind: str, **how: int) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, kind, **how)
    return Image.open(buffer).convert("RGB")


def scale(image: Image.Image, ratio: float) -> Image.Image:
    return image.resize((round(image.width * ratio), round(image.height * ratio)))


def compute_phash(image: Image.Image) -> str:
    return compute_phash_of_grey(np.asarray(image.convert("L")))


def make_copies(image: Image.Image) -> list[Image.Image]:
    resaved = [save(image, "JPEG", quality=q) for q in (50, 80, 95)]
    resized = [save(scale(image, ratio), "JPEG", quality=60) for ratio in (0.5, 0.8, 1.5)]
    return [*resaved, *resized, save(image, "WEBP", quality=60), save(image, "PNG")]


def make_thumb(image: Image.Image) -> np.ndarray:
    return np.asarray(image.resize((THUMB_PX, THUMB_PX), Image.Resampling.BILINEAR))


def count_bits(a: str, b: str) -> int:
    return (int(a, 16) ^ int(b, 16)).bit_count()


def to_array(*hashes: str) -> np.ndarray:
    return np.array([int(h, 16) for h in hashes], np.uint64)


def find(values: list[int], first_new: int = 0, kinds: list[int] | None = None) -> list[tuple[int, int, int]]:
    pairs = find_near_pairs(np.array(values, np.uint64), np.array(kinds or [0] * len(values)), first_new)
    found = zip(pairs.later_p.tolist(), pairs.earlier_p.tolist(), pairs.distance_p.tolist(), strict=True)
    return sorted(found)


def test_copies_are_found_and_other_photos_are_not() -> None:
    photos = [make_photo(seed) for seed in range(12)]
    hashes = [compute_phash(photo) for photo in photos]
    thumbs = np.stack([make_thumb(photo) for photo in photos])
    for photo, phash, thumb in zip(photos, hashes, thumbs, strict=True):
        copies = make_copies(photo)
        assert max(count_bits(phash, compute_phash(copy)) for copy in copies) <= MAX_DISTANCE
        others = np.stack([make_thumb(copy) for copy in copies])
        assert compute_difference(np.broadcast_to(thumb, others.shape), others).max() < 0.9
    assert min(count_bits(a, b) for i, a in enumerate(hashes) for b in hashes[:i]) > 12
    assert compute_difference(thumbs[1:], thumbs[:-1]).min() > 3


def test_a_known_hash_never_changes() -> None:
    """With another value the duplicates of images in existing datasets would no longer be found."""
    y, x = np.mgrid[0:97, 0:131]
    grey = ((x * x + 3 * y * x + 7 * y) % 251).astype(np.uint8)
    assert compute_phash_of_grey(grey) == "dda6369ad0056d04"
    assert compute_phash_of_grey(np.asfortranarray(grey)) == "dda6369ad0056d04"
    assert compute_phash_of_grey(np.repeat(np.repeat(grey, 3, 0), 3, 1)) == "dda6369ad0056d04"


def test_a_plain_colour_has_the_first_bit_alone_and_its_pixels_tell() -> None:
    assert {compute_phash_of_grey(np.full((40, 64), level, np.uint8)) for level in (1, 90, 255)} == {"8" + "0" * 15}
    white, grey, near = (np.full((1, THUMB_PX, THUMB_PX, 3), level, np.uint8) for level in (255, 200, 254))
    assert compute_difference(white, grey)[0] > 5
    assert compute_difference(white, near)[0] < 0.6


def test_a_small_thing_makes_another_picture() -> None:
    """A fixed camera: the scene is the same, a part of it is not."""
    empty = np.full((1, THUMB_PX, THUMB_PX, 3), 120, np.uint8)
    empty[:, :, ::3] = 180
    full = empty.copy()
    full[:, 8:12, 12:16] = 0
    assert compute_difference(empty, full)[0] > 2


def test_the_worked_examples_of_the_source() -> None:
    assert find([0, 0x200400801, 0x1F, 0x200400801], 1) == [(1, 0, 4), (3, 0, 4), (3, 1, 0)]
    white, near, grey = (np.full((1, THUMB_PX, THUMB_PX, 3), level, np.uint8) for level in (255, 254, 200))
    assert compute_difference(white, near)[0] == 0.5
    assert compute_difference(white, grey)[0] == 27.5


def test_a_tiny_image_has_none() -> None:
    assert compute_phash(Image.new("RGB", (31, 400))) == ""
    assert len(compute_phash(Image.new("RGB", (32, 32)))) == 16


@given(
    st.lists(st.tuples(st.integers(0, 2), st.sets(st.integers(0, 63), max_size=5), st.integers(0, 1)), max_size=16),
    st.integers(0, 16),
)
def test_all_pairs_within_four_bits_are_found(rows: list[tuple[int, set[int], int]], first_new: int) -> None:
    values = [0x0F1E2D3C4B5A6978 * (base + 1) % 2**64 ^ sum(1 << bit for bit in bits) for base, bits, _ in rows]
    expected = [
        (i, j, (values[i] ^ values[j]).bit_count())
        for i in range(first_new, len(values))
        for j in range(i)
        if (values[i] ^ values[j]).bit_count() <= 4
    ]
    assert find(values, first_new, [kind for *_, kind in rows]) == sorted(expected)


def test_many_equal_images_make_few_pairs_and_one_family() -> None:
    pairs = find_near_pairs(np.full(10_000, 7, np.uint64), np.zeros(10_000, np.int64), 0)
    assert 9_999 <= len(pairs.later_p) <= 160_000
    assert np.array_equal(np.unique(pairs.later_p), np.arange(1, 10_000))
    assert pairs.earlier_p.max() < 64


def test_of_many_neighbours_the_nearest_of_each_kind_are_kept() -> None:
    far, near = [0b11 << i for i in range(0, 40, 2)], [0]
    found = find([*far, 1 << 50, *near], 20, [0] * 20 + [1, 0])
    assert sum(i == 21 for i, *_ in found) == 17
    assert (21, 20, 1) in found


@pytest.mark.parametrize("kind", ["random", "crowded"])
def test_large_sets_are_quick(kind: str) -> None:
    rng = np.random.default_rng(0)
    values = rng.integers(0, 2**64, 25_000, dtype=np.uint64)
    if kind == "crowded":
        values = np.uint64(5) ^ (np.uint64(1) << rng.integers(0, 64, 25_000).astype(np.uint64))
    started = time.process_time()
    pairs = find_near_pairs(values, np.zeros(25_000, np.int64), 0)
    assert time.process_time() - started < 5  # all pairs would take minutes and gigabytes
    assert (len(np.unique(pairs.later_p)) == 24_999) == (kind == "crowded")
