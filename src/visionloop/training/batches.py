"""Batches of prepared images or embeddings, made from their keys.

Images are cropped and augmented on the CPU. Or they are read whole, together with their draws, and the device does the
rest.

Dimensions: n images of a batch, k classes, d features or draws.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from visionloop.data.images import UInt8Array
from visionloop.data.shards import IntArray, Prepared, choose_crop, load_prepared
from visionloop.errors import DatasetError
from visionloop.training.augment import (
    AUGMENT,
    NUM_UNIFORM,
    ORDER,
    UInt64Array,
    augment_images,
    count_turns,
    draw_bits,
    draw_crops,
    draw_preset,
    draw_uniform,
)
from visionloop.training.ranks.world import World

PADDING = -1  # the row of an empty place in a batch, for a rank that has no image left


class BatchKey(NamedTuple):
    """All that a batch depends on. It is sent to the process that reads the batch.

    `turns_n` says how often each image came before in this epoch. It is 0 unless images are drawn by weights: then an
    image can come several times.
    """

    epoch: int
    rows_n: IntArray
    turns_n: IntArray


class BatchRows(Sampler[BatchKey]):
    """Yields the keys of one rank's share of each batch. A step has `parts` batches.

    With a seed (training) the order is new in each epoch and depends on (seed, epoch, image). With weights, one for
    each row, the same number of rows is drawn with replacement, depending on (seed, epoch). Without a seed (validation)
    the rows come in their order, and PADDING gives all ranks the same number. Batches differ in size by one image at
    most. Which images are in a step does not depend on `parts` or the number of ranks.
    """

    def __init__(
        self,
        rows: IntArray,
        step_size: int,
        seed: int | None,
        *,
        parts: int = 1,
        key_n: UInt64Array | None = None,
        weights_n: NDArray[np.float64] | None = None,
        world: World | None = None,
    ) -> None:
        """`step_size` counts the images of a step over all parts and ranks. `key_n` is a number for each image."""
        self.rows, self.seed, self.epoch, self.parts = rows, seed, 0, parts
        self.key_n = rows.astype(np.uint64) if key_n is None else key_n
        self.weights_n, self.world = weights_n, world or World()
        self.num_steps = count_steps(len(rows), step_size)

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch. Lightning calls this, also after a resume."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.num_steps * self.parts

    def __iter__(self) -> Iterator[BatchKey]:
        rows = self.rows if self.seed is None else self._draw_epoch(self.seed)
        turn_n = np.zeros(len(rows), np.int64) if self.weights_n is None else count_turns(rows)
        rank, size = self.world.rank, self.world.size
        for picks in self._split(len(rows)):
            batch, turns = rows[picks], turn_n[picks]
            if self.seed is None:
                missing = -len(batch) % size
                batch, turns = np.pad(batch, (0, missing), constant_values=PADDING), np.pad(turns, (0, missing))
            yield BatchKey(self.epoch, batch[rank::size], turns[rank::size])

    def _split(self, number: int) -> Iterator[IntArray]:
        for step in np.array_split(np.arange(number), self.num_steps) if self.num_steps else ():
            yield from np.array_split(step, self.parts)

    def _draw_epoch(self, seed: int) -> IntArray:
        if self.weights_n is not None:
            share_n = self.weights_n / self.weights_n.sum()
            rng = np.random.default_rng([seed, self.epoch])
            return rng.choice(self.rows, size=len(self.rows), p=share_n)
        bits_n = draw_bits(self.key_n, seed=seed, epoch=self.epoch, purpose=ORDER)
        return self.rows[np.argsort(bits_n, kind="stable")]


def count_steps(num_images: int, step_size: int) -> int:
    """Return the number of steps of an epoch, rounded up."""
    return -(-num_images // step_size)


def count_parts(num_images: int, step_size: int, in_memory: int, world_size: int) -> int:
    """Return the number of batches of a step, so that at most `in_memory` images are in memory over all ranks.

    Each batch has at least one image for each rank, even if that is more than `in_memory`.
    """
    num_steps = max(1, count_steps(num_images, step_size))
    smallest, largest = num_images // num_steps, -(-num_images // num_steps)
    return max(1, min(-(-largest // in_memory), smallest // world_size))


def check_world(rows: IntArray, step_size: int, world: World) -> None:
    """Raise DatasetError if a rank would have no image in some training step."""
    smallest = len(rows) // max(1, count_steps(len(rows), step_size))
    if smallest >= world.size:
        return
    most = f"Use {max(1, len(rows))} devices at most."
    raise DatasetError(
        "training batches",
        f"{world.size} ranks for {len(rows)} training images in batches of {smallest} to {step_size}",
        "an image for each rank in each batch",
        most if len(rows) < world.size else f"Use fewer devices, or set train.batch_size to {world.size} or more.",
    )


class Batch(NamedTuple):
    """The input of a step: uint8 images (n, h, w, 3) or embeddings (n, d).

    `targets` are classes (n), or 0 and 1 (n, k) for multilabel. `rows_n` are rows of the prepared data, or -1 for
    padding, which no figure may count. `draws_nd` is set until the device has applied it to the images.
    """

    inputs: Tensor
    targets: Tensor
    rows_n: Tensor
    draws_nd: Tensor | None = None


@dataclass(frozen=True)
class Augmentation:
    """How the images of a side are changed. `seed` is None for validation, which sees each image unchanged.

    `done_by` says who applies it. loader: the CPU that reads the batch. device: the GPU, which gets whole images and
    draws. resident: the GPU too, which already holds all images and gets only the draws.
    """

    preset: str = "none"
    seed: int | None = None
    done_by: str = "loader"  # loader | device | resident


class Batches(Dataset[Batch]):
    """Batches, indexed by their keys. Pickled without its images: another process maps the shards again."""

    def __init__(
        self,
        prepared: Prepared,
        augmentation: Augmentation,
        key_n: UInt64Array,
        embedding_nd: NDArray[np.float32] | None = None,
    ) -> None:
        """`key_n` and `embedding_nd` (if given) have one entry for each row of the prepared data."""
        self.prepared, self.augmentation, self.key_n, self.embedding_nd = prepared, augmentation, key_n, embedding_nd

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
        prepared, augmentation = self.prepared, self.augmentation
        if augmentation.seed is not None and augmentation.done_by == "loader" and augmentation.preset == "none":
            return prepared.read_crops(key.rows_n, seed=augmentation.seed, epoch=key.epoch), None
        draws_nd = self._draw(key) if augmentation.seed is not None else None
        if augmentation.done_by == "resident":
            return np.empty((len(key.rows_n), 0), np.uint8), draws_nd
        if draws_nd is None:
            return prepared.read(key.rows_n), None
        images_nhwc = read_whole(prepared, key.rows_n)
        if augmentation.done_by == "device":
            return images_nhwc, draws_nd
        return augment_images(images_nhwc, draws_nd, prepared.size_hw), None

    def _draw(self, key: BatchKey) -> NDArray[np.float32] | None:
        """Return the draws of a training batch, or None if its images are not changed.

        Without a preset the crops are those of `Prepared.read_crops`.
        """
        prepared, augmentation, rows_n = self.prepared, self.augmentation, key.rows_n
        assert augmentation.seed is not None
        if augmentation.preset != "none":
            bits_n = draw_bits(self.key_n[rows_n], seed=augmentation.seed, epoch=key.epoch, purpose=AUGMENT)
            uniform_nd = draw_uniform(bits_n, NUM_UNIFORM, key.turns_n)
            return draw_preset(augmentation.preset, uniform_nd, frame_images(prepared, rows_n), prepared.size_hw)
        if prepared.train_shards is None:
            return None
        height, width = prepared.size_hw
        boxes = []
        for row, (top, left, frame_h, frame_w) in zip(rows_n, frame_images(prepared, rows_n), strict=True):
            free = int(frame_h) - height, int(frame_w) - width
            down, right = choose_crop(prepared.sha256_n[row], free, seed=augmentation.seed, epoch=key.epoch)
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
    """Return the images of some rows, (n, h, w, 3), in the size in which the training side is stored.

    With `train.on: all` there are also smaller images, of the validation side. They are put in the middle, and the
    border is filled with their mirror image. `frame_images` says where they are.
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
