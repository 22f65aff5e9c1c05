"""The prediction log of a server: rows, parts, the spool while the store is away, and what is dropped."""

import hashlib
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import visionloop.serving.log as module
from fakes import make_bundle, make_image
from visionloop.data.manifest import make_image_key
from visionloop.data.prediction_log import (
    PREDICTIONS,
    make_kept_key,
    make_request_id,
    read_kept_image,
    read_predictions,
)
from visionloop.data.tombstones import Forgetting, write_tombstones
from visionloop.errors import StoreError
from visionloop.evaluation.slices import measure_images
from visionloop.params import Serve
from visionloop.predictor import Predictor
from visionloop.records import Prediction
from visionloop.serving.answers import Answer, Timing
from visionloop.serving.log import Noted, PredictionLog, list_spool
from visionloop.serving.swap import ServedModel
from visionloop.store import LocalStore

NOW_S = datetime(2026, 11, 28, 12, tzinfo=UTC).timestamp()
TODAY = datetime.now(UTC).date()


class ShakyStore(LocalStore):
    """A store that is away while `is_away`."""

    is_away = False

    def _path(self, key: str) -> str:
        if self.is_away:
            raise StoreError("store", f"{self.url} is away", "it to be there")
        return super()._path(key)

    def list(self, prefix: str, after: str = "") -> Iterator[str]:
        if self.is_away:
            raise StoreError("store", f"{self.url} is away", "it to be there")
        return super().list(prefix, after)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ServedModel:
    folder = tmp_path_factory.mktemp("log") / "bundle"
    make_bundle(folder)
    return ServedModel(Predictor.load(folder, threads=1), version="7", entry=3)


@pytest.fixture
def store(tmp_path: Path) -> ShakyStore:
    return ShakyStore(tmp_path / "store")


def make_noted(model: ServedModel, seed: int = 0, *, at_s: float | None = None, **changes: Any) -> Noted:
    at_s = time.time() if at_s is None else at_s
    data = make_image(seed, size_hw=(40, 48))
    [prediction] = model.predictor.predict([data])
    embedding_d = np.linspace(0, 1, 48, dtype=np.float32)
    answer = Answer(**vars(prediction), sha256=_hash(data), embedding_d=embedding_d, size=(48, 40), **changes)
    return Noted(make_request_id(at_s), at_s, model, data, answer, 12.5, "mine", "kiosk")


@contextmanager
def logging_to(store: LocalStore, spool: Path, **serve: Any) -> Iterator[PredictionLog]:
    params = Serve.model_validate({"log_flush_s": 0.05, "log_days": None, **serve})
    log = PredictionLog("pets", store, spool, params, draw=random.Random(0))
    log.start()
    try:
        yield log
    finally:
        log.stop()


