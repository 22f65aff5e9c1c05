"""Backbones: images to feature vectors. Any torchvision classification model by name, and small CNNs of our own.

Add one: a function from the image size to a module here, its name in `OWN`, and in `OWN_NAMES` of `names.py`.
"""

import itertools
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torchvision import models

from visionloop.errors import TrainingError
from visionloop.networks.names import check_backbone

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
SizeHW = tuple[int, int]
# Squares that are offered instead of a size that a network cannot take.
COMMON_SIZES = (32, 64, 96, 128, 160, 192, 224, 256, 299, 320, 384, 448, 512)


class SmallCNN(nn.Module):
    """Three convolution blocks and a mean over positions: for images of about 32 pixels. 0.07 M parameters."""

    def __init__(self) -> None:
        super().__init__()
        widths = (3, 16, 32, 64)
        layers: list[nn.Module] = []
        for before, after in itertools.pairwise(widths):
            layers += [
                nn.Conv2d(before, after, 3, padding=1, bias=False),
                nn.BatchNorm2d(after),
                nn.ReLU(inplace=True),
                nn.Conv2d(after, after, 3, padding=1, bias=False),
                nn.BatchNorm2d(after),
                nn.ReLU(inplace=True),
                nn.MaxPool2d(2),
            ]
        self.features = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())

    def forward(self, images_nchw: Tensor) -> Tensor:
        return self.features(images_nchw)  # type: ignore[no-any-return]


class DepthwiseCNN(nn.Module):
    """Two light convolutions, pooled hard, and a dense layer over all positions: for large images and few classes.

    Depthwise 3 x 3, 1 x 1 to 16, max pool 3, 3 x 3 to 32, max pool 3, dense 60. The dense layer has an input for each
    position, so a network fits one image size: 18 M parameters at 768 x 1024.
    """

    WIDTH = 60

    def __init__(self, size_hw: SizeHW) -> None:
        super().__init__()
        # No padding: each 3 x 3 convolution takes two pixels away, each pool divides by three.
        positions = [((side - 2) // 3 - 2) // 3 for side in size_hw]
        self.features = nn.Sequential(
            nn.Conv2d(3, 3, 3, groups=3),
            nn.Conv2d(3, 16, 1),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(3),
            nn.Conv2d(16, 32, 3),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(3),
            nn.Flatten(),
        )
        self.dense = nn.Sequential(nn.Linear(32 * positions[0] * positions[1], self.WIDTH), nn.ReLU(inplace=True))

    def forward(self, images_nchw: Tensor) -> Tensor:
        return self.dense(self.features(images_nchw))  # type: ignore[no-any-return]


OWN: dict[str, Callable[[SizeHW], nn.Module]] = {
    "small_cnn": lambda size_hw: SmallCNN(),
    "depthwise_cnn": DepthwiseCNN,
}


def list_backbones() -> list[str]:
    """Return the names of all backbones, sorted."""
    return sorted([*OWN, *models.list_models(module=models)])


def make_backbone(name: str, size_hw: SizeHW) -> tuple[nn.Module, int]:
    """Build a backbone without its head and with random weights; return it and its number of features.

    Raises:
        TrainingError: the name is unknown (the nearest are named), or the network cannot take this image size.
    """
    check_backbone(name, list_backbones())
    try:
        backbone = _build(name, size_hw)
        return backbone, _count_features(backbone, size_hw)
    except (RuntimeError, AssertionError, ValueError) as exc:
        why = (str(exc).splitlines() or [type(exc).__name__])[0][:120].rstrip(" .;")
        raise TrainingError(
            "params.yaml prepare.image_size",
            f"{name} cannot take images of {size_hw[0]} x {size_hw[1]} ({why})",
            _describe_sizes(name, size_hw),
            "Edit the file.",
        ) from exc


def _build(name: str, size_hw: SizeHW) -> nn.Module:
    if name in OWN:
        return OWN[name](size_hw)
    backbone: nn.Module = models.get_model(name, weights=None, **_choose_options(name, size_hw))
    _drop_head(backbone, name)
    return backbone


def _choose_options(name: str, size_hw: SizeHW) -> dict[str, object]:
    """What some networks of torchvision must be told: the image size, and that there are no auxiliary heads."""
    if name in {"googlenet", "inception_v3"}:
        # Their published weights want pixels from -1 to 1: they turn ImageNet's normalisation into that themselves.
        return {"aux_logits": False, "init_weights": True, "transform_input": True}
    if name.startswith("vit_"):
        if size_hw[0] != size_hw[1]:
            raise ValueError("its positions are those of a square")
        return {"image_size": size_hw[0]}
    return {"input_size": size_hw} if name == "maxvit_t" else {}


def _drop_head(network: nn.Module, name: str) -> None:
    """Replace the last linear layer (in SqueezeNet: the last convolution) by nothing."""
    kind = nn.Conv2d if name.startswith("squeezenet") else nn.Linear
    last = [path for path, module in network.named_modules() if isinstance(module, kind)][-1]
    parent_path, _, child = last.rpartition(".")
    setattr(network.get_submodule(parent_path), child, nn.Identity())


def _count_features(backbone: nn.Module, size_hw: SizeHW) -> int:
    """Return the length of the vector that the backbone gives, from shapes alone: nothing is computed."""
    was_training = backbone.training
    backbone.eval()
    tensors = {**dict(backbone.named_parameters()), **dict(backbone.named_buffers())}
    shapes = {name: tensor.detach().to("meta") for name, tensor in tensors.items()}
    with torch.no_grad():
        output = torch.func.functional_call(backbone, shapes, (torch.zeros(1, 3, *size_hw, device="meta"),))
    backbone.train(was_training)
    if output.ndim != 2:
        raise ValueError(f"it gives {tuple(output.shape)}, not one vector an image")
    return int(output.shape[1])


def _describe_sizes(name: str, size_hw: SizeHW) -> str:
    """Say which squares a network does take: those nearest to the size that was asked for."""
    by_distance = sorted(COMMON_SIZES, key=lambda side: abs(side - max(size_hw)))
    nearest = sorted(itertools.islice((side for side in by_distance if _takes(name, (side, side))), 3))
    return f"a size that it takes, such as {', '.join(map(str, nearest))}" if nearest else "a size it was made for"


def _takes(name: str, size_hw: SizeHW) -> bool:
    try:
        with torch.device("meta"):  # shapes alone: a refusal costs no memory
            _count_features(_build(name, size_hw), size_hw)
    except (RuntimeError, AssertionError, ValueError):
        return False
    return True
