"""Windows of a real prediction log in a real store, from the first day of a champion to drift, and broken data."""

import json
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fakes import run_here
from http_server import Answer, serve
from visionloop.data.prediction_log import PREDICTIONS
from visionloop.errors import BundleError, DatasetError
from visionloop.forget.copies import find_pages, find_windows
from visionloop.monitoring.judge import Verdict, describe_verdict
from visionloop.monitoring.watch import (
    accept_window,
    load_verdict,
    watch_window,
    write_copies,
)
from visionloop.params import make_params
from visionloop.promotion.ledger import read_champion
from watched import CLASSES, FIRST, HOURS, PER_HOUR, Watched, at_end_of, find_check, make_watched, watch


def read_parquet(watched: Watched, verdict: Verdict, name: str) -> list[dict[str, object]]:
    data = watched.place.store.get(f"monitoring/fake/{verdict.window}/{name}.parquet")
    return pq.read_table(pa.BufferReader(data)).to_pylist()


def read_report(watched: Watched, verdict: Verdict) -> str:
    return watched.place.store.get(f"monitoring/fake/{verdict.window}/report.html").decode()


@pytest.fixture
def watched(tmp_path: Path) -> Watched:
    return make_watched(tmp_path)


@pytest.fixture(scope="module")
def settled(tmp_path_factory: pytest.TempPathFactory) -> Watched:
    """Three days that were judged, and are like each other."""
    watched = make_watched(tmp_path_factory.mktemp("settled"), reference_windows=2)
    for number in range(3):
        watched.write_day(number)
        watch(watched, number)
    return watched


def test_first_window_is_compared_with_the_validation_side_and_later_ones_with_it(settled: Watched) -> None:
    first, second, third = (load_verdict(settled.place, f"2026030{day}T0000") for day in (2, 3, 4))
    assert first and second and third
    assert (first.verdict, first.reference, first.num_images) == ("fine", (), HOURS * PER_HOUR)
    assert (second.verdict, second.reference) == ("fine", ("20260302T0000",))
    assert third.reference == ("20260302T0000", "20260303T0000")
    assert third.expected_is_trusted
    assert third.p is not None and third.p > 0.01
    assert (third.level, third.bundle) == (0.01, settled.digest)
    assert find_check(third, "alias")["state"] == "fine"
    assert find_check(third, "same_picture")["value"] == pytest.approx(1 / 192)


def test_drifted_day_is_found_told_and_can_be_accepted(settled: Watched) -> None:
    rows = settled.write_day(3, shift=np.r_[0.0, 0.0, 3.0, np.zeros(45)])
    settled.keep(3, rows[:60], 0.25)
    settled.write_rows(FIRST + timedelta(days=3), rows)
    verdict, is_new = watch_window(settled.place, now=at_end_of(3))
    assert is_new
    assert verdict.verdict == "drift"
    assert verdict.p is not None and verdict.p <= 0.01
    assert not verdict.expected_is_trusted
    assert {"drift", "classifier", "classes"} <= {check["name"] for check in verdict.list_alerts()}
    shares = read_parquet(settled, verdict, "classes")
    assert shares[0]["name"] == "<b>cat</b>"
    assert shares[0]["low"] > shares[0]["before"]
    images = read_parquet(settled, verdict, "images")
    assert len(images) == 24
    assert [one["distance"] for one in images] == sorted((one["distance"] for one in images), reverse=True)
    assert {row["name"] for row in read_parquet(settled, verdict, "checks")} == {c["name"] for c in verdict.checks}
    page = read_report(settled, verdict)
    assert "Drift: the images are not like those before" in page
    assert page.count("data:image/") >= 2
    assert "&lt;b&gt;cat&lt;/b&gt;" in page and "<b>cat</b>" not in page
    assert "http" not in page.replace("http-equiv", "")
    assert watch_window(settled.place, now=at_end_of(3)) == (verdict, False)

    settled.write_day(4)
    assert watch(settled, 4).reference == ("20260302T0000", "20260303T0000", "20260304T0000")
    accept_window(settled.place, verdict.window, by="ann", why="winter", now="2026-03-06T10:00:00Z")
    assert verdict.window in watch(settled, 4, again=True).reference


