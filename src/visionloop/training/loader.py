"""Batches are read before the step needs them: by a thread, or by processes.

A thread is enough where a batch is a copy of mapped memory; decoding happened in `prepare`. Processes pay where images
are augmented on the CPU faster than one core can, or lie on a slow disk. Either way the batches are the same.
"""

import os
import shutil
import tempfile
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing import process, util
from typing import Any

import torch
from torch.utils.data import DataLoader

from visionloop.errors import TrainingError, describe_first_line
from visionloop.lifetime import die_with_parents
from visionloop.training.batches import Batch, Batches, BatchRows

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
