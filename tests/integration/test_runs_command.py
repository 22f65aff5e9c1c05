"""`visionloop runs` on a real MLflow (SQLite): the table, marks, JSON, two runs side by side with their curves."""

import json
from pathlib import Path

import pytest
from PIL import Image

from fakes import make_bundle, run_here
from trainings import Place, make_place
from visionloop.bundle import load_bundle
from visionloop.data.known_store import remember_entry
from visionloop.promotion.ledger import append_entry
from visionloop.tracking import KIND_TAG, PARENT_TAG, Tracking


def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *argv: str, code: int = 0) -> str:
    """Run a command in this process and return what it printed; of an error, its line."""
    ended = run_here(monkeypatch, *argv)
    said = capsys.readouterr()
    assert ended == code, said.err
    return said.err if code else said.out


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> tuple[Place, dict[str, str]]:
    """Three trainings (one of them the champion's, one still running), a study with a trial, a restored run."""
    place = make_place(tmp_path_factory.mktemp("runs") / "ws").with_mlflow()
    tracking: Tracking = place.tracking
    make_bundle(place.settings.candidate_dir)
    candidate = load_bundle(place.settings.candidate_dir).digest
    ids = {}
    for number, (name, bundle) in enumerate({"old": "a" * 64, "new": candidate, "now": None}.items(), start=1):
        tags = {"visionloop.dataset_version": str(number), **({"visionloop.bundle": bundle} if bundle else {})}
        params = {"train.way": "scratch", "train.backbone": "tiny", "train.learning_rate": 0.1 / number}
        ids[name] = tracking.open_run(f"tiny-dataset{number}", run_id=None, tags=tags, params=params)
        for step in range(3):
            figures = {
                "epoch": step + 1,
                "val/accuracy": 0.5 + 0.1 * number - 0.1 * abs(step - 1),
                "val/loss": 1 / (step + 1),
            }
            tracking.log_metrics(ids[name], figures, step=step)
        if name != "now":
            tracking.log_metrics(ids[name], {"best/epoch": 2, "best/val_accuracy": 0.5 + 0.1 * number}, step=1)
            tracking.log_metrics(ids[name], {"test/accuracy": 0.9 - 0.1 * number, "test/accuracy_low": 0.1})
            tracking.close_run(ids[name])
    # A killed epoch that was run again: the later value counts.
    tracking.log_metrics(ids["old"], {"val/accuracy": 0.125}, step=2)
    study = tracking.open_run("tune", run_id=None, tags={KIND_TAG: "tune"}, params={})
    ids["trial"] = tracking.open_run("trial-001", run_id=None, tags={KIND_TAG: "trial", PARENT_TAG: study}, params={})
    restored = tracking.open_run("restored", run_id=None, tags={"visionloop.restored": "true"}, params={})
    for run_id in (study, ids["trial"], restored):
        tracking.close_run(run_id)
    facts = {
        "action": "promote",
        "bundle": "a" * 64,
        "run_id": ids["old"],
        "model_version": "1",
        "dataset": {},
        "decision": None,
    }
    append_entry(place.store, place.params.name, None, **facts, by="me", why="", at="2026-01-01T00:00:00+00:00")
    return place, ids


