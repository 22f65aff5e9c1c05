"""The stages of dvc.yaml as commands (dvc runs exactly these), and the flows, which run with Prefect.

prepare, train, evaluate; retrain, schedule.
"""

import os
import shutil
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from visionloop.cli.app import Json, Quiet, app, print_json, say_next
from visionloop.cli.progress import format_seconds, is_first_rank, open_watcher
from visionloop.cli.waiting import make_progress
from visionloop.errors import VisionLoopError, make_full_disk_error, require_installed
from visionloop.lifetime import GUARDIAN_VARIABLE, die_with_parents
from visionloop.settings import find_home, load_settings
from visionloop.words import describe_mlflow, format_interval, shorten_path
from visionloop.workspace import Workspace, get_now, open_workspace

if TYPE_CHECKING:
    from visionloop.records import RunNote

LEAST_FREE = 1_000_000  # bytes; with less, Prefect waits for a database that it cannot write
PoolType = StrEnum("PoolType", ("process", "docker", "kubernetes"))
Folder = Annotated[
    Path | None, typer.Option("--workspace", metavar="DIR", help="Another workspace than the one you are in.")
]


@dataclass(frozen=True)
class Stage:
    """A stage that runs: its workspace, the digest of its code, and what it has read, by `pipeline.read_inputs`."""

    name: str
    workspace: Workspace
    code_digest: str
    inputs: Mapping[str, str]


def open_stage(name: str) -> Stage:
    """Open the workspace for a stage, which also dies with whoever started it."""
    from visionloop.code_digests import STAGE_MODULES, compute_module_digest
    from visionloop.pipeline import read_inputs

    die_with_guardian()
    inputs = read_inputs(find_home(os.environ), name)
    return Stage(name, open_workspace(), compute_module_digest(STAGE_MODULES[name]), inputs)


def die_with_guardian() -> None:
    """Under dvc or a flow, stop when they are gone; by hand, go on when the shell is closed."""
    if os.environ.get("DVC_STAGE") or os.environ.get(GUARDIAN_VARIABLE):
        die_with_parents()


def close_stage(stage: Stage) -> None:
    """Say how the result of a stage run by hand is kept, unless dvc holds it already (or is not in use here).

    Raises:
        PipelineError: what the stage has read was changed while it ran, so dvc must not record it.
    """
    from visionloop.pipeline import check_inputs, is_up_to_date

    home = stage.workspace.settings.home
    check_inputs(home, stage.name, stage.inputs)
    if not os.environ.get("DVC_STAGE") and is_up_to_date(home, stage.name) is False:
        print(f"run by hand: `dvc commit -f {stage.name}` keeps this result, `dvc repro` would make it again")


@app.command()
def prepare(*, quiet: Quiet = False) -> None:
    """Decode and resize the pinned images into data/prepared (uint8 arrays).

    Examples:

      visionloop prepare

      dvc repro prepare
    """
    from visionloop.data.prepare import prepare as run_prepare
    from visionloop.forget.dvc_cache import is_copied
    from visionloop.params import WAYS_ON_EMBEDDINGS

    stage = open_stage("prepare")
    progress = make_progress("prepared", "images", quiet=quiet)
    copied = bool(os.environ.get("DVC_STAGE")) and is_copied(stage.workspace.settings.home)
    pin = run_prepare(stage.workspace, code_digest=stage.code_digest, on_progress=progress, is_copied=copied)
    print(f"data/prepared holds dataset {pin.name} version {pin.version}")
    close_stage(stage)
    on_embeddings = stage.workspace.params.train.way in WAYS_ON_EMBEDDINGS
    say_next(f"`visionloop {'embed' if on_embeddings else 'train'}`", quiet=quiet)


@app.command()
def train(*, quiet: Quiet = False) -> None:
    """Train on data/prepared and write the bundle models/candidate; every run is in MLflow.

    Stopped or killed, the same command goes on from the last finished epoch.

    Examples:

      visionloop train

      dvc repro train
    """
    started = time.perf_counter()
    from visionloop.training.checks import check_training

    stage = open_stage("train")
    workspace = stage.workspace
    data = check_training(workspace)
    if is_first_rank(os.environ) and not quiet:
        print(f"loading torch to train {workspace.params.train.network_name} ...", flush=True)
    from visionloop.training.job import Call
    from visionloop.training.ranks.launch import launch_train

    with open_watcher(os.environ, quiet=quiet) as watcher:
        note = launch_train(workspace, data, Call(get_now(), stage.code_digest, watcher), os.environ)
    if note is None:  # a rank that another process speaks for
        return
    for line in describe_training(workspace, note, time.perf_counter() - started):
        print(line)
    close_stage(stage)
    say_next("`visionloop evaluate`, then `visionloop gate`", quiet=quiet)


def describe_training(workspace: "Workspace", note: "RunNote", seconds: float) -> list[str]:
    """Return what a training came to, and where everything is."""
    settings, section = workspace.settings, workspace.params.train
    home, here = settings.home, Path.cwd()
    run = workspace.tracking.load_run(note.run_id)
    lines = []
    if note.extra.get("validated_on") == "test":
        lines.append("an experiment (ingest.split.method: random): every epoch was judged on the test side")
    if best := describe_best(run.metrics, section.monitor):
        lines.append(f"  best         {best}")
    curve = settings.reports_dir / "training" / "curve.png"
    if curve.is_file():
        lines.append(f"  curve        {shorten_path(curve, home, here)}")
    lines += [
        f"  MLflow       {describe_mlflow(workspace.tracking.uri, home, here)}",
        f"{'':15}experiment {workspace.name}, run {run.name}",
    ]
    folder = settings.hidden_dir / "tensorboard"  # not there if the training was finished before it was turned on
    if workspace.params.compute.tensorboard and folder.is_dir():
        lines.append(f"  TensorBoard  tensorboard --logdir {shorten_path(folder, home, here)}")
    last = f"models/candidate is bundle {note.bundle[:12]}, MLflow run {note.run_id}, {format_seconds(seconds)}"
    source = note.extra.get("network_of", "")[:8]
    done = f"took the network of run {source} again:" if source else "trained"
    return [f"{done} {section.network_name} ({section.way})", *lines, last]


