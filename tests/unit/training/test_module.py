"""The module without a trainer: what it tells, and what a step depends on."""

import pytest
import torch
from torch import nn

from visionloop.networks.backbones import make_backbone
from visionloop.networks.classifier import Classifier
from visionloop.params import Train
from visionloop.training.batches import Batch
from visionloop.training.module import ClassifierModule, MovingAverage, compute_decay, describe_finetune


def make_section(**keys: object) -> Train:
    return Train(way="finetune", weights="w.pth", learning_rate=0.01, max_epochs=5, **keys)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("epochs", "line"),
    [
        (0, "finetune: all layers, rates from 0.001 (first layers) to 0.01 (head)"),
        (2, "finetune: the head alone for 2 epochs, then all layers, rates from 0.001 (first layers) to 0.01 (head)"),
        (5, "finetune: the head alone in all 5 epochs (train.frozen_epochs), the backbone frozen"),
    ],
)
def test_a_fine_tuning_says_what_learns_when(epochs: int, line: str) -> None:
    assert describe_finetune(make_section(frozen_epochs=epochs)) == line


@pytest.fixture(scope="module")
def batch() -> Batch:
    rng = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (6, 16, 16, 3), dtype=torch.uint8, generator=rng)
    return Batch(images, torch.tensor([0, 1, 2, 0, 1, 2]), torch.arange(6))


def make_module(section: Train) -> ClassifierModule:
    torch.manual_seed(0)
    backbone, num_features = make_backbone("small_cnn", (16, 16))
    return ClassifierModule(Classifier(backbone, num_features, 3, task="multiclass", dropout=section.dropout), section)


@pytest.mark.parametrize("keys", [{"dropout": 0.5}, {"mixup": 0.4}, {"cutmix": 1.0}, {"mixup": 0.4, "cutmix": 1.0}])
def test_a_step_depends_on_the_seed_the_epoch_and_its_number_and_on_nothing_drawn_before(
    batch: Batch, keys: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = make_module(Train(seed=3, **keys))  # type: ignore[arg-type]
    first = float(module.compute_batch(batch, 0)[0].detach())
    torch.rand(5)
    assert float(module.compute_batch(batch, 0)[0].detach()) == first
    assert float(module.compute_batch(batch, 1)[0].detach()) != first
    module.params = Train(seed=4, **keys)  # type: ignore[arg-type]
    assert float(module.compute_batch(batch, 0)[0].detach()) != first
    module.params = Train(seed=3, **keys)  # type: ignore[arg-type]
    monkeypatch.setattr(ClassifierModule, "current_epoch", 1)
    assert float(module.compute_batch(batch, 0)[0].detach()) != first


def test_a_frozen_backbone_gets_no_gradient_in_a_step(batch: Batch) -> None:
    module = make_module(make_section(frozen_epochs=1))
    module.train()
    loss, _ = module.compute_batch(batch, 0)
    loss.backward()  # type: ignore[no-untyped-call]
    assert all(parameter.grad is None for parameter in module.classifier.backbone.parameters())
    assert module.classifier.head.weight.grad is not None


def test_embeddings_go_to_the_head_alone_and_are_not_mixed() -> None:
    module = make_module(Train(mixup=1.0))
    embedding_nd = torch.randn(6, 64)
    loss, units_nk = module.compute_batch(Batch(embedding_nd, torch.tensor([0, 1, 2, 0, 1, 2]), torch.arange(6)), 0)
    assert torch.equal(units_nk, module.classifier.head(embedding_nd))
    expected = torch.nn.functional.cross_entropy(units_nk, torch.tensor([0, 1, 2, 0, 1, 2]))
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)


def test_decay_warms_up_to_what_is_asked_for() -> None:
    assert [compute_decay(0.9, t) for t in (1, 2, 8)] == pytest.approx([2 / 11, 3 / 12, 0.5])
    assert compute_decay(0.9, 1000) == 0.9
    assert compute_decay(0.5, 1000) == 0.5


def test_average_equals_the_one_by_hand_with_batch_norms_statistics() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    averaging = MovingAverage(0.6)
    model = torch.optim.swa_utils.AveragedModel(network, use_buffers=True, **averaging._kwargs)
    expected: dict[str, torch.Tensor] = {}
    for step in range(8):
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.add_(torch.randn_like(parameter))
        network(torch.randn(4, 3))
        model.update_parameters(network)
        decay = min(0.6, (1 + step) / (10 + step))
        for name, tensor in network.state_dict().items():
            if step == 0 or not tensor.is_floating_point():
                expected[name] = tensor.clone()
            else:
                expected[name] = decay * expected[name] + (1 - decay) * tensor
    for name, tensor in model.module.state_dict().items():
        assert torch.allclose(tensor, expected[name], atol=1e-6), name
    assert int(model.module[1].num_batches_tracked) == 8
