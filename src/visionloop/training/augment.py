"""Augmentation: presets, the random numbers (draws) of each image, and their application to the pixels.

The draws depend on (seed, epoch, image) alone. torchvision's transforms would take them from torch's global generator,
in the order in which images come. `augment_images` applies draws on the CPU, image by image; `augment_batch` applies
the same draws to a whole batch on a GPU. The result for an image does not depend on the rest of its batch.

Dimensions: n images, d draws of an image, h height, w width, c channels. Boxes are top, left, height, width in pixels.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional
from torchvision.transforms.v2 import functional as transforms

from visionloop.data.images import UInt8Array

UInt64Array = NDArray[np.uint64]
GOLDEN = np.uint64(0x9E3779B97F4A7C15)
PRIME = 2**64 - 59  # the largest 64-bit prime: a seed of any size is taken modulo it
ORDER, AUGMENT = 1, 2  # purposes of draws: those of one purpose are independent of the other's
FloatArray = NDArray[np.float64]
NUM_UNIFORM = 16
LUMA_RGB = (0.2989, 0.587, 0.114)


def make_theta(moves_n10: Tensor, source_hw: tuple[int, ...], size_hw: tuple[int, int]) -> Tensor:
    """Return affine maps (n, 2, 3) from output to source pixels, in the coordinates of `grid_sample`.

    `moves_n10`: box (top, left, height, width, in pixels of the source), mirrored (0 or 1), angle (radians,
    counterclockwise), shear along x and y (slopes), shift along x and y (as a share of the output size).
    """
    top, left, height, width, mirrored, angle, shear_x, shear_y, shift_x, shift_y = moves_n10.unbind(1)
    (source_h, source_w), (out_h, out_w) = source_hw, size_hw
    cos, sin, sign = torch.cos(angle), torch.sin(angle), 1 - 2 * mirrored
    # Rotated and sheared about the middle, in pixels of the output; mirrored first.
    xx, xy = (cos - sin * shear_y) * sign, cos * shear_x - sin
    yx, yy = (sin + cos * shear_y) * sign, cos + sin * shear_x
    ratio_x, ratio_y = width / source_w, height / source_h
    middle_x = 2 * (left + width / 2) / source_w - 1 - 2 * ratio_x * shift_x
    middle_y = 2 * (top + height / 2) / source_h - 1 - 2 * ratio_y * shift_y
    row_x = torch.stack([xx * ratio_x, xy * ratio_x * (out_h / out_w), middle_x], dim=1)
    row_y = torch.stack([yx * ratio_y * (out_w / out_h), yy * ratio_y, middle_y], dim=1)
    return torch.stack([row_x, row_y], dim=1)


def warp(images_nchw: Tensor, theta_n23: Tensor, size_hw: tuple[int, int]) -> Tensor:
    """Return float images (n, c, h, w) sampled through the maps, bilinear. Beyond its edges an image is mirrored."""
    x_w, y_h = (_find_middles(side, theta_n23.device) for side in reversed(size_hw))
    grid = torch.empty((len(theta_n23), *size_hw, 2), device=theta_n23.device)
    # Computed by sums, because a GPU may compute a matrix product in TF32, with 10 bits.
    for axis in range(2):
        along_x, along_y, shift = theta_n23[:, axis].unsqueeze(-1).unbind(1)
        torch.add((along_x * x_w + shift)[:, None, :], (along_y * y_h)[:, :, None], out=grid[..., axis])
    return functional.grid_sample(images_nchw, grid, padding_mode="reflection", align_corners=False)


@lru_cache(maxsize=8)
def _find_middles(side: int, device: torch.device) -> Tensor:
    """Return the coordinates of the pixel centres along one side, where -1 and 1 are the edges."""
    return (torch.arange(side, device=device, dtype=torch.float32) * 2 + 1) / side - 1


def make_image_keys(sha256_n: Sequence[str]) -> UInt64Array:
    """Return a 64-bit number for each image, (n,), made from its sha256."""
    digests = b"".join(hashlib.blake2b(sha256.encode(), digest_size=8).digest() for sha256 in sha256_n)
    return np.frombuffer(digests, "<u8").astype(np.uint64)


def draw_bits(key_n: UInt64Array, *, seed: int, epoch: int, purpose: int) -> UInt64Array:
    """Return 64 random bits for each image, (n,). SplitMix64: Steele, Lea and Flood, OOPSLA 2014."""
    state_n = key_n
    for part in (purpose, seed % PRIME, epoch):
        state_n = _mix(state_n ^ _mix(np.asarray(part, np.uint64) + GOLDEN))
    return state_n


def draw_uniform(bits_n: UInt64Array, num: int, turn_n: NDArray[np.int64] | None = None) -> NDArray[np.float64]:
    """Return `num` uniform numbers in [0, 1) for each image, (n, d).

    `turn_n` is how often an image came before in the epoch, so that a repeated image gets other numbers.
    """
    if turn_n is not None:
        bits_n = _mix(bits_n + turn_n.astype(np.uint64))
    steps_d = np.arange(1, num + 1, dtype=np.uint64) * GOLDEN
    words_nd = _mix(bits_n[:, None] + steps_d[None, :])
    return (words_nd >> np.uint64(11)).astype(np.float64) * 2.0**-53


def count_turns(rows_n: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return how often each row has come before in the sequence: of [4, 7, 4] it is [0, 0, 1]."""
    order = np.argsort(rows_n, kind="stable")
    ordered = rows_n[order]
    starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])[: len(ordered)]
    lengths = np.diff(np.r_[starts, len(ordered)])
    turn_n = np.empty(len(rows_n), np.int64)
    turn_n[order] = np.arange(len(rows_n)) - np.repeat(starts, lengths)
    return turn_n


