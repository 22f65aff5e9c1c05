"""What several files need: a real Prefect server, and a workspace with a champion."""

import contextlib
import fcntl
import json
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from shapes import make_environment, make_workspace, visionloop, write_shapes

START_S = 90


def stop(server: psutil.Process) -> None:
    """Stop a server, of this process or of another."""
    server.terminate()
    try:
        server.wait(timeout=60)
    except psutil.TimeoutExpired:
        server.kill()


class PrefectServer:
    """A Prefect server with a scheduler, on loopback; it can be restarted, with its database."""

    def __init__(self, home: Path) -> None:
        self.home = home
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}/api"

    def start(self) -> None:
        settings = {"PREFECT_HOME": str(self.home), "PREFECT_UI_ENABLED": "false", "DO_NOT_TRACK": "true"}
        env = make_environment(**settings, PREFECT_SERVER_ANALYTICS_ENABLED="false")
        command = [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(self.port)]
        with (self.home / "server.log").open("a") as log:
            self.process = subprocess.Popen(command, env=env, stdout=log, stderr=subprocess.STDOUT)
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline:
            assert self.process.poll() is None, "the Prefect server ended"
            try:
                if httpx.get(f"{self.url}/health", trust_env=False).status_code == 200:
                    return
            except httpx.HTTPError:
                time.sleep(0.3)
        raise AssertionError(f"no Prefect server at {self.url} after {START_S} s")

    def stop(self) -> None:
        stop(psutil.Process(self.process.pid))


@pytest.fixture
def own_prefect_server(tmp_path: Path) -> Iterator[PrefectServer]:
    """A server for one test, which may restart it."""
    server = PrefectServer(tmp_path)
    server.start()
    try:
        yield server
    finally:
        server.stop()


@contextlib.contextmanager
def hold(path: Path) -> Iterator[None]:
    """Wait until no other worker is at it."""
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@pytest.fixture(scope="session")
def prefect_api(shared_folder: Path) -> Iterator[str]:
    """The address of a server: it costs 15 CPU seconds, so all workers use one. Ask it about your own workspace only.

    The first who needs it starts it; who uses it holds a lock that many can hold; who can have it alone is the last.
    """
    home = shared_folder / "prefect"
    home.mkdir(exist_ok=True)
    with (home / "users").open("w") as users:
        with hold(home / "lock"):
            if not (home / "running.json").is_file():
                server = PrefectServer(home)
                server.start()
                (home / "running.json").write_text(json.dumps([server.url, server.process.pid]))
            url, pid = json.loads((home / "running.json").read_text())
            fcntl.flock(users, fcntl.LOCK_SH)
        try:
            yield url
        finally:
            with hold(home / "lock"), contextlib.suppress(BlockingIOError, psutil.NoSuchProcess):
                fcntl.flock(users, fcntl.LOCK_EX | fcntl.LOCK_NB)
                (home / "running.json").unlink()
                stop(psutil.Process(pid))


@pytest.fixture(scope="session")
def retrained(make_once: Callable[[str, Callable[[Path], object]], Path]) -> tuple[Path, str]:
    """A workspace with a champion, and what was said: one of its new files is no image. Tests work on copies."""
    folder = make_once("retrained", lambda new: (new / "said.txt").write_text(make_retrained(new / "ws")))
    return folder / "ws", (folder / "said.txt").read_text()


def make_retrained(home: Path) -> str:
    """Make the workspace, and return what `start` said."""
    make_workspace(home, number=40)
    photos = write_shapes(home.parent / "new", 20, seed=5)
    (photos / "disc" / "notes.jpg").write_text("not a photo")
    params = home / "params.yaml"
    before = params.read_text()
    source = f"ingest: {{sources: [{{kind: folder, path: {photos}}}]}}"
    params.write_text(before.replace("name: shapes\n", f"name: shapes\n{source}\n"))
    done = visionloop(home, "start")
    assert done.returncode == 0, done.stderr
    params.write_text(before)
    return done.stdout


@pytest.fixture(scope="module")
def copied(retrained: tuple[Path, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy for the tests of one file, with the photos beside it."""
    folder = tmp_path_factory.mktemp("copied") / "of"
    shutil.copytree(retrained[0].parent, folder, symlinks=True)
    return folder / "ws"
