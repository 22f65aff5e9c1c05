"""A shadow on a real server: exact counts, a shadow that fails hurts no answer, and a stop frees it."""

import json
from pathlib import Path

import pytest

from fakes import make_bundle, make_image, run_here
from model_server import Server, promote, read_metric, serving, wait_for
from visionloop.bundle import load_bundle, upload_bundle
from visionloop.data.prediction_log import Order, read_order, read_predictions, read_shadow, write_order
from visionloop.predictor import Predictor
from visionloop.store import LocalStore

QUICK = {"poll_s": 0.1, "log_flush_s": 0.1, "keep_images": {"random": 1.0}}
RESTLESS = """
import visionloop.serving.shadow
visionloop.serving.shadow.DUTY = 1.0
"""
BROKEN = """
import numpy as np
from visionloop.predictor import Predictor
run, first = Predictor.run, []
def broken(self, images_nhwc):
    first.append(self.digest)
    if self.digest == first[0]:
        return run(self, images_nhwc)
    if len(images_nhwc) > 1:  # its golden images
        return run(self, images_nhwc)
    outputs = run(self, images_nhwc)
    if first.count(self.digest) % 2:
        raise RuntimeError("crashed")
    outputs.probs_nk[:] = np.nan
    return outputs
Predictor.run = broken
"""


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A workspace with a champion and a candidate, on one store."""
    promote(tmp_path, 1, None)
    make_bundle(tmp_path / "candidate", seed=2)
    (tmp_path / "params.yaml").write_text("name: fake\n")
    monkeypatch.setenv("VISIONLOOP_HOME", str(tmp_path))
    monkeypatch.setenv("VISIONLOOP_STORE", (tmp_path / "store").as_uri())
    return tmp_path


def ask(server: Server, seeds: range) -> list[str]:
    """Ask for images; return the ids of the answers."""
    answers = [server.ask(make_image(seed)) for seed in seeds]
    assert [answer.status for answer in answers] == [200] * len(seeds)
    return [answer.body["request_id"] for answer in answers]


def count_rows(home: Path) -> int:
    store = LocalStore(home / "store")
    order = read_order(store, "fake")
    assert order is not None
    return len(read_shadow(store, "fake", order))


def test_a_shadow_is_compared_with_the_champion_by_commands(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_here(monkeypatch, "shadow", "start", str(home / "candidate"), "--share", "1") == 0
    assert "is the shadow, for 100% of the answered images" in capsys.readouterr().out
    images = [make_image(seed) for seed in range(8)]
    champion, shadow = (Predictor.load(home / name, threads=1) for name in ("bundle-1", "candidate"))
    answers = [[each.prediction for each in one.predict(images)] for one in (champion, shadow)]
    pairs = list(zip(*answers, strict=True))
    with serving(home, first=RESTLESS, **QUICK) as server:
        wait_for(lambda: read_metric(server, "visionloop_shadow ") == 1)
        ids = ask(server, range(8))
        for request_id, (_, right) in zip(ids, pairs, strict=True):
            body = json.dumps({"request_id": request_id, "label": right}).encode()
            assert server.ask(body, "/feedback").status == 200
        wait_for(lambda: count_rows(home) == 8)
        assert run_here(monkeypatch, "shadow", "stop") == 0
        wait_for(lambda: read_metric(server, "visionloop_shadow ") == 0)
        wait_for(lambda: not (home / ".visionloop" / "shadow").exists())
        ask(server, range(10, 14))
        assert read_metric(server, 'visionloop_shadow_images_total{state="answered"}') == 8
        assert server.stop()[0] == 0
    assert count_rows(home) == 8, "a stopped shadow answers nothing"
    capsys.readouterr()
    assert run_here(monkeypatch, "shadow", "report", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    differ = [pair for pair in pairs if pair[0] != pair[1]]
    assert 0 < len(differ) < 8
    assert (found["num_failed"], found["num_images"], found["num_agreeing"]) == (0, 8, 8 - len(differ))
    assert sorted((one["champion"], one["shadow"]) for one in found["differences"]) == sorted(differ)
    assert all(one["is_kept"] for one in found["differences"])
    assert (found["labels"]["num_labels"], found["labels"]["shadow"]) == (8, 1.0)
    assert found["labels"]["only_shadow"] == len(differ)
    assert run_here(monkeypatch, "shadow", "report") == 0
    text = capsys.readouterr().out
    assert "of 8 images (95 %: " in text
    assert "labels        8: shadow 100.0% right" in text


def test_a_shadow_that_crashes_or_gives_nan_hurts_no_answer(home: Path) -> None:
    store = LocalStore(home / "store")
    upload_bundle(store, load_bundle(home / "candidate"))
    order = Order(load_bundle(home / "candidate").digest, 1.0, "2026-01-01T00:00:00Z", "t", "candidate")
    write_order(store, "fake", order)
    expected = Predictor.load(home / "bundle-1", threads=1).predict([make_image(3)])[0]
    with serving(home, first=RESTLESS + BROKEN, **QUICK) as server:
        wait_for(lambda: read_metric(server, "visionloop_shadow ") == 1)
        ask(server, range(12))
        wait_for(lambda: read_metric(server, "visionloop_shadow ") == 0)
        assert server.ask(make_image(3)).body["prediction"] == expected.prediction
        code, errors = server.stop()
    assert code == 0
    assert "the shadow failed 10 times in a row and is left alone" in errors
    rows = read_shadow(store, "fake", order).to_pylist()
    assert len(rows) == 10
    assert {row["prediction"] for row in rows} == {None}
    assert {row["problem"] for row in rows} == {"RuntimeError", "its probabilities are not finite"}
    assert len(read_predictions(store, "fake").table) == 13


def test_a_model_that_cannot_be_compared_is_refused(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make_bundle(home / "others", classes=("a", "b"))
    for arguments, said in [
        (("report",), "shadow of fake: there was none"),
        (("stop",), "there was none"),
        (("start", str(home / "bundle-1")), "is the champion"),
        (("start", "fake@champion"), "is the champion"),
        (("start", str(home / "others")), "is binary with 2 classes, and not all as the champion's"),
        (("start", str(home / "nothing")), "does not exist"),
        (("start", str(home / "candidate"), "--share", "0"), "--share: got 0; expected a number above 0, up to 1"),
    ]:
        assert run_here(monkeypatch, "shadow", *arguments) == 2
        assert said in capsys.readouterr().err
    assert read_order(LocalStore(home / "store"), "fake") is None


def test_a_report_without_answers_says_what_to_wait_for(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_here(monkeypatch, "shadow", "start", str(home / "candidate")) == 0
    assert run_here(monkeypatch, "shadow", "report") == 0
    assert "no answers to compare yet" in capsys.readouterr().out
    assert run_here(monkeypatch, "shadow", "stop") == 0
    assert run_here(monkeypatch, "shadow", "stop") == 0
    assert "was stopped" in capsys.readouterr().out
