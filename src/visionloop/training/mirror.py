"""Checkpoints in the object store while they are made, so that another machine of the same kind can go on.

checkpoints/<name>/<input key[:16]>/run.json                   the MLflow run, and on what hardware
checkpoints/<name>/<input key[:16]>/epoch-00007-<sha256>.ckpt  an epoch in one piece, as it lies in the work folder

A name says epoch and digest, and an object is whole or absent: so no list of them is needed. Sent by a thread of its
own; a store that fails stops no training. Removed when the stage is done.
"""

import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from visionloop.errors import ObjectMissing, StoreError, VisionLoopError
from visionloop.records import canonical_json
from visionloop.store import LocalStore
from visionloop.training.checkpoints import FOLDER, find_checkpoint, list_checkpoints, parse_name
from visionloop.training.job import Job
from visionloop.workfolder import write_file

RUN = "run.json"
PATIENCE_S = 1.0  # before a person is told what is waited for
CLOSE_LIMIT_S = 20.0  # less than the 30 s that Kubernetes and dvc give a process to end


def is_mirrored(job: Job) -> bool:
    """Say whether checkpoints go to the store: as VISIONLOOP_CHECKPOINTS says; `auto`: where it is not a folder."""
    choice = job.settings.checkpoints
    return choice == "store" or (choice == "auto" and not isinstance(job.store, LocalStore))


class Mirror:
    """Sends a work folder's checkpoints to the store; while that takes longer than an epoch, only the newest waits.

    The MLflow run is made known there at once: before there is a checkpoint, too.
    """

    def __init__(self, work: Path, job: Job, run_id: str) -> None:
        self.folder, self.job, self.run_id = work / FOLDER, job, run_id
        self.is_on = job.world.is_first and is_mirrored(job)
        self._news, self._closing, self._failing = threading.Event(), False, False
        # A daemon: a store that does not answer must not keep the process from ending.
        self._thread = threading.Thread(target=self._run, daemon=True, name="mirror")
        if self.is_on:
            self._thread.start()

    def send(self) -> None:
        """Have sent what is new in the folder. Returns at once."""
        self._news.set()

    @contextlib.contextmanager
    def closing(self) -> Iterator[None]:
        """Have the last one sent at the end; when something has stopped the training, within `CLOSE_LIMIT_S`."""
        try:
            yield
        except BaseException:
            self._close(CLOSE_LIMIT_S)
            raise
        self._close(None)

    def _close(self, limit_s: float | None) -> None:
        if not self.is_on:
            return
        self._closing = True
        self._news.set()
        self._thread.join(PATIENCE_S)
        if self._thread.is_alive():
            self.job.watcher.tell("waiting for the last checkpoint to reach the store ...")
            self._thread.join(limit_s)
        if self._thread.is_alive():
            self.job.watcher.tell("it did not reach the store in time, and is on this machine alone")

    def _run(self) -> None:
        is_last = False
        while not is_last:
            is_last = self._closing
            self._try()
            if not is_last:
                self._news.wait()
                self._news.clear()

    def _try(self) -> None:
        tell = self.job.watcher.tell
        try:
            send_checkpoints(self.folder, self.job, self.run_id)
        except FileNotFoundError:  # a newer one has replaced it, and is next
            return
        except (VisionLoopError, OSError) as exc:
            if not self._failing:
                tell(f"checkpoints do not reach the store; training goes on, and tries again ({exc})")
            self._failing = True
            return
        if self._failing:
            tell("checkpoints reach the store again")
        self._failing = False


def send_checkpoints(folder: Path, job: Job, run_id: str) -> None:
    """Put the run and a folder's checkpoints into the store, and remove those that the folder no longer has.

    Raises:
        StoreError: the store cannot be written.
        FileNotFoundError: a checkpoint was replaced meanwhile.
    """
    prefix, here, there = make_prefix(job.name, job.key), list_checkpoints(folder), set(_list_names(job))
    run = {"run_id": run_id, "inputs": job.inputs_digest, "hardware": asdict(job.hardware)}
    job.store.put(f"{prefix}/{RUN}", canonical_json(run))
    for path in here:
        if path.name not in there:
            job.store.add(f"{prefix}/{path.name}", path.read_bytes())
    job.store.sync()
    for name in there - {path.name for path in here}:
        _remove(job, f"{prefix}/{name}")


