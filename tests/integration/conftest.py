"""What several files need: an S3 server, a Ray cluster, a workspace with a champion, one thread of torch."""

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from homes import EPOCHS, Home, make_champion
from ray_cluster import RayCluster, run_cluster
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
def cluster() -> Iterator[RayCluster]:
    with run_cluster() as running:
        yield running


@pytest.fixture(scope="module")
def cluster_address(cluster: RayCluster) -> str:
    """As a node of the cluster reaches it: this machine is one."""
    return cluster.address
