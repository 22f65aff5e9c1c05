"""Which parameters learn at which rate, and which decay."""

import itertools

import pytest
import torch
from torch import nn

from visionloop.networks.backbones import make_backbone
from visionloop.networks.classifier import Classifier
from visionloop.params import Train
from visionloop.training.groups import compute_rates, make_groups, make_optimizer, split_stages

FINETUNE = Train(way="finetune", weights="w.pth", learning_rate=0.01, backbone_rate=0.1, weight_decay=0.05)


def make_classifier(name: str = "small_cnn", size: int = 32) -> Classifier:
    backbone, num_features = make_backbone(name, (size, size))
    return Classifier(backbone, num_features, 3, task="multiclass")


def test_rates_of_finetune_grow_geometrically_to_the_heads() -> None:
    rates = compute_rates(FINETUNE, 4)
    assert rates[0] == pytest.approx(0.001)
    assert rates[-1] == 0.01
    assert [b / a for a, b in itertools.pairwise(rates)] == pytest.approx([10 ** (1 / 4)] * 4)


def test_other_ways_have_one_rate() -> None:
    groups = make_groups(make_classifier(), Train(learning_rate=0.01), "all")
    assert {group["lr"] for group in groups} == {0.01}


def test_groups_hold_every_parameter_once_and_the_head_last() -> None:
    classifier = make_classifier()
    groups = make_groups(classifier, FINETUNE, "all")
    parameters = [p for group in groups for p in group["params"]]
    assert sorted(id(p) for p in parameters) == sorted(id(p) for p in classifier.parameters())
    assert groups[-1]["params"] == [classifier.head.weight]
    assert groups[-1]["lr"] == 0.01
    assert groups[0]["lr"] == pytest.approx(0.001)
    rates = [group["lr"] for group in groups]
    assert rates == sorted(rates)


def test_biases_and_norms_do_not_decay() -> None:
    classifier = make_classifier()
    groups = make_groups(classifier, FINETUNE, "all")
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    for module in classifier.modules():
        for name, parameter in module.named_parameters(recurse=False):
            expected = 0.0 if isinstance(module, nn.BatchNorm2d) or name == "bias" else 0.05
            assert decay[id(parameter)] == expected, (type(module).__name__, name)


def test_the_head_alone_is_all_of_the_groups_when_it_learns_alone() -> None:
    classifier = make_classifier()
    optimizer = make_optimizer(classifier, Train(), "head")
    assert {id(p) for g in optimizer.param_groups for p in g["params"]} == {id(p) for p in classifier.head.parameters()}


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "shufflenet_v2_x0_5", "vit_b_16"])
def test_stages_follow_the_depth_of_torchvisions_networks(name: str) -> None:
    from torchvision import models

    with torch.device("meta"):
        backbone = models.get_model(name)
    stages = split_stages(backbone)
    assert len(stages) == 8
    sizes = [len(stage) for stage in stages]
    assert max(sizes) - min(sizes) <= 1
    order = [module for stage in stages for module in stage]
    assert order == [m for m in backbone.modules() if list(m.parameters(recurse=False))]
    assert order[0] in (backbone, *backbone.children(), *[m for c in backbone.children() for m in c.modules()])


def test_a_backbone_of_few_layers_or_none_has_as_many_stages() -> None:
    assert [len(stage) for stage in split_stages(nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2)))] == [1, 1]
    assert split_stages(nn.Identity()) == []
    assert compute_rates(FINETUNE, 0) == [0.01]


def test_a_shared_parameter_is_in_one_group() -> None:
    classifier = make_classifier()
    layer = nn.Linear(4, 4)
    classifier.backbone = nn.Sequential(layer, nn.ReLU(), layer)
    optimizer = make_optimizer(classifier, FINETUNE, "all")
    assert sum(len(group["params"]) for group in optimizer.param_groups) == 4