@pytest.fixture
def home(filled: tuple[Place, dict[str, str]], monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(filled[0].settings.home)
    return filled[0].settings.home


def test_table_is_newest_first_with_marks_and_only_trainings(
    filled: tuple[Place, dict[str, str]],
    home: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    _, ids = filled
    header, *rows, after = run(capsys, monkeypatch, "runs").splitlines()
    assert after == f"next: `visionloop runs {ids['now'][:8]} {ids['new'][:8]}` compares"
    assert header.split()[:4] == ["started", "run", "way", "backbone"]
    assert [row.split()[2] for row in rows] == [ids[name][:8] for name in ("now", "new", "old")]
    assert "running" in rows[0]
    assert rows[1].endswith("finished  candidate")
    assert rows[2].endswith("finished   champion")
    assert "0.7000" in rows[1], "of the best epoch, which was not the last"
    assert "0.8000" in rows[2], "on the test side"


def test_a_store_that_is_away_is_told_and_has_no_champion(
    filled: tuple[Place, dict[str, str]],
    home: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    remember_entry(filled[0])
    folder = filled[0].settings.hidden_dir / "store"
    folder.rename(home / "away")
    try:
        assert run_here(monkeypatch, "runs") == 0
        told = capsys.readouterr()
        assert "champion" not in told.out and len(told.out.splitlines()) == 5
        assert told.err.startswith("note: which is the champion cannot be told: ")
        assert "no run" not in run(capsys, monkeypatch, "runs", "champion", code=2)
    finally:
        (home / "away").rename(folder)


def test_choosing_and_sorting(
    filled: tuple[Place, dict[str, str]],
    home: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    _, ids = filled

    def listed(*options: str) -> list[str]:
        values = json.loads(run(capsys, monkeypatch, "runs", "--json", *options))["runs"]
        names = {run_id: name for name, run_id in ids.items()}
        return [names[value["run_id"]] for value in values]

    assert listed() == ["now", "new", "old"]
    assert listed("--sort", "test_accuracy") == ["old", "new", "now"]
    assert listed("--sort", "val/accuracy") == ["now", "new", "old"]
    assert listed("--last", "1") == ["now"]
    assert listed("--status", "finished") == ["new", "old"]
    assert listed("--status", "running") == ["now"]
    assert listed("--trials", "--last", "2") == ["trial", "now"]
    line = run(capsys, monkeypatch, "runs", "--sort", "speed", code=2)
    assert line.startswith("error: --sort: got 'speed'; expected one of")


def test_two_side_by_side_with_a_plot(
    filled: tuple[Place, dict[str, str]],
    home: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    place, ids = filled
    out = home / "pictures" / "two\x1b[1m.png"
    out.parent.mkdir()
    lines = run(capsys, monkeypatch, "runs", ids["new"][:10], "champion", "--out", str(out)).splitlines()
    assert lines.pop() == "next: `visionloop ui` shows all of it in MLflow"
    cells = {line[:24].strip(): line.split()[-2:] for line in lines[:-1]}
    assert lines[0].split() == [ids["new"][:8], ids["old"][:8]]
    assert cells["train.learning_rate"] == ["0.05", "0.1"]
    assert "train.way" not in cells
    assert cells["best/val_accuracy"] == ["0.7000", "0.6000"]
    assert cells["test/accuracy"] == ["0.7000", "0.8000"]
    assert "test/accuracy_low" not in cells
    assert lines[-1] == f"curves: {home}/pictures/two\\x1b[1m.png", "a terminal only shows it"
    with Image.open(out) as image:
        assert image.width > 400
    assert place.tracking.load_curves(ids["old"], ["val/accuracy"])["val/accuracy"] == [
        (0, 0.5),
        (1, 0.6),
        (2, 0.125),
    ]
    run(capsys, monkeypatch, "runs", "champion")
    assert (home / ".visionloop" / "runs.png").is_file()


def test_what_cannot_be_compared_is_one_line(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    line = run(capsys, monkeypatch, "runs", "zzzz", code=2)
    assert line.startswith("error: run 'zzzz': no run of this experiment; expected the first letters of a run id")
    line = run(capsys, monkeypatch, "runs", "champion", "--out", "/dev/null/x.png", code=2)
    assert line.startswith("error: --out /dev/null/x.png: there is no folder /dev/null; expected one")
    line = run(capsys, monkeypatch, "runs", *["champion"] * 13, code=2)
    assert "13 runs; expected at most 12" in line


def test_no_run_yet_says_what_to_do_and_makes_no_database(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "params.yaml").write_text("name: pets\n")
    monkeypatch.chdir(tmp_path)
    told = run(capsys, monkeypatch, "runs")
    assert told == "no run yet\nnext: `visionloop train` (or `dvc repro`) makes the first\n"
    assert json.loads(run(capsys, monkeypatch, "runs", "--json")) == {"runs": []}
    assert not list((tmp_path / ".visionloop").rglob("mlflow.db"))
    line = run(capsys, monkeypatch, "runs", "champion", code=2)
    assert line.endswith("Newest: none yet.\n")


def test_more_runs_than_a_page(filled: tuple[Place, dict[str, str]], monkeypatch: pytest.MonkeyPatch) -> None:
    place, ids = filled
    monkeypatch.setattr("visionloop.tracking.PAGE", 2)
    found = list(place.tracking.iterate_runs())
    assert len(found) == 6
    assert {ids["old"], ids["trial"]} <= {one.run_id for one in found}
    assert [one.kind for one in found][:3] == ["restored", "trial", "tune"]
