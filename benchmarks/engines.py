"""The engine alone: the graph in int8 and in fp32, in each runtime that is installed, against an eager torch network.

No decoding, no HTTP: batches of decoded images, all engines in turn, the best time of each. Weights and images are
random: the times do not depend on them. How far the answers of int8 may be off is shown by `train`, not here.
"""

import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from embed import NAMES
from row import Row
from visionloop.evaluation.runtimes import list_engines
from visionloop.networks.processor import time_in_turn
from visionloop.predictor import FP32, INT8, Embedder

BATCH, NUM_CLASSES, NUM_CALIBRATION = 16, 10, 32
LEAST_GAIN = {FP32: 1.9, INT8: 5.0}  # over the eager network; the goals


def bench_engines(bench_dir: Path, *, size_px: int) -> list[Row]:
    """Time all engines with three backbones."""
    return [row for name in NAMES for row in bench_backbone(bench_dir / "engines", name, size_px)]


def bench_backbone(folder: Path, name: str, size_px: int) -> list[Row]:
    """Return rows of images per second: of fp32, of int8, and of the fastest where that is another one."""
    import torch

    from visionloop.networks.backbones import make_backbone
    from visionloop.networks.classifier import Classifier, ExportedClassifier
    from visionloop.networks.export import export_onnx, quantise

    folder.mkdir(parents=True, exist_ok=True)
    size_hw = (size_px, size_px)
    images_nhwc = np.random.default_rng(0).integers(0, 256, (NUM_CALIBRATION, *size_hw, 3), dtype=np.uint8)
    network: Any = Classifier(*make_backbone(name, size_hw), NUM_CLASSES, task="multiclass").eval()
    export_onnx(network, size_hw, folder / "model.onnx")
    quantise(folder / "model.onnx", folder / "model.int8.onnx", [images_nhwc[:BATCH], images_nhwc[BATCH:]])
    batch_nhwc, plain = images_nhwc[:BATCH], ExportedClassifier(network).eval()

    def run_plainly() -> None:
        with torch.inference_mode():
            plain(torch.from_numpy(batch_nhwc))

    steps: dict[str, Any] = {"torch": run_plainly}
    for engine in [FP32, *list_engines(with_int8=True)]:
        runtime, _, precision = engine.partition(" ")
        file = folder / ("model.int8.onnx" if precision == "int8" else "model.onnx")
        embedder = Embedder(file, runtime=runtime, precision="fp32" if precision == "int8" else precision)
        steps[engine] = partial(embedder.embed, batch_nhwc)
    speeds = time_in_turn(steps, BATCH)
    told = ", ".join(f"{engine} {speed:,.0f}" for engine, speed in speeds.items())
    print(f"{NAMES[name]} at {size_px}, images/s: {told}", file=sys.stderr)
    fastest = max((engine for engine in speeds if engine != "torch"), key=speeds.__getitem__)
    for engine, goal in LEAST_GAIN.items():
        print(f"{NAMES[name]}: {engine} {speeds[engine] / speeds['torch']:.2f} x (goal {goal})", file=sys.stderr)
    return [
        Row(f"{NAMES[name]} at {size_px}, {engine}", speeds[engine], speeds["torch"], "images/s", "torch, eager fp32")
        for engine in dict.fromkeys((FP32, INT8, fastest))
    ]
