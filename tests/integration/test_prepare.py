"""Prepare: the same bytes whatever happens on the way, and what is refused before any work."""

import json
import os
import shutil
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fakes import make_image, write_photos
from visionloop.cli import pictures
from visionloop.data import chunks
from visionloop.data import chunks as layout
from visionloop.data import prepare as stage
from visionloop.data.images import load_array
from visionloop.data.manifest import load_pin, make_image_key, make_pin, write_pin
from visionloop.data.parts import commit_version, iterate_records, load_version_records, make_version
from visionloop.data.prepare import choose_engine, prepare
from visionloop.data.rows import hold_records
from visionloop.data.shards import load_prepared
from visionloop.data.tombstones import make_tombstone_key
from visionloop.errors import DatasetError, ParamsError
from visionloop.ingest.pull import pull
from visionloop.params import Compute, FolderSource, Params, make_params
from visionloop.records import ImageRecord
from visionloop.settings import Settings
from visionloop.store import LocalStore
from visionloop.workspace import connect
from worlds import World, make_world

FACTS: dict[str, Any] = {"num_added": 0, "split": {}, "rejected": None, "num_rejected": 0, "created_at": "x"}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("world") / "w").settings.home


@pytest.fixture
def world(made: Path, tmp_path: Path) -> World:
    """A fresh copy of a workspace with 160 images, in chunks of 16, three shards."""
    shutil.copytree(made, tmp_path / "w")
    return make_world_again(tmp_path / "w")


def make_world_again(home: Path) -> World:
    store = LocalStore(home / "store")
    settings = Settings(home, store.url, "http://127.0.0.1:1", (home / "artifacts").as_uri())
    pin = load_pin(settings.pin_path)
    params = make_params({"name": "fake", "prepare": {"image_size": 32}})
    place = connect(settings, params, store=store)
    return World(**vars(place), pin=pin, records=tuple(iterate_records(store, pin)))


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout, "CHUNK_IMAGES", 16)
    monkeypatch.setattr(layout, "compute_rows_per_shard", lambda size_hw: 60)


def with_prepare(**section: Any) -> Params:
    return make_params({"name": "fake", "prepare": {"image_size": 32, **section}})


def read_all(world: World) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(world.settings.prepared_dir.iterdir())}


def pin_records(world: World, records: list[ImageRecord]) -> None:
    """Commit and pin a version that holds these records."""
    home = world.settings.home
    shutil.rmtree(home / "store" / "datasets")
    held = hold_records(records)
    version = make_version("fake", None, held, held, **FACTS)
    assert commit_version(world.store, version, held)
    write_pin(world.settings.pin_path, make_pin(version))


def test_every_image_is_where_the_index_says(world: World) -> None:
    seen: list[tuple[int, int]] = []
    assert prepare(world, on_progress=lambda *n: seen.append(n)) == world.pin
    assert sorted(read_all(world)) == [
        "classes.json",
        *(f"images-0000{i}.npy" for i in range(3)),
        "index.parquet",
        "manifest.parquet",
        "report.json",
    ]
    assert seen[0] == (0, 160)
    assert seen[-1] == (160, 160)
    prepared = load_prepared(world.settings.prepared_dir)
    images = prepared.read(np.arange(160))
    for row, record in enumerate(world.records):
        assert prepared.sha256_n[row] == record.sha256
        assert prepared.classes[prepared.label_n[row]] == record.labels[0]
        data = world.store.get(make_image_key(record.sha256))
        assert (images[row] == load_array(data, "x", size_hw=(32, 32), resize="squash")).all()
    report = json.loads((prepared.folder / "report.json").read_text())
    assert report["num_shards"] == 3
    assert sum(report["sides"].values()) == 160
    assert not list(world.settings.work_dir("prepare").glob("*/*")), "no work is left"


def test_a_shard_has_the_bytes_that_numpy_writes(world: World, tmp_path: Path) -> None:
    prepare(world)
    shard = world.settings.prepared_dir / "images-00002.npy"
    np.save(tmp_path / "plain.npy", np.load(shard))
    assert shard.read_bytes() == (tmp_path / "plain.npy").read_bytes()


