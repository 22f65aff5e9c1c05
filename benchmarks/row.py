"""One row of the benchmark table, and how a command is timed."""

import statistics
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

HEADER = "| what | visionloop | baseline | ratio |\n|---|---|---|---|"


@dataclass(frozen=True)
class Row:
    """A measured path beside its baseline, both from the same run, as medians in one unit."""

    what: str
    visionloop: float
    baseline: float
    unit: str
    baseline_is: str

    def to_markdown(self) -> str:
        """Return the row. The ratio is visionloop over baseline, also where less is better."""
        ours, plain = f"{self.visionloop:,.2f} {self.unit}", f"{self.baseline:,.2f} {self.unit} ({self.baseline_is})"
        return f"| {self.what} | {ours} | {plain} | {self.visionloop / self.baseline:.2f} x |"


def time_commands(
    first: Sequence[str], second: Sequence[str], *, repeats: int, cwd: Path, env: Mapping[str, str]
) -> tuple[float, float]:
    """Run two commands in turn, so that a busy machine slows both. Return the median wall seconds of each.

    A first run of each is not counted. Raises CalledProcessError if one fails.
    """
    seconds: tuple[list[float], list[float]] = ([], [])
    for repeat in range(repeats + 1):
        for command, kept in zip((first, second), seconds, strict=True):
            started = time.perf_counter()
            subprocess.run(command, cwd=cwd, env=dict(env), check=True, capture_output=True)
            if repeat:
                kept.append(time.perf_counter() - started)
    return statistics.median(seconds[0]), statistics.median(seconds[1])
