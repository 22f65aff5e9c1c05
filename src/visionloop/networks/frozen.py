"""The network before a head that learns from embeddings: of torch by its name, or an ONNX encoder from a file.

It learns no more. The stage `embed` runs it; the ways `frozen` and `knn` put it before their heads. An ONNX file is
checked, and made to take uint8 pixels. What is read from the file decides alone: a graph that the parameters do not
fit is refused in one line, and pixels are never guessed. No torch but that of a network of torch.
"""

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import onnx
from onnx import TensorProto, version_converter

from visionloop.bundle import check_onnx, hash_file
from visionloop.errors import BundleError, TrainingError
from visionloop.networks import onnx_graph
from visionloop.networks.fetch import OF_ENCODER, find_file
from visionloop.networks.names import BACKBONE, ENCODER_TODO
from visionloop.networks.onnx_graph import PIXEL_TYPES, Pixels, Shape, describe_shape, list_inputs, read_shape
from visionloop.networks.preprocessing import RAW, Preprocessing, choose_preprocessing
from visionloop.params import Train
from visionloop.records import compute_digest

if TYPE_CHECKING:
    from torch import nn


class FrozenNetwork(Protocol):
    """A network that maps uint8 images (n, h, w, 3) to embeddings (n, d)."""

    @property
    def num_features(self) -> int:
        """The length d of an embedding."""

    @property
    def weights_digest(self) -> str:
        """The digest of what decides over its embeddings; that of the table has to be the same."""

    def put_before(self, head: "nn.Module", num_classes: int, task: str) -> "nn.Module":
        """Return a classifier for `write_bundle`: this network, and a head that maps embeddings to units."""

    def write(self, path: Path) -> None:
        """Write it as ONNX: input `images` uint8 (n, h, w, 3), output `embedding` (n, d)."""

    def describe(self) -> list[str]:
        """Return lines that a person should read before it is used."""


def load_frozen(section: Train, size_hw: tuple[int, int], home: Path) -> FrozenNetwork:
    """Return the network of `train.backbone` with its weights. Only one of torch loads torch. Raises TrainingError."""
    if section.is_onnx:
        return load_onnx_encoder(section, size_hw, home)
    from visionloop.networks.export import EmbeddingNetwork
    from visionloop.networks.weights import load_backbone

    return EmbeddingNetwork(*load_backbone(section, size_hw, home), size_hw)


MAX_NODES = 100_000
TEXT_TYPES = {TensorProto.INT64, TensorProto.INT32, TensorProto.STRING, TensorProto.BOOL}
TEXT_NAMES = ("input_ids", "attention_mask")
EXPORT = "Export the image tower alone, with one input of images (docs/training.md: an encoder of your own)."


@dataclass(frozen=True)
class OnnxEncoder:
    """An encoder as one graph from uint8 `images` (n, h, w, 3) to `embedding` (n, d), and what was read of it.

    `given` is the same graph before its operators were raised to a newer version, None where they were not.
    """

    model: onnx.ModelProto = field(repr=False)
    given: onnx.ModelProto | None = field(repr=False)
    name: str
    sha256: str
    output: str
    pixels: Pixels
    preprocessing: Preprocessing
    source: str
    size_hw: tuple[int, int]
    num_features: int

    @cached_property
    def weights_digest(self) -> str:
        """The digest of all that decides over its vectors: the file, the pixels it is given, and its output."""
        return compute_digest([self.sha256, self.preprocessing.mean_c, self.preprocessing.std_c, self.output])

    def put_before(self, head: "nn.Module", num_classes: int, task: str) -> "nn.Module":
        """Return the encoder with a head behind it, to be exported."""
        from visionloop.networks.classifier import EncodedClassifier

        return EncodedClassifier(head, self.model, self.card)

    def write(self, path: Path) -> None:
        """Write the graph. Raises TrainingError."""
        path.write_bytes(onnx_graph.to_bytes(self.model))

    def describe(self) -> list[str]:
        """Return what was read of the file, in one line, and where the images have another size than it knows."""
        pixels, wanted = self.pixels, self.preprocessing
        height, width = self.size_hw
        line = f"{self.name} (sha256 {self.sha256[:12]}): takes {pixels.layout} {PIXEL_TYPES[pixels.type]}"
        line += f" at {height} x {width}, gives {self.output} of {self.num_features:,}"
        mean, std = (", ".join(f"{value:.4g}" for value in values_c) for values_c in (wanted.mean_c, wanted.std_c))
        how = f"(x / 255 - mean) / std, mean {mean}, std {std}"
        if pixels.type == TensorProto.UINT8:
            lines = [f"{line}; pixels as they are, for it takes bytes"]
        else:
            lines = [f"{line}; pixels as {self.source} says: {'0 to 255' if self.is_raw else how}"]
        if wanted.side_px and (height, width) != (wanted.side_px, wanted.side_px):
            side = f"{wanted.side_px} x {wanted.side_px}"
            lines.append(f"{self.source} speaks of images of {side}; prepare.image_size is {height} x {width}")
        return lines

    @property
    def is_raw(self) -> bool:
        return (self.preprocessing.mean_c, self.preprocessing.std_c) == (RAW.mean_c, RAW.std_c)

    @property
    def card(self) -> dict[str, Any]:
        """What the card of a model says of its network."""
        return {
            "preprocessing": self.preprocessing.to_json(),
            "encoder": {"file": self.name, "sha256": self.sha256, "output": self.output, "pixels": self.source},
            "weights_file": "the head alone; the encoder is in model.onnx",
        }


