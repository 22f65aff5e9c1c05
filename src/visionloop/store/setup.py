"""Make a store ready, and say what it is: `visionloop store init` and `visionloop store`.

A bucket gets versioning (to restore what was overwritten or deleted), a rule that removes unfinished uploads,
encryption, and no public access. What an S3-compatible store lacks is reported and skipped. Only conditional writes are
required: without them two promoters could both win.

What a store says of a setting is not believed: an object is written before the first setting and after each. Some take
a setting and then refuse every write, or have conditional writes only while the bucket keeps no versions.
"""

import secrets
import shlex
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from visionloop.errors import StoreError
from visionloop.store import ObjectStore
from visionloop.store.local import LocalStore
from visionloop.store.s3 import Connection, S3Store
from visionloop.store.s3_errors import find_code, hide_credentials, read_status

UNFINISHED_DAYS = 7
RULE = "visionloop-unfinished-uploads"
BLOCKED = ("BlockPublicAcls", "IgnorePublicAcls", "BlockPublicPolicy", "RestrictPublicBuckets")
# The answers of a bucket that has no such setting yet.
UNSET = ("NoSuchLifecycleConfiguration", "ServerSideEncryptionConfigurationNotFoundError")
NO_BLOCK = "NoSuchPublicAccessBlockConfiguration"


@dataclass(frozen=True)
class Fact:
    """One property of a store, in words. `ok` is False if something is missing that a team's store should have."""

    subject: str
    found: str
    ok: bool = True


def describe_store(store: ObjectStore) -> Iterator[Fact]:
    """Describe a store and change nothing. Raises StoreError if it cannot be reached."""
    if not isinstance(store, S3Store):
        there = isinstance(store, LocalStore) and store.root.is_dir()
        yield Fact("store", f"{store.url} ({'a folder' if there else 'a folder that is made when it is needed'})")
        return
    connection = store.connection
    yield Fact("store", f"{store.url} at {hide_credentials(connection.endpoint)}")
    connection.call("head_bucket")
    yield Fact("reachable", "yes")
    for subject, setting in _SETTINGS.items():
        try:
            yield Fact(subject, *setting.read(connection))
        except StoreError as exc:
            yield _tell_unable(subject, exc)


def init_store(store: ObjectStore) -> Iterator[Fact]:
    """Make the folder or the bucket and its settings. Each step is yielded when it is done.

    Raises:
        StoreError: the store cannot be reached, made or written, or has no conditional writes.
    """
    if isinstance(store, LocalStore):
        existed = store.root.is_dir()
        try:
            store.root.mkdir(parents=True, exist_ok=True)
        except OSError as exc:
            raise StoreError(
                f"store {store.url}", f"cannot be made ({exc.strerror})", "a folder", "Correct VISIONLOOP_STORE."
            ) from exc
        yield Fact("folder", f"{store.root} {'is there' if existed else 'made'}")
    if not isinstance(store, S3Store):
        return
    connection = store.connection
    connection.watch("request-created.s3.PutBucketLifecycleConfiguration", _add_md5)
    yield _make_bucket(connection)
    _try_writes(store)
    for subject, setting in _SETTINGS.items():
        yield _put_on(store, subject, setting)
    yield Fact("conditional writes", "yes")


def list_dvc_commands(store: ObjectStore) -> list[str]:
    """Return the commands that make this store the remote of `dvc push` too."""
    if isinstance(store, LocalStore):
        return [f"dvc remote add --default store {shlex.quote(str(store.root / 'dvc'))}"]
    commands = [f"dvc remote add --default store {store.url}/dvc"]
    if isinstance(store, S3Store) and not (endpoint := store.connection.endpoint).endswith(".amazonaws.com"):
        commands.append(f"dvc remote modify store endpointurl {hide_credentials(endpoint)}")
    return commands


def _make_bucket(connection: Connection) -> Fact:
    bucket = connection.address.bucket
    answer = connection.call("head_bucket", expected=(404,))
    if read_status(answer) != 404:
        return Fact("bucket", f"{bucket} is there")
    region = connection.region
    # For us-east-1 AWS refuses a LocationConstraint.
    given: dict[str, Any] = {}
    if region not in ("us-east-1", "aws-global"):
        given["CreateBucketConfiguration"] = {"LocationConstraint": region}
    connection.call("create_bucket", expected=("BucketAlreadyOwnedByYou",), **given)
    return Fact("bucket", f"{bucket} made in {region}")


@dataclass(frozen=True)
class _Setting:
    """One setting of a bucket. `read` says how it is and whether that is enough; `write` returns what takes it back."""

    read: Callable[[Connection], tuple[str, bool]]
    write: Callable[[Connection], Callable[[], object]]


def _put_on(store: S3Store, subject: str, setting: _Setting) -> Fact:
    """Make a setting if it is not there, and take it back if the store then refuses what it is needed for.

    Raises:
        StoreError: the store cannot be reached, or its conditional writes end with the setting.
    """
    connection = store.connection
    try:
        found, ok = setting.read(connection)
        if ok:
            return Fact(subject, found)
        take_back = setting.write(connection)
    except StoreError as exc:
        return _tell_unable(subject, exc)
    try:
        _try_writes(store)
    except StoreError as exc:
        take_back()
        code = find_code(exc)
        if not code:
            raise
        _try_writes(store)
        return Fact(subject, f"cannot be on here: every write is refused then ({code}); it was taken back", ok=False)
    return Fact(subject, *setting.read(connection))


