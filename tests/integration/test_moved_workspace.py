"""MLflow's own file after its workspace was moved or copied: artifacts lie below itself; nothing else is touched."""

import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from visionloop.settings import load_settings
from visionloop.tracking import DIGEST_TAG, MlflowTracking
from visionloop.tracking_file import follow_workspace


def open_tracking(home: Path) -> MlflowTracking:
    settings = load_settings({}, home)
    return MlflowTracking(settings.tracking_uri, settings.artifact_root, "pets")


def make_home(folder: Path) -> tuple[Path, str]:
    """A workspace with a run and an artifact, made by a process of its own: MLflow remembers addresses in a process."""
    folder.mkdir()
    (folder / "params.yaml").write_text("name: pets\n")
    (folder / "a.txt").write_text("hello")
    settings = load_settings({}, folder)
    code = (
        "from pathlib import Path\nfrom visionloop.tracking import MlflowTracking\n"
        f"tracking = MlflowTracking({settings.tracking_uri!r}, {settings.artifact_root!r}, 'pets')\n"
        f"run_id = tracking.open_run('one', run_id=None, tags={{'visionloop.bundle': 'd1'}}, params={{}})\n"
        f"tracking.log_artifact(run_id, Path({str(folder / 'a.txt')!r}))\nprint(run_id)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return folder, done.stdout.split()[-1]


@pytest.mark.parametrize("how", ["moved", "copied", "name with spaces"])
def test_artifacts_go_below_the_workspace_as_it_lies_now(tmp_path: Path, how: str) -> None:
    home, run_id = make_home(tmp_path / "old")
    new = tmp_path / ("new ü place" if how == "name with spaces" else "new")
    (shutil.copytree if how == "copied" else shutil.move)(home, new)
    before = sorted(p for p in (tmp_path / "old").rglob("*") if "artifacts" in p.parts)
    tracking = open_tracking(new)
    (new / "b.txt").write_text("there")
    tracking.log_artifact(run_id, new / "b.txt")
    again = tracking.open_run("two", run_id=None, tags={}, params={})
    tracking.log_artifact(again, new / "b.txt")
    root = new / ".visionloop" / "mlflow" / "artifacts" / "pets"
    assert {p.name for p in (root / run_id).rglob("*.txt")} == {"a.txt", "b.txt"}
    assert [p.name for p in (root / again).rglob("*.txt")] == ["b.txt"]
    assert sorted(p for p in (tmp_path / "old").rglob("*") if "artifacts" in p.parts) == before
    assert tracking.find_tagged_run(DIGEST_TAG, "d1") == run_id


def test_addresses_that_are_not_of_a_workspace_stay(tmp_path: Path) -> None:
    path = tmp_path / "ws" / ".visionloop" / "mlflow" / "mlflow.db"
    path.parent.mkdir(parents=True)
    root = (path.parent / "artifacts").as_uri()
    with sqlite3.connect(path) as database:
        database.execute("CREATE TABLE experiments (artifact_location TEXT)")
        kept = ["s3://bucket/x/.visionloop/mlflow/artifacts/p", "file:///mnt/mlruns/3", f"{root}/pets"]
        moved = "file:///old/ws/.visionloop/mlflow/artifacts/pets"
        database.executemany("INSERT INTO experiments VALUES (?)", [(one,) for one in (*kept, moved)])
        follow_workspace(database, path, root)
        assert [row[0] for row in database.execute("SELECT * FROM experiments")] == [*kept, f"{root}/pets"]
        follow_workspace(database, tmp_path / "shared.db", "file:///other/.visionloop/mlflow/artifacts")
        assert [row[0] for row in database.execute("SELECT * FROM experiments")] == [*kept, f"{root}/pets"]
