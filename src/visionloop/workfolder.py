"""The work folder of a stage: used by one process at a time, kept after a kill, renamed to the result at the end.

.visionloop/work/STAGE/lock          held while the stage runs
.visionloop/work/STAGE/<input key>/  what is done so far; another key means other inputs
.visionloop/work/STAGE/<input key>/done.json   the stage is finished with it, and keeps it (train does)
"""

import contextlib
import errno
import fcntl
import glob
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

import psutil

from visionloop.errors import BusyError, DiskError

DONE = "done.json"
LOCK_WAIT_S = 20.0
TRY_EVERY_S = 0.25
PROBE_BYTES = 4096


@contextlib.contextmanager
def lock_work(folder: Path, key: str) -> Iterator[Path]:
    """Hold the stage's lock and yield the work folder of this input key. Work for other inputs is removed.

    Raises:
        BusyError: another process holds the lock, also after 20 s: a process that was just killed is gone by then.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("a+") as lock:
        _acquire(lock.fileno(), folder)
        for other in folder.iterdir():
            if other.is_dir() and other.name != key[:16]:
                shutil.rmtree(other)
        work = folder / key[:16]
        work.mkdir(exist_ok=True)
        yield work


def is_locked(folder: Path) -> bool:
    """Say whether a process holds the stage's lock now."""
    try:
        with (folder / "lock").open("rb") as lock:
            fcntl.flock(lock.fileno(), fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


def is_broken_off(folder: Path) -> bool:
    """Say whether the stage has begun with something, has not finished it, and no process is at it now."""
    return any(not (folder / name / DONE).is_file() for name in list_work(folder)) and not is_locked(folder)


def list_work(folder: Path) -> set[str]:
    """Return the names of a stage's work folders."""
    return {path.name for path in folder.iterdir() if path.is_dir()} if folder.is_dir() else set()


def replace_folder(work: Path, target: Path) -> None:
    """Rename a finished work folder to the result. The old result stays until the new one is complete."""
    for leftover in work.glob("*.staged"):
        leftover.unlink()
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.exists():
        old = work.with_name(f"{work.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        os.replace(target, old)
        os.replace(work, target)
        shutil.rmtree(old, ignore_errors=True)
    else:
        os.replace(work, target)


def write_file(path: Path, data: bytes) -> None:
    """Write bytes to a file that is whole or absent, also after a power failure."""
    write_through(path, lambda file: file.write(data))


def write_through(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Let `write` fill a file beside `path`, and move it there once it is on the disk. Makes the folder.

    Several processes may write the same path: the last one's file stays. What a killed one has left is removed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.new"):
        pid = left.name.split(".")[-2]
        if pid.isdecimal() and not psutil.pid_exists(int(pid)):
            left.unlink(missing_ok=True)
    new = path.with_name(f".{path.name}.{os.getpid()}.new")
    try:
        with new.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        move_through(new, path)
    except BaseException:
        with contextlib.suppress(OSError):
            new.unlink()
        raise


def check_place(path: Path, where: str) -> None:
    """Raise DiskError unless a file could be written there now; nothing is left. For before the work, not after it."""
    if not path.parent.is_dir():
        raise DiskError(where, f"there is no folder {path.parent}", "one", "Make it, or check the path.")
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        with tempfile.TemporaryFile(dir=path.parent) as file:
            file.write(bytes(PROBE_BYTES))
            file.flush()
    except OSError as exc:
        found = f"cannot be written ({exc.strerror})"
        raise DiskError(where, found, "a file", "Name another one, or make room.") from exc


def move_through(path: Path, target: Path) -> None:
    """Move a file within its folder, and wait until the folder is on the disk."""
    path.replace(target)
    folder = os.open(target.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def link_folder(folder: Path, target: Path) -> None:
    """Make a second folder of the same files, without copying their bytes where the file system has hard links."""
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(folder, target, copy_function=link_file)


def link_file(source: str | Path, target: str | Path) -> None:
    """Give a file a second name, which is not taken yet; copy it where the file system has no hard links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _acquire(descriptor: int, folder: Path) -> None:
    deadline = time.monotonic() + LOCK_WAIT_S
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as exc:
            if time.monotonic() > deadline:
                raise BusyError(
                    f"stage {folder.name}", "is running in another process", "one at a time", "Wait for it, or stop it."
                ) from exc
            time.sleep(TRY_EVERY_S)
        else:
            return
