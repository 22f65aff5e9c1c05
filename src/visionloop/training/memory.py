"""Out of memory: fewer images at a time for the same step, remembered in the work folder. Trains nothing itself."""

import gc
import json
import re
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from visionloop.errors import TrainingError
from visionloop.params import Train
from visionloop.records import canonical_json
from visionloop.training.checkpoints import write_file

FILE = "memory.json"
# What torch says on a CPU (Linux, then others) and where a library of the GPU finds no room for itself.
_SIGNS = re.compile(
    r"DefaultCPUAllocator: (can't allocate|not enough) memory|out of memory|(CUBLAS|CUDNN)_STATUS_ALLOC_FAILED",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class MemoryPlan:
    """How many images are in memory at a time: asked for, possible, and of how many that make a step."""

    batch_in_memory: int
    batch_size: int
    step_size: int

    @property
    def accumulate(self) -> int:
        """The parts that a step is made of."""
        return -(-self.step_size // self.batch_in_memory)

    @property
    def is_reduced(self) -> bool:
        """Whether it is less than params.yaml asks for."""
        return self.batch_in_memory < self.batch_size

    def halve(self) -> "MemoryPlan":
        """Return the plan with half as many images at a time. Raises TrainingError below one image."""
        if self.batch_in_memory == 1:
            raise TrainingError(
                "train",
                "not even one image at a time fits into memory",
                "a network and images that fit",
                "Take smaller images (prepare.image_size), a smaller train.backbone, or a machine with more memory.",
            )
        return replace(self, batch_in_memory=self.batch_in_memory // 2)


def load_plan(work: Path, section: Train) -> MemoryPlan:
    """Return the plan of params.yaml, or the smaller one that an earlier process found it needs."""
    try:
        known = int(json.loads((work / FILE).read_text())["batch_in_memory"])
    except (OSError, ValueError, KeyError, TypeError):
        known = section.batch_size
    return MemoryPlan(
        batch_in_memory=min(max(known, 1), section.batch_size),
        batch_size=section.batch_size,
        step_size=section.batch_size * section.accumulate,
    )


def keep_plan(work: Path, plan: MemoryPlan) -> None:
    """Let the next process begin with this plan."""
    write_file(work / FILE, canonical_json({"batch_in_memory": plan.batch_in_memory}))


def is_out_of_memory(error: BaseException) -> bool:
    """Say whether an error means that there is no memory left, on a GPU or for torch or numpy on a CPU."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and _SIGNS.search(str(error)) is not None


def release_memory() -> None:
    """Give back what a failed attempt held. Its exception must be gone: its frames hold the tensors."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
