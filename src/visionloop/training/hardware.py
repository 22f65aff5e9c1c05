"""What this machine computes with: recorded inputs of a training, since bits depend on them."""

import platform
from dataclasses import dataclass
from pathlib import Path

import torch

BF16_FLAGS = frozenset({"avx512_bf16", "amx_bf16"})


@dataclass(frozen=True)
class Hardware:
    """Accelerator (cpu or gpu), precision (bf16 or fp32), torch threads and the processor's kind."""

    accelerator: str
    precision: str
    threads: int
    processor: str

    @property
    def lightning_precision(self) -> str:
        return "bf16-mixed" if self.precision == "bf16" else "32-true"


def read_hardware() -> Hardware:
    """Look at this machine: bf16 where a GPU or the CPU's flags have it, never by a timing."""
    if torch.cuda.is_available():
        precision = "bf16" if torch.cuda.is_bf16_supported() else "fp32"
        return Hardware("gpu", precision, torch.get_num_threads(), torch.cuda.get_device_name())
    precision = "bf16" if BF16_FLAGS & read_cpu_flags() else "fp32"
    return Hardware("cpu", precision, torch.get_num_threads(), platform.machine())


def read_cpu_flags(cpuinfo: Path = Path("/proc/cpuinfo")) -> frozenset[str]:
    """Return the CPU's feature flags; empty where the system does not tell."""
    try:
        lines = cpuinfo.read_text().splitlines()
    except OSError:
        return frozenset()
    return frozenset(next((line.partition(":")[2] for line in lines if line.startswith("flags")), "").split())
