"""The store in a bucket of S3, or of any store that speaks it. Conditional writes decide who was first.

Each object carries the sha256 of its bytes: the server checks what arrives (Content-MD5), the reader what comes back.
"""

import base64
import hashlib
from collections.abc import Iterator

from visionloop.errors import ObjectMissing
from visionloop.store.keys import check_key, find_digest, is_key, parse_s3_url
from visionloop.store.s3_connection import LARGE_BYTES, NUM_WRITERS, TRIES, Answer, Connection, pause
from visionloop.store.s3_errors import read_code, read_status

TODO = "Run `visionloop store init`, or correct VISIONLOOP_STORE."
DIGEST_NAME = "sha256"


class S3Store:
    """An `ObjectStore` below a prefix of a bucket. Connects when first used; threads may share it."""

    def __init__(self, url: str) -> None:
        self._address = parse_s3_url(url, "VISIONLOOP_STORE", own_keys=True)
        self.connection = Connection(f"store {self.url}", TODO, self._address)
        # In a second pull of the same images nearly all are there: then asking is cheaper than sending.
        self._last_was_there = False

    def __reduce__(self) -> tuple[type["S3Store"], tuple[str]]:
        """Travel to another process by address: a connection cannot."""
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

    def put(self, key: str, data: bytes) -> None:
        self._send(key, data)

    def create(self, key: str, data: bytes) -> bool:
        if self._send(key, data, IfNoneMatch="*"):
            return True
        try:
            # A taken key with our bytes is ours: the answer to an earlier try may have been lost.
            return self.get(key) == data
        except ObjectMissing:  # somebody had it, and has removed it since
            return False

    def add(self, key: str, data: bytes) -> bool:
        if self._last_was_there or len(data) >= LARGE_BYTES:
            num_bytes = self._ask_size(key)
            self._last_was_there = num_bytes == len(data)
            if self._last_was_there:
                return False
            if num_bytes is not None:  # what lies there cannot have this digest
                self._send(key, data)
                return True
        sent = self._send(key, data, IfNoneMatch="*")
        self._last_was_there = not sent
        return sent

    def sync(self) -> None:
        """Do nothing: S3 answers when an object is safe."""

    def exists(self, key: str) -> bool:
        return self._ask_size(key) is not None

    def list(self, prefix: str) -> Iterator[str]:
        start = f"{self._address.prefix}/" if self._address.prefix else ""
        keys = []
        for page in self.connection.list_pages("list_objects_v2", Prefix=start + prefix):
            keys += [entry["Key"].removeprefix(start) for entry in page.get("Contents", ())]
        yield from sorted(key for key in keys if is_key(key))

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
        """Send an object; False when the condition did not hold. Raises StoreError."""
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
