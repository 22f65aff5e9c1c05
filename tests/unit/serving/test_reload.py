"""POST /admin/reload, and the figures of the ledger and of each step."""

import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest
from fastapi.testclient import TestClient
from prometheus_client.parser import text_string_to_metric_families

from model_server import promote
from visionloop.errors import StoreError
from visionloop.promotion.ledger import read_champion
from visionloop.serving import app as serving_app
from visionloop.serving.answers import Answer, Timing
from visionloop.serving.app import make_app
from visionloop.serving.metrics import MAX_LABELS, Meters
from visionloop.serving.swap import ChampionFollower, ModelSlot, ServedModel
from visionloop.store import LocalStore


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path


@pytest.fixture
def follower(home: Path) -> ChampionFollower:
    promote(home, 1, None)
    store = LocalStore(home / "store")
    follower = ChampionFollower(
        ModelSlot(),
        name="fake",
        find_champion=lambda: read_champion(store, "fake"),
        store=store,
        cache_dir=home / "cache",
        poll_s=3600,
    )
    follower.load_first()
    return follower


@pytest.fixture
def client(follower: ChampionFollower) -> Iterator[TestClient]:
    with TestClient(make_app(follower.slot, look_now=follower.look_now)) as client:
        yield client


def read_figures(client: TestClient) -> dict[str, float]:
    families = text_string_to_metric_families(client.get("/metrics").text)
    return {s.name: s.value for family in families for s in family.samples if not s.labels}


def test_reload_takes_up_a_promotion_at_once(client: TestClient, home: Path) -> None:
    first = client.post("/admin/reload").json()
    assert (first["entry"], first["swapped"], first["problem"]) == (1, False, None)
    promote(home, 2, read_champion(LocalStore(home / "store"), "fake"))
    assert client.get("/model").json()["entry"] == 1
    second = client.post("/admin/reload").json()
    assert (second["entry"], second["swapped"], second["model"]["version"]) == (2, True, "2")
    assert client.get("/model").json()["entry"] == 2


def test_reload_tries_a_refused_model_again(client: TestClient, home: Path, follower: ChampionFollower) -> None:
    entry = promote(home, 2, read_champion(LocalStore(home / "store"), "fake"))
    model = home / "store" / "bundles" / entry.bundle / "model.onnx"
    whole = model.read_bytes()
    model.write_bytes(whole[:-1])
    for _ in range(2):
        answer = client.post("/admin/reload").json()
        assert (answer["entry"], answer["swapped"]) == (1, False)
        assert answer["problem"].startswith("ledger entry 2 is not served")
    assert read_figures(client)["visionloop_refused_bundles_total"] == 2
    model.write_bytes(whole)
    assert client.post("/admin/reload").json()["entry"] == 2


def test_a_server_of_one_bundle_has_nothing_to_look_at(follower: ChampionFollower) -> None:
    with TestClient(make_app(follower.slot)) as client:
        answer = client.post("/admin/reload")
    assert (answer.status_code, answer.json()["code"]) == (409, "not_following")


def test_many_reloads_are_one_look_and_a_slow_store_holds_none(
    follower: ChampionFollower, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serving_app, "LOOK_S", 0.05)
    go_on, looks = threading.Event(), []

    def look_now() -> None:
        looks.append(1)
        assert go_on.wait(20)

    with TestClient(make_app(follower.slot, look_now=look_now)) as client:
        answers = [client.post("/admin/reload") for _ in range(3)]
        stopped_at = time.monotonic()
    assert time.monotonic() - stopped_at < 15, "the end of the server does not wait for the store"
    go_on.set()
    assert [(a.status_code, a.json()["code"]) for a in answers] == [(503, "slow_store")] * 3
    assert len(looks) == 1


def test_figures_tell_how_old_the_model_and_the_last_look_are(client: TestClient, follower: ChampionFollower) -> None:
    slot = follower.slot
    slot.looked_at = time.time() - 50
    assert slot.current
    two_hours_ago = (datetime.now(UTC) - timedelta(hours=2)).isoformat(timespec="seconds")
    slot.current = ServedModel(slot.current.predictor, "1", 1, two_hours_ago)
    figures = read_figures(client)
    assert figures["visionloop_ledger_age_seconds"] == pytest.approx(50, abs=5)
    assert figures["visionloop_model_age_seconds"] == pytest.approx(7200, abs=5)
    assert figures["process_resident_memory_bytes"] > 10_000_000
    slot.current = ServedModel(slot.current.predictor, "1", 1, "yesterday")
    slot.looked_at = None
    assert not {"visionloop_model_age_seconds", "visionloop_ledger_age_seconds"} & read_figures(client).keys()


def test_a_ledger_that_cannot_be_read_grows_old(follower: ChampionFollower, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise StoreError("store", "is away")

    before = follower.slot.looked_at
    assert before is not None
    monkeypatch.setattr(follower, "_find_champion", fail)
    follower.look_now()
    assert follower.slot.looked_at == before


def test_the_time_of_promotion_outlives_a_start_without_the_store(follower: ChampionFollower, home: Path) -> None:
    (home / "store" / "ledger").rename(home / "store" / "gone")

    def fail() -> None:
        raise StoreError("store", "is away")

    again = ChampionFollower(
        ModelSlot(),
        name="fake",
        find_champion=fail,
        store=LocalStore(home / "store"),
        cache_dir=home / "cache",
        poll_s=1,
    )
    again.load_first()
    assert again.slot.current and again.slot.current.promoted_at == "2026-01-01T00:00:00Z"


def make_answer(prediction: str = "cat", timing: Timing | None = None) -> Answer:
    timing = timing or Timing()
    return Answer(prediction, {}, 1.0, sha256="0", embedding_d=np.zeros(2, np.float32), size=(8, 8), timing=timing)


def test_each_step_of_an_image_is_measured() -> None:
    meters = Meters(ModelSlot(), lambda: 0)
    meters.count_answer(make_answer(timing=Timing(0.15, 0.003, 0.04)))
    meters.count_answer(make_answer(timing=Timing(1.0, 1.0, 1.0, is_cached=True)))
    sums = {
        s.labels["step"]: s.value
        for f in text_string_to_metric_families(meters.scrape().decode())
        for s in f.samples
        if s.name == "visionloop_image_seconds_sum"
    }
    assert sums == {"queue": 0.15, "decode": 0.003, "network": 0.04}


def test_models_with_many_classes_do_not_fill_the_memory_with_series() -> None:
    meters = Meters(ModelSlot(), lambda: 0)
    for i in range(MAX_LABELS + 50):
        meters.count_answer(make_answer(f"class {i}"))
    lines = [
        line for line in meters.scrape().decode().splitlines() if line.startswith("visionloop_predicted_images_total{")
    ]
    assert len(lines) == MAX_LABELS + 1
    assert 'visionloop_predicted_images_total{prediction="(other)"} 50.0' in lines


def test_a_server_that_has_served_nothing_has_figures_of_0(client: TestClient) -> None:
    """Prometheus sees a rise from 0, and none of a figure that begins with its first event."""
    text = client.get("/metrics").text
    for line in (
        'visionloop_requests_total{outcome="ok",status="200"} 0.0',
        *(f'visionloop_answered_images_total{{by="{by}"}} 0.0' for by in ("network", "cache")),
        *(f'visionloop_image_seconds_count{{step="{step}"}} 0.0' for step in ("queue", "decode", "network")),
        'visionloop_request_seconds_bucket{le="30.0"} 0.0',  # the longest deadline has a bucket
    ):
        assert line in text.splitlines()
    assert "_created" not in text
