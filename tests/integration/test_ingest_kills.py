"""Killed in the middle, twice, and run by two processes at once: nothing partial is visible, and it ends the same."""

import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
from PIL import Image

from shapes import make_environment
from visionloop.data.manifest import list_versions
from visionloop.ingest.pull import PullReport, pull
from visionloop.params import FolderSource, make_params
from visionloop.settings import load_settings
from visionloop.store import LocalStore
from visionloop.workspace import connect

NUM_PHOTOS = 900
SIDE_PX = 400


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Photos that take a second or two to check."""
    folder = tmp_path_factory.mktemp("photos")
    for i in range(NUM_PHOTOS):
        coarse = np.random.default_rng(i).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        pixels = np.asarray(Image.fromarray(coarse).resize((SIDE_PX, SIDE_PX), Image.Resampling.BILINEAR))
        path = folder / ("cat", "dog")[i % 2] / f"{i:04d}.jpg"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(simplejpeg.encode_jpeg(pixels, quality=90))
    return folder


def make_workspace(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "params.yaml").write_text("name: pets\n")
    return folder


def start(home: Path, photos: Path, **extra: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "visionloop", "ingest", str(photos), "--name", "photos"]
    return subprocess.Popen(command, cwd=home, env=make_environment(**extra), stdout=subprocess.DEVNULL)


def count_objects(store: LocalStore) -> int:
    return sum(1 for _ in store.list("images/"))


def kill_when(process: subprocess.Popen[bytes], store: LocalStore, number: int) -> None:
    deadline = time.monotonic() + 60
    while count_objects(store) < number:
        assert process.poll() is None, "it ended before it was killed"
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.kill()
    process.wait()


def pull_here(home: Path, photos: Path) -> PullReport:
    settings = load_settings({}, home)
    source = FolderSource(kind="folder", path=str(photos), name="photos")
    store = LocalStore.from_url(settings.store_url)
    return pull(
        connect(settings, make_params({"name": "pets"}), store=store), sources=[source], now="2026-01-01T00:00:00+00:00"
    )


def test_a_pull_that_is_killed_twice_ends_as_one_that_is_not(photos: Path, tmp_path: Path) -> None:
    whole = pull_here(make_workspace(tmp_path / "whole"), photos)
    home = make_workspace(tmp_path / "ws")
    store = LocalStore.from_url(load_settings({}, home).store_url)
    for number in (60, NUM_PHOTOS * 2 // 3):
        kill_when(start(home, photos), store, number)
        assert list_versions(store, "pets") == []
        assert not (home / "data" / "dataset.json").exists()
    stored = {key: (store.root / key).stat().st_mtime_ns for key in store.list("images/")}
    report = pull_here(home, photos)
    assert report.version == whole.version
    assert report.pin == whole.pin
    assert report.num_read <= NUM_PHOTOS - 250, "what was done before a kill is not read again"
    assert all((store.root / key).stat().st_mtime_ns == at for key, at in stored.items()), "nor stored again"
    assert count_objects(store) == NUM_PHOTOS


def test_two_processes_at_once_both_succeed(photos: Path, tmp_path: Path) -> None:
    store = LocalStore(tmp_path / "store")
    parts = []
    for label in ("cat", "dog"):
        part = tmp_path / f"only-{label}"
        for name in ("cat", "dog"):
            (part / name).mkdir(parents=True)
        for path in sorted((photos / label).iterdir())[:50]:
            (part / ("cat", "dog")[int(path.stem) % 4 // 2] / path.name).write_bytes(path.read_bytes())
        parts.append(part)
    started = [
        start(make_workspace(tmp_path / f"ws{i}"), part, VISIONLOOP_STORE=str(store.root))
        for i, part in enumerate(parts)
    ]
    assert [process.wait(timeout=60) for process in started] == [0, 0]
    assert [(v.version, v.num_images) for v in list_versions(store, "pets")] == [(1, 50), (2, 100)]
