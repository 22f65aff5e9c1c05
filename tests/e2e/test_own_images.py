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
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from shapes import ROOT, ask_prefect, make_environment, run, start_deployment, visionloop_here, write_shapes
from visionloop.store import LocalStore
from visionloop.store.lease import make_claim, take_lease

if TYPE_CHECKING:
    from conftest import PrefectServer

LIMIT_S = 400
NAME = "my-shapes"  # of the workspace, and so of dataset, model and deployment


def deploy(home: Path, **extra: str) -> subprocess.CompletedProcess[str]:
    return run(ROOT, sys.executable, "flows/deploy.py", "--workspace", str(home), **extra)


def get_deployment(api: str) -> dict[str, Any]:
    return dict(ask_prefect(api, f"deployments/name/retrain/{NAME}") or {})


def start_run(api: str) -> str:
    """Start a run of the deployment by hand, as a person does in Prefect's page; return its id."""
    return start_deployment(api, get_deployment(api)["id"])


def make_due(api: str) -> str:
    """Let the next run of the schedule be due now, and not only at night; return its id."""
    deadline = time.monotonic() + LIMIT_S
    query = {"deployments": {"name": {"any_": [NAME]}}, "sort": "EXPECTED_START_TIME_ASC"}
    query["flow_runs"] = {"state": {"type": {"any_": ["SCHEDULED"]}}}
    while not (runs := ask_prefect(api, "flow_runs/filter", query)):
        assert time.monotonic() < deadline, "Prefect schedules nothing"
        time.sleep(0.5)
    now = datetime.now(UTC).isoformat()
    state = {"type": "SCHEDULED", "name": "Scheduled", "state_details": {"scheduled_time": now}}
    ask_prefect(api, f"flow_runs/{runs[0]['id']}/set_state", {"state": state, "force": True})
    return str(runs[0]["id"])


