"""Shards: rows are found where they were put, larger training images are cropped, what is incomplete is refused."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from visionloop.data.shards import Prepared, choose_crop, compute_places, load_prepared, write_index
from visionloop.errors import DatasetError

SIDES = ["train", "val", "train", "test", "train", "val", "train"]
PIN = {"name": "pets", "version": 1, "digest": "0" * 64, "num_images": 7, "classes": ["cat"]}


def write_rows(folder: Path, **columns: list[object]) -> None:
    """An index of seven images, in the order of its columns, in batches of five."""
    columns = {"sha256": [f"{i:064x}" for i in range(7)], "label": columns.pop("label"), "side": SIDES, **columns}
    write_index(folder, pa.table(columns).to_batches(5))


def write_prepared(folder: Path, *, larger: bool) -> Prepared:
    """Seven images of 4 x 6, or the training ones 8 x 8: each pixel holds row, top and left."""

    def make(row: int, height: int, width: int) -> np.ndarray:
        image = np.zeros((height, width, 3), np.uint8)
        image[..., 0], image[..., 1], image[..., 2] = row, np.arange(height)[:, None], np.arange(width)
        return image

    small = [make(i, 4, 6) for i, side in enumerate(SIDES) if not larger or side != "train"]
    report = {
        "dataset": PIN,
        "task": "multiclass",
        "image_size": [4, 6],
        "resize": "squash",
        "num_shards": -(-len(small) // 2),
    }
    report["rows_per_shard"] = 2
    for number in range(report["num_shards"]):
        np.save(folder / f"images-{number:05d}.npy", np.stack(small[2 * number : 2 * number + 2]))
    if larger:
        report["train_shards"] = {"size": [8, 8], "num_shards": 2, "rows_per_shard": 3}
        train = [make(i, 8, 8) for i, side in enumerate(SIDES) if side == "train"]
        np.save(folder / "train-00000.npy", np.stack(train[:3]))
        np.save(folder / "train-00001.npy", np.stack(train[3:]))
    write_rows(folder, label=[0] * 7)
    (folder / "classes.json").write_text('["cat"]')
    (folder / "report.json").write_text(json.dumps(report))
    return load_prepared(folder)


@pytest.mark.parametrize("larger", [False, True])
def test_rows_come_in_the_order_asked_for(tmp_path: Path, larger: bool) -> None:
    prepared = write_prepared(tmp_path, larger=larger)
    images = prepared.read(np.array([6, 0, 5, 3, 2, 1, 4]))
    assert images.shape == (7, 4, 6, 3)
    assert images[:, 0, 0, 0].tolist() == [6, 0, 5, 3, 2, 1, 4]
    assert prepared.rows("train").tolist() == [0, 2, 4, 6]


def test_a_larger_image_is_read_in_its_middle(tmp_path: Path) -> None:
    prepared = write_prepared(tmp_path, larger=True)
    assert prepared.read(np.array([4]))[0, 0, 0].tolist() == [4, 2, 1]
    assert prepared.read(np.array([3]))[0, 0, 0].tolist() == [3, 0, 0]


def test_a_crop_is_a_piece_of_its_image_and_follows_from_seed_epoch_and_image(tmp_path: Path) -> None:
    prepared = write_prepared(tmp_path, larger=True)
    rows = np.array([0, 3, 6])
    corners = set()
    for epoch in range(60):
        crops = prepared.read_crops(rows, seed=1, epoch=epoch)
        assert (crops == prepared.read_crops(rows, seed=1, epoch=epoch)).all()
        assert (crops[::-1] == prepared.read_crops(rows[::-1], seed=1, epoch=epoch)).all(), "whatever the batch"
        assert crops[1, 0, 0].tolist() == [3, 0, 0], "a test image stays whole"
        row, top, left = crops[2, 0, 0].tolist()
        assert row == 6
        assert crops[2, 3, 5].tolist() == [6, top + 3, left + 5]
        corners.add((top, left))
    assert {top for top, _ in corners} == {0, 1, 2, 3, 4}
    assert {left for _, left in corners} == {0, 1, 2}


def test_crops_are_spread_evenly_and_differ_by_seed_epoch_and_image() -> None:
    seen = Counter(choose_crop(f"sha{i}", (3, 1), seed=0, epoch=0) for i in range(8000))
    assert len(seen) == 8
    assert max(seen.values()) - min(seen.values()) < 250
    same = [choose_crop("a", (9999, 9999), seed=0, epoch=0)]
    assert choose_crop("a", (9999, 9999), seed=0, epoch=1) not in same
    assert choose_crop("a", (9999, 9999), seed=1, epoch=0) not in same
    assert choose_crop("b", (9999, 9999), seed=0, epoch=0) not in same


def test_places_count_each_set_of_shards_for_itself() -> None:
    assert compute_places(SIDES, train_is_larger=False).tolist() == [0, 1, 2, 3, 4, 5, 6]
    assert compute_places(SIDES, train_is_larger=True).tolist() == [0, 0, 1, 1, 2, 2, 3]


@pytest.mark.parametrize("name", ["images-00001.npy", "train-00001.npy", "index.parquet", "classes.json"])
def test_what_is_incomplete_is_refused(tmp_path: Path, name: str) -> None:
    write_prepared(tmp_path, larger=True)
    (tmp_path / name).unlink()
    with pytest.raises(DatasetError, match=r"is missing or incomplete; expected shards and an index\. Run `visionloop"):
        load_prepared(tmp_path)


def test_several_labels_become_targets(tmp_path: Path) -> None:
    write_prepared(tmp_path, larger=False)
    labels_n = [[0], [0, 2], [], [1], [2], [], [0, 1, 2]]
    first_n = [labels[0] if labels else -1 for labels in labels_n]
    write_rows(tmp_path, label=first_n, labels=labels_n)
    (tmp_path / "classes.json").write_text('["cat", "dog", "eel"]')
    report = json.loads((tmp_path / "report.json").read_text())
    (tmp_path / "report.json").write_text(json.dumps({**report, "task": "multilabel"}))
    prepared = load_prepared(tmp_path)
    assert prepared.targets_nk is not None
    assert prepared.targets_nk.dtype == np.uint8
    assert [np.flatnonzero(row).tolist() for row in prepared.targets_nk] == labels_n
    assert prepared.label_n.tolist() == [0, 0, -1, 1, 2, -1, 0]
    assert [prepared.labels(row) for row in (1, 2)] == [("cat", "eel"), ()]
    assert prepared.count_classes(prepared.rows("train")).tolist() == [2, 1, 2]


def test_one_label_is_counted_in_the_same_way(tmp_path: Path) -> None:
    prepared = write_prepared(tmp_path, larger=False)
    assert prepared.targets_nk is None
    assert prepared.labels(3) == ("cat",)
    assert prepared.count_classes(prepared.rows("train")).tolist() == [4]


def test_an_index_without_its_labels_is_incomplete(tmp_path: Path) -> None:
    write_prepared(tmp_path, larger=False)
    report = json.loads((tmp_path / "report.json").read_text())
    (tmp_path / "report.json").write_text(json.dumps({**report, "task": "multilabel"}))
    with pytest.raises(DatasetError, match="is missing or incomplete"):
        load_prepared(tmp_path)