@pytest.mark.parametrize("after", [1, 4, 9])
def test_what_was_done_before_an_interruption_is_not_done_again(
    world: World, after: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare(world)
    whole = read_all(world)

    def stop(done: int, total: int) -> None:
        if done >= after * 16:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(world, on_progress=stop)
    assert read_all(world) == whole, "the result before stays until there is another"
    decoded: list[str] = []
    decode = chunks._decode
    monkeypatch.setattr(chunks, "_decode", lambda w, d, c: decoded.append(w.sha256) or decode(w, d, c))
    seen: list[int] = []
    prepare(world, on_progress=lambda done, total: seen.append(done))
    assert read_all(world) == whole
    assert seen[0] == 160 - len(decoded)
    assert seen[0] >= after * 16


def test_a_chunk_that_a_power_failure_took_is_made_again(world: World) -> None:
    prepare(world)
    whole = read_all(world)

    def stop(done: int, total: int) -> None:
        if done >= 64:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(world, on_progress=stop)
    shard = next(world.settings.work_dir("prepare").glob("*/images-00000.npy"))
    with shard.open("r+b") as file:
        file.seek(128 + 20 * 32 * 32 * 3)
        file.write(bytes(4096))
    journal = shard.with_name("chunks.staged")
    journal.write_text(journal.read_text() + "images-00001.npy 16 12")  # a line cut off, with another's checksum
    prepare(world)
    assert read_all(world) == whole


def test_excluded_and_unlabelled_images_are_left_out(world: World) -> None:
    records = list(world.records)
    records[0], records[1] = replace(records[0], side="excluded"), replace(records[1], labels=())
    pin_records(world, records)
    prepare(world)
    assert load_prepared(world.settings.prepared_dir).sha256_n == tuple(r.sha256 for r in records[2:])


def test_limit_takes_a_part_of_each_side_and_class(world: World) -> None:
    prepare(connect(world.settings, with_prepare(limit=40), store=world.store))
    prepared = load_prepared(world.settings.prepared_dir)
    assert len(prepared.sha256_n) == 40
    assert (len(prepared.rows("train")), len(prepared.rows("test"))) == (20, 20)
    assert prepared.classes == ("a", "b", "c")


def test_train_size_stores_the_training_side_larger(world: World) -> None:
    prepare(connect(world.settings, with_prepare(train_size=[40, 48]), store=world.store))
    names = sorted(path.name for path in world.settings.prepared_dir.glob("*.npy"))
    assert names == ["images-00000.npy", "images-00001.npy", "train-00000.npy", "train-00001.npy"]
    prepared = load_prepared(world.settings.prepared_dir)
    assert prepared.train_shards is not None
    assert prepared.train_shards.size_hw == (40, 48)
    row = int(prepared.rows("train")[70])
    data = world.store.get(make_image_key(prepared.sha256_n[row]))
    large = load_array(data, "x", size_hw=(40, 48), resize="squash")
    assert (prepared.read(np.array([row]))[0] == large[4:36, 8:40]).all()


@pytest.mark.parametrize(
    ("image_size", "train_size", "expected"),
    [
        (33, 32, "got 32 x 32; expected image_size, 33 x 33, or larger"),
        ([64, 32], [63, 64], "got 63 x 64; expected image_size, 64 x 32, or larger"),
    ],
)
def test_train_size_below_image_size_is_refused(world: World, image_size: Any, train_size: Any, expected: str) -> None:
    params = with_prepare(image_size=image_size, train_size=train_size)
    with pytest.raises(ParamsError, match=rf"params\.yaml prepare\.train_size: {expected}"):
        prepare(connect(world.settings, params, store=world.store))


def test_forgotten_images_are_named(world: World) -> None:
    gone = [r.sha256 for r in world.records[:7]]
    for sha256 in gone:
        world.store.create(make_tombstone_key("fake", sha256), b"{}")
    with pytest.raises(DatasetError) as caught:
        prepare(world)
    named = ", ".join(sha[:12] for sha in gone[:5])
    assert str(caught.value) == (
        f"dataset fake version 1: names 7 forgotten images: {named} and 2 more; expected a version without them. "
        "Pin a later one: `visionloop ingest`."
    )
    assert caught.value.exit_code == 2


def test_several_labels_want_the_task_multilabel(world: World) -> None:
    first, second, third, *others = world.records
    pin_records(world, [replace(first, labels=("a", "z")), replace(second, labels=()), third, *others])
    with pytest.raises(DatasetError, match=rf"has several labels at {first.origins[0]}; .*Set `task: multilabel`"):
        prepare(world)
    prepare(connect(world.settings, make_params({"name": "fake", "task": "multilabel"}), store=world.store))
    prepared = load_prepared(world.settings.prepared_dir)
    assert (prepared.task, prepared.classes) == ("multilabel", ("a", "b", "c", "z"))
    assert prepared.sha256_n == tuple(sorted({r.sha256 for r in world.records} - {second.sha256}))
    labels = {r.sha256: r.labels for r in [replace(first, labels=("a", "z")), third, *others]}
    assert [prepared.labels(row) for row in range(159)] == [labels[sha256] for sha256 in prepared.sha256_n]


def test_an_unlabelled_image_is_a_negative_if_params_say_so(world: World) -> None:
    pin_records(world, [replace(world.records[0], labels=()), *world.records[1:]])
    section = {"image_size": 32, "unlabelled": "negative"}
    with pytest.raises(ParamsError, match=r"prepare\.unlabelled: got 'negative' with `task: auto`; expected 'exclude'"):
        prepare(connect(world.settings, make_params({"name": "fake", "prepare": section}), store=world.store))
    several = {"name": "fake", "task": "multilabel", "prepare": section}
    prepare(connect(world.settings, make_params(several), store=world.store))
    prepared = load_prepared(world.settings.prepared_dir)
    row = prepared.sha256_n.index(world.records[0].sha256)
    assert (prepared.label_n[row], prepared.labels(row)) == (-1, ())
    assert len(prepared.sha256_n) == 160
    assert json.loads((prepared.folder / "report.json").read_text())["num_negative"] == 1
    prepare(connect(world.settings, make_params({**several, "prepare": {**section, "limit": 40}}), store=world.store))
    assert len(load_prepared(world.settings.prepared_dir).sha256_n) == 40


def test_a_threshold_of_three_classes_is_refused_before_an_image_is_read(world: World) -> None:
    pin_records(world, [replace(world.records[0], labels=("z",)), *world.records[1:]])
    params = make_params({"name": "fake", "prepare": {"image_size": 32}, "train": {"threshold": "max_f1"}})
    match = r"train\.threshold: got 'max_f1' with a multiclass task; expected no threshold"
    with pytest.raises(ParamsError, match=match):
        prepare(connect(world.settings, params, store=world.store))
    assert not world.settings.work_dir("prepare").exists()


def test_one_class_alone_is_no_task_of_several_labels(world: World) -> None:
    pin_records(world, [replace(r, labels=("a",) if "a" in r.labels else ()) for r in world.records])
    section = {"image_size": 32, "unlabelled": "negative"}
    with pytest.raises(DatasetError, match=r"has 1 class \(a\) for `task: multilabel`; expected two or more"):
        prepare(
            connect(
                world.settings,
                make_params({"name": "fake", "task": "multilabel", "prepare": section}),
                store=world.store,
            )
        )


def test_one_label_an_image_leaves_no_trace_of_several(world: World) -> None:
    import pyarrow.parquet as pq

    prepare(world)
    folder = world.settings.prepared_dir
    assert pq.read_table(folder / "index.parquet").column_names == ["sha256", "label", "side"]
    assert "num_negative" not in json.loads((folder / "report.json").read_text())


@pytest.mark.parametrize("damage", ["missing", "cut", "another image"])
def test_an_object_that_is_not_what_was_ingested_is_named(world: World, damage: str) -> None:
    record = world.records[100]
    path = world.settings.home / "store" / make_image_key(record.sha256)
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-20] if damage == "cut" else make_image(5))
    with pytest.raises(DatasetError) as caught:
        prepare(world)
    assert str(caught.value) == (
        f"image {record.sha256[:12]} ({record.origins[0]}): is missing from the store or damaged there; expected its "
        "bytes as they were ingested. Run `visionloop ingest --verify`, or after a one-time pull `visionloop ingest "
        "PATH --name NAME --verify` (with the options of then): it mends what its source still has. Without its "
        f"source: `visionloop forget {record.sha256[:12]} --why lost`."
    )


