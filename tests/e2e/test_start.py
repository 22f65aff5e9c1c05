"""`visionloop start`: from a folder of photos to a judged model, in one command, without a clone or a Prefect server.

The tests of `home` are one story: each goes on where the one before ended.
"""

import csv
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from fakes import run_here
from shapes import make_environment, visionloop, visionloop_here, write_shapes
from visionloop.params import load_params
from visionloop.workspace import make_name


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The workspace that `start` has made of photos beside it."""
    folder = tmp_path_factory.mktemp("start")
    photos = write_shapes(folder / "My Shapes", 25)
    (photos / "disc" / "broken.png").write_bytes(b"no picture")
    done = visionloop(folder, "start", "My Shapes")
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith(f"made the workspace {folder}/my-shapes-model, for git too")
    assert lines[1] == "My Shapes is its source my-shapes (kind folder), in params.yaml"
    steps = [line.split()[1].rstrip(":") for line in lines if line.startswith("[")]
    assert steps == ["ingest", "prepare", "embed", "train", "evaluate", "gate", "register", "promote"]
    assert "quarantined 1 file that cannot be used:" in done.stdout
    assert "weights of efficientnet_lite0 as published (licence Apache-2.0)" in done.stdout
    assert "has a new champion" in done.stdout
    cd = f"cd {folder}/my-shapes-model && "
    told = f"next: `{cd}visionloop predict PHOTO`, or `{cd}visionloop up` for pages"
    assert lines[-3:] == ["to serve the champion:", f"    {cd}visionloop serve", told]
    return folder / "my-shapes-model"


def test_the_model_knows_imagenet_and_can_be_asked(home: Path) -> None:
    params = load_params(home / "params.yaml")
    assert (params.name, params.train.backbone, params.train.way) == ("my-shapes", "efficientnet_lite0", "frozen")
    card = json.loads((home / "models" / "candidate" / "card.json").read_text())
    assert card["network"]["weights"] == {"file": "models/efficientnet-lite0-57934424.pth", "license": "Apache-2.0"}
    assert card["network"]["preprocessing"]["side_px"] == 224
    metrics = json.loads((home / "reports" / "metrics.json").read_text())
    assert metrics["accuracy"] >= 0.9
    photos = home.parent / "My Shapes"
    assert visionloop_here(home, "predict", str(photos / "ring"), "--out", "answers.csv").returncode == 0
    rows = list(csv.DictReader((home / "answers.csv").open(encoding="utf-8")))
    assert sum(row["prediction"] == "ring" for row in rows) >= 23


def test_again_nothing_is_done_twice(home: Path) -> None:
    done = visionloop_here(home.parent, "start", "My Shapes")
    assert done.returncode == 0, done.stderr
    assert "made the workspace" not in done.stdout
    assert "is its source" not in done.stdout
    assert "nothing changed: dataset 1, params, code" in done.stdout
    assert [line for line in done.stdout.splitlines() if line.startswith("[")] == [
        "[1/8] ingest: new images into the store"
    ]
    done = visionloop_here(home, "start", "--json")
    found = json.loads(done.stdout)
    assert (done.returncode, found["outcome"], found["dataset"]["version"]) == (0, "unchanged", 1)
    assert found["commands"]["serve the champion"] == "visionloop serve"
    quiet = visionloop_here(home, "start", "--quiet").stdout
    assert "nothing changed: dataset 1" in quiet
    assert "[1/8]" not in quiet and "next: " not in quiet


def test_more_photos_are_found_and_only_they_are_computed(home: Path) -> None:
    """The first steps of a `start` from within, by hand: the rest is that of any other retrain."""
    write_shapes(home.parent / "My Shapes", 10, seed=1)
    said = [visionloop_here(home, step) for step in ("ingest", "prepare", "embed")]
    assert [done.returncode for done in said] == [0, 0, 0], said
    assert "version 2: 20 new images, 70 in all" in said[0].stdout
    assert "50 from the table, 20 computed" in said[2].stdout


@pytest.mark.long
def test_what_was_killed_goes_on(tmp_path: Path) -> None:
    write_shapes(tmp_path / "pets", 12)
    command = [sys.executable, "-m", "visionloop", "start", "pets", "w"]
    process = subprocess.Popen(command, cwd=tmp_path, env=make_environment(), stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("[3/8] embed"):
            time.sleep(1)
            process.kill()
    process.wait()
    done = visionloop(tmp_path, "start", "pets", "w")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "nothing it depends on changed" in done.stdout, "prepared images are not prepared again"
    assert "pets has a new champion" in done.stdout


def test_mistakes_are_told_before_anything_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)

    def refuse(*argv: str) -> str:
        assert run_here(monkeypatch, "start", *argv) == 2
        *before, told = capsys.readouterr().err.splitlines()
        assert before in ([], ["nothing was ingested: the workspace is removed again"])
        assert bool(before) == (argv in {("nothing",), ("one",)})
        return str(told)

    assert "does not exist; expected a folder, a table, a .zip" in refuse("pots")
    assert "no params.yaml here or above" in refuse()
    write_shapes(tmp_path / "pets", 1)
    assert "workspace /proc/pets: cannot be made (" in refuse("pets", "/proc/pets")
    assert [path.name for path in tmp_path.iterdir()] == ["pets"]
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "diary.txt").write_text("dear diary")
    assert "full: is not empty; expected a new or empty folder." in refuse("pets", "full")
    (tmp_path / "nothing").mkdir()
    assert "no image" in refuse("nothing")
    one = tmp_path / "one" / "cat"
    one.mkdir(parents=True)
    for number in range(12):
        Image.new("RGB", (40, 40), (number * 20, 0, 0)).save(one / f"{number}.png")
    assert "has 1 class (cat)" in refuse("one")


@pytest.mark.parametrize(
    ("text", "name"),
    [("My Pets (2026)", "my-pets-2026"), ("Ärger", "arger"), ("猫", "photos"), ("", "photos"), ("-a-", "a")],
)
def test_a_name_is_made_of_any_text(text: str, name: str) -> None:
    assert make_name(text) == name
    assert len(make_name("x" * 200)) == 63
