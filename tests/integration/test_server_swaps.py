"""Models that change while clients ask: many good ones, and bad ones. With a server in its own process."""

import http.client
import json
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import psutil
import pytest

from fakes import make_bundle, make_image
from model_server import TIMEOUT_S, Server, promote, read_metric, serving, wait_for
from visionloop.bundle import load_bundle, seal_bundle, upload_bundle
from visionloop.predictor import Predictor
from visionloop.promotion.ledger import append_entry
from visionloop.records import LedgerEntry, canonical_json
from visionloop.store import LocalStore

CLIENTS = 4
FACTS = {"decision": None, "dataset": {}, "run_id": None, "by": "t", "why": "t", "at": "2026-01-01T00:00:00Z"}


def append(home: Path, after: LedgerEntry, digest: str, version: str) -> LedgerEntry:
    store = LocalStore(home / "store")
    return append_entry(store, "fake", after, action="promote", bundle=digest, model_version=version, **FACTS)


class Asked:
    """What the clients got: how long each answer took, and those that were no answer of the model they name."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.wrong: list[object] = []

    @property
    def median_s(self) -> float:
        return float(np.median(self.seconds))


def ask_on(
    server: Server, data: bytes, expected: dict[str, dict[str, float]], asked: Asked, done: Callable[[], bool]
) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=TIMEOUT_S)
    while not done():
        started = time.perf_counter()
        connection.request("POST", "/predict", data)
        response = connection.getresponse()
        body = json.loads(response.read())
        asked.seconds.append(time.perf_counter() - started)
        probabilities = expected.get(body.get("model", {}).get("digest"), {})
        if response.status != 200 or body["probabilities"] != pytest.approx(probabilities, abs=1e-5):
            asked.wrong.append((response.status, body))
    connection.close()


@contextmanager
def asking(server: Server, data: bytes, expected: dict[str, dict[str, float]]) -> Iterator[Asked]:
    """Let clients ask until the block ends."""
    asked, done = Asked(), threading.Event()
    with ThreadPoolExecutor(CLIENTS) as pool:
        calls = [pool.submit(ask_on, server, data, expected, asked, done.is_set) for _ in range(CLIENTS)]
        try:
            yield asked
        finally:
            done.set()
        for call in calls:
            call.result()


@pytest.mark.parametrize(
    ("num_swaps", "num_requests"), [(10, 1000), pytest.param(100, 10_000, marks=pytest.mark.long)], ids=["10", "100"]
)
def test_swaps_under_load_lose_nothing_and_every_answer_is_of_the_model_it_names(
    tmp_path: Path, num_swaps: int, num_requests: int
) -> None:
    data, store = make_image(0), LocalStore(tmp_path / "store")
    entry = promote(tmp_path, 0, None)
    digests = [entry.bundle, *(make_bundle(tmp_path / f"bundle-{seed}", seed=seed) for seed in (1, 2, 3))]
    expected = {}
    for seed, digest in enumerate(digests):
        bundle = load_bundle(tmp_path / f"bundle-{seed}")
        upload_bundle(store, bundle)
        expected[digest] = Predictor(bundle, threads=1).predict([data])[0].probabilities
    assert len({round(one["a"], 4) for one in expected.values()}) == 4
    with serving(tmp_path, poll_s=0.02, cache_mb=8, log_flush_s=0.5) as server:  # rows that wait are no leak
        with asking(server, data, expected) as calm:
            wait_for(lambda: len(calm.seconds) >= num_requests // 10)
        memory, process = [], psutil.Process(server.process.pid)
        with asking(server, data, expected) as asked:
            for number in range(1, num_swaps + 1):
                entry = append(tmp_path, entry, digests[number % 4], str(number))
                wait_for(lambda: read_metric(server, "visionloop_swaps_total") == number)  # noqa: B023
                wait_for(lambda: len(asked.seconds) >= num_requests * number // num_swaps)  # noqa: B023
                memory.append(process.memory_info().rss / 1e6)
        assert not asked.wrong, asked.wrong[:3]
        assert server.ask(path="/model").body["entry"] == num_swaps + 1
        assert read_metric(server, "visionloop_swap_failures_total") == 0
        code, errors = server.stop()
    assert code == 0
    assert f"serving entry {num_swaps + 1}, version {num_swaps}, bundle {entry.bundle[:12]}" in errors
    print(
        f"median {calm.median_s * 1000:.1f} ms, in swaps {asked.median_s * 1000:.1f} ms, {len(asked.seconds)} requests"
    )
    if num_swaps >= 100:
        late = np.array(memory[num_swaps // 2 :])
        growth = np.polyfit(np.arange(len(late)), late, 1)[0] * len(late)
        print(f"RSS {memory[0]:.0f} MB at first, {memory[-1]:.0f} MB at last; {growth:+.1f} MB in the second half")
        assert growth < 8
        assert asked.median_s < 5 * max(calm.median_s, 0.01)


# Bad ones: each spoils a copy of a good bundle, and returns its digest.


def set_schema(folder: Path, number: int) -> str:
    card = json.loads((folder / "card.json").read_bytes())
    (folder / "card.json").write_bytes(canonical_json({**card, "schema": 99 + number}))
    return seal_bundle(folder)


def set_weights(folder: Path, number: int, *, external: bool) -> str:
    """Put NaN into the weights, or let them be in another file."""
    import onnx

    model = onnx.load(folder / "model.onnx")
    weights = next(one for one in model.graph.initializer if one.name == "weights")
    if external:
        values = weights.raw_data
        (folder / "golden" / f"{number}.png").write_bytes(values)
        weights.ClearField("raw_data")
        weights.data_location = onnx.TensorProto.EXTERNAL
        weights.external_data.add(key="location", value=f"golden/{number}.png")
    else:
        values = np.frombuffer(weights.raw_data, np.float32).copy()
        values[number % len(values)] = np.nan
        weights.raw_data = values.tobytes()
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    return seal_bundle(folder)


def flip_byte(folder: Path, number: int) -> str:
    """Change one byte of a file and leave the table of digests as it is."""
    (folder / "golden" / f"note-{number}.png").write_bytes(make_image(number))
    digest = seal_bundle(folder)
    path = folder / ("model.onnx", "card.json", "reference.npz", "golden/0.png")[number % 4]
    content = bytearray(path.read_bytes())
    content[len(content) * (number + 1) // 60 % len(content)] ^= 1 << number % 8
    path.write_bytes(content)
    return digest


BAD = (
    ("schema", set_schema),
    ("golden answers|NaN|nan", lambda folder, number: set_weights(folder, number, external=False)),
    ("other files", lambda folder, number: set_weights(folder, number, external=True)),
    ("changed|whole|digest", flip_byte),
)


def put_bundle(home: Path, folder: Path, digest: str) -> None:
    """Upload a folder as it is, as a store that lost a byte, or another program, would have it."""
    for path in folder.rglob("*"):
        if path.is_file():
            LocalStore(home / "store").put(f"bundles/{digest}/{path.relative_to(folder).as_posix()}", path.read_bytes())


@pytest.mark.parametrize("number", [8, pytest.param(50, marks=pytest.mark.long)])
def test_no_bad_bundle_is_adopted_and_the_reason_is_told(tmp_path: Path, number: int) -> None:
    entry = promote(tmp_path, 0, None)
    good, data = entry.bundle, make_image(0)
    with serving(tmp_path, poll_s=0.02) as server:
        before = server.ask(data).body["probabilities"]
        for i in range(number):
            words, spoil = BAD[i % len(BAD)]
            folder = tmp_path / f"bad-{i}"
            shutil.copytree(tmp_path / "bundle-0", folder)
            digest = spoil(folder, i)
            put_bundle(tmp_path, folder, digest)
            entry = append(tmp_path, entry, digest, f"bad {i}")
            prefix = f"ledger entry {entry.number} is not served: "
            wait_for(lambda: (server.ask(path="/model").body["problem"] or "").startswith(prefix))  # noqa: B023
            problem = server.ask(path="/model").body["problem"]
            assert any(word in problem for word in words.split("|")), problem
            assert str(tmp_path) not in problem
            assert server.ask(data).body["probabilities"] == before
            assert read_metric(server, "visionloop_swap_failures_total") == i + 1
            assert read_metric(server, "visionloop_swap_problem") == 1
        assert server.ask(path="/model").body["digest"] == good
        append(tmp_path, entry, good, "good again")
        wait_for(lambda: server.ask(path="/model").body["problem"] is None)
        assert server.ask(path="/health/ready").status == 200
