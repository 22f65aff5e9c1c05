"""One training: its inputs, where it works, on what hardware, and what it is one of (a rank of a world)."""

import json
from dataclasses import asdict, dataclass

import numpy as np
import torch

from visionloop.data.manifest import is_experiment, load_version
from visionloop.data.shards import IntArray, Prepared
from visionloop.errors import DatasetError, ParamsError, shorten
from visionloop.features.view import load_facts
from visionloop.networks.weights import hash_weights
from visionloop.params import WAYS_ON_EMBEDDINGS, Train
from visionloop.records import compute_digest
from visionloop.store import ObjectStore
from visionloop.training.watch import Watcher
from visionloop.workspace import Workspace


@dataclass(frozen=True)
class Hardware:
    """Accelerator (cpu or gpu), precision (bf16 or fp32), torch threads a process, the processor's kind, processes."""

    accelerator: str
    precision: str
    threads: int
    processor: str
    world_size: int = 1

    @property
    def lightning_precision(self) -> str:
        return "bf16-mixed" if self.precision == "bf16" else "32-true"


def choose_accelerator(section: Train, num_gpus: int) -> str:
    """Resolve `train.accelerator` to cpu or gpu. Raises ParamsError when a GPU is asked for where there is none."""
    if section.accelerator == "gpu" and not num_gpus:
        raise ParamsError(
            "params.yaml train.accelerator",
            f"got 'gpu', and torch {torch.__version__} sees none on this machine",
            "a GPU with its driver, or `auto` or `cpu`",
            "Look at `nvidia-smi` and CUDA_VISIBLE_DEVICES, or edit the file.",
        )
    return "gpu" if num_gpus and section.accelerator != "cpu" else "cpu"


def count_gpus() -> int:
    """Return how many GPUs torch can use here."""
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


@dataclass(frozen=True)
class World:
    """The processes that train together, and which of them this is. Rank 0 alone writes, logs and tells.

    `local_rank` of `local_size` is its place on this machine; `on_ray`: they are workers of Ray Train.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    on_ray: bool = False

    @property
    def is_first(self) -> bool:
        return self.rank == 0


@dataclass(frozen=True)
class Job(Workspace):
    """A workspace with what one training in it adds. `start`: the bundle that the way `warm` begins with, else None."""

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
        return compute_digest([self.make_inputs_digest(), asdict(self.hardware), torch.__version__])

    def make_inputs_digest(self) -> str:
        """Return the digest of all inputs but the hardware: the same training on any machine.

        Raises:
            DatasetError: the way learns from embeddings, and there are none.
        """
        report = json.loads((self.prepared.folder / "report.json").read_text())
        section = self.params.train
        weights = hash_weights(section, self.settings.home)
        parts = [report, self.params.name, section.model_dump(mode="json"), self.code_digest, weights, self.start]
        if section.way in WAYS_ON_EMBEDDINGS:  # another runtime or precision gives other vectors
            parts.append(load_facts(self.settings.features_dir).digest)
        return compute_digest([*parts, torch.__version__.partition("+")[0]])


def choose_validation(prepared: Prepared, store: ObjectStore) -> str:
    """Return the side that epochs are judged on: val, or test in an experiment that has no val. Raises DatasetError."""
    if len(prepared.rows("val")):
        return "val"
    return "test" if is_experiment(load_version(store, prepared.pin.name, prepared.pin.version)) else "val"


def check_sides(prepared: Prepared, validated_on: str = "val") -> None:
    """Raise DatasetError unless train has every class and validation has an image."""
    train, val = prepared.rows("train"), prepared.rows(validated_on)
    counts, others = (prepared.count_classes(rows) for rows in (train, np.flatnonzero(prepared.side_n != "train")))
    others = prepared.count_classes(np.flatnonzero(prepared.side_n != "train"))
    where = f"dataset {prepared.pin.name} version {prepared.pin.version}"
    if empty := [k for k, count in enumerate(counts) if not count]:
        held = f", of which the other sides have {int(others[empty].sum()):,}" if others[empty].any() else ""
        raise DatasetError(
            where,
            f"no training image of {shorten([prepared.classes[k] for k in empty])}{held}",
            "one or more on the training side",
            "Add images of it.",
        )
    if len(train) < 2 or not len(val):
        raise DatasetError(
            where,
            f"{len(train)} training and {len(val)} validation images",
            "two or more for training and one or more for validation",
            "Add images, or change ingest.split.fractions under a new `name`.",
        )
