"""The server against others: requests a second and the 99 % quantile, with 8 and with 32 clients.

The baselines: FastAPI with Pillow and eager torch; for ResNet18 also LitServe and BentoML, in an environment of their
own, with the same ONNX file as ours in fp32. Ours runs twice: in the fastest engine of this machine, int8 among them,
and in ONNX Runtime fp32. Weights are random: whether int8 answers alike is for `train` and `evaluate` to say. The
clients are a process of their own on the same machine; what they use of the processor is told. `alone` is what decoding
and the network reach without any server.
"""

import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from epoch import make_photos
from row import Row
from visionloop.bundle import INT8_MODEL, MODEL, load_bundle, seal_bundle
from visionloop.confidence import MOST_TOLERANCE
from visionloop.engines import open_fastest
from visionloop.lifetime import stop_process
from visionloop.predictor import ENGINES, FP32, Predictor
from visionloop.records import Card, canonical_json

SERVERS = Path(__file__).parent / "servers"
CLIENTS, SECONDS, START_S = (8, 32), 8.0, 120.0
NUM_IMAGES, NUM_CALIBRATION, NUM_REPEATED = 200, 32, 8  # the clients' first requests ask for all of the last
NETWORKS, OTHERS = ("resnet18", "mobilenet_v2"), ("litserve", "bentoml")


@dataclass(frozen=True)
class Load:
    """What clients saw of a server. `cpu_s`: what they used of the processor themselves."""

    rate: float
    p50_ms: float
    p99_ms: float
    wrong: int
    cpu_s: float


def bench_serving(bench_dir: Path, photos: Path | None, *, size_px: int, seconds: float = SECONDS) -> list[Row]:
    """Measure all servers, one after the other; `photos` holds train/CLASS/*.jpg, else synthetic JPEGs are made."""
    images = (photos or make_photos(bench_dir / "photos")) / "train"
    return [row for name in NETWORKS for row in bench_network(bench_dir / "serving", images, name, size_px, seconds)]


def bench_network(folder: Path, images: Path, name: str, size_px: int, seconds: float) -> list[Row]:
    """Measure the servers with one network."""
    folder.mkdir(parents=True, exist_ok=True)
    bundle, port = make_bundle(folder / name, name, images, size_px), find_port()
    alone = measure_alone(bundle, images, folder, seconds)
    ours = measure(run_visionloop(folder, bundle, port), port, images, seconds)
    plain = [sys.executable, str(SERVERS / "plain_server.py"), str(port), str(size_px), name]
    baselines = {"FastAPI, Pillow, torch": measure(run("FastAPI", plain, folder), port, images, seconds)}
    rows = make_rows(name, ours, baselines) + make_share_rows(name, ours, alone)
    in_fp32 = measure(run_visionloop(folder, bundle, port, runtime="onnxruntime"), port, images, seconds)
    for other in OTHERS if name == NETWORKS[0] else ():
        if (python := make_environment(folder / "others", other)) is not None:
            command, environ = make_command(other, python, port, size_px, bundle / MODEL)
            running = run(other, command, folder, environ)
            baselines[f"{other}, same ONNX"] = measure(running, port, images, seconds)
    rows += make_rows(f"{name} in fp32", in_fp32, baselines)
    if name == NETWORKS[0]:
        repeated = measure(run_visionloop(folder, bundle, port, cache_mb=64), port, images, seconds, NUM_REPEATED)
        rows += [Row(f"repeated, {n} clients", repeated[n].rate, ours[n].rate, "requests/s", "new") for n in CLIENTS]
    return rows


def make_rows(what: str, ours: Mapping[int, Load], baselines: Mapping[str, Mapping[int, Load]]) -> list[Row]:
    """Return rate and p99 against each baseline."""
    rows = []
    for clients in CLIENTS:
        for name, theirs in baselines.items():
            told, other = f"{what}, {clients} clients", theirs[clients]
            rows.append(Row(told, ours[clients].rate, other.rate, "requests/s", name))
            rows.append(Row(f"{told}: p99", ours[clients].p99_ms, other.p99_ms, "ms", name))
    return rows


