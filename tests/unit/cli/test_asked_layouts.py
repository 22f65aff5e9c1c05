"""What the questions about folders advise is typed here, and works."""

import re
import shlex
from pathlib import Path

import pytest

from fakes import make_image, run_here
from source_runs import touch

OPTION = re.compile(r"--(?:pattern|unlabelled) (?:'[^']*'|[^\s`,;]+)(?: --unlabelled (?:'[^']*'|[^\s`,;]+))*")


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "ws").mkdir()
    (tmp_path / "ws" / "params.yaml").write_text("name: pets\n")
    monkeypatch.chdir(tmp_path / "ws")
    return tmp_path


def write(folder: Path, layout: str, num_images: int = 2) -> Path:
    """Write images into folders: `{a,b}/{cat,dog}`; each has other pixels."""
    places = [""]
    for part in re.findall(r"\{[^}]*\}|[^{}]+", layout):
        places = [place + one for place in places for one in part.strip("{}").split(",")]
    for number, place in enumerate(places):
        for i in range(num_images):
            path = folder / place / f"{number}_{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(make_image(10 * number + i))
    return folder


def read_classes(shown: str) -> list[str]:
    """Return the classes of a dry run's table."""
    lines = shown[shown.index("  class ") :].splitlines()[1:]
    names = [line.strip() for line in lines if line.startswith("  ")]
    return [re.split(r"\s{2,}", name)[0] for name in names if re.search(r"\s{2,}[\d,]+$", name)]


@pytest.mark.parametrize(
    ("layout", "answers"),
    [
        ("{berlin,paris}/{cats,dogs}", (["berlin", "paris"], ["cats", "dogs"])),
        ("{berlin/berlin,paris/paris}/{cats,dogs}", (["berlin", "paris"], ["cats", "dogs"])),
        ("{berlin/berlin,paris}/{cats,dogs}", (["berlin", "paris"], ["cats", "dogs"])),
        ("{berlin,paris}/{cats,dogs,cows}", (["berlin", "paris"], ["cats", "cows", "dogs"])),
        ("all/{berlin,paris}/{cats,dogs}", (["berlin", "paris"], ["cats", "dogs"])),
        ("{train,test}/{berlin,paris}/{cats,dogs}", (["berlin", "paris"], ["cats", "dogs"])),
        ("{train,test}/{berlin/x,paris}/{cats,dogs}", (["berlin", "paris"], ["cats", "dogs"])),
        ("{cat,dog}/images/{train,test}/{a,b}", (["a", "b"], ["cat", "dog"])),
        ("{fold_1,fold_2}", (["fold_1", "fold_2"], ["(unlabelled)"])),
        ("my data/{split1,split2}", (["split1", "split2"], ["(unlabelled)"])),
        ("{train,test}", (["test", "train"], ["(unlabelled)"])),
    ],
)
def test_both_answers_work(
    home: Path,
    layout: str,
    answers: tuple[list[str], list[str]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = str(write(home / "photos", layout))
    for dry in (["--dry-run"], []):
        assert run_here(monkeypatch, "ingest", folder, *dry) == 2
        options = [one for one in OPTION.findall(capsys.readouterr().err) if "{label}_" not in one]
        assert len(options) == 2
    for option, classes in zip(options, answers, strict=True):
        assert run_here(monkeypatch, "ingest", folder, *shlex.split(option), "--dry-run") == 0, option
        assert read_classes(capsys.readouterr().out) == classes
    if "(unlabelled)" in answers[1]:  # they come into a data set that has classes
        assert run_here(monkeypatch, "ingest", str(write(home / "known", "{cat,dog}", 5))) == 0
    assert run_here(monkeypatch, "ingest", folder, *shlex.split(options[1])) == 0


def test_a_guess_tells_the_other_way_and_it_works(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = str(write(home / "photos", "{Original Images/Original Images,Augmented Images/Augmented Images}/{a,b}"))
    assert run_here(monkeypatch, "ingest", folder, "--dry-run") == 0
    shown = capsys.readouterr().out
    assert read_classes(shown) == ["a", "b"]
    (option,) = OPTION.findall(shown)
    assert run_here(monkeypatch, "ingest", folder, *shlex.split(option.rstrip(")")), "--dry-run") == 0
    assert read_classes(capsys.readouterr().out) == ["Augmented Images", "Original Images"]


@pytest.mark.parametrize("table", ["labels.csv", "meta/labels.csv"])
def test_a_table_in_a_folder_is_named_by_an_option(
    home: Path, table: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write(home / "photos", "{fold_1,fold_2}")
    touch(folder, [table], b"file,label\n0_0,cat\n0_1,dog\n1_0,cat\n1_1,dog\n")
    assert run_here(monkeypatch, "ingest", str(folder), "--table", table, "--dry-run") == 0
    shown = capsys.readouterr().out
    assert read_classes(shown) == ["cat", "dog"]
    assert "fold_1/0_0.png" in shown
    assert run_here(monkeypatch, "ingest", str(folder), "--table", "gone.csv") == 2
    assert "gone.csv: does not exist" in capsys.readouterr().err
