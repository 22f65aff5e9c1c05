"""torch to ONNX: one self-contained file, without paths or other marks of where it was made."""

import contextlib
import io
import logging
import warnings
from pathlib import Path

import onnx
import torch
from torch import nn

from visionloop.networks.classifier import ExportedClassifier

OPSET = 20


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
