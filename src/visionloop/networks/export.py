"""torch to ONNX: the classifier or the encoder as one file, without marks of where it was made.

Dimensions: n images, h height, w width, d features.
"""

import contextlib
import hashlib
import io
import logging
import warnings
from pathlib import Path

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from visionloop.data.images import UInt8Array
from visionloop.networks.classifier import Classifier, ExportedClassifier

OPSET = 20
SLICE_PIXELS = 512 * 224 * 224  # on a GPU; a few gigabytes with the largest networks


def export_onnx(classifier: nn.Module, size_hw: tuple[int, int], path: Path) -> None:
    """Write a classifier as ONNX: input `images` uint8 (n, h, w, 3); outputs `logits` (n, k), `embedding` (n, d)."""
    export_module(ExportedClassifier(classifier).eval(), size_hw, ("logits", "embedding"), path)


def export_module(module: nn.Module, size_hw: tuple[int, int], outputs: tuple[str, ...], path: Path) -> None:
    """Write a module from uint8 images (n, h, w, 3) to the named outputs (n, ...) as ONNX."""
    example = torch.zeros(2, *size_hw, 3, dtype=torch.uint8)
    with warnings.catch_warnings(), _quiet_logging(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            module,
            (example,),
            dynamo=True,
            input_names=["images"],
            output_names=list(outputs),
            dynamic_shapes={"images": {0: torch.export.Dim.DYNAMIC}},
            opset_version=OPSET,
            external_data=False,
        )
    assert program is not None
    model = program.model_proto
    _strip(model)
    path.write_bytes(model.SerializeToString(deterministic=True))


def compute_torch_logits(classifier: nn.Module, images_nhwc: torch.Tensor) -> torch.Tensor:
    """Return the logits (n, k) that torch itself gives, in fp32 and evaluation mode."""
    module: nn.Module = ExportedClassifier(classifier).eval()
    with torch.no_grad():
        logits_nk, _ = module(images_nhwc)
    return torch.as_tensor(logits_nk)


def _strip(model: onnx.ModelProto) -> None:
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
        graphs += [attribute.g for node in graph.node for attribute in node.attribute if attribute.HasField("g")]


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

    def __init__(self, backbone: nn.Module, num_features: int) -> None:
        super().__init__()
        self.classifier = Classifier(backbone, num_features, 2, task="binary")
        self.classifier.head = nn.Identity()  # type: ignore[assignment]  # no weights that nothing uses

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier.embed(images)


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


def export_encoder(network: EmbeddingNetwork, size_hw: tuple[int, int], path: Path) -> None:
    """Write an embedding network as ONNX: input `images` uint8 (n, h, w, 3), output `embedding` (n, d)."""
    export_module(network.cpu().eval(), size_hw, ("embedding",), path)


def compute_weights_digest(backbone: nn.Module) -> str:
    """Return the sha256 over a network's tensors: names, types, shapes and values."""
    total = hashlib.sha256()
    for name, tensor in sorted(backbone.state_dict().items()):
        value = tensor.detach().cpu().contiguous()
        total.update(f"{name} {value.dtype} {tuple(value.shape)} ".encode())
        total.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()


def has_gpu() -> bool:
    """Say whether torch can use a GPU."""
    return torch.cuda.is_available()