def test_forgotten_image_goes_from_pages_and_lists(watched: Watched) -> None:
    watched.write_day(0)
    verdict = watch(watched, 0)
    store, shown = watched.place.store, str(read_parquet(watched, verdict, "images")[0]["image_sha256"])
    assert find_windows(store, "fake", frozenset({"0" * 64})) == []
    assert write_copies(watched.place, verdict) is not None
    (pages,) = find_pages(watched.place.settings, frozenset({shown}))
    assert pages.what == "monitoring/: 2 pages with pictures"
    pages.remove()
    assert list((watched.place.settings.home / "monitoring").iterdir()) == []
    (copy,) = find_windows(store, "fake", frozenset({shown}))
    assert copy.what.startswith("1 page of watched windows in file://")
    copy.remove()
    left = {key.rpartition("/")[2] for key in store.list("monitoring/fake/")}
    assert left == {"checks.parquet", "classes.parquet", "verdict.json"}
    assert write_copies(watched.place, verdict) is None


def test_expired_windows_are_no_reference_and_the_next_take_their_place(tmp_path: Path) -> None:
    """The server keeps rows for some days; what it has removed can be compared with nothing."""
    watched = make_watched(tmp_path, reference_windows=1)
    for number in range(4):
        watched.write_day(number)
        verdict = watch(watched, number)
    assert verdict.reference == ("20260302T0000", "20260304T0000")
    watched.place.store.delete(PREDICTIONS.make_key("fake", FIRST, "part"))
    assert watch(watched, 3, again=True).reference == ("20260303T0000", "20260304T0000")


def test_windows_of_another_length_are_others(tmp_path: Path) -> None:
    """`window_hours` was changed: a window may have the name of another, and has other volumes."""
    watched = make_watched(tmp_path, window_hours=12, reference_windows=3)
    for number in range(3):
        watched.write_day(number)
        for hour in (12, 24):
            watch_window(watched.place, now=at_end_of(number - 1) + timedelta(hours=hour))
    store = watched.place.store
    store.put("monitoring/fake/20260302T0000-old/verdict.json", store.get("monitoring/fake/20260302T0000/verdict.json"))
    longer = {"name": "fake", "monitor": {"reference_windows": 3}}
    watched.place = replace(watched.place, params=make_params(longer))
    day, is_new = watch_window(watched.place, now=at_end_of(0))
    assert (is_new, day.num_images) == (True, 192), "the one that was judged was of half a day"
    watched.write_day(3)
    after = watch(watched, 3)
    assert after.num_images == 192
    assert find_check(after, "volume")["state"] == "unknown", "one window of a day was before it"
    assert len(set(after.reference)) == len(after.reference) == 6


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"image_sha256": "0" * 64, "brightness": None}, "same_picture"),
        ({"brightness": 0.5, "contrast": 0.2, "sharpness": 0.01}, "same_picture"),
        ({"client": "gate"}, "one_client"),
        ({"width": 480, "height": 640}, "size"),
        ({"contrast": 0.001}, "blank"),
    ],
)
def test_broken_data_is_no_drift(settled: Watched, change: dict[str, object], name: str) -> None:
    settled.write_day(10, shift=2.0, **change)
    verdict = watch(settled, 10, again=True)
    assert verdict.verdict == "broken"
    assert find_check(verdict, name)["state"] == "alert"
    assert (verdict.p, verdict.expected_is_trusted) == (None, False)
    assert find_check(verdict, "drift")["found"] == "not looked for: the data is broken"


def test_empty_window_and_swapped_colours_are_broken(tmp_path: Path) -> None:
    watched = make_watched(tmp_path)
    for number, swap in ((0, False), (1, True)):
        rows = watched.write_day(number)
        watched.keep(number, rows[:20], 0.1, swap=swap)
        watched.write_rows(FIRST + timedelta(days=number), rows)
    assert watch(watched, 0).verdict == "fine"
    swapped = watch(watched, 1)
    assert (swapped.verdict, find_check(swapped, "colours")["state"]) == ("broken", "alert")
    empty = watch(watched, 2)
    assert (empty.verdict, empty.num_images) == ("broken", 0)
    assert find_check(empty, "empty")["state"] == "alert"
    assert "no image in the window" in read_report(watched, empty)