def load_onnx_encoder(section: Train, size_hw: tuple[int, int], home: Path) -> OnnxEncoder:
    """Read the encoder of `train.backbone` for images of one size. Raises TrainingError: it cannot be used, and why."""
    path = find_file(section.backbone, section.backbone_sha256, home, OF_ENCODER)
    name = section.network_name
    model = _read(path, name)
    output = _choose_output(model.graph, section.output, name)
    onnx_graph.keep_output(model.graph, output)
    pixels = _find_pixels(model.graph, name)
    _check_size(pixels, size_hw, name)
    preprocessing, source = RAW, "its input"
    if pixels.type != TensorProto.UINT8:
        preprocessing, source = choose_preprocessing(section, path)
    elif section.preprocessing not in (None, "none"):
        found = f"is set, but {name} takes uint8: pixels as they are"
        raise TrainingError("params.yaml train.preprocessing", found, "none", "Take it out.")
    num_features = _count_features(model, pixels, size_hw, name)
    onnx_graph.put_pixels_before(model, pixels, preprocessing, num_features, size_hw)
    raised = _raise_opset(model, name)
    given = model if raised is not model else None
    sha256 = hash_file(path)
    return OnnxEncoder(raised, given, name, sha256, output, pixels, preprocessing, source, size_hw, num_features)


def _read(path: Path, name: str) -> onnx.ModelProto:
    try:
        size = path.stat().st_size
        if size > onnx_graph.MAX_BYTES:
            found = f"{name} has {size / 1e9:.1f} GB"
            todo = "Export the encoder in float16, or take a smaller one."
            raise TrainingError(BACKBONE, found, "at most 2 GB, which is the limit of an ONNX file", todo)
        model: onnx.ModelProto = check_onnx(path.read_bytes(), name)
    except OSError as exc:
        raise TrainingError(BACKBONE, f"{path} cannot be read ({exc.strerror})", "a file", ENCODER_TODO) from exc
    except BundleError as exc:
        todo = "Export it again as one file (`external_data=False`) of standard operators."
        raise TrainingError(BACKBONE, f"{name} {exc.found}", exc.expected, todo) from exc
    if not model.graph.node or not model.graph.output:
        raise TrainingError(BACKBONE, f"{name} holds no network", "an ONNX model", ENCODER_TODO)
    if (count := len(model.graph.node)) > MAX_NODES:
        raise TrainingError(BACKBONE, f"{name} has {count:,} operators", f"at most {MAX_NODES:,}", ENCODER_TODO)
    return model


def _choose_output(graph: onnx.GraphProto, wanted: str | None, name: str) -> str:
    names = [value.name for value in graph.output]
    if wanted in names or (wanted is None and len(names) == 1):
        return wanted or names[0]
    known = ", ".join(f"{value.name} {describe_shape(read_shape(value))}" for value in graph.output)
    found = f"got {wanted!r}" if wanted else f"is not set, and {name} has {len(names)} outputs"
    todo = "Set it to the one that is a vector for each image."
    raise TrainingError("params.yaml train.output", found, f"one of {known}", todo)


