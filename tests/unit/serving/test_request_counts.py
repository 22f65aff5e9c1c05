"""How many requests a server had, and refused, as it is written down for `visionloop monitor`."""

import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from visionloop.data.prediction_log import RequestCounts, expire_log, read_requests, tidy
from visionloop.errors import StoreError
from visionloop.params import Serve
from visionloop.serving.log import PredictionLog
from visionloop.store import LocalStore

DAY = timedelta(days=1)


def read(store: LocalStore) -> RequestCounts | None:
    return read_requests(store, "pets", datetime.now(UTC) - DAY, datetime.now(UTC) + DAY)


def test_requests_are_counted_every_few_minutes_and_wait_for_a_store_that_is_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("visionloop.serving.log.COUNTED_S", 0.1)
    store, spool = LocalStore(tmp_path / "store"), tmp_path / "spool"
    log = PredictionLog("pets", store, spool, Serve())
    log.start()
    for status in (200, 415, 429, 503, 500, 504, 0):
        log.count(status)
    deadline = time.monotonic() + 120
    while read(store) != RequestCounts(7, 2, 2):  # nothing was answered: there is no row of an answer
        assert time.monotonic() < deadline
        time.sleep(0.02)
    log.stop()

    def refuse() -> None:
        raise StoreError("store", "is away")

    away = PredictionLog("pets", store, spool, Serve(), check=refuse)
    away.start()
    away.count(503)
    away.stop()
    assert (read(store), away.num_dropped, len(list(spool.iterdir()))) == (RequestCounts(7, 2, 2), 0, 1)
    after = PredictionLog("pets", store, spool, Serve())
    after.start()
    after.stop()
    assert (read(store), list(spool.iterdir())) == (RequestCounts(8, 3, 2), [])


def test_counts_are_merged_and_expire_like_answers(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    for _ in range(3):
        log = PredictionLog("pets", store, tmp_path / "spool", Serve())
        log.start()
        log.count(429)
        log.stop()
    assert len(list(store.list("requests/pets/"))) == 3
    tomorrow = datetime.now(UTC) + DAY
    assert tidy(store, "pets", now=tomorrow, keep_days=None).num_merged == 3
    assert read(store) == RequestCounts(3, 3, 0)
    assert expire_log(store, "pets", now=tomorrow + DAY, keep_days=1) == 1
    assert read(store) is None
