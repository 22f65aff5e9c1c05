"""Rows of one process: their order, padding and doubles. (Several ranks are an integration test.)"""

import torch

from visionloop.training.ranks.world import gather_rows


def test_rows_come_in_order_each_once_and_without_padding() -> None:
    rows_n = torch.tensor([5, -1, 2, 5, -1, 9])
    units_nu = torch.arange(6.0).reshape(6, 1)
    units, targets, rows = gather_rows(units_nu, torch.tensor([0, 1, 0, 0, 1, 1]), rows_n)
    assert rows.tolist() == [2, 5, 9]
    assert units.flatten().tolist() == [2.0, 0.0, 5.0]
    assert targets.tolist() == [0, 0, 1]


def test_targets_of_several_labels_keep_their_shape() -> None:
    units, targets, _ = gather_rows(torch.zeros(2, 3), torch.eye(3, dtype=torch.uint8)[:2], torch.tensor([1, 0]))
    assert (units.shape, targets.tolist()) == ((2, 3), [[0, 1, 0], [1, 0, 0]])


def test_padding_alone_leaves_nothing() -> None:
    units, _, rows = gather_rows(torch.zeros(2, 1), torch.zeros(2), torch.tensor([-1, -1]))
    assert (len(units), len(rows)) == (0, 0)
