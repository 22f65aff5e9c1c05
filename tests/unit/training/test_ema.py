"""The moving average against one worked out by hand."""

import pytest
import torch
from torch import nn

from visionloop.training.module import MovingAverage, compute_decay


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
