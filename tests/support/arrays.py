"""Prepared data of random pixels in a folder, without a dataset behind it: for tests of batches and augmentation."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from visionloop.data.shards import Prepared, load_prepared, make_shard_name
from visionloop.params import make_params
from visionloop.store import LocalStore
from workspaces import make_settings

CLASSES = ("a", "b", "c")


def make_prepared(folder: Path, *, number: int = 30, px: int = 32, train_px: int | None = None) -> Prepared:
    """Write `number` smooth random images of three classes, two thirds of them for training; open and return them."""
    rng = np.random.default_rng(0)
    is_train_n = np.arange(number) % 3 != 0
    larger = train_px is not None

    def write(kind: str, count: int, side: int) -> dict[str, Any]:
        coarse = [Image.fromarray(rng.integers(0, 256, (5, 5, 3), dtype=np.uint8)) for _ in range(count)]
        images = [np.asarray(image.resize((side, side), Image.Resampling.BICUBIC)) for image in coarse]
        np.save(folder / make_shard_name(0, kind), np.asarray(images, np.uint8).reshape(count, side, side, 3))
        return {"num_shards": 1, "size": [side, side], "rows_per_shard": max(1, count)}

    shards = write("images", number - larger * int(is_train_n.sum()), px)
    report: dict[str, Any] = {
        "dataset": {"name": "random", "version": 1, "digest": "0" * 64, "num_images": number, "classes": CLASSES},
        "task": "multiclass",
        "resize": "squash",
        "image_size": [px, px],
        **{key: shards[key] for key in ("num_shards", "rows_per_shard")},
    }
    if train_px is not None:
        report["train_shards"] = write("train", int(is_train_n.sum()), train_px)
    (folder / "report.json").write_text(json.dumps(report))
    (folder / "classes.json").write_text(json.dumps(CLASSES))
    table = {
        "sha256": [f"{i:064x}" for i in range(number)],
        "label": pa.array(np.arange(number) % 3, pa.int64()),
        "side": np.where(is_train_n, "train", "val").tolist(),
    }
    pq.write_table(pa.table(table), folder / "index.parquet")
    return load_prepared(folder)


def make_job(prepared: Prepared, *, workers: int | None = None, world: Any = None, **section: Any) -> Any:
    """Return the training of some prepared data, without an MLflow."""
    from visionloop.training.job import Hardware, Job
    from visionloop.training.ranks.world import World
    from visionloop.training.watch import Watcher

    home = prepared.folder
    train = {"backbone": "small_cnn", "batch_size": 8, "imbalance": "none", **section}
    return Job(
        settings=replace(make_settings(home), loader_workers=workers),
        params=make_params({"name": "random", "prepare": {"image_size": 32}, "train": train}),
        store=LocalStore(home / "store"),
        tracking=None,  # type: ignore[arg-type]
        prepared=prepared,
        hardware=Hardware("cpu", "fp32", 1, "x86_64"),
        code_digest="",
        watcher=Watcher(),
        world=world or World(),
    )


def sort_by_row(batches: Sequence[Any]) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Return the rows of some batches, ascending, with their inputs and draws in that order."""
    rows = np.concatenate([batch.rows_n.numpy() for batch in batches])
    order = np.argsort(rows, kind="stable")
    draws = None
    if batches[0].draws_nd is not None:
        draws = np.concatenate([batch.draws_nd.numpy() for batch in batches])[order]
    return rows[order], np.concatenate([batch.inputs.numpy() for batch in batches])[order], draws
