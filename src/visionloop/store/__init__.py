"""The object store: one protocol, with an implementation for folders and one for S3. Only this package uses boto3.

An object is whole or absent: a reader never sees a part of one. An object whose key is a digest never changes.
"""

from collections.abc import Iterator
from typing import BinaryIO, Protocol

from visionloop.errors import SettingsError
from visionloop.store.bucket import Bucket, BucketEntry
from visionloop.store.local import LocalStore
from visionloop.store.s3 import S3Store

__all__ = ["Bucket", "BucketEntry", "LocalStore", "ObjectStore", "S3Store", "open_bucket", "open_store"]


class ObjectStore(Protocol):
    """A flat space of immutable byte objects with conditional creation."""

    @property
    def url(self) -> str:
        """The address, for messages."""
        ...

    @property
    def num_writers(self) -> int:
        """The number of parallel writes that is fastest: a few for a disk, many for a network."""
        ...

    def get(self, key: str) -> bytes:
        """Return an object's bytes. Raises ObjectMissing, StoreError."""
        ...

    def open(self, key: str) -> BinaryIO:
        """Open an object to read parts of it: only what is asked for is fetched, and no digest is compared.

        Raises ObjectMissing, StoreError: also later, while it is read.
        """
        ...

    def put(self, key: str, data: bytes) -> None:
        """Write or replace an object atomically. Raises StoreError."""
        ...

    def create(self, key: str, data: bytes) -> bool:
        """Write an object only if the key is free. True if this call created it, or if it already holds these bytes.

        Raises:
            StoreError: the store cannot be written.
        """
        ...

    def add(self, key: str, data: bytes) -> bool:
        """Write an object whose key is the digest of its content. An object that exists is not sent again.

        True if this call sent it. Until `sync` it may be lost in a power failure. Raises StoreError.
        """
        ...

    def sync(self) -> None:
        """Make all that was written survive a power failure. Called once, before a commit object is created."""
        ...

    def exists(self, key: str) -> bool:
        """Say whether the object is there."""
        ...

    def list(self, prefix: str, after: str = "") -> Iterator[str]:
        """Yield the keys that begin with `prefix`, sorted; only those behind `after`.

        No object needs to be at `after`, but it may not end in a slash (`a/b/~` is right): stores differ there.
        """
        ...

    def delete(self, key: str) -> None:
        """Remove an object. A missing one is no error. A store with versioning may keep the earlier versions."""
        ...

    def purge(self, key: str) -> None:
        """Remove an object and all its earlier versions. A missing one is no error. Raises StoreError."""
        ...


def open_store(url: str) -> ObjectStore:
    """Open the store at a URL (`file:///folder`, `s3://bucket/prefix`). Connects and creates nothing before first use.

    Raises:
        SettingsError: the scheme or the address is not valid.
    """
    if url.startswith("file://"):
        return LocalStore.from_url(url)
    if url.startswith("s3://"):
        return S3Store(url)
    raise SettingsError(
        "VISIONLOOP_STORE",
        f"got {url!r}",
        "file:///folder, a path, or s3://bucket/prefix",
        "Set it to one of them, or unset it for the default.",
    )


def open_bucket(url: str, endpoint_url: str | None = None) -> Bucket:
    """Open a bucket for reading. Without `endpoint_url`: AWS_ENDPOINT_URL, else AWS. Raises SettingsError."""
    return Bucket(url, endpoint_url)
