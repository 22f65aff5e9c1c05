"""The object store: one protocol, one implementation per kind of place. The only home of boto3."""

from visionloop.errors import SettingsError
from visionloop.store.bucket import Bucket, BucketEntry
from visionloop.store.local import LocalStore
from visionloop.store.protocol import ObjectStore
from visionloop.store.s3 import S3Store

__all__ = ["Bucket", "BucketEntry", "LocalStore", "ObjectStore", "S3Store", "open_bucket", "open_store"]


def open_store(url: str) -> ObjectStore:
    """Open the store at a URL (`file:///folder`, `s3://bucket/prefix`). Connects and makes nothing until it is used.

    Raises:
        SettingsError: the scheme is not known, or what follows it is no address.
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
