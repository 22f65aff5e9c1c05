"""Images that were made to do harm: each is refused, or harmless, in bounded time and memory."""

import io
import os
import resource
import struct
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from fakes import make_image
from visionloop.data.images import load_array
from visionloop.data.manifest import make_image_key
from visionloop.data.parts import load_version_records
from visionloop.ingest.pull import PullReport, pull
from visionloop.params import FolderSource, make_params
from visionloop.settings import load_settings
from visionloop.store import LocalStore
from visionloop.workspace import connect

MAX_BYTES = 2_000_000
PNG = b"\x89PNG\r\n\x1a\n"


def encode(kind: str, *, mode: str = "RGB", size: tuple[int, int] = (90, 60), **options: object) -> bytes:
    """Encode a smooth picture, of other pixels for each call's arguments."""
    seed = zlib.crc32(repr((kind, mode, size, sorted(options))).encode())
    picture = Image.open(io.BytesIO(make_image(seed, size_hw=(64, 64)))).convert("RGB").resize(size)
    buffer = io.BytesIO()
    (picture.convert(mode) if mode != "RGB" else picture).save(buffer, kind, **options)
    return buffer.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def make_png(width: int, height: int, *chunks: bytes, colour: int = 2, depth: int = 8, interlaced: int = 0) -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, interlaced))
    return PNG + header + b"".join(chunks) + chunk(b"IEND", b"")


def make_bomb(width: int, height: int, *, interlaced: int = 0) -> bytes:
    """A few kilobytes that unpack to hundreds of megabytes, of an image that says it is even larger."""
    packer = zlib.compressobj(1)
    packed = b"".join(packer.compress(bytes(1 << 20)) for _ in range(200)) + packer.flush()
    return make_png(width, height, chunk(b"IDAT", packed), interlaced=interlaced)


def set_size(data: bytes, width: int, height: int) -> bytes:
    """Write another size into the frame header of a JPEG."""
    place = max(data.find(b"\xff\xc0"), data.find(b"\xff\xc2")) + 5
    return data[:place] + struct.pack(">HH", height, width) + data[place + 4 :]


def add_segment(data: bytes, marker: int, content: bytes) -> bytes:
    return data[:2] + bytes([0xFF, marker]) + struct.pack(">H", len(content) + 2) + content + data[2:]


def make_exif_loop() -> bytes:
    """Metadata whose directories point at each other, with one entry that claims 4 GB."""
    entry = struct.pack(">HHII", 0x0112, 3, 0xFFFFFFFF, 8) + struct.pack(">HHII", 0x8769, 4, 1, 8)
    return b"Exif\0\0MM\0*" + struct.pack(">I", 8) + struct.pack(">H", 2) + entry + struct.pack(">I", 8)


def repeat_scans(number: int) -> bytes:
    data = encode("JPEG", progressive=True)
    start = data.rindex(b"\xff\xda")
    return data[:start] + data[start:-2] * number + b"\xff\xd9"


def zip_text(number_of_bytes: int) -> PngInfo:
    info = PngInfo()
    info.add_text("Comment", "x" * number_of_bytes, zip=True)
    return info


def animate(kind: str, seed: int) -> bytes:
    frames = [Image.open(io.BytesIO(make_image(seed + i))).convert("RGB") for i in range(3)]
    buffer = io.BytesIO()
    frames[0].save(buffer, kind, save_all=True, append_images=frames[1:])
    return buffer.getvalue()


def cut(data: bytes, number: int) -> bytes:
    return data[:-number]


