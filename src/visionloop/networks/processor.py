"""What this machine's processors can do: as the system says, or measured once and kept. No torch: it takes seconds.

.visionloop/machine.json    {"measured": [...]}: what was timed on which processor, and how fast each candidate was

Flags alone do not tell: `avx512_bf16` without `amx_bf16` trains ResNet18 more slowly in bf16 than in fp32, on one
processor, and twice as fast on another.
"""

import contextlib
import json
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from visionloop.parallel import count_cores
from visionloop.workfolder import write_file

CPUINFO = Path("/proc/cpuinfo")
BF16_FLAGS = frozenset({"avx512_bf16", "amx_bf16"})
VNNI_FLAGS = frozenset({"avx512_vnni", "avx_vnni"})
# NVIDIA's driver, NVIDIA under WSL, AMD's driver.
GPU_DEVICES = (Path("/dev/nvidiactl"), Path("/dev/dxg"), Path("/dev/kfd"))
MACHINE_FILE = "machine.json"
# Another candidate than the first is taken only where it is this much faster, and gives the same vectors. Those of
# another runtime share no table with those of other machines: noise shall not decide over that.
LEAST_GAIN, LEAST_GAIN_OF_ENCODERS = 1.1, 1.25
MIN_COSINE = 0.999
# A calm measurement ends after so many rounds or this time, and never before a few rounds; any after the limit.
MAX_ROUNDS, QUICK_S, LIMIT_S, FEW_ROUNDS = 20, 0.7, 5.0, 3


def read_cpu_flags() -> frozenset[str]:
    """Return the CPU's feature flags; empty where the system does not tell."""
    return frozenset(_read_cpuinfo("flags").split())


def read_cpu_name() -> str:
    """Return what the CPU calls itself; its architecture where the system does not tell."""
    return _read_cpuinfo("model name").strip() or platform.machine()


def has_bf16() -> bool:
    """Say whether the CPU has instructions that multiply bf16 matrices; without them bf16 is slower than fp32."""
    return bool(BF16_FLAGS & read_cpu_flags())


def sums_int8_exactly() -> bool:
    """Say whether products of int8 are summed without loss. x86 before VNNI cuts pairs of them off at 16 bits."""
    return platform.machine().lower() not in {"x86_64", "amd64", "i686"} or bool(VNNI_FLAGS & read_cpu_flags())


def may_have_gpu() -> bool:
    """Say whether a GPU's driver is there. Without one torch need not be asked; with one, it has the last word."""
    return any(device.exists() for device in GPU_DEVICES)


def describe_machine(*libraries: str) -> dict[str, Any]:
    """Return what decides, beside a graph and its input, over the last bits of what libraries compute with them."""
    processor = [read_cpu_name(), *sorted(read_cpu_flags())]
    return {
        "processor": processor,
        "threads": count_cores(),
        **dict(zip(libraries, list_versions(libraries), strict=True)),
    }


def list_versions(names: Sequence[str]) -> list[str]:
    """Return the versions of packages; "none" for one that is not installed."""
    versions = []
    for name in names:
        try:
            versions.append(version(name))
        except PackageNotFoundError:
            versions.append("none")
    return versions


def _read_cpuinfo(name: str) -> str:
    try:
        lines = CPUINFO.read_text().splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2] for line in lines if line.startswith(name)), "")


