"""The stages of dvc.yaml as commands: prepare, train, evaluate. dvc runs exactly these."""

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from visionloop.cli.app import app
from visionloop.cli.context import close_stage, make_progress, open_stage
from visionloop.cli.progress import format_seconds, is_first_rank, open_watcher
from visionloop.tracking import mask_credentials
from visionloop.workspace import get_now

if TYPE_CHECKING:
    from visionloop.records import RunNote
    from visionloop.workspace import Context


@app.command()
def prepare() -> None:
    """Decode and resize the pinned images into data/prepared (uint8 arrays).

    Examples:

      visionloop prepare

      dvc repro prepare
    """
    from visionloop.data.prepare import prepare as run_prepare

    context, code_digest = open_stage("prepare")
    progress = make_progress("prepared", "images")
    pin = run_prepare(context.settings, context.params, context.store, code_digest=code_digest, on_progress=progress)
    print(f"data/prepared holds dataset {pin.name} version {pin.version}")
    close_stage(context, "prepare")


@app.command()
def train() -> None:
    """Train on data/prepared and write the bundle models/candidate; every run is in MLflow.

    Stopped or killed, the same command goes on from the last finished epoch.

    Examples:

      visionloop train

      dvc repro train
    """
    started = time.perf_counter()
    context, code_digest = open_stage("train")
    if is_first_rank(os.environ):
        print(f"loading torch to train {context.params.train.backbone} ...", flush=True)
    from visionloop.training.ranks.launch import launch_train

    with open_watcher(os.environ) as watcher:
        note = launch_train(
            context.settings,
            context.params,
            context.store,
            context.tracking,
            now=get_now(),
            code_digest=code_digest,
            watcher=watcher,
            env=os.environ,
        )
    if note is None:  # a rank that another process speaks for
        return
    for line in describe_training(context, note, time.perf_counter() - started):
        print(line)
    close_stage(context, "train")


def describe_training(context: "Context", note: "RunNote", seconds: float) -> list[str]:
    """Return what a training came to, and where everything is."""
    settings, section = context.settings, context.params.train
    run = context.tracking.load_run(note.run_id)
    lines = []
    if note.extra.get("validated_on") == "test":
        lines.append("an experiment (ingest.split.method: random): every epoch was judged on the test side")
    if best := describe_best(run.metrics, section.monitor):
        lines.append(f"  best         {best}")
    curve = settings.hidden_dir / "curve.png"
    if curve.is_file():
        lines.append(f"  curve        {show_path(curve, settings.home)}")
    lines += [f"  MLflow       {describe_mlflow(context)}", f"{'':15}experiment {context.params.name}, run {run.name}"]
    if section.tensorboard:
        folder = settings.hidden_dir / "tensorboard"
        lines.append(f"  TensorBoard  tensorboard --logdir {show_path(folder, settings.home)}")
    last = f"models/candidate is bundle {note.bundle[:12]}, MLflow run {note.run_id}, {format_seconds(seconds)}"
    return [f"trained {section.backbone} ({section.way})", *lines, last]


def describe_best(metrics: Mapping[str, float], monitor: str) -> str:
    """Return the best epoch and its figures on one line; empty if the run has none."""
    if "best/epoch" not in metrics:
        return ""
    names = [monitor, *(name for name in ("val/loss", "val/accuracy", "val/f1") if name != monitor)]
    keys = {name: f"best/{name.replace('/', '_')}" for name in names}
    figures = "  ".join(f"{name} {metrics[key]:.4f}" for name, key in keys.items() if key in metrics)
    return f"epoch {metrics['best/epoch']:.0f}  {figures}"


def describe_mlflow(context: "Context") -> str:
    """Say how to open MLflow."""
    uri = context.tracking.uri
    if uri.startswith("sqlite:///"):
        path = show_path(Path(uri.removeprefix("sqlite:///")), context.settings.home)
        return f"mlflow ui --backend-store-uri sqlite:///{path}"
    return mask_credentials(uri)


def show_path(path: Path, home: Path) -> str:
    """Return a path as one would type it here: relative in the workspace, absolute outside of it."""
    return str(path.relative_to(home)) if path.is_relative_to(home) and Path.cwd() == home else str(path)


@app.command()
def evaluate() -> None:
    """Judge models/candidate on the test side and write reports/ (metrics, figures, a page).

    Examples:

      visionloop evaluate

      dvc metrics show
    """
    from visionloop.evaluation.evaluate import evaluate as run_evaluate

    context, _ = open_stage("evaluate")
    metrics = run_evaluate(context.settings, context.params)
    for name, interval in metrics.items():
        print(f"{name:<12} {interval.value:.4f}  (95 %: {interval.low:.4f} to {interval.high:.4f})")
    print("look at reports/report.html")
    close_stage(context, "evaluate")
