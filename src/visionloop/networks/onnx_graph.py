"""ONNX graphs, taken apart and put together: an encoder's part of a file, uint8 pixels before it, a head behind it.

A graph made here has the input `images`, uint8 (n, h, w, 3), and the output `embedding`, float (n, d); with a head
`logits` (n, k) too. Runs nothing, and says nothing of where a file came from. No torch.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from onnx.compose import add_prefix_graph

from visionloop.errors import TrainingError
from visionloop.networks.names import BACKBONE
from visionloop.networks.preprocessing import Preprocessing

# protobuf, in which ONNX is written, ends at 2 GiB; a little is left for names.
MAX_BYTES = (2 << 30) - (1 << 20)
LEAST_OPSET = 18  # of a head that torch exports
PIXEL_TYPES: dict[int, str] = {TensorProto.UINT8: "uint8", TensorProto.FLOAT: "float32", TensorProto.FLOAT16: "float16"}
# Larger tensors than this are weights; the sizes that decide over shapes are small ones.
_SMALL = 1024
Shape = list[int | str | None]


@dataclass(frozen=True)
class Pixels:
    """The input of an encoder: name, type, the order of its dimensions, and which of them are fixed (else None)."""

    name: str
    type: int
    layout: str
    batch: int | None
    height: int | None
    width: int | None


def read_shape(value: onnx.ValueInfoProto) -> Shape | None:
    """Return the dimensions of an input or output: numbers, names, or None where nothing is known; None without any."""
    kind = value.type.tensor_type
    if not kind.HasField("shape"):
        return None
    return [(d.dim_value if d.HasField("dim_value") else d.dim_param or None) for d in kind.shape.dim]


def describe_shape(shape: Shape | None) -> str:
    """Return dimensions in words: `(N, 257, 768)`."""
    if shape is None:
        return "(any shape)"
    return f"({', '.join(str('N' if n == 0 and not isinstance(d, int) else d or '?') for n, d in enumerate(shape))})"


def list_inputs(graph: onnx.GraphProto) -> list[onnx.ValueInfoProto]:
    """Return what a graph must be given: old files also list their weights among the inputs."""
    weights = {tensor.name for tensor in graph.initializer} | {t.values.name for t in graph.sparse_initializer}
    return [value for value in graph.input if value.name not in weights]


def keep_output(graph: onnx.GraphProto, name: str) -> None:
    """Remove all of a graph that one of its outputs does not need: other outputs, nodes, weights and inputs."""
    needed = {name}
    for number in reversed(range(len(graph.node))):
        if needed.intersection(graph.node[number].output):
            needed |= _list_used(graph.node[number])
        else:
            del graph.node[number]
    for field in (graph.input, graph.initializer):
        _drop(field, lambda each: each.name in needed)
    _drop(graph.sparse_initializer, lambda each: each.values.name in needed)
    _drop(graph.output, lambda each: each.name == name)


def infer_output(model: onnx.ModelProto, pixels: Pixels, size_hw: tuple[int, int]) -> Shape | None:
    """Return the dimensions of a graph's one output for one image of this size; as the file says where unknown."""
    skeleton = onnx.ModelProto(ir_version=model.ir_version, opset_import=model.opset_import)
    graph, whole = skeleton.graph, model.graph
    graph.name = "encoder"
    graph.node.extend(whole.node)
    for tensor in whole.initializer:
        small = int(np.prod(tensor.dims)) <= _SMALL
        graph.initializer.append(
            tensor if small else TensorProto(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims)
        )
    height, width = size_hw
    shape = [1, 3, height, width] if pixels.layout == "NCHW" else [1, height, width, 3]
    graph.input.append(helper.make_tensor_value_info(pixels.name, pixels.type, shape))
    declared = whole.output[0]
    graph.output.append(helper.make_tensor_value_info(declared.name, declared.type.tensor_type.elem_type, None))
    try:
        inferred = read_shape(onnx.shape_inference.infer_shapes(skeleton, data_prop=True).graph.output[0])
    except Exception:  # from C++; what runs the graph will say it better
        inferred = None
    if inferred and all(isinstance(size, int) for size in inferred):
        return inferred
    return read_shape(declared) or inferred


