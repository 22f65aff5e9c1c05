"""The training and validation batches of a job, for one rank of its world: who reads, who augments, and where.

Batches are read before the step needs them: by a thread, or by processes. A thread is enough where a batch is a copy of
mapped memory; decoding happened in `prepare`. Processes pay where images are augmented on the CPU faster than one core
can, or lie on a slow disk. Either way the batches are the same.

On a CPU the loader crops and augments. On a GPU the device does, and has all images from the start where they fit.

Dimensions: n images, h height, w width.
"""

import os
import shutil
import tempfile
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing import process, util
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader

from visionloop.data.images import UInt8Array
from visionloop.data.shards import IntArray, Prepared
from visionloop.errors import TrainingError, describe_first_line
from visionloop.lifetime import die_with_parents
from visionloop.parallel import count_cores
from visionloop.training.augment import PRESETS, augment_batch, make_image_keys
from visionloop.training.batches import Augmentation, Batch, Batches, BatchRows, check_world, count_parts, read_whole
from visionloop.training.imbalance import plan_imbalance
from visionloop.training.job import Job

# A Unix socket's path has 107 characters at most, of which Python's part takes 18.
MAX_FOLDER = 89
AHEAD = 2  # batches in memory besides the one that is learned from (of each process)


class Loader:
    """Iterates over the batches of the sampler's epoch; `len` is their number. Lightning sets the epoch of `sampler`.

    No DataLoader, so that Lightning does not put a sampler of its own into it when several processes train.
    """

    def __init__(self, batches: Batches, sampler: BatchRows, *, workers: int = 0, pinned: bool = False) -> None:
        """Choose who reads: `workers` processes, or for 0 a thread. `pinned`: into memory that a GPU copies faster."""
        self.batches, self.sampler, self.pinned = batches, sampler, pinned
        self.batch_sampler = None  # Lightning looks for it where there is a sampler
        self._processes = _make_processes(batches, sampler, workers, pinned) if workers else None

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[Batch]:
        """Yield the batches. Raises TrainingError when a process that reads is gone."""
        if self._processes is None:
            yield from self._read_in_thread()
            return
        try:
            yield from self._processes
        except (RuntimeError, ConnectionError, EOFError) as exc:  # the latter when it goes while it hands a batch over
            if isinstance(exc, RuntimeError) and "DataLoader worker" not in str(exc):
                raise
            raise make_lost_reader_error(exc) from exc

    def close(self) -> None:
        """End the processes that read, if any. After that there are no more batches."""
        if self._processes is not None:
            iterator: Any = self._processes._iterator
            if iterator is not None:
                iterator._shutdown_workers()
            self._processes = None

    def _read_in_thread(self) -> Iterator[Batch]:
        pool = ThreadPoolExecutor(1, thread_name_prefix="loader", initializer=_use_one_core)
        waiting: deque[Future[Batch]] = deque()
        try:
            for key in self.sampler:
                waiting.append(pool.submit(self._read, key))
                if len(waiting) > AHEAD:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            # Not waited for: Python swallows a Ctrl-C that comes while a generator is being closed.
            pool.shutdown(wait=False, cancel_futures=True)

    def _read(self, key: Any) -> Batch:
        batch = self.batches[key]
        return Batch(*(t.pin_memory() if t is not None else None for t in batch)) if self.pinned else batch  # type: ignore[arg-type]


def make_lost_reader_error(exc: Exception) -> TrainingError:
    """Return the error of a process that reads and is gone."""
    return TrainingError(
        "reading training batches",
        f"a process that reads them is gone ({describe_first_line(exc)})",
        "memory for all of them, shared memory (/dev/shm) too",
        "Set VISIONLOOP_LOADER_WORKERS to fewer, or to 0: a thread reads then.",
    )


def _make_processes(batches: Batches, sampler: BatchRows, workers: int, pinned: bool) -> DataLoader[Batch]:
    _keep_sockets_short()
    return DataLoader(
        batches,
        batch_size=None,
        sampler=sampler,
        num_workers=workers,
        prefetch_factor=AHEAD,
        persistent_workers=True,
        pin_memory=pinned,
        worker_init_fn=_EndWith(os.getpid()),
        generator=torch.Generator(),  # else each epoch would take a number from the one that dropout draws from
    )


