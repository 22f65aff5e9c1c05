"""One training: its inputs, where it works, on what hardware, and what it is one of (a rank of a world)."""

import json
import platform
from dataclasses import asdict, dataclass

import numpy as np
import torch

from visionloop.data.manifest import is_experiment, load_version
from visionloop.data.shards import IntArray, Prepared
from visionloop.errors import DatasetError, ParamsError, shorten
from visionloop.networks import processor
from visionloop.networks.processor import BF16_FLAGS, read_cpu_flags
from visionloop.networks.weights import hash_weights
from visionloop.params import Compute, Params, Train
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


def read_hardware(params: Params, *, world_size: int = 1) -> Hardware:
    """Look at this machine, and resolve what params.yaml leaves open: bf16 where a GPU or the CPU's flags have it.

    Never by a timing. Raises ParamsError when a GPU is asked for where there is none.
    """
    accelerator = choose_accelerator(params.compute, count_gpus())
    name = torch.cuda.get_device_name() if accelerator == "gpu" else platform.machine()
    precision = params.train.precision
    if precision == "auto":
        precision = "bf16" if has_bf16(accelerator) else "fp32"
    return Hardware(accelerator, precision, torch.get_num_threads(), name, world_size)


def choose_accelerator(section: Compute, num_gpus: int) -> str:
    """Resolve `compute.accelerator` to cpu or gpu. Raises ParamsError when a GPU is asked for where there is none."""
    if section.accelerator == "gpu" and not num_gpus:
        raise ParamsError(
            "params.yaml compute.accelerator",
            f"got 'gpu', and torch {torch.__version__} sees none on this machine",
            "a GPU with its driver, or `auto` or `cpu`",
            "Look at `nvidia-smi` and CUDA_VISIBLE_DEVICES, or edit the file.",
        )
    return "gpu" if num_gpus and section.accelerator != "cpu" else "cpu"


def count_gpus() -> int:
    """Return how many GPUs torch can use here."""
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def has_bf16(accelerator: str) -> bool:
    """Say whether there are instructions for bf16; without them it is computed all the same, slowly."""
    if accelerator == "gpu":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return processor.has_bf16()


def list_remarks(hardware: Hardware, section: Train) -> list[str]:
    """Return what a person should hear before training starts: several processes, a precision that is slow here."""
    remarks = []
    if hardware.world_size > 1:
        each = section.batch_size / hardware.world_size
        remarks.append(f"{hardware.world_size} processes train together, each on {each:g} images of a batch")
    if hardware.precision == "bf16" and not has_bf16(hardware.accelerator):
        remarks.append(f"computing in {describe_precision(hardware, section)}")
    return remarks


def describe_precision(hardware: Hardware, section: Train) -> str:
    """Say which precision it is, and why: `fp32 (the CPU has neither amx_bf16 nor avx512_bf16)`."""
    fast = has_bf16(hardware.accelerator)
    if section.precision != "auto":
        why = "as train.precision says"
        if hardware.precision == "bf16" and not fast:
            why += ", but slowly: the processor has no instructions for it; `auto` would be faster"
    elif hardware.accelerator == "gpu":
        why = f"the GPU has {'it' if fast else 'no bf16'}"
    elif fast:
        why = f"the CPU has {' and '.join(sorted(BF16_FLAGS & read_cpu_flags()))}"
    else:
        why = f"the CPU has neither {' nor '.join(sorted(BF16_FLAGS))}"
    return f"{hardware.precision} ({why})"


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
        """Return the digest of all inputs but the hardware: the same training on any machine."""
        report = json.loads((self.prepared.folder / "report.json").read_text())
        section = self.params.train
        weights = hash_weights(section, self.settings.home)
        parts = [report, self.params.name, section.model_dump(mode="json"), self.code_digest, weights, self.start]
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
