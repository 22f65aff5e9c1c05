"""One decoder decides: what ingest lets in, prepare, prediction, pictures and the server read, and nothing else.

The fuzz changes files by their structure, with all lengths right, as cameras and editing programs do: parts are cut,
lengthened, added, removed, repeated and moved. Flipped bytes find none of the faults that this finds.
"""

import io
import os
import random
import struct
import warnings
import zlib
from collections import Counter
from collections.abc import Callable
from functools import cache

import numpy as np
import pytest
from PIL import Image

from visionloop.data.images import decode_image, load_array
from visionloop.errors import ImageError
from visionloop.ingest.inspect import inspect_bytes

FUZZED = os.environ.get("TEST_FUZZ_NUMBER")
NUMBERS = [int(FUZZED)] if FUZZED else [6000, pytest.param(20_000, marks=pytest.mark.long)]
SEED = os.environ.get("TEST_FUZZ_SEED", "visionloop")
PNG = b"\x89PNG\r\n\x1a\n"
LIMIT = 1_000_000

Part = tuple[bytes, bytes]  # a segment or chunk: its marker or kind, and its content


def make_picture(width: int = 40, height: int = 24) -> Image.Image:
    coarse = np.random.default_rng(3).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def encode(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def make_exif() -> bytes:
    exif = Image.Exif()
    exif[0x0112], exif[0x010F], exif[0x0132] = 6, "A camera", "2026:01:02 03:04:05"
    return exif.tobytes()


# JPEG: split into parts, and joined again with the right lengths. The last part holds all from the first scan on.


def split_jpeg(data: bytes) -> list[Part]:
    parts, place = [], 2
    while (marker := data[place + 1]) != 0xDA:
        length = struct.unpack_from(">H", data, place + 2)[0]
        parts.append((bytes([0xFF, marker]), data[place + 4 : place + 2 + length]))
        place += 2 + length
    return [*parts, (b"", data[place:])]


def join_jpeg(parts: list[Part]) -> bytes:
    return b"\xff\xd8" + b"".join(
        head + struct.pack(">H", len(body[:65_533]) + 2) + body[:65_533] if head else body for head, body in parts
    )


def split_png(data: bytes) -> list[Part]:
    parts, place = [], len(PNG)
    while place < len(data):
        length = struct.unpack_from(">I", data, place)[0]
        parts.append((data[place + 4 : place + 8], data[place + 8 : place + 8 + length]))
        place += 12 + length
    return parts


def join_png(parts: list[Part]) -> bytes:
    return PNG + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in parts
    )


def split_webp(data: bytes) -> list[Part]:
    parts, place = [], 12
    while place < len(data):
        length = struct.unpack_from("<I", data, place + 4)[0]
        parts.append((data[place : place + 4], data[place + 8 : place + 8 + length]))
        place += 8 + length + length % 2
    return parts


def join_webp(parts: list[Part]) -> bytes:
    body = b"".join(kind + struct.pack("<I", len(data)) + data + b"\0" * (len(data) % 2) for kind, data in parts)
    return b"RIFF" + struct.pack("<I", len(body) + 4) + b"WEBP" + body


NOTES_OF_JPEG: list[Part] = [
    (b"\xff\xe0", b"JFIF\0\1\1\0\0\x48\0\x48\0\0"),
    (b"\xff\xe0", b"JFXX\0\x10"),
    (b"\xff\xe1", b"Exif\0\0" + make_exif()[6:]),
    (b"\xff\xe1", b'http://ns.adobe.com/xap/1.0/\0<x tiff:Orientation="6"/>'),
    (b"\xff\xe2", b"ICC_PROFILE\0\1\1" + bytes(range(128))),
    (b"\xff\xe2", b"MPF\0MM\0*\0\0\0\x08\0\3" + bytes(40)),
    (b"\xff\xe2", b"FPXR\0\0\0"),
    (b"\xff\xec", b"Ducky\0\1\0\4\0\0\0\x3c\0\0"),
    (b"\xff\xed", b"Photoshop 3.0\x008BIM\3\xed\0\0\0\0\0\x10" + bytes(16) + b"8BIM\4\4\0\0\0\0\0\2hi"),
    (b"\xff\xee", b"Adobe\0\x64\0\0\0\0\1"),
    (b"\xff\xfe", b"a comment with \xff\xda in it"),
]
NOTES_OF_PNG: list[Part] = [
    (b"gAMA", struct.pack(">I", 45455)),
    (b"cHRM", struct.pack(">8I", 31270, 32900, 64000, 33000, 30000, 60000, 15000, 6000)),
    (b"sRGB", b"\0"),
    (b"iCCP", b"name\0\0" + zlib.compress(bytes(range(200)))),
    (b"pHYs", struct.pack(">IIB", 2835, 2835, 1)),
    (b"tIME", struct.pack(">H5B", 2026, 1, 2, 3, 4, 5)),
    (b"tEXt", b"Comment\0hello"),
    (b"zTXt", b"Long\0\0" + zlib.compress(b"hello " * 50)),
    (b"iTXt", b'XML:com.adobe.xmp\0\0\0\0\0<x tiff:Orientation="8"/>'),
    (b"eXIf", make_exif()[6:]),
    (b"bKGD", b"\0\0\0\0\0\0"),
    (b"sPLT", b"name\0\x08" + bytes(12)),
    (b"hIST", bytes(8)),
    (b"acTL", struct.pack(">II", 2, 0)),
    (b"fcTL", struct.pack(">IIIIIHHBB", 0, 40, 24, 0, 0, 1, 10, 0, 0)),
    (b"prVt", bytes(30)),
]
NOTES_OF_WEBP: list[Part] = [
    (b"EXIF", make_exif()),
    (b"XMP ", b'<x tiff:Orientation="3"/>'),
    (b"ICCP", bytes(range(130))),
    (b"ABCD", b"what nobody knows"),
]