def _keep_sockets_short() -> None:
    """Give the processes a folder with a short path for their sockets: with a long one (TMPDIR) they hang for ever."""
    if len(util.get_temp_dir()) > MAX_FOLDER:
        folder = tempfile.mkdtemp(prefix="pymp-", dir="/tmp")
        config: Any = process.current_process()._config  # type: ignore[attr-defined]
        config["tempdir"] = folder  # where `get_temp_dir` keeps it, also for those that are started
        util.Finalize(None, shutil.rmtree, args=(folder, True), exitpriority=-100)


class _EndWith:
    """Ends a process that reads once the one that it reads for is gone: a kill leaves none behind."""

    def __init__(self, pid: int) -> None:
        self.pid = pid

    def __call__(self, worker: int) -> None:
        die_with_parents(self.pid)


def _use_one_core() -> None:
    """Keep torch from starting threads in this thread: the training step needs the cores."""
    torch.set_num_threads(1)


CHUNK = 512
FREE_SHARE = 0.5  # of the device's free memory; the rest is the network's and its activations'
MAX_WORKERS = 4


class ResidentImages:
    """The images of some rows on a device, all of one size."""

    def __init__(self, read: Callable[[IntArray], UInt8Array], rows: IntArray, device: torch.device) -> None:
        """Copy the images to the device, a few hundred at a time."""
        at_n = torch.full((int(rows.max()) + 1,), -1, dtype=torch.int64)
        at_n[torch.from_numpy(rows)] = torch.arange(len(rows))
        self.at_n = at_n.to(device)
        self.size_hwc = read(rows[:1]).shape[1:]
        self.pixels_nd = torch.empty((len(rows), int(np.prod(self.size_hwc))), dtype=torch.uint8, device=device)
        for start in range(0, len(rows), CHUNK):
            chunk = torch.from_numpy(read(rows[start : start + CHUNK]))
            self.pixels_nd[start : start + len(chunk)].copy_(chunk.flatten(1))
        if self.pixels_nd.shape[1] % 8 == 0:  # gathered by eight bytes at a time, not one by one
            self.pixels_nd = self.pixels_nd.view(torch.int64)

    def take(self, rows_n: Tensor, *, padded: bool) -> Tensor:
        """Return the images (n, h, w, 3) of some rows; with `padded`, black for those of -1."""
        at_n = self.at_n[rows_n.clamp(min=0) if padded else rows_n]
        pixels_nd = self.pixels_nd.index_select(0, at_n)
        if padded:
            pixels_nd = torch.where((rows_n >= 0)[:, None], pixels_nd, pixels_nd.new_zeros(()))
        return pixels_nd.view(torch.uint8).view(-1, *self.size_hwc)


def fits(prepared: Prepared, train_rows: IntArray, val_rows: IntArray, free_bytes: int) -> bool:
    """Say whether the images of both sides take at most half of the memory that is free."""
    larger_hw = prepared.size_hw if prepared.train_shards is None else prepared.train_shards.size_hw
    needed = 3 * (len(train_rows) * int(np.prod(larger_hw)) + len(val_rows) * int(np.prod(prepared.size_hw)))
    return needed <= FREE_SHARE * free_bytes


def make_resident(
    prepared: Prepared, train_rows: IntArray, val_rows: IntArray, device: torch.device
) -> tuple[ResidentImages, ResidentImages | None]:
    """Copy both sides to the device: the training images whole, the validation images as they are judged."""
    train = ResidentImages(lambda rows: read_whole(prepared, rows), train_rows, device)
    return train, ResidentImages(prepared.read, val_rows, device) if len(val_rows) else None


