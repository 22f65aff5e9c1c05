"""Is this the store that the workspace knows: does it hold the pinned version and the last ledger entry seen in it?

.visionloop/seen/NAME.json   the newest ledger entry that was seen in the store

A store that is not mounted, was emptied, or whose address is mistyped looks like a new one, and a new one would get a
"first champion". So whatever reads or moves the dataset or the ledger asks here first.
"""

import hashlib
import json
import os
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from visionloop.data.manifest import load_pin, load_version
from visionloop.errors import DatasetError, ObjectMissing, StoreError
from visionloop.records import Pin, Record, canonical_json
from visionloop.secrets import mask
from visionloop.settings import Settings
from visionloop.store import LocalStore, ObjectStore
from visionloop.workspace import Workspace

FOLDER = "seen"
WAY_OUT = (
    "Mount it or correct VISIONLOOP_STORE; a store that was moved is known again when all of it is at the new address. "
    "To go on with this one as it is: `visionloop store accept`."
)
DAMAGED = " as it was seen: it is damaged"
RESTORE = "Restore it from the store's backup. To go on as if it were not there: `visionloop store accept`."


@dataclass(frozen=True)
class Seen(Record):
    """The newest ledger entry that was seen of a name: its number (0: none), the digest of its bytes, and the store."""

    entry: int
    sha256: str
    store: str


def check_store(workspace: Workspace) -> None:
    """Refuse a store without the pinned version or the last ledger entry seen; remember the newest entry of a good one.

    Raises:
        StoreError: it is another store, an emptied one or an older copy; or it cannot be read.
        DatasetError: the pin is damaged.
    """
    lost = find_lost_pin(workspace)
    if lost is not None:
        raise _make_lost_error(workspace, _name_version(lost))
    _check_entry(workspace)


def check_store_for_pull(workspace: Workspace) -> Pin | None:
    """Do the same before a pull. Return a pin that the pull must bring back: of a fresh clone, whose store is new.

    Raises:
        StoreError, DatasetError: as `check_store`.
    """
    lost = None if _is_damaged(workspace) else find_lost_pin(workspace)  # a pull writes a damaged pin anew
    if lost is None:
        _check_entry(workspace)
        return None
    is_new = not _has_any(workspace.store, lost.name) and _load_seen(workspace.settings, lost.name) is None
    if not is_new or lost.name != workspace.name:
        raise _make_lost_error(workspace, _name_version(lost))
    return lost


def require_restored(workspace: Workspace, pin: Pin | None, digest: str) -> None:
    """Refuse what a pull into a new store has found, unless it is the pinned dataset again. Raises StoreError."""
    if pin is not None and pin.digest != digest:
        raise _make_lost_error(workspace, f"{_name_version(pin)}, and the sources hold other images by now")


def find_lost_pin(workspace: Workspace) -> Pin | None:
    """Return the pin if the store does not hold its version; None if it does, or nothing is pinned.

    Raises:
        StoreError: the store cannot be read. DatasetError: the pin, or the version in the store, is damaged.
    """
    path = workspace.settings.pin_path
    if not path.exists():
        return None
    pin = load_pin(path)
    try:
        version = load_version(workspace.store, pin.name, pin.version)
    except DatasetError as exc:
        if isinstance(exc.__cause__, ObjectMissing):
            return pin
        raise
    return pin if version.digest != pin.digest else None


def remember_entry(workspace: Workspace) -> None:
    """Remember the newest ledger entry of the store: after a promotion, for the next look. Raises StoreError."""
    entries = _list_entries(workspace.store, workspace.name)
    number = max(entries, default=0)
    seen = _load_seen(workspace.settings, workspace.name)
    if seen is None or seen.entry != number:
        _write_seen(workspace, number, _hash(workspace.store, entries[number]) if number else "")