def make_jpeg(image: Image.Image, **options: object) -> bytes:
    parts = split_jpeg(encode(image, "JPEG", **options))
    own = [part for part in parts if part[0] not in (b"\xff\xe0", b"\xff\xee")]
    is_cmyk = image.mode == "CMYK"
    notes = [note for note in NOTES_OF_JPEG if not (is_cmyk and note[0] in (b"\xff\xe0", b"\xff\xee"))]
    return join_jpeg([*(part for part in parts if is_cmyk and part[0] == b"\xff\xee"), *notes, *own])


def turn_411() -> bytes:
    """4:1:1, and 4:4:1 by exchanging the two sampling factors: a lossless quarter turn of such a file has it."""
    data = bytearray(make_jpeg(make_picture(), subsampling=1))
    place = data.index(b"\xff\xc0")
    for number, (across, down) in enumerate(((1, 4), (1, 1), (1, 1))):
        data[place + 11 + 3 * number] = across << 4 | down
    return bytes(data)


def make_png(image: Image.Image, bits: bytes, **options: object) -> bytes:
    first, *others = split_png(encode(image, "PNG", **options))
    return join_png([first, (b"sBIT", bits), *NOTES_OF_PNG[:-3], *others[:-1], *NOTES_OF_PNG[-1:], others[-1]])


def make_wide() -> Image.Image:
    return Image.fromarray(np.asarray(make_picture().convert("L")).astype(np.uint16) * 257)


def make_interlaced() -> bytes:
    """Adam7, one byte a pixel: seven small pictures, each with its rows."""
    values = np.asarray(make_picture().convert("L"))
    passes = ((0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1))
    rows = [b"\0" + row.tobytes() for y, x, dy, dx in passes for row in values[y::dy, x::dx]]
    header = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], 8, 0, 0, 0, 1)
    pixels = zlib.compress(b"".join(rows))
    return join_png(
        [(b"IHDR", header), *NOTES_OF_PNG[:10], (b"IDAT", pixels[:40]), (b"IDAT", pixels[40:]), (b"IEND", b"")]
    )


def make_webp(image: Image.Image, **options: object) -> bytes:
    icc = bytes(range(130))
    return encode(image, "WEBP", exif=make_exif(), xmp=b"<x/>", icc_profile=icc, **options)


def make_alpha() -> Image.Image:
    image = make_picture().convert("RGBA")
    image.putalpha(make_picture().convert("L"))
    return image


def make_mpo() -> bytes:
    return encode(make_picture(), "MPO", save_all=True, append_images=[make_picture(20, 30)] * 3, exif=make_exif())


def make_animation(kind: str) -> bytes:
    return encode(make_picture(), kind, save_all=True, append_images=[make_picture().rotate(180)], duration=50)


