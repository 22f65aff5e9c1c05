"""The command `runs`: the trainings of this workspace as a table, and some of them side by side."""

import itertools
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from visionloop.cli.app import app

if TYPE_CHECKING:
    from visionloop.cli.context import Context
    from visionloop.cli.run_tables import Marks
    from visionloop.tracking import Run

PLOTTED = ("train/loss", "val/loss", "val/accuracy", "val/f1", "val/map", "train/accuracy")
MOST = 12
Status = Literal["running", "finished", "failed", "killed"]


@app.command()
def runs(
    run: Annotated[
        list[str] | None, typer.Argument(help="Runs to compare: first letters, champion, candidate.")
    ] = None,
    sort: Annotated[str, typer.Option(help="A column (val_accuracy, time, ...) or a figure (val/f1).")] = "started",
    last: Annotated[int, typer.Option(min=1, help="How many, the newest.")] = 20,
    status: Annotated[Status | None, typer.Option(help="Only these.")] = None,
    *,
    trials: Annotated[bool, typer.Option("--trials", help="Also the trials of `visionloop tune`.")] = False,
    out: Annotated[Path | None, typer.Option(help="Where the plot goes; default: .visionloop/runs.png.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="For machines.")] = False,
) -> None:
    """List the trainings in MLflow, newest first; or compare some: parameters that differ, figures, a plot.

    Examples:

      visionloop runs

      visionloop runs --sort test_accuracy --last 50

      visionloop runs 3f9a champion --out compared.png
    """
    from visionloop.cli.context import open_context

    context = open_context()
    marks = read_marks(context)
    if run:
        compare(context, marks, run, out=out, as_json=as_json)
        return
    kinds = {"train", "trial"} if trials else {"train"}
    found = context.tracking.iterate_runs(status.upper() if status else None)
    show_all(list(itertools.islice((r for r in found if r.kind in kinds), last)), marks, sort=sort, as_json=as_json)


def read_marks(context: "Context") -> "Marks":
    """Find out which bundles are champion (by the ledger) and candidate; an unreadable one is none."""
    import contextlib

    from visionloop.bundle import load_bundle
    from visionloop.cli.run_tables import Marks
    from visionloop.errors import VisionLoopError
    from visionloop.promotion.ledger import read_champion

    champion = candidate = None
    with contextlib.suppress(VisionLoopError):
        entry = read_champion(context.store, context.params.name)
        champion = entry.bundle if entry else None
    with contextlib.suppress(VisionLoopError):
        candidate = load_bundle(context.settings.candidate_dir).digest
    return Marks(champion, candidate)


def show_all(found: "list[Run]", marks: "Marks", *, sort: str, as_json: bool) -> None:
    """Print the table, or its JSON."""
    from visionloop.cli.run_tables import make_table, sort_runs, to_json
    from visionloop.cli.tables import align

    ordered = sort_runs(found, sort)
    if as_json:
        print(json.dumps([to_json(one, marks) for one in ordered], indent=2))
    elif not ordered:
        print("no run yet: `visionloop train` (or `dvc repro`) makes the first")
    else:
        for line in align(make_table(ordered, marks)):
            print(line)


def compare(context: "Context", marks: "Marks", asked: list[str], *, out: Path | None, as_json: bool) -> None:
    """Print some runs side by side and draw their curves.

    Raises:
        SettingsError: one of them is not there, or there are too many.
    """
    from visionloop.cli.pictures import write_picture
    from visionloop.cli.run_tables import compare_runs, find_run, to_json
    from visionloop.cli.tables import align
    from visionloop.errors import SettingsError
    from visionloop.training.plots import draw_overlay

    if len(asked) > MOST:
        raise SettingsError("visionloop runs", f"{len(asked)} runs", f"at most {MOST} to compare", "Name fewer.")
    known = list(context.tracking.iterate_runs())
    chosen = list({(one := find_run(known, name, marks)).run_id: one for name in asked}.values())
    if as_json:
        print(json.dumps([to_json(one, marks) for one in chosen], indent=2))
        return
    for line in align(compare_runs(chosen, marks)):
        print(line)
    names = [key for key in PLOTTED if any(key in one.metrics for one in chosen)]
    if not names:
        print("no plot: none of them has finished an epoch")
        return
    curves = {label_run(one): _load_curves(context, one, names) for one in chosen}
    path = out or context.settings.hidden_dir / "runs.png"
    write_picture(path, draw_overlay(curves, names))
    print(f"curves: {path}")


def label_run(one: "Run") -> str:
    """Return how a run is called in a legend."""
    return f"{one.run_id[:8]} {one.params.get('train.way', '')} {one.params.get('train.backbone', one.name)}"


def _load_curves(context: "Context", one: "Run", names: list[str]) -> "dict[str, list[tuple[int, float]]]":
    curves = context.tracking.load_curves(one.run_id, [name for name in names if name in one.metrics])
    return {name: [(step + 1, value) for step, value in points] for name, points in curves.items()}
