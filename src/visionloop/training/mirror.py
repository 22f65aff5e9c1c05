"""Checkpoints in the object store while they are made, so that another machine of the same kind can go on.

checkpoints/<name>/<input key[:16]>/<sha256>        the files
checkpoints/<name>/<input key[:16]>/manifest.json   which of them count, newest first; put last

Sent by a thread of its own; a store that fails stops no training. Removed when the stage is done.
"""

import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from visionloop.errors import ObjectMissing, StoreError, VisionLoopError
from visionloop.records import canonical_json
from visionloop.store import LocalStore
from visionloop.training.checkpoints import (
    FOLDER,
    NUM_KEPT,
    Entry,
    find_checkpoint,
    list_entries,
    name_checkpoint,
    write_entry,
    write_file,
)
from visionloop.training.job import Job

MANIFEST = "manifest.json"
PATIENCE_S = 1.0  # before a person is told what is waited for
CLOSE_LIMIT_S = 20.0  # less than the 30 s that Kubernetes and dvc give a process to end


@dataclass(frozen=True)
class Manifest:
    """What the store holds of one training. `inputs`: its input key without the hardware."""

    run_id: str
    inputs: str
    hardware: Mapping[str, Any]
    entries: tuple[Entry, ...]
    needed: tuple[Entry, ...]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: Any) -> "Manifest":
        """Read a manifest back. Raises KeyError, TypeError or ValueError if it is none."""
        entries, needed = (tuple(Entry.from_json(entry) for entry in value[key]) for key in ("entries", "needed"))
        return cls(str(value["run_id"]), str(value["inputs"]), dict(value["hardware"]), entries, needed)


def is_mirrored(job: Job) -> bool:
    """Say whether checkpoints go to the store: as VISIONLOOP_CHECKPOINTS says; `auto`: where it is not a folder."""
    choice = job.settings.checkpoints
    return choice == "store" or (choice == "auto" and not isinstance(job.store, LocalStore))


class Mirror:
    """Sends checkpoints to the store, the newest first; while one is sent, only the newest waits."""

    def __init__(self, work: Path, job: Job, run_id: str) -> None:
        self.work, self.job, self.run_id = work, job, run_id
        self.is_on = job.world.is_first and is_mirrored(job)
        self._wanted: Entry | None = None
        self._closing = False
        self._failing = False
        self._news = threading.Condition()
        self._thread = threading.Thread(target=self._run, daemon=True, name="mirror")
        if self.is_on:
            self._thread.start()

    def send(self, entry: Entry) -> None:
        """Have a checkpoint sent that was just written. Returns at once."""
        with self._news:
            self._wanted = entry
            self._news.notify()

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
        with self._news:
            self._closing = True
            self._news.notify()
        self._thread.join(PATIENCE_S)
        if self._thread.is_alive():
            self.job.watcher.tell("waiting for the last checkpoint to reach the store ...")
            self._thread.join(limit_s)
        if self._thread.is_alive():
            self.job.watcher.tell("it did not reach the store in time, and is on this machine alone")

    def _run(self) -> None:
        while True:
            with self._news:
                self._news.wait_for(lambda: self._wanted or self._closing)
                entry, self._wanted = self._wanted, None
            if entry is None:
                return
            self._try(entry)

    def _try(self, entry: Entry) -> None:
        try:
            send_checkpoints(self.work, self.job, self.run_id)
        except FileNotFoundError:  # a newer one has replaced it, and is next
            return
        except (VisionLoopError, OSError) as exc:
            if not self._failing:
                self.job.watcher.tell(f"checkpoints do not reach the store; training goes on, and tries again ({exc})")
            self._failing = True
            return
        if self._failing:
            self.job.watcher.tell(f"checkpoints reach the store again: epoch {entry.epoch} is there")
        self._failing = False


def send_checkpoints(work: Path, job: Job, run_id: str) -> None:
    """Put what the work folder keeps into the store, the manifest last, and remove what it no longer names.

    Raises:
        StoreError: the store cannot be written.
        FileNotFoundError: a checkpoint was replaced meanwhile.
    """
    folder, prefix = work / FOLDER, _make_prefix(job)
    all_entries = list_entries(folder)
    entries = all_entries[:NUM_KEPT]
    epochs = {epoch for entry in entries for epoch in (entry.epoch, entry.best_epoch)}
    needed = [entry for entry in all_entries if entry.epoch in epochs]
    before = _load_manifest(job)
    known = {entry.sha256 for entry in before.needed} if before else set()
    for entry in needed:
        if entry.sha256 not in known:
            job.store.add(f"{prefix}/{entry.sha256}", (folder / name_checkpoint(entry.epoch)).read_bytes())
    job.store.sync()
    manifest = Manifest(run_id, job.make_inputs_digest(), asdict(job.hardware), tuple(entries), tuple(needed))
    job.store.put(f"{prefix}/{MANIFEST}", canonical_json(manifest.to_json()))
    for sha256 in known - {entry.sha256 for entry in needed}:
        _remove(job, f"{prefix}/{sha256}")