class PreparedData(pl.LightningDataModule):
    """Training and validation batches of a job, for one rank of its world.

    With `embedding_nd` (one row for each row of the prepared data) the inputs are embeddings instead of images.
    `accumulate` batches make a step of `train.batch_size` x `train.accumulate` images, however many fit into memory.
    `on_device` says who augments; by itself a GPU does.
    """

    def __init__(
        self,
        job: Job,
        in_memory: int,
        *,
        embedding_nd: NDArray[np.float32] | None = None,
        on_device: bool | None = None,
    ) -> None:
        """Lay the batches out. `in_memory`: images at a time, over all ranks. Raises DatasetError."""
        super().__init__()
        self.prepared, self.section, self.world = job.prepared, job.params.train, job.world
        self.train_rows, self.val_rows = job.train_rows, job.val_rows
        self.in_memory, self.embedding_nd = in_memory, embedding_nd
        self.step_size = self.section.batch_size * self.section.accumulate
        self.accumulate = count_parts(len(self.train_rows), self.step_size, in_memory, self.world.size)
        self.weights_n = plan_imbalance(job).row_weights_n
        is_gpu = job.hardware.accelerator == "gpu"
        self.on_device = embedding_nd is None and (is_gpu if on_device is None else on_device)
        self.pinned = is_gpu
        self.workers = 0 if embedding_nd is not None else choose_workers(job)
        self.key_n = make_image_keys(self.prepared.sha256_n)
        self.resident: tuple[ResidentImages, ResidentImages | None] | None = None
        self._loaders: list[Loader] = []
        check_world(self.train_rows, self.step_size, self.world)

    def setup(self, stage: str) -> None:
        """Copy the images to the device once, where it augments and they fit."""
        device = self.trainer.strategy.root_device if self.trainer else torch.device("cpu")
        if self.on_device and self.resident is None and device.type == "cuda":
            free_bytes, _ = torch.cuda.mem_get_info(device)
            if fits(self.prepared, self.train_rows, self.val_rows, free_bytes):
                self.keep_on(device)

    def keep_on(self, device: torch.device) -> None:
        """Copy the images of both sides to a device; batches take them from there from now on."""
        self.resident = make_resident(self.prepared, self.train_rows, self.val_rows, device)

    def train_dataloader(self) -> Loader:
        rows, seed = self.train_rows, self.section.seed
        sampler = BatchRows(
            rows,
            self.step_size,
            seed,
            parts=self.accumulate,
            key_n=self.key_n[rows],
            weights_n=self.weights_n,
            world=self.world,
        )
        return self._make_loader(sampler, self.section.augment, 0 if self.resident else self.workers)

    def val_dataloader(self) -> Loader:
        return self._make_loader(BatchRows(self.val_rows, self.in_memory, None, world=self.world), "none", 0)

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int = 0) -> Batch:
        """Do on the device what the loader left to it: take the images, crop and augment them."""
        if not self.on_device:
            return batch
        inputs = batch.inputs
        if self.resident:
            train, val = self.resident
            if val is None or self.trainer is None or self.trainer.training:
                inputs = train.take(batch.rows_n, padded=False)
            else:
                inputs = val.take(batch.rows_n, padded=True)
        if batch.draws_nd is not None:
            preset = PRESETS.get(self.section.augment)
            inputs = augment_batch(inputs, batch.draws_nd, self.prepared.size_hw, preset)
        return Batch(inputs, batch.targets, batch.rows_n)

    def teardown(self, stage: str) -> None:
        """End the processes that read, and free the device."""
        for loader in self._loaders:
            loader.close()
        self._loaders, self.resident = [], None

    def _make_loader(self, sampler: BatchRows, preset: str, workers: int) -> Loader:
        done_by = "resident" if self.resident else "device" if self.on_device else "loader"
        batches = Batches(self.prepared, Augmentation(preset, sampler.seed, done_by), self.key_n, self.embedding_nd)
        self._loaders.append(Loader(batches, sampler, workers=workers, pinned=self.pinned))
        return self._loaders[-1]


def choose_workers(job: Job) -> int:
    """Return how many processes read for this rank: as the settings say, else a few for a GPU and none for a CPU."""
    if job.settings.loader_workers is not None:
        return job.settings.loader_workers
    if job.hardware.accelerator != "gpu":
        return 0
    return min(MAX_WORKERS, count_cores() // job.world.local_size)
