"""The command line: help at once, answers, one line and an exit code for every mistake. No torch in here."""

import errno
import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from fakes import COMMANDS, make_bundle, run_here, write_photos
from visionloop import doctor
from visionloop.bundle import find_fault
from visionloop.cli import features, stages
from visionloop.workspace import open_workspace


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A workspace with a folder of photos beside it; the test stands in it."""
    folder = tmp_path / "ws"
    folder.mkdir()
    (folder / "params.yaml").write_text("name: pets\n")
    write_photos(tmp_path / "photos", 12)
    monkeypatch.chdir(folder)
    return folder


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_examples(command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_here(monkeypatch, command, "--help") == 0
    shown = capsys.readouterr().out
    assert "Examples:" in shown
    assert shown.count(f"visionloop {command}") >= 2, "the usage line, and at least one example"


def test_help_loads_no_heavy_library() -> None:
    heavy = ("torch", "mlflow", "prefect", "sklearn", "pyarrow", "onnxruntime", "pydantic", "numpy", "PIL", "rich")
    code = (
        "import sys; sys.argv = ['visionloop', '--help']\nfrom visionloop.cli import main\n"
        f"try: main()\nexcept SystemExit: pass\nprint([m for m in {heavy!r} if m in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]"


def test_prepare_after_ingest(home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    (home / "params.yaml").write_text("name: pets\nprepare: {image_size: 32}\n")
    assert run_here(monkeypatch, "ingest", "../photos") == 0
    assert run_here(monkeypatch, "prepare") == 0
    assert "run by hand" not in capsys.readouterr().out, "dvc is not in use here"
    assert json.loads((home / "data" / "prepared" / "report.json").read_text())["num_images"] == 24


def test_predict_with_a_bundle(home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    make_bundle(home / "models" / "candidate", classes=("cat", "dog"))
    bundle = str(home / "models" / "candidate")
    assert run_here(monkeypatch, "predict", "../photos/cat/1.png", "--bundle", bundle, "--out", "out.jsonl") == 0
    shown = capsys.readouterr().out
    assert "█" in shown
    assert shown.count("%") == 2
    assert json.loads((home / "out.jsonl").read_text())["prediction"] in {"cat", "dog"}


def flip_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_a_bundle_with_a_flipped_byte(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make_bundle(home / "b")
    flip_byte(home / "b" / "model.onnx")
    assert run_here(monkeypatch, "predict", "../photos/cat/1.png", "--bundle", "b") == 2
    assert "model.onnx differs from its digest; expected the files as they were made" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (("ingest",), "error: params.yaml ingest.sources: names no source; expected at least one."),
        (("ingest", "nowhere"), "does not exist; expected a folder, a table, a .zip"),
        (("prepare",), "error: data/dataset.json: not found: this workspace has no images yet"),
        (("gate",), "error: data/dataset.json: not found"),
        (("predict", "x.jpg"), "error: x.jpg: does not exist; expected an image, a folder or a glob."),
        (("predict", "../photos"), "error: ledger pets: has no champion; expected a promoted model."),
        (("predict", "../photos", "--bundle", "cats@champion"), "knows no 'cats'; expected a name with a dataset."),
        (
            ("predict", "../photos", "--bundle", "x"),
            "error: model 'x': does not exist; expected a bundle's folder,",
        ),
        (("new", "."), "is not empty; expected a new or empty folder."),
        (("new", "x", "--example", "cats"), "got 'cats'; expected one of cats-and-dogs, digits, dog-breeds"),
        (("datasets", "show", "9"), "error: dataset pets version 9: is not in the store"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], argv: tuple[str, ...], line: str
) -> None:
    assert run_here(monkeypatch, *argv) == 2
    error = capsys.readouterr().err
    assert line in error
    assert error.count("\n") == 1


def test_a_wrong_params_file(home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    (home / "params.yaml").write_text("name: pets\ntrain: {epochs: 3}\n")
    assert run_here(monkeypatch, "prepare") == 2
    assert capsys.readouterr().err.startswith(
        "error: params.yaml train.epochs: unknown key; expected one of max_epochs"
    )
    told = json.loads((home / ".visionloop" / "error.json").read_text())
    assert (told["kind"], told["transient"]) == ("ParamsError", False)


def test_outside_of_a_workspace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_here(monkeypatch, "train") == 2
    assert "no params.yaml here or above" in capsys.readouterr().err


def test_new_makes_a_workspace_that_is_valid(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from visionloop.params import load_params

    monkeypatch.chdir(tmp_path)
    started = time.perf_counter()
    assert run_here(monkeypatch, "new", "pets", "--example", "horses-or-humans", "--name", "pets") == 0
    assert time.perf_counter() - started < 30
    assert capsys.readouterr().out.endswith("next: `cd pets && visionloop ingest PHOTOS --save && visionloop start`\n")
    home = tmp_path / "pets"
    assert load_params(home / "params.yaml").name == "pets"
    assert "#VISIONLOOP_STORE=" in (home / ".env.example").read_text(), "params.yaml names it"
    assert "flows/" not in (home / "README.md").read_text(), "a workspace has no such folder"
    assert (home / ".dvc" / "config").is_file()
    assert (home / ".git" / "HEAD").is_file()
    status = subprocess.run(["git", "status", "--porcelain"], cwd=home, capture_output=True, text=True, check=True)
    names = {line[3:] for line in status.stdout.splitlines()}
    assert {"params.yaml", "dvc.yaml", "code.json", ".gitignore"} <= names
    assert not any(name.startswith((".visionloop", "models")) for name in names)
    assert (home / ".visionloop").stat().st_mode & 0o022 == 0, "no folder that everybody may write"


def test_a_dry_run_says_what_would_be_taken_and_writes_nothing(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("train/cat/1.jpg", "train/cat/2.jpg", "train/cat/3.jpg", "train/cat/4.jpg", "train/dog/1.jpg"):
        path = home.parent / "pets" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"no image, and not opened")
    (home.parent / "pets" / "test" / "dog").mkdir(parents=True)
    (home.parent / "pets" / "test" / "dog" / "9.jpg").touch()
    (home.parent / "pets" / "train" / "notes.txt").touch()
    (home.parent / "pets" / "train" / "loose.jpg").touch()
    before = sorted(home.rglob("*"))
    assert run_here(monkeypatch, "ingest", "../pets", "--dry-run") == 0
    assert sorted(home.rglob("*")) == before
    shown = capsys.readouterr().out
    assert "source pets: 6 images of 2 classes would be offered\n" in shown
    table = [line.split() for line in shown.splitlines()]
    assert ["class", "test", "train", "or", "val", "all"] in table
    assert ["cat", "0", "4", "4"] in table
    assert ["dog", "1", "1", "2"] in table
    assert "  cat: train/cat/1.jpg, train/cat/2.jpg, train/cat/3.jpg\n" in shown
    assert "quarantined 1 file that cannot be used:\n      1  no_label\n" in shown
    assert "files passed over: .txt 1\n" in shown
    assert shown.endswith(
        "files passed over: 1\na dry run: nothing was read or written\nnext: the same without --dry-run takes them in\n"
    )


def test_a_dry_run_of_the_declared_sources(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = "name: pets\ningest: {sources: [{kind: folder, path: ../photos, name: a}, {kind: digits, name: b}]}\n"
    (home / "params.yaml").write_text(text)
    assert run_here(monkeypatch, "ingest", "--dry-run") == 2
    shown = capsys.readouterr()
    assert "source a: 24 images of 2 classes would be offered" in shown.out
    assert "source b is of kind digits: its images are known only by reading it" in shown.err
    assert {path.name for path in home.rglob("*") if path.is_file()} == {"params.yaml", "error.json"}


@pytest.mark.parametrize("loaded", ["visionloop.cli.app", "visionloop.cli.predict"])
def test_ctrl_c_while_the_program_is_loaded_is_no_traceback(loaded: str) -> None:
    code = f"""
