"""The epochs: Lightning over batches, with checkpoints in the work folder, from the last one if there is one.

WORK/checkpoints/   see `checkpoints.py`
WORK/memory.json    how many images fit into memory at a time, where it is fewer than params.yaml asks for

glibc gives large blocks of memory back to the system as soon as they are freed. A training step on a CPU frees all its
activations; in the next step the system must give them out again, page by page, filled with zeros. For MobileNetV2 that
takes two fifths of the time, so freed memory is kept while epochs run.
"""

import contextlib
import ctypes
import gc
import json
import logging
import re
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import EarlyStopping

from visionloop.errors import TrainingError
from visionloop.params import Train
from visionloop.records import canonical_json
from visionloop.tracking import CALL_ERRORS
from visionloop.training.checkpoints import (
    FOLDER,
    CheckpointFiles,
    SavedEpoch,
    find_checkpoint,
    get_best,
    load_checkpoint,
    load_saved,
)
from visionloop.training.datamodule import PreparedData
from visionloop.training.epoch_end import ALL_EPOCHS, EpochEnd, FigureLog
from visionloop.training.finite import FiniteGuard
from visionloop.training.job import Job
from visionloop.training.mirror import Mirror
from visionloop.training.module import ClassifierModule
from visionloop.training.ranks.world import choose_strategy, share
from visionloop.training.views import make_views
from visionloop.workfolder import write_file

# Of malloc.h: the largest free block that stays at the top of the heap, and how many blocks may lie outside of it.
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
LARGEST, NONE = 2**31 - 1, 0
DEFAULTS = {M_TRIM_THRESHOLD: 128 * 1024, M_MMAP_MAX: 65_536}
BATCH_FILE = "memory.json"
# What torch says on a CPU (Linux, then others) and where a library of the GPU finds no room for itself.
_SIGNS = re.compile(
    r"DefaultCPUAllocator: (can't allocate|not enough) memory|out of memory|(CUBLAS|CUDNN)_STATUS_ALLOC_FAILED",
    re.IGNORECASE,
)
MakeData = Callable[[int], PreparedData]


@contextlib.contextmanager
def keep_memory() -> Iterator[None]:
    """Keep freed memory inside of the process, and give it back at the end. Does nothing without glibc."""
    libc = _find_glibc()
    if libc is None:
        yield
        return
    libc.mallopt(M_TRIM_THRESHOLD, LARGEST)
    libc.mallopt(M_MMAP_MAX, NONE)
    try:
        yield
    finally:
        for parameter, value in DEFAULTS.items():
            libc.mallopt(parameter, value)
        libc.malloc_trim(0)


def _find_glibc() -> Any:
    """Return the C library of this process if it is glibc, else None (musl, macOS, Windows)."""
    if not sys.platform.startswith("linux"):
        return None
    libc = ctypes.CDLL(None)
    return libc if hasattr(libc, "gnu_get_libc_version") and hasattr(libc, "mallopt") else None


