"""What several files need: an S3 server, a Ray cluster, a workspace with a champion, one thread of torch."""

import functools
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from homes import EPOCHS, Home, make_champion
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
def champion(make_once: Callable[[str, Callable[[Path], object]], Path]) -> Home:
    """A workspace whose champion tells bars, discs and rings apart. Tests change copies of it."""
    folder = make_once("champion", lambda new: make_champion(new / "ws"))
    return Home(folder / "ws", max_epochs=EPOCHS)


@pytest.fixture(autouse=True, scope="session")
def read_operators_once() -> Iterator[None]:
    """For each network that it exports, torch parses the code of 500 operators: in one process once is enough."""
    from torch.onnx._internal._lazy_import import onnxscript_apis

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onnxscript_apis, "get_torchlib_ops", functools.cache(onnxscript_apis.get_torchlib_ops))
        yield


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
