"""Small data that can be learned, and workspaces around it, for tests that really train."""

import contextlib
import io
import json
import os
import re
import secrets
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image, ImageDraw

from visionloop.data.prepare import prepare
from visionloop.params import Params, load_params
from visionloop.settings import Settings, load_settings
from visionloop.store import ObjectStore, open_store
from visionloop.tracking import MlflowTracking
from visionloop.workspace import Workspace, connect

SHAPES = ("bar", "disc", "ring")
ROOT = Path(__file__).parents[2]
PARAMS = """\
name: shapes
task: auto
embed: {batch_size: 500, runtime: onnxruntime}
prepare: {image_size: 32}
train: {backbone: small_cnn, max_epochs: EPOCHS, batch_size: 16, learning_rate: 3.0e-3, patience: 50, precision: fp32}
evaluate: {resamples: 200}
gate: {min_images: {all: 5, per_class: 0}, baseline: {mode: off}, class_drop: {mode: off}, slice_drop: {mode: off}}
"""


def write_shapes(folder: Path, number: int = 60, *, seed: int = 0, classes: tuple[str, ...] = ("disc", "ring")) -> Path:
    """Draw `number` images a class, 40 x 40 pixels: discs, rings and bars of any colour on any ground."""
    rng = np.random.default_rng(seed)
    for name in classes:
        (folder / name).mkdir(parents=True, exist_ok=True)
        for i in range(number):
            ground, ink = (tuple(int(c) for c in rng.integers(low, low + 90, 3)) for low in (0, 160))
            image = Image.new("RGB", (40, 40), ground)
            x, y, r = (int(v) for v in rng.integers((13, 13, 8), (27, 27, 12)))
            draw_shape(ImageDraw.Draw(image), name, (x, y, r), ink)
            image.save(folder / name / f"{seed}-{i:03d}.png")
    return folder


