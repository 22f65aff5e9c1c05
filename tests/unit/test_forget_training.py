"""What a training leaves of images outside of its work folder: batches it failed on, checkpoints in the store."""

import json
from pathlib import Path

from visionloop.forget.copies import find_training
from visionloop.params import load_params
from visionloop.settings import load_settings
from visionloop.store import LocalStore
from visionloop.workspace import connect

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
    copies = find_training(connect(settings, load_params(settings.params_path), store=store), frozenset({OURS}))
    assert [copy.what for copy in copies] == [
        "2 folders with a batch that a training failed on",
        f"checkpoints of an unfinished training in {store.url}",
    ]
    for _ in range(2):  # going twice does no harm
        for copy in copies:
            copy.remove()
    assert [path.name for path in (settings.hidden_dir / "failed").iterdir()] == ["2"]
    assert list(store.list("checkpoints/")) == ["checkpoints/petshop/0123/manifest.json"]
    assert find_training(connect(settings, load_params(settings.params_path), store=store), frozenset({OURS})) == []
