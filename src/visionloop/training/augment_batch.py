"""The draws of `augment.py` applied to a whole batch with a few kernels, on the device that the batch is on.

An image comes out the same whatever else is in its batch: every step works on each image by its own draws.

Dimensions: n images, d draws, h height, w width, c channels.
"""

from functools import lru_cache

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as transforms

from visionloop.training.augment import FILL_RGB, Column, Operation, Preset
from visionloop.training.warp import make_theta, warp

LUMA_RGB = (0.2989, 0.587, 0.114)


def augment_batch(images_nhwc: Tensor, draws_nd: Tensor, size_hw: tuple[int, int], preset: Preset | None) -> Tensor:
    """Return uint8 images (n, h, w, 3) of `size_hw`: the given ones (uint8, n, h, w, 3), changed by their draws.

    `preset` says which steps are worth a kernel: what it never draws is left out. None: crops alone.
    """
    theta = make_theta(draws_nd[:, : Column.BRIGHTNESS], tuple(images_nhwc.shape[1:3]), size_hw)
    images = warp(images_nhwc.permute(0, 3, 1, 2).float(), theta, size_hw)
    if preset and (preset.jitter or preset.trivial):
        images = _change_colours(images, draws_nd)
    images = images.add_(0.5).to(torch.uint8)
    if preset and preset.trivial:
        images = _operate(images, draws_nd)
    if preset and preset.erased:
        images = _erase(images, draws_nd)
    return images.permute(0, 2, 3, 1).contiguous()


def _change_colours(images: Tensor, draws_nd: Tensor) -> Tensor:
    """Blend with black, with the mean grey and with the grey of each pixel, as torchvision does, in this order."""
    brightness, contrast, saturation = (
        draws_nd[:, column].view(-1, 1, 1, 1) for column in (Column.BRIGHTNESS, Column.CONTRAST, Column.SATURATION)
    )
    images = (images * brightness).clamp_(0, 255)
    images = torch.lerp(_make_grey(images).mean(dim=(2, 3), keepdim=True), images, contrast).clamp_(0, 255)
    return torch.lerp(_make_grey(images), images, saturation).clamp_(0, 255)


def _make_grey(images: Tensor) -> Tensor:
    red, green, blue = (images[:, channel : channel + 1] for channel in range(3))
    return red * LUMA_RGB[0] + green * LUMA_RGB[1] + blue * LUMA_RGB[2]


def _operate(images: Tensor, draws_nd: Tensor) -> Tensor:
    """Apply the operations, each to those images that drew it."""
    chosen_n, strength_n = draws_nd[:, Column.OPERATION], draws_nd[:, Column.STRENGTH].view(-1, 1, 1, 1)
    for operation in tuple(Operation)[1:]:
        (picks,) = torch.nonzero(chosen_n == operation, as_tuple=True)
        if len(picks):
            images[picks] = _change(images[picks], operation, strength_n[picks])
    return images


def _change(images: Tensor, operation: Operation, strength: Tensor) -> Tensor:
    match operation:
        case Operation.SHARPNESS:
            blurred = transforms.adjust_sharpness(images, 0.0).float()
            images = torch.lerp(blurred, images.float(), strength).clamp_(0, 255).to(torch.uint8)
        case Operation.POSTERIZE:
            images = images & (256 - 2 ** (8 - strength)).to(torch.uint8)
        case Operation.SOLARIZE:
            images = torch.where(images >= strength, 255 - images, images)
        case Operation.AUTOCONTRAST:
            images = transforms.autocontrast(images)
        case Operation.EQUALIZE:
            images = transforms.equalize(images)
    return images


def _erase(images: Tensor, draws_nd: Tensor) -> Tensor:
    top, left, height, width = draws_nd[:, Column.ERASED_TOP :].view(-1, 4, 1, 1, 1).unbind(1)
    y = torch.arange(images.shape[2], device=images.device).view(1, 1, -1, 1)
    x = torch.arange(images.shape[3], device=images.device).view(1, 1, 1, -1)
    is_erased = (y >= top) & (y < top + height) & (x >= left) & (x < left + width)
    return torch.where(is_erased, _make_fill(images.device), images)


@lru_cache(maxsize=4)
def _make_fill(device: torch.device) -> Tensor:
    """Return the colour of what is erased; made once, since a copy to a GPU makes the process wait for it."""
    return torch.tensor(FILL_RGB, dtype=torch.uint8, device=device).view(1, 3, 1, 1)
