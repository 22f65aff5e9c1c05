"""A queued experiment of dvc trains in a copy of the workspace: with the store and the MLflow of the workspace."""

import re
import subprocess
import time
from pathlib import Path

import pytest

from shapes import make_workspace, run, visionloop

WAIT_S = 400


def call(home: Path, *argv: str) -> str:
    done: subprocess.CompletedProcess[str] = run(home, *argv, timeout=WAIT_S)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.long
def test_a_queued_experiment_uses_the_store_and_the_mlflow_of_its_workspace(tmp_path: Path) -> None:
    home = make_workspace(tmp_path / "ws", number=30)
    call(home, "git", "add", "-A")
    call(home, "git", "-c", "user.name=a", "-c", "user.email=a@example.org", "commit", "-qm", "start")
    call(home, "dvc", "exp", "run", "--queue", "-S", "train.patience=40")
    call(home, "dvc", "queue", "start")
    deadline = time.monotonic() + WAIT_S
    while not (ended := re.search(r"^(\w+) .*(Success|Failed)", call(home, "dvc", "queue", "status"), re.MULTILINE)):
        assert time.monotonic() < deadline, "the queue did not end"
        time.sleep(2)
    log = call(home, "dvc", "queue", "logs", ended[1])
    assert ended[2] == "Success", log
    run_id = re.findall(r"MLflow run ([0-9a-f]{32})", log)[-1]
    listed = visionloop(home, "runs").stdout
    assert run_id[:8] in listed
    assert "finished" in listed