def _read_versioning(connection: Connection) -> tuple[str, bool]:
    status = connection.call("get_bucket_versioning").get("Status", "off")
    return {"Enabled": "on", "Suspended": "suspended"}.get(status, "off"), status == "Enabled"


def _write_versioning(connection: Connection) -> Callable[[], object]:
    put = partial(connection.call, "put_bucket_versioning")
    put(VersioningConfiguration={"Status": "Enabled"})
    return partial(put, VersioningConfiguration={"Status": "Suspended"})


def _read_lifecycle(connection: Connection) -> tuple[str, bool]:
    for rule in _list_rules(connection):
        days = rule.get("AbortIncompleteMultipartUpload", {}).get("DaysAfterInitiation")
        if days and rule.get("Status") == "Enabled":
            return f"removed after {days} days", True
    return "kept for ever", False


def _write_lifecycle(connection: Connection) -> Callable[[], object]:
    """Write our rule together with the existing ones, because S3 replaces the whole configuration."""
    prefix = f"{connection.address.prefix}/" if connection.address.prefix else ""
    rule = {
        "ID": RULE,
        "Status": "Enabled",
        "Filter": {"Prefix": prefix},
        "AbortIncompleteMultipartUpload": {"DaysAfterInitiation": UNFINISHED_DAYS},
    }
    before = _list_rules(connection)
    put = partial(connection.call, "put_bucket_lifecycle_configuration")
    put(LifecycleConfiguration={"Rules": [*(one for one in before if one.get("ID") != RULE), rule]})
    if before:
        return partial(put, LifecycleConfiguration={"Rules": before})
    return partial(connection.call, "delete_bucket_lifecycle")


def _list_rules(connection: Connection) -> list[dict[str, Any]]:
    answer = connection.call("get_bucket_lifecycle_configuration", expected=UNSET)
    return list(answer.get("Rules", ()))


def _read_encryption(connection: Connection) -> tuple[str, bool]:
    answer = connection.call("get_bucket_encryption", expected=UNSET)
    # Ceph 16.2 answers a configuration without rules where none is set.
    rules = answer.get("ServerSideEncryptionConfiguration", {}).get("Rules", ())
    if not rules:
        return "none by default", False
    names = [r.get("ApplyServerSideEncryptionByDefault", {}).get("SSEAlgorithm", "") for r in rules]
    return f"{' '.join(n for n in names if n) or 'on'} by default", True


def _write_encryption(connection: Connection) -> Callable[[], object]:
    rule = {"ApplyServerSideEncryptionByDefault": {"SSEAlgorithm": "AES256"}}
    connection.call("put_bucket_encryption", ServerSideEncryptionConfiguration={"Rules": [rule]})
    return partial(connection.call, "delete_bucket_encryption")


def _read_public_access(connection: Connection) -> tuple[str, bool]:
    blocked = _list_blocked(connection)
    return ("blocked", True) if all(blocked.get(name) for name in BLOCKED) else ("not blocked", False)


def _write_public_access(connection: Connection) -> Callable[[], object]:
    before = _list_blocked(connection)
    put = partial(connection.call, "put_public_access_block")
    put(PublicAccessBlockConfiguration=dict.fromkeys(BLOCKED, True))
    if any(before.values()):
        return partial(put, PublicAccessBlockConfiguration=before)
    return partial(connection.call, "delete_public_access_block")


def _list_blocked(connection: Connection) -> dict[str, bool]:
    answer = connection.call("get_public_access_block", expected=(NO_BLOCK,))
    return dict(answer.get("PublicAccessBlockConfiguration", {}))


_SETTINGS: Mapping[str, _Setting] = {
    "versioning": _Setting(_read_versioning, _write_versioning),
    "unfinished uploads": _Setting(_read_lifecycle, _write_lifecycle),
    "encryption": _Setting(_read_encryption, _write_encryption),
    "public access": _Setting(_read_public_access, _write_public_access),
}


def _tell_unable(subject: str, exc: StoreError) -> Fact:
    """Return that a setting cannot be read or set. Raises the error again if the store itself cannot be reached."""
    code = find_code(exc)
    if exc.transient or not code:
        raise exc
    return Fact(subject, f"cannot be read or set here ({code})", ok=False)


def _try_writes(store: S3Store) -> None:
    """Write an object, and try to create it again. Raises StoreError if it is not written, or is overwritten."""
    key = f"doctor/{secrets.token_hex(8)}"
    store.put(key, b"first")
    try:
        kept = not store.create(key, b"second") and store.get(key) == b"first"
    finally:
        _remove(store, key)
    if not kept:
        raise StoreError(
            f"store {store.url}",
            f"overwrites an object although `If-None-Match: *` forbids it ({_describe_versioning(store.connection)})",
            "conditional writes",
            "Use a store, or a newer release of it, that has them: infra/s3.md names some.",
        )


def _describe_versioning(connection: Connection) -> str:
    try:
        return f"its versioning is {_read_versioning(connection)[0]}"
    except StoreError:
        return "it has no versioning"


def _remove(store: S3Store, key: str) -> None:
    """Remove an object with its versions; where versions cannot be listed, the object alone."""
    try:
        store.purge(key)
    except StoreError as exc:
        if exc.transient or not find_code(exc):
            raise
        store.delete(key)


def _add_md5(request: Any, **_: Any) -> None:
    """Add Content-MD5: older stores require it, and botocore sends a newer checksum instead."""
    import base64
    import hashlib

    data = request.body if isinstance(request.body, bytes) else str(request.body or "").encode()
    digest = hashlib.md5(data, usedforsecurity=False).digest()
    request.headers["Content-MD5"] = base64.b64encode(digest).decode()
