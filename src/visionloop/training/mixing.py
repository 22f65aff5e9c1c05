"""Mixed batches: mixup (Zhang et al., 2018) and CutMix (Yun et al., 2019). Pure; works on any device.

Dimensions: n images, h height, w width, u units.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Mix:
    """How a batch is mixed: the partner of each image, its own share, and for CutMix the box that the partner fills."""

    partner_n: tuple[int, ...]
    share: float
    box: tuple[int, int, int, int] | None = None  # top, bottom, left, right


def draw_mix(rng: np.random.Generator, shape_nhw: tuple[int, int, int], *, mixup: float, cutmix: float) -> Mix:
    """Draw how a batch is mixed. `mixup` and `cutmix` are the alpha of Beta(alpha, alpha); with both, either by chance.

    One share for the whole batch, as in the authors' code. A box may reach over the edge: its share is what is left.
    """
    num, height, width = shape_nhw
    is_cut = cutmix > 0 and (mixup <= 0 or rng.random() < 0.5)
    share = float(rng.beta(cutmix, cutmix) if is_cut else rng.beta(mixup, mixup))
    partner_n = tuple(int(i) for i in rng.permutation(num))
    if not is_cut:
        return Mix(partner_n, share)
    side = float(np.sqrt(1 - share))
    centre_y, centre_x = rng.integers(height), rng.integers(width)
    top, bottom = _cut(int(centre_y), int(height * side), height)
    left, right = _cut(int(centre_x), int(width * side), width)
    return Mix(partner_n, 1 - (bottom - top) * (right - left) / (height * width), (top, bottom, left, right))


def _cut(centre: int, length: int, end: int) -> tuple[int, int]:
    return max(0, centre - length // 2), min(end, centre - length // 2 + length)


def mix_images(images_nhwc: Tensor, mix: Mix) -> Tensor:
    """Mix images of 0 to 255: mixup gives float32, CutMix keeps the type."""
    partner_n = torch.tensor(mix.partner_n, device=images_nhwc.device)
    if mix.box is None:
        images_nhwc = images_nhwc.to(torch.float32)
        return images_nhwc * mix.share + images_nhwc[partner_n] * (1 - mix.share)
    top, bottom, left, right = mix.box
    mixed = images_nhwc.clone()
    mixed[:, top:bottom, left:right] = images_nhwc[partner_n, top:bottom, left:right]
    return mixed


def mix_targets(targets_nu: Tensor, mix: Mix) -> Tensor:
    """Mix distributions (n, u) in the shares of the images."""
    partner_n = torch.tensor(mix.partner_n, device=targets_nu.device)
    return targets_nu * mix.share + targets_nu[partner_n] * (1 - mix.share)
