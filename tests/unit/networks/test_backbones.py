"""Every backbone by name: built, its features counted, refused where it must be."""

from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torchvision
from torchvision.models.regnet import BlockParams

from visionloop.errors import TrainingError
from visionloop.networks.backbones import (
    IMAGENET,
    OWN,
    DepthwiseCNN,
    describe_preprocessing,
    find_preprocessing,
    make_backbone,
)
from visionloop.networks.classifier import Classifier
from visionloop.networks.names import OWN_NAMES, read_backbones


@pytest.fixture
def on_meta(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Shapes alone: the largest network costs nothing. RegNet computes its widths with tensors, which need values."""
    plan: Callable[..., Any] = BlockParams.from_init_params.__func__  # type: ignore[attr-defined]

    def plan_on_cpu(cls: type, *args: Any, **options: Any) -> Any:
        with torch.device("cpu"):
            return plan(cls, *args, **options)

    monkeypatch.setattr(BlockParams, "from_init_params", classmethod(plan_on_cpu))
    return torch.device("meta")


def test_the_list_is_what_the_libraries_register() -> None:
    found = read_backbones()
    by_library = {of: {name for name, library in found.items() if library == of} for of in set(found.values())}
    assert set(OWN) == set(OWN_NAMES) == by_library["own"]
    assert by_library["torchvision"] == set(torchvision.models.list_models(module=torchvision.models))
    prefixed = {name for name in by_library["timm"] if name.startswith("timm/")}
    assert {name.removeprefix("timm/") for name in prefixed} == set(timm.list_models())
    assert by_library["timm"] - prefixed == set(timm.list_models()) - by_library["torchvision"] - by_library["own"]


def test_each_network_has_the_normalisation_of_its_weights() -> None:
    assert describe_preprocessing("small_cnn") == describe_preprocessing("depthwise_cnn") == IMAGENET
    lite0 = describe_preprocessing("efficientnet_lite0")
    assert (lite0.side_px, lite0.interpolation, lite0.crop_ratio) == (224, "bicubic", 0.875)
    classifier = Classifier(*make_backbone("efficientnet_lite0", (32, 32)), 2, task="binary")
    assert classifier.mean_c.flatten().tolist() == [127, 127, 127]
    assert classifier.std_c.flatten().tolist() == [128, 128, 128]
    assert describe_preprocessing("efficientnet_v2_l").mean_c == (0.5, 0.5, 0.5)
    assert describe_preprocessing("resnet50").crop_ratio == 224 / 232
    theirs = describe_preprocessing("timm/resnet50.tv2_in1k")
    assert (theirs.mean_c, theirs.side_px) == (IMAGENET.mean_c, 176)
    assert describe_preprocessing("vit_base_patch16_clip_224.openai").mean_c[0] == pytest.approx(0.4815, abs=1e-4)
    assert find_preprocessing(torch.nn.Identity()) == IMAGENET


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
        ("efficientnet_lite0", (64, 64), 1280),
        ("timm/resnet18", (32, 48), 512),
        ("vit_tiny_patch16_224", (64, 96), 192),
        ("convnextv2_atto.fcmae_ft_in1k", (64, 64), 320),
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
    [
        ("resnet81", "near: resnet18, "),
        ("mobilenetv2", "near: mobilenet_v2, "),
        ("dense", "near: densenet"),
        ("", "near: efficientnet_lite0, resnet18, "),
        ("vit_tiny_patch16_242", "vit_tiny_patch16_224"),
        ("resnet18.a1_in1k", "near: resnet18, timm/resnet18 and a tag of its weights."),
        ("../timm/x", "near: "),
    ],
)
def test_an_unknown_name_gets_the_nearest(name: str, near: str) -> None:
    with pytest.raises(TrainingError, match=r"^params.yaml train.backbone: got '.*'; expected a known backbone; ") as e:
        make_backbone(name, (224, 224))
    assert near in str(e.value)


def test_an_unknown_tag_of_timm_gets_those_that_there_are() -> None:
    line = r"got 'timm/resnet18\.a9'; expected one of its weights: a1_in1k, a2_in1k, a3_in1k, .*\. Edit the file\.$"
    with pytest.raises(TrainingError, match=line):
        make_backbone("timm/resnet18.a9", (224, 224))


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
