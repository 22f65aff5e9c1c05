"""One training: its inputs, the hardware it runs on, and how it was called."""

import importlib.metadata
import json
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

import torch

from visionloop.data.shards import IntArray, Prepared
from visionloop.features.view import load_facts
from visionloop.params import WAYS_ON_EMBEDDINGS
from visionloop.params.train import AFTER_TRAINING
from visionloop.records import compute_digest
from visionloop.training.checks import find_train_rows
from visionloop.training.ranks.world import World
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


@dataclass(frozen=True)
class Call:
    """How a training was called: when, by which code, who is told about it, and as which rank of which world."""

    now: str = ""
    code_digest: str = ""
    watcher: Watcher = field(default_factory=Watcher)
    world: World = field(default_factory=World)


@dataclass(frozen=True)
class Job(Workspace):
    """A workspace with what one training in it adds. `start`: the bundle that the way `warm` begins with, else None."""

    prepared: Prepared
    hardware: Hardware
    code_digest: str
    watcher: Watcher
    validated_on: str = "val"
    start: str | None = None
    world: World = field(default_factory=World)

    @property
    def train_rows(self) -> IntArray:
        """The rows to learn from: the training side, with `train.on: all` the validation side too."""
        return find_train_rows(self.params.train, self.prepared, self.validated_on)

    @property
    def val_rows(self) -> IntArray:
        """The rows that epochs are judged on; none with `train.on: all`."""
        return self.prepared.rows(self.validated_on)[: 0 if self.params.train.on == "all" else None]

    @cached_property
    def key(self) -> str:
        """The input key: equal keys mean equal bits of a network, so work under it may be gone on with."""
        return compute_digest([self.inputs_digest, asdict(self.hardware), torch.__version__])

    @cached_property
    def inputs_digest(self) -> str:
        """The digest of all inputs of the network but the hardware: the same training on any machine.

        Raises:
            DatasetError: the way learns from embeddings, and there are none.
        """
        from visionloop.networks.weights import hash_weights

        report = json.loads((self.prepared.folder / "report.json").read_text())
        section = self.params.train
        keys = section.model_dump(mode="json", exclude=set(AFTER_TRAINING))
        weights = hash_weights(section, self.settings.home)
        parts = [report, self.params.name, keys, self.code_digest, weights, self.start]
        if section.way in WAYS_ON_EMBEDDINGS:  # another runtime or precision gives other vectors
            parts.append(load_facts(self.settings.features_dir).digest)
        return compute_digest([*parts, torch.__version__.partition("+")[0]])

    @property
    def ending(self) -> dict[str, Any]:
        """What decides how a finished network is packed, by key: thresholds, engines, the limit on pixels."""
        keys = self.params.train.model_dump(mode="json", include=set(AFTER_TRAINING))
        return {f"train.{k}": v for k, v in keys.items()} | {"ingest.max_pixels": self.params.ingest.max_pixels}

    def list_facts(self) -> dict[str, str]:
        """Return what all ranks must have in common, under the words that say so where one has something else."""
        return {
            "another params.yaml": compute_digest(self.params.model_dump(mode="json")),
            "another data/prepared": compute_digest(json.loads((self.prepared.folder / "report.json").read_text())),
            "another code of visionloop": f"{self.code_digest} {importlib.metadata.version('visionloop')}",
            "other hardware": f"{self.hardware.accelerator} {self.hardware.precision}",
        }
