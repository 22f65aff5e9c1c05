"""Backbones: images to feature vectors. Any torchvision classification model by name, and a small CNN of our own.

Add one: a function here and its name in `OWN`.
"""

import difflib
import itertools

import torch
from torch import Tensor, nn
from torchvision import models

from visionloop.errors import TrainingError

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


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


OWN = {"small_cnn": SmallCNN}


def list_backbones() -> list[str]:
    """Return the names of all backbones, sorted."""
    return sorted([*OWN, *models.list_models(module=models)])


def make_backbone(name: str, size_hw: tuple[int, int]) -> tuple[nn.Module, int]:
    """Build a backbone without its head and with random weights; return it and its number of features.

    Raises:
        TrainingError: the name is unknown (the nearest are named), or the network cannot take this image size.
    """
    if name in OWN:
        backbone: nn.Module = OWN[name]()
    elif name in list_backbones():
        options = {"aux_logits": False, "init_weights": True} if name in {"googlenet", "inception_v3"} else {}
        backbone = models.get_model(name, weights=None, **options)
        _drop_head(backbone, name)
    else:
        near = difflib.get_close_matches(name, list_backbones(), n=3) or ["resnet18", "mobilenet_v3_large"]
        raise TrainingError(
            "params.yaml train.backbone",
            f"got {name!r}",
            f"a known backbone; near: {', '.join(near)}",
            "Edit the file.",
        )
    return backbone, _count_features(backbone, name, size_hw)


def _drop_head(network: nn.Module, name: str) -> None:
    """Replace the last linear layer (in SqueezeNet: the last convolution) by nothing."""
    kind = nn.Conv2d if name.startswith("squeezenet") else nn.Linear
    last = [path for path, module in network.named_modules() if isinstance(module, kind)][-1]
    parent_path, _, child = last.rpartition(".")
    setattr(network.get_submodule(parent_path), child, nn.Identity())


def _count_features(backbone: nn.Module, name: str, size_hw: tuple[int, int]) -> int:
    backbone.eval()
    try:
        with torch.no_grad():
            shape = backbone(torch.zeros(1, 3, *size_hw)).shape
    except (RuntimeError, AssertionError, ValueError) as exc:
        raise TrainingError(
            "params.yaml prepare.image_size",
            f"{name} cannot take images of {size_hw[0]} x {size_hw[1]} ({str(exc).splitlines()[0][:120]})",
            "a size it was made for, mostly 224",
            "Edit the file.",
        ) from exc
    finally:
        backbone.train()
    return int(shape[1])
