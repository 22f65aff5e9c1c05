"""Keys of the server: who may ask for what. Of a key only its sha256 is stored; nobody can read it back.

They are in a file (`.visionloop/keys.json`, or what VISIONLOOP_KEYS names), not in the store: who may write images
there must not be able to make a key for himself, and no answer waits for a store. Several servers share the file, as
a mounted secret. The server looks at it at every request, so a revoked key is refused at once. A file that is damaged
or gone changes nothing for a server that runs: it goes on with the keys it knows, and says so.
"""

import contextlib
import fcntl
import hashlib
import hmac
import json
import logging
import os
import re
import secrets
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from visionloop.errors import DiskError, SettingsError, VisionLoopError, shorten
from visionloop.workfolder import write_file

ROLES = ("predict", "feedback", "admin")  # an admin may do all
NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")
SHA256 = re.compile(r"[0-9a-f]{64}")
SECRET_BYTES = 32
MAX_BYTES = 64_000_000
FORM = '{"keys": [{"name": ..., "roles": [...], "sha256": ...}, ...]}'
TODO = "Restore the file from a copy, or remove it and make new keys."

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Key:
    """One key, as the file has it. `rate_per_s` None: the rate of `serve.rate_per_s`."""

    name: str
    roles: tuple[str, ...]
    sha256: str
    made_at: str = ""
    made_by: str = ""
    revoked_at: str | None = None
    rate_per_s: float | None = None

    def allows(self, role: str) -> bool:
        return role in self.roles or "admin" in self.roles


class Keys:
    """The keys of one file, read again whenever it has changed. Without a file the server is open to all who reach it.

    Once there is a file it is never open again, even with no valid key in it: that is a matter of removing the file
    and starting anew.
    """

    def __init__(self, path: Path) -> None:
        """Raises SettingsError for a file that cannot be used, DiskError for one that cannot be read."""
        self._path = path
        self.problem: str | None = None
        self._stamp = _get_stamp(path)
        keys = read_keys(path)  # a file that cannot even be seen is not one that was never made
        self._valid = None if self._stamp is None and not keys else _pick_valid(keys)

    @property
    def is_open(self) -> bool:
        """Whether no key was ever made."""
        self._refresh()
        return self._valid is None

    def find(self, text: str) -> Key | None:
        """Return the valid key with this text."""
        self._refresh()
        digest = _hash(text)
        key = (self._valid or {}).get(digest)
        # A dict compares hashes, of which nobody can choose the next one to try; the last word is in constant time.
        return key if key is not None and hmac.compare_digest(key.sha256, digest) else None

    def _refresh(self) -> None:
        stamp = _get_stamp(self._path)
        if stamp == self._stamp:
            return
        self._stamp = stamp
        try:
            if stamp is None:
                raise SettingsError(f"keys {self._path}", "the file is gone", "it", TODO)
            self._valid = _pick_valid(read_keys(self._path))
            self.problem = None
            log.info("keys: %d are valid", len(self._valid))
        except VisionLoopError as exc:
            if isinstance(exc, DiskError):
                self._stamp = ()  # what could not be read now is read at the next request: a key in it may be revoked
            if self.problem != exc.found:
                log.error("%s The keys known before stay valid.", exc)
            self.problem = exc.found


