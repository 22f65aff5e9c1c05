"""The keys of a store, and the parts of an `s3://` address."""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from visionloop.errors import SettingsError, StoreError

_PART = r"[A-Za-z0-9_-][A-Za-z0-9._=-]*"
_KEY = re.compile(rf"{_PART}(/{_PART})*")
_BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")
# For keys that others made: all that S3 allows except control characters, so that an address stays on one line.
_ANY_PREFIX = re.compile(r"[^\x00-\x1f\x7f]*")
_CREDENTIALS = re.compile(r"//[^/@]*@")
_DIGEST = re.compile(r"[0-9a-f]{64}")
_NUMBERED = re.compile(r"(?!0+\.)([0-9]{6}|[1-9][0-9]{6,})\.json")  # 000001.json ... 999999.json 1000000.json


@dataclass(frozen=True)
class BucketAddress:
    """A bucket and a prefix in it, without slashes at its ends. An empty prefix means the whole bucket."""

    bucket: str
    prefix: str

    @property
    def url(self) -> str:
        return f"s3://{self.bucket}/{self.prefix}".rstrip("/")

    def join(self, key: str) -> str:
        """Return the full key of a key below the prefix."""
        return f"{self.prefix}/{key}" if self.prefix else key


def is_key(text: str) -> bool:
    """Say whether a text can be a key of a store."""
    return _KEY.fullmatch(text) is not None


def check_key(key: str, where: str) -> str:
    """Return the key. Raises StoreError if it is not valid."""
    if not is_key(key):
        raise StoreError(where, f"got the key {key!r}", "parts of letters, digits, '.', '_', '-', '='")
    return key


def find_digest(key: str) -> str | None:
    """Return the sha256 at the end of a key, or None. It is the digest of the content (see `ObjectStore.add`)."""
    name = key.rpartition("/")[2]
    return name if _DIGEST.fullmatch(name) else None


def parse_s3_url(url: str, where: str, *, own_keys: bool) -> BucketAddress:
    """Parse `s3://bucket/prefix`. With `own_keys` the prefix must be valid for keys of our store.

    Raises:
        SettingsError: it is not such an address.
    """
    bucket, _, prefix = url.removeprefix("s3://").partition("/")
    prefix = prefix.strip("/")
    fits = is_key(prefix) if own_keys else _ANY_PREFIX.fullmatch(prefix)
    if not url.startswith("s3://") or not _BUCKET.fullmatch(bucket) or ".." in bucket or (prefix and not fits):
        raise SettingsError(
            where,
            f"got {_CREDENTIALS.sub('//(hidden)@', url)!r}",
            "s3://bucket/prefix: the bucket of 3 to 63 lower-case letters, digits, '.', '-'"
            + (", the prefix of letters, digits, '.', '_', '-', '/'" if own_keys else ""),
            "Correct the address; credentials and endpoint are in AWS_* variables, not in it.",
        )
    return BucketAddress(bucket, prefix)


def make_number_key(folder: str, number: int) -> str:
    """Return the key of a numbered object: a claim, a decision, a ledger entry."""
    return f"{folder}/{number:06d}.json"


def split_numbers(keys: Iterable[str], folder: str) -> tuple[list[int], list[str]]:
    """Return the numbers among the keys of a folder of numbered objects, in order, and the keys that are no number."""
    numbers, strays = [], []
    for key in keys:
        found = _NUMBERED.fullmatch(key.removeprefix(f"{folder}/"))
        if found:
            numbers.append(int(found[1]))
        else:
            strays.append(key)
    return sorted(numbers), strays
