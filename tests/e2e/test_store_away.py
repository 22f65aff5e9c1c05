"""The store away for a while in the middle of a stage: the flow runs the stage again, and it succeeds."""

import sys
import threading
from pathlib import Path

import pytest

from fault_proxy import FaultProxy, serve_faults
from s3_server import make_bucket, point_to, serve_s3
from shapes import ROOT, make_workspace, run

AWAY_S = 6
FLOW = """
import sys
sys.path.insert(0, "flows")
import steps
from visionloop import retrain
from prefect import flow

@flow
def prepare(home: str) -> str:
    return steps.run_step("prepare", lambda: retrain.run_stage(home, "prepare", steps.say))

print("the stage", prepare(sys.argv[1]))
"""


def come_back_after_the_first_refusal(proxy: FaultProxy) -> threading.Thread:
    """Answer `images/` with 503 until AWAY_S seconds after the first one was asked for."""
    proxy.plan()
    proxy.refusals = {"/images/": 503}

    def watch() -> None:
        while not any("/images/" in path for _, path, _ in proxy.seen):
            over.wait(0.05)
        over.wait(AWAY_S)
        proxy.refusals = {}

    over = threading.Event()
    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    return thread


def test_a_stage_is_run_again_when_the_store_was_away(
    tmp_path: Path, prefect_api: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serve_s3() as endpoint_url, serve_faults(endpoint_url) as proxy:
        point_to(monkeypatch, proxy.url)
        store = f"s3://{make_bucket(endpoint_url, 'away')}"
        home = make_workspace(tmp_path / "ws", number=12, VISIONLOOP_STORE=store)
        come_back_after_the_first_refusal(proxy)
        command = (sys.executable, "-c", FLOW, str(home))
        done = run(ROOT, *command, VISIONLOOP_STORE=store, PREFECT_API_URL=prefect_api)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("the stage ran\n")
    (told,) = [line for line in done.stderr.splitlines() if line.endswith("; trying again in 4 s (try 2 of 3)")]
    assert "  store s3://away: is busy: it answers SlowDown" in told, "what it waits for"
    assert "failed to reproduce" not in done.stderr, "dvc's own words are only in the log"
    assert (home / "data" / "prepared" / "index.parquet").is_file()
