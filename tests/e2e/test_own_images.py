"""The README's "Your own images", then more of them on a schedule against a real Prefect server, then one step back.

The tests are one story: each goes on where the one before ended.
"""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from shapes import ROOT, make_environment, make_workspace, run, visionloop, write_shapes

LIMIT_S = 200


def deploy(home: Path, **extra: str) -> subprocess.CompletedProcess[str]:
    return run(ROOT, sys.executable, "flows/deploy.py", "--workspace", str(home), **extra)


def wait_for_finished_run(api: str, process: subprocess.Popen[str]) -> dict[str, Any]:
    """Return the first run of the deployment that has ended."""
    deadline = time.monotonic() + LIMIT_S
    query = {"deployments": {"name": {"any_": ["horses-or-humans"]}}, "sort": "EXPECTED_START_TIME_ASC"}
    while time.monotonic() < deadline:
        assert process.poll() is None, "deploy.py ended"
        runs = httpx.post(f"{api}/flow_runs/filter", json=query, trust_env=False).json()
        ended = [r for r in runs if r["state_type"] in {"COMPLETED", "FAILED", "CRASHED"}]
        if ended:
            return dict(ended[0])
        time.sleep(1)
    raise AssertionError(f"no run ended within {LIMIT_S} s: {[r['state_name'] for r in runs]}")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, prefect_api: str) -> Path:
    """A workspace made by the commands of "Your own images", with a smaller network and fewer epochs."""
    folder = tmp_path_factory.mktemp("own")
    blocks = re.findall(r"^```(?:\w*)\n(.*?)^```$", (ROOT / "README.md").read_text(), flags=re.M | re.S)
    (block,) = [b for b in blocks if b.startswith("visionloop new DIR")]
    write_shapes(folder / "photos")
    script = (
        block.replace("CLONE", str(ROOT)).replace("DIR", str(folder / "ws")).replace("PATH", str(folder / "photos"))
    )
    *first, last = script.strip().splitlines()
    done = run(folder, "bash", "-ec", "\n".join(first))
    assert done.returncode == 0, done.stderr
    path = folder / "ws" / "params.yaml"
    text = path.read_text().replace("resnet18 #", "small_cnn #").replace("image_size: 224", "image_size: 32")
    text = text.replace("  backbone:", "  precision: fp32\n  backbone:")
    path.write_text(text.replace("max_epochs: 20", "max_epochs: 4").replace("accuracy: 0.6", "accuracy: 0.3"))
    done = run(folder, "bash", "-ec", last, PREFECT_API_URL=prefect_api)
    assert done.returncode == 0, done.stderr
    assert "horses-or-humans has a new champion" in done.stdout
    return folder / "ws"


def list_ledger(home: Path) -> list[dict[str, Any]]:
    return [json.loads(p.read_text()) for p in sorted((home / ".visionloop" / "store" / "ledger").rglob("*.json"))]


def test_own_images_become_a_champion(home: Path) -> None:
    card = json.loads((home / "models" / "candidate" / "card.json").read_text())
    assert (card["task"], card["classes"]) == ("binary", ["disc", "ring"])
    (entry,) = list_ledger(home)
    assert entry["dataset"]["version"] == 1


def test_a_run_that_is_due_is_picked_up_and_promotes(home: Path, prefect_api: str) -> None:
    """New images are version 2; a second champion by a lower bar."""
    more = write_shapes(home.parent / "more", 20, seed=1)
    assert "version 2: 40 new images, 160 in all" in visionloop(home, "ingest", str(more)).stdout
    path = home / "params.yaml"
    text = path.read_text().replace("rule: better", "rule: no_worse\n  margin: 0.9")
    path.write_text(text.replace('"0 3 * * *"', '"* * * * *"'))
    ended, said = run_schedule(home, prefect_api)
    assert (ended["state_name"], ended["auto_scheduled"]) == ("Promoted", True), said
    assert ended["parameters"] == {"workspace": str(home)}
    decision = json.loads((home / "decisions" / "latest.json").read_text())
    assert [r["passed"] for r in decision["rules"] if r["rule"] == "no_worse"] == [True]
    first, second = list_ledger(home)
    assert (second["previous"], second["dataset"]["version"]) == (first["bundle"], 2)
    assert "serving retrain/horses-or-humans" in said
    assert_limited(prefect_api)
    assert_artifact(prefect_api)


def test_rollback_makes_the_first_champion_the_champion_again(home: Path) -> None:
    done = visionloop(home, "rollback", "--why", "a test")
    assert done.returncode == 0, done.stderr
    assert f"is bundle {list_ledger(home)[0]['bundle'][:12]} again" in done.stdout
    assert "a test" in visionloop(home, "history").stdout.splitlines()[0]


def run_schedule(home: Path, prefect_api: str) -> tuple[dict[str, Any], str]:
    """Serve the schedule until its first run has ended; return that run, and what was said."""
    command = [sys.executable, "flows/deploy.py", "--workspace", str(home)]
    env = make_environment(PREFECT_API_URL=prefect_api)
    with (home.parent / "deploy.log").open("w") as log:
        process = subprocess.Popen(
            command, cwd=ROOT, env=env, stdout=log, stderr=subprocess.STDOUT, text=True, start_new_session=True
        )
        try:
            ended = wait_for_finished_run(prefect_api, process)
            os.killpg(process.pid, signal.SIGINT)  # Ctrl-C; the run of the next minute may be under way by now
            process.wait(timeout=120)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return ended, (home.parent / "deploy.log").read_text()


def assert_limited(api: str) -> None:
    """One run at a time: what comes due meanwhile is cancelled."""
    found = httpx.get(f"{api}/deployments/name/retrain/horses-or-humans", trust_env=False).json()
    assert found["global_concurrency_limit"]["limit"] == 1
    assert found["concurrency_options"]["collision_strategy"] == "CANCEL_NEW"


def assert_artifact(api: str) -> None:
    query = {"artifacts": {"key": {"any_": ["retrain"]}}}
    texts = [a["data"] for a in httpx.post(f"{api}/artifacts/filter", json=query, trust_env=False).json()]
    assert any(text.startswith("# horses-or-humans: horses-or-humans has a new champion") for text in texts)


def test_what_cannot_be_scheduled_is_one_line(tmp_path: Path) -> None:
    home = make_workspace(tmp_path / "ws", number=5)
    done = deploy(home)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert 'schedule.retrain: is not set; expected a cron expression like "0 3 * * *".' in done.stderr
    path = home / "params.yaml"
    path.write_text(path.read_text() + 'schedule: {retrain: "0 3 * * *"}\n')
    done = deploy(home)
    assert done.returncode == 2
    assert "PREFECT_API_URL: is not set; expected the address of a Prefect server." in done.stderr
    done = deploy(home, PREFECT_API_URL="http://127.0.0.1:9/api")
    assert done.returncode == 2
    assert "http://127.0.0.1:9/api does not answer" in done.stderr
