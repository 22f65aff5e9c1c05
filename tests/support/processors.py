"""Processors that are pretended, and how far apart two precisions may be: the suite answers the same on every machine.

`TEST_CPU=bf16 make test` (or `fp32`) runs the suite as if this processor had instructions for bf16, or had none.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from visionloop.networks import processor

FLAGS = {"bf16": "fpu avx2 avx512f avx512_bf16", "fp32": "fpu avx2 avx512f"}

# How far one network's vectors in two precisions may be apart, relative to their length.
# fp32: the order of sums differs between kernels. bf16 keeps 8 bits of a number, so that rounding errs by 2^-8 of it at
# most. Each of small_cnn's 6 convolutions rounds its inputs and its weights: 12 errors, which do not know each other,
# add up as the square root of 12.
RELATIVE = {"fp32": 1e-5, "bf16": math.sqrt(12) * 2.0**-8}


@contextmanager
def pretending(kind: str, folder: Path) -> Iterator[None]:
    """Let this process take its processor for one with bf16, or for one without."""
    before, processor.CPUINFO = processor.CPUINFO, folder / f"cpuinfo-{kind}"
    processor.CPUINFO.write_text(f"model name\t: Pretended {kind}\nflags\t\t: {FLAGS[kind]}\n")
    yield
    processor.CPUINFO = before


def refuse_to_measure(steps: Mapping[str, Callable[[], object]], num_images: int) -> dict[str, float]:
    """Stand in for `processor.time_in_turn`: what a test trains and embeds with does not follow its machine."""
    raise AssertionError(f"a test inherits `auto`: fix train.precision and embed.runtime ({', '.join(steps)} of here)")


class Stopwatch:
    """Stands in for `processor.time_in_turn`: gives the speeds that a test wants, and counts its calls."""

    def __init__(self, **images_per_s: float) -> None:
        self.images_per_s = {name.replace("_", " "): speed for name, speed in images_per_s.items()}
        self.calls = 0

    def __call__(self, steps: Mapping[str, Callable[[], object]], num_images: int) -> dict[str, float]:
        """Run each step once, and say how fast it was."""
        self.calls += 1
        for step in steps.values():
            step()
        return {name: self.images_per_s[name] for name in steps}


def measure_distance(ours_nd: NDArray[np.float32], theirs_nd: NDArray[np.float32]) -> float:
    """Return the largest difference of two vectors of one row, relative to the length of the second."""
    return float((np.linalg.norm(ours_nd - theirs_nd, axis=1) / np.linalg.norm(theirs_nd, axis=1)).max())