import sys

class Stop:
    def find_spec(self, name, path=None, target=None):
        if name == {loaded!r}:
            raise KeyboardInterrupt

sys.meta_path.insert(0, Stop())
from visionloop.cli import run_process
run_process()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no device that is always full")
def test_a_stdout_that_takes_nothing_is_one_line() -> None:
    with Path("/dev/full").open("w") as full:
        command = [sys.executable, "-m", "visionloop", "--version"]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    line = "error: stdout: cannot be written (No space left on device); expected free space. Make room; run it again.\n"
    assert (done.returncode, done.stderr) == (2, line)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("command", ["prepare", "embed", "train", "evaluate"])
def test_a_stage_that_meets_a_full_disk_ends_with_one_line(
    home: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], command: str, number: int
) -> None:
    def refuse(name: str) -> None:
        raise OSError(number, "full", str(home / ".visionloop" / "work" / "x"))

    monkeypatch.setattr(stages, "open_stage", refuse)
    monkeypatch.setattr(features, "open_stage", refuse)
    assert run_here(monkeypatch, command) == 2
    told = capfd.readouterr().err
    assert re.fullmatch(
        rf"error: {home}/.visionloop/work/x: cannot be written \(no space left on the disk of {home}\S*, "
        r"[\d.,]+ [KMGT]B free\); expected free space\. Free some; the same command goes on with what is done\.\n",
        told,
    ), told


