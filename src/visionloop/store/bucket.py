"""Any S3 bucket, read only: the objects below a prefix, and the bytes that each had when it was listed."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from visionloop.errors import ImageError, ObjectMissing, StoreError
from visionloop.store.keys import parse_s3_url
from visionloop.store.s3 import Answer, Connection
from visionloop.store.s3_errors import find_code, read_code

CHANGED = ("PreconditionFailed", "412")
# Error codes that concern one object, not the whole bucket.
OF_ONE_OBJECT = (*CHANGED, "AccessDenied", "403", "InvalidObjectState", "InvalidRequest", "MethodNotAllowed", "405")


@dataclass(frozen=True, slots=True)
class BucketEntry:
    """One object of a listing. `key` is relative to the prefix and may hold any characters.

    `version_id` is None where the bucket keeps no versions.
    """

    key: str
    num_bytes: int
    etag: str
    version_id: str | None


class Bucket:
    """A read-only view of `s3://bucket/prefix`. Connects when first used; threads may share it."""

    def __init__(self, url: str, endpoint_url: str | None = None) -> None:
        self._address = parse_s3_url(url, f"bucket {url!r}", own_keys=False)
        self.url = self._address.url
        self._connection = Connection(f"bucket {self.url}", "Correct its path.", self._address, endpoint_url)
        self._etag_is_md5: bool | None = None

    def scan(self) -> Iterator[BucketEntry]:
        """Yield the objects below the prefix, in the order of their keys. Raises StoreError."""
        start = f"{self._address.prefix}/" if self._address.prefix else ""
        for entry in self._list(start):
            version = entry.get("VersionId")
            yield BucketEntry(
                key=entry["Key"].removeprefix(start),
                num_bytes=int(entry["Size"]),
                etag=entry["ETag"].strip('"'),
                version_id=None if version in (None, "null") else version,
            )

    def read(self, entry: BucketEntry, max_bytes: int) -> bytes:
        """Return the bytes of an object as it was listed.

        Raises:
            ImageError: it is larger than `max_bytes`, was changed or deleted since, or access is denied.
            StoreError: the bucket cannot be reached.
        """
        where = f"{self.url}/{entry.key}"
        if entry.num_bytes > max_bytes:
            raise _too_large(where, max_bytes)
        pinned = {"VersionId": entry.version_id} if entry.version_id else {"IfMatch": f'"{entry.etag}"'}
        before: list[bytes] = []

        def is_whole(data: bytes, answer: Answer) -> bool:
            return self._fits(data, answer, entry, before)

        try:
            data = self._connection.download(entry.key, max_bytes=max_bytes, is_whole=is_whole, **pinned)
        except ObjectMissing as exc:
            raise _unreadable(where, "is gone since it was listed") from exc
        except StoreError as exc:
            code = find_code(exc)
            if code not in OF_ONE_OBJECT:
                raise
            raise _unreadable(where, "has changed since it was listed" if code in CHANGED else exc.found) from exc
        if len(data) > max_bytes:
            raise _too_large(where, max_bytes)
        return data

    def fetch(self, key: str, max_bytes: int) -> bytes:
        """Return the present bytes of an object, but at most `max_bytes` + 1 of them.

        Raises:
            ObjectMissing: there is no such object.
            StoreError: the bucket cannot be reached, or access is denied.
        """
        return self._connection.download(key, max_bytes=max_bytes)

    def _list(self, start: str) -> Iterator[Any]:
        if self._keeps_versions():
            for page in self._connection.list_pages("list_object_versions", Prefix=start):
                yield from (entry for entry in page.get("Versions", ()) if entry["IsLatest"])
        else:
            for page in self._connection.list_pages("list_objects_v2", Prefix=start):
                yield from page.get("Contents", ())

    def _keeps_versions(self) -> bool:
        """Say whether versions can be listed. Without that permission objects are read by their ETag."""
        unable = (403, 405, 501)
        answer = self._connection.call("get_bucket_versioning", expected=unable)
        if answer.get("Status") != "Enabled":
            return False
        return not read_code(self._connection.call("list_object_versions", expected=unable, MaxKeys=1))

    def _fits(self, data: bytes, answer: Answer, entry: BucketEntry, before: list[bytes]) -> bool:
        """Compare bytes with the ETag if it is their MD5. It is not for multipart uploads and own encryption keys.

        Some stores never use the MD5. Until one ETag has matched, two downloads with equal bytes count as undamaged.
        """
        has_own_key = answer.get("ServerSideEncryption", "AES256") != "AES256" or answer.get("SSECustomerAlgorithm")
        if len(entry.etag) != 32 or has_own_key or self._etag_is_md5 is False:
            return True
        if hashlib.md5(data, usedforsecurity=False).hexdigest() == entry.etag:
            self._etag_is_md5 = True
            return True
        if self._etag_is_md5 is None and data in before:
            self._etag_is_md5 = False
            return True
        before.append(data)
        return False


def _too_large(where: str, max_bytes: int) -> ImageError:
    return ImageError(where, "is too large", f"at most {max_bytes} bytes", reason_code="too_large")


def _unreadable(where: str, found: str) -> ImageError:
    return ImageError(where, found, "an object that can be read", reason_code="unreadable")