def make_share_rows(what: str, ours: Mapping[int, Load], alone: float) -> list[Row]:
    """Return the share of what decoding and the network reach alone."""
    told = f"{what}, {{}} clients, of decoding and network alone"
    return [Row(told.format(n), ours[n].rate, alone, "images/s", "without a server") for n in CLIENTS]


def make_bundle(folder: Path, name: str, images: Path, size_px: int) -> Path:
    """Write a bundle of a network with random weights, once, with a graph in int8; every engine may serve it."""
    if (folder / "digests.json").is_file():
        return folder
    from visionloop.networks.backbones import make_backbone
    from visionloop.networks.classifier import Classifier
    from visionloop.networks.export import export_onnx, quantise

    shutil.rmtree(folder, ignore_errors=True)
    (folder / "golden").mkdir(parents=True)
    size_hw, classes = (size_px, size_px), ("dark", "light")
    network = Classifier(*make_backbone(name, size_hw), len(classes), task="binary").eval()
    export_onnx(network, size_hw, folder / MODEL)
    photos = [path.read_bytes() for path in sorted(images.rglob("*.jpg"))[:NUM_CALIBRATION]]
    card = Card(
        *("bench", "binary", classes, size_hw, "squash", 1.0, 0.5, ENGINES),
        dataset={"name": "bench", "version": 1, "digest": "0" * 64},
        params={},
        network={"backbone": name},
        parity=0.0,
        engines={engine: {"tolerance": MOST_TOLERANCE} for engine in ENGINES if engine != FP32},
    )
    (folder / "card.json").write_bytes(canonical_json(card.to_json()))
    np.savez(folder / "reference.npz", embedding_nd=np.zeros((8, network.num_features), np.float32))
    (folder / "golden" / "0.jpg").write_bytes(photos[0])
    write_answers(folder, [[0.0, 0.0]])
    seal_bundle(folder)
    predictor = Predictor(load_bundle(folder))
    quantise(folder / MODEL, folder / INT8_MODEL, [predictor.decode_golden(photos)])
    write_answers(folder, predictor.run(predictor.decode_golden(photos[:1])).logits_nk.tolist())
    seal_bundle(folder)
    return folder


def write_answers(folder: Path, logits_nk: Sequence[Sequence[float]]) -> None:
    """Write the answers to the golden image."""
    (folder / "golden" / "answers.json").write_text(json.dumps({"images": ["0.jpg"], "logits": logits_nk}))


def measure_alone(bundle: Path, images: Path, folder: Path, seconds: float) -> float:
    """Return the images a second of `predict_each` in the fastest engine: decoding on all cores, network in batches."""
    opened = open_fastest(load_bundle(bundle), ENGINES, hidden_dir=folder / ".visionloop")
    print(f"serving, {opened.why}", file=sys.stderr)
    data = [path.read_bytes() for path in sorted(images.rglob("*.jpg"))[:NUM_IMAGES]]
    list(opened.predictor.predict_each(data[:64]))
    started, number = time.perf_counter(), 0
    while time.perf_counter() - started < seconds:
        number += sum(1 for _ in opened.predictor.predict_each(data))
    return number / (time.perf_counter() - started)


def measure(running: Any, port: int, images: Path, seconds: float, number: int = NUM_IMAGES) -> dict[int, Load]:
    """Start a server, let clients ask it about so many images, and end it; return what they saw, by their number."""
    loads = {}
    with running as name:
        wait_until_answered(port, next(images.rglob("*.jpg")).read_bytes(), name)
        for clients in CLIENTS:
            asked = [str(each) for each in (port, clients, seconds, images, number)]
            command = [sys.executable, str(SERVERS / "client.py"), *asked]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            loads[clients] = load = Load(**json.loads(done.stdout))
            if not load.rate:
                raise RuntimeError(f"{name} answered none of {load.wrong:,} requests; see server.log")
            print(
                f"serving, {name}, {clients} clients: {load.rate:.1f}/s, p50 {load.p50_ms:.1f} ms, "
                f"p99 {load.p99_ms:.1f} ms, {load.wrong} not answered; clients used {load.cpu_s:.1f} s of a core",
                file=sys.stderr,
            )
    return loads


