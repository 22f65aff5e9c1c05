"""Speed of `ingest`: against `dvc add` + `dvc push`, against a plain loop of threads, and with nothing new.

The images are 300 x 300 pixels, about 9 kB each, smooth with camera noise, all different. They are made once and kept.
Ingest does everything: full decode, hashes, near duplicates, sides, a committed version. Each run writes into its own
folder. The folders are deleted at the end, because ext4 creates files slowly for minutes after many were deleted.
"""

import hashlib
import io
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import simplejpeg
from PIL import Image

from row import Row
from visionloop.workspace import connect

NUM_PHOTOS = 5_000
NUM_KNOWN = 25_000
REPEATS = 3
SIDE_PX = 300
NUM_CLASSES = 5
NUM_THREADS = 8


def bench_ingest(bench_dir: Path) -> list[Row]:
    """Time a first ingest of 5,000 files both as a command and in this process, and a second one of 25,000."""
    few, many = (make_many_photos(bench_dir / f"photos-{n}", n) for n in (NUM_PHOTOS, NUM_KNOWN))
    trash = bench_dir / "ingest"
    shutil.rmtree(trash, ignore_errors=True)
    pull_once(make_ingest_workspace(trash / "warm"), make_many_photos(bench_dir / "photos-20", 20))
    ways: dict[str, Callable[[Path], float]] = {
        "command": lambda folder: time_command(folder, few),
        "dvc": lambda folder: time_dvc(folder, few),
        "pull": lambda folder: pull_once(make_ingest_workspace(folder), few),
        "loop": lambda folder: time_plain_loop(folder, few),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for repeat in range(REPEATS):
        for name, way in ways.items():
            seconds[name].append(way(trash / f"{name}-{repeat}"))
    per_s = {name: NUM_PHOTOS / statistics.median(times) for name, times in seconds.items()}
    first_s, second_s = time_again(trash / "again", many)
    shutil.rmtree(trash)
    what = f"ingest of {NUM_PHOTOS:,} JPEGs of 9 kB"
    return [
        Row(f"{what}, the command", per_s["command"], per_s["dvc"], "images/s", "`dvc add` + `dvc push`"),
        Row(f"{what}, in process", per_s["pull"], per_s["loop"], "images/s", "8 threads read, hash, decode, write"),
        Row(f"ingest of {NUM_KNOWN:,} files again", NUM_KNOWN / second_s, NUM_KNOWN / first_s, "files/s", "first time"),
    ]


def make_many_photos(folder: Path, number: int) -> Path:
    """Write JPEGs into class folders, once."""
    if (folder / ".done").is_file():
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    for name in range(NUM_CLASSES):
        (folder / f"class-{name}").mkdir(parents=True)
    noise = np.random.default_rng(0).normal(0, 1.9, (2 * SIDE_PX, 2 * SIDE_PX, 1)).astype(np.int16)

    def write(i: int) -> None:
        rng = np.random.default_rng(i)
        coarse = Image.fromarray(rng.integers(0, 256, (12, 12, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize((SIDE_PX, SIDE_PX), Image.Resampling.BICUBIC))
        y, x = rng.integers(0, SIDE_PX, 2)
        pixels = (smooth + noise[y : y + SIDE_PX, x : x + SIDE_PX]).clip(0, 255).astype(np.uint8)
        data = simplejpeg.encode_jpeg(pixels, quality=68, colorsubsampling="420")
        (folder / f"class-{i % NUM_CLASSES}" / f"{i:05d}.jpg").write_bytes(data)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(write, range(number)))
    (folder / ".done").touch()
    return folder


def make_ingest_workspace(folder: Path) -> Path:
    """Make an empty workspace."""
    folder.mkdir(parents=True)
    (folder / "params.yaml").write_text("name: bench\n")
    return folder


def pull_once(workspace: Path, photos: Path) -> float:
    """Pull a folder into a workspace, in this process; return the seconds."""
    from visionloop.ingest.pull import pull
    from visionloop.params import FolderSource, load_params
    from visionloop.settings import load_settings
    from visionloop.store import open_store

    settings = load_settings({}, workspace)
    source = FolderSource(kind="folder", path=str(photos))
    started = time.perf_counter()
    pull(
        connect(settings, load_params(settings.params_path), store=open_store(settings.store_url)),
        sources=[source],
        now="2026-01-01",
    )
    return time.perf_counter() - started


def time_again(workspace: Path, photos: Path) -> tuple[float, float]:
    """Return the seconds of a first pull, and the median of later ones with nothing new."""
    first_s = pull_once(make_ingest_workspace(workspace), photos)
    return first_s, statistics.median(pull_once(workspace, photos) for _ in range(2 * REPEATS + 1))


def time_command(workspace: Path, photos: Path) -> float:
    """Return the seconds of `visionloop ingest` in a new workspace."""
    make_ingest_workspace(workspace)
    env = {**os.environ, "VISIONLOOP_HOME": str(workspace)}
    return _time([[sys.executable, "-m", "visionloop", "ingest", str(photos)]], workspace, env)


def time_dvc(folder: Path, photos: Path) -> float:
    """Return the seconds of `dvc add` and `dvc push` of a copy of the photos, to a folder as the remote."""
    folder.mkdir(parents=True)
    shutil.copytree(photos, folder / "photos")
    dvc = [sys.executable, "-m", "dvc"]
    _time(
        [[*dvc, "init", "--no-scm"], [*dvc, "remote", "add", "-d", "store", str(folder / "remote")]], folder, os.environ
    )
    return _time([[*dvc, "add", "photos"], [*dvc, "push"]], folder, os.environ)


def time_plain_loop(folder: Path, photos: Path) -> float:
    """Return the seconds in which threads read, hash, decode (Pillow) and write every photo."""
    paths = sorted(photos.glob("*/*.jpg"))
    for number in range(256):
        (folder / f"{number:02x}").mkdir(parents=True)

    def copy(path: Path) -> None:
        data = path.read_bytes()
        digest = hashlib.sha256(data).hexdigest()
        Image.open(io.BytesIO(data)).load()
        (folder / digest[:2] / digest).write_bytes(data)

    started = time.perf_counter()
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        list(pool.map(copy, paths))
    return time.perf_counter() - started


def _time(commands: list[list[str]], cwd: Path, env: "os._Environ[str] | dict[str, str]") -> float:
    started = time.perf_counter()
    for command in commands:
        subprocess.run(command, cwd=cwd, env=dict(env), check=True, capture_output=True)
    return time.perf_counter() - started
