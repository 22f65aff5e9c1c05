"""One training: its inputs, where it works, and what it is one of (a rank of a world)."""

import json
from dataclasses import asdict, dataclass

import numpy as np

from visionloop.data.manifest import is_experiment, load_version
from visionloop.data.shards import IntArray, Prepared
from visionloop.errors import DatasetError, shorten
from visionloop.networks.weights import hash_weights
from visionloop.params import Params
from visionloop.records import compute_digest
from visionloop.settings import Settings
from visionloop.store import ObjectStore
from visionloop.tracking import Tracking
from visionloop.training.hardware import Hardware
from visionloop.training.watch import Watcher


@dataclass(frozen=True)
class World:
    """The processes that train together, and which of them this is. Rank 0 alone writes, logs and tells."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @property
    def is_first(self) -> bool:
        return self.rank == 0


@dataclass(frozen=True)
class Job:
    """One training. `start` is the digest of the bundle that the way `warm` begins with; None for other ways."""

    settings: Settings
    params: Params
    store: ObjectStore
    tracking: Tracking
    prepared: Prepared
    hardware: Hardware
    code_digest: str
    watcher: Watcher
    validated_on: str = "val"
    start: str | None = None
    world: World = World()

    @property
    def train_rows(self) -> IntArray:
        """The rows to learn from: the training side, with `train.on: all` the validation side too."""
        sides = ["train", self.validated_on] if self.params.train.on == "all" else ["train"]
        return np.flatnonzero(np.isin(self.prepared.side_n, sides))

    @property
    def val_rows(self) -> IntArray:
        """The rows that epochs are judged on; none with `train.on: all`."""
        return self.prepared.rows(self.validated_on)[: 0 if self.params.train.on == "all" else None]

    def make_key(self) -> str:
        """Return the input key: equal keys mean equal bits, so work under it may be gone on with."""
        report = json.loads((self.prepared.folder / "report.json").read_text())
        section = self.params.train
        weights = hash_weights(section, self.settings.home)
        parts = [report, self.params.name, section.model_dump(mode="json"), asdict(self.hardware)]
        return compute_digest([*parts, self.code_digest, weights, self.start])


def choose_validation(prepared: Prepared, store: ObjectStore) -> str:
    """Return the side that epochs are judged on: val, or test in an experiment that has no val. Raises DatasetError."""
    if len(prepared.rows("val")):
        return "val"
    return "test" if is_experiment(load_version(store, prepared.pin.name, prepared.pin.version)) else "val"


def check_sides(prepared: Prepared, validated_on: str = "val") -> None:
    """Raise DatasetError unless train has every class and validation has an image."""
    train, val = prepared.rows("train"), prepared.rows(validated_on)
    counts = np.bincount(prepared.label_n[train], minlength=len(prepared.classes))
    where = f"dataset {prepared.pin.name} version {prepared.pin.version}"
    if empty := [name for name, count in zip(prepared.classes, counts, strict=True) if not count]:
        raise DatasetError(where, f"no training image of {shorten(empty)}", "one or more", "Add images of it.")
    if len(train) < 2 or not len(val):
        raise DatasetError(
            where,
            f"{len(train)} training and {len(val)} validation images",
            "two or more for training and one or more for validation",
            "Add images, or change ingest.split.fractions under a new `name`.",
        )