@dataclass(frozen=True)
class MemoryPlan:
    """How many images are in memory at a time: asked for, possible, and of how many that make a step."""

    batch_in_memory: int
    batch_size: int
    step_size: int

    @property
    def accumulate(self) -> int:
        """The parts that a step is made of."""
        return -(-self.step_size // self.batch_in_memory)

    @property
    def is_reduced(self) -> bool:
        """Whether it is less than params.yaml asks for."""
        return self.batch_in_memory < self.batch_size

    def halve(self) -> "MemoryPlan":
        """Return the plan with half as many images at a time. Raises TrainingError below one image."""
        if self.batch_in_memory == 1:
            raise TrainingError(
                "train",
                "not even one image at a time fits into memory",
                "a network and images that fit",
                "Take smaller images (prepare.image_size), a smaller train.backbone, or a machine with more memory.",
            )
        return replace(self, batch_in_memory=self.batch_in_memory // 2)


def load_plan(work: Path, section: Train) -> MemoryPlan:
    """Return the plan of params.yaml, or the smaller one that an earlier process found it needs."""
    try:
        known = int(json.loads((work / BATCH_FILE).read_text())["batch_in_memory"])
    except (OSError, ValueError, KeyError, TypeError):
        known = section.batch_size
    return MemoryPlan(
        batch_in_memory=min(max(known, 1), section.batch_size),
        batch_size=section.batch_size,
        step_size=section.batch_size * section.accumulate,
    )


def keep_plan(work: Path, plan: MemoryPlan) -> None:
    """Let the next process begin with this plan."""
    write_file(work / BATCH_FILE, canonical_json({"batch_in_memory": plan.batch_in_memory}))


def is_out_of_memory(error: BaseException) -> bool:
    """Say whether an error means that there is no memory left, on a GPU or for torch or numpy on a CPU."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and _SIGNS.search(str(error)) is not None


def release_memory() -> None:
    """Give back what a failed attempt held. Its exception must be gone: its frames hold the tensors."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@dataclass(frozen=True)
class Attempt:
    """One go at the epochs that are left: where it works, how many images at a time, and what it goes on from."""

    work: Path
    job: Job
    run_id: str
    plan: MemoryPlan
    path: Path | None
    saved: SavedEpoch | None


def run_loop(work: Path, job: Job, run_id: str, module: ClassifierModule, make_data: MakeData) -> None:
    """Train until the patience or the epochs are used up, and leave the best epoch's weights in the module.

    `make_data` takes the number of images that are to be in memory at a time. Where they do not fit, half as many are
    tried, and a step is made of twice as many parts; what was learned since the last finished epoch is learned again.

    Raises:
        KeyboardInterrupt: it was stopped; the last finished epoch is kept.
        TrainingError: the loss is not finite, or not even one image fits into memory.
        TrackingError: MLflow could not be reached for the figures of some epochs, up to the end.
    """
    first = load_plan(work, job.params.train)
    plan = replace(first, batch_in_memory=share(job.world, lambda: first.batch_in_memory))
    at_start = {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}
    while not _is_finished(attempt := _begin(work, job, run_id, plan)):
        if attempt.saved is None:
            module.load_state_dict(at_start)
        if not _try_epochs(attempt, module, make_data):
            release_memory()
            plan = _reduce(attempt)
    if job.world.is_first:
        FigureLog(work, job.tracking, run_id, job.watcher.tell).send()
    assert attempt.path is not None
    module.load_state_dict(get_best(load_checkpoint(attempt.path)), strict=module.strict_loading)


def make_repeatable(seed: int) -> None:
    """Seed torch, and choose kernels that give the same bits each time."""
    pl.seed_everything(seed, workers=True, verbose=False)
    torch.use_deterministic_algorithms(True, warn_only=True)
    # A debugging aid that costs a pass over every new tensor.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def _begin(work: Path, job: Job, run_id: str, plan: MemoryPlan) -> Attempt:
    """Look for the checkpoint to go on from; rank 0 looks, and tells the others which it is."""

    def find() -> str | None:
        found = find_checkpoint(work / FOLDER, job.watcher.tell)
        return found.name if found else None

    name = share(job.world, find)
    path = work / FOLDER / name if name else None
    return Attempt(work, job, run_id, plan, path, load_saved(path) if path else None)


def _is_finished(attempt: Attempt) -> bool:
    saved = attempt.saved
    if saved is None or saved.ended is None:
        return False
    return saved.ended != ALL_EPOCHS or saved.epoch >= attempt.job.params.train.max_epochs


def _try_epochs(attempt: Attempt, module: ClassifierModule, make_data: MakeData) -> bool:
    """Run the epochs that are left; False when memory ran out."""
    if attempt.saved is not None:
        attempt.job.watcher.tell(f"going on from epoch {attempt.saved.epoch + 1}: {attempt.saved.epoch} are kept")
    try:
        _run_epochs(attempt, module, make_data(attempt.plan.batch_in_memory))
    except Exception as exc:
        if not is_out_of_memory(exc):
            raise
        if attempt.job.world.size > 1:
            raise _say_out_of_memory(attempt) from exc
        return False
    return True


def _run_epochs(attempt: Attempt, module: ClassifierModule, data: PreparedData) -> None:
    mirror = Mirror(attempt.work, attempt.job, attempt.run_id)
    files = CheckpointFiles(attempt.work / FOLDER, mirror.send)
    trainer = make_trainer(attempt, files, accumulate=data.accumulate)
    with mirror.closing(), files.closing(), keep_memory(), _interruptible(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(module, datamodule=data, ckpt_path=attempt.path)


def make_trainer(attempt: Attempt, files: CheckpointFiles, *, accumulate: int) -> pl.Trainer:
    """Wire Lightning: early stopping, checkpoints, views; nothing printed."""
    for name in ("lightning.pytorch", "pytorch_lightning", "lightning.fabric", "lightning_fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    job, section = attempt.job, attempt.job.params.train
    stopping = EarlyStopping(
        section.monitor, patience=section.patience, mode=section.monitor_mode, check_on_train_epoch_end=True
    )
    figures = FigureLog(attempt.work, job.tracking, attempt.run_id, job.watcher.tell)
    end = EpochEnd(job, figures, stopping, attempt.saved)
    views = make_views(job, attempt.run_id, attempt.work, attempt.saved.history if attempt.saved else ())
    if job.hardware.accelerator == "gpu":
        torch.set_float32_matmul_precision("high")  # TF32 in matrix products, as in convolutions by default
    ranks = choose_strategy(job.world)
    return pl.Trainer(
        **{**ranks, "plugins": [*ranks["plugins"], files]},
        accelerator=job.hardware.accelerator,
        precision=job.hardware.lightning_precision,  # type: ignore[arg-type]
        # Kernels that give the same bits each time, on a GPU too: cudnn does not try which is fastest.
        deterministic="warn",
        benchmark=False,
        max_epochs=section.max_epochs,
        callbacks=[FiniteGuard(job, attempt.run_id), stopping, *views, end],
        accumulate_grad_batches=accumulate,
        gradient_clip_val=section.clip_norm,
        limit_val_batches=1.0 if len(job.val_rows) else 0,
        default_root_dir=attempt.work,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """Let Ctrl-C be KeyboardInterrupt: Lightning makes an exit of it, and ignores the key from then on."""
    in_main = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit as exc:
        cause = exc.__context__
        raise (cause if isinstance(cause, KeyboardInterrupt) else KeyboardInterrupt()) from None
    finally:
        if in_main:
            signal.signal(signal.SIGINT, before)


def _reduce(attempt: Attempt) -> MemoryPlan:
    """Halve the images in memory; remember, tell and log it. Raises TrainingError below one image."""
    before, plan = attempt.plan.batch_in_memory, attempt.plan.halve()
    keep_plan(attempt.work, plan)
    attempt.job.watcher.tell(
        f"out of memory with {before} images at a time: going on with {plan.batch_in_memory}, "
        f"{plan.accumulate} parts to a step of {plan.step_size} as before"
    )
    with contextlib.suppress(*CALL_ERRORS):  # the bundle's card says it too
        attempt.job.tracking.set_tags(attempt.run_id, {"visionloop.batch_in_memory": str(plan.batch_in_memory)})
    return plan


def _say_out_of_memory(attempt: Attempt) -> TrainingError:
    """Make the error of one rank among several: all of them must begin anew with fewer images."""
    plan = attempt.plan.halve()
    keep_plan(attempt.work, plan)
    return TrainingError(
        f"train, rank {attempt.job.world.rank}",
        f"out of memory with {attempt.plan.batch_in_memory} images at a time",
        "memory for them",
        f"The same command goes on with {plan.batch_in_memory} at a time.",
    )
