"""What may compute embeddings here, and which is the fastest: timed once for each encoder and processor.

Dimensions: n images, d features.
"""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from visionloop.data.images import UInt8Array
from visionloop.data.shards import Prepared
from visionloop.errors import BundleError, ParamsError, describe_install
from visionloop.features.view import EncoderFacts, FloatArray
from visionloop.networks import processor
from visionloop.networks.processor import (
    Measured,
    has_bf16,
    list_versions,
    may_have_gpu,
    measure_once,
    read_cpu_name,
)
from visionloop.parallel import count_cores
from visionloop.predictor import MAX_SLICE, SLICE_PIXELS, has_openvino

Run = Callable[[UInt8Array], FloatArray]
RUNTIMES = ("torch", "onnxruntime", "openvino")
HOPELESS = 2.5


def list_candidates(wanted: str, accelerator: str, *, has_torch: bool = True) -> list[str]:
    """Return what may compute embeddings here, as `RUNTIME PRECISION`. The first is the one to fall back to.

    `auto`: ONNX Runtime in fp32, which serves; OpenVINO where it is installed; torch. bf16 only where there are
    instructions for it. A runtime that is asked for by name: its precisions. `has_torch`: whether torch can run it.

    Raises:
        ParamsError: OpenVINO is asked for by name and is not installed, or torch and it cannot run the network.
    """
    if wanted == "torch" and not has_torch:
        found, expected = "got 'torch', which cannot run an ONNX encoder", "auto, onnxruntime or openvino"
        raise ParamsError("params.yaml embed.runtime", found, expected, "Edit the file.")
    if wanted == "openvino" and not has_openvino():
        raise ParamsError(
            "params.yaml embed.runtime",
            "got 'openvino', which is not installed",
            "the extra `openvino`",
            f"Run `{describe_install('openvino')}`, or set `runtime: auto`.",
        )
    on_gpu = accelerator == "gpu"
    names = ["onnxruntime fp32"]
    if has_openvino() and not (on_gpu and wanted == "auto"):
        names += ["openvino fp32", *["openvino bf16"][: has_bf16()]]
    if has_torch:
        names += ["torch fp32", *["torch bf16"][: on_gpu or has_bf16()]]
    return [name for name in names if wanted in {"auto", name.partition(" ")[0]}]


def find_accelerator(wanted: str) -> str:
    """Return what embeddings are computed on: the GPU, if torch may be taken and sees one, else the cpu."""
    if wanted in {"auto", "torch"} and may_have_gpu():
        from visionloop.networks.export import has_gpu

        return "gpu" if has_gpu() else "cpu"
    return "cpu"


def measure_runtimes(
    facts: EncoderFacts,
    candidates: list[str],
    prepared: Prepared,
    *,
    accelerator: str,
    hidden_dir: Path,
    open_run: Callable[[EncoderFacts], Run],
    tell: Callable[[str], None] = lambda line: None,
) -> Measured:
    """Return how fast each candidate runs this encoder on prepared images: as measured once, or measured now."""
    about: dict[str, Any] = {
        "step": "embed",
        "accelerator": accelerator,
        "processor": read_cpu_name(),
        "threads": count_cores(),
        "backbone": facts.backbone,
        "weights": facts.weights_digest,
        "image_size": list(facts.image_size),
        "libraries": dict(zip(RUNTIMES, list_versions(RUNTIMES), strict=True)),
    }

    def measure() -> Measured:
        tell(f"finds out which of {', '.join(candidates)} embeds fastest here: 10 to 30 s, once in a workspace ...")
        height, width = facts.image_size
        number = max(1, min(MAX_SLICE, SLICE_PIXELS // (height * width), len(prepared.sha256_n)))
        opens = {name: partial(open_run, set_runtime(facts, name)) for name in candidates}
        return Measured(about, *time_encoders(opens, prepared.read(np.arange(number))))

    return measure_once(hidden_dir, about, candidates, measure)


def time_encoders(
    opens: Mapping[str, Callable[[], Run]], images_nhwc: UInt8Array
) -> tuple[dict[str, float], dict[str, float]]:
    """Return the images per second of each encoder, and the least cosine of its embeddings to the first one's.

    One is open at a time, since networks may be large. One that cannot be run has 0 images/s. One that takes HOPELESS
    times as long as the fastest, in its second run, is not run again: the figure is that of this run.
    """
    first_nd: FloatArray | None = None
    speeds: dict[str, float] = {}
    cosine: dict[str, float] = {}
    for name, open_run in opens.items():
        try:
            run = open_run()
            embedding_nd = run(images_nhwc)
        except (BundleError, RuntimeError):
            speeds[name] = cosine[name] = 0.0
            continue
        first_nd = embedding_nd if first_nd is None else first_nd
        cosine[name] = _compute_cosine(embedding_nd, first_nd)
        started = time.perf_counter()
        run(images_nhwc)
        speeds[name] = len(images_nhwc) / (time.perf_counter() - started)
        if speeds[name] * HOPELESS >= max(speeds.values()):
            speeds |= processor.time_in_turn({name: partial(run, images_nhwc)}, len(images_nhwc))
    return speeds, cosine


def _compute_cosine(ours_nd: FloatArray, theirs_nd: FloatArray) -> float:
    """Return the least cosine between two vectors of one image; 0 where one of them is no direction."""
    lengths_n = np.linalg.norm(ours_nd, axis=1) * np.linalg.norm(theirs_nd, axis=1)
    cosine_n = (ours_nd * theirs_nd).sum(axis=1) / np.where(lengths_n > 0, lengths_n, 1.0)
    least = float(cosine_n.min())
    return round(min(least, 1.0), 6) if math.isfinite(least) else 0.0


def set_runtime(facts: EncoderFacts, candidate: str) -> EncoderFacts:
    """Return the facts of the same network as a candidate runs it."""
    runtime, _, precision = candidate.partition(" ")
    return replace(facts, runtime=runtime, precision=precision)
