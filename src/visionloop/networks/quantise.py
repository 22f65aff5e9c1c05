"""A classifier's graph in int8: weights in eight bits for each channel, activations by what some images gave (static).

The pixels' scaling, the first layer and the head stay in fp32: there eight bits change answers most and save least. So
the embedding is a float too, and a head that lets neighbours vote is as it was. Nothing is trained again.

Jacob et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference", CVPR 2018.
Written as QuantizeLinear and DequantizeLinear (QDQ): standard operators, which each runtime fuses as it can.
"""

import logging
import os
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import onnx

from visionloop.data.images import UInt8Array
from visionloop.errors import TrainingError
from visionloop.networks import onnx_graph

MULTIPLY = frozenset({"Conv", "Gemm", "MatMul"})
# What is computed in int8, or passes it on. All others (a softmax, a normalisation) stay in fp32.
OPERATORS = ("Add", "AveragePool", "Clip", "Concat", "Conv", "Gemm", "GlobalAveragePool", "MatMul", "MaxPool", "Relu")
# Of the fp32 graph: quantising holds it several times in memory.
MAX_BYTES = 1 << 30
WHERE = "train.export.int8"


def quantise(model_path: Path, target: Path, batches: Iterable[UInt8Array]) -> None:
    """Write a classifier's graph in int8, its ranges calibrated on batches of images (n, h, w, 3).

    Same input, same bytes, on one type of processor with one number of threads.

    Raises:
        TrainingError: it has no layer for that, is too large, or the quantiser cannot do it.
    """
    if model_path.stat().st_size > MAX_BYTES:
        found = f"the graph has {model_path.stat().st_size / 1e9:.1f} GB"
        raise TrainingError(WHERE, found, f"at most {MAX_BYTES / 1e9:.1f} GB to make int8 of")
    model = onnx.load(model_path)
    names = _list_nodes(model.graph)
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # before the import, which writes to the home folder otherwise
    from onnxruntime.quantization import QuantType, quantize_static

    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with tempfile.TemporaryDirectory(prefix="int8-", dir=target.parent) as folder:
            written = Path(folder) / "model.onnx"
            quantize_static(
                model,
                written,
                _Reader(batches),
                per_channel=True,
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
                op_types_to_quantize=list(OPERATORS),
                nodes_to_quantize=names,
            )
            made = onnx.load(written)
    except Exception as exc:  # onnxruntime's quantiser raises whatever it meets
        why = " ".join(str(exc).split())[:200]
        raise TrainingError(WHERE, f"the graph cannot be made int8 ({type(exc).__name__}: {why})") from exc
    finally:
        logging.disable(before)
    onnx_graph.strip(made)
    made.producer_name = made.producer_version = ""
    target.write_bytes(onnx_graph.to_bytes(made))


def _list_nodes(graph: onnx.GraphProto) -> list[str]:
    """Return the names of the nodes to quantise: those before `embedding`, after the first that multiplies.

    Nodes without a name get one. Raises TrainingError: nothing is left that multiplies.
    """
    needed, before = {"embedding"}, []
    for node in reversed(graph.node):
        if needed.intersection(node.output):
            needed.update(node.input)
            before.append(node)
    before.reverse()
    for number, node in enumerate(graph.node):
        node.name = node.name or f"node_{number}"
    layers = [number for number, node in enumerate(before) if node.op_type in MULTIPLY]
    if len(layers) < 2:
        raise TrainingError(WHERE, f"there are {len(layers)} layers before the head", "two or more to make int8 of")
    return [node.name for node in before[layers[0] + 1 :] if node.op_type in OPERATORS]


class _Reader:
    """What the calibration asks for batches."""

    def __init__(self, batches: Iterable[UInt8Array]) -> None:
        self._batches: Iterator[UInt8Array] = iter(batches)

    def get_next(self) -> dict[str, UInt8Array] | None:
        """Return the next batch; None after the last."""
        batch = next(self._batches, None)
        return None if batch is None else {"images": batch}
