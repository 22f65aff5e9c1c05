"""Prepare on a Ray cluster of two nodes on this machine: the same bytes as without it, and nothing left running."""

import os
import shutil
import time
from dataclasses import replace
from pathlib import Path

import pytest

from visionloop.data.prepare import prepare
from visionloop.errors import DatasetError, ParamsError
from visionloop.parallel import Engine, map_chunks
from visionloop.params import make_params
from visionloop.workspace import connect
from worlds import World, make_world

ray = pytest.importorskip("ray", reason="the extra `ray` is not installed")


def read_all(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def with_ray(world: World, address: str) -> World:
    value = world.params.model_dump(mode="json", exclude={"ingest"})
    return replace(world, params=make_params({**value, "compute": {"engine": "ray", "address": address}}))


def test_both_nodes_work(cluster_address: str) -> None:
    def name_node(seconds: float) -> str:
        time.sleep(seconds)
        return str(ray.get_runtime_context().get_node_id())

    nodes: set[str] = set()
    deadline = time.monotonic() + 60  # on a busy machine one node is up long before the other
    while len(nodes) < 2 and time.monotonic() < deadline:
        nodes |= set(map_chunks(name_node, [0.2] * 8, Engine("ray", cluster_address), max_held=4))
    assert len(nodes) == 2
    assert not ray.is_initialized()


def test_prepare_gives_the_bytes_of_one_machine_and_tells_its_errors(tmp_path: Path, cluster_address: str) -> None:
    world = make_world(tmp_path)
    prepare(world)
    local = read_all(world.settings.prepared_dir)
    shutil.rmtree(world.settings.prepared_dir)
    remote, seen = with_ray(world, cluster_address), []
    prepare(
        connect(world.settings, remote.params, store=world.store),
        on_progress=lambda done, total: seen.append((done, total)),
    )
    assert read_all(world.settings.prepared_dir) == local
    assert seen[-1] == (160, 160)

    missing = world.records[7].sha256
    os.remove(tmp_path / "store" / "images" / missing[:2] / missing)
    with pytest.raises(DatasetError, match=rf"^image {missing[:12]} \(7\.png\): is missing from the store or damaged"):
        prepare(connect(world.settings, remote.params, store=world.store))
    assert not ray.is_initialized()


@pytest.mark.parametrize("address", ["nowhere", "127.0.0.1:1"])
def test_a_cluster_that_is_not_there_is_told(address: str) -> None:
    with pytest.raises(ParamsError, match=rf"params\.yaml compute\.address: no Ray cluster at {address}") as caught:
        list(map_chunks(len, ["a"], Engine("ray", address), max_held=1))
    assert caught.value.exit_code == 2