def test_windows_before_the_first_image_are_learning_and_say_nothing_of_the_usual_volume(tmp_path: Path) -> None:
    """On a new install the last full day lies before the promotion: no fault, and nothing that holds a retrain back."""
    watched = make_watched(tmp_path)
    early = [watch(watched, number) for number in range(-2, 2)]  # without a log, before and after the promotion
    watched.write_day(2)
    early.append(watch(watched, 0, again=True))  # with a log that begins later
    assert {one.verdict for one in early} == {"learning"}
    assert "nothing was served yet" in str(find_check(early[-1], "empty")["found"])
    first = watch(watched, 2)
    assert (first.verdict, find_check(first, "volume")["state"]) == ("fine", "unknown")
    assert watch(watched, 3).verdict == "broken"
    watched.place.store.delete(PREDICTIONS.make_key("fake", FIRST + timedelta(days=2), "part"))
    assert watch(watched, 4).verdict == "broken", "the log has expired, but there were images"


def test_labels_that_come_late_tell_that_the_model_is_bad(watched: Watched) -> None:
    rows = watched.write_day(0)
    watched.keep(0, rows[:150], 0.5)
    rows[160]["keep_probability"] = 0.5  # it was not kept; somebody labels it all the same
    watched.write_rows(FIRST, rows)
    assert find_check(watch(watched, 0), "accuracy")["state"] == "unknown"
    wrong = {row["request_id"]: CLASSES[0] if row["prediction"] != CLASSES[0] else CLASSES[1] for row in rows[:40]}
    watched.label(
        2,
        wrong
        | {row["request_id"]: row["prediction"] for row in rows[40:80]}
        | {"nobody's": "ant"}
        | {rows[160]["request_id"]: "ant"},
    )
    verdict = watch(watched, 0, again=True)
    assert verdict.verdict == "quality"
    assert verdict.num_labels == 80
    assert verdict.labelled_accuracy is not None
    assert verdict.labelled_accuracy["value"] == pytest.approx(0.5)
    assert verdict.labelled_accuracy["low"] < 0.5 < verdict.labelled_accuracy["high"] < 0.8


def test_service_is_watched_too(tmp_path: Path) -> None:
    watched = make_watched(tmp_path, max_latency_ms=100, max_model_age_days=2)
    for number in range(4):
        watched.write_day(number, per_hour=8 if number < 3 else 60, total_ms=20.0 if number < 3 else 200.0)
        verdict = watch(watched, number)
    watched.place.tracking.champion = "7"  # type: ignore[attr-defined]
    verdict = watch(watched, 3, again=True)
    assert verdict.verdict == "service"
    assert {check["name"] for check in verdict.list_alerts()} == {"volume", "latency", "model_age", "alias"}
    watched.place.tracking.down = True  # type: ignore[attr-defined]
    assert find_check(watch(watched, 3, again=True), "alias")["state"] == "unknown"
    watched.write_day(4, model_digest="0" * 64)
    other = watch(watched, 4)
    assert find_check(other, "served_model")["state"] == "alert"
    assert (other.num_images, find_check(other, "drift")["state"]) == (0, "unknown")


def test_log_that_cannot_be_believed(watched: Watched) -> None:
    """A damaged part, embeddings of another length, numbers that are none, names that are markup or missing."""
    rows = watched.write_day(0, client=None, confidence=float("nan"), prediction="<script>alert(1)</script>")
    for row in rows[:100]:
        row["embedding"] = [1.0]
    watched.write_rows(FIRST, rows)
    verdict = watch(watched, 0)
    assert find_check(verdict, "embeddings")["state"] == "unknown"
    assert find_check(verdict, "one_client")["state"] == "unknown"
    assert "<script>alert" not in read_report(watched, verdict)
    assert describe_verdict(verdict)[-1] == f"verdict: {verdict.verdict}"
    watched.place.store.put(PREDICTIONS.make_key("fake", FIRST, "other"), b"PAR1 no")
    damaged = watch(watched, 0, again=True)
    assert damaged.verdict == "broken"
    assert damaged.damaged == ("predictions/fake/date=2026-03-02/other.parquet",)