def find_run(job: Job) -> str | None:
    """Return the MLflow run in which another machine began this training, if one did. Raises StoreError."""
    value = _load_run(job, job.key) if is_mirrored(job) else {}
    return value.get("run_id")


def fetch_checkpoints(work: Path, job: Job) -> str | None:
    """Bring the newest whole checkpoint of the store, if it is newer than those here; return its MLflow run.

    A damaged one is told and passed over. None where the store has nothing, or what is here is newer.
    """
    if not is_mirrored(job):
        return None
    try:
        run_id = find_run(job)
        if run_id is None:
            _tell_other_hardware(job)
            return None
        newer = _list_names(job)
        if local := find_checkpoint(work / FOLDER, job.watcher.tell):
            newer = [name for name in newer if parse_name(name)[0] > parse_name(local.name)[0]]
        is_fetched = any(_fetch(work / FOLDER, job, name) for name in newer)
    except (VisionLoopError, OSError) as exc:
        job.watcher.tell(f"the store's checkpoints cannot be read and are not used ({exc})")
        return None
    return run_id if is_fetched or local is None else None


def remove_checkpoints(job: Job, key: str) -> None:
    """Remove from the store what it keeps of an input key, with all earlier versions; a failing store is told."""
    if not is_mirrored(job):
        return
    prefix = make_prefix(job.name, key)
    try:
        for name in list(job.store.list(f"{prefix}/")):
            _remove(job, name)
    except (VisionLoopError, OSError) as exc:
        job.watcher.tell(f"the checkpoints in the store could not be removed: {prefix} ({exc})")


def make_prefix(name: str, key: str) -> str:
    """Return the folder in the store of a training of some name and input key."""
    return f"checkpoints/{name}/{key[:16]}"


def _load_run(job: Job, key: str) -> dict[str, Any]:
    """Return what the store says of a training; nothing if it has none, or it is damaged. Raises StoreError."""
    try:
        value: dict[str, Any] = json.loads(job.store.get(f"{make_prefix(job.name, key)}/{RUN}"))
        return {"run_id": str(value["run_id"]), "inputs": value["inputs"], "hardware": dict(value["hardware"])}
    except ObjectMissing:
        return {}
    except (ValueError, KeyError, TypeError):
        job.watcher.tell(f"the {RUN} of this training in the store is damaged: its checkpoints are not used")
        return {}


def _list_names(job: Job) -> list[str]:
    """Return the names of the store's checkpoints of this training, the newest first."""
    keys = job.store.list(f"{make_prefix(job.name, job.key)}/epoch-")
    return sorted((key.rpartition("/")[2] for key in keys), reverse=True)


def _fetch(folder: Path, job: Job, name: str) -> bool:
    """Bring a checkpoint into the folder, and say so; False if it is damaged or gone."""
    epoch, sha256 = parse_name(name)
    try:
        data = job.store.get(f"{make_prefix(job.name, job.key)}/{name}")
    except StoreError:
        data = b""
    if hashlib.sha256(data).hexdigest() != sha256:
        job.watcher.tell(f"the checkpoint of epoch {epoch} in the store is damaged: the one before is used, if any")
        return False
    write_file(folder / name, data)
    job.watcher.tell(f"the store had checkpoints up to epoch {epoch}: they are used")
    return True


def _tell_other_hardware(job: Job) -> None:
    """Say so where the store has the same training of another kind of machine: its bits would not be these."""
    epochs: dict[str, int] = {}  # input key -> the newest epoch
    for key in job.store.list(f"checkpoints/{job.name}/"):
        folder, name = key.split("/", 3)[2:]
        epochs[folder] = max(epochs.get(folder, 0), parse_name(name)[0])
    here = asdict(job.hardware)
    for folder, epoch in epochs.items():
        run = _load_run(job, folder) if epoch and folder != job.key[:16] else {}
        if run.get("inputs") == job.inputs_digest:
            theirs = sorted(run["hardware"].items())
            differs = ", ".join(f"{k} {v} (here {here.get(k)})" for k, v in theirs if here.get(k) != v)
            job.watcher.tell(
                f"the store has checkpoints of this training up to epoch {epoch}, made with {differs}: they are not "
                "used, since the bits would differ"
            )


def _remove(job: Job, key: str) -> None:
    """Remove an object for good; where that is not allowed, from sight."""
    try:
        job.store.purge(key)
    except StoreError:
        job.store.delete(key)
