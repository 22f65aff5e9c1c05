"""Prepare and predict on a Ray cluster of two nodes on this machine: as on one machine, and nothing is left running."""

import os
import shutil
import socket
import time
import warnings
from dataclasses import replace
from pathlib import Path

import pytest

from fakes import make_bundle, make_image
from ray_cluster import RayCluster
from videos import write_video
from visionloop.bundle import load_bundle, upload_bundle
from visionloop.data.prepare import prepare
from visionloop.errors import DatasetError, ParamsError
from visionloop.parallel import Engine, connect_ray, map_chunks
from visionloop.params import make_params
from visionloop.predict.chunks import Cluster, predict_in_chunks
from visionloop.predict.files import find_images, predict_files
from visionloop.predict.tables import Table
from visionloop.predictor import Predictor
from visionloop.store import LocalStore
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


def test_prepare_gives_the_bytes_of_one_machine_and_tells_its_errors(tmp_path: Path, cluster: RayCluster) -> None:
    """As a machine that is no node of it, as the jobs of Prefect; then as a node."""
    world = make_world(tmp_path)
    prepare(world)
    local = read_all(world.settings.prepared_dir)
    shutil.rmtree(world.settings.prepared_dir)
    remote, seen = with_ray(world, cluster.client_address), []
    prepare(
        connect(world.settings, remote.params, store=world.store),
        on_progress=lambda done, total: seen.append((done, total)),
    )
    assert read_all(world.settings.prepared_dir) == local
    assert seen[-1] == (160, 160)

    remote = with_ray(world, cluster.address)
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


def test_who_is_not_let_in_is_told_what_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrong token, and a port of the cluster for others, end in a silence of half a minute."""

    def wait_in_vain(**options: object) -> None:
        warnings.warn("Ensure that the port is reachable", stacklevel=1)
        raise ConnectionError("ray client connection timeout")

    monkeypatch.setattr(ray, "init", wait_in_vain)
    with socket.socket() as somebody, warnings.catch_warnings(action="error"):
        somebody.bind(("127.0.0.1", 0))
        somebody.listen()
        address = f"ray://127.0.0.1:{somebody.getsockname()[1]}"
        with pytest.raises(ParamsError) as caught:
            list(map_chunks(len, ["a"], Engine("ray", address), max_held=1))
    assert str(caught.value) == (
        f"params.yaml compute.address: no Ray cluster at {address} (ray client connection timeout); expected the "
        "address of a running cluster. Something listens there: a node takes HEAD:6379, any other machine "
        "ray://HEAD:10001, each with its RAY_AUTH_TOKEN and release, or set `engine: local`."
    )


@pytest.mark.parametrize("failures", [2, 3])
def test_a_busy_head_is_asked_again(failures: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What Ray's head says when the process for a client did not start, as one on a busy machine said it."""
    answers, said = (
        [*[False] * failures, True],
        "Traceback:\n  line 772\nRuntimeError: Starting Ray client server failed.",
    )

    def init(**options: object) -> None:
        if not answers.pop(0):
            raise ConnectionAbortedError(f"Initialization failure from server:\n{said}\n")

    monkeypatch.setattr(ray, "init", init)
    if failures < 3:
        with connect_ray("auto", key="compute.engine", instead="engine: local"):
            pass
        assert answers == []
    else:
        with (
            pytest.raises(ParamsError, match=r"auto \(RuntimeError: Starting Ray client server failed\.\)"),
            connect_ray("auto", key="compute.engine", instead="engine: local"),
        ):
            pass
        assert answers == [True]


def test_predict_gives_the_answers_of_one_machine(
    tmp_path: Path, cluster: RayCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The nodes take the model from the store when they have not its folder, and a video is answered in its place."""
    folder, store = tmp_path / "photos", LocalStore(tmp_path / "store")
    folder.mkdir()
    for number in range(5):
        (folder / f"{number}.png").write_bytes(make_image(number))
    (folder / "broken.png").write_text("text")
    (folder / "gone.png").symlink_to(tmp_path / "nothing")
    write_video(folder / "2.mp4")
    make_bundle(tmp_path / "bundle")
    upload_bundle(store, load_bundle(tmp_path / "bundle"))
    predictor, files = Predictor.load(tmp_path / "bundle"), find_images([str(folder)])
    local = list(predict_files(predictor, files))
    monkeypatch.setattr("visionloop.predict.chunks.SENT_IMAGES", 3)
    moved = replace(predictor.bundle, folder=tmp_path / "elsewhere")
    monkeypatch.setattr(predictor, "bundle", moved)
    table, seen = Table.plan(tmp_path / "answers.jsonl", None), []
    assert table
    remote_cluster = Cluster(cluster.client_address, store.url)
    with predict_in_chunks(
        predictor, files, table, tmp_path / "work", cluster=remote_cluster, on_progress=lambda *done: seen.append(done)
    ) as chunks:
        remote = list(chunks.read())
    assert [(one.path, one.error) for one in remote] == [(one.path, one.error) for one in local]
    for there, here in zip(remote, local, strict=True):
        assert (there.prediction is None) == (here.prediction is None)
        assert (there.video is None) == (here.video is None)
        if there.prediction and here.prediction:
            assert there.prediction.prediction == here.prediction.prediction
            assert there.prediction.confidence == pytest.approx(here.prediction.confidence, abs=1e-5)
    assert sum(one.prediction is None for one in remote) == 2
    assert seen[-1] == (8, 8)
