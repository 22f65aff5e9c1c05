"""The store in a bucket of S3 or of an S3-compatible store, and its connection. Creation is a conditional write.

Each object has the sha256 of its bytes as metadata. The server checks what arrives by Content-MD5; the reader checks
what it gets by the sha256.

botocore retries requests that get no answer (mode `standard`, AWS_MAX_ATTEMPTS). This module retries three more cases:
a body that breaks off, a body with another digest, and a conflict of two writers.
"""

import base64
import hashlib
import random
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import closing
from functools import cache
from io import BytesIO, RawIOBase
from typing import Any, BinaryIO, cast

from visionloop.errors import ObjectMissing, StoreError
from visionloop.store.keys import BucketAddress, check_key, find_digest, is_key, parse_s3_url
from visionloop.store.s3_errors import find_code, is_from_outside, read_code, read_status, translate_error

NUM_WRITERS = 64
# Sending so many bytes takes longer than a request: ask first whether the object exists.
LARGE_BYTES = 256 * 1024
# The first request for an object that is opened: its end, where the directory of a Parquet file is.
TAIL_BYTES = 256 * 1024
TRIES = 5
CONNECT_TIMEOUT_S = 5
READ_TIMEOUT_S = 60
FIRST_PAUSE_S = 0.05
Answer = Mapping[str, Any]
PAGE_MARKS = {
    "list_objects_v2": {"ContinuationToken": "NextContinuationToken"},
    "list_object_versions": {"KeyMarker": "NextKeyMarker", "VersionIdMarker": "NextVersionIdMarker"},
}
TODO = "Run `visionloop store init`, or correct VISIONLOOP_STORE."
DIGEST_NAME = "sha256"


class Connection:
    """Calls to one bucket. `where` begins every message. `todo` says what to do if the bucket does not exist."""

    def __init__(self, where: str, todo: str, address: BucketAddress, endpoint_url: str | None = None) -> None:
        self.where, self.todo, self.address, self.endpoint_url = where, todo, address, endpoint_url
        self._lock = threading.Lock()
        self._client: Any = None

    def call(
        self, operation: str, key: str | None = None, expected: Collection[int | str] = (), **given: Any
    ) -> Answer:
        """Call an operation on the bucket, or on a key below its prefix.

        An error whose status or code is `expected` is returned as the answer. Raises StoreError for any other.
        """
        arguments = {"Bucket": self.address.bucket, **({} if key is None else {"Key": self.address.join(key)}), **given}
        try:
            answer: Answer = getattr(self._open(), operation)(**arguments)
            return answer
        except Exception as exc:
            if isinstance(exc, StoreError) or not is_from_outside(exc):
                raise
            response = getattr(exc, "response", None) or {}
            if response and (read_status(response) in expected or read_code(response) in expected):
                return dict(response)
            raise self._translate(exc, operation, key) from exc

    def list_pages(self, operation: str, **given: Any) -> Iterator[Answer]:
        """Yield the pages of `list_objects_v2` or `list_object_versions`. Raises StoreError."""
        marks: dict[str, Any] = {}
        while True:
            page = self.call(operation, **given, **marks)
            yield page
            if not page.get("IsTruncated"):
                return
            marks = {ours: page[theirs] for ours, theirs in PAGE_MARKS[operation].items() if page.get(theirs)}

    def download(
        self,
        key: str,
        *,
        max_bytes: int | None = None,
        is_whole: Callable[[bytes, Answer], bool] = lambda data, answer: True,
        **given: Any,
    ) -> bytes:
        """Return the bytes of an object, but at most `max_bytes` + 1 of them.

        Raises:
            ObjectMissing: there is no such object.
            StoreError: it cannot be read, or `is_whole` refuses the bytes in every try.
        """
        for attempt in range(TRIES):
            answer = self.call("get_object", key, expected=("NoSuchKey", "NoSuchVersion"), **given)
            if read_code(answer):
                raise ObjectMissing(self.where, f"no object {key}", "it to be there", "Check VISIONLOOP_STORE.")
            try:
                data = _read_body(answer, max_bytes)
            except Exception as exc:
                if not is_from_outside(exc):
                    raise
                if attempt == TRIES - 1:
                    raise self._translate(exc, "get_object", key) from exc
            else:
                if (max_bytes is not None and len(data) > max_bytes) or is_whole(data, answer):
                    return data
            pause(attempt)
        raise StoreError(
            self.where,
            f"{key} does not have the bytes that its digest says, read {TRIES} times",
            "the bytes that were written",
            "Restore an earlier version of the object.",
        )

    @property
    def endpoint(self) -> str:
        """The address of the server."""
        return str(self._open().meta.endpoint_url)

    @property
    def region(self) -> str:
        """The region that requests are signed for."""
        return str(self._open().meta.region_name or "us-east-1")

    def watch(self, event: str, handler: Callable[..., None]) -> None:
        """Register a handler of botocore's event, which may change a request before it is signed."""
        self._open().meta.events.register(event, handler)

    def _open(self) -> Any:
        if self._client is None:
            with self._lock:
                if self._client is None:
                    try:
                        self._client = _make_client(self.endpoint_url)
                    except Exception as exc:
                        if not is_from_outside(exc):
                            raise
                        raise self._translate(exc, "connect", None) from exc
        return self._client

    def _translate(self, exc: Exception, operation: str, key: str | None) -> StoreError:
        endpoint = self._client.meta.endpoint_url if self._client else self.endpoint_url or ""
        what = operation if key is None else f"{operation} {key}"
        return translate_error(exc, self.where, what, bucket=self.address.bucket, endpoint=endpoint, todo=self.todo)


