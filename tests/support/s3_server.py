"""A real S3 server on loopback (moto's), and the environment that points every S3 client at it."""

import logging
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment

# What a person sets, with keys that open nothing. Few tries: a test waits for what the client waits for.
S3_ENV = {
    "AWS_ACCESS_KEY_ID": "test-key-id",
    "AWS_SECRET_ACCESS_KEY": "test-secret",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_MAX_ATTEMPTS": "2",
    "AWS_EC2_METADATA_DISABLED": "true",
    "AWS_CONFIG_FILE": "no-such-file",
    "AWS_SHARED_CREDENTIALS_FILE": "no-such-file",
}
FOREIGN = ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_REGION", "AWS_CA_BUNDLE", "HTTP_PROXY", "HTTPS_PROXY", "http_proxy")


@contextmanager
def serve_s3() -> Iterator[str]:
    """Run the server; give its endpoint URL."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel("ERROR")
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    assert server._server is not None
    server._server.app = one_at_a_time(server._server.app)
    try:
        host, port = server.get_host_and_port()
        yield f"http://{host}:{port}"
    finally:
        server.stop()


def one_at_a_time(app: "WSGIApplication") -> "WSGIApplication":
    """Let no two requests overlap: moto checks whether a key is free, then takes it; in S3 that is one step."""
    lock = threading.Lock()

    def serve(environ: "WSGIEnvironment", start_response: "StartResponse") -> Iterable[bytes]:
        with lock:
            return app(environ, start_response)

    return serve


def point_to(patch: pytest.MonkeyPatch, endpoint_url: str, **extra: str) -> None:
    """Set the environment of S3 clients."""
    for name in FOREIGN:
        patch.delenv(name, raising=False)
    for name, value in {**S3_ENV, "AWS_ENDPOINT_URL": endpoint_url, **extra}.items():
        patch.setenv(name, value)


def make_bucket(endpoint_url: str, name: str, *, versioned: bool = False) -> str:
    """Make a bucket; return its name."""
    client = make_client(endpoint_url)
    client.create_bucket(Bucket=name)
    if versioned:
        client.put_bucket_versioning(Bucket=name, VersioningConfiguration={"Status": "Enabled"})
    return name


def make_client(endpoint_url: str):  # type: ignore[no-untyped-def]
    """A plain boto3 client, to see what ours has written."""
    import boto3

    keys = {"aws_access_key_id": "test-key-id", "aws_secret_access_key": "test-secret"}
    return boto3.client("s3", endpoint_url=endpoint_url, region_name="us-east-1", **keys)
