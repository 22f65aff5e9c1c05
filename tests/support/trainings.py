"""Workspaces that train in this process: shapes prepared without a command, an MLflow in memory, networks that fail."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from memory_tracking import MemoryTracking
from shapes import write_shapes
from visionloop.networks import backbones
from visionloop.networks.names import read_backbones
from visionloop.params import Params, load_params
from visionloop.records import ImageRecord, RunNote
from visionloop.settings import load_settings
from visionloop.store import ObjectStore, open_store
from visionloop.tracking import MlflowTracking
from visionloop.training.checks import TrainingData, check_training
from visionloop.training.fit import Trained, learn, make_job, train
from visionloop.training.job import Call, Job
from visionloop.training.watch import EpochReport, Watcher
from visionloop.workspace import Workspace
from workspaces import NOW, build, store_image

PARAMS: dict[str, Any] = {
    "gate": {"min_images": {"all": 4, "per_class": 0}, "baseline": {"mode": "off"}},
    "name": "shapes",
    "embed": {"batch_size": 500, "runtime": "onnxruntime"},
    "prepare": {"image_size": 32},
    "train": {
        "backbone": "small_cnn",
        "max_epochs": 4,
        "batch_size": 8,
        "learning_rate": 3e-3,
        "patience": 50,
        "precision": "fp32",
    },
    "evaluate": {"resamples": 200},
}


class Ear(Watcher):
    """Keeps what it is told. `stop_at` raises after that epoch, as Ctrl-C there would."""

    wants_pictures = False

    def __init__(self, stop_at: int | None = None) -> None:
        self.lines: list[str] = []
        self.epochs: list[EpochReport] = []
        self.stop_at = stop_at

    def tell(self, line: str) -> None:
        self.lines.append(line)

    def on_epoch(self, report: EpochReport) -> None:
        self.epochs.append(report)
        if report.epoch == self.stop_at:
            raise KeyboardInterrupt

    def said(self, text: str) -> bool:
        return any(text in line for line in self.lines)


@dataclass(frozen=True)
class Place(Workspace):
    """A workspace with prepared shapes, and how to train in it from here."""

    tracking: Any = field(default_factory=MemoryTracking)

    @property
    def checkpoints(self) -> Path:
        """The folder of the one training that is there."""
        (folder,) = self.settings.work_dir("train").glob("*/checkpoints")
        return folder

    def with_train(self, **keys: Any) -> "Place":
        """Return the same place with other keys in `train`."""
        return replace(self, params=replace_train(self.params, **keys))

    def with_mlflow(self) -> "Place":
        """Return the same place with a real MLflow (SQLite) behind it."""
        settings = self.settings
        return replace(self, tracking=MlflowTracking(settings.tracking_uri, settings.artifact_root, self.params.name))

    def check(self) -> TrainingData:
        """Open the data, and check it and the params, with the networks that tests have registered."""
        return check_training(self)

    def make_job(self, watcher: Watcher | None = None) -> Job:
        return make_job(self, self.check(), Call(watcher=watcher or Watcher()))

    def learn(self, watcher: Watcher | None = None, *, work: Path | None = None) -> Trained:
        """Train without a bundle, in a work folder that stays."""
        work = work or self.settings.work_dir("train") / "learn"
        work.mkdir(parents=True, exist_ok=True)
        run_id = self.tracking.open_run("run", run_id=f"{1:032x}", tags={}, params={})
        return learn(self.make_job(watcher), work, run_id)

    def train(self, watcher: Watcher | None = None, *, code: str = "") -> RunNote:
        """Run the whole stage. `code`: the digest of the code, which the command adds to the inputs."""
        note = train(self, self.check(), Call(NOW, code, watcher or Watcher()))
        assert note is not None
        return note


def replace_train(params: Params, **keys: Any) -> Params:
    """Return the params with other keys in `train`, validated."""
    return params.model_copy(update={"train": type(params.train)(**{**params.train.model_dump(), **keys})})


def make_place(
    home: Path,
    *,
    counts: Mapping[str, tuple[int, int, int]] | None = None,
    store_url: str | None = None,
    size: int = 32,
    compute: Mapping[str, Any] | None = None,
    **train_keys: Any,
) -> Place:
    """Make a workspace: `counts` is the number of images of each class for train, val and test."""
    counts = counts or {"disc": (24, 8, 4), "ring": (24, 8, 4)}
    home.mkdir(parents=True, exist_ok=True)
    values = {**PARAMS, "prepare": {"image_size": size}, "train": {**PARAMS["train"], **train_keys}}
    values["compute"] = dict(compute or {})
    (home / "params.yaml").write_text(json.dumps(values))
    settings = load_settings({"VISIONLOOP_STORE": store_url} if store_url else {}, home)
    params, store = load_params(settings.params_path), open_store(settings.store_url)
    records = [record for name, numbers in counts.items() for record in _make_records(home, store, name, numbers)]
    return Place(**{**vars(build(settings, params, store, records, prepared=True)), "tracking": MemoryTracking()})


def _make_records(home: Path, store: ObjectStore, name: str, numbers: tuple[int, int, int]) -> Iterator[ImageRecord]:
    seed = int.from_bytes(name.encode()[:3], "big")
    folder = write_shapes(home / "photos", sum(numbers), seed=seed, classes=(name,)) / name
    sides = [side for side, number in zip(("train", "val", "test"), numbers, strict=True) for _ in range(number)]
    for path, side in zip(sorted(folder.glob(f"{seed}-*.png")), sides, strict=True):
        facts = {"labels": (name,), "sources": ("shapes",), "origins": (path.name,), "side": side}
        yield store_image(store, 0, data=path.read_bytes(), width=40, height=40, **facts)


class Tiny(nn.Module):
    """A backbone of a few hundred weights. `fault(features, images, is_training)` may change or refuse its output."""

    def __init__(self, fault: Any = None) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 8, 5, stride=4), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 16)
        )
        self.fault = fault

    def forward(self, images_nchw: Tensor) -> Tensor:
        features_nd: Tensor = self.features(images_nchw)
        return self.fault(features_nd, images_nchw, self.training) if self.fault else features_nd


@contextmanager
def registered(fault: Any = None, name: str = "tiny") -> Iterator[str]:
    """Let `train.backbone` know a network that fails as `fault` says."""
    backbones.OWN[name] = lambda size_hw: Tiny(fault)
    read_backbones()[name] = "own"
    try:
        yield name
    finally:
        del backbones.OWN[name], read_backbones()[name]


def same_weights(ours: Trained, theirs: Trained) -> bool:
    """Say whether two trainings ended in the same bits."""
    a, b = ours.classifier.state_dict(), theirs.classifier.state_dict()
    return list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in a)


def read_json(path: Path) -> Any:
    return json.loads(path.read_text())