def put_pixels_before(
    model: onnx.ModelProto, pixels: Pixels, preprocessing: Preprocessing, num_features: int, size_hw: tuple[int, int]
) -> None:
    """Turn a graph of one output into one from uint8 `images` to the float output `embedding`, in place.

    Uint8 pixels go in as they are. Shapes in between are dropped: they may be those of another batch.
    """
    graph, opset = model.graph, find_opset(model)
    output, output_type = graph.output[0].name, graph.output[0].type.tensor_type.elem_type
    inner = _take_inner(graph)
    before, weights, last = _make_before(pixels, preprocessing, inner[pixels.name])
    after = [helper.make_node("Cast", [inner[output]], ["encoder_float"], to=TensorProto.FLOAT)]
    if output_type == TensorProto.FLOAT:
        after = [helper.make_node("Identity", [inner[output]], ["encoder_float"])]
    after.append(helper.make_node("Flatten", ["encoder_float"], ["embedding"], axis=1))
    nodes = [*before, helper.make_node("Identity", [last], [inner[pixels.name]]), *graph.node, *after]
    _replace(graph.node, nodes)
    graph.initializer.extend(weights)
    del graph.input[:], graph.output[:], graph.value_info[:]
    graph.input.append(helper.make_tensor_value_info("images", TensorProto.UINT8, ["n", *size_hw, 3]))
    graph.output.append(helper.make_tensor_value_info("embedding", TensorProto.FLOAT, ["n", num_features]))
    graph.name = "encoder"
    _set_opset(model, opset)
    strip(model)


def put_head_behind(encoder: onnx.ModelProto, head: onnx.ModelProto) -> onnx.ModelProto:
    """Return one graph of an encoder (`images` to `embedding`) and a head of its opset (`embedding` to `logits`).

    Raises:
        TrainingError: it is more than an ONNX file can hold.
    """
    joined, behind = onnx.ModelProto(), onnx.ModelProto()
    joined.CopyFrom(encoder)
    behind.CopyFrom(head)
    keep_output(behind.graph, "logits")
    inner = _take_inner(behind.graph, "head/")
    for node in behind.graph.node:
        for names in (node.input, node.output):
            for number, name in enumerate(names):
                names[number] = {inner["embedding"]: "embedding", inner["logits"]: "logits"}.get(name, name)
    joined.ir_version = max(encoder.ir_version, head.ir_version)
    joined.graph.name = "classifier"
    joined.graph.node.extend(behind.graph.node)
    joined.graph.initializer.extend(behind.graph.initializer)
    logits = head.graph.output[0].type.tensor_type.shape.dim[1].dim_value
    del joined.graph.output[:]
    joined.graph.output.append(helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["n", logits]))
    joined.graph.output.extend(encoder.graph.output)
    strip(joined)
    return joined


def read_num_features(model: onnx.ModelProto) -> int:
    """Return the length of the embeddings that a graph gives."""
    (output,) = (value for value in model.graph.output if value.name == "embedding")
    return int(output.type.tensor_type.shape.dim[1].dim_value)


def to_bytes(model: onnx.ModelProto) -> bytes:
    """Return a model as it is written. Raises TrainingError: it is more than an ONNX file can hold."""
    size = sum(len(tensor.raw_data) for tensor in model.graph.initializer)
    try:
        if size <= MAX_BYTES:
            return bytes(model.SerializeToString(deterministic=True))
    except Exception as exc:  # protobuf's EncodeError has no public home
        raise _too_large(size) from exc
    raise _too_large(size)


def find_opset(model: onnx.ModelProto) -> int:
    """Return the version of the standard operators that a model uses."""
    return max((int(each.version) for each in model.opset_import if each.domain in {"", "ai.onnx"}), default=1)