@dataclass(frozen=True)
class Measured:
    """How fast each candidate was. `facts`: what was timed, and where. The first candidate is the one to fall back to.

    `cosine`, where vectors are compared: the least between a candidate's vectors and the first one's. 0 images/s: it
    cannot be run here.
    """

    facts: dict[str, Any]
    images_per_s: dict[str, float]
    cosine: dict[str, float] = field(default_factory=dict)

    @property
    def choice(self) -> str:
        """The fastest candidate that gives the same vectors and is clearly faster than the first; else the first."""
        first, *others = self.images_per_s
        gain = LEAST_GAIN_OF_ENCODERS if self.cosine else LEAST_GAIN
        least = max(gain * self.images_per_s[first], 1e-9)
        fit = [n for n in others if self.images_per_s[n] >= least and self.cosine.get(n, 1.0) >= MIN_COSINE]
        return max(fit, key=self.images_per_s.__getitem__, default=first)

    def describe(self) -> str:
        """Return the choice with all figures: `bf16: 33 images/s against 17 in fp32`."""
        choice = self.choice
        others = [name for name in self.images_per_s if name != choice]
        return f"{choice}: {_round(self.images_per_s[choice])} images/s against {', '.join(map(self._compare, others))}"

    def describe_all(self) -> str:
        """Return it with what was timed: `train resnet18 at 224 x 224: bf16: 33 images/s against 17 in fp32`."""
        size = " x ".join(map(str, self.facts.get("image_size", [])))
        return f"{self.facts.get('step')} {self.facts.get('backbone')} at {size}: {self.describe()}"

    def _compare(self, name: str) -> str:
        if not self.images_per_s[name]:
            return f"none in {name}"
        apart = " (its vectors differ)" if self.cosine.get(name, 1.0) < MIN_COSINE else ""
        return f"{_round(self.images_per_s[name])} in {name}{apart}"


def _round(speed: float) -> str:
    return f"{speed:,.0f}" if speed >= 10 else f"{speed:.1f}"


def measure_once(
    hidden_dir: Path, facts: Mapping[str, Any], candidates: Sequence[str], measure: Callable[[], Measured]
) -> Measured:
    """Return what is kept for these facts and candidates; else what `measure` gives, and keep it.

    The facts are JSON values. A file that is damaged, or was made by something else, counts as empty. One that cannot
    be written is no reason to stop: it is measured again the next time.
    """
    kept = load_measured(hidden_dir)
    for one in kept:
        if one.facts == facts and list(one.images_per_s) == list(candidates):
            return one
    measured = measure()
    if any(measured.images_per_s.values()):
        others = [one for one in load_measured(hidden_dir) if one.facts != facts]
        with contextlib.suppress(OSError):
            text = json.dumps({"measured": [asdict(one) for one in [*others, measured]]}, indent=2) + "\n"
            write_file(hidden_dir / MACHINE_FILE, text.encode())
    return measured


def load_measured(hidden_dir: Path) -> list[Measured]:
    """Return what was measured in this workspace; nothing where there is no file or it cannot be read."""
    try:
        values = json.loads((hidden_dir / MACHINE_FILE).read_text())["measured"]
        return [_decode(value) for value in values]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return []


def _decode(value: Any) -> Measured:
    """Build an entry from its JSON. Raises ValueError, KeyError, TypeError, AttributeError when it is none."""
    speeds, cosine = ({str(n): float(v) for n, v in value[key].items()} for key in ("images_per_s", "cosine"))
    if not speeds or not all(0 <= speed < float("inf") for speed in speeds.values()):
        raise ValueError("no speeds")
    return Measured(dict(value["facts"]), speeds, cosine)


def time_in_turn(
    steps: Mapping[str, Callable[[], object]],
    num_images: int,
    *,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, float]:
    """Run steps on `num_images` in turn, so that a busy moment meets all; return the images per second of each.

    The best time of each counts: what else runs here only ever takes time. (Two programs with a thread on each core
    slow each other tenfold.) It goes on until the two best times of each step are a tenth apart or less, or the limit
    is over. One run of each goes before, uncounted: it builds kernels. A step that raises RuntimeError has 0 images/s.
    """
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    running = dict(steps)

    def run_all(*, counted: bool) -> None:
        for name, step in list(running.items()):
            started = clock()
            try:
                step()
            except RuntimeError:
                del running[name]
                continue
            if counted:
                seconds[name].append(clock() - started)

    run_all(counted=False)
    began = clock()
    number, passed_s = 0, 0.0
    while running and passed_s <= LIMIT_S:
        run_all(counted=True)
        number, passed_s = number + 1, clock() - began
        is_enough = number >= MAX_ROUNDS or (number >= FEW_ROUNDS and passed_s > QUICK_S)
        if is_enough and all(_is_calm(seconds[name]) for name in running):
            break
    return {
        name: float(f"{num_images / max(min(times), 1e-9):.4g}") if name in running else 0.0
        for name, times in seconds.items()
    }


def _is_calm(times_s: Sequence[float]) -> bool:
    best, second = sorted(times_s)[:2]
    return second <= LEAST_GAIN * best