def test_a_full_disk_is_told_before_and_in_the_middle(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=100_000))
        with pytest.raises(
            DatasetError, match=r"cannot be written \(100 KB free\); expected \S+ [KM]B\. Free some space"
        ):
            prepare(world)

    def refuse(*args: object) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", refuse)
        with pytest.raises(DatasetError, match=r"cannot be written \(No space left on device\); expected room for the"):
            prepare(world)
    prepare(world)
    asked: list[int] = []
    monkeypatch.setattr(stage, "_check_room", lambda work, num_bytes: asked.append(num_bytes))
    for is_copied in (False, True):  # by dvc, into its cache
        prepare(world, is_copied=is_copied)
    assert asked[1] == 2 * asked[0] > 0


def test_a_short_write_goes_on(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare(world)
    whole, write = read_all(world), os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda file, data, offset: write(file, data[:1000], offset))
    prepare(world)
    assert read_all(world) == whole


class FarStore(LocalStore):
    """A store with a network's address, that counts how many reads are under way at once."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.now = self.most = 0

    @property
    def url(self) -> str:
        return "s3://bucket/prefix"

    def get(self, key: str) -> bytes:
        if not key.startswith("images/"):
            return super().get(key)
        self.now += 1
        self.most = max(self.most, self.now)
        time.sleep(0.002)
        self.now -= 1
        return super().get(key)


def test_reads_from_a_network_overlap(world: World) -> None:
    prepare(world)
    whole, far = read_all(world), FarStore(world.store.root)
    prepare(connect(world.settings, world.params, store=far))
    assert read_all(world) == whole
    assert far.most > 8


@pytest.mark.parametrize(
    ("compute", "cores", "number", "kind"),
    [
        ({}, 1, 10**12, "threads"),
        ({}, 4, 10**9, "threads"),
        ({}, 4, 10**10, "processes"),
        ({"engine": "ray", "address": "head:6379"}, 4, 1, "ray"),
    ],
)
def test_where_it_runs(
    compute: dict[str, str], cores: int, number: int, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage, "count_cores", lambda: cores)
    engine = choose_engine(Compute(**compute), number)
    assert (engine.kind, engine.address) == (kind, compute.get("address"))


def test_what_a_raised_limit_let_in_is_compared_prepared_and_drawn_under_a_lower_one(tmp_path: Path) -> None:
    folder = write_photos(tmp_path / "photos", 10)
    large = Image.radial_gradient("L").resize((7200, 7200))
    for quality in (60, 90):
        large.save(folder / "cat" / f"large-{quality}.jpg", "JPEG", quality=quality)
    store = LocalStore(tmp_path / "store")
    settings = Settings(tmp_path / "ws", store.url, "http://127.0.0.1:1", (tmp_path / "artifacts").as_uri())
    source = FolderSource(kind="folder", path=str(folder), name="photos")
    raised = make_params({"name": "pets", "ingest": {"max_pixels": 60_000_000}})
    usual = make_params({"name": "pets", "prepare": {"image_size": 32}, "ingest": {"max_rejected_ratio": 1}})
    pull(connect(settings, raised, store=store), sources=[source], now="2026-01-01")
    write_photos(folder, 11)
    report = pull(connect(settings, usual, store=store), sources=[source], now="2026-01-02")

    assert (report.num_added, [r.code for r in report.rejected]) == (2, ["too_large"] * 2), "read again, refused now"
    records = [r for r in load_version_records(store, report.version) if r.width == 7200]
    assert len(records) == 2
    assert len({record.key for record in records}) == 1, "near duplicates were compared"
    prepare(connect(settings, usual, store=store))
    prepared = load_prepared(settings.prepared_dir)
    row = prepared.sha256_n.index(records[0].sha256)
    expected = load_array(folder.joinpath("cat", records[0].origins[0].rpartition("/")[2]).read_bytes(), "x", **LARGE)
    assert np.array_equal(prepared.read(np.array([row]))[0], expected)
    assert pictures._make_cell(store, records[0]).note == f"{records[0].side}  7200 x 7200"


LARGE: dict[str, Any] = {"size_hw": (32, 32), "resize": "squash", "max_pixels": None}