def write_shape_sets(folder: Path, number: int = 240, *, seed: int = 0) -> Path:
    """Draw images of none to three shapes, 64 x 64 pixels, each kind once at most, and labels.csv with their names.

    A cell of the column `shapes` holds all names, divided by `|`; it is empty for an image of none.
    """
    rng = np.random.default_rng(seed)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    rows = ["image,shapes"]
    for i in range(number):
        names = [name for name in SHAPES if rng.random() < 0.5]
        ground = tuple(int(c) for c in rng.integers(0, 90, 3))
        image = Image.new("RGB", (64, 64), ground)
        for name, cell in zip(names, rng.permutation(4), strict=False):
            ink = tuple(int(c) for c in rng.integers(160, 250, 3))
            place = 32 * np.array([cell % 2, cell // 2]) + rng.integers(13, 19, 2)
            draw_shape(ImageDraw.Draw(image), name, (int(place[0]), int(place[1]), int(rng.integers(8, 12))), ink)
        image.save(folder / "images" / f"{i:03d}.png")
        rows.append(f"{i:03d}.png,{'|'.join(names)}")
    (folder / "labels.csv").write_text("\n".join(rows) + "\n")
    return folder


def draw_shape(draw: ImageDraw.ImageDraw, name: str, place: tuple[int, int, int], ink: tuple[int, ...]) -> None:
    """Draw one shape around (x, y) with a radius."""
    x, y, r = place
    if name == "disc":
        draw.ellipse((x - r, y - r, x + r, y + r), fill=ink)
    elif name == "ring":
        draw.ellipse((x - r, y - r, x + r, y + r), outline=ink, width=3)
    else:
        draw.rectangle((x - r, y - 3, x + r, y + 3), fill=ink)


def make_environment(**extra: str) -> dict[str, str]:
    """The environment of a person in a new shell: no workspace chosen, this Python first on PATH."""
    foreign = ("VISIONLOOP_", "PREFECT_", "DVC_", "MLFLOW_TRACKING")
    env = {k: v for k, v in os.environ.items() if not k.startswith(foreign)}
    # Two tests run side by side on two cores: with more torch threads than cores they would wait for each other.
    env["OMP_NUM_THREADS"] = "1"
    return {**env, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{env['PATH']}", "COLUMNS": "140", **extra}


def run(home: Path, *argv: str, timeout: float = 500, **extra: str) -> subprocess.CompletedProcess[str]:
    """Run a command in a workspace and return what it said."""
    env = make_environment(**extra)
    return subprocess.run(argv, cwd=home, env=env, capture_output=True, text=True, timeout=timeout, check=False)


def visionloop(home: Path, *argv: str, **extra: str) -> subprocess.CompletedProcess[str]:
    """Run the command line in a workspace."""
    return run(home, sys.executable, "-m", "visionloop", *argv, **extra)


def visionloop_here(home: Path, *argv: str, **extra: str) -> subprocess.CompletedProcess[str]:
    """Run the command line in a workspace, in this process, which has loaded the libraries: two seconds less."""
    from visionloop.cli import main

    out, err, before, folder = io.StringIO(), io.StringIO(), dict(os.environ), Path.cwd()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.setattr(sys, "argv", ["visionloop", *argv])
        patch.setattr(out, "reconfigure", lambda **options: None, raising=False)
        os.chdir(home)
        set_environment(make_environment(**extra))
        try:
            with pytest.raises(SystemExit) as caught:
                main()
        finally:
            os.chdir(folder)
            set_environment(before)
    return subprocess.CompletedProcess(argv, int(caught.value.code or 0), out.getvalue(), err.getvalue())


def set_environment(env: dict[str, str]) -> None:
    os.environ.clear()
    os.environ.update(env)


def start_training(home: Path, *, stderr: int = subprocess.STDOUT) -> "subprocess.Popen[str]":
    """Start `visionloop train` in a workspace; its lines can be read while it runs."""
    command, env = [sys.executable, "-m", "visionloop", "train"], make_environment()
    return subprocess.Popen(command, cwd=home, env=env, stdout=subprocess.PIPE, stderr=stderr, text=True)


def retrain(home: Path, **extra: str) -> subprocess.CompletedProcess[str]:
    """Run the flow on a workspace, from the repository."""
    return run(ROOT, sys.executable, "flows/retrain.py", "--workspace", str(home), **extra)


def ask_prefect(api: str, path: str, body: dict[str, Any] | None = None) -> Any:
    """Return what Prefect's server answers, by POST where there is a body; None: there is no such thing.

    A busy database is 503, after which its own client asks again too.
    """
    deadline = time.monotonic() + 100
    while True:
        answer = httpx.request(
            "GET" if body is None else "POST", f"{api}/{path}", json=body, trust_env=False, timeout=60
        )
        if answer.status_code != httpx.codes.SERVICE_UNAVAILABLE or time.monotonic() > deadline:
            break
        time.sleep(0.5)
    return None if answer.status_code == httpx.codes.NOT_FOUND else answer.raise_for_status().json()


def start_deployment(api: str, number: str) -> str:
    """Have a run of a deployment started, once; return its id."""
    body = {"idempotency_key": secrets.token_hex(8)}
    return str(ask_prefect(api, f"deployments/{number}/create_flow_run", body)["id"])


def find_flow_run(api: str, home: Path) -> dict[str, Any]:
    """Return the last run of a flow on a workspace: a server of Prefect may have those of others, too."""
    runs = ask_prefect(api, "flow_runs/filter", {"sort": "START_TIME_DESC", "limit": 100})
    return next(run for run in runs if run["parameters"].get("workspace") == str(home))


def make_workspace(
    folder: Path, *, epochs: int = 2, number: int = 60, classes: tuple[str, ...] = ("disc", "ring"), **extra: str
) -> Path:
    """Make a workspace with shapes ingested, ready for `prepare` and `train`. `extra`: more of the environment."""
    write_shapes(folder.parent / "photos", number, classes=classes)
    assert visionloop(folder.parent, "new", str(folder), **extra).returncode == 0
    (folder / "params.yaml").write_text(PARAMS.replace("EPOCHS", str(epochs)))
    done = visionloop(folder, "ingest", str(folder.parent / "photos"), **extra)
    assert done.returncode == 0, done.stderr
    return folder


def find_run(text: str) -> str:
    """The MLflow run that `train` names in its last lines."""
    return re.findall(r"MLflow run ([0-9a-f]{32})", text)[-1]


def find_bundle(text: str) -> str:
    """The bundle that `train` names in its last lines."""
    return re.findall(r"models/candidate is bundle ([0-9a-f]{12})", text)[-1]


def make_prepared_workspace(folder: Path, *, epochs: int = 2) -> Path:
    """Make a workspace with shapes prepared, ready for `train`."""
    home = make_workspace(folder, epochs=epochs)
    settings = load_settings({}, home)
    prepare(connect(settings, load_params(settings.params_path), store=open_store(settings.store_url)))
    return home


def set_train(home: Path, **keys: object) -> None:
    """Add keys to the section `train` of a workspace made here, or give those that were added another value."""
    path = home / "params.yaml"
    text = path.read_text()
    for key, value in keys.items():
        text = re.sub(rf"(patience: 50[^}}\n]*?), {key}: [^,}}\n]*", r"\1", text)
        text = text.replace("patience: 50", f"patience: 50, {key}: {value}")
    path.write_text(text)


def set_compute(home: Path, **keys: object) -> None:
    """Give a workspace made here a section `compute`."""
    with (home / "params.yaml").open("a") as file:
        file.write(f"compute: {json.dumps(keys)}\n")


def open_parts(home: Path) -> tuple[Settings, Params, ObjectStore, MlflowTracking]:
    """Open a workspace as a command does, in this process."""
    settings = load_settings({}, home)
    params = load_params(settings.params_path)
    tracking = MlflowTracking(settings.tracking_uri, settings.artifact_root, params.name)
    return settings, params, open_store(settings.store_url), tracking


def open_home(home: Path) -> Workspace:
    """Open a workspace in this process, without its environment."""
    settings = load_settings({}, home)
    return connect(settings, load_params(settings.params_path))


def read_runs(home: Path) -> dict[str, Any]:
    """Return the MLflow runs of a workspace, by id."""
    client, experiment_id = open_parts(home)[3]._connect()
    return {run.info.run_id: run for run in client.search_runs([experiment_id])}
