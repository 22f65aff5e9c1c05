"""Errors are one line with a place, and know their exit code."""

import importlib.metadata
import importlib.util
import json
import pickle
from typing import Any

import pytest

from visionloop.errors import NotPromoted, ParamsError, TrackingError, describe_install, shorten


def test_message_has_four_parts() -> None:
    error = ParamsError("params.yaml prepare.image_size", "got 0", "an integer >= 32", "Edit the file.")
    assert str(error) == "params.yaml prepare.image_size: got 0; expected an integer >= 32. Edit the file."
    assert (error.code, error.exit_code, error.transient) == ("params_error", 2, False)
    assert isinstance(error, ValueError)


def test_a_hostile_name_does_not_reach_the_terminal() -> None:
    error = ParamsError("a\x1b[31mred\u202e.png\nerror: b", "is \x9b missing", "one")
    assert str(error) == r"a\x1b[31mred\u202e.png error: b: is \x9b missing; expected one."


def test_kinds_know_exit_code_and_whether_to_try_again() -> None:
    assert NotPromoted("gate", "refused").exit_code == 3
    assert TrackingError("MLflow", "down").transient


def test_an_error_survives_pickling() -> None:
    error = pickle.loads(pickle.dumps(ParamsError("a", "b", "c", "d")))
    assert str(error) == "a: b; expected c. d"


def test_lists_are_sorted_and_cut_at_five() -> None:
    assert shorten(["b", "a"]) == "a, b"
    assert shorten([str(i) for i in range(8)]) == "0, 1, 2, 3, 4 and 3 more"


@pytest.mark.parametrize(
    ("told", "command"),
    [
        ({"url": "file:///a/my%20clone", "dir_info": {"editable": True}}, "pip install -e '/a/my clone[heic]'"),
        ({"url": "file:///a/clone", "dir_info": {}}, "pip install '/a/clone[heic]'"),
        ({"url": "file:///a/v.whl", "archive_info": {}}, "pip install 'visionloop[heic] @ file:///a/v.whl'"),
        (
            {"url": "https://git/v.git", "vcs_info": {"vcs": "git", "commit_id": "1f"}},
            "pip install 'visionloop[heic] @ git+https://git/v.git@1f'",
        ),
        (None, "pip install 'visionloop[heic]'"),
    ],
)
def test_an_extra_comes_from_where_visionloop_came_from(
    told: Any, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Installed:
        def read_text(self, name: str) -> str | None:
            assert name == "direct_url.json"
            return None if told is None else json.dumps(told)

    monkeypatch.setattr(importlib.metadata, "distribution", lambda name: Installed())
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    assert describe_install("heic") == command
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert describe_install("heic") == f"uv {command}", "an environment of uv has no pip of its own"