ICC = b"ICC_PROFILE\0"
HOSTILE: dict[str, tuple[Callable[[], bytes], str]] = {
    # name: (content, code; "" where it is odd but harmless and goes in)
    "empty.jpg": (lambda: b"", "empty"),
    "one-byte.jpg": (lambda: b"\xff", "not_an_image"),
    "zeros.jpg": (lambda: bytes(5000), "not_an_image"),
    "start-marker-only.jpg": (lambda: b"\xff\xd8\xff", "damaged"),
    "too-many-bytes.jpg": (lambda: encode("JPEG") + bytes(MAX_BYTES), "too_large"),
    "html.jpg": (lambda: b"<html><script>alert(1)</script></html>", "not_an_image"),
    "svg.png": (
        lambda: b"<svg xmlns='http://www.w3.org/2000/svg'><image href='file:///etc/passwd'/></svg>",
        "not_an_image",
    ),
    "gif.jpg": (lambda: encode("GIF", mode="P"), "not_an_image"),
    "bmp.jpg": (lambda: encode("BMP"), "not_an_image"),
    "tiff.jpg": (lambda: encode("TIFF"), "not_an_image"),
    "ico.png": (lambda: encode("ICO", size=(32, 32)), "not_an_image"),
    "jpeg2000.jpg": (lambda: encode("JPEG2000"), "not_an_image"),
    "eps.jpg": (lambda: encode("EPS"), "not_an_image"),
    "pdf.jpg": (lambda: encode("PDF"), "not_an_image"),
    "psd.jpg": (lambda: b"8BPS\0\1" + bytes(6) + struct.pack(">HIIHH", 3, 9, 9, 8, 3) + bytes(99), "not_an_image"),
    "heic.jpg": (lambda: b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(500), "damaged"),
    "python.png": (lambda: b"import os\nos.system('touch /tmp/owned')\n", "not_an_image"),
    "pickle.webp": (lambda: b"\x80\x04cos\nsystem\n(S'id'\ntR.", "not_an_image"),
    "jpeg-then-html.jpg": (lambda: encode("JPEG", quality=81) + b"<script>alert(1)</script>", ""),
    "jpeg-then-zip.jpg": (lambda: encode("JPEG", quality=82) + b"PK\x03\x04" + bytes(100), ""),
    "png-bomb.png": (lambda: make_bomb(20_000, 20_000), "too_large"),
    "png-bomb-interlaced.png": (lambda: make_bomb(9000, 9000, interlaced=1), "too_large"),
    "png-huge-header.png": (lambda: make_png(2**31 - 1, 2**31 - 1, chunk(b"IDAT", zlib.compress(b"x"))), "too_large"),
    "png-zero-width.png": (lambda: make_png(0, 10, chunk(b"IDAT", zlib.compress(b"x"))), "empty"),
    "png-few-pixels.png": (lambda: make_png(100, 100, chunk(b"IDAT", zlib.compress(bytes(99)))), "damaged"),
    "png-text-bomb.png": (lambda: encode("PNG", pnginfo=zip_text(50_000_000)), ""),
    "png-chunk-beyond-the-end.png": (lambda: PNG + struct.pack(">I", 2**31) + b"IHDR" + bytes(50), "damaged"),
    "png-many-chunks.png": (lambda: make_png(9, 9, chunk(b"prVt", b"") * 120_000), "too_large"),
    "png-wrong-checksum.png": (lambda: encode("PNG")[:-30] + b"\0\0\0\0" + encode("PNG")[-26:], "damaged"),
    "png-cut.png": (lambda: cut(encode("PNG", mode="L"), 40), "damaged"),
    "png-16-bit.png": (lambda: encode("PNG", mode="I;16"), ""),
    "png-animated.png": (lambda: animate("PNG", 300), ""),
    "webp-cut.webp": (lambda: cut(encode("WEBP"), 30), "damaged"),
    "webp-animated.webp": (lambda: animate("WEBP", 400), ""),
    "webp-huge-header.webp": (
        lambda: b"RIFF\x1a\0\0\0WEBPVP8X\x0a\0\0\0\x10\0\0\0" + b"\xff\xff\xff" * 2 + bytes(8),
        "too_large",
    ),
    "jpeg-huge-header.jpg": (lambda: set_size(encode("JPEG"), 65_500, 65_500), "too_large"),
    "jpeg-larger-than-its-data.jpg": (lambda: set_size(encode("JPEG", mode="L"), 2000, 2000), "damaged"),
    "jpeg-zero-height.jpg": (lambda: set_size(encode("JPEG"), 10, 0), "empty"),
    "jpeg-two-frame-headers.jpg": (
        lambda: add_segment(encode("JPEG"), 0xC0, b"\x08\xff\xff\xff\xff\x03\x01\x11\0\x02\x11\0\x03\x11\0"),
        "too_large",
    ),
    "jpeg-scans.jpg": (lambda: repeat_scans(5000), "too_large"),
    "jpeg-cut.jpg": (lambda: cut(encode("JPEG"), 200), "damaged"),
    "jpeg-progressive-cut.jpg": (lambda: cut(encode("JPEG", progressive=True), 200), "damaged"),
    "jpeg-cmyk-cut.jpg": (lambda: cut(encode("JPEG", mode="CMYK"), 300), "damaged"),
    "jpeg-12-bit.jpg": (lambda: encode("JPEG").replace(b"\xff\xc0\0\x11\x08", b"\xff\xc0\0\x11\x0c"), "not_an_image"),
    "jpeg-lossless.jpg": (lambda: encode("JPEG").replace(b"\xff\xc0", b"\xff\xc3", 1), "damaged"),
    "jpeg-exif-loop.jpg": (lambda: add_segment(encode("JPEG", quality=83), 0xE1, make_exif_loop()), ""),
    "jpeg-huge-profile.jpg": (
        lambda: add_segment(encode("JPEG", quality=84), 0xE2, ICC + b"\x01\xff" + os.urandom(60_000)),
        "",
    ),
}


