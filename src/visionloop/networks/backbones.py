"""Backbones: images to feature vectors. Any classification network of torchvision or timm by name, and some of our own.

A backbone has an attribute `preprocessing`: the pixels that it wants. `find_preprocessing` reads it.
Add one: a function from the image size to a module here, its name in `OWN`, and in `OWN_NAMES` of `names.py`.
"""

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torchvision import models

from visionloop.errors import TrainingError, shorten
from visionloop.networks.names import LITE0, TIMM, check_backbone
from visionloop.networks.preprocessing import IMAGENET, Preprocessing

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
    LITE0: lambda size_hw: _build_timm("tf_efficientnet_lite0", size_hw),  # TensorFlow's padding, 3.4 M parameters
}


def make_backbone(name: str, size_hw: SizeHW) -> tuple[nn.Module, int]:
    """Build a backbone without its head and with random weights; return it and its number of features.

    Raises:
        TrainingError: the name is unknown (the nearest are named), or the network cannot take this image size.
    """
    library = check_backbone(name)
    try:
        backbone = _build(name, library, size_hw)
        backbone.preprocessing = describe_preprocessing(name)  # type: ignore[assignment]
        return backbone, _count_features(backbone, size_hw)
    except (RuntimeError, AssertionError, ValueError) as exc:
        why = (str(exc).splitlines() or [type(exc).__name__])[0][:120].rstrip(" .;")
        raise TrainingError(
            "params.yaml prepare.image_size",
            f"{name} cannot take images of {size_hw[0]} x {size_hw[1]} ({why})",
            _describe_sizes(name, library, size_hw),
            "Edit the file.",
        ) from exc


def find_preprocessing(backbone: nn.Module) -> Preprocessing:
    """Return what pixels a backbone wants; those of ImageNet's usual normalisation unless it says otherwise."""
    found = getattr(backbone, "preprocessing", IMAGENET)
    assert isinstance(found, Preprocessing)
    return found


def describe_preprocessing(name: str) -> Preprocessing:
    """Return what pixels the published weights of a network want. Raises TrainingError: there is no such network."""
    library = check_backbone(name)
    if name == LITE0:  # (x - 127) / 128, as its authors have it
        return Preprocessing((127 / 255,) * 3, (128 / 255,) * 3, 224, "bicubic", 0.875)
    if library == "torchvision":
        rule: Any = models.get_model_weights(name).DEFAULT.transforms()
        side = rule.crop_size[0]
        return Preprocessing(
            tuple(rule.mean), tuple(rule.std), side, rule.interpolation.value, side / rule.resize_size[0]
        )
    if library == "timm":
        found = find_timm_facts(name)
        return Preprocessing(found.mean, found.std, found.input_size[1], found.interpolation, found.crop_pct)
    return IMAGENET


def find_timm_facts(name: str) -> Any:
    """Return what timm says of the weights of a network: sizes, normalisation, licence, address.

    Raises:
        TrainingError: there are no weights with this tag.
    """
    from timm.models import get_arch_pretrained_cfgs, get_pretrained_cfg

    base, dot, tag = name.removeprefix(TIMM).partition(".")
    tags = sorted(full.partition(".")[2] for full in get_arch_pretrained_cfgs(base))
    if dot and tag not in tags:
        expected = f"one of its weights: {shorten(tags, 8)}" if tags else f"{base}, which has no published weights"
        raise TrainingError("params.yaml train.backbone", f"got {name!r}", expected, "Edit the file.")
    return get_pretrained_cfg(name.removeprefix(TIMM))


def _build(name: str, library: str, size_hw: SizeHW) -> nn.Module:
    if library == "own":
        return OWN[name](size_hw)
    if library == "timm":
        return _build_timm(name.removeprefix(TIMM), size_hw)
    backbone: nn.Module = models.get_model(name, weights=None, **_choose_options(name, size_hw))
    _drop_head(backbone, name)
    return backbone


def _build_timm(name: str, size_hw: SizeHW) -> nn.Module:
    """Build a network of timm, for this image size where it must know it. Raises ValueError where it cannot."""
    import timm

    facts = find_timm_facts(name)
    options: dict[str, Any] = {"img_size": size_hw} if facts.fixed_input_size else {}
    try:
        backbone: nn.Module = timm.create_model(name, pretrained=False, num_classes=0, **options)
    except TypeError as exc:
        if not options or "img_size" not in str(exc):
            raise
        if size_hw != tuple(facts.input_size[1:]):
            raise ValueError("its size is fixed") from exc
        backbone = timm.create_model(name, pretrained=False, num_classes=0)
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
        try:
            output = torch.func.functional_call(backbone, shapes, (torch.zeros(1, 3, *size_hw, device="meta"),))
        except NotImplementedError:  # it looks at values on its way
            output = backbone(torch.zeros(1, 3, *size_hw, device=next(backbone.parameters()).device))
    backbone.train(was_training)
    if output.ndim != 2:
        raise ValueError(f"it gives {tuple(output.shape)}, not one vector an image")
    return int(output.shape[1])


def _describe_sizes(name: str, library: str, size_hw: SizeHW) -> str:
    """Say which squares a network does take: those nearest to the size that was asked for, or its own."""
    by_distance = sorted(COMMON_SIZES, key=lambda side: abs(side - max(size_hw)))
    nearest = sorted(itertools.islice((side for side in by_distance if _takes(name, library, (side, side))), 3))
    if nearest:
        return f"a size that it takes, such as {', '.join(map(str, nearest))}"
    return f"the size that it was made for, {describe_preprocessing(name).side_px or 'which is not known'}"


def _takes(name: str, library: str, size_hw: SizeHW) -> bool:
    try:
        with torch.device("meta"):  # shapes alone: a refusal costs no memory
            _count_features(_build(name, library, size_hw), size_hw)
    except (RuntimeError, AssertionError, ValueError):
        return False
    return True
