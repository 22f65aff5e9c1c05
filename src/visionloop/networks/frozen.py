"""The network before a head that learns from embeddings: of torch by its name, or an ONNX encoder from a file.

It learns no more. The stage `embed` runs it; the ways `frozen` and `knn` put it before their heads.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from visionloop.params import Train

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
        from visionloop.networks.onnx_encoder import load_onnx_encoder

        return load_onnx_encoder(section, size_hw, home)
    from visionloop.networks.export import EmbeddingNetwork
    from visionloop.networks.weights import load_backbone

    return EmbeddingNetwork(*load_backbone(section, size_hw, home), size_hw)
