"""Every backbone that can be named: built at a size that it takes, its features counted; some families exported."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torchvision.models.regnet import BlockParams

from visionloop.errors import TrainingError
from visionloop.networks.backbones import describe_preprocessing, make_backbone
from visionloop.networks.classifier import Classifier
from visionloop.networks.export import compute_torch_logits, export_onnx
from visionloop.networks.names import read_backbones
from visionloop.networks.weights import find_published


@pytest.mark.long
def test_every_backbone_is_built_and_gives_one_vector_an_image(monkeypatch: pytest.MonkeyPatch) -> None:
    plan: Callable[..., Any] = BlockParams.from_init_params.__func__  # type: ignore[attr-defined]

    def plan_on_cpu(cls: type, *args: Any, **options: Any) -> Any:
        with torch.device("cpu"):  # RegNet computes its widths with tensors, which need values
            return plan(cls, *args, **options)

    monkeypatch.setattr(BlockParams, "from_init_params", classmethod(plan_on_cpu))
    found = {}
    for name in (name for name, library in read_backbones().items() if library != "timm"):
        with torch.device("meta"):  # shapes alone: the largest has 644 million weights
            backbone, num_features = make_backbone(name, (224, 224))
        last = [m for m in backbone.modules() if isinstance(m, torch.nn.Linear) and m.out_features == 1000]
        assert not last, f"{name} still has its head"
        found[name] = num_features
    assert len(found) >= 80
    assert all(8 <= num <= 8192 for num in found.values())
    known = {"resnet50": 2048, "vgg16": 4096, "vit_l_16": 1024, "densenet201": 1920, "regnet_y_128gf": 7392}
    known |= {"convnext_tiny": 768, "swin_v2_b": 1024, "efficientnet_b7": 2560, "squeezenet1_0": 512}
    assert {name: found[name] for name in known} == known


@pytest.mark.long
def test_a_network_of_every_family_of_timm_is_built_at_its_own_size() -> None:
    """The one with the shortest name of each of timm's files: a hundred families."""
    refused, found = [], {}
    for module in sorted(timm.list_modules()):
        names = [name for name in timm.list_models(module=module) if find_published(f"timm/{name}")]
        if not names:
            continue
        name = f"timm/{min(names, key=len)}"
        side = describe_preprocessing(name).side_px or 224
        try:
            found[name] = make_backbone(name, (side, side))[1]
        except TrainingError as exc:
            refused.append(f"{name}: {exc}")
    assert len(found) >= 60
    assert all(8 <= num <= 8192 for num in found.values())
    assert refused == []


@pytest.mark.parametrize(
    ("name", "size_hw"),
    [
        ("mobilenet_v3_small", (64, 64)),
        ("depthwise_cnn", (96, 128)),
        ("efficientnet_lite0", (64, 96)),
        ("vit_tiny_patch16_224", (64, 64)),
    ],
)
def test_families_are_exported_with_the_same_answers(name: str, size_hw: tuple[int, int], tmp_path: Path) -> None:
    import onnxruntime as ort

    torch.manual_seed(0)
    backbone, num_features = make_backbone(name, size_hw)
    classifier = Classifier(backbone, num_features, 3, task="multiclass").eval()
    export_onnx(classifier, size_hw, tmp_path / "model.onnx")
    session = ort.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    images = np.random.default_rng(0).integers(0, 256, (3, *size_hw, 3)).astype(np.uint8)
    logits, embedding = session.run(["logits", "embedding"], {"images": images})
    assert embedding.shape == (3, num_features)
    theirs = compute_torch_logits(classifier, images, embedding)
    np.testing.assert_allclose(logits, theirs, atol=1e-4 * max(1.0, float(np.abs(theirs).max())))


@pytest.mark.parametrize(
    ("name", "size_hw", "found", "sizes"),
    [
        ("inception_v3", (64, 64), "Kernel size", "such as 96, 128, 160"),
        ("vit_b_16", (100, 100), "indivisible by patch size", "such as 64, 96, 128"),
        ("vit_b_16", (96, 128), "those of a square", "such as 96, 128, 160"),
        ("maxvit_t", (224, 448), "cannot take images of 224 x 448", "such as 224, 448"),
        ("efficientformer_l1", (64, 64), "cannot take images of 64 x 64", "such as 224"),
    ],
)
def test_a_size_that_it_cannot_take_gets_those_that_it_can(
    name: str, size_hw: tuple[int, int], found: str, sizes: str
) -> None:
    with pytest.raises(TrainingError, match=r"^params\.yaml prepare\.image_size: ") as caught, torch.device("meta"):
        make_backbone(name, size_hw)
    assert found in str(caught.value)
    assert f"expected a size that it takes, {sizes}. Edit the file." in str(caught.value)
    assert "\n" not in str(caught.value)
