"""Groups of parameters and their rates, the shape of each schedule, and which epochs lower a plateau's rate."""

import itertools
import math

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau

from visionloop.networks.backbones import make_backbone
from visionloop.networks.classifier import Classifier
from visionloop.params import Train
from visionloop.training.groups import (
    compute_rates,
    compute_share,
    make_groups,
    make_optimizer,
    make_schedule,
    split_stages,
    step_plateau,
)

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


TOTAL = 200


def make_sgd(*rates: float) -> torch.optim.Optimizer:
    return torch.optim.SGD([{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": rate} for rate in rates])


def test_cosine_warms_up_linearly_and_falls_to_zero() -> None:
    shares = [compute_share("cosine", step, TOTAL) for step in range(TOTAL + 1)]
    assert shares[:20] == pytest.approx([(i + 1) / 20 for i in range(20)])
    assert shares[110] == pytest.approx(0.5)
    assert shares[65] == pytest.approx(0.5 * (1 + math.cos(math.pi / 4)))
    assert shares[TOTAL] == pytest.approx(0)
    assert all(a >= b for a, b in itertools.pairwise(shares[20:]))


def test_one_cycle_is_that_of_torch() -> None:
    optimizer = make_sgd(1.0)
    theirs = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1.0, total_steps=TOTAL, cycle_momentum=False)
    for step in range(TOTAL):
        assert compute_share("one_cycle", step, TOTAL) == pytest.approx(theirs.get_last_lr()[0], abs=1e-9), step
        optimizer.step()
        if step < TOTAL - 1:
            theirs.step()


def test_one_cycle_peaks_once_at_three_tenths() -> None:
    shares = [compute_share("one_cycle", step, TOTAL) for step in range(TOTAL)]
    assert shares.index(max(shares)) == 59
    assert max(shares) == pytest.approx(1)
    assert shares[0] == pytest.approx(1 / 25)
    assert shares[-1] == pytest.approx(1 / 25e4)


@pytest.mark.parametrize("schedule", ["cosine", "one_cycle", "constant"])
@pytest.mark.parametrize("total", [1, 2, 3, 7])
def test_shares_of_the_shortest_trainings_and_beyond_the_end_are_between_0_and_1(schedule: str, total: int) -> None:
    shares = [compute_share(schedule, step, total) for step in range(total + 3)]
    assert all(0 <= share <= 1 for share in shares)
    assert shares[0] > 0
    assert len(set(shares[total + 1 :])) == 1


def test_groups_keep_their_proportions() -> None:
    optimizer = make_sgd(0.01, 0.1)
    scheduler = make_schedule(optimizer, Train(schedule="cosine"), TOTAL)
    assert isinstance(scheduler, LambdaLR)
    for _ in range(50):
        optimizer.step()
        scheduler.step()
    first, second = (group["lr"] for group in optimizer.param_groups)
    assert second == pytest.approx(0.1 * compute_share("cosine", 50, TOTAL))
    assert second / first == pytest.approx(10)


def test_plateau_lowers_rates_after_half_the_patience_and_never_to_zero() -> None:
    optimizer = make_sgd(0.01, 0.1)
    scheduler = make_schedule(optimizer, Train(schedule="plateau", patience=4, monitor="val/accuracy"), TOTAL)
    assert isinstance(scheduler, ReduceLROnPlateau)
    seen = []
    for figure in (0.5, 0.6, 0.6, 0.6, 0.7, 0.65, 0.66):
        step_plateau(scheduler, figure)
        seen.append(optimizer.param_groups[1]["lr"])
    assert seen == pytest.approx([0.1, 0.1, 0.1, 0.03, 0.03, 0.03, 0.009])
    for _ in range(50):
        step_plateau(scheduler, torch.tensor(0.1))
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([1e-5, 1e-4])


def test_plateau_of_a_loss_waits_for_it_to_fall() -> None:
    optimizer = make_sgd(0.1)
    scheduler = make_schedule(optimizer, Train(schedule="plateau", patience=2, monitor="val/loss"), TOTAL)
    for figure in (1.0, 0.9, 0.8):
        step_plateau(scheduler, figure)
    assert optimizer.param_groups[0]["lr"] == 0.1
    step_plateau(scheduler, 0.81)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.03)
