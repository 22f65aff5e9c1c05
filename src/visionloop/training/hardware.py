"""What this machine computes with: recorded inputs of a training, since bits depend on them."""

import platform
from dataclasses import dataclass

import torch

from visionloop.errors import ParamsError
from visionloop.networks import processor
from visionloop.networks.processor import BF16_FLAGS, read_cpu_flags
from visionloop.params import Train


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


def read_hardware(section: Train | None = None, *, world_size: int = 1) -> Hardware:
    """Look at this machine, and resolve what `train` leaves open: bf16 where a GPU or the CPU's flags have it.

    Never by a timing. Raises ParamsError when a GPU is asked for where there is none.
    """
    section = section or Train()
    accelerator = choose_accelerator(section, count_gpus())
    name = torch.cuda.get_device_name() if accelerator == "gpu" else platform.machine()
    precision = section.precision
    if precision == "auto":
        precision = "bf16" if has_bf16(accelerator) else "fp32"
    return Hardware(accelerator, precision, torch.get_num_threads(), name, world_size)


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
