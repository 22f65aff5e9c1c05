"""One file's bytes: what is damaged, what is as people see it, and that what passes can be decoded by training."""

import io
import random
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image, ImageOps

from fakes import make_image
from visionloop.data.duplicates import compute_phash_of_grey
from visionloop.data.images import decode_grey, decode_image, load_array
from visionloop.errors import ImageError
from visionloop.ingest.inspect import Facts, inspect_bytes, make_rejected
from visionloop.ingest.item import Item

LIMIT = 1_000_000


def encode(kind: str = "JPEG", *, size: tuple[int, int] = (120, 90), mode: str = "RGB", **options: object) -> bytes:
    rng = np.random.default_rng(7)
    coarse = Image.fromarray(rng.integers(0, 256, (9, 12, 3), dtype=np.uint8))
    buffer = io.BytesIO()
    coarse.resize(size, Image.Resampling.BICUBIC).convert(mode).save(buffer, kind, **options)
    return buffer.getvalue()


def make_exif(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif.tobytes()


def inspect(data: bytes) -> Facts:
    return inspect_bytes(data, "photos:a.jpg", max_pixels=LIMIT)


def judge(data: bytes) -> str:
    try:
        inspect(data)
    except ImageError as exc:
        return exc.reason_code
    return "ok"


def patch(data: bytes, old: bytes, new: bytes) -> bytes:
    assert old in data
    return data.replace(old, new, 1)


def flip(data: bytes, share: float = 0.5, by: int = 0x55) -> bytes:
    place = int(len(data) * share)
    return data[:place] + bytes([data[place] ^ by]) + data[place + 1 :]


def test_facts_of_a_jpeg() -> None:
    data = encode()
    facts = inspect(data)
    assert (facts.width, facts.height, facts.format, facts.num_bytes) == (120, 90, "JPEG", len(data))
    assert len(facts.phash) == 16
    assert facts.sha256 != inspect(data + b"\0").sha256, "the digest is of the bytes, not of the picture"


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_width_height_and_hash_are_those_of_the_upright_image(kind: str, orientation: int) -> None:
    facts = inspect(encode(kind, exif=make_exif(orientation), quality=95))
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(encode(kind, exif=make_exif(orientation), quality=95))))
    assert (facts.width, facts.height) == upright.size == ((120, 90) if orientation < 5 else (90, 120))
    expected = compute_phash_of_grey(np.asarray(upright.convert("L")))
    assert (int(facts.phash, 16) ^ int(expected, 16)).bit_count() <= 2


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"quality": 50}, {"optimize": True}])
@pytest.mark.parametrize("size", [(300, 300), (120, 90), (64, 64), (63, 40), (33, 900), (1200, 800)])
def test_hash_of_the_reduced_image_is_that_of_the_whole(size: tuple[int, int], options: dict[str, object]) -> None:
    data = encode(size=size, **options)
    whole = decode_image(data, "x")
    expected = int(compute_phash_of_grey(np.asarray(whole.convert("L"))), 16)
    assert (int(inspect(data).phash, 16) ^ expected).bit_count() <= 2


DAMAGED: dict[str, Callable[[], bytes]] = {
    "cut-in-half": lambda: encode()[: len(encode()) // 2],
    "no-end-marker": lambda: encode()[:-2],
    "half-an-end-marker": lambda: encode()[:-1],
    "progressive-cut": lambda: encode(progressive=True)[:-300],
    "progressive-flip": lambda: flip(encode(progressive=True, quality=95), 0.4),
    "restart-flip": lambda: flip(encode(restart_marker_blocks=2, quality=95)),
    "restart-marker-lost": lambda: patch(encode(restart_marker_blocks=2), b"\xff\xd2", b"\x11\xd2"),
    "grey-cut": lambda: encode(mode="L")[:-40],
    "cmyk-cut": lambda: encode(mode="CMYK")[:-400],
    "png-cut": lambda: encode("PNG")[:-100],
    "png-no-end": lambda: encode("PNG")[:-12],
    "png-wrong-checksum": lambda: flip(encode("PNG")),
}
WHOLE: dict[str, Callable[[], bytes]] = {
    "progressive": lambda: encode(progressive=True),
    "restart-markers": lambda: encode(restart_marker_blocks=2),
    "grey": lambda: encode(mode="L"),
    "cmyk": lambda: encode(mode="CMYK"),
    "trailing-garbage": lambda: encode() + b"garbage" * 100,
    "a-few-bytes-before-the-end": lambda: encode()[:-2] + b"abcdefgh" + encode()[-2:],
    "odd-jfif-revision": lambda: patch(encode(), b"JFIF\0\x01", b"JFIF\0\x07"),
    "comment": lambda: encode(comment=b"x" * 60_000),
    "16-bit": lambda: encode("PNG", mode="I;16"),
    "palette": lambda: encode("PNG", mode="P"),
    "alpha": lambda: encode("PNG", mode="RGBA"),
    "broken-exif": lambda: encode(exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff" + b"\x01\x12" * 50),
    "png-wrong-checksum-of-a-comment": lambda: patch(encode("PNG", pnginfo=make_comment()), b"hello", b"jello"),
    "one-pixel": lambda: encode(size=(1, 1)),
}


def make_comment() -> object:
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_text("Comment", "hello")
    return info


@pytest.mark.parametrize("make", DAMAGED.values(), ids=DAMAGED.keys())
def test_damage_is_found(make: Callable[[], bytes]) -> None:
    assert judge(make()) == "damaged"


@pytest.mark.parametrize("make", WHOLE.values(), ids=WHOLE.keys())
def test_what_is_odd_but_whole_passes(make: Callable[[], bytes]) -> None:
    data = make()
    assert judge(data) == "ok"
    assert load_array(data, "x", size_hw=(32, 32), resize="squash").shape == (32, 32, 3)


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "MPO"])
def test_of_several_frames_the_first_counts(kind: str) -> None:
    first, second = (Image.open(io.BytesIO(make_image(seed, size_hw=(40, 50)))).convert("RGB") for seed in (1, 2))
    buffer = io.BytesIO()
    first.save(buffer, kind, save_all=True, append_images=[second, second], quality=95)
    facts = inspect(buffer.getvalue())
    expected = int(compute_phash_of_grey(np.asarray(first.convert("L"))), 16)
    assert (facts.width, facts.height, facts.format) == (50, 40, kind if kind != "MPO" else "JPEG")
    assert (int(facts.phash, 16) ^ expected).bit_count() <= 4


