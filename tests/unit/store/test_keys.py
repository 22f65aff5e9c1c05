"""Addresses of buckets and the keys of a store."""

import pytest

from visionloop.errors import SettingsError
from visionloop.store import LocalStore, S3Store, open_bucket, open_store
from visionloop.store.keys import BucketAddress, find_digest, parse_s3_url

SHA = "0123456789abcdef" * 4


@pytest.mark.parametrize(
    ("url", "bucket", "prefix"),
    [
        ("s3://pets", "pets", ""),
        ("s3://pets/", "pets", ""),
        ("s3://my.bucket-1/team/cats", "my.bucket-1", "team/cats"),
        ("s3://pets/team/", "pets", "team"),
    ],
)
def test_addresses(url: str, bucket: str, prefix: str) -> None:
    assert parse_s3_url(url, "here", own_keys=True) == BucketAddress(bucket, prefix)
    assert parse_s3_url(url, "here", own_keys=True).url == f"s3://{bucket}/{prefix}".rstrip("/")


@pytest.mark.parametrize(
    "url",
    [
        *("s3://", "s3:///a", "s3://ab", "s3://Pets", "s3://pets/a?b=1", "s3://pets/../x", "s3://pets/.hidden"),
        *("s3://pets/a//b", "s3://a..b/x", "s3://-pets", "s3://pets/a b", "s3://pets:9000/a", "s3://pets/a\nb"),
    ],
)
def test_what_is_no_address_of_a_store(url: str) -> None:
    with pytest.raises(SettingsError, match=r"^VISIONLOOP_STORE: got .*expected s3://bucket/prefix"):
        open_store(url)


def test_credentials_in_an_address_are_not_repeated() -> None:
    with pytest.raises(SettingsError) as caught:
        open_store("s3://AKIA123:topsecret@pets/a")
    assert "topsecret" not in str(caught.value)
    assert "'s3://(hidden)@pets/a'" in str(caught.value)


def test_the_prefix_of_a_source_may_have_any_printable_characters() -> None:
    assert open_bucket("s3://pets/ümlaut and space/?/").url == "s3://pets/ümlaut and space/?"
    with pytest.raises(SettingsError, match=r"bucket 's3://pets/a\\x00b'"):
        open_bucket("s3://pets/a\0b")


def test_open_store_by_scheme() -> None:
    assert isinstance(open_store("file:///tmp/store"), LocalStore)
    store = open_store("s3://pets/team")
    assert isinstance(store, S3Store)
    assert (store.url, store.num_writers) == ("s3://pets/team", 64)
    with pytest.raises(SettingsError, match=r"got 'gs://pets'; expected file:///folder, a path, or s3://bucket/prefix"):
        open_store("gs://pets")


def test_digest_of_a_key() -> None:
    assert find_digest(f"images/01/{SHA}") == SHA
    assert find_digest(f"manifests/{SHA}.parquet") is None
    assert find_digest("ledger/pets/000001.json") is None
