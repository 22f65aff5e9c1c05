"""The loop's figures for Prometheus: of a whole loop, of an empty one, and of one that cannot be read for a while."""

import math
import re
import subprocess
import sys
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from fakes import run_here
from visionloop.params import make_params
from visionloop.store import LocalStore
from visionloop.up.metrics import Figures, make_metrics_text, make_server, write_metrics
from visionloop.up.overview import FROM_STORE, Overview, read_overview
from visionloop.workspace import connect
from watched import FIRST, Watched, at_end_of, make_whole_loop
from workspaces import make_settings

DAY = datetime(FIRST.year, FIRST.month, FIRST.day, tzinfo=UTC)
NOW = at_end_of(0)
AT = NOW.timestamp()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Watched:
    return make_whole_loop(tmp_path_factory.mktemp("loop"))


def parse(text: str) -> dict[str, float]:
    """Return `name{other labels than the name}` -> value."""
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    assert {sample.labels.pop("name") for sample in samples} <= {"fake", 'a"b\\c\nd'}
    prefix = len("visionloop_")
    return {f"{s.name[prefix:]}{{{','.join(s.labels.values())}}}".replace("{}", ""): s.value for s in samples}


def test_a_whole_loop_has_all_figures(whole: Watched) -> None:
    overview = read_overview(whole.place, now=NOW)
    assert overview.problems == ()
    figures = parse(make_metrics_text(overview, AT))
    hour, day = 3600.0, DAY.timestamp() + 86400
    known = {
        "loop_read_timestamp_seconds": AT,
        "loop_problems": 0,
        "loop_dataset_version": 1,
        "loop_dataset_images{train}": 6,
        "loop_promoted_timestamp_seconds": DAY.timestamp() - 86400,
        f"loop_champion_info{{{whole.digest},1,promote}}": 1,
        "loop_decision{refused}": 1,
        "loop_decision{passed}": 0,
        "loop_decided_timestamp_seconds": DAY.timestamp() + 2 * hour,
        "loop_figure{candidate,accuracy}": 0.88,
        "loop_trigger{retrain}": 1,
        "loop_trigger{held}": 0,
        "loop_triggered_timestamp_seconds": day,
        "loop_retraining": 1,
        "loop_retraining_since_timestamp_seconds": day,
        "loop_waiting_labels": 5,
        "loop_waiting_since_timestamp_seconds": day,
        "loop_unsent_alerts": 1,
        "monitor_window_end_seconds": day,
        "monitor_window_seconds": 86400,
        "monitor_images": 192,
        "monitor_labels": 80,
        "monitor_verdict{quality}": 1,
        "monitor_verdict{fine}": 0,
        "monitor_alert{accuracy,quality}": 1,
        "monitor_alert{drift,drift}": 0,
        "monitor_expected_is_trusted": 1,
        "monitor_labelled_accuracy": 0.5,
    }
    assert {key: figures.get(key) for key in known} == known
    assert figures["monitor_labelled_accuracy_high"] < figures["monitor_accuracy_floor"] < 0.9
    assert figures["monitor_drift_level"] < figures["monitor_drift_p"] <= 1


def test_an_empty_loop_tells_what_it_has_none_of_by_no_line(tmp_path: Path) -> None:
    place = connect(make_settings(tmp_path), make_params({"name": "fake"}), store=LocalStore(tmp_path / "store"))
    figures = parse(make_metrics_text(read_overview(place, now=NOW), AT))
    assert figures == {
        "loop_read_timestamp_seconds": AT,
        "loop_problems": 0,
        "loop_retraining": 0,
        "loop_unsent_alerts": 0,
    }


def test_what_cannot_be_read_for_a_while_stays_and_gets_old(whole: Watched) -> None:
    good, figures = read_overview(whole.place, now=NOW), Figures()
    facts = {"problems": ("the store is away",) * 2, "unread": FROM_STORE}
    away = Overview("fake", "", (NOW + timedelta(hours=1)).isoformat(), **facts)
    figures.take(away)
    assert parse(figures.text) == {"loop_read_timestamp_seconds": 0, "loop_problems": 2, "loop_retraining": 0}
    figures.take(good)
    before = parse(figures.text)
    for _ in range(2):
        figures.take(away)
    assert parse(figures.text) == {**before, "loop_problems": 2}
    figures.take(replace(good, waiting=0, at=away.at))
    after = parse(figures.text)
    assert after["loop_read_timestamp_seconds"] == AT + 3600
    assert (after["loop_waiting_labels"], after["loop_problems"]) == (0, 0)


