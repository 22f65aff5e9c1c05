"""What `visionloop evaluate` prints, also of figures that have no interval."""

import pytest

from fakes import run_here
from worlds import GOOD, make_world


def test_figures_without_an_interval_are_printed(tmp_path, monkeypatch, capsys: pytest.CaptureFixture[str]) -> None:
    world = make_world(tmp_path, prepared=True)
    world.write_candidate(GOOD)
    (world.settings.home / "params.yaml").write_text(
        "name: fake\nprepare: {image_size: 32}\nevaluate: {resamples: 400}\n"
    )
    monkeypatch.setenv("VISIONLOOP_HOME", str(world.settings.home))
    monkeypatch.setenv("VISIONLOOP_STORE", world.settings.store_url)
    assert run_here(monkeypatch, "evaluate") == 0
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines() if " " in line)
    assert lines["accuracy"].startswith("0.") and "(95 %: 0." in lines["accuracy"]
    assert "(" not in lines["ece"]


def test_under_dvc_what_dvc_has_recorded_is_looked_at_first(
    tmp_path, monkeypatch, capsys: pytest.CaptureFixture[str]
) -> None:
    world = make_world(tmp_path, prepared=True)
    world.write_candidate(GOOD, params={"train": {"seed": 1}})
    home = world.settings.home
    (home / "params.yaml").write_text("name: fake\nprepare: {image_size: 32}\nevaluate: {resamples: 400}\n")
    (home / "dvc.lock").write_text("stages: {train: {params: {params.yaml: {train: {seed: 2}}}}}\n")
    monkeypatch.setenv("VISIONLOOP_HOME", str(home))
    monkeypatch.setenv("VISIONLOOP_STORE", world.settings.store_url)
    assert run_here(monkeypatch, "evaluate") == 0, "by hand nothing is recorded"
    monkeypatch.setenv("DVC_STAGE", "evaluate")
    assert run_here(monkeypatch, "evaluate") == 2
    assert "dvc.lock train: says seed: 2" in capsys.readouterr().err
