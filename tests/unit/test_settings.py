"""Where it runs: the workspace is found, defaults lie inside it."""

import os
from pathlib import Path

import pytest

from visionloop.errors import SettingsError
from visionloop.pipeline import make_stage_environment
from visionloop.settings import (
    TOOLS_VARIABLE,
    apply_tool_environment,
    choose_tool_environment,
    load_settings,
    tool_environment,
)
from visionloop.store import LocalStore, open_store


@pytest.fixture
def home(tmp_path: Path) -> Path:
    (tmp_path / "params.yaml").write_text("name: pets\n")
    (tmp_path / "a" / "b").mkdir(parents=True)
    return tmp_path


def test_nearest_parent_with_params_is_the_workspace(home: Path) -> None:
    settings = load_settings({}, home / "a" / "b")
    assert settings.home == home
    assert settings.store_url == (home / ".visionloop" / "store").as_uri()
    assert settings.tracking_uri == f"sqlite:///{home}/.visionloop/mlflow/mlflow.db"


def test_the_environment_says_where_when_nobody_names_a_folder(home: Path) -> None:
    env = {"VISIONLOOP_HOME": str(home), "VISIONLOOP_STORE": "/data/store", "MLFLOW_TRACKING_URI": "http://mlflow:5000"}
    settings = load_settings(env)
    assert (settings.home, settings.store_url, settings.tracking_uri) == (
        home,
        "file:///data/store",
        "http://mlflow:5000",
    )


def test_a_named_folder_wins_over_the_environment(home: Path) -> None:
    other = make_other(home)
    settings = load_settings({"VISIONLOOP_HOME": str(home)}, other)
    assert settings.home == other
    assert settings.store_url == (other / ".visionloop" / "store").as_uri()
    assert settings.tracking_uri == f"sqlite:///{other}/.visionloop/mlflow/mlflow.db"


def test_the_tools_of_a_second_workspace_are_kept_in_it(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One process may retrain several workspaces; what the user has set himself stays."""
    other = make_other(home)
    for name in tool_environment(home):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TORCH_HOME", "/mine")
    monkeypatch.setenv("VISIONLOOP_HOME", str(home))
    for folder in (home, other):
        apply_tool_environment(folder)
        for env in (os.environ, make_stage_environment(folder, os.environ)):
            assert {n: env[n] for n in tool_environment(folder)} == {**tool_environment(folder), "TORCH_HOME": "/mine"}
    # The stages of a workspace that this process has not opened itself.
    env = make_stage_environment(home, os.environ)
    assert {n: env[n] for n in tool_environment(home)} == {**tool_environment(home), "TORCH_HOME": "/mine"}
    assert env["VISIONLOOP_HOME"] == str(home)


def test_relative_places_lie_in_the_workspace(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(home / "a")
    settings = load_settings({"VISIONLOOP_STORE": "store", "MLFLOW_TRACKING_URI": "sqlite:///mlflow.db"})
    assert settings.store_url == (home / "store").as_uri()
    assert settings.tracking_uri == f"sqlite:///{home}/mlflow.db"
    settings = load_settings({"MLFLOW_TRACKING_URI": "sqlite:////srv/mlflow.db"})
    assert settings.tracking_uri == "sqlite:////srv/mlflow.db"


def make_other(home: Path) -> Path:
    other = home / "other"
    other.mkdir()
    (other / "params.yaml").write_text("name: dogs\n")
    return other


def test_no_workspace(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"no params\.yaml here or above.*`visionloop start PHOTOS`"):
        load_settings({}, tmp_path)
    with pytest.raises(SettingsError, match=r"has no params\.yaml; expected a workspace"):
        load_settings({"VISIONLOOP_HOME": str(tmp_path)})


def test_every_tool_home_is_inside_the_workspace(home: Path) -> None:
    paths = [v for n, v in tool_environment(home).items() if v.startswith("/") and n != TOOLS_VARIABLE]
    assert len(paths) >= 7
    assert all(Path(p).is_relative_to(home / ".visionloop") for p in paths)


def test_unknown_store_scheme() -> None:
    with pytest.raises(SettingsError, match="got 'ftp://host/x'"):
        open_store("ftp://host/x")
    store = open_store("file:///tmp/a%20b")
    assert isinstance(store, LocalStore)
    assert store.root == Path("/tmp/a b")


@pytest.mark.parametrize(("value", "workers"), [(None, None), ("", None), ("0", 0), ("3", 3), ("256", 256)])
def test_number_of_loader_processes(home: Path, value: str | None, workers: int | None) -> None:
    env = {} if value is None else {"VISIONLOOP_LOADER_WORKERS": value}
    assert load_settings(env, home).loader_workers == workers


@pytest.mark.parametrize("value", ["-1", "two", "257", "1.5", "٣", "9" * 5000])
def test_a_number_of_loader_processes_that_is_none(home: Path, value: str) -> None:
    with pytest.raises(SettingsError, match=r"LOADER_WORKERS: got .*; expected a whole number from 0 to 256\."):
        load_settings({"VISIONLOOP_LOADER_WORKERS": value}, home)


@pytest.mark.parametrize(
    ("env", "spared"),
    [
        ({"HTTP_PROXY": "http://proxy:3128"}, "localhost,127.0.0.1,::1"),
        ({"https_proxy": "x", "NO_PROXY": "intern.example, 127.0.0.1"}, "intern.example,127.0.0.1,localhost,::1"),
        ({"ALL_PROXY": "x", "no_proxy": "a", "NO_PROXY": "b"}, "a,localhost,127.0.0.1,::1"),
        ({"HTTP_PROXY": "x", "no_proxy": "*"}, None),
        ({"NO_PROXY": "a"}, None),
    ],
)
def test_this_machine_is_not_asked_through_a_proxy(tmp_path: Path, env: dict[str, str], spared: str | None) -> None:
    chosen = choose_tool_environment(env, tmp_path)
    assert (chosen.get("NO_PROXY"), chosen.get("no_proxy")) == (spared, spared)
    again = choose_tool_environment({**env, **chosen}, tmp_path / "other")
    assert again.get("NO_PROXY") == spared


@pytest.mark.parametrize("inside", ["", "sub/ws"])
def test_a_queued_experiment_of_dvc_uses_the_store_and_mlflow_of_its_workspace(home: Path, inside: str) -> None:
    copy = home / ".dvc" / "tmp" / "exps" / "tmpabc" / inside
    copy.mkdir(parents=True)
    (copy / "params.yaml").write_text("name: pets\n")
    here, there = load_settings({}, copy), load_settings({}, home)
    assert here.home == copy
    assert (here.store_url, here.tracking_uri, here.artifact_root) == (
        there.store_url,
        there.tracking_uri,
        there.artifact_root,
    )
    assert here.hidden_dir == copy / ".visionloop"
    named = {"VISIONLOOP_STORE": "objects", "MLFLOW_TRACKING_URI": "sqlite:///m.db"}
    assert load_settings(named, copy).store_url == (home / "objects").as_uri()
    assert load_settings(named, copy).tracking_uri == f"sqlite:///{home}/m.db"
