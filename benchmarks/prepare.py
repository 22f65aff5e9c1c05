"""Speed of `prepare`: against a pool of processes that do it with Pillow, and against the bare decoder and resizer.

The whole stage is timed: read from the store, check the digest, decode, resize, write shards and index. The pool opens,
converts and resizes (antialiased bilinear) to the same size, into the same kind of array. The start of the processes is
counted for both. The lower limit is a loop of libjpeg-turbo's scaled decode and an area resize, without reading and
writing. The photos are synthetic: noise with the spectrum of photos. Only a few are made; bytes behind the end of the
file make copies of them differ.
"""

import hashlib
import io
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
from PIL import Image

from row import Row
from visionloop.data.images import load_array
from visionloop.data.manifest import make_image_key, make_pin, write_pin
from visionloop.data.parts import commit_version, make_version
from visionloop.data.prepare import prepare
from visionloop.data.rows import hold_records
from visionloop.data.shards import load_prepared
from visionloop.params import Params, make_params
from visionloop.records import ImageRecord
from visionloop.settings import Settings
from visionloop.store import LocalStore
from visionloop.workspace import Workspace, connect

S = 224
REPEATS = 5
PROCESSES = 2
NUM_DRAWN = 24
SIZES = {(500, 375): 6_000, (1024, 768): 3_000}


def bench_prepare(bench_dir: Path) -> list[Row]:
    """Time both sizes. Prints the difference of the pixels and the memory to stderr."""
    rows = []
    for (width, height), number in SIZES.items():
        home = bench_dir / f"prepare-{width}"
        settings = make_prepare_workspace(home, (width, height), number)
        paths = sorted(str(p) for p in (home / "store" / "images").rglob("*") if p.is_file())
        ways: dict[str, Callable[[], object]] = {
            "ours": partial(prepare, open_bench(settings)),
            "pillow": partial(run_pool, paths, home / "pillow.npy", convert_with_pillow),
            "limit": partial(run_pool, paths, None, convert_with_turbo),
        }
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(REPEATS):
            for name, way in ways.items():
                os.sync()  # this run must not wait for the writes of the run before
                started = time.perf_counter()
                way()
                seconds[name].append(time.perf_counter() - started)
        per_s = {name: number / statistics.median(times) for name, times in seconds.items()}
        what = f"prepare at {S}, JPEGs of {width} x {height}"
        rows.append(Row(what, per_s["ours"], per_s["pillow"], "images/s", f"Pillow, {PROCESSES} processes"))
        rows.append(Row(what, per_s["ours"], per_s["limit"], "images/s", "scaled decode and area resize alone"))
        tell_the_rest(home, settings, paths)
        shutil.rmtree(home)
    return rows


def make_bench_params() -> Params:
    """Return the parameters of the benchmark."""
    return make_params({"name": "bench", "prepare": {"image_size": S}})


def open_bench(settings: Settings) -> Workspace:
    """Return the workspace of the benchmark."""
    return connect(settings, make_bench_params(), store=LocalStore(settings.home / "store"))


def make_prepare_workspace(home: Path, size: tuple[int, int], number: int) -> Settings:
    """Put photos into a store and pin a dataset of them, if that is not done."""
    settings = Settings(home, (home / "store").as_uri(), "http://127.0.0.1:1", (home / "artifacts").as_uri())
    if settings.pin_path.is_file():
        return settings
    shutil.rmtree(home, ignore_errors=True)
    store, records = LocalStore(home / "store"), []
    drawn = [draw_photo(seed, size) for seed in range(NUM_DRAWN)]
    for i in range(number):
        data = drawn[i % NUM_DRAWN] + i.to_bytes(4, "big")
        sha256 = hashlib.sha256(data).hexdigest()
        store.put(make_image_key(sha256), data)
        side = ("train", "train", "val", "test")[i % 4]
        place = {"sources": ("bench",), "origins": (f"{i}.jpg",), "ordinal": i, "group": None, "key": sha256}
        facts = {"width": size[0], "height": size[1], "format": "JPEG", "num_bytes": len(data), "phash": ""}
        records.append(ImageRecord(sha256, (f"c{i % 5}",), side=side, captured_at=None, **place, **facts))
    held = hold_records(records)
    version = make_version(
        "bench", None, held, held, num_added=number, split={}, rejected=None, num_rejected=0, created_at="bench"
    )
    commit_version(store, version, held)
    write_pin(settings.pin_path, make_pin(version))
    return settings


