"""`visionloop predict` on one camera and on four, against a plain loop: PyAV and ONNX Runtime in one process.

The cameras send 720p at 25 frames a second, in H.264; they are a process of their own that is not counted. The network
is ResNet18 in fp32 with random weights, in ONNX Runtime on both sides. Of processor time the start is taken away: it is
the difference between a long and a short run, a frame. A change is told as soon as the next frame has come.
"""

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

from epoch import make_photos
from row import Row
from servers.camera import draw
from serving import SERVERS, make_bundle
from visionloop.bundle import MODEL, load_bundle, seal_bundle
from visionloop.lifetime import stop_process
from visionloop.predictor import Predictor
from visionloop.records import canonical_json

CHANGE_S, EVERY_S, FASTEST_S = 2.0, 0.2, 0.04
SHORT_S, LONG_S, REPEATS = 6.0, 18.0, 3


@dataclass(frozen=True)
class Watched:
    """A run: answers, processor time of all its processes (s), and the delays of the changes that were told (s)."""

    frames: int
    cpu_s: float
    delays: tuple[float, ...]


@dataclass(frozen=True)
class Bench:
    """What both sides are told: the workspace and the bundle in it, its threshold, the cameras and their clock."""

    folder: Path
    bundle: Path
    threshold: float
    size_px: int
    address: str
    began: float

    def watch(self, number: int, every_s: float, seconds: float) -> tuple[Watched, Watched]:
        """Watch so many cameras for so long, first by `visionloop predict`, then by the plain loop."""
        addresses = [f"{self.address}/{place}" for place in range(number)]
        wishes = ("--every", every_s, "--smooth", 0, "--seconds", seconds, "--bundle", self.bundle, "--json")
        lines, cpu_s = run_counted([sys.executable, "-m", "visionloop", "predict", *addresses, *wishes], self.folder)
        changes = [datetime.fromisoformat(one["time"]).timestamp() for one in lines if one["kind"] == "change"]
        frames = sum(one["frames"] for one in lines if one["kind"] == "end")
        ours = Watched(frames, cpu_s, find_delays(changes, self.began))
        plain = [sys.executable, SERVERS / "plain_watch.py", self.bundle / MODEL, self.size_px, self.threshold]
        lines, cpu_s = run_counted([*plain, every_s, seconds, *addresses], self.folder)
        changes = [b["at"] for a, b in pairwise(lines) if a["answer"] != b["answer"]]  # of one camera
        return ours, Watched(len(lines), cpu_s, find_delays(changes, self.began))


def bench_cameras(bench_dir: Path, *, size_px: int) -> list[Row]:
    """Measure both, in turn."""
    folder = bench_dir / "cameras"
    folder.mkdir(parents=True, exist_ok=True)
    bundle, threshold = make_watching_bundle(folder, make_photos(bench_dir / "photos") / "train", size_px)
    (folder / "params.yaml").write_text("name: bench\nserve: {runtime: onnxruntime}\n")
    with run_cameras() as (address, began):
        bench = Bench(folder, bundle, threshold, size_px, address, began)
        rows = [row for number in (1, 4) for row in bench_number(bench, number)]
        delays = [[1000 * delay for delay in each.delays] for each in bench.watch(1, FASTEST_S, LONG_S)]
        ours, plain = map(statistics.median, delays)
        return [*rows, Row("1 camera: a change in the picture to its line", ours, plain, "ms", "plain loop")]


def bench_number(bench: Bench, number: int) -> list[Row]:
    """Return the processor time of an answer of so many cameras, and how many answers a second there can be."""
    told = f"{number} camera{'s' * (number > 1)} of 720p"
    costs, rates = [], []
    for _ in range(REPEATS):
        runs = [bench.watch(number, EVERY_S, seconds) for seconds in (SHORT_S, LONG_S)]
        costs.append([measure_cost(*each) for each in zip(*runs, strict=True)])
        rates.append([each.frames / LONG_S for each in bench.watch(number, FASTEST_S, LONG_S)])
    ours, plain = (statistics.median(each) for each in zip(*costs, strict=True))
    cost = Row(f"{told}, {1 / EVERY_S:.0f} answers a second: processor", ours, plain, "ms/answer", "plain loop")
    ours, plain = (statistics.median(each) for each in zip(*rates, strict=True))
    return [cost, Row(f"{told}, each frame asked about", ours, plain, "answers/s", "plain loop")]


def measure_cost(short: Watched, long: Watched) -> float:
    """Return the milliseconds of the processor for an answer; both runs start alike."""
    return 1000 * (long.cpu_s - short.cpu_s) / (long.frames - short.frames)


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


def run_counted(words: Sequence[object], folder: Path) -> tuple[list[dict[str, Any]], float]:
    """Run a command; return its lines of JSON, and what it and its processes used of the processor."""
    command = [*map(str, words)]
    with (folder / "errors.log").open("w") as log:
        process = subprocess.Popen(
            command, cwd=folder, env={**os.environ, "VISIONLOOP_HOME": str(folder)}, stdout=subprocess.PIPE, stderr=log
        )
    assert process.stdout
    lines = [json.loads(line) for line in process.stdout]
    _, status, used = os.wait4(process.pid, 0)
    if status:
        raise RuntimeError(f"{' '.join(command[:4])} failed; see {folder / 'errors.log'}")
    return lines, used.ru_utime + used.ru_stime


def find_delays(changes: Sequence[float], began: float) -> tuple[float, ...]:
    """Return how long after the last change of the picture each change was told; the first is that of the start."""
    return tuple((at - began) % CHANGE_S for at in changes[1:])