def _find_pixels(graph: onnx.GraphProto, name: str) -> Pixels:
    """Return the one input of an encoder. Raises TrainingError: it is not one of images."""
    inputs = list_inputs(graph)
    named = ", ".join(value.name for value in inputs) or "no input"
    is_text = [
        value.name
        for value in inputs
        if value.type.tensor_type.elem_type in TEXT_TYPES or any(word in value.name.lower() for word in TEXT_NAMES)
    ]
    if is_text:
        found = f"{name} wants {named}: a text tower, or one for images and text together"
        raise TrainingError(BACKBONE, found, "one input of images", EXPORT)
    if len(inputs) != 1:
        raise TrainingError(BACKBONE, f"{name} wants {named}", "one input of images", EXPORT)
    value = inputs[0]
    kind, shape = value.type.tensor_type.elem_type, read_shape(value)
    if kind not in PIXEL_TYPES:
        found = f"{name} takes {TensorProto.DataType.Name(kind).lower()}"
        raise TrainingError(BACKBONE, found, f"{', '.join(sorted(PIXEL_TYPES.values()))}", "Export it so.")
    shown = describe_shape(shape)
    if shape is not None and len(shape) == 3:
        todo = "Export it with a batch dimension."
        raise TrainingError(BACKBONE, f"{name} takes {shown}: no batch dimension", "(N, 3, H, W)", todo)
    if shape is None or len(shape) != 4:
        raise TrainingError(BACKBONE, f"{name} takes {shown}", "(N, 3, H, W) or (N, H, W, 3)", EXPORT)
    batch, *rest = (size if isinstance(size, int) else None for size in shape)
    if rest[0] == 3 or (rest[0] is None and rest[2] != 3):
        return Pixels(value.name, kind, "NCHW", batch, rest[1], rest[2])
    if rest[2] == 3 or rest[2] is None:
        return Pixels(value.name, kind, "NHWC", batch, rest[0], rest[1])
    found = f"{name} takes {shown}, which has no dimension of 3 colours"
    raise TrainingError(BACKBONE, found, "(N, 3, H, W) or (N, H, W, 3)", EXPORT)


def _check_size(pixels: Pixels, size_hw: tuple[int, int], name: str) -> None:
    height, width = pixels.height or size_hw[0], pixels.width or size_hw[1]
    if (height, width) != size_hw:
        value = height if height == width else [height, width]
        raise TrainingError(
            "params.yaml prepare.image_size",
            f"{name} takes images of {height} x {width}, and they are prepared at {size_hw[0]} x {size_hw[1]}",
            str(value),
            f"Set prepare.image_size to {value}.",
        )


def _count_features(model: onnx.ModelProto, pixels: Pixels, size_hw: tuple[int, int], name: str) -> int:
    """Return the length of the vector that an encoder gives for an image; (N, d, 1, 1) is one too."""
    output = model.graph.output[0]
    kind = output.type.tensor_type.elem_type
    shape: Shape | None = onnx_graph.infer_output(model, pixels, size_hw)
    where = f"output {output.name} of {name}"
    if kind not in (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE):
        raise TrainingError(BACKBONE, f"{where} is {TensorProto.DataType.Name(kind).lower()}", "float numbers", EXPORT)
    if shape is not None and len(shape) == 1:
        todo = "Export it with a batch dimension."
        raise TrainingError(BACKBONE, f"{where} is {describe_shape(shape)}: no batch dimension", "(N, d)", todo)
    is_vector = shape is not None and (len(shape) == 2 or (len(shape) > 2 and set(shape[2:]) == {1}))
    if shape is None or not is_vector or not isinstance(shape[1], int):
        raise TrainingError(
            BACKBONE,
            f"{where} is {describe_shape(shape)}",
            "(N, d), a vector for each image",
            "Choose another one with train.output, or export the pooled features.",
        )
    return shape[1]


def _raise_opset(model: onnx.ModelProto, name: str) -> onnx.ModelProto:
    """Return a graph whose operators are at least of the version that a head is exported in."""
    version = onnx_graph.find_opset(model)
    if version >= onnx_graph.LEAST_OPSET:
        return model
    try:
        raised = version_converter.convert_version(model, onnx_graph.LEAST_OPSET)
    except Exception as exc:  # RuntimeError and classes of its own, from C++
        why = (str(exc).splitlines() or [type(exc).__name__])[-1][:120].rstrip(" .")
        raise TrainingError(
            BACKBONE,
            f"{name} is of opset {version}, and cannot be raised to {onnx_graph.LEAST_OPSET} ({why})",
            f"opset {onnx_graph.LEAST_OPSET} or later",
            f"Export it with opset {onnx_graph.LEAST_OPSET}.",
        ) from exc
    onnx_graph.strip(raised)
    return raised
