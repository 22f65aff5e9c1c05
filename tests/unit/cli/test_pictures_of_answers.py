"""`predict --pictures DIR`: each image with its answer, under its own name; nothing is overwritten."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fakes import make_bundle, make_image, run_here
from visionloop.cli.pictures import describe_picture
from visionloop.data import contact_sheet
from visionloop.data.contact_sheet import ANSWERED_BAND, ANSWERED_LEAST_PX, ANSWERED_PX, Panel, draw_answered
from visionloop.predict.files import FilePrediction
from visionloop.records import Prediction

SHOWN = {"cat": "cat", "dog": "dog", "قطة": "قطة"}


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "params.yaml").write_text("name: pets\n")
    make_bundle(tmp_path / "b", classes=("cat", "dog", "قطة"))
    for name, size_hw in (("a/1.png", (32, 32)), ("b/1.jpg", (30, 1200)), (f"b/{'猫' * 80}.png", (40, 40))):
        path = tmp_path / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(make_image(1, size_hw=size_hw, kind="JPEG" if path.suffix == ".jpg" else "PNG"))
    (tmp_path / "photos" / "b" / "broken.jpg").write_bytes(b"no image")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_each_image_is_saved_and_none_is_overwritten(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ("predict", "photos", "--bundle", "b", "--pictures", "out")
    assert run_here(monkeypatch, *command) == 0
    assert "3 pictures in out" in capsys.readouterr().out
    long = "猫" * 66  # 200 bytes and a suffix fit every file system
    assert {path.name for path in (home / "out").iterdir()} == {"1.png", "1-2.png", f"{long}.png"}
    before = {path: path.read_bytes() for path in (home / "out").iterdir()}
    assert run_here(monkeypatch, *command, "--out", "answers.jsonl") == 0
    assert {path: path.read_bytes() for path in before} == before
    assert run_here(monkeypatch, *command[:-1], "photos/.out") == 0, "what is hidden is never asked about"
    assert {"1-3.png", "1-4.png", f"{long}-2.png"} <= {path.name for path in (home / "out").iterdir()}
    with Image.open(home / "out" / "1-2.png") as picture:
        assert picture.size == (ANSWERED_PX, 20 + ANSWERED_BAND), "bounded, in its shape"
        assert np.asarray(picture)[20:].min() < 100, "something is written below"
    with Image.open(home / "out" / "1.png") as picture:
        assert picture.width == ANSWERED_LEAST_PX, "a tiny one is enlarged, so that the answer has room"


@pytest.mark.parametrize(
    ("folder", "line"),
    [
        ("photos", "error: --pictures photos: holds 1.png, which is asked about; expected a folder."),
        (
            "photos/../photos",
            "error: --pictures photos/../photos: holds 1.png, which is asked about; expected a folder.",
        ),
        ("photos/out", "error: --pictures photos/out: lies in photos, which is asked about; expected a folder."),
        ("params.yaml", "error: --pictures params.yaml: cannot be made (File exists); expected a folder."),
    ],
)
def test_a_folder_that_will_not_do(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], folder: str, line: str
) -> None:
    assert run_here(monkeypatch, "predict", "photos", "--bundle", "b", "--pictures", folder) == 2
    assert capsys.readouterr().err.startswith(line)


def test_the_folder_is_known_by_every_name_it_has(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (home / "linked").symlink_to("photos")
    for asked, folder in (("a/../photos", "photos"), ("photos", "linked"), ("linked", "photos")):
        (home / "a").mkdir(exist_ok=True)
        assert run_here(monkeypatch, "predict", asked, "--bundle", "b", "--pictures", folder) == 2
        assert "holds 1.png, which is asked about" in capsys.readouterr().err


def test_a_sheet_shows_and_counts_the_images_that_have_an_answer_and_names_the_others(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    drawn: list[str] = []
    draw = contact_sheet.draw_prediction_sheet

    def keep(panels: list[Panel], title: str, notes: list[str]) -> bytes:
        drawn[:] = [*(panel.note for panel in panels), title, *notes]
        return draw(panels, title, notes)

    monkeypatch.setattr(contact_sheet, "draw_prediction_sheet", keep)
    command = ("predict", "photos", "--bundle", "b", "--sheet", "s.png")
    assert run_here(monkeypatch, *command) == 0
    why = "is text, not an image; expected JPEG, PNG, WebP, AVIF or HEIC"
    assert drawn[:2] == ["1.png", "1.jpg"] and drawn[3].startswith("3 of 3 images, bundle ")
    assert drawn[4:] == ["1 could not be used:", f"photos/b/broken.jpg: {why}"]
    out = capsys.readouterr().out
    assert "; 1 could not be used: photos/b/broken.jpg\n" in out and "\nall of them in s.png" in out
    with Image.open(home / "s.png") as picture:
        low = picture.height
        assert np.asarray(picture)[-60:].min() < 100, "it is written below"
    for number in range(7):
        (home / "photos" / f"{number}.jpg").write_bytes(b"no image")
    assert run_here(monkeypatch, *command, "--quiet") == 0
    assert drawn[4:6] == ["8 could not be used:", f"photos/0.jpg: {why}"] and drawn[9:] == [
        f"photos/4.jpg: {why}",
        "... and 3 more",
    ]
    names = ", ".join(f"photos/{number}.jpg" for number in range(5))
    assert f"; 8 could not be used: {names}, and 3 more\n" in capsys.readouterr().out
    with Image.open(home / "s.png") as picture:
        assert picture.height == low + 5 * contact_sheet.LINE_H


def test_a_batch_that_is_stopped_says_how_to_go_on(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(*args: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("visionloop.predict.chunks.predict_files", stop)
    assert run_here(monkeypatch, "predict", "photos", "--bundle", "b", "--out", "x.csv") == 130
    assert "stopped; the same command goes on from here" in capsys.readouterr().err


def test_a_sheet_needs_a_folder_that_is_there(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_here(monkeypatch, "predict", "photos", "--bundle", "b", "--sheet", "nope/s.png") == 2
    assert capsys.readouterr() == (
        "",
        "error: --sheet nope/s.png: there is no folder nope; expected one. Make it, or check the path.\n",
    )
    assert not (home / "nope").exists()


def test_what_is_written_below_an_image() -> None:
    def describe(**facts: object) -> tuple[list[str], list[str]]:
        shares = {"cat": 0.6, "dog": 0.3, "قطة": 0.1}
        return describe_picture(FilePrediction("1.png", Prediction("cat", shares, 0.6, **facts)), SHOWN)  # type: ignore[arg-type]

    assert describe() == (["cat", "60%"], ["dog", "30%", "قطة", "10%"])
    assert describe(abstained="below 70 %") == (["don't know"], ["at best", "cat", "60%", "(below 70 %)"])
    assert describe(labels=()) == (["no label", "60%"], ["cat", "60%", "dog", "30%", "قطة", "10%"])
    assert describe(labels=("cat", "dog")) == (["cat, dog", "60%"], ["قطة", "10%"])


def test_dont_know_is_in_another_colour() -> None:
    image = Image.new("RGB", (300, 300))
    known, unknown = (
        np.frombuffer(draw_answered(image, ["don't know"], [], is_unsure=unsure), np.uint8) for unsure in (False, True)
    )
    assert known.tobytes() != unknown.tobytes()
