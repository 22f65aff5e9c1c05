"""The stages of dvc.yaml as commands: prepare, train, evaluate. dvc runs exactly these."""

import time
from typing import TYPE_CHECKING

from visionloop.cli.app import app
from visionloop.cli.context import close_stage, get_now, make_progress, open_stage

if TYPE_CHECKING:
    from visionloop.training.watch import EpochReport


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
    print(f"loading torch to train {context.params.train.backbone} ...", flush=True)
    from visionloop.training.fit import train as run_train
    from visionloop.training.watch import Watcher

    watcher = Watcher()
    watcher.on_epoch = print_epoch  # type: ignore[method-assign]
    note = run_train(
        context.settings,
        context.params,
        context.store,
        context.tracking,
        now=get_now(),
        code_digest=code_digest,
        watcher=watcher,
    )
    seconds = time.perf_counter() - started
    if note.extra.get("validated_on") == "test":
        print("an experiment (ingest.split.method: random): every epoch was judged on the test side")
    print(f"models/candidate is bundle {note.bundle[:12]}, MLflow run {note.run_id}, {seconds:.0f} s")
    close_stage(context, "train")


def print_epoch(report: "EpochReport") -> None:
    """Print one epoch as one line."""
    metrics = report.metrics
    print(
        f"epoch {report.epoch:>3}/{report.max_epochs}  loss {metrics.get('train/loss', float('nan')):.4f}"
        f"  val loss {metrics['val/loss']:.4f}  accuracy {metrics['val/accuracy']:.4f}  f1 {metrics['val/f1']:.4f}"
        f"  {report.images_per_s:,.0f} images/s  {report.seconds:.1f} s"
        + (f"  no better for {report.wait} of {report.patience}" if report.wait else "  best so far"),
        flush=True,
    )


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
