"""Batches of prepared images, or of embeddings, from their keys: read, cropped and augmented on the CPU, or read whole
with their draws, for the device to do the rest.

Dimensions: n images, k classes, d features or draws.
"""

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from visionloop.data.images import UInt8Array
from visionloop.data.shards import IntArray, Prepared, choose_crop, load_prepared
from visionloop.training.augment import NUM_UNIFORM, augment_images, draw_crops, draw_preset
from visionloop.training.draws import AUGMENT, UInt64Array, draw_bits, draw_uniform
from visionloop.training.rows import PADDING, BatchKey


class Batch(NamedTuple):
    """What a step sees: uint8 images (n, h, w, 3) or embeddings (n, d); targets: classes (n), or 0 and 1 (n, k) for
    multilabel; `rows_n`: which images of the prepared data they are, -1 for padding that no figure may count.

    `draws_nd` is there only on the way to the device: what is still to be done to the images.
    """

    inputs: Tensor
    targets: Tensor
    rows_n: Tensor
    draws_nd: Tensor | None = None


@dataclass(frozen=True)
class Reading:
    """What is done to the images of a side. `seed`: None for validation, which sees each image as it is.

    `done_by`: the loader; the device, which is given whole images and draws; or the device that has the images already.
    """

    preset: str = "none"
    seed: int | None = None
    done_by: str = "loader"  # loader | device | resident


class Batches(Dataset[Batch]):
    """Batches, indexed by their keys. It goes to another process without its images: they are mapped anew there."""

    def __init__(
        self,
        prepared: Prepared,
        reading: Reading,
        key_n: UInt64Array,
        embedding_nd: NDArray[np.float32] | None = None,
    ) -> None:
        """Take `key_n`, one for each row of the prepared data; with embeddings, one of them for each row too."""
        self.prepared, self.reading, self.key_n, self.embedding_nd = prepared, reading, key_n, embedding_nd

    def __getitem__(self, key: Any) -> Batch:
        targets = self.prepared.label_n if self.prepared.targets_nk is None else self.prepared.targets_nk
        rows_n = key.rows_n
        is_padding_n = rows_n == PADDING
        inputs, draws_nd = self._read(key)
        if is_padding_n.any():
            inputs[is_padding_n] = 0
        return Batch(
            torch.from_numpy(inputs),
            torch.from_numpy(np.where(_lift(is_padding_n, targets), targets.dtype.type(0), targets[rows_n])),
            torch.from_numpy(rows_n),
            None if draws_nd is None else torch.from_numpy(draws_nd),
        )

    def _read(self, key: BatchKey) -> tuple[NDArray[Any], NDArray[np.float32] | None]:
        if self.embedding_nd is not None:
            return self.embedding_nd[key.rows_n], None
        prepared, reading = self.prepared, self.reading
        if reading.seed is not None and reading.done_by == "loader" and reading.preset == "none":
            return prepared.read_crops(key.rows_n, seed=reading.seed, epoch=key.epoch), None
        draws_nd = self._draw(key) if reading.seed is not None else None
        if reading.done_by == "resident":
            return np.empty((len(key.rows_n), 0), np.uint8), draws_nd
        if draws_nd is None:
            return prepared.read(key.rows_n), None
        images_nhwc = read_whole(prepared, key.rows_n)
        if reading.done_by == "device":
            return images_nhwc, draws_nd
        return augment_images(images_nhwc, draws_nd, prepared.size_hw), None

    def _draw(self, key: BatchKey) -> NDArray[np.float32] | None:
        """Return the draws of a training batch; None where each image is taken as it is.

        A crop without a preset is that of `Prepared.read_crops`.
        """
        prepared, reading, rows_n = self.prepared, self.reading, key.rows_n
        assert reading.seed is not None
        if reading.preset != "none":
            bits_n = draw_bits(self.key_n[rows_n], seed=reading.seed, epoch=key.epoch, purpose=AUGMENT)
            uniform_nd = draw_uniform(bits_n, NUM_UNIFORM, key.turns_n)
            return draw_preset(reading.preset, uniform_nd, frame_images(prepared, rows_n), prepared.size_hw)
        if prepared.train_shards is None:
            return None
        height, width = prepared.size_hw
        boxes = []
        for row, (top, left, frame_h, frame_w) in zip(rows_n, frame_images(prepared, rows_n), strict=True):
            free = int(frame_h) - height, int(frame_w) - width
            down, right = choose_crop(prepared.sha256_n[row], free, seed=reading.seed, epoch=key.epoch)
            boxes.append((top + down, left + right, height, width))
        return draw_crops(np.asarray(boxes, np.int64).reshape(-1, 4))

    def __getstate__(self) -> dict[str, Any]:
        shards = {"shards": None, "train_shards": None}
        return {**self.__dict__, "prepared": replace(self.prepared, **shards)}  # type: ignore[arg-type]

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        opened = load_prepared(self.prepared.folder)
        self.prepared = replace(self.prepared, shards=opened.shards, train_shards=opened.train_shards)


def read_whole(prepared: Prepared, rows_n: IntArray) -> UInt8Array:
    """Return the images of some rows as large as the largest that there are for training, (n, h, w, 3).

    An image that was not prepared larger (with `train.on: all`, those of the validation side) lies in the middle,
    mirrored beyond its edges; `frame_images` says where.
    """
    if prepared.train_shards is None:
        return prepared.read(rows_n)
    is_larger_n = prepared.side_n[rows_n] == "train"
    larger = prepared.train_shards.read(prepared.place_n[rows_n[is_larger_n]])
    if is_larger_n.all():
        return larger
    size_hw = prepared.train_shards.size_hw
    out = np.empty((len(rows_n), *size_hw, 3), np.uint8)
    out[is_larger_n] = larger
    around = [(f, s - i - f) for s, i, f in zip(size_hw, prepared.size_hw, _find_middle(prepared), strict=True)]
    smaller = prepared.shards.read(prepared.place_n[rows_n[~is_larger_n]])
    out[~is_larger_n] = np.pad(smaller, [(0, 0), *around, (0, 0)], mode="symmetric")
    return out


def frame_images(prepared: Prepared, rows_n: IntArray) -> IntArray:
    """Return the box (n, 4) that each image fills in what `read_whole` returns: top, left, height, width."""
    if prepared.train_shards is None:
        return np.tile(np.asarray((0, 0, *prepared.size_hw), np.int64), (len(rows_n), 1))
    larger = (0, 0, *prepared.train_shards.size_hw)
    smaller = (*_find_middle(prepared), *prepared.size_hw)
    return np.where((prepared.side_n[rows_n] == "train")[:, None], larger, smaller).astype(np.int64)


def _find_middle(prepared: Prepared) -> tuple[int, int]:
    assert prepared.train_shards is not None
    (outer_h, outer_w), (inner_h, inner_w) = prepared.train_shards.size_hw, prepared.size_hw
    return (outer_h - inner_h) // 2, (outer_w - inner_w) // 2


def _lift(is_padding_n: NDArray[np.bool_], targets: NDArray[Any]) -> NDArray[np.bool_]:
    return is_padding_n[:, None] if targets.ndim == 2 else is_padding_n