def pause(attempt: int) -> None:
    """Wait before the next try: twice as long each time, by a random factor so that writers do not meet again."""
    time.sleep(FIRST_PAUSE_S * 2**attempt * random.uniform(0.5, 1.5))


def _read_body(answer: Answer, max_bytes: int | None) -> bytes:
    """Read all bytes, or `max_bytes` + 1. Raises exceptions of botocore, also if the connection ends too early."""
    with closing(answer["Body"]) as body:
        data: bytes = body.read() if max_bytes is None else body.read(max_bytes + 1)
    promised = int(answer.get("ContentLength", len(data)))
    # When a number of bytes is asked for, botocore does not notice that the connection ended too early.
    if max_bytes is not None and len(data) < min(promised, max_bytes + 1):
        from botocore.exceptions import IncompleteReadError

        raise IncompleteReadError(actual_bytes=len(data), expected_bytes=promised)
    return data


def _make_client(endpoint_url: str | None) -> Any:
    import boto3
    from botocore.config import Config
    from botocore.session import Session

    session = Session()
    session.register_component("data_loader", _load_loader())
    config = Config(
        connect_timeout=CONNECT_TIMEOUT_S,
        read_timeout=READ_TIMEOUT_S,
        retries={"mode": "standard"},
        # More than the writers: a connection beyond the limit would be made anew for each request.
        max_pool_connections=NUM_WRITERS + 16,
        tcp_keepalive=True,
        # Stores other than AWS refuse the checksums that botocore adds by default. We send our own with each object.
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
        user_agent_extra="visionloop",
    )
    client = boto3.Session(botocore_session=session).client("s3", endpoint_url=endpoint_url, config=config)
    client.meta.events.register_last("before-call.s3", _send_at_once)
    return client


def _send_at_once(params: dict[str, Any], **_: Any) -> None:
    """Send a small body without `Expect: 100-continue`: waiting for the reply takes as long as sending the body.

    For a large body the header stays. Without permission the client then gets that answer, not a broken connection.
    """
    body: Any = params.get("body")
    if isinstance(body, BytesIO) and len(body.getbuffer()) < LARGE_BYTES:
        params["headers"].pop("Expect", None)


@cache
def _load_loader() -> Any:
    """Return botocore's loader of the S3 API description, which is large: all clients share it."""
    from botocore.loaders import create_loader

    return create_loader()


