"""Waiting times of the command line: its start, and a `dvc repro` with nothing to do."""

import json
import os
import subprocess
import sys
from pathlib import Path

from row import Row, time_commands
from visionloop.params.text import parse_yaml
from visionloop.pipeline import make_stage_environment

REPEATS = 7


def run_visionloop(workspace: Path, *arguments: str) -> None:
    """Run a command in a workspace. Raises CalledProcessError; its output goes to stderr."""
    env = make_stage_environment(workspace, {**os.environ, "VISIONLOOP_HOME": str(workspace)})
    command = [sys.executable, "-m", "visionloop", *arguments]
    subprocess.run(command, cwd=workspace, env=env, check=True, stdout=sys.stderr)


def make_workspace(folder: Path, example: str, **sections: dict[str, object]) -> Path:
    """Make a workspace from an example, once, and set some keys of its params.yaml."""
    if not (folder / "params.yaml").is_file():
        folder.parent.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "visionloop", "new", str(folder), "--example", example]
        subprocess.run(command, check=True, stdout=sys.stderr)
    path = folder / "params.yaml"
    params = parse_yaml(path.read_text())
    for section, keys in sections.items():
        params[section].update(keys)
    path.write_text(json.dumps(params, indent=2))
    return folder


def bench_startup(bench_dir: Path) -> Row:
    """Time `visionloop --help` against an empty Python."""
    bench_dir.mkdir(parents=True, exist_ok=True)
    ours, plain = time_commands(
        [str(Path(sys.executable).with_name("visionloop")), "--help"],
        [sys.executable, "-c", "pass"],
        repeats=REPEATS,
        cwd=bench_dir,
        env=os.environ,
    )
    return Row("`visionloop --help`", ours, plain, "s", "`python -c pass`")


def bench_repro(bench_dir: Path) -> Row:
    """Time `dvc repro` on an up-to-date digits workspace against `dvc --version`."""
    workspace = make_workspace(bench_dir / "digits", "digits", train={"max_epochs": 1})
    env = make_stage_environment(workspace, os.environ)
    dvc = [sys.executable, "-m", "dvc"]
    if not (workspace / "data" / "dataset.json").is_file():
        run_visionloop(workspace, "ingest")
    subprocess.run([*dvc, "repro"], cwd=workspace, env=env, check=True, stdout=sys.stderr)
    ours, plain = time_commands([*dvc, "repro"], [*dvc, "--version"], repeats=REPEATS, cwd=workspace, env=env)
    return Row("`dvc repro`, nothing to do", ours, plain, "s", "`dvc --version`")
