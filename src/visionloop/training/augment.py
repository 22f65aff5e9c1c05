"""Augmentation: presets, what they draw for each image, and how one image is changed by its draws, on the CPU.

The draws are made apart from the pixels, from (seed, epoch, image): torchvision's transforms would draw from torch's
one generator, in the order in which images come. `augment_batch.py` applies the same draws to a batch on a GPU.

Dimensions: n images, d draws, h height, w width, c channels. Boxes are top, left, height, width in pixels.
"""

import math
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchvision.transforms.v2 import functional as transforms

from visionloop.data.images import UInt8Array
from visionloop.training.warp import make_theta, warp

FloatArray = NDArray[np.float64]
NUM_UNIFORM = 16


@dataclass(frozen=True)
class Preset:
    """How far a preset goes.

    `area`: the crop's share of the image. `aspect`: by how much it is stretched at most. `degrees`: rotation either
    way, of half of the images. `jitter`: brightness, contrast and saturation, by this share either way. `trivial`: one
    operation of TrivialAugment (Müller and Hutter, ICCV 2021) an image. `erased`: the share of images of which a
    rectangle is blanked (Zhong et al., AAAI 2020). All mirror half of the images.
    """

    area: tuple[float, float]
    aspect: float
    degrees: float = 0.0
    jitter: float = 0.0
    trivial: bool = False
    erased: float = 0.0


PRESETS = {
    "light": Preset(area=(0.8, 1.0), aspect=1.1),
    "medium": Preset(area=(0.5, 1.0), aspect=4 / 3, degrees=15.0, jitter=0.3),
    "strong": Preset(area=(0.3, 1.0), aspect=4 / 3, trivial=True, erased=0.25),
}
ERASED_AREA = (0.02, 0.2)
ERASED_ASPECT = 3.3
FILL_RGB = (124, 116, 104)  # the mean of ImageNet: about nothing, once it is normalised


class Column(IntEnum):
    """The draws of an image. A factor of 1 and an operation of 0 change nothing, a height of 0 erases nothing."""

    TOP, LEFT, HEIGHT, WIDTH = 0, 1, 2, 3
    MIRRORED, ANGLE, SHEAR_X, SHEAR_Y, SHIFT_X, SHIFT_Y = 4, 5, 6, 7, 8, 9
    BRIGHTNESS, CONTRAST, SATURATION = 10, 11, 12
    OPERATION, STRENGTH = 13, 14
    ERASED_TOP, ERASED_LEFT, ERASED_HEIGHT, ERASED_WIDTH = 15, 16, 17, 18


class Operation(IntEnum):
    """The operations of TrivialAugment that are neither geometry nor a factor."""

    NONE, SHARPNESS, POSTERIZE, SOLARIZE, AUTOCONTRAST, EQUALIZE = range(6)


# The 14 operations of TrivialAugment's wide space, drawn evenly: column or operation, and the strongest value.
GEOMETRY = ((Column.SHEAR_X, 0.99), (Column.SHEAR_Y, 0.99), (Column.SHIFT_X, 32 / 224), (Column.SHIFT_Y, 32 / 224))
FACTORS = (Column.BRIGHTNESS, Column.SATURATION, Column.CONTRAST)
OPERATIONS = tuple(Operation)[1:]
NUM_TRIVIAL = 1 + len(GEOMETRY) + 1 + len(FACTORS) + len(OPERATIONS)


def draw_crops(box_n4: NDArray[np.int64]) -> NDArray[np.float32]:
    """Return the draws (n, d) that take a box of each image and change nothing else."""
    draws_nd = np.zeros((len(box_n4), len(Column)), np.float32)
    draws_nd[:, :4] = box_n4
    draws_nd[:, [Column.BRIGHTNESS, Column.CONTRAST, Column.SATURATION]] = 1
    return draws_nd


def draw_preset(
    name: str, uniform_nd: FloatArray, frame_n4: NDArray[np.int64], size_hw: tuple[int, int]
) -> NDArray[np.float32]:
    """Return the draws (n, d) of a preset. `frame_n4`: the box that an image fills; `size_hw`: what comes out."""
    preset = PRESETS[name]
    u = uniform_nd.T
    draws_nd = draw_crops(_draw_boxes(preset, u[:4].T, frame_n4))
    draws_nd[:, Column.MIRRORED] = u[4] < 0.5
    if preset.degrees:
        angle_n = np.radians(preset.degrees) * (2 * u[5] - 1)
        draws_nd[:, Column.ANGLE] = np.where(u[6] < 0.5, angle_n, 0.0)
    if preset.jitter:
        for column, v in zip((Column.BRIGHTNESS, Column.CONTRAST, Column.SATURATION), u[7:10], strict=True):
            draws_nd[:, column] = 1 + preset.jitter * (2 * v - 1)
    if preset.trivial:
        _draw_trivial(draws_nd, u[5], u[6])
    if preset.erased:
        _draw_erased(draws_nd, preset.erased, u[10:15].T, size_hw)
    return draws_nd