@pytest.fixture(scope="module")
def pulled(tmp_path_factory: pytest.TempPathFactory) -> tuple[PullReport, LocalStore, float]:
    """Ingest all of it, beside some good images; how long that took."""
    base = tmp_path_factory.mktemp("hostile")
    for i in range(6):
        path = base / "photos" / ("cat", "dog")[i % 2] / f"good-{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(make_image(i))
    folder = base / "photos" / "cat"
    for name, (make, _) in HOSTILE.items():
        (folder / name).write_bytes(make())
    os.symlink("/dev/zero", folder / "device.jpg")
    os.symlink("/dev/full", folder / "full.jpg")
    os.symlink(folder / "circle.jpg", folder / "circle.jpg")
    os.mkfifo(folder / "pipe.jpg")
    (folder / "folder.jpg").mkdir()
    (base / "ws").mkdir()
    (base / "ws" / "params.yaml").write_text("name: pets\n")
    params = make_params({"name": "pets", "ingest": {"max_rejected_ratio": 1.0, "max_file_bytes": MAX_BYTES}})
    store = LocalStore(base / "store")
    source = FolderSource(kind="folder", path=str(base / "photos"), name="photos")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.perf_counter()
    report = pull(
        connect(load_settings({}, base / "ws"), params, store=store), sources=[source], now="2026-01-01T00:00:00+00:00"
    )
    seconds = time.perf_counter() - started
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 400_000, "kB"
    return report, store, seconds


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_every_hostile_image_ends_as_expected(pulled: tuple[PullReport, LocalStore, float]) -> None:
    report, store, _ = pulled
    found = {r.origin.rpartition("/")[2]: r.code for r in report.rejected}
    special = {name: found.pop(name, "") for name in ("device.jpg", "full.jpg", "circle.jpg", "pipe.jpg")}
    assert special == dict.fromkeys(special, "unreadable")
    expected = {name: code for name, (_, code) in HOSTILE.items() if code}
    assert found == expected
    stored = {origin.rpartition("/")[2] for r in load_version_records(store, report.version) for origin in r.origins}
    assert stored == {*(n for n, (_, code) in HOSTILE.items() if not code), *(f"good-{i}.png" for i in range(6))}


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_what_went_in_can_be_decoded_and_nothing_else_is_in_the_store(
    pulled: tuple[PullReport, LocalStore, float],
) -> None:
    report, store, _ = pulled
    records = load_version_records(store, report.version)
    for record in records:
        data = store.get(make_image_key(record.sha256))
        assert load_array(data, record.origins[0], size_hw=(32, 32), resize="squash").shape == (32, 32, 3)
    assert set(store.list("images/")) == {make_image_key(record.sha256) for record in records}


def test_no_reason_tells_of_code_or_spans_lines(pulled: tuple[PullReport, LocalStore, float]) -> None:
    report, _, seconds = pulled
    assert seconds < 10
    for one in report.rejected:
        assert "Traceback" not in one.reason
        assert "\n" not in one.reason
        assert len(one.reason) < 300


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read(tmp_path: Path) -> None:
    from visionloop.errors import ImageError
    from visionloop.ingest.item import read_file

    (tmp_path / "a.jpg").write_bytes(b"x")
    (tmp_path / "a.jpg").chmod(0)
    with pytest.raises(ImageError, match="cannot be read"):
        read_file(str(tmp_path / "a.jpg"), 100)