def announce(job: Job, run_id: str) -> None:
    """Let the store know the MLflow run before there is a checkpoint. A store that fails is told of later."""
    if is_mirrored(job):
        with contextlib.suppress(VisionLoopError):
            if _load_manifest(job) is None:
                manifest = Manifest(run_id, job.make_inputs_digest(), asdict(job.hardware), (), ())
                job.store.put(f"{_make_prefix(job)}/{MANIFEST}", canonical_json(manifest.to_json()))


def find_run(job: Job) -> str | None:
    """Return the MLflow run of which the store keeps checkpoints for this input key, if any. Raises StoreError."""
    manifest = _load_manifest(job) if is_mirrored(job) else None
    return manifest.run_id if manifest else None


def fetch_checkpoints(work: Path, job: Job) -> str | None:
    """Bring the store's checkpoints into the work folder where they are newer; return the MLflow run they belong to.

    Each is verified by its digest; a damaged one is told and passed over. None where the store has nothing newer.
    """
    if not is_mirrored(job):
        return None
    tell = job.watcher.tell
    try:
        manifest = _load_manifest(job)
        if manifest is None:
            _tell_other_hardware(job)
            return None
        local = find_checkpoint(work / FOLDER, tell)
        for entry in manifest.entries:
            if local is not None and entry.epoch <= local.epoch:
                return None
            if _fetch(work / FOLDER, job, entry, manifest):
                tell(f"the store had checkpoints up to epoch {entry.epoch}: they are used")
                return manifest.run_id
    except (VisionLoopError, OSError) as exc:
        tell(f"the store's checkpoints cannot be read and are not used ({exc})")
        return None
    return manifest.run_id if local is None else None


def remove_checkpoints(job: Job, key: str) -> None:
    """Remove from the store what it keeps of an input key, with all earlier versions; a failing store is told."""
    if not is_mirrored(job):
        return
    try:
        for name in list(job.store.list(f"{_make_prefix(job, key)}/")):
            _remove(job, name)
    except (VisionLoopError, OSError) as exc:
        job.watcher.tell(f"the checkpoints in the store could not be removed: {_make_prefix(job, key)} ({exc})")


def _make_prefix(job: Job, key: str | None = None) -> str:
    return f"checkpoints/{job.params.name}/{(key or job.make_key())[:16]}"


def _load_manifest(job: Job, key: str | None = None) -> Manifest | None:
    """Read a manifest; None where there is none, or it is damaged. Raises StoreError."""
    try:
        return Manifest.from_json(json.loads(job.store.get(f"{_make_prefix(job, key)}/{MANIFEST}")))
    except ObjectMissing:
        return None
    except (ValueError, KeyError, TypeError, AttributeError):
        job.watcher.tell("the list of checkpoints in the store is damaged: they are not used")
        return None


def _fetch(folder: Path, job: Job, entry: Entry, manifest: Manifest) -> bool:
    """Bring an epoch and its best into the folder; False if one of them is damaged or gone."""
    needed = {found.epoch: found for found in manifest.needed}
    try:
        for epoch in sorted({entry.epoch, entry.best_epoch}):
            one = needed[epoch]
            data = job.store.get(f"{_make_prefix(job)}/{one.sha256}")
            if hashlib.sha256(data).hexdigest() != one.sha256:
                raise StoreError(f"epoch {epoch}", "does not have its digest")
            write_file(folder / name_checkpoint(epoch), data)
            write_entry(folder, one)
    except (StoreError, KeyError):
        job.watcher.tell(
            f"the checkpoint of epoch {entry.epoch} in the store is damaged: the one before is used, if any"
        )
        return False
    return True


def _tell_other_hardware(job: Job) -> None:
    """Say so where the store has the same training of another kind of machine: its bits would not be these."""
    ours = _make_prefix(job)
    for name in job.store.list(f"checkpoints/{job.params.name}/"):
        if not name.endswith(f"/{MANIFEST}") or name.startswith(ours):
            continue
        manifest = _load_manifest(job, name.split("/")[2])
        if manifest and manifest.entries and manifest.inputs == job.make_inputs_digest():
            here = asdict(job.hardware)
            differs = [
                f"{k} {v} (here {here.get(k)})" for k, v in sorted(manifest.hardware.items()) if here.get(k) != v
            ]
            job.watcher.tell(
                f"the store has checkpoints of this training up to epoch {manifest.entries[0].epoch}, made with "
                f"{', '.join(differs)}: they are not used, since the bits would differ"
            )


def _remove(job: Job, key: str) -> None:
    """Remove an object for good; where that is not allowed, from sight."""
    try:
        job.store.purge(key)
    except StoreError:
        job.store.delete(key)
