"""The Python interface on a whole workspace: every code block of docs/python.md, the tables, a model in S3."""

import importlib.metadata
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image

import visionloop
from s3_server import make_bucket, point_to, serve_s3
from shapes import ROOT
from trainings import Place, make_place
from visionloop.bundle import load_bundle, upload_bundle
from visionloop.data.manifest import load_pin
from visionloop.errors import BundleError, DatasetError, SettingsError, StoreError, describe_install
from visionloop.promotion.decide import gate
from visionloop.promotion.promote import promote, register
from visionloop.store import open_store
from visionloop.workspace import get_now
from worlds import write_bundle

NAME, BUCKET = "shapes", "s3://my-bucket/vision"
DOCUMENT = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```$", DOCUMENT, flags=re.M | re.S)


@dataclass(frozen=True)
class Loop:
    """A workspace with two judged models, of which the second is refused."""

    place: Place
    digest: str
    run_id: str

    @property
    def home(self) -> Path:
        return self.place.settings.home


@pytest.fixture(scope="module")
def loop(tmp_path_factory: pytest.TempPathFactory) -> Loop:
    place = make_place(tmp_path_factory.mktemp("python") / "ws").with_mlflow()
    made = [train(place, seed) for seed in (1, 2)]
    (digest, run_id) = made[0]
    return Loop(place, digest, run_id)


def train(place: Place, seed: int) -> tuple[str, str]:
    """Stand in for training and judging: a fake bundle and its run; the first is promoted, the second is refused."""
    params = {"train.way": "frozen", "train.backbone": f"seed-{seed}"}
    run_id = place.tracking.open_run("fake", run_id=None, tags={"visionloop.dataset_version": "1"}, params=params)
    settings, pin = place.settings, load_pin(place.settings.pin_path)
    digest = write_bundle(settings.candidate_dir, pin, seed, settings.runs_dir, run_id, name=NAME)
    place.tracking.set_tags(run_id, {"visionloop.bundle": digest})
    place.tracking.log_metrics(run_id, {"epoch": 1, "best/val_accuracy": 0.5 + seed / 10, "test/accuracy": 0.5})
    place.tracking.close_run(run_id)
    decision = gate(place, state={"seed": str(seed)}, now=get_now())
    if seed == 1:
        assert decision.verdict == "passed", decision
        register(place)
        promote(place, by="tester", why="the first", now=get_now())
    return digest, run_id


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    with serve_s3() as endpoint_url:
        yield endpoint_url


@pytest.fixture
def in_store(loop: Loop, bucket: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The address of the champion in a bucket."""
    point_to(monkeypatch, bucket)
    make_bucket(bucket, "my-bucket")
    folder = loop.home / ".visionloop" / "bundles" / loop.digest
    visionloop.load(f"{NAME}@champion", workspace=loop.home)
    upload_bundle(open_store(BUCKET), load_bundle(folder))
    return f"{BUCKET}/bundles/{loop.digest}"


def test_every_block_of_the_document_runs(
    loop: Loop, in_store: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert len(BLOCKS) == len(re.findall("^```(?:python)", DOCUMENT, flags=re.M)) == 7
    monkeypatch.chdir(loop.home)
    pixels = np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((300, 200)).save("photo.jpg")
    Path("broken.jpg").write_bytes(b"text")
    names: dict[str, Any] = {}
    said = []
    for block in BLOCKS:
        exec(compile(block.replace("pets@", f"{NAME}@"), "docs/python.md", "exec"), names)
        said.append(capsys.readouterr().out)
    assert re.match(r"(disc|ring) 0\.\d+ {'disc': 0\.\d+, 'ring': 0\.\d+}\n$", said[0])
    assert f"bundle {loop.digest[:12]} from {NAME}@champion>\n('disc', 'ring') (32, 32) 1\n" in said[1]
    assert names["same"].digest == names["champion"].digest == loop.digest
    assert "broken.jpg not_an_image broken.jpg: is text, not an image" in said[3]
    assert np.isnan(names["vectors"]).all(axis=1).tolist() == [False, True]
    assert "test   disc      4" in said[4]
    assert len(re.findall(r"^\d +\d\.\d+ +(?:disc|ring) +(?:train|val|test) +\S+\.png$", said[5], re.M)) == 5
    assert re.match(r"(disc|ring) (disc|ring)\n$", said[6])


