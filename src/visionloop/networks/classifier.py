"""The classifier: uint8 pixels in, logits and embedding out. Scaling and normalisation are part of the network.

Dimensions: n images, h height, w width, c channels, k classes, u units (1 for binary, else k), d features.
"""

from typing import Any

import onnx
import torch
from torch import Tensor, nn

from visionloop.networks.backbones import find_preprocessing


class Classifier(nn.Module):
    """A backbone with its normalisation before it and a linear head behind it.

    `task`: binary, multiclass or multilabel.
    """

    mean_c: Tensor
    std_c: Tensor

    def __init__(
        self, backbone: nn.Module, num_features: int, num_classes: int, *, task: str, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.num_features, self.num_classes, self.task = num_features, num_classes, task
        self.backbone = backbone
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(num_features, 1 if task == "binary" else num_classes)
        wanted = find_preprocessing(backbone)
        self.register_buffer("mean_c", torch.tensor(wanted.mean_c).view(1, 3, 1, 1) * 255)
        self.register_buffer("std_c", torch.tensor(wanted.std_c).view(1, 3, 1, 1) * 255)

    def embed(self, images_nhwc: Tensor) -> Tensor:
        """Map images of 0 to 255 (n, h, w, 3), uint8 or float, to embeddings (n, d).

        The permuted view of an NHWC tensor is `channels_last` already: convolutions run in their fast layout.
        """
        images_nchw = images_nhwc.permute(0, 3, 1, 2).to(torch.float32)
        scale_c = 1 / self.std_c
        # In one pass over the pixels, not two.
        return self.backbone(torch.addcmul(-self.mean_c * scale_c, images_nchw, scale_c))  # type: ignore[no-any-return]

    def classify(self, embedding_nd: Tensor) -> Tensor:
        """Map embeddings (n, d) to units (n, u)."""
        return self.head(self.dropout(embedding_nd))  # type: ignore[no-any-return]

    def forward(self, images_nhwc: Tensor) -> tuple[Tensor, Tensor]:
        """Map images (n, h, w, 3) to units (n, u) and embeddings (n, d)."""
        embedding_nd = self.embed(images_nhwc)
        return self.classify(embedding_nd), embedding_nd


class HeadAlone(nn.Module):
    """A head without the network before it."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head

    def forward(self, embedding_nd: Tensor) -> tuple[Tensor, Tensor]:
        """Map embeddings (n, d) to units (n, u) and the same embeddings."""
        return self.head(embedding_nd), embedding_nd


class EncodedClassifier(HeadAlone):
    """A head behind an ONNX encoder, which torch cannot run: it maps embeddings, and in the bundle images.

    Its state is that of the head. `graph` is the encoder's, `card` what the card of a model says of it.
    """

    def __init__(self, head: nn.Module, graph: onnx.ModelProto, card: dict[str, Any]) -> None:
        super().__init__(head)
        self.graph, self.card = graph, card


class ExportedClassifier(nn.Module):
    """The classifier as it is exported: logits always have one column a class; a single unit z becomes [0, z]."""

    def __init__(self, classifier: nn.Module) -> None:
        super().__init__()
        self.classifier = classifier

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Map what the classifier maps, uint8 images (n, h, w, 3), to logits (n, k) and embeddings (n, d)."""
        units_nu, embedding_nd = self.classifier(images)
        if units_nu.shape[1] == 1:
            units_nu = torch.cat([torch.zeros_like(units_nu), units_nu], dim=1)
        return units_nu, embedding_nd
