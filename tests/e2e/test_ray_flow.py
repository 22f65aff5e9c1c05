"""A run that Prefect's worker starts prepares and trains on a Ray cluster that it is no node of."""

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from ray_cluster import RayCluster, run_cluster
from shapes import ROOT, ask_prefect, make_environment, make_workspace, run, set_compute, start_deployment

LIMIT_S = 1200
SCHEDULE = 'schedule: {retrain: "0 3 1 1 *"}\n'


@pytest.fixture
def cluster() -> Iterator[RayCluster]:
    with run_cluster() as running:
        yield running


@pytest.fixture
def worker(tmp_path: Path, prefect_api: str) -> Iterator[Path]:
    """A worker of the pool `rays`; returns its log. It knows nothing of Ray."""
    command = ["prefect", "worker", "start", "--pool", "rays", "--type", "process", "--name", "one"]
    env = make_environment(PREFECT_API_URL=prefect_api, PREFECT_HOME=str(tmp_path / "prefect"))
    with (tmp_path / "worker.log").open("w") as log:
        process = subprocess.Popen(command, cwd=tmp_path, env=env, stdout=log, stderr=log, start_new_session=True)
    yield tmp_path / "worker.log"
    for one in [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]:
        one.kill()
    process.wait()


def list_actors(address: str) -> set[tuple[str, str]]:
    """What has worked on the cluster, each with its node; also what has ended."""
    code = (
        f"import ray; ray.init({address!r}, log_to_driver=False, logging_level='ERROR')\n"
        "for one in ray._private.state.actors().values(): print(one['ActorClassName'], one['Address']['NodeID'])"
    )
    done = run(ROOT, sys.executable, "-c", code)
    assert done.returncode == 0, done.stderr
    return {(name, node) for name, node in (line.split() for line in done.stdout.splitlines())}


@pytest.mark.long
def test_a_scheduled_retrain_works_on_both_nodes(
    tmp_path: Path, prefect_api: str, worker: Path, cluster: RayCluster
) -> None:
    home = make_workspace(tmp_path / "rays", epochs=1)
    params = home / "params.yaml"
    params.write_text(params.read_text().replace("name: shapes", "name: rays") + SCHEDULE)
    set_compute(home, engine="ray", strategy="ray", num_nodes=2)
    assert run(home, "visionloop", "ingest", str(tmp_path / "photos")).returncode == 0
    deploy = [sys.executable, "flows/deploy.py", "--workspace", str(home), "--pool", "rays"]
    done = run(ROOT, *deploy, PREFECT_API_URL=prefect_api, RAY_ADDRESS=cluster.client_address)
    assert done.returncode == 0, done.stderr
    number = ask_prefect(prefect_api, "deployments/name/retrain/rays")["id"]
    flow_run = start_deployment(prefect_api, number)

    deadline = time.monotonic() + LIMIT_S
    state = {"type": "PENDING"}
    while state["type"] not in {"COMPLETED", "FAILED", "CRASHED", "CANCELLED"}:
        assert time.monotonic() < deadline, worker.read_text()[-3000:]
        time.sleep(0.5)
        state = ask_prefect(prefect_api, f"flow_runs/{flow_run}")["state"]
    assert state["type"] == "COMPLETED", worker.read_text()[-3000:]
    assert (home / "data" / "prepared" / "report.json").is_file()
    actors = list_actors(cluster.address)
    for name in ("PoolActor", "RayTrainWorker"):
        assert len({node for kind, node in actors if name in kind}) == 2, actors