def test_a_model_in_s3_is_checked_and_leaves_nothing_behind(
    loop: Loop, in_store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    monkeypatch.chdir(tmp_path)
    model = visionloop.load(in_store)
    assert model.predict(np.zeros((9, 9), np.uint8)).prediction in {"disc", "ring"}
    assert list((tmp_path / "tmp").iterdir()) == []
    store = open_store(BUCKET)
    whole = store.get(f"bundles/{loop.digest}/card.json")
    store.put(f"bundles/{loop.digest}/card.json", whole.replace(b"squash", b"crush!"))
    with pytest.raises(BundleError, match=r"card\.json differs from its digest"):
        visionloop.load(in_store)
    store.delete(f"bundles/{loop.digest}/card.json")
    with pytest.raises(BundleError, match="is not whole in s3://my-bucket/vision"):
        visionloop.load(in_store)
    with pytest.raises(StoreError, match="no-such-bucket"):
        visionloop.load(in_store.replace("my-bucket", "no-such-bucket"))


def test_the_tables_hold_what_the_commands_show(loop: Loop) -> None:
    workspace = visionloop.open_workspace(loop.home)
    [version] = workspace.datasets().to_dict("records")
    assert {key: version[key] for key in ("version", "num_images", "train", "val", "test", "excluded", "pinned")} == {
        "version": 1, "num_images": 72, "train": 48, "val": 16, "test": 8, "excluded": 0, "pinned": True,
    }  # fmt: skip
    assert version["classes"] == ("disc", "ring")
    assert version["created_at"] == pd.Timestamp("2026-01-01T00:00:00Z")

    images = workspace.images()
    assert len(images) == 72
    assert images.sha256.is_monotonic_increasing
    assert set(images.label) == {"disc", "ring"}
    assert images.side.value_counts().to_dict() == {"train": 48, "val": 16, "test": 8}
    assert images.origin.str.endswith(".png").all()
    assert images.labels[0] == (images.label[0],)
    assert (images.width == 40).all()
    assert images.equals(workspace.images(1))

    runs = workspace.runs()
    assert runs.backbone.tolist() == ["seed-2", "seed-1"]
    assert runs.champion.tolist() == [False, True]
    assert runs.candidate.tolist() == [True, False]
    assert runs.run[1] == loop.run_id
    assert runs.val_accuracy.tolist() == [0.7, 0.6]
    assert runs["params.train.way"].tolist() == ["frozen", "frozen"]
    assert runs["metrics.test/accuracy"].tolist() == runs.test_accuracy.tolist() == [0.5, 0.5]

    decisions = workspace.decisions()
    assert decisions.number.tolist() == [1, 2]
    assert decisions.passed.tolist() == [True, False]
    assert decisions.held_back_by[0] == ()
    assert decisions.held_back_by[1] == ("better",)
    assert decisions.champion[1] == loop.digest
    assert decisions.champion_accuracy[1] == decisions.accuracy[0]

    history = workspace.history()
    assert history[["number", "action", "bundle", "by", "why", "dataset_version", "champion"]].to_dict("records") == [
        {"number": 1, "action": "promote", "bundle": loop.digest, "by": "tester", "why": "the first",
         "dataset_version": 1, "champion": True}
    ]  # fmt: skip
    assert history["at"].dt.tz is not None


def test_a_new_workspace_has_empty_tables_with_their_columns(tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_text("name: pets\n")
    workspace = visionloop.open_workspace(str(tmp_path))
    for table, column in (
        ("datasets", "pinned"),
        ("runs", "val_accuracy"),
        ("decisions", "verdict"),
        ("history", "by"),
    ):
        frame = getattr(workspace, table)()
        assert len(frame) == 0
        assert column in frame.columns
    with pytest.raises(DatasetError, match="this workspace has no images yet"):
        workspace.images()
    with pytest.raises(DatasetError, match="dataset pets version 9: is not in the store"):
        workspace.images(9)
    with pytest.raises(SettingsError, match=r"no params\.yaml here or above"):
        visionloop.open_workspace(tmp_path.parent / "nowhere")


def test_opening_a_workspace_leaves_the_environment_alone(loop: Loop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_DISABLE_TELEMETRY")
    before = dict(os.environ)
    visionloop.open_workspace(loop.home)
    assert dict(os.environ) == {**before, "MLFLOW_DISABLE_TELEMETRY": "true"}


@pytest.mark.parametrize("package", ["pandas", "mlflow"])
def test_a_missing_package_is_named(loop: Loop, monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    version = importlib.metadata.version

    def refuse(name: str) -> str:
        if name == package:
            raise importlib.metadata.PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr("visionloop.api.version", refuse)
    with pytest.raises(
        SettingsError, match=rf"{package}: is not installed; .* `{re.escape(describe_install('train'))}`"
    ):
        visionloop.open_workspace(loop.home).runs()
