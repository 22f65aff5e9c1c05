"""People's machines: no git, a folder that git refuses, a narrow encoding, an environment with one extra alone."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fakes import make_bundle, make_image, run_here
from visionloop.errors import describe_install, find_missing_extra


def start(*words: str, here: Path, path: str = "", **variables: str) -> subprocess.CompletedProcess[str]:
    """Run the command line in a process of its own."""
    env = {**os.environ, "PATH": path or os.environ["PATH"], **variables}
    command = [sys.executable, "-m", "visionloop", *words]
    return subprocess.run(command, cwd=here, env=env, capture_output=True, text=True, check=False, errors="replace")


def run_dvc(home: Path, *words: str, path: str = "") -> int:
    env = {**os.environ, "PATH": path or os.environ["PATH"], "GIT_PYTHON_REFRESH": "quiet", "DVC_NO_ANALYTICS": "1"}
    command = [sys.executable, "-m", "dvc", *words]
    return subprocess.run(command, cwd=home, env=env, capture_output=True, check=False).returncode


@pytest.mark.parametrize(
    "kind", ["no git", pytest.param("dubious ownership", marks=pytest.mark.long), "in a git that is refused"]
)
def test_a_workspace_without_git(tmp_path: Path, kind: str) -> None:
    (tmp_path / "bin").mkdir()
    variables, path = {}, str(tmp_path / "bin")
    if kind != "no git":
        variables, path = {"GIT_TEST_ASSUME_DIFFERENT_OWNER": "1"}, ""
    if kind == "in a git that is refused":
        subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    done = start("new", "w", here=tmp_path, path=path, **variables)
    assert (done.returncode, done.stderr) == (0, "")
    assert "git is not installed, or refuses this folder: dvc works without it" in done.stdout
    assert run_dvc(tmp_path / "w", "status", path=path) == 0


@pytest.fixture
def home(tmp_path: Path) -> Path:
    (tmp_path / "params.yaml").write_text("name: pets\n")
    make_bundle(tmp_path / "b", classes=("cat", "dog"))
    (tmp_path / "katze-ü-猫.png").write_bytes(make_image(1))
    (tmp_path / "bad.jpg").write_text("no")
    return tmp_path


@pytest.mark.parametrize("encoding", [pytest.param("latin-1", marks=pytest.mark.long), "ascii", "cp1252"])
def test_what_a_terminal_cannot_show_is_replaced(home: Path, encoding: str) -> None:
    done = start("predict", "katze-ü-猫.png", "--bundle", "b", here=home, PYTHONIOENCODING=encoding)
    assert (done.returncode, done.stderr) == (0, "")
    assert "%" in done.stdout


def test_no_file_that_could_be_used_is_exit_code_2(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(home)
    assert run_here(monkeypatch, "predict", "bad.jpg", "--bundle", "b", "--out", "out.csv") == 2
    assert "error: bad.jpg: none of 1 could be used: is text, not an image" in capsys.readouterr().err
    assert (home / "out.csv").read_text().count("\n") == 2
    assert run_here(monkeypatch, "predict", "bad.jpg", "katze-ü-猫.png", "--bundle", "b") == 0


@pytest.mark.parametrize(
    ("name", "extra"),
    [("torch", "train"), ("mlflow.tracking", "train"), ("sklearn.metrics", "train"), ("prefect", "flows")],
)
def test_a_library_that_is_not_installed_names_its_extra(
    name: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import importlib.metadata

    real = importlib.metadata.version

    def version(package: str) -> str:
        if package in ("torch", "mlflow", "scikit-learn", "prefect"):
            raise importlib.metadata.PackageNotFoundError(package)
        return real(package)

    monkeypatch.setattr(importlib.metadata, "version", version)
    told = find_missing_extra(ModuleNotFoundError(f"No module named {name!r}", name=name))
    assert told is not None
    assert "is not installed; expected it for this command" in str(told)
    assert told.todo == f"Run `{describe_install(extra)}`."
    assert find_missing_extra(ModuleNotFoundError("x", name="my_plugin")) is None
    assert find_missing_extra(ImportError("x")) is None


def test_a_missing_library_is_one_line_for_any_command(home: Path) -> None:
    hide = (
        "import sys, importlib.metadata as m\n"
        "real = m.version\n"
        "def version(name):\n"
        "    if name in ('torch', 'mlflow', 'scikit-learn'): raise m.PackageNotFoundError(name)\n"
        "    return real(name)\n"
        "m.version = version\n"
        "for name in ('torch', 'mlflow', 'sklearn'): sys.modules[name] = None\n"
        "from visionloop.cli import main\n"
    )
    for words, line in (
        (["runs"], "error: mlflow: is not installed; expected it for this command. Run `"),
        (["doctor"], ""),
    ):
        code = f"{hide}sys.argv = ['visionloop', *{words!r}]\nmain()"
        done = subprocess.run([sys.executable, "-c", code], cwd=home, capture_output=True, text=True, check=False)
        assert (done.returncode, "Traceback" in done.stderr) == (2, False), done.stderr
        assert done.stderr.startswith(line)
        if words == ["doctor"]:
            assert describe_install("train") in done.stdout
