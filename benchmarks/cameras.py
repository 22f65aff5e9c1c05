"""`visionloop predict` on one camera and on four, against a plain loop: PyAV and ONNX Runtime in one process.

The cameras send 720p at 25 frames a second, in H.264; they are a process of their own that is not counted. The network
is ResNet18 in fp32 with random weights, in ONNX Runtime on both sides. The start is not counted: what is measured
begins when each camera has had its first answers. A change is told as soon as the next frame has come.
"""

import contextlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import psutil

from epoch import make_photos
from row import Row
from servers.camera import draw
from serving import SERVERS, make_bundle
from visionloop.bundle import MODEL, load_bundle, seal_bundle
from visionloop.lifetime import stop_process
from visionloop.predictor import Predictor
from visionloop.records import canonical_json

CHANGE_S, EVERY_S, FASTEST_S = 1.0, 0.2, 0.04
SECONDS = 5.0  # of each run, beyond its start; there are eight
LIMIT_S = 120.0  # for a run, on the busiest machine
FIRST_LINES = 4  # lines of each camera, that belong to the start


@dataclass(frozen=True)
class Watched:
    """A run, from the first answers of each camera on: answers a second, milliseconds of the processor for one of them,
    and the delays of the changes that were told (ms)."""

    rate: float
    cost_ms: float
    delays_ms: tuple[float, ...]

    def describe(self) -> str:
        return f"{self.rate:,.1f} answers/s, {self.cost_ms:,.1f} ms of the processor for each"


@dataclass(frozen=True)
class Bench:
    """What both sides are told: the workspace and the bundle in it, its threshold, the cameras and their clock."""

    folder: Path
    bundle: Path
    threshold: float
    size_px: int
    address: str
    began: float

    def watch(self, number: int, every_s: float) -> tuple[Watched, Watched]:
        """Watch so many cameras, first by `visionloop predict`, then by the plain loop."""
        addresses = [f"{self.address}/{place}" for place in range(number)]
        wishes = ("--every", every_s, "--smooth", 0, "--seconds", LIMIT_S, "--bundle", self.bundle, "--json")
        command = [sys.executable, "-m", "visionloop", "predict", *addresses, *wishes, "--each-frame"]
        ours = self.run_counted(command, number)
        plain = [sys.executable, SERVERS / "plain_watch.py", self.bundle / MODEL, self.size_px, self.threshold]
        theirs = self.run_counted([*plain, every_s, LIMIT_S, *addresses], number)
        told = f"{ours.describe()}; plain loop {theirs.describe()}"
        print(f"cameras, {number} of 720p, a frame every {every_s:g} s: {told}", file=sys.stderr, flush=True)
        return ours, theirs

    def run_counted(self, words: Sequence[object], number: int) -> Watched:
        """Run a command that prints a line of JSON for each answer, until it was counted for long enough."""
        env = {**os.environ, "VISIONLOOP_HOME": str(self.folder)}
        with (self.folder / "errors.log").open("w") as log:
            process = subprocess.Popen([*map(str, words)], cwd=self.folder, env=env, stdout=subprocess.PIPE, stderr=log)
        assert process.stdout
        try:
            return self.count(map(json.loads, process.stdout), process.pid, number)
        except StopIteration:
            found = f"ended before each of {number} cameras was watched for {SECONDS:g} s"
            raise RuntimeError(f"{' '.join(map(str, words[:4]))} {found}; see {self.folder / 'errors.log'}") from None
        finally:
            process.stdout.close()
            stop_process(process)

    def count(self, lines: Iterator[dict[str, Any]], pid: int, number: int) -> Watched:
        """Count answers and what they cost, from where each camera has had its first ones. Raises StopIteration."""
        seen, changes = Counter[str](), list[float]()
        while len(seen) < number or min(seen.values()) < FIRST_LINES:
            seen[next(lines)["source"]] += 1
        frames, started_s, started_cpu_s = 0, time.monotonic(), measure_cpu(pid)
        while (took_s := time.monotonic() - started_s) < SECONDS:
            line = next(lines)
            frames += line["kind"] == "frame"
            changes += [datetime.fromisoformat(line["time"]).timestamp()] if line["kind"] == "change" else []
        delays_ms = tuple(1000 * ((at - self.began) % CHANGE_S) for at in changes)
        return Watched(frames / took_s, 1000 * (measure_cpu(pid) - started_cpu_s) / frames, delays_ms)


def bench_cameras(bench_dir: Path, *, size_px: int) -> list[Row]:
    """Measure both, in turn."""
    folder = bench_dir / "cameras"
    folder.mkdir(parents=True, exist_ok=True)
    bundle, threshold = make_watching_bundle(folder, make_photos(bench_dir / "photos") / "train", size_px)
    (folder / "params.yaml").write_text("name: bench\nserve: {runtime: onnxruntime}\n")
    rows = []
    with run_cameras() as (address, began):
        bench = Bench(folder, bundle, threshold, size_px, address, began)
        for number in (1, 4):
            told = f"{number} camera{'s' * (number > 1)} of 720p"
            ours, plain = bench.watch(number, EVERY_S)
            what = f"{told}, {1 / EVERY_S:.0f} answers a second: processor"
            rows.append(Row(what, ours.cost_ms, plain.cost_ms, "ms/answer", "plain loop"))
            ours, plain = bench.watch(number, FASTEST_S)
            rows.append(Row(f"{told}, each frame asked about", ours.rate, plain.rate, "answers/s", "plain loop"))
            if number == 1 and ours.delays_ms and plain.delays_ms:
                delays = statistics.median(ours.delays_ms), statistics.median(plain.delays_ms)
                rows.append(Row("1 camera: a change in the picture to its line", *delays, "ms", "plain loop"))
            elif number == 1:
                print("cameras: this machine is too busy to tell a change, which has no row", file=sys.stderr)
    return rows


def measure_cpu(pid: int) -> float:
    """Return what a process and its children have used of the processor (s)."""
    process, used_s = psutil.Process(pid), 0.0
    for one in (process, *process.children(recursive=True)):
        with contextlib.suppress(psutil.NoSuchProcess):
            times = one.cpu_times()
            used_s += times.user + times.system + times.children_user + times.children_system
    return used_s


def make_watching_bundle(folder: Path, images: Path, size_px: int) -> tuple[Path, float]:
    """Write a bundle whose random network tells the two pictures of the cameras apart; return its threshold too."""
    bundle = make_bundle(folder / "resnet18", "resnet18", images, size_px)
    predictor = Predictor(load_bundle(bundle))
    shares = [one.probabilities["light"] for one in predictor.predict([draw(0), draw(1)])]
    card = json.loads((bundle / "card.json").read_text())
    card["threshold"] = sum(shares) / 2
    (bundle / "card.json").write_bytes(canonical_json(card))
    seal_bundle(bundle)
    return bundle, float(card["threshold"])


@contextmanager
def run_cameras() -> Iterator[tuple[str, float]]:
    """Run the cameras; yield their address, and when they changed first."""
    command = [sys.executable, str(SERVERS / "camera.py"), str(CHANGE_S)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        port, began = process.stdout.readline().split()
        try:
            yield f"http://127.0.0.1:{port}", float(began)
        finally:
            stop_process(process)
