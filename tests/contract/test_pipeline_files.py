"""dvc.yaml and params.yaml, of the repository and of the examples, against the parameters and each other."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from visionloop.params import Params, load_params
from visionloop.params.text import parse_yaml
from visionloop.settings import tool_environment

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "src" / "visionloop" / "examples"
NAMES = ("cats-and-dogs", "digits", "dog-breeds", "fourteen-classes", "horses-or-humans", "photos")
PARAMS_FILES = (ROOT / "params.yaml", *(EXAMPLES / name / "params.yaml" for name in NAMES))
STAGES = {
    "prepare": {"deps": {"data/dataset.json"}, "outs": {"data/prepared"}},
    "embed": {"deps": {"data/prepared"}, "outs": {"features"}},
    "train": {"deps": {"data/dataset.json", "data/prepared", "features"}, "outs": {"models/candidate"}},
    "evaluate": {
        "deps": {"data/prepared", "models/candidate"},
        "outs": {
            *("reports/report.html", "reports/intervals.json"),
            *("reports/predictions.csv", "reports/per_class.csv", "reports/slices.csv"),
        },
    },
}


def load_stages() -> dict[str, Any]:
    stages: dict[str, Any] = parse_yaml((EXAMPLES / "dvc.yaml").read_text())["stages"]
    return stages


def list_sections(stage: dict[str, Any]) -> set[str]:
    """The keys of params.yaml that a stage depends on."""
    return {param for param in stage["params"] if isinstance(param, str)}


def test_the_repository_is_the_digits_workspace() -> None:
    assert (ROOT / "dvc.yaml").read_bytes() == (EXAMPLES / "dvc.yaml").read_bytes()
    assert (ROOT / "params.yaml").read_bytes() == (EXAMPLES / "digits" / "params.yaml").read_bytes()
    assert (ROOT / ".dvc" / "plots.html").read_bytes() == (EXAMPLES / "plots.html").read_bytes()
    assert "html_template = plots.html" in (ROOT / ".dvc" / "config").read_text()


def test_examples_are_the_agreed_ones() -> None:
    assert sorted(path.name for path in EXAMPLES.iterdir() if path.is_dir()) == sorted(NAMES)
    assert [sorted(file.name for file in (EXAMPLES / name).iterdir()) for name in NAMES] == [
        ["README.md", "params.yaml"]
    ] * len(NAMES)


@pytest.mark.parametrize("path", PARAMS_FILES, ids=lambda path: path.parent.name)
def test_params_hold_the_agreed_values(path: Path) -> None:
    params = load_params(path)
    assert params.name == (path.parent.name if path.parent.name in NAMES else "digits")
    assert (params.prepare.size_hw, params.train.backbone, params.train.weights, params.train.way) == {
        "cats-and-dogs": ((224, 224), "efficientnet_lite0", "default", "knn"),
        "digits": ((32, 32), "small_cnn", "none", "scratch"),
        "dog-breeds": ((224, 224), "efficientnet_lite0", "default", "frozen"),
        "fourteen-classes": ((768, 1024), "depthwise_cnn", "none", "scratch"),
        "horses-or-humans": ((224, 224), "efficientnet_lite0", "default", "finetune"),
        "photos": ((224, 224), "efficientnet_lite0", "default", "frozen"),
    }[params.name]
    patience = {"dog-breeds": 3, "horses-or-humans": 2}.get(params.name, 5)
    stopping = (patience, "val/accuracy" if params.name == "dog-breeds" else "val/loss")
    assert (params.train.patience, params.train.monitor, params.train.seed) == (*stopping, 0)
    assert (params.gate.rule, params.gate.alpha) == ("better", 0.05)
    is_experiment = params.ingest.split.method == "random"
    assert is_experiment == (params.name == "dog-breeds")
    assert params.schedule.retrain == (None if is_experiment else "0 3 * * *")


@pytest.mark.parametrize("path", PARAMS_FILES, ids=lambda path: path.parent.name)
def test_params_files_hold_every_section_of_a_stage(path: Path) -> None:
    # dvc refuses a stage whose section is missing, although every key has a default.
    sections = set(parse_yaml(path.read_text()))
    for stage in load_stages().values():
        assert list_sections(stage) <= sections & set(Params.model_fields)


def test_stages_are_the_agreed_ones_in_order() -> None:
    assert list(load_stages()) == list(STAGES)


@pytest.mark.parametrize("name", STAGES)
def test_stage_bears_one_name_everywhere(name: str) -> None:
    stage = load_stages()[name]
    assert stage["cmd"] == f"python -m visionloop {name}"
    assert name in list_sections(stage)
    weights = ["weights"] if name in {"embed", "train"} else []
    limit = ["max_pixels"] if name == "train" else []
    assert {"code.json": [name, *weights, *limit]} in stage["params"]
    assert set(stage["deps"]) == STAGES[name]["deps"]
    assert set(stage["outs"]) == STAGES[name]["outs"]


def test_metrics_are_few_and_plots_are_folders_of_pictures() -> None:
    stages = load_stages()
    assert stages["evaluate"]["metrics"] == ["reports/metrics.json"]
    assert (stages["train"]["plots"], stages["evaluate"]["plots"]) == (["reports/training"], ["reports/figures"])


@pytest.mark.parametrize("ignore_file", [ROOT / ".gitignore", EXAMPLES / "gitignore"], ids=["repository", "examples"])
def test_git_ignores_every_out_and_no_lineage(ignore_file: Path, tmp_path: Path) -> None:
    shutil.copy(ignore_file, tmp_path / ".gitignore")
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    stages = load_stages().values()
    outs = {out for stage in stages for kind in ("outs", "metrics", "plots") for out in stage.get(kind, ())}
    lineage = ["params.yaml", "dvc.yaml", "dvc.lock", "code.json", "data/dataset.json"]
    hidden = [".visionloop/store/x", "decisions/latest.json", ".env"]
    call = ["git", "-C", str(tmp_path), "check-ignore", *sorted(outs), *hidden, *lineage]
    ignored = subprocess.run(call, capture_output=True, text=True, check=False).stdout.split()
    assert sorted(ignored) == sorted([*outs, *hidden])


def test_dvc_accepts_the_stages(tmp_path: Path) -> None:
    shutil.copy(EXAMPLES / "dvc.yaml", tmp_path)
    shutil.copy(EXAMPLES / "digits" / "params.yaml", tmp_path)
    env = {**os.environ, **tool_environment(tmp_path)}
    for command in (["init", "--no-scm", "-q"], ["stage", "list", "--name-only"]):
        call = [sys.executable, "-m", "dvc", *command]
        done = subprocess.run(call, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    assert done.stdout.split() == list(STAGES)