def read_keys(path: Path) -> list[Key]:
    """Return all keys of a file, also the revoked ones; none if there is no file.

    Raises:
        SettingsError: it is damaged. DiskError: it cannot be read.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        return []
    except OSError as exc:
        raise DiskError(f"keys {path}", f"cannot be read ({exc.strerror})", "a file", "Make it readable.") from exc
    if len(data) > MAX_BYTES:
        raise SettingsError(f"keys {path}", f"has more than {MAX_BYTES:,} bytes", "a list of keys", TODO)
    try:
        keys = [_parse_key(value) for value in json.loads(data)["keys"]]
    except (ValueError, TypeError, KeyError, RecursionError) as exc:
        raise SettingsError(f"keys {path}", f"are damaged ({type(exc).__name__})", FORM, TODO) from exc
    names = Counter(key.name for key in keys if key.revoked_at is None)
    if twice := [name for name, number in names.items() if number > 1]:
        raise SettingsError(f"keys {path}", f"has two valid keys named {shorten(twice)}", "one of each name", TODO)
    return keys


def add_key(path: Path, *, name: str, roles: Sequence[str], rate_per_s: float | None = None, now: str, by: str) -> str:
    """Make a key, and return its text: it is shown this once, and stored nowhere.

    Raises:
        SettingsError: there is a valid key of this name, or the name, a role or the rate cannot be used.
    """
    text = f"vlk_{name}_{secrets.token_urlsafe(SECRET_BYTES)}"
    _check_wanted(name, roles, rate_per_s)
    chosen = tuple(role for role in ROLES if role in roles)
    with _editing(path) as keys:
        if any(key.name == name and key.revoked_at is None for key in keys):
            raise SettingsError("--name", f"there is a key {name}", "a new name", "See `visionloop keys list`.")
        keys.append(Key(name, chosen, _hash(text), made_at=now, made_by=by, rate_per_s=rate_per_s))
    return text


def revoke_key(path: Path, name: str, *, now: str) -> None:
    """Make a key invalid for ever. It stays in the file, so that its name in a log says something.

    Raises:
        SettingsError: there is no valid key of this name.
    """
    with _editing(path) as keys:
        for place, key in enumerate(keys):
            if key.name == name and key.revoked_at is None:
                keys[place] = replace(key, revoked_at=now)
                return
        known = shorten([key.name for key in keys if key.revoked_at is None]) or "(there is none)"
        raise SettingsError("key", f"{name[:80]!r} is not valid", f"one of {known}", "See `visionloop keys list`.")


@contextlib.contextmanager
def _editing(path: Path) -> Iterator[list[Key]]:
    """Yield the keys of a file to change; they are written if nothing was raised. One editor at a time."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.with_name(f"{path.name}.lock").open("w") as lock:
            fcntl.flock(lock.fileno(), fcntl.LOCK_EX)
            keys = read_keys(path)
            yield keys
            before = os.umask(0o077)
            try:
                write_file(path, (json.dumps({"keys": [asdict(key) for key in keys]}, indent=1) + "\n").encode())
            finally:
                os.umask(before)
    except OSError as exc:
        if isinstance(exc, VisionLoopError):
            raise
        raise DiskError(f"keys {path}", f"cannot be written ({exc.strerror})", "a file", "Make it writable.") from exc


def _check_wanted(name: str, roles: Sequence[str], rate_per_s: float | None) -> None:
    if not NAME.fullmatch(name):
        expected = "lower-case letters, digits and '-' (at most 63)"
        raise SettingsError("--name", f"got {name[:80]!r}", expected, "Choose another name.")
    if not roles or set(roles) - set(ROLES):
        raise SettingsError("--role", f"got {shorten([*roles]) or 'none'}", f"some of {', '.join(ROLES)}")
    if rate_per_s is not None and not 0 < rate_per_s < float("inf"):
        raise SettingsError("--rate", f"got {rate_per_s:g}", "images a second, more than 0")


def _parse_key(value: Any) -> Key:
    key = Key(**{**value, "roles": tuple(value["roles"])})
    try:
        _check_wanted(key.name, key.roles, key.rate_per_s)
    except SettingsError as exc:
        raise ValueError(str(exc)) from exc
    if not SHA256.fullmatch(key.sha256) or not isinstance(key.revoked_at, str | None):
        raise ValueError(f"key {key.name}")
    return key


def _pick_valid(keys: Sequence[Key]) -> dict[str, Key]:
    return {key.sha256: key for key in keys if key.revoked_at is None}


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()


def _get_stamp(path: Path) -> tuple[int, ...] | None:
    """Return what changes when a file is written or replaced; None if it cannot be seen."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino
