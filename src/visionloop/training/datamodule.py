"""Prepared shards as batches. Order and crops are functions of (seed, epoch): a resumed run sees what it would have."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from visionloop.data.shards import IntArray, Prepared


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


class Batches(Dataset[tuple[Tensor, Tensor]]):
    """Images (n, h, w, 3) and labels (n) of any rows: indexed by an array of rows, not by one.

    Where images were prepared larger, a sampler with a seed gets a crop of each, another one in each of its epochs.
    """

    def __init__(self, prepared: Prepared, sampler: BatchRows) -> None:
        self.prepared, self.sampler = prepared, sampler

    def __getitem__(self, rows: Any) -> tuple[Tensor, Tensor]:
        if self.sampler.seed is None:
            images_nhwc = self.prepared.read(rows)
        else:
            images_nhwc = self.prepared.read_crops(rows, seed=self.sampler.seed, epoch=self.sampler.epoch)
        return torch.from_numpy(images_nhwc), torch.from_numpy(self.prepared.label_n[rows])


class PreparedData(pl.LightningDataModule):
    """Train and validation batches of prepared data."""

    def __init__(self, prepared: Prepared, *, batch_size: int, seed: int) -> None:
        super().__init__()
        self.prepared, self.batch_size, self.seed = prepared, batch_size, seed

    def train_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        return self._make_loader("train", self.seed)

    def val_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        return self._make_loader("val", None)

    def _make_loader(self, side: str, seed: int | None) -> DataLoader[tuple[Tensor, Tensor]]:
        rows: Any = BatchRows(self.prepared.rows(side), self.batch_size, seed)
        # A batch is one slice of a memory-mapped array: a worker process would cost more than it saves. (It would also
        # not see the epoch of the sampler.)
        return DataLoader(Batches(self.prepared, rows), batch_size=None, sampler=rows, num_workers=0)