FILES: dict[str, Callable[[], bytes]] = {
    "jpeg": lambda: make_jpeg(make_picture()),
    "jpeg-progressive": lambda: make_jpeg(make_picture(), progressive=True),
    "jpeg-441": turn_411,
    "jpeg-cmyk": lambda: make_jpeg(make_picture().convert("CMYK")),
    "jpeg-grey": lambda: make_jpeg(make_picture().convert("L"), restart_marker_blocks=2),
    "jpeg-mpo": make_mpo,
    "jpeg-film-behind": lambda: make_jpeg(make_picture(80, 70)) + b"\xff\xda" * 150,
    "png": lambda: make_png(make_picture(), b"\x08\x08\x08"),
    "png-16-bit": lambda: make_png(make_wide(), b"\x0c"),
    "png-palette": lambda: make_png(make_picture().quantize(20), b"\x08\x08\x08", transparency=3),
    "png-interlaced": make_interlaced,
    "png-animated": lambda: make_animation("PNG"),
    "webp": lambda: make_webp(make_picture(), quality=70),
    "webp-lossless": lambda: make_webp(make_picture(), lossless=True),
    "webp-alpha": lambda: make_webp(make_alpha(), quality=70),
    "webp-animated": lambda: make_animation("WEBP"),
}
NOTES = {"jpeg": NOTES_OF_JPEG, "png": NOTES_OF_PNG, "webp": NOTES_OF_WEBP}
SPLIT = {"jpeg": split_jpeg, "png": split_png, "webp": split_webp}
JOIN = {"jpeg": join_jpeg, "png": join_png, "webp": join_webp}


@cache
def load_parts(name: str) -> list[Part]:
    return SPLIT[name.partition("-")[0]](FILES[name]())


def change_part(part: Part, rng: random.Random) -> Part:
    head, body = part
    place, way = rng.randrange(len(body) + 1), rng.randrange(5)
    if way == 0:
        return head, body[:place]
    if way == 1:
        return head, body[place:]
    if way == 2:
        return head, body[:place] + rng.randbytes(rng.choice((1, 2, 7, 300))) + body[place:]
    if way == 3:
        return head, body + bytes(rng.choice((1, 4, 64)))
    return head, body[:place] + bytes([rng.randrange(256)]) + body[place + 1 :]


def mutate(name: str, rng: random.Random) -> bytes:
    """Change one to three parts of a file. Its lengths and checksums stay right."""
    kind = name.partition("-")[0]
    parts = list(load_parts(name))
    for _ in range(rng.choice((1, 1, 2, 3))):
        place, way = rng.randrange(len(parts)), rng.randrange(7)
        if way < 3:
            parts[place] = change_part(parts[place], rng)
        elif way == 3:
            parts.insert(place, rng.choice(NOTES[kind]))
        elif way == 4:
            parts.insert(place, change_part(rng.choice(NOTES[kind]), rng))
        elif way == 5 and len(parts) > 1:
            del parts[place]
        else:
            parts.insert(rng.randrange(len(parts)), parts[place] if rng.random() < 0.5 else parts.pop(place))
    return JOIN[kind](parts)


def judge(read: Callable[[], object]) -> str:
    try:
        read()
    except ImageError as exc:
        return exc.reason_code
    return "ok"


READERS: dict[str, Callable[[bytes], object]] = {
    "prepare": lambda data: load_array(data, "x", size_hw=(32, 32), resize="squash", max_pixels=LIMIT),
    "small": lambda data: load_array(data, "x", size_hw=(5, 7), resize="letterbox", max_pixels=LIMIT),
    "picture": lambda data: decode_image(data, "x", max_pixels=LIMIT),
}


def compare(data: bytes) -> tuple[str, list[str]]:
    """Return ingest's verdict, and the readers that have another one."""
    verdict = judge(lambda: inspect_bytes(data, "x", max_pixels=LIMIT))
    return verdict, [name for name, read in READERS.items() if judge(lambda read=read: read(data)) != verdict]


@pytest.mark.parametrize("name", FILES)
def test_each_of_the_files_goes_in_and_is_read(name: str) -> None:
    data = FILES[name]()
    assert JOIN[name.partition("-")[0]](load_parts(name)) == data
    assert compare(data) == ("ok", [])


@pytest.mark.parametrize("number", NUMBERS)
def test_what_ingest_lets_in_all_others_read(number: int) -> None:
    """Nightly with another seed: `TEST_FUZZ_SEED=$(date +%F) TEST_FUZZ_NUMBER=200000`."""
    assert len(FILES) == 16
    rng, names, verdicts = random.Random(SEED), sorted(FILES), Counter[str]()
    differences: list[tuple[int, str, str, list[str]]] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for place in range(number):
            name = names[place % len(names)]
            verdict, others = compare(mutate(name, rng))
            verdicts[verdict] += 1
            if others:
                differences.append((place, name, verdict, others))
    print(dict(verdicts), len(differences))
    assert differences == []
    assert verdicts["ok"] > number / 3
    assert verdicts["damaged"] > number / 20
