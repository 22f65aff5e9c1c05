"""Batch prediction: what is found, what cannot be used, what is written."""

import csv
import json
import os
from pathlib import Path

import pytest

from fakes import make_bundle, make_image
from visionloop.errors import DiskError, SourceError
from visionloop.ingest.paths.names import escape_name
from visionloop.predict import find_images, predict_files, write_answers
from visionloop.predictor import Predictor


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    (folder / "sub").mkdir(parents=True)
    (folder / "a.png").write_bytes(make_image(1))
    (folder / "sub" / "b.JPG").write_bytes(make_image(2, kind="JPEG"))
    (folder / "broken.jpg").write_text("text")
    (folder / "notes.txt").write_text("text")
    return folder


def names(files: list[Path]) -> list[str]:
    return [f.name for f in files]


def test_files_folders_and_globs(photos: Path) -> None:
    assert names(find_images([str(photos)])) == ["a.png", "broken.jpg", "b.JPG"]
    assert names(find_images([str(photos / "**" / "*.JPG"), str(photos / "a.png"), str(photos / "*.png")])) == [
        "b.JPG",
        "a.png",
    ]


def test_paths_without_images(photos: Path, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="does not exist; expected an image, a folder or a glob"):
        find_images([str(tmp_path / "no.jpg")])
    (tmp_path / "empty").mkdir()
    with pytest.raises(SourceError, match="no image there"):
        find_images([str(tmp_path / "empty")])
    with pytest.raises(SourceError, match=r"got 'x\.txt'; expected a file that ends in \.jsonl or \.csv"):
        find_images([str(photos)], out=Path("x.txt"))


@pytest.mark.parametrize("classes", [("a", "b", "c"), ("a", "b")])
def test_answers_equal_the_predictor_and_a_broken_file_has_its_reason(
    photos: Path, tmp_path: Path, classes: tuple[str, ...]
) -> None:
    make_bundle(tmp_path / "bundle", classes=classes)
    predictor = Predictor.load(tmp_path / "bundle")
    good, broken, jpg = predict_files(predictor, find_images([str(photos)]))
    assert good.prediction == predictor.predict([make_image(1)])[0]
    assert jpg.prediction == predictor.predict([make_image(2, kind="JPEG")])[0]
    assert (broken.prediction, broken.error) == (
        None,
        "is not an image we read; expected JPEG, PNG, WebP, AVIF or HEIC",
    )


def test_written_answers(photos: Path, tmp_path: Path) -> None:
    make_bundle(tmp_path / "bundle")
    predictor = Predictor.load(tmp_path / "bundle")
    answers = predict_files(predictor, find_images([str(photos)]))
    write_answers(answers, tmp_path / "out.jsonl", predictor)
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [r.get("prediction") for r in rows] == [a.prediction and a.prediction.prediction for a in answers]
    assert rows[0]["bundle"] == predictor.digest
    assert sum(rows[0]["probabilities"].values()) == pytest.approx(1)
    write_answers(answers, tmp_path / "out.csv", predictor)
    with (tmp_path / "out.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert list(table[0]) == ["path", "prediction", "confidence", "abstained", "error", "p_a", "p_b", "p_c"]
    assert float(table[0]["p_a"]) == pytest.approx(rows[0]["probabilities"]["a"], abs=1e-6)
    assert table[1]["error"].startswith("is not an image")


def test_written_answers_of_several_labels(photos: Path, tmp_path: Path) -> None:
    make_bundle(tmp_path / "bundle", task="multilabel", seed=1)
    predictor = Predictor.load(tmp_path / "bundle")
    for seed in range(20):
        (photos / f"{seed}.png").write_bytes(make_image(seed))
    answers = predict_files(predictor, find_images([str(photos)]))
    write_answers(answers, tmp_path / "out.jsonl", predictor)
    write_answers(answers, tmp_path / "out.csv", predictor)
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    with (tmp_path / "out.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(lines) == len(rows) == 23
    for line, row, answer in zip(lines, rows, answers, strict=True):
        if answer.prediction is None:
            assert "labels" not in line
            assert (row["prediction"], row["confidence"], row["p_a"]) == ("", "", "")
            assert row["error"] == line["error"] != ""
            continue
        assert line["labels"] == list(answer.prediction.labels or ())
        assert line["labels"] == [c for c in "abc" if line["probabilities"][c] >= 0.5]
        assert row["prediction"] == line["prediction"] == "|".join(line["labels"])
        assert row["error"] == ""
    assert {len(line.get("labels", [])) for line in lines} >= {0, 1, 2}


def test_a_folder_is_read_as_ingest_reads_it(photos: Path, tmp_path: Path) -> None:
    hidden = photos / ".ipynb_checkpoints"
    hidden.mkdir()
    (hidden / "a-checkpoint.png").write_bytes(make_image(3))
    (photos / "._a.png").write_bytes(b"x")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "c.png").write_bytes(make_image(4))
    (photos / "linked").symlink_to(tmp_path / "elsewhere")
    (photos / "again").symlink_to(photos)
    assert names(find_images([str(photos)])) == ["a.png", "broken.jpg", "c.png", "b.JPG"]


@pytest.mark.parametrize("name", [b"caf\xe9.png", b"\xff\xfe.png", "katze 🐈.png".encode(), b"a\nb.png"])
@pytest.mark.parametrize("suffix", ["jsonl", "csv"])
def test_a_name_that_is_not_utf_8_is_escaped_as_ingest_does(
    photos: Path, tmp_path: Path, name: bytes, suffix: str
) -> None:
    for old in photos.rglob("*.*"):
        old.unlink()
    Path(os.fsdecode(os.fsencode(photos) + b"/" + name)).write_bytes(make_image(1))
    make_bundle(tmp_path / "bundle")
    predictor = Predictor.load(tmp_path / "bundle")
    answers = predict_files(predictor, find_images([str(photos)]))
    assert [a.path for a in answers] == [f"{photos}/{escape_name(os.fsdecode(name))}"]
    write_answers(answers, tmp_path / f"out.{suffix}", predictor)
    text = (tmp_path / f"out.{suffix}").read_text(encoding="utf-8")
    assert answers[0].path.replace("\\", "\\\\" if suffix == "jsonl" else "\\") in text


def test_answers_that_cannot_be_written_leave_no_half_file(photos: Path, tmp_path: Path) -> None:
    make_bundle(tmp_path / "bundle")
    predictor = Predictor.load(tmp_path / "bundle")
    answers = predict_files(predictor, find_images([str(photos)]))
    (tmp_path / "out.csv").mkdir()
    with pytest.raises(DiskError, match=r"--out .*out\.csv: cannot be written \(Is a directory\)"):
        write_answers(answers, tmp_path / "out.csv", predictor)
    with pytest.raises(AttributeError):
        write_answers([*answers, None], tmp_path / "out.jsonl", predictor)  # type: ignore[list-item]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bundle", "out.csv", "photos"]
