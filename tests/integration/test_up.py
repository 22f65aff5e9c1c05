"""`visionloop up` with the real MLflow, Prefect and server: status, a killed part, and a killed supervisor."""

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from shapes import run, visionloop, visionloop_here
from visionloop.lifetime import MARK_VARIABLE
from visionloop.up.parts import ask
from watched import make_watched

LIMIT_S = 100


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Path]:
    """A workspace with a champion and nothing planned. Whatever a test leaves running is stopped."""
    home = tmp_path / "ws"
    home.mkdir()
    make_watched(home)
    (home / "params.yaml").write_text("name: fake\n")
    yield home
    visionloop(home, "down", VISIONLOOP_STORE="store")


def read_status(home: Path) -> tuple[int, dict[str, Any]]:
    done = visionloop_here(home, "status", "--json", VISIONLOOP_STORE="store")
    assert done.stderr == ""
    return done.returncode, json.loads(done.stdout)


def find_part(found: dict[str, Any], name: str) -> dict[str, Any]:
    return dict(next(part for part in found["up"]["parts"] if part["name"] == name))


def find_marked(mark: str) -> list[list[str]]:
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK_VARIABLE) == mark:
                found.append(process.cmdline())
        except psutil.Error:
            pass
    return found


def wait_for(find: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + LIMIT_S
    while not (found := find()):
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.2)
    return found


def test_the_stack_is_up_heals_and_leaves_nothing(home: Path) -> None:
    done = visionloop(home, "up", "--detach", VISIONLOOP_STORE="store")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "runner     waiting: nothing is planned: params.yaml has no `schedule`" in done.stdout
    code, found = read_status(home)
    assert (code, found["is_well"], found["up"]["phase"]) == (0, True, "up")
    assert found["loop"]["champion"]["by"] == "ann"
    urls = {name: find_part(found, name)["url"] for name in ("home", "mlflow", "prefect", "server")}
    assert ask(f"{urls['server']}/model")["entry"] == 1
    assert ask(f"{urls['prefect']}/api/admin/settings")["server"]["analytics_enabled"] is False
    assert (home / ".visionloop" / "up" / "prefect" / "prefect.db").is_file(), "a database of its own"
    again = visionloop(home, "up", VISIONLOOP_STORE="store")
    assert (again.returncode, again.stdout) == (2, "")
    assert again.stderr.startswith(f"error: visionloop up: is running for this workspace: {urls['home']}; expected")

    os.kill(find_part(found, "server")["pid"], signal.SIGKILL)
    healed = wait_for(lambda: (one := read_status(home))[0] == 0 and find_part(one[1], "server")["restarts"] and one[1])
    assert find_part(healed, "server")["url"] == urls["server"]
    assert ask(f"{urls['server']}/model")["entry"] == 1

    os.kill(found["up"]["pid"], signal.SIGKILL)
    wait_for(lambda: not find_marked(found["up"]["mark"]))
    code, after = read_status(home)
    assert (code, after["is_up"], after["loop"]["champion"]["entry"]) == (3, False, 1)
    down = visionloop(home, "down", VISIONLOOP_STORE="store").stdout
    assert down == "nothing is up in this workspace\nnext: `visionloop up`\n"
    kept = json.loads((home / ".visionloop" / "up" / "ports.json").read_text())
    assert {name: f"http://127.0.0.1:{port}" for name, port in kept.items()} == urls, "for the next time"


def test_what_cannot_be_started_is_told_before_anything_is(tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_text("name: pets\ntrain: {max_epoch: 3}\n")
    done = visionloop_here(tmp_path, "up")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert done.stderr.startswith("error: params.yaml train.max_epoch")
    assert not (tmp_path / ".visionloop" / "up").exists()


def test_the_flows_are_commands(tmp_path: Path) -> None:
    done = visionloop(tmp_path, "retrain", "--workspace", str(tmp_path / "gone"))
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert done.stderr.startswith(f"error: workspace {tmp_path / 'gone'}"), "which the script alone tells"
    (tmp_path / "params.yaml").write_text("name: pets\n")
    done = run(tmp_path, sys.executable, "-m", "visionloop", "schedule", "--workspace", str(tmp_path))
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert done.stderr.startswith("error: params.yaml schedule"), done.stderr