def accept_store(workspace: Workspace) -> list[str]:
    """Take the store as it is, though it lacks what was pinned or seen; return what is given up, in words.

    A pin that it does not hold is removed. The next ingest goes on from what is there, or begins at version 1.

    Raises:
        StoreError: the store cannot be read.
    """
    settings, store, given_up = workspace.settings, workspace.store, []
    if _is_damaged(workspace):
        given_up.append("data/dataset.json, which is damaged")
    elif lost := find_lost_pin(workspace):
        given_up.append(_name_version(lost))
    if given_up:
        settings.pin_path.unlink()
    seen = _load_seen(settings, workspace.name)
    if seen and _find_lost_entry(store, seen, _list_entries(store, workspace.name)):
        given_up.append(f"ledger entry {seen.entry} of {workspace.name}, as it was seen in {seen.store}")
        _make_path(settings, workspace.name).unlink()
    remember_entry(workspace)
    return given_up


def check_entry(workspace: Workspace) -> None:
    """Refuse a store without the last ledger entry seen, as it was; nothing is remembered. Raises StoreError."""
    seen = _load_seen(workspace.settings, workspace.name)
    entries = _list_entries(workspace.store, workspace.name) if seen else {}
    if seen and (how := _find_lost_entry(workspace.store, seen, entries)):
        todo = RESTORE if how == DAMAGED else WAY_OUT
        raise _make_lost_error(workspace, f"ledger entry {seen.entry} of {workspace.name}{how}", todo)


def _check_entry(workspace: Workspace) -> None:
    check_entry(workspace)
    remember_entry(workspace)


def _find_lost_entry(store: ObjectStore, seen: Seen, entries: Mapping[int, str]) -> str | None:
    """Say how an entry that was seen is not there; None: it is."""
    if not seen.entry:
        return None
    if seen.entry not in entries:
        return f" (the last one there is {max(entries)})" if entries else " (it has none)"
    if _hash(store, entries[seen.entry]) == seen.sha256:
        return None
    try:
        is_entry = json.loads(store.get(entries[seen.entry]))["number"] == seen.entry
    except (ValueError, TypeError, KeyError):
        is_entry = False
    return " as it was seen: this is another ledger" if is_entry else DAMAGED


def _hash(store: ObjectStore, key: str) -> str:
    return hashlib.sha256(store.get(key)).hexdigest()


def _write_seen(workspace: Workspace, number: int, sha256: str) -> None:
    seen = Seen(number, sha256, mask(workspace.store.url))
    path = _make_path(workspace.settings, workspace.name)
    path.parent.mkdir(parents=True, exist_ok=True)
    staged = path.with_name(f".{path.name}.{secrets.token_hex(4)}")  # several commands may look at once
    staged.write_bytes(canonical_json(seen.to_json()))
    os.replace(staged, path)


def _list_entries(store: ObjectStore, name: str) -> dict[int, str]:
    """Return the keys of a ledger's entries by their numbers; whatever else lies there is not judged here."""
    keys = [key for key in store.list(f"ledger/{name}/") if key.endswith(".json")]
    files = {key: key.rpartition("/")[2].removesuffix(".json") for key in keys}
    return {int(file): key for key, file in files.items() if file.isdecimal()}


def _has_any(store: ObjectStore, name: str) -> bool:
    return any(True for folder in ("datasets", "ledger") for _ in store.list(f"{folder}/{name}/"))


def _is_damaged(workspace: Workspace) -> bool:
    path = workspace.settings.pin_path
    try:
        return path.exists() and not load_pin(path)
    except DatasetError:
        return True


def _make_lost_error(workspace: Workspace, what: str, todo: str = WAY_OUT) -> StoreError:
    store = workspace.store
    where = f"store {mask(store.url)}"
    if isinstance(store, LocalStore) and not store.root.is_dir():
        where += " (there is no such folder)"
    return StoreError(where, f"does not hold {what}", "the store that this workspace has used", todo)


def _name_version(pin: Pin) -> str:
    return f"dataset {pin.name} version {pin.version} ({pin.digest[:12]}), which data/dataset.json pins"


def _load_seen(settings: Settings, name: str) -> Seen | None:
    """Return what was seen of a name; None if nothing was, or the file is damaged."""
    try:
        seen = Seen.from_json(json.loads(_make_path(settings, name).read_bytes()))
        return seen if isinstance(seen.entry, int) else None
    except (OSError, ValueError, TypeError, AttributeError):
        return None


def _make_path(settings: Settings, name: str) -> Path:
    return settings.hidden_dir / FOLDER / f"{name}.json"
