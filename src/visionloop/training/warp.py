"""Crop, mirror, turn, shear and shift of images in one step: one affine map and one interpolation. Pure.

Dimensions: n images, h height, w width, c channels.
"""

from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional


def make_theta(moves_n10: Tensor, source_hw: tuple[int, ...], size_hw: tuple[int, int]) -> Tensor:
    """Return the maps (n, 2, 3) from what comes out to the source, in the coordinates of `grid_sample`.

    `moves_n10`: box (top, left, height, width, in pixels of the source), mirrored (0 or 1), angle (radians, counter
    clockwise), shear along x and y (slopes), shift along x and y (shares of what comes out).
    """
    top, left, height, width, mirrored, angle, shear_x, shear_y, shift_x, shift_y = moves_n10.unbind(1)
    (source_h, source_w), (out_h, out_w) = source_hw, size_hw
    cos, sin, sign = torch.cos(angle), torch.sin(angle), 1 - 2 * mirrored
    # Turned and sheared about the middle, in pixels of what comes out; mirrored first.
    xx, xy = (cos - sin * shear_y) * sign, cos * shear_x - sin
    yx, yy = (sin + cos * shear_y) * sign, cos + sin * shear_x
    ratio_x, ratio_y = width / source_w, height / source_h
    middle_x = 2 * (left + width / 2) / source_w - 1 - 2 * ratio_x * shift_x
    middle_y = 2 * (top + height / 2) / source_h - 1 - 2 * ratio_y * shift_y
    row_x = torch.stack([xx * ratio_x, xy * ratio_x * (out_h / out_w), middle_x], dim=1)
    row_y = torch.stack([yx * ratio_y * (out_w / out_h), yy * ratio_y, middle_y], dim=1)
    return torch.stack([row_x, row_y], dim=1)


def warp(images_nchw: Tensor, theta_n23: Tensor, size_hw: tuple[int, int]) -> Tensor:
    """Return float images (n, c, h, w) sampled through the maps, bilinear; beyond its edges an image is mirrored."""
    x_w, y_h = (_find_middles(side, theta_n23.device) for side in reversed(size_hw))
    grid = torch.empty((len(theta_n23), *size_hw, 2), device=theta_n23.device)
    # By sums, not by a matrix product: on a GPU that may be allowed to round to 10 bits.
    for axis in range(2):
        along_x, along_y, shift = theta_n23[:, axis].unsqueeze(-1).unbind(1)
        torch.add((along_x * x_w + shift)[:, None, :], (along_y * y_h)[:, :, None], out=grid[..., axis])
    return functional.grid_sample(images_nchw, grid, padding_mode="reflection", align_corners=False)


@lru_cache(maxsize=8)
def _find_middles(side: int, device: torch.device) -> Tensor:
    """Return where the middles of the pixels of a side lie, -1 to 1 from edge to edge."""
    return (torch.arange(side, device=device, dtype=torch.float32) * 2 + 1) / side - 1
