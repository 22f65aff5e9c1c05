"""Odd names of files in the tables of `predict` and on a terminal; files that come and go while it runs."""

import csv
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from fakes import make_bundle, make_image, run_here
from visionloop.ingest.paths.listing import ImageFolder
from visionloop.predict.files import FilePrediction, predict_files
from visionloop.predict.tables import Table
from visionloop.predictor import Predictor
from visionloop.records import Prediction

ODD = (
    *(
        "a\nb.png",
        "a\rb.png",
        "tab\there.png",
        'quote"q.png',
        "=1+1.png",
        "+1.png",
        "-2.png",
        "@sum.png",
        "\x1b[31mred.png",
    ),
    *(
        "c1\x9b31m.png",
        "back\\nslash.png",
        "back\nslash.png",
        "bi\u202edi.png",
        " semi;comma,.png",
        "katze 🐈.png",
        "e\u0301.png",
    ),
    *(os.fsdecode(one) for one in (b"caf\xe9.png", b"\xff\xfe.png")),
)


def test_odd_names_come_back_from_every_table_and_a_terminal_only_shows_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    for number, name in enumerate(ODD):
        (folder / name).write_bytes(make_image(number))
    (tmp_path / "params.yaml").write_text("name: pets\n")
    make_bundle(tmp_path / "bundle")
    monkeypatch.chdir(folder)
    wishes = ("--bundle", "../bundle", "--out")
    for out in ("../o.csv", "../o.jsonl"):
        assert run_here(monkeypatch, "predict", *wishes, out, "--", *ODD) == 0
        shown = capsys.readouterr().out
        assert all(line.isprintable() for line in shown.splitlines()), shown
        assert "\nc1\\x9b31m.png " in shown
    with (tmp_path / "o.csv").open(encoding="utf-8", newline="") as file:
        paths = [row["path"] for row in csv.DictReader(file)]
    lines = (tmp_path / "o.jsonl").read_text(encoding="utf-8").splitlines()
    written = [name.encode("utf-8", "backslashreplace").decode() for name in ODD]  # bytes that no table can hold
    assert [json.loads(line)["path"] for line in lines] == written and all(map(str.isprintable, lines))
    assert [os.path.normpath(path) for path in paths] == written
    assert not [path for path in paths if path.startswith(("=", "+", "-", "@"))]
    index = ImageFolder(folder)
    assert [index.find(path) for path in paths] == [folder / name for name in ODD]
    assert [index.find(f"{path[:-4]}") for path in paths] == [folder / name for name in ODD], "without a suffix"
    assert index.find("a\\nb.png") == folder / "a\nb.png", "as older tables and messages have it"


def test_a_competition_has_ids_letter_by_letter(tmp_path: Path) -> None:
    make_bundle(tmp_path / "bundle")
    answers = [FilePrediction(name, None, "is gone") for name in ("p/=1+1.png", "p/a\nb.png", 'p/"q.png')]
    Table.plan(tmp_path / "k.csv", "kaggle").write(answers, Predictor.load(tmp_path / "bundle"))  # type: ignore[union-attr]
    with (tmp_path / "k.csv").open(encoding="utf-8", newline="") as file:
        assert [row["id"] for row in csv.DictReader(file)] == ["=1+1", "a\nb", '"q']


def test_a_class_like_a_formula_stands_letter_by_letter(tmp_path: Path) -> None:
    make_bundle(tmp_path / "bundle")
    predictor = Predictor.load(tmp_path / "bundle")
    said = Prediction("=1+1", dict.fromkeys(predictor.card.classes, 0.5), 0.5)
    table = Table.plan(tmp_path / "o.csv", None)
    assert table
    table.write([FilePrediction("=2.png", said)], predictor)
    with (tmp_path / "o.csv").open(encoding="utf-8", newline="") as file:
        assert [(row["path"], row["prediction"]) for row in csv.DictReader(file)] == [("./=2.png", "=1+1")]


def test_files_that_come_and_go_while_it_runs_are_told(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "params.yaml").write_text("name: pets\n")
    make_bundle(tmp_path / "bundle")
    monkeypatch.chdir(tmp_path)

    def change_first(*args: Any, **wishes: Any) -> Any:
        (photos / "sub" / "b.JPG").unlink()
        (photos / "c\x1b.png").write_bytes(make_image(3))
        return predict_files(*args, **wishes)

    monkeypatch.setattr("visionloop.predict.chunks.predict_files", change_first)
    assert run_here(monkeypatch, "predict", "photos", "--bundle", "bundle", "--out", "o.csv") == 0
    told = capsys.readouterr().out
    assert "note: 1 file has come since it began, and no row: photos/c\\x1b.png; run it again\n" in told
    with (tmp_path / "o.csv").open(encoding="utf-8", newline="") as file:
        rows = {row["path"]: row["error"] for row in csv.DictReader(file)}
    assert [*rows] == ["photos/a.png", "photos/broken.jpg", "photos/sub/b.JPG"]
    assert rows["photos/a.png"] == "" and "No such file" in rows["photos/sub/b.JPG"]


def test_a_folder_that_goes_away_while_it_runs_is_one_line(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "params.yaml").write_text("name: pets\n")
    make_bundle(tmp_path / "bundle")
    monkeypatch.chdir(tmp_path)

    def remove_first(*args: Any, **wishes: Any) -> Any:
        shutil.rmtree(photos)
        return predict_files(*args, **wishes)

    monkeypatch.setattr("visionloop.predict.chunks.predict_files", remove_first)
    assert run_here(monkeypatch, "predict", "photos", "--bundle", "bundle", "--out", "o.csv") == 2
    assert capsys.readouterr().err.startswith("error: photos: none of 3 could be used: ")