def wait_for(claim: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not claim():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def read_rows(store: LocalStore) -> list[dict[str, Any]]:
    return list(read_predictions(store, "pets").table.to_pylist())


def test_an_answer_becomes_a_row_with_all_that_is_known(store: ShakyStore, tmp_path: Path, model: ServedModel) -> None:
    noted = make_noted(
        model, at_s=NOW_S, timing=Timing(0.001, 0.002, 0.004), quality={"brightness": 0.5}, distance=0.25
    )
    with logging_to(store, tmp_path / "spool", log_top_k=2) as log:
        log.note(noted)
    [row] = read_rows(store)
    names = sorted(noted.answer.probabilities, key=lambda name: -noted.answer.probabilities[name])
    assert row.pop("embedding") == pytest.approx(noted.answer.embedding_d.tolist(), rel=2**-11)
    assert row.pop("probs") == pytest.approx([noted.answer.probabilities[name] for name in names[:2]])
    assert row == {
        "request_id": noted.request_id,
        "time": datetime(2026, 11, 28, 12, tzinfo=UTC),
        "client_request_id": "mine",
        "client": "kiosk",
        "image_sha256": _hash(noted.data),
        "model_name": "fake",
        "model_version": "7",
        "model_digest": model.digest,
        "model_engine": "onnxruntime fp32",
        "task": "multiclass",
        "classes": names[:2],
        "prediction": names[0],
        "labels": None,
        "confidence": pytest.approx(noted.answer.confidence),
        "abstained": False,
        "abstain_reason": None,
        "distance": 0.25,
        "queue_ms": 1.0,
        "decode_ms": 2.0,
        "network_ms": 4.0,
        "total_ms": 12.5,
        "cached": False,
        "brightness": 0.5,
        "contrast": None,
        "sharpness": None,
        "width": 48,
        "height": 40,
        "num_bytes": len(noted.data),
        "image_kept": False,
        "keep_probability": 0.0,
        "keep_reason": None,
    }
    assert (log.num_noted, log.num_dropped, log.num_sent, log.num_spool_bytes) == (1, 0, 1, 0)


def test_several_labels_and_a_doubt_are_written_down(store: ShakyStore, tmp_path: Path, model: ServedModel) -> None:
    noted = make_noted(model)
    several = Prediction("a|c", {"a": 0.9, "b": 0.2, "c": 0.8}, 0.6, ("a", "c"), "confidence 0.60 < 0.80")
    noted = replace(noted, answer=replace(noted.answer, **vars(several), timing=Timing(is_cached=True)))
    with logging_to(store, tmp_path / "spool", log_embeddings=0.0) as log:
        log.note(noted)
    [row] = read_rows(store)
    assert (row["prediction"], row["labels"], row["classes"]) == ("a|c", ["a", "c"], ["a", "c", "b"])
    assert (row["abstained"], row["abstain_reason"], row["cached"]) == (True, "confidence 0.60 < 0.80", True)
    assert (row["embedding"], row["queue_ms"]) == (None, 0.0)


def test_rows_of_two_days_go_into_two_parts(store: ShakyStore, tmp_path: Path, model: ServedModel) -> None:
    with logging_to(store, tmp_path / "spool", log_flush_s=60) as log:
        for hour in (23.9, 24.1):
            log.note(make_noted(model, at_s=NOW_S + (hour - 12) * 3600))
    days = [key.split("/")[2] for key in store.list("predictions/pets/")]
    assert days == ["date=2026-11-28", "date=2026-11-29"]


def test_a_part_is_written_when_its_time_has_come(store: ShakyStore, tmp_path: Path, model: ServedModel) -> None:
    with logging_to(store, tmp_path / "spool") as log:
        log.note(make_noted(model))
        wait_for(lambda: log.num_sent == 1)
        log.note(make_noted(model, 1))
        wait_for(lambda: log.num_sent == 2)
        assert len(read_rows(store)) == 2


def test_while_the_store_is_away_the_parts_wait_on_the_disk(
    store: ShakyStore, tmp_path: Path, model: ServedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "RETRY_S", 0.05)
    store.is_away = True
    with logging_to(store, tmp_path / "spool") as log:
        log.note(make_noted(model))
        wait_for(lambda: bool(log.problem and list_spool(tmp_path / "spool")))
        assert log.problem == "the store cannot be written: the store is away"
        store.is_away = False
        wait_for(lambda: log.num_sent == 1)
        assert log.problem is None
    assert (len(read_rows(store)), list_spool(tmp_path / "spool")) == (1, [])


def test_what_a_server_left_in_the_spool_is_sent_by_the_next(
    store: ShakyStore, tmp_path: Path, model: ServedModel
) -> None:
    store.is_away = True
    with logging_to(store, tmp_path / "spool") as log:
        log.note(make_noted(model))
    assert (log.num_sent, len(list_spool(tmp_path / "spool"))) == (0, 1)
    (tmp_path / "spool" / "notes.txt").write_text("a stranger's")
    (tmp_path / "spool" / PREDICTIONS.make_key("pets", TODAY, "cut-off").replace("/", "+")).write_bytes(b"PAR1")
    store.is_away = False
    with logging_to(store, tmp_path / "spool") as log:
        wait_for(lambda: log.num_sent == 1)
    assert len(read_rows(store)) == 1
    assert [path.name for path in (tmp_path / "spool").iterdir()] == ["notes.txt"]


def test_nothing_is_sent_to_a_store_that_is_not_the_known_one(
    store: ShakyStore, tmp_path: Path, model: ServedModel
) -> None:
    def refuse() -> None:
        raise StoreError("store", "does not hold dataset pets version 3")

    log = PredictionLog("pets", store, tmp_path / "spool", Serve(), check=refuse)
    log.start()
    log.note(make_noted(model))
    log.stop()
    assert log.problem == "the store cannot be written: does not hold dataset pets version 3"
    assert (len(list_spool(tmp_path / "spool")), store.root.exists()) == (1, False)


@pytest.mark.parametrize("is_known", [True, False], ids=["without-a-ledger", "with-a-ledger"])
def test_a_store_that_is_moved_away_gets_all_when_it_is_back_and_is_not_made_anew(
    tmp_path: Path, model: ServedModel, monkeypatch: pytest.MonkeyPatch, is_known: bool
) -> None:
    monkeypatch.setattr(module, "RETRY_S", 0.05)
    store = LocalStore(tmp_path / "store")
    store.put("ledger/pets/000001.json", b"{}")

    def check() -> None:
        if not is_known and not store.exists("ledger/pets/000001.json"):
            raise StoreError("store", "does not hold ledger entry 1")

    serve = Serve.model_validate({"log_flush_s": 0.05, "keep_images": {"random": 1.0}})
    log, spool = PredictionLog("pets", store, tmp_path / "spool", serve, check=check), tmp_path / "spool"
    log.start()
    log.note(make_noted(model))
    wait_for(lambda: log.num_sent == 1)
    store.root.rename(tmp_path / "moved")
    log.note(make_noted(model, 1))
    wait_for(lambda: bool(log.problem and len(list_spool(spool)) == 2))
    assert not store.root.exists()
    if not is_known:
        store.root.mkdir()  # what it was mounted on
        time.sleep(0.2)
        assert list(store.root.iterdir()) == []
        store.root.rmdir()
    (tmp_path / "moved").rename(store.root)
    wait_for(lambda: log.num_sent == 2)
    log.stop()
    assert (len(read_rows(store)), len(list(store.list("kept/"))), list_spool(spool)) == (2, 2, [])


def test_a_full_spool_drops_and_counts(
    store: ShakyStore, tmp_path: Path, model: ServedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_SPOOL_BYTES", 20_000)
    store.is_away = True
    with logging_to(store, tmp_path / "spool", log_flush_s=0.001) as log:
        for seed in range(4):
            log.note(make_noted(model, seed))
            wait_for(lambda seed=seed: log.num_dropped + len(list_spool(tmp_path / "spool")) == seed + 1)
        assert sum(path.stat().st_size for path in list_spool(tmp_path / "spool")) <= 20_000
        assert log.num_dropped > 0


def test_what_an_earlier_server_left_counts_while_the_store_is_away(
    store: ShakyStore, tmp_path: Path, model: ServedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.is_away = True
    with logging_to(store, tmp_path / "spool") as log:
        log.note(make_noted(model))
    [left] = list_spool(tmp_path / "spool")
    monkeypatch.setattr(module, "MAX_SPOOL_BYTES", left.stat().st_size + 10)
    with logging_to(store, tmp_path / "spool") as log:
        log.note(make_noted(model, 1))
        wait_for(lambda: log.num_dropped == 1)
    assert list_spool(tmp_path / "spool") == [left]


def test_with_no_disk_answers_are_dropped_and_the_log_goes_on(
    store: ShakyStore, tmp_path: Path, model: ServedModel
) -> None:
    (tmp_path / "spool").write_text("a file where the folder should be")
    with logging_to(store, tmp_path / "spool") as log:
        log.note(make_noted(model))
        wait_for(lambda: log.num_dropped == 1)
        assert log.problem == "answers are not written down: File exists"
        (tmp_path / "spool").unlink()
        log.note(make_noted(model))
        wait_for(lambda: log.num_sent == 1)
        assert log.problem is None


def test_what_does_not_fit_into_memory_is_dropped_and_counted(
    store: ShakyStore, tmp_path: Path, model: ServedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_NOTED", 3)
    log = PredictionLog("pets", store, tmp_path / "spool", Serve())
    for _ in range(5):
        log.note(make_noted(model))
    assert (log.num_noted, log.num_dropped) == (5, 2)
    monkeypatch.setattr(module, "MAX_NOTED", 100)
    monkeypatch.setattr(module, "MAX_NOTED_BYTES", 1)
    log.note(make_noted(model))
    assert log.num_dropped == 3


def test_kept_images_are_in_the_store_once_and_their_rows_say_so(
    store: ShakyStore, tmp_path: Path, model: ServedModel
) -> None:
    first, second = make_noted(model, 1), make_noted(model, 2)
    store.put(make_image_key(_hash(second.data)), second.data)
    with logging_to(store, tmp_path / "spool", keep_images={"random": 1.0}) as log:
        for noted in (first, first, second):
            log.note(noted)
    rows = read_rows(store)
    assert [(row["image_kept"], row["keep_probability"], row["keep_reason"]) for row in rows] == [
        (True, 1.0, "random")
    ] * 3
    day = rows[0]["time"].date()
    assert list(store.list("kept/")) == [make_kept_key("pets", day, _hash(first.data))]
    for noted in (first, second):
        assert read_kept_image(store, "pets", day, _hash(noted.data)) == noted.data
    assert log.num_kept == 3


def test_an_image_that_was_to_be_kept_and_is_lost_has_no_probability(
    store: ShakyStore, tmp_path: Path, model: ServedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = PredictionLog("pets", store, tmp_path / "spool", Serve.model_validate({"keep_images": {"random": 1.0}}))
    monkeypatch.setattr(module, "MAX_SPOOL_BYTES", 10)
    log.note(make_noted(model))
    log._drain(is_last=False)
    assert [(row["image_kept"], row["keep_probability"]) for row in log._rows] == [(False, None)]


def test_forgotten_images_are_neither_kept_nor_written_down(
    store: ShakyStore, tmp_path: Path, model: ServedModel
) -> None:
    gone, stays = make_noted(model, 1), make_noted(model, 2)
    write_tombstones(store, "pets", Forgetting((_hash(gone.data),), "now", "me", "asked"))
    with logging_to(store, tmp_path / "spool", keep_images={"random": 1.0}) as log:
        for noted in (gone, stays):
            log.note(noted)
    assert [row["request_id"] for row in read_rows(store)] == [stays.request_id]
    assert [key.rpartition("/")[2] for key in store.list("kept/")] == [_hash(stays.data)]


def test_what_was_forgotten_while_it_waited_in_the_spool_is_not_sent(
    store: ShakyStore, tmp_path: Path, model: ServedModel
) -> None:
    gone = make_noted(model, 1)
    store.is_away = True
    with logging_to(store, tmp_path / "spool", keep_images={"random": 1.0}) as log:
        log.note(gone)
    assert len(list_spool(tmp_path / "spool")) == 2
    store.is_away = False
    write_tombstones(store, "pets", Forgetting((_hash(gone.data),), "now", "me", "asked"))
    with logging_to(store, tmp_path / "spool"):
        wait_for(lambda: not list_spool(tmp_path / "spool"))
    assert [*store.list("kept/"), *store.list("predictions/")] == []


def test_what_is_forgotten_while_the_server_runs_is_not_sent(
    store: ShakyStore, tmp_path: Path, model: ServedModel
) -> None:
    first, gone, last = (make_noted(model, seed) for seed in range(3))
    with logging_to(store, tmp_path / "spool") as log:
        log.note(first)
        wait_for(lambda: log.num_sent == 1)
        write_tombstones(store, "pets", Forgetting((_hash(gone.data),), "now", "me", "asked"))
        log.note(gone)
        log.note(last)
        wait_for(lambda: log.num_sent == 2)
    assert {row["request_id"] for row in read_rows(store)} == {first.request_id, last.request_id}


def test_what_is_too_old_goes_when_a_server_starts(store: ShakyStore, tmp_path: Path) -> None:
    for days in (1, 3):
        time_ = datetime.now(UTC) - timedelta(days=days)
        rows = PREDICTIONS.encode([{"request_id": f"{days} days old", "time": time_}])
        store.put(PREDICTIONS.make_key("pets", time_.date(), "1"), rows)
    with logging_to(store, tmp_path / "spool", log_days=2):
        wait_for(lambda: len(read_rows(store)) == 1)
    assert [row["request_id"] for row in read_rows(store)] == ["1 days old"]


def test_only_so_many_images_a_second_are_measured(store: ShakyStore, tmp_path: Path) -> None:
    log = PredictionLog("pets", store, tmp_path / "spool", Serve())
    image_hwc = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    expected = {name: value_n[0] for name, value_n in measure_images(image_hwc[None]).items()}
    assert log.measure(image_hwc) == expected
    assert log.measure(image_hwc) is None
    time.sleep(0.05)
    assert log.measure(image_hwc) == expected


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
