"""What several files need: a real Prefect server, and a workspace that a flow has retrained."""

import fcntl
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from shapes import make_environment, make_workspace, retrain, write_shapes

START_S = 90


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
        self.process.terminate()
        try:
            self.process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


@pytest.fixture(scope="session")
def prefect_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PrefectServer]:
    server = PrefectServer(tmp_path_factory.mktemp("prefect"))
    server.start()
    try:
        yield server
    finally:
        server.stop()


@pytest.fixture(scope="session")
def prefect_api(prefect_server: PrefectServer) -> str:
    """The address of the server."""
    return prefect_server.url


@pytest.fixture(scope="session")
def retrained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A workspace with a champion, and what the flow said: one of its new files is no image. Tests work on copies.

    It is made once: where tests run side by side, the second process waits for the first.
    """
    root = tmp_path_factory.getbasetemp()
    root = root.parent if "PYTEST_XDIST_WORKER" in os.environ else root
    home, said = root / "retrained" / "ws", root / "retrained" / "said.txt"
    with (root / "retrained.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not said.is_file():
            said.write_text(make_retrained(home, request.getfixturevalue("prefect_api")))
    return home, said.read_text()


def make_retrained(home: Path, prefect_api: str) -> str:
    """Make the workspace, and return what the flow said."""
    make_workspace(home, number=40)
    photos = write_shapes(home.parent / "new", 20, seed=5)
    (photos / "disc" / "notes.jpg").write_text("not a photo")
    params = home / "params.yaml"
    before = params.read_text()
    source = f"ingest: {{sources: [{{kind: folder, path: {photos}}}]}}"
    params.write_text(before.replace("name: shapes\n", f"name: shapes\n{source}\n"))
    done = retrain(home, PREFECT_API_URL=prefect_api)
    assert done.returncode == 0, done.stderr
    params.write_text(before)
    return done.stdout


@pytest.fixture(scope="module")
def copied(retrained: tuple[Path, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy for the tests of one file, with the photos beside it."""
    folder = tmp_path_factory.mktemp("copied") / "of"
    shutil.copytree(retrained[0].parent, folder, symlinks=True)
    return folder / "ws"
