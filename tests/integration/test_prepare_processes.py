"""Prepare in processes and as a command: the same bytes, also after a kill, and no process left behind."""

import hashlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from s3_server import make_bucket, point_to
from shapes import ROOT, make_environment, make_workspace, visionloop
from visionloop.data import prepare as stage
from visionloop.data.prepare import prepare
from visionloop.errors import DatasetError
from visionloop.parallel import Engine, map_chunks
from visionloop.store import S3Store
from visionloop.workspace import connect
from worlds import make_world


def find_workers() -> list[int]:
    """The processes below this one that could still work; joblib keeps one that only cleans up."""
    found = psutil.Process().children(recursive=True)
    return [p.pid for p in found if p.is_running() and "popen_loky" in " ".join(p.cmdline())]


def double(number: int) -> int:
    if number == 13:
        raise DatasetError("chunk 13", "is unlucky")
    return 2 * number


def digest(folder: Path) -> str:
    total = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        total.update(path.name.encode() + path.read_bytes())
    return total.hexdigest()


def test_processes_give_the_same_results_and_end() -> None:
    assert sorted(map_chunks(double, range(10), Engine("processes"), max_held=4)) == list(range(0, 20, 2))
    assert find_workers() == []


def test_an_error_in_a_process_is_the_error_that_was_raised_there() -> None:
    with pytest.raises(DatasetError) as caught:
        list(map_chunks(double, range(10, 20), Engine("processes"), max_held=100))
    assert str(caught.value) == "chunk 13: is unlucky."
    assert find_workers() == []


SLOW = """
import sys, time
from visionloop.parallel import Engine, map_chunks
from visionloop.store import S3Store

def main():
    for _ in map_chunks(time.sleep, [0.01] * 4 + [20.0] * 50, Engine("processes"), max_held=100):
        print("one", flush=True)

main()
"""


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGKILL])
def test_ctrl_c_and_a_kill_leave_no_process(kind: signal.Signals, tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text(SLOW)
    with subprocess.Popen(
        [sys.executable, "slow.py"], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout
        assert process.stdout.readline() == "one\n"
        below = psutil.Process(process.pid).children(recursive=True)
        os.kill(process.pid, kind)
        process.wait(timeout=60)
    deadline = time.monotonic() + 60
    while (alive := [p for p in below if p.is_running() and p.status() != "zombie"]) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert alive == []


def test_prepare_in_processes_gives_the_bytes_of_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world = make_world(tmp_path)
    prepare(world)
    first = digest(world.settings.prepared_dir)
    monkeypatch.setattr(stage, "MIN_PER_PROCESS", 1)
    monkeypatch.setattr(stage, "count_cores", lambda: 2)
    prepare(world)
    assert digest(world.settings.prepared_dir) == first
    assert find_workers() == []


def test_processes_read_an_s3_store_by_its_address(
    endpoint_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = make_world(tmp_path)
    prepare(world)
    first = digest(world.settings.prepared_dir)
    monkeypatch.setattr(stage, "MIN_PER_PROCESS", 1)
    monkeypatch.setattr(stage, "count_cores", lambda: 2)
    point_to(monkeypatch, endpoint_url)
    make_bucket(endpoint_url, "photos")
    far = S3Store("s3://photos/store")
    for key in world.store.list(""):
        far.put(key, world.store.get(key))
    prepare(connect(world.settings, world.params, store=far))
    assert digest(world.settings.prepared_dir) == first


def test_a_killed_command_goes_on_where_it_was(tmp_path: Path) -> None:
    home = make_workspace(tmp_path / "w", number=200)
    assert visionloop(home, "prepare").returncode == 0
    whole = digest(home / "data" / "prepared")
    command = [sys.executable, "-c", SLOWED, "prepare"]
    env = make_environment(PYTHONPATH=str(ROOT / "src"))
    with subprocess.Popen(command, cwd=home, env=env, stdout=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 120
        while not list(home.glob(".visionloop/work/prepare/*/chunks.staged")) and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(0.3)
        process.kill()
    done = visionloop(home, "prepare")
    assert done.returncode == 0, done.stderr
    assert digest(home / "data" / "prepared") == whole


# A slow decoder, so that the kill meets the work.
SLOWED = """
import time
from visionloop.data import chunks
decode = chunks._decode
chunks._decode = lambda *args: time.sleep(0.005) or decode(*args)
from visionloop.cli import main
main()
"""
