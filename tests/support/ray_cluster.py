"""A Ray cluster of two nodes of one core each, on this machine."""

import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest


@dataclass(frozen=True)
class RayCluster:
    """Its addresses: for a node of it, and for any other machine."""

    address: str
    client_address: str


@contextmanager
def run_cluster() -> Iterator[RayCluster]:
    """Start it, and leave nothing of it. Its sockets want a short path, so the folder is not pytest's."""
    ray = pytest.importorskip("ray", reason="the extra `ray` is not installed")
    from ray.cluster_utils import Cluster

    folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")
    (Path(folder) / "ray").mkdir()
    os.environ["RAY_TMPDIR"] = folder
    # The head forks a process for each client; with gRPC's own handlers of a fork some hang on a busy machine.
    os.environ["GRPC_ENABLE_FORK_SUPPORT"] = "0"
    before = {p.pid for p in psutil.process_iter()}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    quiet = {"num_cpus": 1, "object_store_memory": 100_000_000}
    head = {**quiet, "include_dashboard": False, "ray_client_server_port": port}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        cluster.add_node(**quiet)
        yield RayCluster(cluster.address, f"ray://127.0.0.1:{port}")
    finally:
        del os.environ["RAY_TMPDIR"], os.environ["GRPC_ENABLE_FORK_SUPPORT"]
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
