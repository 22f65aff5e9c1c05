"""Which images make each batch of an epoch, for each of the processes that train together. Pure.

Dimensions: n images of a batch.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Sampler

from visionloop.data.shards import IntArray
from visionloop.errors import DatasetError
from visionloop.training.draws import ORDER, UInt64Array, count_turns, draw_bits
from visionloop.training.job import World

PADDING = -1  # stands for no image, where a rank has none left


class BatchKey(NamedTuple):
    """All that a batch depends on. It travels to the process that reads the batch, the epoch with it.

    `turns_n` says how often each image has come before in this epoch: more than never only in a weighted draw.
    """

    epoch: int
    rows_n: IntArray
    turns_n: IntArray


class BatchRows(Sampler[BatchKey]):
    """Yields the keys of one rank's share of each batch; `parts` batches make a step. They differ by one image at most.

    With a seed the order is another one in each epoch, a function of (seed, epoch, image); with weights, one for each
    row, as many rows are drawn with replacement, a function of (seed, epoch). Without a seed the rows come in their
    order, and all ranks get equally many, by PADDING. The images of a step do not depend on `parts` or the world.
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
        """Take `step_size`, the images of a step over all parts and ranks, and `key_n`, a number of each image."""
        self.rows, self.seed, self.epoch, self.parts = rows, seed, 0, parts
        self.key_n = rows.astype(np.uint64) if key_n is None else key_n
        self.weights_n, self.world = weights_n, world or World()
        self.num_steps = count_steps(len(rows), step_size)

    def set_epoch(self, epoch: int) -> None:
        """Lightning tells the epoch here, also after a resume."""
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
    """Return the number of steps of an epoch, one that is not full included."""
    return -(-num_images // step_size)


def count_parts(num_images: int, step_size: int, in_memory: int, world_size: int) -> int:
    """Return in how many batches a step is taken, so that `in_memory` images at a time are enough for all ranks.

    Each batch has an image for each rank, even if that is more than `in_memory`.
    """
    num_steps = max(1, count_steps(num_images, step_size))
    smallest, largest = num_images // num_steps, -(-num_images // num_steps)
    return max(1, min(-(-largest // in_memory), smallest // world_size))


def check_world(rows: IntArray, step_size: int, world: World) -> None:
    """Raise DatasetError where a rank would have no image of some training step."""
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