def strip(model: onnx.ModelProto) -> None:
    """Remove source paths and other metadata: two folders would give two digests."""
    model.doc_string = ""
    del model.metadata_props[:]
    graphs = [model.graph]
    while graphs:
        graph = graphs.pop()
        graph.doc_string = ""
        del graph.metadata_props[:]
        for entry in (*graph.node, *graph.input, *graph.output, *graph.initializer, *graph.value_info):
            entry.doc_string = ""
            del entry.metadata_props[:]
        graphs += [inner for node in graph.node for a in node.attribute for inner in (a.g, *a.graphs) if inner.node]


def _make_before(pixels: Pixels, wanted: Preprocessing, name: str) -> tuple[list[Any], list[Any], str]:
    """Return the nodes from `images` to what an encoder takes, their weights, and the name of what comes out."""
    nodes: list[onnx.NodeProto] = []
    weights: list[onnx.TensorProto] = []
    last = "images"

    def add(kind: str, *inputs: str, **attributes: Any) -> None:
        nonlocal last
        nodes.append(helper.make_node(kind, [last, *inputs], [f"pixels_{len(nodes)}"], **attributes))
        last = f"pixels_{len(nodes) - 1}"

    if pixels.layout == "NCHW":
        add("Transpose", perm=[0, 3, 1, 2])
    if pixels.type == TensorProto.UINT8:
        return nodes, weights, last
    add("Cast", to=TensorProto.FLOAT)
    shape = (1, 3, 1, 1) if pixels.layout == "NCHW" else (1, 1, 1, 3)
    mean_c, std_c = np.asarray(wanted.mean_c) * 255, np.asarray(wanted.std_c) * 255
    if not np.allclose(std_c, 1.0, rtol=1e-9) or mean_c.any():
        for kind, value, values_c in (("Mul", "pixel_scale", 1 / std_c), ("Add", "pixel_shift", -mean_c / std_c)):
            weights.append(numpy_helper.from_array(values_c.astype(np.float32).reshape(shape), value))
            add(kind, value)
    if pixels.type != TensorProto.FLOAT:
        add("Cast", to=pixels.type)
    return nodes, weights, last


def _take_inner(graph: onnx.GraphProto, prefix: str = "encoder/") -> dict[str, str]:
    """Give all names in a graph a prefix, so that no other graph has them; return the new names of both ends."""
    ends = [value.name for value in (*graph.input, *graph.output)]
    add_prefix_graph(graph, prefix, inplace=True)
    return {name: prefix + name for name in ends}


def _list_used(node: onnx.NodeProto) -> set[str]:
    """Return the names that a node reads, also inside its own graphs (of `If`, `Loop`)."""
    used = set(node.input)
    for attribute in node.attribute:
        for graph in (attribute.g, *attribute.graphs):
            used.update(value.name for value in graph.output)
            for inner in graph.node:
                used |= _list_used(inner)
    return used - {""}


def _drop(field: Any, is_needed: Callable[[Any], bool]) -> None:
    """Remove entries of a repeated field where they lie: weights are large, so nothing is copied."""
    for number in reversed(range(len(field))):
        if not is_needed(field[number]):
            del field[number]


def _replace(field: Any, values: Iterable[Any]) -> None:
    copies = list(values)
    copies = [copies[0].__class__.FromString(value.SerializeToString()) for value in copies]
    del field[:]
    field.extend(copies)


def _set_opset(model: onnx.ModelProto, version: int) -> None:
    others = [each for each in model.opset_import if each.domain not in {"", "ai.onnx"}]
    _replace(model.opset_import, [helper.make_opsetid("", version), *others])


def _too_large(size: int) -> TrainingError:
    return TrainingError(
        BACKBONE,
        f"encoder and head together hold {size / 1e9:.1f} GB",
        "at most 2 GB, which is the limit of an ONNX file",
        "Export the encoder in float16, or take a smaller one.",
    )
