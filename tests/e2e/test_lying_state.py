"""State that would lie: params.yaml edited while a retrain trains, and a store that is not the one it was."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from shapes import make_environment, visionloop
from visionloop import pipeline
from visionloop.errors import PipelineError
from visionloop.params.text import parse_yaml
from visionloop.settings import load_settings


@pytest.fixture(scope="module")
def home(copied: Path) -> Path:
    """A workspace with a champion. The tests are one story: each goes on where the one before ended."""
    path = copied / "params.yaml"
    path.write_text(path.read_text().replace("3.0e-3", "2.5e-3"))
    return copied


def start_and_edit(home: Path, old: str, new: str) -> tuple[int, str]:
    """Run `visionloop start`, and edit params.yaml when it has begun to train."""
    command, env = [sys.executable, "-m", "visionloop", "start"], make_environment()
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    path = home / "params.yaml"
    with subprocess.Popen(command, cwd=home, env=env, text=True, **pipes) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if "loading torch to train" in line:
                text = path.read_text()
                assert old in text
                path.write_text(text.replace(old, new))
                break
        rest, told = process.communicate(timeout=240)
    assert "gate" not in rest, "nothing is judged after a stage that has failed"
    return process.returncode, told


def read_stages(home: Path) -> dict[str, Any]:
    """What dvc has recorded of each stage."""
    return dict(parse_yaml((home / "dvc.lock").read_text())["stages"])


def read_rate(home: Path) -> float:
    """The learning rate that the candidate was trained with."""
    card = json.loads((home / "models" / "candidate" / "card.json").read_text())
    return float(card["params"]["train"]["learning_rate"])


@pytest.mark.long
def test_an_edit_while_it_trains_is_told_and_trained_the_next_time(home: Path) -> None:
    recorded = read_stages(home)
    code, told = start_and_edit(home, "2.5e-3", "2.0e-3")
    assert code == 2, told
    assert told.startswith("error: stage train: params.yaml changed while it ran (train); expected what it has read")
    assert told.count("\n") == 1
    assert read_stages(home)["train"] == recorded["train"]
    done = visionloop(home, "start")
    assert done.returncode in {0, 3}, done.stderr
    assert "loading torch to train" in done.stdout
    assert read_rate(home) == 2.0e-3
    assert read_stages(home)["train"] != recorded["train"]
    assert "nothing changed: dataset 2, params, code" in visionloop(home, "start").stdout


@pytest.mark.long
def test_a_decision_names_the_params_of_its_candidate(home: Path) -> None:
    """Edited after the training and judged by hand: what the next retrain does must not rest on that decision."""
    path = home / "params.yaml"
    before = path.read_text()
    path.write_text(before.replace("2.0e-3", "1.0e-3"))
    assert visionloop(home, "gate").returncode in {0, 3}
    path.write_text(before)
    assert "nothing changed: dataset 2, params, code" in visionloop(home, "start").stdout
    path.write_text(before.replace("2.0e-3", "1.0e-3"))
    done = visionloop(home, "start")
    assert done.returncode in {0, 3}, done.stderr
    assert "loading torch to train" in done.stdout
    assert read_rate(home) == 1.0e-3


DVC = """\
stages:
  train:
    cmd: "echo made > made.txt; sed -i 's/seed: 1/seed: 2/' params.yaml"
    params: [name, train.seed]
    outs: [made.txt]
"""


def test_dvc_keeps_nothing_of_a_stage_whose_params_changed_meanwhile(tmp_path: Path) -> None:
    """Between our look at the end of a stage and dvc's, too: here the command itself edits, and looks at nothing."""
    (tmp_path / "dvc.yaml").write_text(DVC)
    lock, recorded = tmp_path / "dvc.lock", None
    for seed in (1, 3, 1):
        (tmp_path / "params.yaml").write_text(f"name: pets\ntrain: {{seed: {seed}}}\n")
        settings = load_settings({}, tmp_path)
        pipeline.init_dvc(tmp_path)
        if seed == 3:
            assert pipeline.run_stage(settings, "train", lambda line: None).status == "ran"
            recorded = lock.read_bytes()
            continue
        with pytest.raises(PipelineError, match=r"params\.yaml changed while it ran \(train\.seed\)"):
            pipeline.run_stage(settings, "train", lambda line: None)
        assert (lock.read_bytes() if lock.is_file() else None) == recorded
    assert pipeline.run_stage(settings, "train", lambda line: None).status == "ran", "not restored for the edit"