def wait_for_run(api: str, process: subprocess.Popen[str], run_id: str) -> dict[str, Any]:
    """Return a run when it has ended."""
    deadline = time.monotonic() + LIMIT_S
    while time.monotonic() < deadline:
        assert process.poll() is None, "deploy.py ended"
        (run_,) = ask_prefect(api, "flow_runs/filter", {"flow_runs": {"id": {"any_": [run_id]}}})
        if run_["state_type"] in {"COMPLETED", "FAILED", "CRASHED", "CANCELLED"}:
            return dict(run_)
        time.sleep(0.5)
    raise AssertionError(f"the run did not end within {LIMIT_S} s: {run_['state_name']}")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace made by the commands of "Your own workspace", with a smaller network that learns for four epochs."""
    folder = tmp_path_factory.mktemp("own")
    blocks = re.findall(r"^```(?:\w*)\n(.*?)^```$", (ROOT / "README.md").read_text(), flags=re.M | re.S)
    (block,) = [b for b in blocks if b.startswith("visionloop new DIR")]
    write_shapes(folder / "photos")
    *first, last = block.replace("DIR", NAME).replace("PATH", str(folder / "photos")).strip().splitlines()
    done = run(folder, "bash", "-ec", "\n".join(first))
    assert done.returncode == 0, done.stderr
    path = folder / NAME / "params.yaml"
    text = (
        path.read_text().replace("efficientnet_lite0 #", "small_cnn #").replace("weights: default #", "weights: none #")
    )
    text = text.replace("way: frozen #", "way: scratch #").replace("image_size: 224", "image_size: 32")
    text = text.replace("  backbone:", "  precision: fp32\n  max_epochs: 4\n  backbone:")
    few = "min_images: {all: 5, per_class: 0}\n" + "".join(
        f"  {rule}: {{mode: off}}\n" for rule in ("baseline", "class_drop", "slice_drop")
    )
    path.write_text(text.replace("accuracy: 0.5", "accuracy: 0.3").replace("rule: better", f"{few}  rule: better"))
    done = run(folder / NAME, *last.split())
    assert done.returncode == 0, done.stderr
    assert f"{NAME} has a new champion" in done.stdout
    return folder / NAME


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
    assert "version 2: 40 new images, 160 in all" in visionloop_here(home, "ingest", str(more)).stdout
    path = home / "params.yaml"
    path.write_text(path.read_text().replace("rule: better", "rule: no_worse\n  margin: 0.9"))
    with serve_schedule(home, prefect_api) as process:
        # Somebody retrains the workspace already: a run moves nothing.
        with take_lease(LocalStore(home / ".visionloop" / "store"), NAME, make_claim("ann", "03:00")) as lease:
            before = read_files(home)
            busy = wait_for_run(prefect_api, process, start_run(prefect_api))
            assert read_files(home) == before
        ended = wait_for_run(prefect_api, process, make_due(prefect_api))
    said = (home.parent / "deploy.log").read_text()
    assert (busy["state_name"], busy["state_type"]) == ("Skipped", "CANCELLED")
    message = f"retrain of {NAME}: {lease.claim} is at it; expected one at a time."
    assert read_state(prefect_api, busy)["message"].startswith(message)
    assert (ended["state_name"], ended["auto_scheduled"]) == ("Promoted", True), said
    assert ended["parameters"] == {"workspace": str(home)}
    decision = json.loads((home / "decisions" / "latest.json").read_text())
    assert [r["passed"] for r in decision["rules"] if r["rule"] == "no_worse"] == [True]
    first, second = list_ledger(home)
    assert (second["previous"], second["dataset"]["version"]) == (first["bundle"], 2)
    assert f"serving retrain/{NAME}" in said
    assert get_deployment(prefect_api)["global_concurrency_limit"] is None
    assert_artifact(prefect_api)
    query = {"artifacts": {"key": {"like_": f"retrain-{NAME}-%-skipped"}}}
    kept = [artifact["data"] for artifact in ask_prefect(prefect_api, "artifacts/filter", query)]
    told = f"# {NAME}: retrain skipped\n\nAnother retrain is under way: {message}"
    assert any(text.startswith(told) for text in kept), kept


def test_rollback_makes_the_first_champion_the_champion_again(home: Path) -> None:
    done = visionloop_here(home, "rollback", "--why", "a test")
    assert done.returncode == 0, done.stderr
    assert f"is bundle {list_ledger(home)[0]['bundle'][:12]} again" in done.stdout
    assert "a test" in visionloop_here(home, "history").stdout.splitlines()[0]


@pytest.mark.long
def test_a_restarted_prefect_server_neither_ends_a_run_nor_blocks_the_next(
    home: Path, own_prefect_server: "PrefectServer"
) -> None:
    api, path = own_prefect_server.url, home / "params.yaml"
    path.write_text(path.read_text().replace("max_epochs: 4", "max_epochs: 30"))
    before = list_ledger(home)[-1]["number"]
    with serve_schedule(home, api) as process:
        run_id = start_run(api)
        wait_until_it_trains(home)
        own_prefect_server.stop()
        own_prefect_server.start()
        assert wait_for_run(api, process, run_id)["state_name"] == "Promoted"
        assert wait_for_run(api, process, start_run(api))["state_name"] == "Unchanged"
    assert list_ledger(home)[-1]["number"] == before + 1


@contextlib.contextmanager
def serve_schedule(home: Path, prefect_api: str) -> Iterator[subprocess.Popen[str]]:
    """Serve the schedule until Ctrl-C; what it says goes to deploy.log."""
    command = [sys.executable, "flows/deploy.py", "--workspace", str(home)]
    env = make_environment(PREFECT_API_URL=prefect_api)
    log_path = home.parent / "deploy.log"
    with log_path.open("w") as log:
        process = subprocess.Popen(
            command, cwd=ROOT, env=env, stdout=log, stderr=subprocess.STDOUT, text=True, start_new_session=True
        )
        try:
            while get_deployment(prefect_api).get("status") != "READY":
                assert process.poll() is None, log_path.read_text()
                time.sleep(0.2)
            yield process
            os.killpg(process.pid, signal.SIGINT)
            process.wait(timeout=120)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def wait_until_it_trains(home: Path) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not list((home / ".visionloop" / "work" / "train").glob("*/checkpoints/*.ckpt")):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def read_files(home: Path) -> dict[str, bytes]:
    """What a retrain could move: the store, the pin, dvc.lock, the candidate, reports and decisions."""
    places = ("data", "models", "reports", "decisions", ".visionloop/store", ".visionloop/work", "dvc.lock")
    paths = [path for place in places for path in (home / place, *(home / place).rglob("*")) if path.is_file()]
    return {str(path): path.read_bytes() for path in paths if "leases" not in path.parts}


def read_state(api: str, run_: dict[str, Any]) -> dict[str, Any]:
    return dict(ask_prefect(api, f"flow_run_states/{run_['state_id']}"))


def assert_artifact(api: str) -> None:
    query = {"artifacts": {"key": {"like_": f"retrain-{NAME}-%"}}}
    texts = [a["data"] for a in ask_prefect(api, "artifacts/filter", query)]
    assert any(text.startswith(f"# {NAME} has a new champion") for text in texts)


def test_what_cannot_be_scheduled_is_one_line(tmp_path: Path) -> None:
    home, path = tmp_path, tmp_path / "params.yaml"
    path.write_text("name: shapes\n")
    done = deploy(home)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert 'schedule.retrain: is not set; expected a cron expression like "0 3 * * *".' in done.stderr
    path.write_text(path.read_text() + 'schedule: {retrain: "0 3 * * *"}\n')
    done = deploy(home)
    assert done.returncode == 2
    assert "PREFECT_API_URL: is not set; expected the address of a Prefect server. `visionloop up` does" in done.stderr
    done = deploy(home, PREFECT_API_URL="http://127.0.0.1:9/api")
    assert done.returncode == 2
    assert "http://127.0.0.1:9/api does not answer" in done.stderr