class S3Store:
    """An `ObjectStore` below a prefix of a bucket. Connects when first used; threads may share it."""

    def __init__(self, url: str) -> None:
        self._address = parse_s3_url(url, "VISIONLOOP_STORE", own_keys=True)
        self.connection = Connection(f"store {self.url}", TODO, self._address)
        # When images are pulled again nearly all exist. Then asking first is faster than sending.
        self._last_was_there = False

    def __reduce__(self) -> tuple[type["S3Store"], tuple[str]]:
        """Pickle the address only: a connection cannot be sent to another process."""
        return S3Store, (self.url,)

    @property
    def url(self) -> str:
        return self._address.url

    @property
    def num_writers(self) -> int:
        return NUM_WRITERS

    def get(self, key: str) -> bytes:
        def is_whole(data: bytes, answer: Answer) -> bool:
            digest = answer.get("Metadata", {}).get(DIGEST_NAME) or find_digest(key)
            return digest is None or hashlib.sha256(data).hexdigest() == digest

        return self.connection.download(check_key(key, self.connection.where), is_whole=is_whole)

    def open(self, key: str) -> BinaryIO:
        return cast(BinaryIO, _OpenObject(self.connection, check_key(key, self.connection.where)))

    def put(self, key: str, data: bytes) -> None:
        self._send(key, data)

    def create(self, key: str, data: bytes) -> bool:
        if self._send(key, data, IfNoneMatch="*"):
            return True
        try:
            # A key that holds our bytes counts as ours: the answer to an earlier try may have been lost.
            return self.get(key) == data
        except ObjectMissing:  # another writer created it, and it was removed since
            return False

    def add(self, key: str, data: bytes) -> bool:
        if self._last_was_there or len(data) >= LARGE_BYTES:
            num_bytes = self._ask_size(key)
            self._last_was_there = num_bytes == len(data)
            if self._last_was_there:
                return False
            if num_bytes is not None:  # another size: the object there is damaged
                self._send(key, data)
                return True
        sent = self._send(key, data, IfNoneMatch="*")
        self._last_was_there = not sent
        return sent

    def sync(self) -> None:
        """Do nothing: S3 answers only after an object is stored safely."""

    def exists(self, key: str) -> bool:
        return self._ask_size(key) is not None

    def list(self, prefix: str, after: str = "") -> Iterator[str]:
        start = f"{self._address.prefix}/" if self._address.prefix else ""
        keys, behind = [], {"StartAfter": start + after} if after else {}
        for page in self.connection.list_pages("list_objects_v2", Prefix=start + prefix, **behind):
            keys += [entry["Key"].removeprefix(start) for entry in page.get("Contents", ())]
        yield from sorted(key for key in keys if is_key(key) and key > after)

    def delete(self, key: str) -> None:
        self.connection.call("delete_object", check_key(key, self.connection.where), expected=("NoSuchKey",))

    def purge(self, key: str) -> None:
        full = self._address.join(check_key(key, self.connection.where))
        versions: list[str] = []
        for page in self.connection.list_pages("list_object_versions", Prefix=full):
            entries = [*page.get("Versions", ()), *page.get("DeleteMarkers", ())]
            versions += [entry["VersionId"] for entry in entries if entry["Key"] == full]
        for version in versions:
            self.connection.call("delete_object", key, expected=("NoSuchKey", "NoSuchVersion"), VersionId=version)

    def _ask_size(self, key: str) -> int | None:
        answer = self.connection.call("head_object", check_key(key, self.connection.where), expected=(404,))
        return None if read_status(answer) == 404 else int(answer["ContentLength"])

    def _send(self, key: str, data: bytes, **condition: str) -> bool:
        """Send an object. False if the condition does not hold. Raises StoreError."""
        md5 = hashlib.md5(data, usedforsecurity=False).digest()
        facts = {
            "ContentMD5": base64.b64encode(md5).decode(),
            "Metadata": {DIGEST_NAME: hashlib.sha256(data).hexdigest()},
        }
        check_key(key, self.connection.where)
        for attempt in range(TRIES):
            retried = (409, "BadDigest") if attempt < TRIES - 1 else ()
            answer = self.connection.call("put_object", key, expected=(412, *retried), Body=data, **facts, **condition)
            if not read_code(answer):
                return True
            if read_status(answer) == 412:
                return False
            pause(attempt)
        raise AssertionError("the last try returns or raises")


class _OpenObject(RawIOBase):
    """An object that is read in parts, each by a request. The first one brings the end, and how long it all is."""

    def __init__(self, connection: Connection, key: str) -> None:
        self._connection, self._key, self._place = connection, key, 0
        try:
            self._tail, answer = self._fetch(f"bytes=-{TAIL_BYTES}")
        except StoreError as exc:
            if find_code(exc) not in ("InvalidRange", "416"):
                raise
            self._tail, answer = b"", {}  # an empty object has no range
        self._size = int(str(answer.get("ContentRange", "")).rpartition("/")[2] or len(self._tail))
        self._version = {"IfMatch": answer["ETag"]} if answer.get("ETag") else {}

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._place

    def seek(self, offset: int, whence: int = 0) -> int:
        self._place = max(0, offset + (0, self._place, self._size)[whence])
        return self._place

    def readinto(self, buffer: Any) -> int:
        end = min(self._size, self._place + len(buffer))
        if end <= self._place:
            return 0
        known = self._size - len(self._tail)
        if self._place >= known:
            data = self._tail[self._place - known : end - known]
        else:
            data, _ = self._fetch(f"bytes={self._place}-{end - 1}", **self._version)
        buffer[: len(data)] = data
        self._place += len(data)
        return len(data)

    def _fetch(self, part: str, **given: Any) -> tuple[bytes, Answer]:
        kept: list[Answer] = []

        def is_whole(data: bytes, answer: Answer) -> bool:
            kept.append(answer)
            return len(data) == int(answer.get("ContentLength", len(data)))

        return self._connection.download(self._key, is_whole=is_whole, Range=part, **given), kept[-1]
