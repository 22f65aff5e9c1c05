"""Files that params.yaml names: of this machine, a bucket or the web. Loads no torch and looks into none of them.

    .visionloop/weights/<sha256>    what came from an s3:// or https:// address

A file gets its name when all of it has the digest that was asked for; nothing is read before.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from visionloop.bundle import hash_file
from visionloop.errors import ImageError, ObjectMissing, SettingsError, SourceError, StoreError, TrainingError
from visionloop.networks.names import BACKBONE, ENCODER_TODO, TODO, WEIGHTS, resolve_path
from visionloop.params.train import REMOTE
from visionloop.secrets import mask
from visionloop.store import open_bucket
from visionloop.web.addresses import AnyHost, HostRule, parse_url
from visionloop.web.download import make_fetcher, parse_private_hosts

MAX_BYTES = 4 << 30
SILENCE_S = 30.0


@dataclass(frozen=True)
class Key:
    """The key of params.yaml that names a file, and what a person can do where it cannot be had."""

    where: str
    todo: str

    @property
    def name(self) -> str:
        return self.where.removeprefix("params.yaml ")


OF_WEIGHTS = Key(WEIGHTS, TODO)
OF_ENCODER = Key(BACKBONE, ENCODER_TODO)


def find_file(name: str, sha256: str | None, home: Path, key: Key) -> Path:
    """Return a file that params.yaml names, fetched if it is not here: a path, an s3:// or https:// address.

    Raises:
        TrainingError: it cannot be had, or its bytes are not those of `sha256`.
    """
    if name.startswith(REMOTE):
        assert sha256, "the parameters ask for it"
        path = home / ".visionloop" / "weights" / sha256
        if path.is_file():
            if hash_file(path) == sha256:
                return path
            path.unlink()
        return fetch(name, path, sha256, key)
    path = resolve_path(name, home)
    if sha256 and path.is_file() and (found := hash_file(path)) != sha256:
        raise _other_bytes(name, found, sha256, key)
    return path


def fetch(address: str, path: Path, digest: str, key: Key) -> Path:
    """Write what lies at an address; name the file when its sha256 begins with `digest`. Raises TrainingError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    staged = path.with_name(f".{path.name}-{os.getpid()}.part")
    try:
        with staged.open("wb") as file:
            (_fetch_object if address.startswith("s3://") else _download)(address, file, key)
            file.flush()
            os.fsync(file.fileno())
        if not (found := hash_file(staged)).startswith(digest):
            raise _other_bytes(address, found, digest, key)
        staged.replace(path)
    finally:
        staged.unlink(missing_ok=True)
    return path


def _fetch_object(address: str, file: BinaryIO, key: Key) -> None:
    bucket, _, name = address.removeprefix("s3://").partition("/")
    try:
        data = open_bucket(f"s3://{bucket}").fetch(name, MAX_BYTES)
    except ObjectMissing as exc:
        raise TrainingError(key.where, f"there is no {address}", "an object", "Correct the address.") from exc
    except (StoreError, SettingsError) as exc:
        raise TrainingError(f"{key.where} {address}", exc.found, exc.expected, exc.todo) from exc
    if len(data) > MAX_BYTES:
        raise TrainingError(key.where, f"{address} is too large", f"at most {MAX_BYTES:,} bytes", key.todo)
    file.write(data)


def _download(address: str, file: BinaryIO, key: Key) -> None:
    """Write the body at a URL of any host. Only the host that params.yaml names may be a private one unasked."""
    shown = mask(address)
    try:
        own = HostRule(parse_url(address).host, None, False)
        rules = AnyHost((), (own, *parse_private_hosts(os.environ)))
        make_fetcher(os.environ, rules, timeout_s=SILENCE_S).download(address, file, MAX_BYTES)
    except ImageError as exc:
        todo = f"Correct the address (a signed one needs no password). Or: {key.todo}"
        raise TrainingError(key.where, f"{shown}: {exc.found}", exc.expected, todo) from exc
    except SourceError as exc:
        raise TrainingError(f"{key.where} {exc.where}", exc.found, exc.expected, exc.todo) from exc


def _other_bytes(address: str, found: str, expected: str, key: Key) -> TrainingError:
    return TrainingError(
        key.where,
        f"{mask(address)} has the sha256 {found[:12]}",
        expected[:12],
        f"Correct {key.name} or {key.name}_sha256; if both are right, the file was changed.",
    )
