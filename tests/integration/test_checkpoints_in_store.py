"""Checkpoints in the object store: another machine goes on, damage is passed over, a failing store stops nothing."""

import hashlib
import json
import shutil
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from s3_server import make_bucket, make_client, point_to
from trainings import Ear, MemoryTracking, Place, make_place
from visionloop.errors import StoreError
from visionloop.store import ObjectStore
from visionloop.training import fit, mirror
from visionloop.training.checkpoints import parse_name
from visionloop.training.job import Hardware
from visionloop.training.watch import EpochReport

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def s3(endpoint_url: str) -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        point_to(patch, endpoint_url)
        make_bucket(endpoint_url, "checkpoints", versioned=True)
        yield make_client(endpoint_url)


@pytest.fixture(scope="module")
def place(s3: Any, tmp_path_factory: pytest.TempPathFactory) -> Place:
    return make_place(tmp_path_factory.mktemp("machine") / "ws", store_url="s3://checkpoints/vl")


def package_weights(work: Path, job: Any, classifier: torch.nn.Module, run_id: str) -> str:
    """Make no ONNX of a network, which takes seconds: its weights tell as well whether two are the same."""
    (work / "bundle").mkdir()
    state = classifier.state_dict()
    return hashlib.sha256(b"".join(state[name].numpy().tobytes() for name in sorted(state))).hexdigest()


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fit, "_package", package_weights)


@pytest.fixture(scope="module")
def whole(place: Place) -> str:
    """The weights of a training that nobody stopped, and whose store is clean afterwards."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fit, "_package", package_weights)
        note = replace(place, tracking=MemoryTracking()).train()
    assert list(place.store.list("checkpoints/")) == []
    return note.bundle


@pytest.fixture
def stopped(place: Place) -> Iterator[Place]:
    """A training stopped after epoch 2 of 4, and whose machine is gone: store and MLflow are left."""
    here = replace(place, tracking=MemoryTracking())
    with pytest.raises(KeyboardInterrupt):
        here.train(Ear(stop_at=2))
    shutil.rmtree(here.settings.work_dir("train"))
    yield here
    for key in list(here.store.list("checkpoints/")):
        here.store.purge(key)
    shutil.rmtree(here.settings.work_dir("train"), ignore_errors=True)


def test_another_machine_goes_on_in_the_same_run_to_the_same_bundle(stopped: Place, place: Place, s3: Any) -> None:
    ear = Ear()
    note = stopped.train(ear)
    assert ear.said("the store had checkpoints up to epoch 2: they are used")
    assert [report.epoch for report in ear.epochs] == [3, 4]
    assert list(stopped.tracking.runs) == [note.run_id], "the same MLflow run"
    assert sorted(stopped.tracking.only["metrics"]) == [1, 2, 3, 4]
    assert stopped.tracking.only["status"] == "FINISHED"
    listed = s3.list_object_versions(Bucket="checkpoints", Prefix="vl/checkpoints/")
    assert [*listed.get("Versions", ()), *listed.get("DeleteMarkers", ())] == [], (
        "no earlier version is left to pay for"
    )
    assert note.bundle == replace(place, tracking=MemoryTracking()).train().bundle


def list_names(place: Place) -> list[str]:
    return sorted(key.rpartition("/")[2] for key in place.store.list("checkpoints/shapes/"))


def test_the_store_has_an_object_for_each_of_the_last_two_epochs(stopped: Place, s3: Any) -> None:
    first, second, run = list_names(stopped)
    assert (parse_name(first)[0], parse_name(second)[0], run) == (1, 2, "run.json")
    prefix = mirror.make_prefix("shapes", stopped.make_job().key)
    data = stopped.store.get(f"{prefix}/{second}")
    assert hashlib.sha256(data).hexdigest() == parse_name(second)[1]
    assert json.loads(stopped.store.get(f"{prefix}/run.json"))["run_id"] == next(iter(stopped.tracking.runs))


@pytest.mark.usefixtures("fast")
@pytest.mark.parametrize("how", ["changed", "gone"])
def test_a_damaged_object_is_said_and_the_one_before_is_used(
    stopped: Place, whole: str, s3: Any, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("visionloop.store.s3.FIRST_PAUSE_S", 0.001)
    newest = f"{mirror.make_prefix('shapes', stopped.make_job().key)}/{list_names(stopped)[1]}"
    stopped.store.purge(newest)
    if how == "changed":
        s3.put_object(Bucket="checkpoints", Key=f"vl/{newest}", Body=b"PK not what it was")
    ear = Ear()
    note = stopped.train(ear)
    if how == "changed":
        assert ear.said("the checkpoint of epoch 2 in the store is damaged: the one before is used")
    assert ear.said("the store had checkpoints up to epoch 1: they are used")
    assert [report.epoch for report in ear.epochs] == [2, 3, 4]
    assert (note.bundle, note.run_id) == (whole, next(iter(stopped.tracking.runs)))


@pytest.mark.usefixtures("fast")
def test_a_damaged_note_of_the_run_is_said_and_training_begins_anew(stopped: Place, whole: str) -> None:
    stopped.store.put(f"{mirror.make_prefix('shapes', stopped.make_job().key)}/run.json", b'{"run_id": 1}')
    ear = Ear()
    note = stopped.train(ear)
    assert ear.said("the run.json of this training in the store is damaged: its checkpoints are not used")
    assert len(ear.epochs) == 4
    assert note.bundle == whole


@pytest.mark.usefixtures("fast")
def test_newer_work_of_this_machine_is_kept(stopped: Place, whole: str) -> None:
    with pytest.raises(KeyboardInterrupt):
        replace(stopped, settings=replace(stopped.settings, checkpoints="local")).train(Ear(stop_at=3))
    ear = Ear()
    assert stopped.train(ear).bundle == whole
    assert ear.said("going on from epoch 4: 3 are kept")
    assert not ear.said("the store had")


def test_checkpoints_of_other_hardware_are_named_and_not_used(stopped: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    other = Hardware("cpu", "bf16", 64, "aarch64")
    monkeypatch.setattr(fit, "choose_hardware", lambda workspace, prepared, world: (other, []))
    ear = Ear()
    assert mirror.fetch_checkpoints(stopped.settings.work_dir("train") / "x", stopped.make_job(ear)) is None
    (line,) = [line for line in ear.lines if "checkpoints" in line]
    assert line.startswith(
        "the store has checkpoints of this training up to epoch 2, made with precision fp32 (here bf16)"
    )
    assert "threads 1 (here 64)" in line
    assert line.endswith("they are not used, since the bits would differ")


class Failing:
    """A store that refuses the first `times` checkpoints."""

    def __init__(self, store: ObjectStore, times: int) -> None:
        self.store, self.times, self.tries = store, times, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.store, name)

    def add(self, key: str, data: bytes) -> bool:
        if key.startswith("checkpoints/"):
            self.tries += 1
            if self.tries <= self.times:
                raise StoreError("store s3://checkpoints/vl", "cannot be reached (connection refused)")
        return self.store.add(key, data)


@pytest.mark.usefixtures("fast")
def test_a_store_that_fails_stops_no_training_and_is_tried_again(place: Place, whole: str) -> None:
    failing = Failing(place.store, times=2)

    class Patient(Ear):
        def on_epoch(self, report: EpochReport) -> None:
            super().on_epoch(report)
            deadline = time.monotonic() + 10  # each epoch is sent before the next one comes
            while failing.tries < report.epoch and time.monotonic() < deadline:
                time.sleep(0.005)

    ear = Patient()
    note = replace(place, tracking=MemoryTracking(), store=failing).train(ear)
    assert note.bundle == whole
    warned = [line for line in ear.lines if "do not reach" in line]
    assert len(warned) == 1, "one line, however often it fails"
    assert "training goes on, and tries again (store s3://checkpoints/vl: cannot be reached" in warned[0]
    assert ear.said("checkpoints reach the store again")
    assert list(place.store.list("checkpoints/")) == []


def test_a_local_store_has_none_unless_asked(tmp_path: Path) -> None:
    place = make_place(tmp_path / "ws", counts={"disc": (4, 2, 0), "ring": (4, 2, 0)}, max_epochs=2)
    for choice, expected in (("auto", 0), ("local", 0), ("store", 3)):
        here = replace(place, settings=replace(place.settings, checkpoints=choice), tracking=MemoryTracking())
        with pytest.raises(KeyboardInterrupt):
            here.train(Ear(stop_at=2))
        assert len(list(place.store.list("checkpoints/"))) == expected
        shutil.rmtree(here.settings.work_dir("train"))
