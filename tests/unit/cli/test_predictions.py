"""The command `predictions`: counts a day, shows single answers, exports a window, tidies."""

import csv
import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from fakes import make_image, run_here
from visionloop.cli.predictions import parse_window
from visionloop.data.prediction_log import FEEDBACK, PREDICTIONS, make_kept_key, make_request_id
from visionloop.errors import SettingsError
from visionloop.store import LocalStore

NOW = datetime.now(UTC).replace(microsecond=0)
SHA = "a" * 64
IMAGE = make_image(1)


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LocalStore:
    """The store of a workspace in which the test stands: three answers, one of them forty days old."""
    (tmp_path / "params.yaml").write_text("name: pets\nserve:\n  log_days: 30\n")
    monkeypatch.chdir(tmp_path)
    store = LocalStore(tmp_path / ".visionloop" / "store")
    rows = [
        make_row("r1", NOW - timedelta(minutes=2), "cat", 0.5, abstained=True),
        make_row("r2", NOW - timedelta(minutes=1), "dog", 1.0, image_kept=True, embedding=[0.5]),
        make_row("r3", NOW - timedelta(days=40), "dog", 1.0),
    ]
    for row in rows:
        put(store, PREDICTIONS, row["request_id"], row)
    said = {"feedback_id": "f", "request_id": "r1", "time": NOW, "labels": ["dog"], "who": "eve"}
    put(store, FEEDBACK, "f", said)
    store.put(make_kept_key("pets", rows[1]["time"].date(), SHA), IMAGE)
    return store


def make_row(request_id: str, time: datetime, prediction: str, confidence: float, **more: Any) -> dict[str, Any]:
    row = {"prediction": prediction, "confidence": confidence, "abstained": False, "model_version": "7"}
    return {"request_id": request_id, "time": time, "image_sha256": SHA, "classes": ["cat", "dog"], **row, **more}


def put(store: LocalStore, table: Any, part: str, row: dict[str, Any]) -> None:
    store.put(table.make_key("pets", row["time"].date(), part), table.encode([row]))


def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    assert run_here(monkeypatch, "predictions", *argv) == 0, capsys.readouterr()
    told = capsys.readouterr().out
    assert "--json" in argv or told.splitlines()[-1].startswith("next: ")
    return told.partition("next: ")[0]