def test_few_images_teach_nothing_and_are_no_reference(watched: Watched) -> None:
    watched.write_day(0, per_hour=1)
    few = watch(watched, 0)
    assert few.verdict == "learning"
    assert "24 images are too few" in str(find_check(few, "drift")["found"])
    watched.write_day(1)
    assert watch(watched, 1).reference == ()


def test_what_is_missing_is_told(watched: Watched, tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="which is to come"):
        watch_window(watched.place, now=at_end_of(0), at=at_end_of(3))
    with pytest.raises(DatasetError, match="was not judged"):
        accept_window(watched.place, "20260302T0000", by="ann", why="x", now="2026-03-06T10:00:00Z")
    watched.place.store.put("monitoring/fake/20260302T0000/verdict.json", b"{")
    with pytest.raises(DatasetError, match="is damaged"):
        watch(watched, 0)
    champion = read_champion(watched.place.store, "fake")
    assert champion is not None
    folder = tmp_path / "bundle"
    (folder / "reference.npz").write_bytes(b"no")
    from visionloop.bundle import load_bundle, seal_bundle
    from visionloop.monitoring.collect import load_known

    seal_bundle(folder)
    with pytest.raises(BundleError, match=r"reference\.npz is damaged or old"):
        load_known(load_bundle(folder))


def test_window_of_many_images_is_looked_at_in_part(tmp_path: Path) -> None:
    watched = make_watched(tmp_path, max_images=100)
    for number in range(2):
        watched.write_day(number)
        verdict = watch(watched, number)
    assert (verdict.num_images, verdict.num_looked_at, verdict.verdict) == (192, 100, "fine")


def test_command_writes_copies_and_tells_by_its_exit_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    watched = make_watched(tmp_path)
    monkeypatch.setattr("visionloop.cli.monitoring.open_workspace", lambda: watched.place)
    watched.write_day(0)
    assert run_here(monkeypatch, "monitor", "--at", "2026-03-02T05:00") == 0
    told = capsys.readouterr().out
    assert "window 2026-03-02 00:00 to 2026-03-03 00:00 UTC, 192 images" in told
    assert "verdict: fine" in told
    assert (tmp_path / "monitoring" / "latest.html").read_text() == read_report(watched, watch(watched, 0))
    figures = (tmp_path / "monitoring" / "metrics.prom").read_text()
    assert 'visionloop_monitor_images{name="fake"} 192\n' in figures
    assert 'visionloop_monitor_verdict{name="fake",verdict="fine"} 1\n' in figures
    assert run_here(monkeypatch, "monitor", "--at", "2026-03-03", "--json") == 4  # an empty window
    assert json.loads(capsys.readouterr().out)["verdict"] == "broken"
    assert run_here(monkeypatch, "monitor", "--at", "2026-03-03", "--accept") == 2
    assert "has no --why" in capsys.readouterr().err
    assert run_here(monkeypatch, "monitor", "--at", "2026-03-03", "--accept", "--why", "a holiday") == 0
    assert json.loads(watched.place.store.get("monitoring/fake/20260303T0000/accepted.json"))["why"] == "a holiday"
    assert run_here(monkeypatch, "monitor", "--at", "yesterday") == 2
    assert "expected a time, like 2026-11-28" in capsys.readouterr().err
    watched.write_day(2, shift=3.0)
    with serve({"/hook": Answer()}) as site:
        hook = {"url": f"{site.url}/hook", "headers": {"X-Token": "${HOOK_TOKEN}"}, "tries": 1}
        watched.place = replace(watched.place, params=make_params({"name": "fake", "monitor": {"webhook": hook}}))
        monkeypatch.setenv("HOOK_TOKEN", "s3cret")
        codes = [run_here(monkeypatch, "monitor", "--at", "2026-03-04") for _ in range(2)]
    assert codes == [3, 3]
    assert [request.headers["x-token"] for request in site.requests] == ["s3cret"]  # once for a window
    assert json.loads(site.requests[0].body)["event"] == "visionloop.monitor.drift"
    assert run_here(monkeypatch, "monitor", "--at", "2026-03-04", "--again") == 3  # the server is gone
    assert "note: the alert was not sent" in capsys.readouterr().err
