"""torch to ONNX: the classifier or the encoder as one file, without marks of where it was made, and its graph in int8.

int8: weights in eight bits for each channel, activations by what some images gave (static). The pixels' scaling, the
first layer and the head stay in fp32: there eight bits change answers most and save least. So the embedding is a float
too, and a head that lets neighbours vote is as it was. Nothing is trained again.

Jacob et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference", CVPR 2018.
Written as QuantizeLinear and DequantizeLinear (QDQ): standard operators, which each runtime fuses as it can.

Dimensions: n images, h height, w width, d features.
"""

import contextlib
import hashlib
import io
import logging
import os
import tempfile
import warnings
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from visionloop.data.images import UInt8Array
from visionloop.errors import TrainingError
from visionloop.networks import onnx_graph
from visionloop.networks.classifier import Classifier, EncodedClassifier, ExportedClassifier, HeadAlone

OPSET = 20
SLICE_PIXELS = 512 * 224 * 224  # on a GPU; a few gigabytes with the largest networks


def export_onnx(
    classifier: nn.Module, size_hw: tuple[int, int], path: Path, *, encoder: onnx.ModelProto | None = None
) -> None:
    """Write a classifier as ONNX: input `images` uint8 (n, h, w, 3); outputs `logits` (n, k), `embedding` (n, d).

    An ONNX encoder goes into the same graph, and so does `encoder`: the network before the head as it was exported
    already. Raises TrainingError: that is more than an ONNX file can hold.
    """
    if isinstance(classifier, EncodedClassifier):
        encoder = classifier.graph
    if encoder is None:
        module = ExportedClassifier(classifier).eval()
        model = _export(module, _make_images(size_hw), "images", ("logits", "embedding"))
    else:
        module = ExportedClassifier(HeadAlone(classifier.head)).eval()  # type: ignore[arg-type]
        embeddings = torch.zeros(2, onnx_graph.read_num_features(encoder))
        opset = onnx_graph.find_opset(encoder)
        head = _export(module, embeddings, "embedding", ("logits", "same"), opset=opset)
        model = onnx_graph.put_head_behind(encoder, head)
    path.write_bytes(onnx_graph.to_bytes(model))


def _make_images(size_hw: tuple[int, int]) -> Tensor:
    return torch.zeros(2, *size_hw, 3, dtype=torch.uint8)


def _export(
    module: nn.Module, example: Tensor, name: str, outputs: tuple[str, ...], *, opset: int = OPSET
) -> onnx.ModelProto:
    """Return a module from one input (n, ...) to the named outputs (n, ...) as ONNX."""
    with warnings.catch_warnings(), _quiet_logging(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            module,
            (example,),
            dynamo=True,
            input_names=[name],
            output_names=list(outputs),
            dynamic_shapes=({0: torch.export.Dim.DYNAMIC},),
            opset_version=opset,
            external_data=False,
        )
    assert program is not None
    model: onnx.ModelProto = program.model_proto
    onnx_graph.strip(model)
    return model


def compute_torch_logits(
    classifier: nn.Module, images_nhwc: UInt8Array, embedding_nd: NDArray[np.float32]
) -> NDArray[np.float32]:
    """Return the logits (n, k) that torch itself gives, in fp32 and evaluation mode.

    Torch begins with the images, behind an ONNX encoder with the embeddings that ONNX gave for them.
    """
    module: nn.Module = ExportedClassifier(classifier).eval()
    start = embedding_nd if isinstance(classifier, EncodedClassifier) else images_nhwc
    with torch.no_grad():
        logits_nk, _ = module(torch.from_numpy(start))
    return torch.as_tensor(logits_nk).numpy()


@contextlib.contextmanager
def _quiet_logging():  # type: ignore[no-untyped-def]
    """The exporter logs each of its steps; errors still raise."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


class EmbeddingNetwork(nn.Module):
    """Maps uint8 images (n, h, w, 3) to embeddings (n, d), exactly as a classifier around this backbone does."""

    def __init__(self, backbone: nn.Module, num_features: int, size_hw: tuple[int, int]) -> None:
        super().__init__()
        self.num_features, self.size_hw = num_features, size_hw
        self.classifier = Classifier(backbone, num_features, 2, task="binary")
        self.classifier.head = nn.Identity()  # type: ignore[assignment]  # no weights that nothing uses

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier.embed(images)

    @cached_property
    def weights_digest(self) -> str:
        """The sha256 over the backbone's tensors: names, types, shapes and values."""
        total = hashlib.sha256()
        for name, tensor in sorted(self.classifier.backbone.state_dict().items()):
            value = tensor.detach().cpu().contiguous()
            total.update(f"{name} {value.dtype} {tuple(value.shape)} ".encode())
            total.update(value.reshape(-1).view(torch.uint8).numpy().data)
        return total.hexdigest()

    def put_before(self, head: nn.Module, num_classes: int, task: str) -> Classifier:
        """Return a classifier of the backbone and a head."""
        whole = Classifier(self.classifier.backbone, self.num_features, num_classes, task=task)
        whole.head = head  # type: ignore[assignment]
        return whole

    def write(self, path: Path) -> None:
        """Write it as ONNX: input `images` uint8 (n, h, w, 3), output `embedding` (n, d)."""
        model = _export(self.cpu().eval(), _make_images(self.size_hw), "images", ("embedding",))
        path.write_bytes(onnx_graph.to_bytes(model))

    def describe(self) -> list[str]:
        """Return nothing: its name says what it is."""
        return []


class TorchEncoder:
    """Runs an embedding network in torch, as is fast on a GPU: bf16, channels_last, normalised on the device."""

    def __init__(self, network: EmbeddingNetwork, *, device: str = "cuda", precision: str = "bf16") -> None:
        self.device = torch.device(device)
        self.dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        self.network = network.eval().to(self.device).to(memory_format=torch.channels_last)

    def embed(self, images_nhwc: UInt8Array) -> NDArray[np.float32]:
        """Map images (n, h, w, 3) to embeddings (n, d), so many at a time that memory stays flat."""
        height, width = images_nhwc.shape[1:3]
        step = max(1, SLICE_PIXELS // (height * width))
        parts = [self._run(torch.from_numpy(images_nhwc[i : i + step])) for i in range(0, len(images_nhwc), step)]
        return torch.cat(parts).cpu().numpy() if parts else np.zeros((0, 0), np.float32)

    def _run(self, images_nhwc: Tensor) -> Tensor:
        if self.device.type == "cuda":
            images_nhwc = images_nhwc.pin_memory()
        enabled = self.dtype == torch.bfloat16
        with torch.inference_mode(), torch.autocast(self.device.type, self.dtype, enabled=enabled):
            embedding_nd = self.network(images_nhwc.to(self.device, non_blocking=True))
        return embedding_nd.float()  # type: ignore[no-any-return]


def has_gpu() -> bool:
    """Say whether torch can use a GPU."""
    return torch.cuda.is_available()


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
