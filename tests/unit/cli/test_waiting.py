"""Long work says that it goes on; short work, --quiet and --json say nothing; a command ends with the next one."""

import os
import re
import signal
import sys
import time
from collections.abc import Callable

import pytest

from visionloop.cli import waiting
from visionloop.cli.app import say_next
from visionloop.cli.waiting import make_progress, show_waiting, tell_when_stopped
from visionloop.lifetime import Terminated


def read_until(capsys: pytest.CaptureFixture[str], holds: Callable[[str], bool]) -> str:
    """Return what was said when it is so."""
    said, deadline = "", time.monotonic() + 60
    while not holds(said):
        assert time.monotonic() < deadline, said
        time.sleep(0.01)
        said += capsys.readouterr().out
    return said


def test_what_cannot_count_its_work_says_that_it_goes_on(capsys: pytest.CaptureFixture[str]) -> None:
    with show_waiting("placing 9 images", every_s=0.02) as tell:
        tell("a line in between")
        said = read_until(capsys, lambda text: text.count("\n") >= 3)
    lines = said.splitlines()
    lines.remove("a line in between")
    assert all(re.fullmatch(r"placing 9 images: \d+\.\d s", line) for line in lines), said
    capsys.readouterr()
    time.sleep(0.05)
    assert capsys.readouterr().out == "", "it ends with its work"


def test_on_a_terminal_it_is_one_line_that_is_taken_away(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    with show_waiting("placing"):
        said = read_until(capsys, lambda text: "placing" in text)
    said += capsys.readouterr().out
    assert re.match(r"\rplacing: \d+\.\d s", said)
    assert "\n" not in said
    assert said.endswith(f"\r{'':<78}\r")


def test_quiet_shows_nothing_but_what_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    with show_waiting("placing", quiet=True, every_s=0.01) as tell:
        time.sleep(0.03)
        tell("a line")
    make_progress("read", "images", quiet=True)(9, 9)
    say_next("`visionloop train`", quiet=True)
    assert capsys.readouterr().out == "a line\n"


def test_an_error_ends_the_waiting(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="broken"), show_waiting("placing", every_s=0.01):
        raise ValueError("broken")
    capsys.readouterr()
    time.sleep(0.03)
    assert capsys.readouterr().out == ""


def test_what_takes_a_moment_needs_no_progress(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    quick = make_progress("judged", "images", only_slow=True)
    quick(1, 2)
    quick(2, 2)
    assert capsys.readouterr().out == ""
    monkeypatch.setattr(waiting, "MOMENT_S", 0.0)
    slow = make_progress("judged", "images", only_slow=True)
    slow(1, 2)
    slow(2, 2)
    assert capsys.readouterr().out.startswith("judged 2 of 2 images")


def test_the_next_command_is_for_people(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    say_next("`visionloop train`")
    assert capsys.readouterr().out == "next: `visionloop train`\n"
    monkeypatch.setenv("DVC_STAGE", "prepare")
    say_next("`visionloop train`")
    assert capsys.readouterr().out == "", "dvc runs the next stage by itself"


def test_sigterm_is_told_as_ctrl_c_is(capsys: pytest.CaptureFixture[str]) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Terminated), tell_when_stopped():
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)
    assert capsys.readouterr().err == "stopped; the same command goes on from here\n"
    assert signal.getsignal(signal.SIGTERM) is before