def _mix(z: UInt64Array) -> UInt64Array:
    with np.errstate(over="ignore"):
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


@dataclass(frozen=True)
class Preset:
    """The limits of a preset. Every preset mirrors half of the images.

    `area`: range of the crop's share of the image. `aspect`: largest factor by which the crop is stretched. `degrees`:
    half of the images are rotated by up to this angle, both ways. `jitter`: brightness, contrast and saturation are
    multiplied by 1 - jitter to 1 + jitter. `trivial`: one operation of TrivialAugment for each image (Müller and
    Hutter, ICCV 2021). `erased`: the share of images in which a rectangle is filled (Zhong et al., AAAI 2020).
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
ERASED_AREA = (0.02, 0.2)  # as a share of the image
ERASED_ASPECT = 3.3
FILL_RGB = (124, 116, 104)  # the mean of ImageNet, about 0 after normalisation


class Column(IntEnum):
    """The columns of the draws. Factors of 1, the operation 0 and an erased height of 0 change nothing."""

    TOP, LEFT, HEIGHT, WIDTH = 0, 1, 2, 3
    MIRRORED, ANGLE, SHEAR_X, SHEAR_Y, SHIFT_X, SHIFT_Y = 4, 5, 6, 7, 8, 9
    BRIGHTNESS, CONTRAST, SATURATION = 10, 11, 12
    OPERATION, STRENGTH = 13, 14
    ERASED_TOP, ERASED_LEFT, ERASED_HEIGHT, ERASED_WIDTH = 15, 16, 17, 18


class Operation(IntEnum):
    """The operations of TrivialAugment that have no column of their own."""

    NONE, SHARPNESS, POSTERIZE, SOLARIZE, AUTOCONTRAST, EQUALIZE = range(6)


# The 14 operations of TrivialAugment's wide space, each with the same probability; column and largest value.
GEOMETRY = ((Column.SHEAR_X, 0.99), (Column.SHEAR_Y, 0.99), (Column.SHIFT_X, 32 / 224), (Column.SHIFT_Y, 32 / 224))
FACTORS = (Column.BRIGHTNESS, Column.SATURATION, Column.CONTRAST)
OPERATIONS = tuple(Operation)[1:]
NUM_TRIVIAL = 1 + len(GEOMETRY) + 1 + len(FACTORS) + len(OPERATIONS)


def draw_crops(box_n4: NDArray[np.int64]) -> NDArray[np.float32]:
    """Return the draws (n, d) that crop a box out of each image and change nothing else."""
    draws_nd = np.zeros((len(box_n4), len(Column)), np.float32)
    draws_nd[:, :4] = box_n4
    draws_nd[:, [Column.BRIGHTNESS, Column.CONTRAST, Column.SATURATION]] = 1
    return draws_nd


def draw_preset(
    name: str, uniform_nd: FloatArray, frame_n4: NDArray[np.int64], size_hw: tuple[int, int]
) -> NDArray[np.float32]:
    """Return the draws (n, d) of a preset. `frame_n4`: the box that an image fills; `size_hw`: the output size."""
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
    """Return crops of random area and aspect ratio inside the frames, (n, 4). A side is at most that of its frame."""
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
    """Choose one operation for each image and its strength, with a sign if it has two directions. 0: none."""
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
    """Apply the draws with torchvision's transforms v2. Return images (n, h, w, 3) of `size_hw`."""
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
    """Crop, mirror, rotate and shear in one step. A crop without rotation and shear is faster: it has its own code."""
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


def augment_batch(images_nhwc: Tensor, draws_nd: Tensor, size_hw: tuple[int, int], preset: Preset | None) -> Tensor:
    """Apply the draws to uint8 images (n, h, w, 3). Return uint8 images (n, h, w, 3) of `size_hw`.

    Steps that `preset` never draws are left out, to save GPU kernels. None: only crops.
    """
    theta = make_theta(draws_nd[:, : Column.BRIGHTNESS], tuple(images_nhwc.shape[1:3]), size_hw)
    images = warp(images_nhwc.permute(0, 3, 1, 2).float(), theta, size_hw)
    if preset and (preset.jitter or preset.trivial):
        images = _change_colours(images, draws_nd)
    images = images.add_(0.5).to(torch.uint8)
    if preset and preset.trivial:
        images = _operate_on_batch(images, draws_nd)
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


def _operate_on_batch(images: Tensor, draws_nd: Tensor) -> Tensor:
    """Apply each operation to the images that drew it."""
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
    """Return the colour of erased pixels. It is made once, because a copy to a GPU makes the process wait."""
    return torch.tensor(FILL_RGB, dtype=torch.uint8, device=device).view(1, 3, 1, 1)
