"""Checkpoints in a folder: written whole or not at all, found again by their digest. Files only, no training.

epoch-0007.ckpt  what a resumed training needs: weights, optimizer, schedules; tensors and plain values alone
epoch-0007.json  its sha256, the best epoch so far, why training ended (if it did), and the figures of all epochs so far

The .json is written last and makes the .ckpt count. The last two epochs are kept, and for each the best epoch as of
then: so the one before can always be gone on with, to the same result.
"""

import contextlib
import hashlib
import io
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch

from visionloop.bundle import hash_file
from visionloop.errors import TrainingError
from visionloop.records import canonical_json
from visionloop.training.watch import EpochReport

NUM_KEPT = 2
FOLDER = "checkpoints"  # in the work folder
Tell = Callable[[str], object]


@dataclass(frozen=True)
class Entry:
    """One checkpoint. Epochs count from 1; `ended` says why training ended with it, None if it goes on."""

    epoch: int
    best_epoch: int
    sha256: str
    num_bytes: int
    ended: str | None
    history: tuple[EpochReport, ...]

    @property
    def best(self) -> EpochReport:
        """The figures of the best epoch."""
        return self.history[self.best_epoch - 1]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Entry":
        """Read an entry back. Raises KeyError, TypeError or ValueError if it is none."""
        history = tuple(EpochReport(**report) for report in value["history"])
        entry = cls(**{**value, "history": history})
        if not 1 <= entry.best_epoch <= entry.epoch == len(history) or len(entry.sha256) != 64:
            raise ValueError("epochs that do not fit each other")
        return entry


def name_checkpoint(epoch: int) -> str:
    """Return the file name of an epoch's checkpoint."""
    return f"epoch-{epoch:04d}.ckpt"


def write_checkpoint(
    folder: Path,
    content: Mapping[str, Any],
    *,
    history: Sequence[EpochReport],
    best_epoch: int,
    ended: str | None,
) -> Entry:
    """Write the checkpoint of the last epoch of `history`, let go of what is no longer needed, and return its entry.

    Raises:
        TrainingError: it cannot be written (a full disk).
    """
    path = folder / name_checkpoint(len(history))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        path.with_suffix(".json").unlink(missing_ok=True)
        sha256, num_bytes = _write_hashed(path, content)
        entry = Entry(len(history), best_epoch, sha256, num_bytes, ended, tuple(history))
        write_entry(folder, entry)
        drop_old(folder)
    except (OSError, RuntimeError) as exc:  # torch translates a failed write to a RuntimeError
        reason = exc.strerror if isinstance(exc, OSError) else " ".join(str(exc).split())[:200]
        raise TrainingError(
            f"checkpoint {path}",
            f"cannot be written ({reason})",
            "a folder with free space",
            "Free some; the same command goes on from the epoch before.",
        ) from exc
    return entry


def write_entry(folder: Path, entry: Entry) -> None:
    """Make a checkpoint count, whose file is there already."""
    _replace(folder / f"epoch-{entry.epoch:04d}.json", lambda file: file.write(canonical_json(entry.to_json())))


def write_file(path: Path, data: bytes) -> None:
    """Write bytes to a file that is whole or absent, also after a power failure."""
    path.parent.mkdir(parents=True, exist_ok=True)
    _replace(path, lambda file: file.write(data))


def find_checkpoint(folder: Path, tell: Tell = lambda line: None) -> Entry | None:
    """Return the newest checkpoint that is whole, with its best epoch's; what is damaged is told and removed."""
    was_damaged = False
    for entry in list_entries(folder, tell):
        damaged = [epoch for epoch in sorted({entry.epoch, entry.best_epoch}) if not _is_whole(folder, epoch)]
        if not damaged:
            return entry
        was_damaged = True
        needed = "" if damaged == [entry.epoch] else f", the best as of epoch {entry.epoch},"
        tell(f"the checkpoint of epoch {damaged[0]}{needed} is damaged: the one before is used")
        _remove(folder, entry.epoch)
    if was_damaged:
        tell("no checkpoint is whole: the training begins anew")
    return None


def list_entries(folder: Path, tell: Tell = lambda line: None) -> list[Entry]:
    """Return what counts as a checkpoint, the newest first; their files are not looked at."""
    entries = []
    for path in sorted(folder.glob("epoch-*.json"), reverse=True):
        try:
            entries.append(_read_entry(path))
        except (OSError, ValueError, KeyError, TypeError):
            tell(f"the checkpoint {path.stem} is damaged: it is passed over")
            path.unlink(missing_ok=True)
    return sorted(entries, key=lambda entry: -entry.epoch)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint to the CPU; nothing in it is unpickled but tensors and plain values.

    Raises:
        TrainingError: it is not what its entry says.
    """
    try:
        data = path.read_bytes()
        expected = _read_entry(path.with_suffix(".json")).sha256
        if hashlib.sha256(data).hexdigest() != expected:
            raise ValueError("its bytes do not have its digest")
        content: dict[str, Any] = torch.load(io.BytesIO(data), "cpu", weights_only=True)
    except Exception as exc:  # any damage at all: zip, pickle, tensor
        reason = " ".join(str(exc).split())[:200]
        raise TrainingError(
            f"checkpoint {path}", f"cannot be read ({reason})", "what was written", "Run the same command again."
        ) from exc
    return content


def drop_old(folder: Path) -> None:
    """Remove all but the newest two checkpoints and the best of each; also what a kill left half written."""
    entries = list_entries(folder)[:NUM_KEPT]
    kept = {epoch for entry in entries for epoch in (entry.epoch, entry.best_epoch)}
    names = {name for epoch in kept for name in (name_checkpoint(epoch), f"epoch-{epoch:04d}.json")}
    for path in folder.glob("epoch-*"):
        if path.name not in names:
            path.unlink(missing_ok=True)


class _Hashed(io.RawIOBase):
    """A file that hashes what is written to it. torch writes its zip from front to back."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.digest, self.num_bytes = file, hashlib.sha256(), 0

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self.digest.update(data)
        self.num_bytes += memoryview(data).nbytes
        return self.file.write(data)


def _write_hashed(path: Path, content: Mapping[str, Any]) -> tuple[str, int]:
    written: list[_Hashed] = []

    def save(file: BinaryIO) -> None:
        written.append(_Hashed(file))
        torch.save(dict(content), cast(BinaryIO, written[0]))

    _replace(path, save)
    return written[0].digest.hexdigest(), written[0].num_bytes


def _replace(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a file beside `path` and move it there once it is on the disk."""
    staged = path.with_name(f"{path.name}.new")
    try:
        with staged.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        staged.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            staged.unlink()
        raise
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _read_entry(path: Path) -> Entry:
    return Entry.from_json(json.loads(path.read_text()))


def _is_whole(folder: Path, epoch: int) -> bool:
    path = folder / name_checkpoint(epoch)
    try:
        entry = _read_entry(path.with_suffix(".json"))
        return path.stat().st_size == entry.num_bytes and hash_file(path) == entry.sha256
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _remove(folder: Path, epoch: int) -> None:
    for suffix in (".json", ".ckpt"):
        (folder / name_checkpoint(epoch)).with_suffix(suffix).unlink(missing_ok=True)
