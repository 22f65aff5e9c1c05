"""One training: its inputs, the hardware it runs on, and how it was called."""

import importlib.metadata
import json
import platform
from dataclasses import asdict, dataclass, field
from functools import cached_property

import torch

from visionloop.data.shards import IntArray, Prepared
from visionloop.networks import processor
from visionloop.networks.processor import BF16_FLAGS, read_cpu_flags
from visionloop.networks.weights import hash_weights
from visionloop.params import Params, Train
from visionloop.records import compute_digest
from visionloop.training.checks import find_train_rows
from visionloop.training.ranks.world import World, choose_accelerator, count_gpus
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
        """The input key: equal keys mean equal bits, so work under it may be gone on with."""
        return compute_digest([self.inputs_digest, asdict(self.hardware), torch.__version__])

    @cached_property
    def inputs_digest(self) -> str:
        """The digest of all inputs but the hardware: the same training on any machine."""
        report = json.loads((self.prepared.folder / "report.json").read_text())
        section = self.params.train
        weights = hash_weights(section, self.settings.home)
        parts = [report, self.params.name, section.model_dump(mode="json"), self.code_digest, weights, self.start]
        return compute_digest([*parts, torch.__version__.partition("+")[0]])

    def list_facts(self) -> dict[str, str]:
        """Return what all ranks must have in common, under the words that say so where one has something else."""
        return {
            "another params.yaml": compute_digest(self.params.model_dump(mode="json")),
            "another data/prepared": compute_digest(json.loads((self.prepared.folder / "report.json").read_text())),
            "another code of visionloop": f"{self.code_digest} {importlib.metadata.version('visionloop')}",
            "other hardware": f"{self.hardware.accelerator} {self.hardware.precision}",
        }