def test_a_part_that_stays_damaged_keeps_no_other_part_old(tmp_path: Path) -> None:
    """The triggers cannot be read; meanwhile the retrain ends, and all images get their label."""
    loop, figures = make_whole_loop(tmp_path).place, Figures()
    loop.store.put("triggers/fake/000001.json", b"[]")
    for _ in range(2):
        figures.take(read_overview(loop, now=NOW))
    assert parse(figures.text)["loop_retraining"] == 1
    loop.store.delete("leases/fake/000001.json")
    for key in [*loop.store.list("review/fake/")]:
        loop.store.delete(key)
    figures.take(read_overview(loop, now=NOW))
    found = parse(figures.text)
    assert (found["loop_retraining"], found["loop_problems"]) == (0, 1)
    assert not {key for key in found if "since" in key or "waiting_labels" in key}


def test_a_damaged_decision_is_a_problem_and_not_the_end(tmp_path: Path) -> None:
    loop, figures = make_whole_loop(tmp_path).place, Figures()
    figures.take(read_overview(loop, now=NOW))
    key = "decisions/fake/000002.json"
    loop.store.put(key, re.sub(rb'"metrics":\{"accuracy".*?\}\}', b'"metrics":null', loop.store.get(key)))
    overview = read_overview(loop, now=NOW)
    assert [one.partition(": ")[0] for one in overview.problems] == ["the decisions cannot be read"]
    figures.take(overview)
    assert parse(figures.text)["loop_decision{refused}"] == 1, "what was read last"


@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("window", {"p": math.nan, "expected": math.inf, "level": "0.01", "num_images": 10**400, "start": "gestern"}),
        ("dataset", {"version": None, "at": None, "sides": {"train": 6, "val": "3"}}),
    ],
)
def test_what_is_no_number_and_no_time_has_no_line(whole: Watched, part: str, change: dict[str, Any]) -> None:
    overview = read_overview(whole.place, now=NOW)
    text = make_metrics_text(replace(overview, **{part: {**getattr(overview, part), **change}}), AT)
    lost = parse(make_metrics_text(overview, AT)).keys() - parse(text).keys()
    assert (
        lost
        == {
            "window": {
                *("monitor_drift_p", "monitor_expected_accuracy", "monitor_drift_level", "monitor_images"),
                "monitor_window_seconds",
            },
            "dataset": {
                *("loop_dataset_version", "loop_dataset_timestamp_seconds"),
                *("loop_dataset_images{val}", "loop_dataset_images{test}"),
            },
        }[part]
    )


def test_labels_cannot_begin_a_line_of_their_own() -> None:
    text = make_metrics_text(Overview('a"b\\c\nd', "", ""), 0)
    assert text.splitlines()[2] == 'visionloop_loop_read_timestamp_seconds{name="a\\"b\\\\c\\nd"} 0'
    assert parse(text)["loop_problems"] == 0


def test_the_file_is_written_whole(whole: Watched, tmp_path: Path) -> None:
    place = replace(whole.place, settings=replace(whole.place.settings, home=tmp_path))
    write_metrics(place, now=NOW)
    text = (tmp_path / "monitoring" / "metrics.prom").read_text()
    assert 'visionloop_monitor_verdict{name="fake",verdict="quality"} 1\n' in text
    assert [path.name for path in (tmp_path / "monitoring").iterdir()] == ["metrics.prom"]


def test_the_command_prints_them_and_says_what_cannot_be_read(
    whole: Watched, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("visionloop.cli.monitoring.open_workspace", lambda: whole.place)
    assert run_here(monkeypatch, "metrics") == 0
    told, noted = capsys.readouterr()
    assert (parse(told)["loop_waiting_labels"], noted) == (5, "")
    key = "triggers/fake/000001.json"
    kept = whole.place.store.get(key)
    whole.place.store.put(key, b"[]")
    assert run_here(monkeypatch, "metrics") == 2
    told, noted = capsys.readouterr()
    whole.place.store.put(key, kept)
    assert parse(told)["loop_problems"] == 1 and "loop_trigger" not in told
    assert noted == f"error: store object {key}: is damaged; expected a decision of the triggers. " + (
        "Restore it from the store's backup, or remove it.\n"
    )


def test_beside_a_server_nothing_is_needed_that_makes_pages_or_models() -> None:
    heavy = {"jinja2", "markupsafe", "sklearn", "scipy", "torch", "mlflow", "prefect", "matplotlib", "pandas"}
    code = f"import sys, visionloop.up.metrics; print(sorted({heavy} & {{m.split('.')[0] for m in sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_a_port_that_is_taken_is_said(
    whole: Watched, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("visionloop.cli.monitoring.open_workspace", lambda: whole.place)
    with make_server(whole.place, "127.0.0.1", 0) as server:
        assert run_here(monkeypatch, "metrics", "--port", str(server.server_port)) == 2
    assert "cannot be had (Address already in use); expected a free port" in capsys.readouterr().err
