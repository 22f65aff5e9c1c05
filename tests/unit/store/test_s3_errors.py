"""What botocore raises becomes one line that says what to do, and never a secret."""

import subprocess
import sys
from typing import Any

import pytest
from botocore import exceptions as boto

from visionloop.errors import StoreError
from visionloop.store.s3_errors import find_code, hide_credentials, is_from_outside, translate_error

ENDPOINT = "https://user:topsecret@minio.test:9000/x?token=topsecret"


def translate(exc: Exception) -> StoreError:
    facts = {"bucket": "pets", "endpoint": ENDPOINT, "todo": "Correct VISIONLOOP_STORE."}
    return translate_error(exc, "store s3://pets/a", "put_object images/1", **facts)


def make_client_error(code: str, status: int, **headers: str) -> boto.ClientError:
    answer: Any = {
        "Error": {"Code": code, "Message": "AKIA123 topsecret"},
        "ResponseMetadata": {"HTTPStatusCode": status, "HTTPHeaders": headers},
    }
    return boto.ClientError(answer, "PutObject")


@pytest.mark.parametrize(
    ("code", "status", "text", "transient"),
    [
        ("InvalidAccessKeyId", 403, "the access key is not known there; expected credentials of this store", False),
        ("SignatureDoesNotMatch", 403, "the secret key does not fit the access key", False),
        ("ExpiredToken", 400, "the session token has expired or is wrong; expected a valid one. Log in again", False),
        ("AccessDenied", 403, "access denied to put_object images/1", False),
        ("403", 403, "access denied to put_object images/1", False),
        (
            "NoSuchBucket",
            404,
            "there is no bucket pets; expected a bucket that exists. Correct VISIONLOOP_STORE",
            False,
        ),
        ("PermanentRedirect", 301, "bucket pets is in another region (eu-west-1)", False),
        ("AuthorizationHeaderMalformed", 400, "bucket pets is in another region (eu-west-1)", False),
        ("RequestTimeTooSkewed", 403, "the clock of this machine is off", False),
        ("NotImplemented", 501, "the store cannot put_object images/1; expected an S3 store with conditional", False),
        ("XMinioStorageFull", 507, "the store is full or over its quota", False),
        ("SlowDown", 503, "is busy: it answers SlowDown", True),
        ("SomethingNew", 500, "is busy: it answers SomethingNew", True),
        ("TooManyRequests", 429, "is busy: it answers TooManyRequests", True),
        ("BadDigest", 400, "bytes were damaged on their way", True),
        ("ConditionalRequestConflict", 409, "is busy: it answers ConditionalRequestConflict", True),
        ("BucketAlreadyExists", 409, "bucket pets is somebody else's", False),
        ("SomethingElse", 400, "the store answers SomethingElse to put_object images/1; expected success", False),
    ],
)
def test_answers_of_the_store(code: str, status: int, text: str, transient: bool) -> None:
    error = translate(make_client_error(code, status, **{"x-amz-bucket-region": "eu-west-1"}))
    assert text in str(error)
    assert error.transient is transient
    assert "topsecret" not in str(error)
    assert "\n" not in str(error)


@pytest.mark.parametrize(
    ("exc", "text", "transient"),
    [
        (
            boto.NoCredentialsError(),
            "no credentials found; expected AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
            False,
        ),
        (boto.PartialCredentialsError(provider="env", cred_var="AWS_SECRET_ACCESS_KEY"), "half of the cred", False),
        (boto.EndpointConnectionError(endpoint_url=ENDPOINT), "cannot connect to https://minio.test:9000;", True),
        (boto.ConnectTimeoutError(endpoint_url=ENDPOINT), "cannot connect to https://minio.test:9000;", True),
        (boto.ReadTimeoutError(endpoint_url=ENDPOINT), "the connection to https://minio.test:9000 broke off", True),
        (boto.ConnectionClosedError(endpoint_url=ENDPOINT), "broke off (put_object images/1)", True),
        (boto.IncompleteReadError(actual_bytes=1, expected_bytes=2), "broke off", True),
        (boto.SSLError(endpoint_url=ENDPOINT, error="x"), "no TLS connection to https://minio.test:9000", False),
        (boto.ProxyConnectionError(proxy_url=ENDPOINT), "cannot connect through the proxy", True),
        (boto.ProfileNotFound(profile="nope"), "the AWS profile is not there (The config profile (nope)", False),
        (boto.UnauthorizedSSOTokenError(), "credentials cannot be had from their provider", False),
        (boto.NoRegionError(), "no region is set", False),
        (boto.InvalidRegionError(region_name="x!"), "the AWS settings cannot be used", False),
        (ValueError(f"Invalid endpoint: {ENDPOINT}"), "the AWS settings cannot be used (Invalid endpoint: (a URL))", 0),
        (ConnectionResetError(), "cannot connect to", True),
    ],
)
def test_what_never_reached_the_store(exc: Exception, text: str, transient: bool) -> None:
    error = translate(exc)
    assert is_from_outside(exc)
    assert text in str(error)
    assert error.transient is bool(transient)
    assert "topsecret" not in str(error)


def test_our_own_bugs_are_not_translated() -> None:
    assert not is_from_outside(TypeError("ours"))


def test_code_of_a_translated_error() -> None:
    with pytest.raises(StoreError) as caught:
        exc = make_client_error("InvalidObjectState", 403)
        raise translate(exc) from exc
    assert find_code(caught.value) == "InvalidObjectState"
    assert find_code(StoreError("a", "b")) == ""


def test_url_without_its_secrets() -> None:
    assert hide_credentials(ENDPOINT) == "https://minio.test:9000"
    assert hide_credentials("http://host:nonsense/") == "http://host"


def test_a_store_is_opened_and_sent_elsewhere_without_loading_boto3() -> None:
    code = (
        "import sys, pickle; from visionloop.store import open_store, open_bucket;"
        "store = open_store('s3://pets/a'); open_bucket('s3://pets/b');"
        "assert pickle.loads(pickle.dumps(store)).url == 's3://pets/a';"
        "print([name for name in ('boto3', 'botocore', 'numpy') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