def _draw_boxes(preset: Preset, u_n4: FloatArray, frame_n4: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return crops of a random area and aspect inside the frames; one that would not fit keeps the frame's side."""
    top_n, left_n, height_n, width_n = frame_n4.T
    low, high = preset.area
    side_n = np.sqrt(low + (high - low) * u_n4[:, 0])
    stretch_n = np.exp(math.log(preset.aspect) * (u_n4[:, 1] - 0.5))  # the square root of the aspect
    box_height_n = np.clip(np.rint(height_n * side_n / stretch_n), 1, height_n).astype(np.int64)
    box_width_n = np.clip(np.rint(width_n * side_n * stretch_n), 1, width_n).astype(np.int64)
    box_top_n = top_n + np.floor(u_n4[:, 2] * (height_n - box_height_n + 1)).astype(np.int64)
    box_left_n = left_n + np.floor(u_n4[:, 3] * (width_n - box_width_n + 1)).astype(np.int64)
    return np.stack([box_top_n, box_left_n, box_height_n, box_width_n], axis=1)


def _draw_trivial(draws_nd: NDArray[np.float32], which_n: FloatArray, how_n: FloatArray) -> None:
    """Choose one operation an image and a strength, signed where it has two directions; 0 is the identity."""
    choice_n = np.floor(which_n * NUM_TRIVIAL).astype(np.int64)
    signed_n = 2 * how_n - 1
    for number, (column, most) in enumerate((*GEOMETRY, (Column.ANGLE, math.radians(135))), start=1):
        draws_nd[:, column] = np.where(choice_n == number, most * signed_n, 0)
    for number, column in enumerate(FACTORS, start=2 + len(GEOMETRY)):
        draws_nd[:, column] = np.where(choice_n == number, 1 + 0.99 * signed_n, 1)
    for number, operation in enumerate(OPERATIONS, start=2 + len(GEOMETRY) + len(FACTORS)):
        chosen_n = choice_n == number
        draws_nd[chosen_n, Column.OPERATION] = operation
        draws_nd[chosen_n, Column.STRENGTH] = {
            Operation.SHARPNESS: 1 + 0.99 * signed_n,
            Operation.POSTERIZE: 8 - np.rint(6 * how_n),
            Operation.SOLARIZE: np.rint(255 * (1 - how_n)),
        }.get(operation, how_n)[chosen_n]


def _draw_erased(draws_nd: NDArray[np.float32], share: float, u_n5: FloatArray, size_hw: tuple[int, int]) -> None:
    low, high = ERASED_AREA
    area_n = (low + (high - low) * u_n5[:, 1]) * size_hw[0] * size_hw[1]
    aspect_n = np.exp(math.log(ERASED_ASPECT) * (2 * u_n5[:, 2] - 1))
    height_n = np.clip(np.rint(np.sqrt(area_n * aspect_n)), 1, size_hw[0])
    width_n = np.clip(np.rint(np.sqrt(area_n / aspect_n)), 1, size_hw[1])
    is_erased_n = u_n5[:, 0] < share
    top_n = np.floor(u_n5[:, 3] * (size_hw[0] - height_n + 1))
    left_n = np.floor(u_n5[:, 4] * (size_hw[1] - width_n + 1))
    draws_nd[:, Column.ERASED_TOP :] = np.stack([top_n, left_n, height_n, width_n], axis=1) * is_erased_n[:, None]


def augment_images(images_nhwc: UInt8Array, draws_nd: NDArray[np.float32], size_hw: tuple[int, int]) -> UInt8Array:
    """Return the images changed by their draws, (n, h, w, 3) of `size_hw`, with torchvision's transforms v2."""
    out = np.empty((len(images_nhwc), *size_hw, 3), np.uint8)
    for i, (image_hwc, draws_d) in enumerate(zip(images_nhwc, draws_nd, strict=True)):
        image = _augment_one(torch.from_numpy(image_hwc).permute(2, 0, 1), draws_d, size_hw)
        out[i] = image.permute(1, 2, 0).numpy()
    return out


def _augment_one(image: Tensor, draws_d: NDArray[np.float32], size_hw: tuple[int, int]) -> Tensor:
    d = draws_d.tolist()
    image = _move(image, draws_d, d, size_hw)
    steps: tuple[tuple[Column, Any], ...] = (
        (Column.BRIGHTNESS, transforms.adjust_brightness),
        (Column.CONTRAST, transforms.adjust_contrast),
        (Column.SATURATION, transforms.adjust_saturation),
    )
    for column, change in steps:
        if d[column] != 1:
            image = change(image, d[column])
    image = _operate(image, Operation(int(d[Column.OPERATION])), d[Column.STRENGTH])
    if d[Column.ERASED_HEIGHT]:
        top, left, height, width = (int(v) for v in d[Column.ERASED_TOP :])
        fill = torch.tensor(FILL_RGB, dtype=torch.uint8).view(3, 1, 1).expand(3, height, width)
        image = transforms.erase(image, top, left, height, width, fill)
    return image


def _move(image: Tensor, draws_d: NDArray[np.float32], d: list[float], size_hw: tuple[int, int]) -> Tensor:
    """Crop, mirror, turn and shear in one step; a crop alone has a fast way of its own."""
    if any(d[Column.ANGLE : Column.BRIGHTNESS]):
        theta = make_theta(torch.from_numpy(draws_d[None, : Column.BRIGHTNESS]), tuple(image.shape[1:]), size_hw)
        moved: Tensor = warp(image[None].float(), theta, size_hw)[0].add_(0.5).to(torch.uint8)
        return moved
    box = [int(v) for v in d[: Column.MIRRORED]]
    if box[2:] == list(size_hw):
        image = image[:, box[0] : box[0] + box[2], box[1] : box[1] + box[3]]
    else:
        image = transforms.resized_crop(image, *box, list(size_hw), antialias=True)
    return transforms.horizontal_flip(image) if d[Column.MIRRORED] else image


def _operate(image: Tensor, operation: Operation, strength: float) -> Tensor:
    match operation:
        case Operation.SHARPNESS:
            image = transforms.adjust_sharpness(image, strength)
        case Operation.POSTERIZE:
            image = transforms.posterize(image, int(strength))
        case Operation.SOLARIZE:
            image = transforms.solarize(image, strength)
        case Operation.AUTOCONTRAST:
            image = transforms.autocontrast(image)
        case Operation.EQUALIZE:
            image = transforms.equalize(image)
    return image
