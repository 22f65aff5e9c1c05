"""Every backbone by name: built, its features counted, refused where it must be."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torchvision.models.regnet import BlockParams

from visionloop.errors import TrainingError
from visionloop.networks.backbones import OWN, DepthwiseCNN, list_backbones, make_backbone

FAMILIES = (
    *("alexnet", "convnext", "densenet", "depthwise_cnn", "efficientnet", "googlenet", "inception_v3", "maxvit"),
    *("mnasnet", "mobilenet_v2", "mobilenet_v3", "regnet", "resnet", "resnext", "shufflenet", "small_cnn"),
    *("squeezenet", "swin", "vgg", "vit", "wide_resnet"),
)


@pytest.fixture
def on_meta(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Shapes alone: the largest network costs nothing. RegNet computes its widths with tensors, which need values."""
    plan: Callable[..., Any] = BlockParams.from_init_params.__func__  # type: ignore[attr-defined]

    def plan_on_cpu(cls: type, *args: Any, **options: Any) -> Any:
        with torch.device("cpu"):
            return plan(cls, *args, **options)

    monkeypatch.setattr(BlockParams, "from_init_params", classmethod(plan_on_cpu))
    return torch.device("meta")


def test_the_list_holds_every_family_and_no_detector() -> None:
    names = list_backbones()
    assert names == sorted(set(names))
    assert len(names) >= 80
    assert all(any(name.startswith(family) for name in names) for family in FAMILIES)
    assert not [name for name in names if not name.startswith(FAMILIES)]
    assert set(OWN) == {"small_cnn", "depthwise_cnn"}


@pytest.mark.parametrize(
    ("name", "size_hw", "expected"),
    [
        ("small_cnn", (32, 32), 64),
        ("depthwise_cnn", (768, 1024), 60),
        ("resnet18", (32, 48), 512),
        ("mobilenet_v2", (96, 96), 1280),
        ("mobilenet_v3_small", (64, 64), 1024),
        ("squeezenet1_1", (64, 64), 512),
        ("vit_b_32", (96, 96), 768),
    ],
)
def test_features_are_counted(name: str, size_hw: tuple[int, int], expected: int, on_meta: Any) -> None:
    with on_meta:
        backbone, num_features = make_backbone(name, size_hw)
        assert backbone.training
        assert num_features == expected
        assert tuple(backbone.eval()(torch.zeros(2, 3, *size_hw)).shape) == (2, expected)


def test_counting_features_draws_no_random_number_and_changes_no_weight() -> None:
    torch.manual_seed(3)
    backbone, _ = make_backbone("small_cnn", (32, 32))
    after = torch.rand(1)
    torch.manual_seed(3)
    again = OWN["small_cnn"]((32, 32))
    assert torch.equal(torch.rand(1), after)
    for ours, theirs in zip(backbone.parameters(), again.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert all(p.device.type == "cpu" for p in backbone.parameters())


@pytest.mark.parametrize(
    ("name", "near"),
    [("resnet81", "near: resnet18"), ("mobilenetv2", "mobilenet_v2"), ("dense", "near: "), ("", "near: resnet18")],
)
def test_an_unknown_name_gets_the_nearest(name: str, near: str) -> None:
    with pytest.raises(TrainingError, match=r"^params.yaml train.backbone: got '.*'; expected a known backbone; ") as e:
        make_backbone(name, (224, 224))
    assert near in str(e.value)


def test_a_size_that_it_cannot_take_gets_those_that_it_can() -> None:
    line = r"alexnet cannot take images of 32 x 32 \(.*\); expected a size that it takes, such as 64, 96, 128\. Edit"
    with pytest.raises(TrainingError, match=r"^params\.yaml prepare\.image_size: " + line):
        make_backbone("alexnet", (32, 32))


def test_depthwise_cnn_is_the_network_that_is_written_down() -> None:
    network = DepthwiseCNN((768, 1024))
    shapes = {name: tuple(p.shape) for name, p in network.named_parameters() if name.endswith("weight")}
    assert shapes == {
        "features.0.weight": (3, 1, 3, 3),
        "features.1.weight": (16, 3, 1, 1),
        "features.4.weight": (32, 16, 3, 3),
        "dense.0.weight": (60, 32 * 84 * 112),
    }
    small = DepthwiseCNN((32, 40)).eval()
    features = small(torch.rand(2, 3, 32, 40))
    assert features.shape == (2, 60)
    assert (features >= 0).all()
