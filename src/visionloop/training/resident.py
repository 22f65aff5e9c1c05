"""Images that stay on the device: copied there once, and taken from there by their rows in every step.

Dimensions: n images, h height, w width.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from visionloop.data.images import UInt8Array
from visionloop.data.shards import IntArray, Prepared
from visionloop.training.batches import read_whole

CHUNK = 512
FREE_SHARE = 0.5  # of the device's free memory; the rest is the network's and its activations'


class ResidentImages:
    """The images of some rows on a device, all of one size."""

    def __init__(self, read: Callable[[IntArray], UInt8Array], rows: IntArray, device: torch.device) -> None:
        """Copy the images to the device, a few hundred at a time."""
        at_n = torch.full((int(rows.max()) + 1,), -1, dtype=torch.int64)
        at_n[torch.from_numpy(rows)] = torch.arange(len(rows))
        self.at_n = at_n.to(device)
        self.size_hwc = read(rows[:1]).shape[1:]
        self.pixels_nd = torch.empty((len(rows), int(np.prod(self.size_hwc))), dtype=torch.uint8, device=device)
        for start in range(0, len(rows), CHUNK):
            chunk = torch.from_numpy(read(rows[start : start + CHUNK]))
            self.pixels_nd[start : start + len(chunk)].copy_(chunk.flatten(1))
        if self.pixels_nd.shape[1] % 8 == 0:  # gathered by eight bytes at a time, not one by one
            self.pixels_nd = self.pixels_nd.view(torch.int64)

    def take(self, rows_n: Tensor, *, padded: bool) -> Tensor:
        """Return the images (n, h, w, 3) of some rows; with `padded`, black for those of -1."""
        at_n = self.at_n[rows_n.clamp(min=0) if padded else rows_n]
        pixels_nd = self.pixels_nd.index_select(0, at_n)
        if padded:
            pixels_nd = torch.where((rows_n >= 0)[:, None], pixels_nd, pixels_nd.new_zeros(()))
        return pixels_nd.view(torch.uint8).view(-1, *self.size_hwc)


def fits(prepared: Prepared, train_rows: IntArray, val_rows: IntArray, free_bytes: int) -> bool:
    """Say whether the images of both sides take at most half of the memory that is free."""
    larger_hw = prepared.size_hw if prepared.train_shards is None else prepared.train_shards.size_hw
    needed = 3 * (len(train_rows) * int(np.prod(larger_hw)) + len(val_rows) * int(np.prod(prepared.size_hw)))
    return needed <= FREE_SHARE * free_bytes


def make_resident(
    prepared: Prepared, train_rows: IntArray, val_rows: IntArray, device: torch.device
) -> tuple[ResidentImages, ResidentImages | None]:
    """Copy both sides to the device: the training images whole, the validation images as they are judged."""
    train = ResidentImages(lambda rows: read_whole(prepared, rows), train_rows, device)
    return train, ResidentImages(prepared.read, val_rows, device) if len(val_rows) else None
