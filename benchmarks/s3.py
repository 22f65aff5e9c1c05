"""Speed of `ingest` into S3: against a plain boto3 loop, and against 64 threads that only put the same bytes.

The server is moto, in its own process on loopback. It is measured once without delay, and once with the delay of a
store in the same region. moto handles one request at a time on one core, so without delay moto itself is measured.
The plain loop is what a script does: read, hash, decode, put_object, one image after the other.
"""

import contextlib
import hashlib
import logging
import os
import secrets
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ingest import make_ingest_workspace, make_many_photos
from row import Row
from visionloop.workspace import connect

NUM_PHOTOS = 600
NUM_PLAIN = 200
NUM_THREADS = 64
REPEATS = 3
DELAYS_S = (0.0, 0.02)
BUCKET = "bench"
KEYS = {"AWS_ACCESS_KEY_ID": "bench", "AWS_SECRET_ACCESS_KEY": "bench", "AWS_DEFAULT_REGION": "us-east-1"}


def bench_s3(bench_dir: Path) -> list[Row]:
    """Time ingest, the plain loop and the null loop in turn, without and with a delay of the network."""
    photos = make_many_photos(bench_dir / f"photos-{NUM_PHOTOS}", NUM_PHOTOS)
    trash = bench_dir / "s3"
    shutil.rmtree(trash, ignore_errors=True)
    rows = []
    for delay_s in DELAYS_S:
        with run_server(delay_s) as endpoint_url, set_environment({**KEYS, "AWS_ENDPOINT_URL": endpoint_url}):
            per_s = measure(trash / str(delay_s), photos)
        what = f"ingest of {NUM_PHOTOS} JPEGs of 9 kB to S3, {delay_s * 1000:.0f} ms away"
        rows += [
            Row(what, per_s["pull"], per_s["plain"], "images/s", "plain boto3 loop"),
            Row(what, per_s["pull"], per_s["null"], "images/s", "64 threads that only put"),
        ]
    shutil.rmtree(trash)
    return rows


def measure(folder: Path, photos: Path) -> dict[str, float]:
    """Return the median images per second of each way, after a first round that is not counted."""
    client = make_client()
    client.create_bucket(Bucket=BUCKET)
    paths = sorted(photos.rglob("*.jpg"))
    ways: dict[str, Callable[[str], float]] = {
        "pull": lambda run: len(paths) / pull_into_bucket(folder / run, photos, f"s3://{BUCKET}/{run}"),
        "plain": lambda run: NUM_PLAIN / put_one_by_one(client, paths[:NUM_PLAIN], run),
        "null": lambda run: len(paths) / put_by_threads(client, [path.read_bytes() for path in paths], run),
    }
    speeds: dict[str, list[float]] = {name: [] for name in ways}
    for repeat in range(REPEATS + 1):
        for name, way in ways.items():
            speed = way(f"{name}-{repeat}-{secrets.token_hex(4)}")
            if repeat:
                speeds[name].append(speed)
    return {name: statistics.median(found) for name, found in speeds.items()}


def pull_into_bucket(workspace: Path, photos: Path, url: str) -> float:
    """Pull a folder into a bucket, in this process; return the seconds."""
    from visionloop.ingest.pull import pull
    from visionloop.params import FolderSource, load_params
    from visionloop.settings import load_settings
    from visionloop.store import open_store

    settings = load_settings({"VISIONLOOP_STORE": url}, make_ingest_workspace(workspace))
    source = FolderSource(kind="folder", path=str(photos))
    params = load_params(settings.params_path)
    started = time.perf_counter()
    pull(connect(settings, params, store=open_store(settings.store_url)), sources=[source], now="2026-01-01")
    return time.perf_counter() - started


def put_one_by_one(client: Any, paths: list[Path], run: str) -> float:
    """Read, hash, decode and put, one after the other; return the seconds."""
    import simplejpeg

    started = time.perf_counter()
    for path in paths:
        data = path.read_bytes()
        sha256 = hashlib.sha256(data).hexdigest()
        simplejpeg.decode_jpeg(data)
        client.put_object(Bucket=BUCKET, Key=f"{run}/{sha256}", Body=data)
    return time.perf_counter() - started


def put_by_threads(client: Any, images: list[bytes], run: str) -> float:
    """Put bytes from 64 threads, nothing else; return the seconds."""
    started = time.perf_counter()
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        list(
            pool.map(
                lambda one: client.put_object(Bucket=BUCKET, Key=f"{run}/{one[0]}", Body=one[1]), enumerate(images)
            )
        )
    return time.perf_counter() - started


def make_client() -> Any:
    """Return the client that a script would make, with a connection for each thread."""
    import boto3
    from botocore.config import Config

    return boto3.client("s3", config=Config(max_pool_connections=NUM_THREADS))


@contextlib.contextmanager
def run_server(delay_s: float) -> Iterator[str]:
    """Run the server in a process of its own; give its address."""
    command = [sys.executable, __file__, str(delay_s)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stdin=subprocess.PIPE, text=True) as process:
        assert process.stdout
        try:
            yield process.stdout.readline().strip()
        finally:
            process.terminate()


@contextlib.contextmanager
def set_environment(values: dict[str, str]) -> Iterator[None]:
    """Set variables for a while."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def serve(delay_s: float) -> None:
    """Run the server until the benchmark ends. Each request waits first, without blocking the others."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel("ERROR")
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    inner: Any = server._server
    app = inner.app

    def serve_late(environ: Any, start_response: Any) -> Iterable[bytes]:
        time.sleep(delay_s)
        answer: Iterable[bytes] = app(environ, start_response)
        return answer

    inner.app = serve_late
    host, port = server.get_host_and_port()
    print(f"http://{host}:{port}", flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    serve(float(sys.argv[1]))
