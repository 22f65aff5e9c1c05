"""What typer does not understand is one line: what was typed, the nearest name, what to type. For every command."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from fakes import run_here
from visionloop.cli.app import app
from visionloop.errors import SettingsError


@pytest.fixture
def line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Run words that are wrong; return the one line that is said."""
    monkeypatch.chdir(tmp_path)

    def run(*words: str) -> str:
        assert run_here(monkeypatch, *words) == 2
        told = capsys.readouterr()
        assert (told.out, told.err.count("\n")) == ("", 1), told.err
        return told.err.removeprefix("error: ").rstrip("\n")

    return run


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (
            "trian",
            "trian: is no command; expected `visionloop train` or `visionloop retrain`. `visionloop --help` lists",
        ),
        (
            "datasets shwo",
            "datasets shwo: is no command; expected `visionloop datasets show`. `visionloop datasets --h",
        ),
        ("keys lsit", "keys lsit: is no command; expected `visionloop keys list`."),
        ("shadow x", "shadow x: is no command; expected one of report, start, stop. `visionloop shadow --help` lists"),
        ("frobnicate", "frobnicate: is no command; expected one of its commands."),
        ("rtsp://u:w0rd@h/1", "rtsp://***@h/1: is no command; expected one of its commands."),
        ("photos.zip", "photos.zip: is no command, but a file or folder; expected a command first. `visionloop start"),
        ("predict --topp 3 a", "predict --topp: is no option; expected --top. `visionloop predict --help` lists all."),
        (
            "train --epochs 3",
            "train --epochs: is no option; expected one of --help, --quiet. What changes results is s",
        ),
        ("train -z", "train -z: is no option; expected one of --help, --quiet."),
        ("--vers", "--vers: is no option; expected --version."),
        (
            "serve --port",
            "serve --port: has no value; expected one after it: the port; 0 takes a free one. For example",
        ),
        ("doctor --json=yes", "doctor --json: has a value; expected none: it is a switch. Say `--json` alone."),
        (
            "serve --port abc",
            "serve --port: got 'abc'; expected a whole number. For example `visionloop serve --port 0",
        ),
        (
            "up --port 99999",
            "up --port: got '99999'; expected at most 65535. For example `visionloop up --detach --port",
        ),
        ("runs --last 0", "runs --last: got '0'; expected at least 1."),
        ("datasets show x", "datasets show NUMBER: got 'x'; expected a whole number. For example `visionloop datasets"),
        (
            "runs --status fnished",
            "runs --status: got 'fnished'; expected finished, or one of running, failed, killed.",
        ),
        ("schedule --type boat", "schedule --type: got 'boat'; expected one of process, docker, kubernetes."),
        ("predict", "predict: PATHS is missing; expected images, videos, folders, globs in quotes; or streams"),
        (
            "approve",
            "approve: --why is missing; expected the reason, which is kept. For example `visionloop approve --w",
        ),
        (
            "export a",
            "export: FOLDER is missing; expected a new or empty folder. For example `visionloop export champion",
        ),
        (
            "serve --check --bundle models/candidate",
            "serve --check: is followed by --bundle; expected its value: only try it: a folder, or a digest of the "
            "store. Say `visionloop serve --check models/candidate`, without --bundle.",
        ),
        ("doctor x y", "doctor: got 'x y' too; expected options alone. For example `visionloop doctor`."),
        ("export a b c", "export: got 'c' too; expected MODEL FOLDER alone."),
        ("retrain --epoch", "retrain --epoch: is no option; expected one of --help, --workspace."),
    ],
)
def test_a_mistake_names_what_fits(line: Any, tmp_path: Path, words: str, told: str) -> None:
    (tmp_path / "photos.zip").touch()
    assert line(*words.split()).startswith(f"visionloop {told}")


def test_what_a_terminal_would_obey_is_not_printed(line: Any) -> None:
    assert "\x1b" not in line("\x1b[2J\n\nx" * 50)
    assert "\x1b" not in line("train", "--\x1b[2J\nx")
    assert "\x1b" not in line("serve", "--port", "\x1b[2J\nx" * 50)
    assert len(line("serve", "--port", "9" * 10_000)) < 300


@pytest.fixture
def root(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """The tree of commands, built once."""
    assert run_here(monkeypatch) == 0, "all commands are loaded by now"
    capsys.readouterr()
    return typer.main.get_command(app)


def walk(command: Any, words: tuple[str, ...] = ()) -> Iterator[tuple[list[str], Any]]:
    """Yield each command with the words that name it."""
    yield [*words], command
    for name, child in getattr(command, "commands", {}).items():
        yield from walk(child, (*words, name))


def test_each_command_tells_of_an_unknown_option_and_of_one_without_value(root: Any) -> None:
    number = 0
    for words, command in walk(root):
        valued = [one.opts[0] for one in command.params if one.param_type_name == "option" and not one.is_flag]
        for name, told in [("--no-such-option", "is no option; expected ")] + [(n, "has no value; ") for n in valued]:
            with pytest.raises(SettingsError, match=f"{name}: {told}") as caught:
                root.main([*words, name], prog_name="visionloop", standalone_mode=False)
            assert caught.value.where == " ".join(["visionloop", *words, name])
            assert re.fullmatch(r"[^\n]+(\.|`\.)", str(caught.value))
            number += 1
    assert number > 120


def test_help_fits_80_columns(root: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert run_here(monkeypatch) == 0
    shown = [capsys.readouterr().out]
    for words, _ in walk(root):
        root.main([*words, "--help"], prog_name="visionloop", standalone_mode=False)
        shown.append(capsys.readouterr().out.partition("Examples:")[0])  # a command is not broken in two
    assert [line for text in shown for line in text.splitlines() if len(line) > 80] == []
