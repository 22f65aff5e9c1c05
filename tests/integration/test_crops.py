"""Training on images that were prepared larger: another crop in each epoch, the same ones after a resume."""

from pathlib import Path

import numpy as np
import pytest
from shapes import PARAMS, make_workspace, visionloop

from visionloop.data.shards import load_prepared


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = make_workspace(tmp_path_factory.mktemp("crops") / "w")
    params = PARAMS.replace("EPOCHS", "2").replace("{image_size: 32}", "{image_size: 32, train_size: 40}")
    (home / "params.yaml").write_text(params)
    done = visionloop(home, "prepare")
    assert done.returncode == 0, done.stderr
    return home


def test_crops_differ_from_epoch_to_epoch_and_validation_sees_the_middle(home: Path) -> None:
    from visionloop.training.datamodule import PreparedData

    prepared = load_prepared(home / "data" / "prepared")
    data = PreparedData(prepared, batch_size=16, seed=3)

    def read_epoch(epoch: int) -> np.ndarray:
        loader = data.train_dataloader()
        loader.sampler.set_epoch(epoch)
        images_nhwc = np.concatenate([images.numpy() for images, _ in loader])
        rows = np.concatenate(list(loader.sampler))
        return images_nhwc[np.argsort(rows)]

    first, second = read_epoch(0), read_epoch(1)
    assert first.shape == (len(prepared.rows("train")), 32, 32, 3)
    assert (first != second).any(axis=(1, 2, 3)).mean() > 0.9
    assert (second == read_epoch(1)).all(), "a resumed run sees what it would have seen"
    val = np.concatenate([images.numpy() for images, _ in data.val_dataloader()])
    assert (val == prepared.read(prepared.rows("val"))).all()
