"""The classifier: uint8 pixels in, logits and embedding out. Scaling and normalisation are part of the network.

Its head is linear and learned, perhaps moved from other classes, or lets neighbours vote without learning.

Dimensions: n images, h height, w width, c channels, k classes, u units (1 for binary, else k), d features, p stored
points, m neighbours that vote.
"""

from collections.abc import Sequence
from typing import Any, Literal

import onnx
import torch
from torch import Tensor, nn
from torch.nn import functional

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


# Similarities closer than this share of the scale are equal: the lower row goes first, in torch and in ONNX alike.
TIE = 2.0**-20
# A neighbour at less than this share of the scale is the image itself, but for rounding.
SAME = 1e-4
_ROWS = 2**25
_FAR = 2.0**8
_BLOCK = 256
_PUSHES = 8
NOISE, TOLERANCE = 1e-3, 1e-2


class NeighbourHead(nn.Module):
    """Lets the nearest stored embeddings vote: k-nearest-neighbour classification as a layer (Cover and Hart, 1967).

    `points_pd` are compared by `metric`; `targets_pk` holds 0 and 1. `uniform`: one vote each; `distance`: the votes
    are to each other as one over the distance. Each class has `smoothing` votes beforehand (Laplace), so that no logit
    is infinite.
    """

    points_pd: Tensor
    center_d: Tensor
    targets_pk: Tensor

    def __init__(
        self,
        points_pd: Tensor,
        targets_pk: Tensor,
        *,
        task: str,
        num_neighbours: int = 5,
        metric: Literal["cosine", "euclidean"] = "cosine",
        vote: Literal["uniform", "distance"] = "uniform",
        smoothing: float = 0.1,
    ) -> None:
        super().__init__()
        if not 1 <= num_neighbours <= len(points_pd) <= _ROWS:
            raise ValueError(f"{num_neighbours} neighbours of {len(points_pd)} points")
        self.task, self.num_neighbours, self.metric, self.vote = task, num_neighbours, metric, vote
        self.smoothing = smoothing
        points_pd = functional.normalize(points_pd.float()) if metric == "cosine" else points_pd.float()
        # Distances do not change by moving everything; less is lost to rounding near the origin.
        center_d = points_pd.mean(dim=0)
        points_pd = points_pd - center_d
        self.register_buffer("center_d", center_d)
        self.register_buffer("points_pd", points_pd.contiguous())
        self.register_buffer("targets_pk", targets_pk.to(torch.uint8).contiguous())
        self.scale = max(float(points_pd.square().sum(dim=1).mean().sqrt()), 1e-12)

    def forward(self, embedding_nd: Tensor, own_n: Tensor | None = None) -> Tensor:
        """Map embeddings (n, d) to logits (n, k); `own_n`: the point that each image is itself, which does not vote.

        One label: log of the smoothed shares, so that softmax gives the shares back; several: their log odds.
        """
        votes_nk = self.count_votes(embedding_nd, own_n)
        s, m = self.smoothing, self.num_neighbours
        if self.task == "multilabel":
            return torch.log(votes_nk + s) - torch.log(m - votes_nk + s)
        return torch.log((votes_nk + s) / (m + s * votes_nk.shape[1]))

    def count_votes(self, embedding_nd: Tensor, own_n: Tensor | None = None) -> Tensor:
        """Return the votes (n, k); all votes of an image together are as many as its neighbours."""
        nearest_nm, distance_nm = self.find(embedding_nd, own_n)
        targets_nmk = self.targets_pk[nearest_nm].to(embedding_nd.dtype)
        if self.vote == "uniform":
            return targets_nmk.sum(dim=1)
        closeness_nm = self._same / distance_nm.clamp(min=self._same)
        weight_nm = closeness_nm / closeness_nm.sum(dim=1, keepdim=True) * self.num_neighbours
        return (weight_nm.unsqueeze(2) * targets_nmk).sum(dim=1).clamp(max=float(self.num_neighbours))

    def find(self, embedding_nd: Tensor, own_n: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the nearest points (n, m), in no order, and their distances: 1 - cosine, or Euclidean."""
        query_nd = functional.normalize(embedding_nd, eps=1e-12) if self.metric == "cosine" else embedding_nd
        query_nd = query_nd - self.center_d
        own_1p = self.points_pd.square().sum(dim=1).unsqueeze(0)
        squared_np = own_1p - 2 * (query_nd @ self.points_pd.T) + query_nd.square().sum(dim=1, keepdim=True)
        far_np = (squared_np / self.scale**2).clamp(0.0, _FAR)
        steps_np = torch.round(far_np / TIE)
        if own_n is not None:
            steps_np[torch.arange(len(own_n)), own_n] = torch.inf
        # All that are nearer than the last one that votes, and of those as far as it the first rows: then ties have one
        # order everywhere. In 32 bits: OpenVINO has no whole numbers of 64, and would take any points for the nearest.
        last_n1 = torch.topk(steps_np, self.num_neighbours, dim=1, largest=False, sorted=True).values[:, -1:]
        number = self.points_pd.shape[0]
        row_1p = torch.arange(number, dtype=torch.int32, device=embedding_nd.device).unsqueeze(0)
        rank_np = row_1p + number * ((steps_np >= last_n1).to(torch.int32) + (steps_np > last_n1).to(torch.int32))
        nearest_nm = torch.topk(rank_np, self.num_neighbours, dim=1, largest=False, sorted=True).indices
        # Anew from the difference: what is left of two large numbers would be mostly rounding.
        squared_nm = (query_nd.unsqueeze(1) - self.points_pd[nearest_nm]).square().sum(dim=2)
        return nearest_nm, squared_nm / 2 if self.metric == "cosine" else squared_nm.sqrt()

    @property
    def _same(self) -> float:
        """The distance of an image to itself, rounding included."""
        length = SAME * self.scale
        return length**2 / 2 if self.metric == "cosine" else length


def find_steady(head: NeighbourHead, embedding_nd: Tensor) -> Tensor:
    """Say which answers (n) stay within TOLERANCE when embeddings are disturbed by the share NOISE of themselves.

    The disturbance is the same at each call, and far above what rounding does.
    """
    generator = torch.Generator().manual_seed(0)
    length_n1 = embedding_nd.norm(dim=1, keepdim=True)
    steady_n = torch.ones(len(embedding_nd), dtype=torch.bool)
    with torch.no_grad():
        for start in range(0, len(embedding_nd), _BLOCK):
            block = slice(start, start + _BLOCK)
            logits_nk = head(embedding_nd[block])
            for _ in range(_PUSHES):
                push_nd = torch.randn(logits_nk.shape[0], embedding_nd.shape[1], generator=generator)
                push_nd = functional.normalize(push_nd) * length_n1[block] * NOISE
                moved_n = (head(embedding_nd[block] + push_nd) - logits_nk).abs().amax(dim=1)
                steady_n[block] &= moved_n <= TOLERANCE
    return steady_n


def map_head(head: nn.Linear, classes: Sequence[str], old: dict[str, Tensor], old_classes: Sequence[str]) -> list[str]:
    """Set a fresh linear head to what a learned one (`weight`, `bias`) knows of the same classes, by name.

    A single unit is the positive class's logit minus the other's, so it is half of it for one and minus half for the
    other. What is new keeps its random start; what is gone is dropped. Return the classes that were known.
    """
    rows = _split_rows(old, old_classes)
    known = [name for name in classes if name in rows]
    with torch.no_grad():
        if head.out_features == 1:
            if known:
                zero = torch.zeros_like(next(iter(rows.values())))
                _set_row(head, 0, rows.get(classes[1], zero) - rows.get(classes[0], zero))
        else:
            for number, name in enumerate(classes):
                if name in rows:
                    _set_row(head, number, rows[name])
    return known


def _split_rows(old: dict[str, Tensor], classes: Sequence[str]) -> dict[str, Tensor]:
    """Return what a head has for each class: its weights and, last, its bias."""
    matrix = torch.cat([old["weight"], old["bias"].unsqueeze(1)], dim=1).float()
    if len(matrix) == 1 and len(classes) == 2:
        return {classes[0]: -matrix[0] / 2, classes[1]: matrix[0] / 2}
    return dict(zip(classes, matrix, strict=True))


def _set_row(head: nn.Linear, number: int, row: Tensor) -> None:
    head.weight[number] = row[:-1]
    head.bias[number] = row[-1]
