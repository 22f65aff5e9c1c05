"""What a real server writes down, what of it survives a kill, and that pandas reads it as it lies."""

import http.client
import itertools
import json
import signal
import subprocess
import sys
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pandas as pd
import pytest

from fakes import make_bundle, make_image
from model_server import Server, serving, wait_for
from visionloop.data.prediction_log import (
    RequestCounts,
    join_feedback,
    make_request_id,
    read_feedback,
    read_predictions,
    read_requests,
)
from visionloop.monitoring.health import check_requests
from visionloop.params.loop import Monitor
from visionloop.store import LocalStore


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("log") / "bundle"
    make_bundle(folder)
    return folder


def say(server: Server, request_id: str, label: str) -> int:
    body = json.dumps({"request_id": request_id, "label": label}).encode()
    return server.ask(body, "/feedback", **{"Content-Type": "application/json"}).status


def test_answers_and_feedback_meet_and_pandas_reads_them_as_they_lie(bundle: Path, tmp_path: Path) -> None:
    """The example of docs/server.md."""
    with serving(tmp_path, bundle, log_flush_s=0.2, keep_images={"random": 1.0}) as server:
        answers = [server.ask(make_image(seed), **{"X-Request-ID": f"mine-{seed}"}).body for seed in range(3)]
        assert say(server, answers[1]["request_id"], "b") == 200
        assert server.ask(b"no image").status == 415
        store = LocalStore(tmp_path / "store")
        wait_for(lambda: len(read_predictions(store, "fake").table) == 3)  # without a stop: by time
        answers.append(server.ask(make_image(3)).body)
        assert server.stop() == (0, "")
    rows = read_predictions(store, "fake").table
    assert rows["request_id"].to_pylist() == [answer["request_id"] for answer in answers]
    assert rows["prediction"].to_pylist() == [answer["prediction"] for answer in answers]
    assert rows["client_request_id"].to_pylist() == ["mine-0", "mine-1", "mine-2", None]
    first = rows.to_pylist()[0]
    assert (first["width"], first["height"], first["num_bytes"]) == (32, 32, len(make_image(0)))
    assert 0 < first["brightness"] < 1
    assert 0 < first["network_ms"] + first["decode_ms"] <= first["total_ms"]
    assert len(list(store.list("kept/fake/"))) == 4
    joined = join_feedback(rows, read_feedback(store, "fake").table)
    assert joined["feedback_labels"].to_pylist() == [None, ["b"], None, None]

    frame = pd.read_parquet(tmp_path / "store" / "predictions" / "fake")
    said = pd.read_parquet(tmp_path / "store" / "feedback" / "fake")
    newest = said.sort_values("time").groupby("request_id").last()
    table = frame.merge(newest["labels"].rename("said"), on="request_id", how="left")
    assert sorted(table["date"].astype(str).unique()) == sorted({f"{time.date()}" for time in frame["time"]})
    assert [list(one) for one in table["said"].dropna()] == [["b"]]
    assert len(table["embedding"][0]) == 48


def test_what_was_refused_is_counted_for_monitor(bundle: Path, tmp_path: Path) -> None:
    """Refused requests have no row in the log of answers."""
    with serving(tmp_path, bundle, rate_per_s=0.01) as server:
        statuses = [server.ask(make_image(seed)).status for seed in range(8)]
        statuses.append(server.ask(b"no image").status)
        assert server.stop() == (0, "")
    assert statuses == [200] + 8 * [429]
    now = datetime.now(UTC)
    counts = read_requests(LocalStore(tmp_path / "store"), "fake", now - timedelta(hours=1), now)
    assert counts == RequestCounts(total=9, refused=8, errors=0)
    check = check_requests(counts, Monitor(), has_images=True)[0]
    assert (check.state, check.found) == ("alert", "8 of 9 requests were refused (429, 503)")


def test_a_trial_writes_nothing_down(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_text("name: fake\n")
    command = [sys.executable, "-m", "visionloop", "serve", "--check", str(bundle)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, "the server answers 4 golden images" in done.stdout) == (0, True), done.stderr
    assert not list(tmp_path.rglob("*.parquet"))


def take_until_killed(bundle: Path, home: Path, kills: int) -> list[str]:
    """Send feedback until the server is killed, again and again. Return the ids that it said it took."""
    promised: list[str] = []
    for number in range(kills):
        with serving(home, bundle, feedback_per_minute=1_000_000) as server:
            one = make_request_id(datetime.now(UTC).timestamp())
            assert say(server, one, "a") == 200
            promised.append(one)
            killer = threading.Timer(0.03 * (number % 7), server.process.kill)
            killer.start()
            for label in itertools.cycle("abc"):
                one = make_request_id(datetime.now(UTC).timestamp())
                try:
                    status = say(server, one, label)
                except (OSError, http.client.HTTPException) as exc:
                    assert server.process.wait(10) == -signal.SIGKILL, exc
                    break
                assert status == 200
                promised.append(one)
            killer.join()
    return promised


def find_lost(home: Path, promised: list[str]) -> set[str]:
    """Return what was said to be taken and is not in the store. No part there may be damaged."""
    stored = read_feedback(LocalStore(home / "store"), "fake")
    assert stored.damaged == ()
    return set(promised) - set(stored.table["request_id"].to_pylist())


@pytest.mark.parametrize("kills", [4, pytest.param(20, marks=pytest.mark.long)])
def test_no_feedback_that_was_taken_is_lost_when_the_server_is_killed(bundle: Path, tmp_path: Path, kills: int) -> None:
    promised = take_until_killed(bundle, tmp_path, kills)
    assert len(promised) > kills
    assert find_lost(tmp_path, promised) == set()


def test_what_a_killed_server_had_not_sent_is_sent_by_the_next(bundle: Path, tmp_path: Path) -> None:
    blocked = tmp_path / "store"
    blocked.write_text("no folder: the store is away")
    with serving(tmp_path, bundle, log_flush_s=0.1) as server:
        answer = server.ask(make_image(1)).body
        wait_for(lambda: any((tmp_path / ".visionloop" / "predictions").glob("*.parquet")))
        server.process.kill()
        server.process.wait()
    blocked.unlink()
    with serving(tmp_path, bundle, log_flush_s=0.1):
        wait_for(lambda: len(read_predictions(LocalStore(blocked), "fake").table) == 1)
    (row,) = read_predictions(LocalStore(blocked), "fake").table.to_pylist()
    assert (row["request_id"], row["prediction"]) == (answer["request_id"], answer["prediction"])
