"""Batches of prepared images, or of embeddings. Order and crops are functions of (seed, epoch): a resumed run sees
what it would have seen.

Dimensions: n images, k classes, d features.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import pytorch_lightning as pl
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from visionloop.data.shards import IntArray, Prepared
from visionloop.training.job import Job


class Batch(NamedTuple):
    """What a step sees: uint8 images (n, h, w, 3) or embeddings (n, d); targets: classes (n), or 0 and 1 (n, k) for
    multilabel; `rows_n`: which images of the prepared data they are."""

    inputs: Tensor
    targets: Tensor
    rows_n: Tensor


class BatchRows(Sampler[IntArray]):
    """Yields the rows of each batch; shuffled anew each epoch when a seed is given. Batches differ by one at most."""

    def __init__(self, rows: IntArray, batch_size: int, seed: int | None) -> None:
        self.rows, self.seed, self.epoch = rows, seed, 0
        self.num_batches = max(1, -(-len(rows) // batch_size))

    def set_epoch(self, epoch: int) -> None:
        """Lightning tells the epoch here, also after a resume."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.num_batches

    def __iter__(self) -> Iterator[IntArray]:
        rows = self.rows
        if self.seed is not None:
            rows = np.random.default_rng([self.seed, self.epoch]).permutation(rows)
        yield from np.array_split(rows, self.num_batches)


class Batches(Dataset[Batch]):
    """Batches of any rows: indexed by an array of rows, not by one.

    Where images were prepared larger, a sampler with a seed gets a crop of each, another one in each of its epochs.
    """

    def __init__(self, prepared: Prepared, sampler: BatchRows, embedding_nd: NDArray[np.float32] | None = None) -> None:
        self.prepared, self.sampler, self.embedding_nd = prepared, sampler, embedding_nd

    def __getitem__(self, rows: Any) -> Batch:
        targets = self.prepared.label_n if self.prepared.targets_nk is None else self.prepared.targets_nk
        return Batch(torch.from_numpy(self._read(rows)), torch.from_numpy(targets[rows]), torch.from_numpy(rows))

    def _read(self, rows: IntArray) -> NDArray[Any]:
        if self.embedding_nd is not None:
            return self.embedding_nd[rows]
        if self.sampler.seed is None:
            return self.prepared.read(rows)
        return self.prepared.read_crops(rows, seed=self.sampler.seed, epoch=self.sampler.epoch)


class PreparedData(pl.LightningDataModule):
    """Training and validation batches of a job, for one rank of its world.

    With `embedding_nd` (one row for each row of the prepared data) the inputs are embeddings instead of images.
    """

    def __init__(self, job: Job, batch_size: int, *, embedding_nd: NDArray[np.float32] | None = None) -> None:
        super().__init__()
        self.prepared, self.section, self.world = job.prepared, job.params.train, job.world
        self.train_rows, self.val_rows = job.train_rows, job.val_rows
        self.batch_size, self.embedding_nd = batch_size, embedding_nd

    def train_dataloader(self) -> DataLoader[Batch]:
        return self._make_loader(self.train_rows, self.section.seed)

    def val_dataloader(self) -> DataLoader[Batch]:
        return self._make_loader(self.val_rows, None)

    def _make_loader(self, side_rows: IntArray, seed: int | None) -> DataLoader[Batch]:
        rows: Any = BatchRows(side_rows, self.batch_size, seed)
        # A batch is one slice of a memory-mapped array: a worker process would cost more than it saves. (It would also
        # not see the epoch of the sampler.)
        batches = Batches(self.prepared, rows, self.embedding_nd)
        return DataLoader(batches, batch_size=None, sampler=rows, num_workers=0)
