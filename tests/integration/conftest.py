"""What several files need: an S3 server, a Ray cluster, a workspace with a champion, one thread of torch."""

from collections.abc import Iterator
from typing import Any

import pytest

from homes import Home, make_champion
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
def cluster() -> Iterator[RayCluster]:
    with run_cluster() as running:
        yield running


@pytest.fixture(scope="module")
def cluster_address(cluster: RayCluster) -> str:
    """As a node of the cluster reaches it: this machine is one."""
    return cluster.address
