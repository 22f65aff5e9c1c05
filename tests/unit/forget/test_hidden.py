"""What lies in `.visionloop`, and the checkpoints in the store."""

import json
import os
import subprocess
from pathlib import Path

from visionloop.forget.copies import Copy, find_checkpoints
from visionloop.forget.hidden import find_hidden, list_unknown
from visionloop.settings import load_settings
from visionloop.store import LocalStore

OURS, THEIRS = "a" * 64, "b" * 64


def test_failed_batches_with_the_image_and_checkpoints_of_the_name_go(tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_text("name: pets\n")
    settings, store = load_settings({}, tmp_path), LocalStore(tmp_path / "store")
    for run, sha256 in (("1", OURS), ("2", THEIRS), ("1/rank-1", OURS)):
        folder = settings.hidden_dir / "failed" / run
        folder.mkdir(parents=True)
        (folder / "batch.json").write_text(json.dumps({"images": [{"sha256": sha256}]}))
        (folder / "batch.npz").write_bytes(b"pixels")
    for name in ("pets", "petshop"):
        store.put(f"checkpoints/{name}/0123/manifest.json", b"{}")

    def find() -> list[Copy]:
        return [*find_hidden(settings, "pets", frozenset({OURS}), (2,)), *find_checkpoints(store, "pets")]

    copies = find()
    assert [copy.what for copy in copies] == [
        "2 folders with a batch that a training failed on",
        f"checkpoints of an unfinished training in {store.url}",
    ]
    for _ in range(2):  # going twice does no harm
        for copy in copies:
            copy.remove()
    assert [path.name for path in (settings.hidden_dir / "failed").iterdir()] == ["2"]
    assert list(store.list("checkpoints/")) == ["checkpoints/petshop/0123/manifest.json"]
    assert find() == []


def test_what_shows_images_or_was_left_by_a_kill_goes(tmp_path: Path) -> None:
    """Runs of TensorBoard on versions that held an image, frames that nobody reads any more, work of every stage."""
    (tmp_path / "params.yaml").write_text("name: pets\n")
    hidden = load_settings({}, tmp_path).hidden_dir
    dead = subprocess.Popen(["true"])
    dead.wait()
    for name in (
        "tensorboard/resnet18-dataset1-0a0a0a0a/events.1",
        "tensorboard/resnet18-dataset2-0b0b0b0b/events.1",
        "tensorboard/something/events.1",
        "work/tune/0123/trial/batch.png",
        "work/some_new_stage/0123/x.npy",
        "work/train/0123/bundle/model.onnx",
        "work/train/0123/done.json",
        "predict/9f9f/0123/000000000000.jsonl",
        f"ingest/video/spool/{dead.pid}/1.jpg",
        f"ingest/video/spool/{os.getpid()}/1.jpg",
        "tmp/ranks-1/x",
        "tmp/upload",
        "ray/run/checkpoint",
    ):
        (hidden / name).parent.mkdir(parents=True, exist_ok=True)
        (hidden / name).write_bytes(b"x")
    copies = find_hidden(load_settings({}, tmp_path), "pets", frozenset({OURS}), (2, 3))
    assert [copy.what for copy in copies] == [
        "unfinished work of some_new_stage",
        "finished work of train",
        "unfinished work of tune",
        "answers of a predict that was stopped",
        "2 runs in TensorBoard, which shows training images",
        "decoded frames of an ingest that was killed",
        "temporary files of processes that were killed",
    ]
    never = find_hidden(load_settings({}, tmp_path), "pets", frozenset({OURS}), (), was_prepared=False)
    assert not [copy.what for copy in never if "work of" in copy.what]
    for copy in copies:
        copy.remove()
    left = sorted(p.relative_to(hidden).as_posix() for p in hidden.rglob("*") if p.is_file() and p.name != "lock")
    assert left == [f"ingest/video/spool/{os.getpid()}/1.jpg", "tensorboard/resnet18-dataset1-0a0a0a0a/events.1"]


def test_a_folder_that_is_in_no_row_is_told(tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_text("name: pets\n")
    settings = load_settings({}, tmp_path)
    assert list_unknown(settings) == []
    for name in ("bundles-rank3", "verify-x1", "tmp", "predict", "latency", "thumbnails"):
        (settings.hidden_dir / name).mkdir(parents=True)
    assert list_unknown(settings) == [".visionloop/thumbnails, which is not known to hold no images: look there"]