@contextmanager
def run(name: str, command: Sequence[str], folder: Path, environ: Mapping[str, str] | None = None) -> Iterator[str]:
    """Run a server in a process group of its own until the block ends."""
    with (folder / "server.log").open("w") as log:
        process = subprocess.Popen(
            command, cwd=SERVERS, env={**os.environ, **(environ or {})}, stdout=log, stderr=log, start_new_session=True
        )
        try:
            yield name
        finally:
            os.killpg(process.pid, signal.SIGTERM)
            stop_process(process)


def run_visionloop(folder: Path, bundle: Path, port: int, *, cache_mb: int = 0, runtime: str = "auto") -> Any:
    """Return our server, in a workspace of its own."""
    (folder / "params.yaml").write_text(
        f"name: bench\nserve: {{cache_mb: {cache_mb}, runtime: {runtime}, lame_duck_s: 0}}\n"
    )
    command = [sys.executable, "-m", "visionloop", "serve", "--port", str(port), "--bundle", str(bundle)]
    return run("visionloop", command, folder, {"VISIONLOOP_HOME": str(folder)})


def make_environment(folder: Path, name: str) -> Path | None:
    """Return the Python of an environment with this framework, made once; None, with a line, where it cannot be."""
    python = folder / name / "bin" / "python"
    uv = str(Path(sys.executable).with_name("uv"))
    try:
        if not (folder / name / "ready").is_file():
            packages = [name, "onnxruntime", "pillow", "numpy", "python-multipart"]
            for command in (
                [uv, "venv", "--quiet", "--clear", "--python", sys.executable, str(folder / name)],
                [uv, "pip", "install", "--quiet", "--python", str(python), *packages],
            ):
                subprocess.run(command, check=True, capture_output=True, text=True)
            (folder / name / "ready").touch()
    except (OSError, subprocess.CalledProcessError) as exc:
        reason = (getattr(exc, "stderr", None) or str(exc)).strip().splitlines()[-1]
        print(f"serving: {name} is left out: it cannot be installed here ({reason})", file=sys.stderr)
        return None
    return python


def make_command(
    name: str, python: Path, port: int, size_px: int, model: Path
) -> tuple[list[str], Mapping[str, str] | None]:
    """Return how this framework's server is started."""
    if name == "litserve":
        return [str(python), str(SERVERS / "litserve_server.py"), str(port), str(size_px), str(model)], None
    environ = {"BENCH_MODEL": str(model), "BENCH_PX": str(size_px), "BENTOML_DO_NOT_TRACK": "True"}
    options = ["--host", "127.0.0.1", "--port", str(port)]
    return [str(python), "-m", "bentoml", "serve", "bentoml_server:Classifier", *options], environ


def find_port() -> int:
    """Return a port that is free now."""
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return int(sock.getsockname()[1])


def wait_until_answered(port: int, data: bytes, name: str) -> None:
    """Ask until the server answers. Raises TimeoutError."""
    body = b'--b\r\nContent-Disposition: form-data; name="file"; filename="a.jpg"\r\n\r\n' + data + b"\r\n--b--\r\n"
    until = time.monotonic() + START_S
    while True:
        try:
            if post(port, body) == 200:
                return
        except OSError:
            pass
        if time.monotonic() > until:
            raise TimeoutError(f"{name} does not answer; see server.log")
        time.sleep(0.2)


def post(port: int, body: bytes) -> int:
    """Send a form; return the status of the answer."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    try:
        connection.request("POST", "/predict", body, {"Content-Type": "multipart/form-data; boundary=b"})
        return connection.getresponse().status
    finally:
        connection.close()
