"""What the questions about tables and encodings advise is typed here, and works."""

import re
import shlex
from pathlib import Path

import pytest

from fakes import make_image, run_here


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "ws").mkdir()
    (tmp_path / "ws" / "params.yaml").write_text("name: pets\n")
    monkeypatch.chdir(tmp_path / "ws")
    return tmp_path


def find_commands(error: str) -> list[list[str]]:
    """Return the commands between backticks, without the program's name."""
    return [shlex.split(text)[1:] for text in re.findall(r"`(visionloop [^`]*)`", error)]


def write_table(folder: Path, text: bytes, name: str = "labels.csv") -> Path:
    folder.mkdir(parents=True)
    for i in range(text.count(b"\n") - 1):
        (folder / f"{i}.png").write_bytes(make_image(i))
    (folder / name).write_bytes(text)
    return folder


@pytest.mark.parametrize("header", ["file,label", "picture name,my label"])
def test_several_labels_or_one(
    home: Path, header: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = b'0.png,cat\n1.png,dog\n2.png,"cat,dog"\n'
    folder = write_table(home / "my photos", f"{header}\n".encode() + rows)
    named = [] if header == "file,label" else ["--image-column", "picture name", "--label-column", "my label"]
    for dry in (["--dry-run"], []):
        assert run_here(monkeypatch, "ingest", str(folder), *named, *dry) == 2
        several, one = find_commands(capsys.readouterr().err)
        assert run_here(monkeypatch, *one, *dry) == 0
        shown = capsys.readouterr().out
        assert "3 images of 3 classes would be offered" in shown if dry else "cat,dog" in shown
    (home / "ws" / "params.yaml").write_text("name: tags\ntask: multilabel\n")
    assert run_here(monkeypatch, *several, "--dry-run") == 0
    assert "3 images of 2 classes would be offered" in capsys.readouterr().out


def test_several_labels_in_a_table_of_each_split_folder(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    table = b'file_name,label\n0.png,cat\n1.png,dog\n2.png,"cat,dog"\n'
    for side in ("train", "test"):
        write_table(home / "pets" / side, table, "metadata.csv")
    assert run_here(monkeypatch, "ingest", str(home / "pets"), "--dry-run") == 2
    _, one = find_commands(capsys.readouterr().err)
    assert run_here(monkeypatch, *one, "--dry-run") == 0
    assert "6 images of 3 classes would be offered" in capsys.readouterr().out


def test_a_class_or_no_label(home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    table = b"file,defect\n0.png,None\n1.png,scratch\n2.png,None\n3.png,dent\n"
    folder = write_table(home / "parts", table)
    assert run_here(monkeypatch, "ingest", str(folder), "--dry-run") == 2
    without, a_class = find_commands(capsys.readouterr().err)
    assert run_here(monkeypatch, *without, "--dry-run") == 0
    assert "of 2 classes would be offered" in capsys.readouterr().out
    assert run_here(monkeypatch, *a_class, "--dry-run") == 0
    assert "of 3 classes would be offered" in capsys.readouterr().out


def test_sides_or_no_sides(home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_table(home / "pets", b"file,label,subset\n0.png,cat,0\n1.png,dog,0\n2.png,cat,1\n")
    assert run_here(monkeypatch, "ingest", str(folder), "--dry-run") == 2
    first, turned, none = find_commands(capsys.readouterr().err)
    for command, side in ((first, "test"), (turned, "test"), (none, "decided at ingest")):
        assert run_here(monkeypatch, *command, "--dry-run") == 0
        assert side in capsys.readouterr().out


def test_options_of_tables_are_refused_for_class_folders(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("cat/1.png", "dog/2.png"):
        (home / "photos" / name).parent.mkdir(parents=True)
        (home / "photos" / name).write_bytes(make_image(1))
    for options in (["--separator", ","], ["--no-label", "NA"], ["--label-column", "x"]):
        assert run_here(monkeypatch, "ingest", str(home / "photos"), *options) == 2
        assert "columns or an encoding are named, but labels are those of the paths" in capsys.readouterr().err


def test_the_encoding_of_a_table_and_of_the_names_in_a_zip(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    table = "file,label\n0.png,kočka\n1.png,pes\n".encode("cp1250")
    write_table(home / "pets", table)
    write_table(home / "split" / "train", table.replace(b"file", b"file_name"), "metadata.csv")
    write_table(home / "split" / "test", b"file_name,label\n0.png,pes\n1.png,pes\n", "metadata.csv")
    for folder in ("pets", "split"):
        assert run_here(monkeypatch, "ingest", str(home / folder), "--dry-run") == 2
        command = next(one for one in find_commands(capsys.readouterr().err) if "cp1250" in one)
        assert run_here(monkeypatch, *command, "--dry-run") == 0
        assert "kočka" in capsys.readouterr().out