def test_days_are_counted(
    store: LocalStore, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    days = json.loads(run(monkeypatch, capsys, "--json", "--since", "60d"))["days"]
    assert sum(day["num_answers"] for day in days) == 3
    assert days[0]["day"] == f"{(NOW - timedelta(days=40)).date()}"
    newest = days[1:]
    assert sum(day["num_abstained"] for day in newest) == 1
    assert sum(day["num_feedback"] for day in newest) == 1
    assert sum(day["num_kept"] for day in newest) == 1
    if len(newest) == 1:  # not around midnight
        assert newest[0]["mean_confidence"] == 0.75
        text = run(monkeypatch, capsys)
        assert text == (
            f"{NOW.date()}          2 answers  confidence 0.75  don't know 50.0%  1 with feedback  1 with kept image"
            "  version 7: cat 1, dog 1\n"
        )


def test_single_answers_are_shown_with_what_people_say(
    store: LocalStore, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = run(monkeypatch, capsys, "show").splitlines()
    assert [line.split()[2] for line in lines] == ["r1", "r2"]
    assert lines[0].endswith("? cat   50.0%  version 7  people say dog")
    assert lines[1].endswith("dog  100.0%  version 7  image kept")
    assert run(monkeypatch, capsys, "show", "--most", "1").split()[2] == "r2"
    assert "no answer between" in run(monkeypatch, capsys, "show", "--since", "2020-01-01", "--until", "2020-01-02")


def test_a_window_is_exported_with_its_images(
    store: LocalStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    said = run(monkeypatch, capsys, "export", "out.parquet", "--since", "1h", "--images", "kept")
    assert said == "2 answers in out.parquet; the images of 1 of them are 1 files in kept\n"
    rows = pq.read_table(tmp_path / "out.parquet").to_pylist()
    assert [(row["request_id"], row["feedback_labels"]) for row in rows] == [("r1", ["dog"]), ("r2", None)]
    assert (rows[1]["embedding"], (tmp_path / "kept" / f"{SHA}.png").read_bytes()) == ([0.5], IMAGE)
    put(store, PREDICTIONS, "r4", make_row("r4", NOW - timedelta(minutes=1), "dog", 1.0, image_kept=True))
    said = run(monkeypatch, capsys, "export", "out.parquet", "--since", "1h", "--images", "kept")
    assert said == "3 answers in out.parquet; the images of 2 of them are 1 files in kept\n"
    assert len(list((tmp_path / "kept").iterdir())) == 1
    run(monkeypatch, capsys, "export", "out.csv", "--since", "60d")
    with (tmp_path / "out.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [line["request_id"] for line in lines] == ["r3", "r1", "r2", "r4"]
    assert (lines[1]["classes"], lines[1]["feedback_labels"], "embedding" in lines[1]) == ("cat|dog", "dog", False)
    assert run(monkeypatch, capsys, "export", "none.csv", "--since", "1m", "--until", f"{NOW + timedelta(days=9):%F}")
    assert run_here(monkeypatch, "predictions", "export", "out.xlsx") == 2


def test_feedback_on_no_answer_is_told(
    store: LocalStore, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recent, old = (make_request_id((NOW - timedelta(days=days)).timestamp()) for days in (0.01, 50))
    for number, request_id in enumerate((f"{recent}.9", f"{recent}.9", recent, old)):
        row = {"feedback_id": "f", "request_id": request_id, "time": NOW, "labels": ["dog"]}
        put(store, FEEDBACK, f"g{number}", row)
    put(store, PREDICTIONS, "r5", make_row(f"{recent}.1", NOW - timedelta(minutes=1), "dog", 1.0))
    for argv in ([], ["--json"], ["export", "out.csv"]):
        assert run_here(monkeypatch, "predictions", *argv) == 0
        assert capsys.readouterr().err.startswith("3 of the feedback match no answer (of a list each result has its"), (
            argv
        )
    put(store, PREDICTIONS, "r6", make_row(recent, NOW - timedelta(minutes=1), "dog", 1.0))
    row = {"feedback_id": "f", "request_id": f"{recent}.8", "time": NOW, "labels": ["dog"]}
    put(store, PREDICTIONS, "r7", make_row(f"{recent}.9", NOW - timedelta(minutes=1), "dog", 1.0))
    put(store, FEEDBACK, "g9", row)
    assert run_here(monkeypatch, "predictions") == 0
    assert capsys.readouterr().err.startswith("1 of the feedback matches no answer (")
    put(store, PREDICTIONS, "r8", make_row(f"{recent}.8", NOW - timedelta(minutes=1), "dog", 1.0))
    assert run_here(monkeypatch, "predictions") == 0
    delay = "answers of the last 30 s may be missing: a server sends them so often (serve.log_flush_s)\n"
    assert capsys.readouterr().err == delay
    for argv, said in ((["show"], delay), (["show", "--until", f"{NOW:%F}"], ""), (["--json"], "")):
        assert run_here(monkeypatch, "predictions", *argv) == 0
        assert capsys.readouterr().err == said, argv


def test_a_file_that_cannot_be_written_is_refused(
    store: LocalStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.csv").mkdir()
    for argv, found in (
        (["nodir/z.csv"], "nodir/z.csv: there is no folder nodir"),
        (["folder.csv"], "cannot be written (Is a directory)"),
        (["z.csv", "--images", "file"], "file: cannot be written (File exists)"),
    ):
        assert run_here(monkeypatch, "predictions", "export", *argv) == 2
        assert found in capsys.readouterr().err


def test_tidy_merges_and_expires(
    store: LocalStore, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for part in ("x", "y"):
        put(store, PREDICTIONS, part, make_row(part, NOW - timedelta(days=3), "cat", 0.9))
    assert run(monkeypatch, capsys, "tidy") == "2 parts merged, 1 objects older than 30 days removed\n"


def test_damaged_parts_are_named(
    store: LocalStore, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    key = PREDICTIONS.make_key("pets", NOW.date(), "0")
    store.put(key, b"broken")
    assert run_here(monkeypatch, "predictions", "show") == 0
    assert capsys.readouterr().err.startswith(f"passed over, because they are damaged: {key}\nanswers of the last")


@pytest.mark.parametrize(
    ("since", "until", "hours"),
    [
        ("2h", None, 2),
        ("2d", "1d", 24),
        ("2026-11-28", "2026-11-28T14:00", 14),
        ("2026-11-28T01:00+01:00", "2026-11-28T03:00", 3),
    ],
)
def test_a_window_is_read_as_people_write_it(since: str, until: str | None, hours: int) -> None:
    start, end = parse_window(since, until, datetime(2026, 11, 29, tzinfo=UTC))
    assert end - start == timedelta(hours=hours)


@pytest.mark.parametrize("since", ["yesterday", "", "5w", "999999d", "2026-13-01", "2099-01-01"])
def test_a_window_that_is_none_is_refused(since: str) -> None:
    with pytest.raises(SettingsError, match="--since"):
        parse_window(since, None)
