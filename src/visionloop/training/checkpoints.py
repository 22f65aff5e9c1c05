"""Checkpoints in a folder: one file an epoch, whole or absent, that bears its digest in its name.

epoch-00007-<sha256>.ckpt  all that is needed to go on, and to end: weights, optimizer, schedules, the figures of all
                           epochs so far, and the weights of the best of them

The last two are kept: where the newest is damaged, the training goes on from the one before, to the same result.
Lightning's ModelCheckpoint is not used: it does not wait until a file is on the disk, and knows no digest.
"""

import contextlib
import io
import re
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from pytorch_lightning.plugins.io import CheckpointIO
from torch import Tensor

from visionloop.bundle import hash_file
from visionloop.errors import TrainingError
from visionloop.training.watch import EpochReport
from visionloop.workfolder import move_through, write_through

NUM_KEPT = 2
FOLDER = "checkpoints"  # in the work folder
SAVED, BEST = "visionloop", "best_state_dict"  # what we add to a checkpoint of Lightning
_NAME = re.compile(r"epoch-(\d{5})-([0-9a-f]{64})\.ckpt")
Tell = Callable[[str], object]
State = Mapping[str, Tensor]


@dataclass(frozen=True)
class SavedEpoch:
    """How far a training had come with a checkpoint. Epochs count from 1.

    `ended` says why the training ended with it, None if it goes on. `history` holds the reports of all epochs so far.
    """

    epoch: int
    best_epoch: int
    ended: str | None
    history: tuple[EpochReport, ...]

    @property
    def best(self) -> EpochReport:
        """The figures of the best epoch."""
        return self.history[self.best_epoch - 1]


def write_checkpoint(folder: Path, content: Mapping[str, Any], saved: SavedEpoch) -> None:
    """Write a checkpoint, and remove what is no longer needed.

    Raises:
        TrainingError: it cannot be written (a full disk).
    """
    new = folder / "next.ckpt"
    try:
        write_through(new, lambda file: torch.save({**content, SAVED: asdict(saved)}, file))
        move_through(new, folder / f"epoch-{saved.epoch:05d}-{hash_file(new)}.ckpt")
        for path in list_checkpoints(folder)[NUM_KEPT:]:
            path.unlink()
    except (OSError, RuntimeError) as exc:  # torch raises an error of its own over that of a failed write
        cause = exc.__context__ if isinstance(exc, RuntimeError) else exc
        reason = cause.strerror if isinstance(cause, OSError) else " ".join(str(exc).split())[:200]
        raise TrainingError(
            f"checkpoint of epoch {saved.epoch} in {folder}",
            f"cannot be written ({reason})",
            "a folder with free space",
            "Free some; the same command goes on from the epoch before.",
        ) from exc


def list_checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints of a folder, the newest first; their content is not looked at."""
    return sorted((path for path in folder.glob("epoch-*.ckpt") if _NAME.fullmatch(path.name)), reverse=True)


def parse_name(name: str) -> tuple[int, str]:
    """Return the epoch and the digest that a checkpoint's name says; epoch 0 for any other name."""
    match = _NAME.fullmatch(name)
    return (int(match[1]), match[2]) if match else (0, "")


def find_checkpoint(folder: Path, tell: Tell = lambda line: None) -> Path | None:
    """Return the newest checkpoint that is whole; those that are damaged are told and removed."""
    paths = list_checkpoints(folder)
    for path in paths:
        epoch, sha256 = parse_name(path.name)
        if hash_file(path) == sha256:
            return path
        tell(f"the checkpoint of epoch {epoch} is damaged: the one before is used")
        path.unlink()
    if paths:
        tell("no checkpoint is whole: the training begins anew")
    return None


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint to the CPU; nothing in it is unpickled but tensors and plain values.

    Raises:
        TrainingError: it cannot be read.
    """
    return _load(path, io.BytesIO(path.read_bytes()))


def load_saved(path: Path) -> SavedEpoch:
    """Read how far the training had come, without reading the weights. Raises TrainingError."""
    value = _load(path, path, mmap=True)[SAVED]
    return SavedEpoch(**{**value, "history": tuple(EpochReport(**report) for report in value["history"])})


def get_best(content: Mapping[str, Any]) -> State:
    """Return the weights of the best epoch up to a checkpoint."""
    best: State = content.get(BEST, content["state_dict"])
    return best


def _load(path: Path, source: Any, **options: Any) -> dict[str, Any]:
    try:
        content: dict[str, Any] = torch.load(source, "cpu", weights_only=True, **options)
    except Exception as exc:  # any damage at all: zip, pickle, tensor
        reason = " ".join(str(exc).split())[:200]
        raise TrainingError(
            f"checkpoint {path}", f"cannot be read ({reason})", "what was written", "Run the same command again."
        ) from exc
    return content


class CheckpointFiles(CheckpointIO):
    """Where Lightning's checkpoints go: copied at once, written by a thread while the next epoch runs.

    When it takes a checkpoint, the one before is on the disk.
    """

    def __init__(self, folder: Path, on_written: Callable[[], object] = lambda: None) -> None:
        self.folder, self.on_written = folder, on_written
        self._best: State = {}
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._pending: Future[None] | None = None

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Have a checkpoint written; `storage_options` is its `SavedEpoch`. Raises TrainingError if one failed."""
        saved: SavedEpoch = storage_options
        copy = apply_to_collection(checkpoint, Tensor, lambda tensor: tensor.detach().to("cpu", copy=True))
        _check_weights(copy["state_dict"], saved.epoch)
        if saved.best_epoch == saved.epoch:
            self._best = copy["state_dict"]
        else:
            copy[BEST] = self._best
        self.wait()
        self._pending = self._thread.submit(self._write, copy, saved)

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        content = load_checkpoint(Path(path))
        self._best = get_best(content)
        return content

    def remove_checkpoint(self, path: Any) -> None:
        """Do nothing: what is no longer needed goes when the next one is written."""

    def wait(self) -> None:
        """Return when all is on the disk. Raises TrainingError if it could not be written."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    @contextlib.contextmanager
    def closing(self) -> Iterator[None]:
        """Have all on the disk at the end, whatever ends it; an error of the training is the one that is raised."""
        try:
            yield
        except BaseException:
            with contextlib.suppress(TrainingError):
                self.wait()
            raise
        else:
            self.wait()
        finally:
            self._thread.shutdown()

    def teardown(self) -> None:
        """Do nothing: Lightning calls this also after an error, and an error while waiting would hide it."""

    def _write(self, content: Mapping[str, Any], saved: SavedEpoch) -> None:
        write_checkpoint(self.folder, content, saved)
        self.on_written()


def _check_weights(state: State, epoch: int) -> None:
    """Raise TrainingError if a weight is not finite: such a checkpoint would spoil all that follows."""
    bad = [name for name, value in state.items() if value.is_floating_point() and not torch.isfinite(value).all()]
    if bad:
        raise TrainingError(
            f"train epoch {epoch}",
            f"{len(bad)} tensors of the network hold NaN or infinity ({bad[0]} first)",
            "finite weights",
            "Lower train.learning_rate, set train.clip_norm, or try train.precision: fp32.",
        )
