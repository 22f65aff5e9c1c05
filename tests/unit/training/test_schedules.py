"""The shape of each schedule, and which epochs lower a plateau's rate."""

import itertools
import math

import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau

from visionloop.params import Train
from visionloop.training.groups import compute_share, make_schedule, step_plateau

TOTAL = 200


def make_optimizer(*rates: float) -> torch.optim.Optimizer:
    return torch.optim.SGD([{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": rate} for rate in rates])


def test_cosine_warms_up_linearly_and_falls_to_zero() -> None:
    shares = [compute_share("cosine", step, TOTAL) for step in range(TOTAL + 1)]
    assert shares[:20] == pytest.approx([(i + 1) / 20 for i in range(20)])
    assert shares[110] == pytest.approx(0.5)
    assert shares[65] == pytest.approx(0.5 * (1 + math.cos(math.pi / 4)))
    assert shares[TOTAL] == pytest.approx(0)
    assert all(a >= b for a, b in itertools.pairwise(shares[20:]))


def test_one_cycle_is_that_of_torch() -> None:
    optimizer = make_optimizer(1.0)
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
    optimizer = make_optimizer(0.01, 0.1)
    scheduler = make_schedule(optimizer, Train(schedule="cosine"), TOTAL)
    assert isinstance(scheduler, LambdaLR)
    for _ in range(50):
        optimizer.step()
        scheduler.step()
    first, second = (group["lr"] for group in optimizer.param_groups)
    assert second == pytest.approx(0.1 * compute_share("cosine", 50, TOTAL))
    assert second / first == pytest.approx(10)


def test_plateau_lowers_rates_after_half_the_patience_and_never_to_zero() -> None:
    optimizer = make_optimizer(0.01, 0.1)
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
    optimizer = make_optimizer(0.1)
    scheduler = make_schedule(optimizer, Train(schedule="plateau", patience=2, monitor="val/loss"), TOTAL)
    for figure in (1.0, 0.9, 0.8):
        step_plateau(scheduler, figure)
    assert optimizer.param_groups[0]["lr"] == 0.1
    step_plateau(scheduler, 0.81)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.03)