def describe_best(metrics: Mapping[str, float], monitor: str) -> str:
    """Return the best epoch and its figures on one line; empty if the run has none."""
    if "best/epoch" not in metrics:
        return ""
    names = [monitor, *(name for name in ("val/loss", "val/accuracy", "val/f1") if name != monitor)]
    keys = {name: f"best/{name.replace('/', '_')}" for name in names}
    figures = "  ".join(f"{name} {metrics[key]:.4f}" for name, key in keys.items() if key in metrics)
    return f"epoch {metrics['best/epoch']:.0f}  {figures}"


@app.command()
def evaluate(*, quiet: Quiet = False, as_json: Json = False) -> None:
    """Judge models/candidate on the test side and write reports/ (metrics, figures, a page).

    Examples:

      visionloop evaluate

      visionloop evaluate --json | jq .metrics.accuracy

      dvc metrics show
    """
    from visionloop.bundle import load_bundle
    from visionloop.evaluation.evaluate import evaluate as run_evaluate
    from visionloop.pipeline import check_recorded

    stage = open_stage("evaluate")
    if os.environ.get("DVC_STAGE"):
        settings = stage.workspace.settings
        check_recorded(settings.home, load_bundle(settings.candidate_dir).card.params)
    metrics = run_evaluate(
        stage.workspace,
        on_progress=make_progress("judged", "images", quiet=quiet or as_json, only_slow=True),
        tell=(lambda line: None) if quiet or as_json else print,
    )
    if as_json:
        digest = load_bundle(stage.workspace.settings.candidate_dir).digest
        figures = {name: interval.to_json() for name, interval in metrics.items()}
        print_json({"bundle": digest, "metrics": figures, "page": "reports/report.html"})
        return
    for name, interval in metrics.items():
        print(f"{name:<17} {f'{interval.value:.4f}' if name == 'ece' else format_interval(interval.to_json())}")
    print("look at reports/report.html")
    close_stage(stage)
    say_next("`visionloop gate`", quiet=quiet)


@app.command()
def retrain(workspace: Folder = None) -> None:
    """Retrain with Prefect: ingest, train, judge, promote, ask; what is transient is tried again.

    The same steps as `visionloop start`, and the same exit codes: 0 done, 2 an error, 3 not promoted. Its run is in
    Prefect: in the one of `visionloop up`, at PREFECT_API_URL, or in one of its own that ends with it.

    Examples:

      visionloop retrain

      visionloop retrain --workspace ~/models/pets
    """
    home = workspace.expanduser() if workspace else find_home(os.environ)
    if home.is_dir() and shutil.disk_usage(home).free < LEAST_FREE:
        raise make_full_disk_error("visionloop retrain", str(home))
    _run_flow("retrain", workspace, {})


@app.command()
def schedule(
    workspace: Folder = None,
    *,
    pool: Annotated[
        str | None, typer.Option(metavar="NAME", help="Register for the workers of this work pool instead, and end.")
    ] = None,
    type: Annotated[PoolType | None, typer.Option(help="Of a pool that is made; the last two want --image.")] = None,
    image: Annotated[str | None, typer.Option(help="The image that a container of the pool runs.")] = None,
    flows: Annotated[str | None, typer.Option(metavar="DIR", help="Where the flows are for a worker.")] = None,
    replace: Annotated[
        bool, typer.Option("--replace", help="Take over from another workspace of the same name.")
    ] = False,
) -> None:
    """Run what is due by `schedule` and `triggers` of params.yaml, with the Prefect server at PREFECT_API_URL.

    Stays until Ctrl-C. `visionloop up` does this too, with a Prefect server of its own.

    Examples:

      PREFECT_API_URL=http://127.0.0.1:4200/api visionloop schedule

      PREFECT_API_URL=http://prefect:4200/api visionloop schedule --pool boxes --image registry/visionloop:1
    """
    given = {"--pool": pool, "--type": type, "--image": image, "--flows": flows}
    _run_flow("deploy", workspace, given, *(["--replace"] if replace else []))


def _run_flow(name: str, workspace: Path | None, given: Mapping[str, str | None], *switches: str) -> None:
    """Become the script of a flow. Its workspace has a Prefect that is up: then its run is shown there."""
    from visionloop.up.parts import find_flow

    require_installed("prefect")
    script = find_flow(name)
    if url := _find_prefect(workspace, os.environ):
        os.environ["PREFECT_API_URL"] = f"{url}/api"
    options = {"--workspace": str(workspace.expanduser()) if workspace else None, **given}
    words = [word for option, value in options.items() if value is not None for word in (option, str(value))]
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, str(script), *words, *switches])


def _find_prefect(folder: Path | None, env: Mapping[str, str]) -> str:
    """Return the address of the Prefect that `visionloop up` runs for the workspace, "" if none, or another is set."""
    from visionloop.up.board import Board

    if env.get("PREFECT_API_URL"):
        return ""
    try:
        state = Board(load_settings(env, folder and folder.expanduser()).hidden_dir).read_live()
    except VisionLoopError:  # the script tells it
        return ""
    return state.get_url("prefect") if state else ""
