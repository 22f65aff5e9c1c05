"""What several files need: an S3 server, a Ray cluster, a workspace with a champion, one thread of torch."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from homes import Home, make_champion
from s3_server import make_client, serve_s3


@pytest.fixture(scope="session")
def endpoint_url() -> Iterator[str]:
    """The address of an S3 server. Each file has buckets of its own names."""
    with serve_s3() as url:
        yield url


@pytest.fixture(scope="session")
def client(endpoint_url: str) -> Any:
    """A client of that server."""
    return make_client(endpoint_url)


@pytest.fixture(scope="session")
def champion(tmp_path_factory: pytest.TempPathFactory) -> Home:
    """A workspace whose champion tells bars, discs and rings apart. Tests change copies of it."""
    return make_champion(tmp_path_factory.mktemp("ways") / "ws")


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Tests run side by side; and the number of threads is an input of a training."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def cluster_address() -> Iterator[str]:
    """Two nodes of one core each. Their sockets want a short path, so the folder is not pytest's."""
    ray = pytest.importorskip("ray", reason="the extra `ray` is not installed")
    from ray.cluster_utils import Cluster

    folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")
    (Path(folder) / "ray").mkdir()
    os.environ["RAY_TMPDIR"] = folder
    before = {p.pid for p in psutil.process_iter()}
    quiet = {"num_cpus": 1, "object_store_memory": 100_000_000}
    cluster = Cluster(initialize_head=True, head_node_args={**quiet, "include_dashboard": False})
    try:
        cluster.add_node(**quiet)
        yield cluster.address
    finally:
        del os.environ["RAY_TMPDIR"]
        ray.shutdown()
        cluster.shutdown()
        for process in [p for p in psutil.process_iter() if p.pid not in before and folder in " ".join(_command(p))]:
            process.kill()
        shutil.rmtree(folder, ignore_errors=True)


def _command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []
