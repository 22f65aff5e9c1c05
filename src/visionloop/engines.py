"""Which approved engine answers fastest on this machine: timed once, in a process of its own, and kept.

`python -m visionloop.engines FOLDER THREADS ENGINE...` times engines of a bundle on its golden images, whose answers
must be the golden ones, and then how many cores had better decode. It prints JSON. A runtime that crashes or hangs
takes that process with it, not the server: the answer is then ONNX Runtime in fp32, which every bundle was judged on.

What was measured holds for one network on one processor with so many threads: not for its weights, so that a retrained
model of the same network is taken up at once.
"""

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np

from visionloop.bundle import INT8_MODEL, MODEL, Bundle, load_bundle
from visionloop.confidence import get_engine_facts
from visionloop.errors import BundleError, VisionLoopError
from visionloop.networks.processor import Measured, has_bf16, measure_once, read_cpu_name, sums_int8_exactly
from visionloop.parallel import count_cores
from visionloop.predictor import ENGINES, FP32, Predictor, has_openvino
from visionloop.workspace import Workspace

# The process stops by itself after so long, and is killed when it does not: then it hangs.
BUDGET_S, LIMIT_S = 4.0, 8.0
ENGINE_S, SPLIT_S, FEW_RUNS = 0.5, 0.3, 3
BATCH = 8
LIBRARIES = ("onnxruntime", "openvino")
OUT_OF_MEMORY_FIRST = Path("/proc/self/oom_score_adj")


@dataclass(frozen=True)
class Opened:
    """A model in the engine that was chosen, why that one, and how many threads had better decode (0: as ever).

    `had_choice`: another engine is approved too, so that people may want to know why it is this one.
    """

    predictor: Predictor
    why: str = FP32
    decoders: int = 0
    had_choice: bool = True


Open = Callable[[Bundle, Sequence[str]], Opened]


class MeasuringFailed(Exception):
    """The measuring process crashed, hung or said nothing that can be read."""


class _InHaste(Exception):
    """Not every candidate had its turn: `measured` is good for now, and not kept."""

    def __init__(self, measured: Measured) -> None:
        super().__init__()
        self.measured = measured


def make_opener(workspace: Workspace, tell: Callable[[str], None] = lambda line: None) -> Open:
    """Return what opens a bundle as the section `serve` says: in the fastest engine that is approved, or plainly."""
    serve = workspace.params.serve
    if serve.runtime == "onnxruntime":
        return partial(open_plainly, threads=serve.threads)
    return partial(open_fastest, hidden_dir=workspace.settings.hidden_dir, threads=serve.threads, tell=tell)


def open_plainly(bundle: Bundle, allowed: Collection[str] = (), *, threads: int = 0) -> Opened:
    """Open a bundle in ONNX Runtime fp32, whatever else is approved; its golden answers are checked."""
    predictor = Predictor(bundle, threads=threads or count_cores())
    predictor.check_golden()
    return Opened(predictor, FP32)


def open_fastest(
    bundle: Bundle,
    allowed: Collection[str],
    *,
    hidden_dir: Path,
    threads: int = 0,
    tell: Callable[[str], None] = lambda line: None,
) -> Opened:
    """Open a checked bundle in its fastest engine among those that its card and `allowed` both approve.

    `threads` 0: the cores that this process may use. The golden answers are checked.

    Raises:
        BundleError: in ONNX Runtime fp32 it does not give the golden answers either.
    """
    threads = threads or count_cores()
    candidates = list_candidates(bundle, allowed)
    if len(candidates) == 1:
        others = [name for name in ENGINES[1:] if name in allowed and name in bundle.card.runtimes]
        why = f"{' and '.join(others)} cannot be used here" if others else "no other engine is approved"
        return Opened(open_plainly(bundle, threads=threads).predictor, f"{FP32}: {why}", had_choice=bool(others))
    try:
        measured, cores = _recall(bundle, candidates, threads, hidden_dir)
        predictor = Predictor(bundle, threads=threads, engine=measured.choice)
        predictor.check_golden()
        decoders = int(cores.choice.split()[0]) if cores else 0
        return Opened(predictor, f"{measured.describe()} ({threads} threads{_describe_cores(cores)})", decoders)
    except MeasuringFailed as exc:
        why = f"which engine is fastest could not be measured: {exc}"
    except VisionLoopError as exc:
        why = f"{measured.choice} is not used here: {exc.found}"
    tell(f"answers by {FP32}: {why}")
    return Opened(open_plainly(bundle, threads=threads).predictor, f"{FP32}: {why}")


def list_candidates(bundle: Bundle, allowed: Collection[str]) -> list[str]:
    """Return the engines of this machine that the card and `allowed` approve, ONNX Runtime in fp32 first.

    In int8 a processor that cuts sums off (`sums_int8_exactly`) gives other answers than one that does not: only on
    the kind of processor that the bundle was made on its approval holds.
    """
    here = [name for name in ENGINES if has_openvino() or not name.startswith("openvino")]
    here = [name for name in here if has_bf16() or not name.endswith("bf16")]
    exact, has_int8 = sums_int8_exactly(), (bundle.folder / INT8_MODEL).is_file()
    alike = {name: has_int8 and get_engine_facts(bundle.card, name).get("exact", exact) is exact for name in here}
    here = [name for name in here if alike[name] or not name.endswith("int8")]
    return [name for name in here if name == FP32 or (name in allowed and name in bundle.card.runtimes)]


def _describe_cores(cores: Measured | None) -> str:
    return f", {cores.choice.split(',')[0]}" if cores else ""


def _recall(
    bundle: Bundle, candidates: Sequence[str], threads: int, hidden_dir: Path
) -> tuple[Measured, Measured | None]:
    """Return how fast each candidate is, and each way to share the cores: as kept, or measured now and kept."""
    about: dict[str, Any] = {
        "step": "serve",
        "processor": read_cpu_name(),
        "threads": threads,
        "backbone": str(bundle.card.network.get("backbone", "a network")),
        "image_size": list(bundle.card.image_size),
        "bytes": [path.stat().st_size for name in (MODEL, INT8_MODEL) if (path := bundle.folder / name).is_file()],
        "libraries": {name: _find_version(name) for name in LIBRARIES},
    }
    found: dict[str, dict[str, float]] = {}

    def measure(facts: dict[str, Any]) -> Measured:
        found.update(found or _ask(bundle.folder, candidates, threads))
        measured = Measured(facts, found[facts["step"]])
        if len(found["serve"]) < len(candidates):
            raise _InHaste(measured)
        return measured

    def recall(facts: dict[str, Any], names: Sequence[str]) -> Measured:
        try:
            return measure_once(hidden_dir, facts, names, lambda: measure(facts))
        except _InHaste as exc:
            return exc.measured

    engines, splits = recall(about, candidates), list(list_splits(threads))
    facts = {**about, "step": "decode beside", "engine": engines.choice}
    return engines, recall(facts, splits) if len(splits) > 1 else None


def _ask(folder: Path, candidates: Sequence[str], threads: int) -> dict[str, dict[str, float]]:
    """Measure in a process of its own. Raises MeasuringFailed."""
    command = [sys.executable, "-m", "visionloop.engines", str(folder), str(threads), *candidates]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, check=False)
    except subprocess.TimeoutExpired as exc:
        raise MeasuringFailed(f"it hung for {LIMIT_S:g} s") from exc
    except OSError as exc:
        raise MeasuringFailed(f"no process can be started ({exc.strerror})") from exc
    if done.returncode:
        ended = f"signal {-done.returncode}" if done.returncode < 0 else f"code {done.returncode}"
        raise MeasuringFailed(f"it ended with {ended}")
    try:
        value = json.loads(done.stdout)
        speeds = {step: {str(n): float(v) for n, v in value[step].items()} for step in ("serve", "decode beside")}
    except (ValueError, KeyError, TypeError, AttributeError) as exc:
        raise MeasuringFailed("it said nothing that can be read") from exc
    if not speeds["serve"] or list(speeds["serve"]) != list(candidates[: len(speeds["serve"])]):
        raise MeasuringFailed("it measured something else")
    return speeds


def time_engines(folder: Path, candidates: Sequence[str], threads: int, stop_at: float) -> dict[str, dict[str, float]]:
    """Return the images per second of each engine, and of each way to share the cores with the fastest.

    0: it does not give the golden answers here. After `stop_at` no other than the first has a turn. One is open at a
    time.
    """
    bundle = load_bundle(folder)
    images = list(islice(cycle(bundle.golden_images()), BATCH))
    speeds: dict[str, float] = {}
    for name in candidates:
        if speeds and time.monotonic() > stop_at:
            break
        try:
            predictor = Predictor(bundle, threads=threads, engine=name)
            predictor.check_golden()
            speeds[name] = _time_network(predictor, predictor.decode_golden(images))
        except (BundleError, RuntimeError):
            speeds[name] = 0.0
    best = Measured({}, speeds).choice
    predictor = Predictor(bundle, threads=threads, engine=best)
    splits = {name: _time_split(predictor, images, decoders) for name, decoders in list_splits(threads).items()}
    return {"serve": speeds, "decode beside": splits}


def list_splits(threads: int) -> dict[str, int]:
    """Return how many of so many cores may decode while the network has all of them: one less, or all."""
    return {f"{n} decoding": n for n in dict.fromkeys((max(1, threads - 1), threads))}


def _time_network(predictor: Predictor, images_nhwc: Any) -> float:
    """Return the images per second of the best run: what else runs here only ever takes time."""
    times: list[float] = []
    began = time.perf_counter()
    while len(times) < FEW_RUNS or time.perf_counter() - began < ENGINE_S:
        started = time.perf_counter()
        predictor.run(images_nhwc)
        times.append(time.perf_counter() - started)
    return float(f"{len(images_nhwc) / min(times):.4g}")


def _time_split(predictor: Predictor, images: Sequence[bytes], decoders: int) -> float:
    """Return the images per second when so many threads decode for the network, as in the server."""
    number, began = 0, time.perf_counter()
    with ThreadPoolExecutor(decoders) as pool:
        waiting = _decode_ahead(pool, predictor, images)
        while time.perf_counter() - began < SPLIT_S:
            predictor.run(next(waiting))
            number += len(images)
    return float(f"{number / (time.perf_counter() - began):.4g}")


def _decode_ahead(pool: ThreadPoolExecutor, predictor: Predictor, images: Sequence[bytes]) -> Iterator[Any]:
    """Yield batches while the next one is decoded."""

    def decode(data: bytes) -> Any:
        return predictor.decode_golden([data])[0]

    ahead = [pool.submit(decode, data) for data in images]
    while True:
        arrays = [future.result() for future in ahead]
        ahead = [pool.submit(decode, data) for data in images]
        yield np.stack(arrays)


def _find_version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "none"


def main(argv: Sequence[str]) -> None:
    """Measure as the arguments say, and print what was found."""
    with contextlib.suppress(OSError):  # where memory is short this process goes first, not the server
        OUT_OF_MEMORY_FIRST.write_text("1000")
    stop_at = time.monotonic() + BUDGET_S
    folder, threads, *candidates = argv
    print(json.dumps(time_engines(Path(folder), candidates, int(threads), stop_at)))


if __name__ == "__main__":
    os.nice(5)
    main(sys.argv[1:])
