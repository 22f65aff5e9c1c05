"""Validation rows of all ranks together. Collective: every rank calls it, and gets the same.

Dimensions: n images, u units.
"""

import torch
from torch import Tensor, distributed

PADDING = -1


def gather_rows(units_nu: Tensor, targets: Tensor, rows_n: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return units, targets and rows of all ranks, in the order of the rows, each row once, padding dropped."""
    if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
        units_nu, targets, rows_n = (_gather(part) for part in (units_nu, targets, rows_n))
    rows_n, order = torch.sort(rows_n, stable=True)
    is_new = torch.ones_like(rows_n, dtype=torch.bool)
    is_new[1:] = rows_n[1:] != rows_n[:-1]
    keep = order[is_new & (rows_n != PADDING)]
    return units_nu[keep], targets[keep], rows_n[is_new & (rows_n != PADDING)]


def _gather(part: Tensor) -> Tensor:
    """Concatenate the parts of all ranks, which may be of any lengths."""
    ranks = distributed.get_world_size()
    lengths = [torch.zeros(1, dtype=torch.int64, device=part.device) for _ in range(ranks)]
    distributed.all_gather(lengths, torch.tensor([len(part)], device=part.device))
    sizes = [int(length) for length in lengths]
    padded = part.new_zeros(max(sizes), *part.shape[1:])
    padded[: len(part)] = part
    parts = [torch.empty_like(padded) for _ in range(ranks)]
    distributed.all_gather(parts, padded.contiguous())
    return torch.cat([whole[:size] for whole, size in zip(parts, sizes, strict=True)])