def test_a_retrain_on_a_full_disk_does_not_wait_for_prefect(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=4096))
    monkeypatch.setattr(stages, "_run_flow", lambda *words: pytest.fail("it was started"))
    assert run_here(monkeypatch, "retrain") == 2
    told = f"visionloop retrain: cannot be written (no space left on the disk of {home}, 4.1 KB free); expected free"
    assert told in capsys.readouterr().err


def test_no_candidate_says_how_to_make_one(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def tell() -> str:
        assert run_here(monkeypatch, "predict", "../photos/cat/1.png", "--bundle", "candidate") == 2
        return capsys.readouterr().err

    told = "error: models/candidate: there is no candidate; expected what a training makes. "
    assert tell() == f"{told}Run `visionloop train`.\n"
    work = home / ".visionloop" / "work" / "train" / "0123"
    work.mkdir(parents=True)
    (work.parent / "lock").touch()
    assert tell() == f"{told}A training was broken off: `visionloop train` goes on.\n"
    (work / "done.json").touch()
    assert tell() == f"{told}Run `visionloop train`.\n"


def test_doctor_has_a_row_for_the_candidate(home: Path) -> None:
    workspace = open_workspace(home)

    def look() -> tuple[bool, str, str]:
        found = doctor._check_candidate(workspace.settings)
        return found.ok, found.found, found.todo

    assert look() == (True, "none", "")
    work = workspace.settings.work_dir("train") / "0123"
    work.mkdir(parents=True)
    assert look() == (False, "none", "A training was broken off: `visionloop train` goes on.")
    (work / "done.json").touch()
    candidate = workspace.settings.candidate_dir
    digest = make_bundle(candidate)[:12]
    assert look() == (True, f"bundle {digest} is whole", "")
    assert find_fault(candidate) == ""
    (candidate / "card.json").write_text("{}")
    assert look() == (
        False,
        "models/candidate: card.json differs from its digest",
        "Run `visionloop train`: it makes it whole.",
    )
    assert find_fault(candidate) == (
        "models/candidate is not as it was made (card.json differs from its digest): `visionloop train` puts it back"
    )


def test_the_answers_to_a_question_are_options(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (home.parent / "photos" / "test").mkdir()
    (home.parent / "photos" / "test" / "1.png").write_bytes((home.parent / "photos" / "cat" / "1.png").read_bytes())
    assert run_here(monkeypatch, "ingest", "../photos", "--dry-run") == 2
    error = capsys.readouterr().err
    assert "Say --pattern '{label}/' if it is a class, or --unlabelled test if it is not" in error
    assert run_here(monkeypatch, "ingest", "../photos", "--dry-run", "--pattern", "{label}/") == 0
    assert "of 3 classes" in capsys.readouterr().out
    assert run_here(monkeypatch, "ingest", "../photos", "--dry-run", "--unlabelled", "test") == 0
    shown = capsys.readouterr().out
    assert "of 2 classes" in shown
    assert "(unlabelled): test/1.png" in shown
    assert run_here(monkeypatch, "ingest", "../photos", "--encoding", "gbk") == 2
    assert "columns or an encoding are named, but labels are those of the paths" in capsys.readouterr().err