def draw_photo(seed: int, size: tuple[int, int]) -> bytes:
    """Encode coloured noise whose amplitude falls with the frequency, as that of photos does."""
    rng, (width, height) = np.random.default_rng(seed), size
    y, x = np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width)[None, :]
    falling = 1 / np.maximum(np.hypot(x, y), 1 / width) ** 1.5
    bands = [np.fft.ifft2(np.fft.fft2(rng.normal(size=(height, width))) * falling).real for _ in range(4)]
    values = np.stack([bands[3] + 0.35 * bands[i] for i in range(3)], -1)
    buffer = io.BytesIO()
    image = Image.fromarray((values / values.std() * 50 + 120).clip(0, 255).astype(np.uint8))
    image.save(buffer, "JPEG", quality=80)
    return buffer.getvalue()


def run_pool(paths: list[str], out: Path | None, convert: Callable[[str], np.ndarray]) -> None:
    """Convert files in processes; with `out`, into one memory-mapped array."""
    if out:
        np.lib.format.open_memmap(out, mode="w+", dtype=np.uint8, shape=(len(paths), S, S, 3))
    with multiprocessing.get_context("fork").Pool(PROCESSES) as pool:
        jobs = list(enumerate(paths))
        for _ in pool.imap_unordered(partial(_convert_one, out, convert), jobs, chunksize=32):
            pass


def _convert_one(out: Path | None, convert: Callable[[str], np.ndarray], job: tuple[int, str]) -> None:
    array = convert(job[1])
    if out:
        _open_array(out)[job[0]] = array


_OPEN: dict[Path, Any] = {}


def _open_array(path: Path) -> np.ndarray:
    """Open the array once in each process."""
    if path not in _OPEN:
        _OPEN[path] = np.load(path, mmap_mode="r+")
    return _OPEN[path]


def convert_with_pillow(path: str) -> np.ndarray:
    """Return the image as a tutorial would prepare it, with Pillow."""
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB").resize((S, S), Image.Resampling.BILINEAR))


def convert_with_turbo(path: str) -> np.ndarray:
    """Return the image with the least work: libjpeg-turbo's smallest decode, then a mean over areas."""
    pixels = simplejpeg.decode_jpeg(Path(path).read_bytes(), fastdct=True, fastupsample=True, min_height=S, min_width=S)
    return np.asarray(Image.fromarray(pixels).resize((S, S), Image.Resampling.BOX))


def tell_the_rest(home: Path, settings: Settings, paths: list[str]) -> None:
    """Print how far the pixels are from Pillow's, and the memory that one run in a fresh process takes."""
    apart = []
    for path in paths[:NUM_DRAWN]:
        ours = load_array(Path(path).read_bytes(), path, size_hw=(S, S), resize="squash")
        apart.append(np.abs(ours.astype(int) - convert_with_pillow(path)).mean())
    script = (
        "import resource, sys; from pathlib import Path; sys.path.insert(0, sys.argv[2]);"
        "import prepare as b; home = Path(sys.argv[1]);"
        "b.prepare(b.open_bench(b.make_prepare_workspace(home, (0, 0), 0)));"
        "who = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN);"
        "print(*(resource.getrusage(w).ru_maxrss // 1024 for w in who))"
    )
    command = [sys.executable, "-c", script, str(home), str(Path(__file__).parent)]
    done = subprocess.run(command, env=dict(os.environ), capture_output=True, text=True, check=True)
    own, worker = done.stdout.split()
    num_images = len(load_prepared(settings.prepared_dir).sha256_n)
    print(
        f"{home.name}: {num_images:,} images; mean difference to Pillow {np.mean(apart):.2f} levels "
        f"(largest of an image {max(apart):.2f}); memory {own} MB, its largest worker {worker} MB",
        file=sys.stderr,
    )