def test_pixels_are_counted_before_they_are_decoded() -> None:
    data = encode()
    place = data.index(b"\xff\xc0") + 5
    huge = data[:place] + b"\x0b\xb8\x07\xd0" + data[place + 4 :]
    with pytest.raises(ImageError, match=r"has 2000 x 3000 pixels; expected at most 1000000") as caught:
        inspect(huge)
    assert caught.value.reason_code == "too_large"


@pytest.mark.parametrize(
    ("error", "todo"),
    [
        (ImageError("x", "has 9 x 9 pixels", "at most 80", reason_code="too_large"), ". Or raise ingest.max_pixels."),
        (
            ImageError("x", "is too large", "at most 9 bytes", reason_code="too_large"),
            ". Or raise ingest.max_file_bytes.",
        ),
        (ImageError("x", "has 5000 scans", "at most 100", reason_code="too_large"), ""),
        (ImageError("x", "is too large", "at most 9 bytes", "Cut it.", reason_code="too_large"), ". Cut it."),
        (ImageError("x", "has 0 x 9 pixels", "an image", reason_code="empty"), ""),
    ],
)
def test_what_is_too_large_names_the_limit(error: ImageError, todo: str) -> None:
    item = Item(origin="s:x.png", source="s", labels=("a",), read=lambda most: b"")
    assert make_rejected(item, error).reason == f"{error.found}; expected {error.expected}{todo}"


def test_thousands_of_scans_are_too_many() -> None:
    data = encode(progressive=True)
    start = data.rindex(b"\xff\xda")
    scan = data[start:-2]
    with pytest.raises(ImageError, match="has too many scans; expected at most 100"):
        inspect(data[:start] + scan * 2000 + b"\xff\xd9")


def mutate(data: bytes, rng: random.Random) -> bytes:
    out, place = bytearray(data), rng.randrange(2, len(data))
    way = rng.randrange(6)
    if way == 0:
        del out[place:]
    elif way == 1:
        out[place] ^= 1 << rng.randrange(8)
    elif way == 2:
        out[rng.randrange(min(len(out), 700))] = rng.randrange(256)
    elif way == 3:
        out[place:place] = rng.randbytes(rng.choice((1, 8, 100)))
    elif way == 4:
        del out[place : place + rng.choice((1, 8, 100))]
    else:
        out[place : place + 20] = rng.randbytes(20)
    return bytes(out)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_what_passes_here_can_be_decoded_for_training_and_has_the_size_said() -> None:
    rng = random.Random(0)
    whole = [
        *(encode(size=(60, 44), **o) for o in ({}, {"progressive": True}, {"restart_marker_blocks": 2})),
        *(encode(size=(60, 44), exif=make_exif(6)), encode(size=(60, 44), mode="CMYK")),
        *(encode(kind, size=(60, 44)) for kind in ("PNG", "WEBP")),
    ]
    verdicts = {"ok": 0}
    for _ in range(400):
        data = mutate(rng.choice(whole), rng)
        try:
            facts = inspect(data)
        except ImageError as exc:
            verdicts[exc.reason_code] = verdicts.get(exc.reason_code, 0) + 1
            continue
        verdicts["ok"] += 1
        seen, _ = decode_grey(data, "x", at_least_px=32)
        assert (facts.width, facts.height, facts.format) == (seen.width, seen.height, seen.format)
        load_array(data, "x", size_hw=(32, 32), resize="fit_crop")
    assert verdicts["ok"] > 50
    assert verdicts["damaged"] > 50
