"""dvc's own views in a workspace with git: `exp run -S`, `exp show`, `metrics diff`, `plots diff`.

Nothing here depends on how reports/metrics.json is laid out, but that its figures are numbers.
"""

import csv
import io
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from shapes import run
from visionloop.params.text import parse_yaml


def dvc(home: Path, *argv: str) -> str:
    """Run dvc in a workspace as a person does; return what it prints."""
    done = run(home, sys.executable, "-m", "dvc", *argv, DVC_NO_ANALYTICS="1", timeout=600)
    assert done.returncode == 0, f"dvc {argv}: {done.stdout}{done.stderr}"
    return done.stdout


def git(home: Path, *argv: str) -> str:
    done = run(home, "git", "-c", "user.name=t", "-c", "user.email=t@localhost", *argv)
    assert done.returncode == 0, done.stderr
    return done.stdout


def list_numbers(value: Any, prefix: str = "") -> dict[str, float]:
    """Return the numbers of a JSON value by their path."""
    if isinstance(value, dict):
        pairs = (list_numbers(inner, f"{prefix}.{key}".strip(".")) for key, inner in value.items())
        return {key: number for one in pairs for key, number in one.items()}
    return {prefix: value} if isinstance(value, int | float) and not isinstance(value, bool) else {}


@pytest.fixture(scope="module")
def home(copied: Path) -> Path:
    """A workspace whose first model is in git, and a second one, of an experiment, in the workspace."""
    home = copied
    git(home, "add", "-A")
    git(home, "commit", "-qm", "two epochs")
    assert git(home, "status", "--porcelain") == "", "what a person would not keep is ignored"
    said = dvc(home, "exp", "run", "--name", "longer", "-S", "train.max_epochs=3", "-S", "train.learning_rate=1e-3")
    assert "Running stage 'train'" in said
    assert "Stage 'prepare' didn't change" in said
    return home


def test_an_experiment_trains_with_what_was_set(home: Path) -> None:
    card = json.loads((home / "models" / "candidate" / "card.json").read_text())
    assert (card["params"]["train"]["max_epochs"], card["params"]["train"]["learning_rate"]) == (3, 1e-3)
    assert parse_yaml((home / "params.yaml").read_text())["train"]["max_epochs"] == 3


def test_exp_show_has_params_and_figures_of_both(home: Path) -> None:
    rows = list(csv.DictReader(io.StringIO(dvc(home, "exp", "show", "--csv"))))
    experiment = next(row for row in rows if row["Experiment"] == "longer")
    head = next(row for row in rows if row["rev"] == "main")
    (epochs,) = [key for key in experiment if key.endswith("train.max_epochs")]
    assert (head[epochs], experiment[epochs]) == ("2", "3")
    figures = list_numbers(json.loads((home / "reports" / "metrics.json").read_text()))
    for name, value in figures.items():
        (column,) = [key for key in experiment if key == name or key.endswith(f":{name}")]
        assert float(experiment[column]) == pytest.approx(value), name
        assert head[column] != ""


def test_metrics_diff_tells_old_and_new(home: Path) -> None:
    told = json.loads(dvc(home, "metrics", "diff", "--json", "--all"))
    now = list_numbers(json.loads((home / "reports" / "metrics.json").read_text()))
    found = told["reports/metrics.json"]
    assert {name for name in found if isinstance(found[name]["new"], int | float)} == set(now)
    for name, value in now.items():
        assert found[name]["new"] == pytest.approx(value)
        assert isinstance(found[name]["old"], int | float), name
    assert "accuracy" in dvc(home, "metrics", "diff", "--all")


def test_plots_diff_shows_each_picture_of_both_and_needs_no_network(home: Path) -> None:
    told = dvc(home, "plots", "diff", "--out", "dvc_plots")
    page = home / "dvc_plots" / "index.html"
    assert str(page) in told.replace("file://", "")
    text = page.read_text()
    assert "http" not in text, "dvc draws tables by scripts from a CDN"
    assert "<title>Plots</title>" in text, "our page: pictures beside each other, none wider than the window"
    pictures = {path.relative_to(home).as_posix() for path in (home / "reports" / "figures").glob("*.png")}
    assert "reports/figures/confusion.png" in pictures
    for name in (*pictures, "reports/training/curve.png"):
        assert f"<p>{name}</p>" in text, name
    shown = [page.parent / source for source in re.findall(r'<img src="([^"]+)"', text)]
    assert len(shown) == 2 * (len(pictures) + 1), "of HEAD and of the workspace"
    assert all(path.is_file() for path in shown)
    assert git(home, "status", "--porcelain", "dvc_plots") == "", "the page is ignored"
