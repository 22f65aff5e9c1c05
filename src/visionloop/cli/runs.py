"""The command `runs`: the trainings of this workspace as a table, and some of them side by side."""

import itertools
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from visionloop.cli.app import Json, app, print_json, say, say_next
from visionloop.cli.progress import format_seconds
from visionloop.errors import SettingsError, shorten
from visionloop.runs import COLUMNS, Marks, find_stopped, read_marks, to_number
from visionloop.tracking import Run
from visionloop.words import align, fit

if TYPE_CHECKING:
    from visionloop.workspace import Workspace

ID_CHARS = 8
VALUE_CHARS = 28
COMPARED = ("best/", "test/")
HIDDEN_FIGURES = ("_low", "_high")
NONE = "-"
PANELS = (("train/loss",), ("val/loss",), ("val/accuracy", "val/f1", "val/map"), ("train/accuracy",))
MOST_NAMED = 3  # parameters in the legend
MOST = 12
Status = Literal["running", "finished", "failed", "killed"]
RISING = ("loss", "_s", "run", "way", "backbone", "time", "status")  # what ends so is sorted upwards


def mark_stopped(runs: Iterable[Run], stopped: Collection[str]) -> Iterator[Run]:
    """Yield the runs, those that MLflow thinks to be running though their process is gone as `stopped`."""
    for run in runs:
        yield replace(run, status="STOPPED") if run.status == "RUNNING" and run.run_id in stopped else run


def sort_runs(runs: Sequence[Run], by: str) -> list[Run]:
    """Sort by a column or any figure, best or newest first; runs without a value come last.

    Raises:
        SettingsError: no run has such a figure, and no column is called so.
    """

    def read(run: Run) -> Any:
        column = COLUMNS.get(by.replace("_", " "))
        return column(run) if column else run.metrics.get(by)

    having = [run for run in runs if read(run) is not None]
    if runs and not having and by.replace("_", " ") not in COLUMNS:
        names = {*COLUMNS, *(name for run in runs for name in run.metrics)}
        raise SettingsError("--sort", f"got {by!r}", f"one of {shorten(sorted(names), 40)}", "Choose one of them.")
    falls = not by.endswith(RISING)
    return sorted(having, key=read, reverse=falls) + [run for run in runs if read(run) is None]


def make_table(runs: Sequence[Run], marks: Marks) -> list[list[str]]:
    """Return the cells of all runs, the names of the columns first."""
    rows = [[*COLUMNS, ""]]
    for run in runs:
        cells = {name: read(run) for name, read in COLUMNS.items()}
        shown = [
            run.started_at.astimezone().strftime("%Y-%m-%d %H:%M"),
            run.run_id[:ID_CHARS],
            *(str(cells[name] or NONE) for name in ("way", "backbone", "data")),
            _format(cells["epochs"], "{:.0f}"),
            *(_format(cells[name], "{:.4f}") for name in ("val accuracy", "val loss", "test accuracy")),
            NONE if run.seconds is None else format_seconds(run.seconds),
            run.status.lower(),
        ]
        rows.append([*shown, marks.of(run)])
    return rows


def compare_runs(runs: Sequence[Run], marks: Marks) -> list[list[str]]:
    """Return the cells of some runs side by side: what differs in their parameters, then their figures."""
    rows = [["", *(run.run_id[:ID_CHARS] for run in runs)]]
    rows.append(["started", *(run.started_at.astimezone().strftime("%Y-%m-%d %H:%M") for run in runs)])
    rows.append(["status", *(" ".join(filter(None, (run.status.lower(), marks.of(run)))) for run in runs)])
    rows.append(["dataset version", *(run.tags.get("visionloop.dataset_version", NONE) for run in runs)])
    for key in list_differences([run.params for run in runs]):
        rows.append([key, *(fit(run.params.get(key, NONE), VALUE_CHARS) for run in runs)])
    for key in _list_figures(runs):
        rows.append([key, *(_format_figure(run.metrics.get(key)) for run in runs)])
    rows.append(["time", *(NONE if run.seconds is None else format_seconds(run.seconds) for run in runs)])
    return rows


def list_differences(params: Sequence[Mapping[str, str]]) -> list[str]:
    """Return the keys whose values are not the same in all runs, in order."""
    keys = sorted({key for one in params for key in one})
    return [key for key in keys if len({one.get(key) for one in params}) > 1]


def find_run(runs: Sequence[Run], asked: str, marks: Marks) -> Run:
    """Return the run with an id that begins so, or the one of the `champion` or the `candidate`.

    Raises:
        SettingsError: there is none, or several. VisionLoopError: nobody can say which is the champion's.
    """
    if asked in {"champion", "candidate"}:
        found = [run for run in runs if asked in marks.of(run).split()][:1]
    else:
        found = [run for run in runs if run.run_id.startswith(asked.lower())]
    if len(found) == 1:
        return found[0]
    if asked == "champion" and marks.problem:
        raise marks.problem
    what = "no run of this experiment" if not found else f"{len(found)} runs begin so"
    listed = [run.run_id[:ID_CHARS] for run in runs if run.kind == "train"]
    known = ", ".join(listed[:5]) or "none yet"
    raise SettingsError(
        f"run {asked!r}",
        what,
        "the first letters of a run id, `champion` or `candidate`",
        f"Newest: {known}.",
    )


def to_json(run: Run, marks: Marks) -> dict[str, Any]:
    """Return a run for machines."""
    return {
        "run_id": run.run_id,
        "name": run.name,
        "kind": run.kind,
        "status": run.status,
        "started_at": run.started_at.isoformat(timespec="seconds"),
        "seconds": run.seconds,
        "bundle": run.tags.get("visionloop.bundle"),
        "marks": marks.of(run).split(),
        "dataset_version": to_number(run.tags.get("visionloop.dataset_version")),
        "params": dict(sorted(run.params.items())),
        "metrics": dict(sorted(run.metrics.items())),
    }


def _list_figures(runs: Sequence[Run]) -> list[str]:
    names = {name for run in runs for name in run.metrics if name.startswith(COMPARED)}
    return sorted(name for name in names if not name.endswith(HIDDEN_FIGURES))


def _format(value: float | None, template: str) -> str:
    return NONE if value is None else template.format(value)


def _format_figure(value: float | None) -> str:
    """Return four decimals; of whole and of very small numbers what there is to see."""
    if value is None:
        return NONE
    return f"{value:g}" if value == round(value) > 1 else f"{value:.4f}" if abs(value) >= 0.01 else f"{value:.3g}"


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
    out: Annotated[
        Path | None, typer.Option(help="Where to write the plot (PNG); default: .visionloop/runs.png.")
    ] = None,
    as_json: Json = False,
) -> None:
    """List the trainings in MLflow, newest first; or compare some: parameters that differ, figures, a plot.

    Examples:

      visionloop runs

      visionloop runs --sort test_accuracy --last 50

      visionloop runs 3f9a champion --out compared.png
    """
    from visionloop.workspace import open_workspace

    workspace = open_workspace()
    marks = read_marks(workspace)
    if marks.problem and not as_json and "champion" not in (run or ()):
        print(f"note: which is the champion cannot be told: {marks.problem}", file=sys.stderr)
    if run:
        compare(workspace, marks, run, out=out, as_json=as_json)
        return
    kinds = {"train", "trial"} if trials else {"train"}
    found: Iterable[Run] = workspace.tracking.iterate_runs(status.upper() if status else None)
    found = mark_stopped(found, find_stopped(workspace))
    show_all(list(itertools.islice((r for r in found if r.kind in kinds), last)), marks, sort=sort, as_json=as_json)


def show_all(found: list[Run], marks: Marks, *, sort: str, as_json: bool) -> None:
    """Print the table, or its JSON."""
    ordered = sort_runs(found, sort)
    if as_json:
        print_json({"runs": [to_json(one, marks) for one in ordered]})
        return
    if not ordered:
        print("no run yet")
        say_next("`visionloop train` (or `dvc repro`) makes the first")
        return
    for line in align(make_table(ordered, marks)):
        print(line)
    ids = " ".join(one.run_id[:ID_CHARS] for one in ordered[:2])
    say_next(f"`visionloop runs {ids}` compares" if len(ordered) > 1 else "`visionloop ui` shows its curves")


def compare(workspace: "Workspace", marks: Marks, asked: list[str], *, out: Path | None, as_json: bool) -> None:
    """Print some runs side by side and draw their curves.

    Raises:
        SettingsError: one of them is not there, or there are too many.
    """
    from visionloop.cli.pictures import require_place, write_picture
    from visionloop.errors import SettingsError
    from visionloop.training.plots import draw_overlay

    require_place(out, "--out")
    if len(asked) > MOST:
        raise SettingsError("visionloop runs", f"{len(asked)} runs", f"at most {MOST} to compare", "Name fewer.")
    known = list(mark_stopped(workspace.tracking.iterate_runs(), find_stopped(workspace)))
    chosen = list({(one := find_run(known, name, marks)).run_id: one for name in asked}.values())
    if as_json:
        print_json({"runs": [to_json(one, marks) for one in chosen]})
        return
    for line in align(compare_runs(chosen, marks)):
        print(line)
    having = [[key for key in keys if any(key in one.metrics for one in chosen)] for keys in PANELS]
    panels = [keys for keys in having if keys]
    if not panels:
        print("no plot: none of them has finished an epoch")
        say_next("`visionloop train`")
        return
    differing = list_differences([one.params for one in chosen])
    names = [key for keys in panels for key in keys]
    curves = {label_run(one, differing): _load_curves(workspace, one, names) for one in chosen}
    path = out or workspace.settings.hidden_dir / "runs.png"
    write_picture(path, draw_overlay(curves, panels))
    say(f"curves: {path}")
    say_next("`visionloop ui` shows all of it in MLflow")


def label_run(one: "Run", differing: Sequence[str] = ()) -> str:
    """Return how a run is called in a legend: its id and the parameters that differ, those of `train` first."""
    keys = sorted(differing, key=lambda key: not key.startswith("train."))
    if not keys:
        return f"{one.run_id[:8]} {one.params.get('train.way', '')} {one.params.get('train.backbone', one.name)}"
    parts = [f"{key.removeprefix('train.')} {fit(one.params.get(key, NONE), VALUE_CHARS)}" for key in keys[:MOST_NAMED]]
    more = f" and {len(keys) - MOST_NAMED} more" if len(keys) > MOST_NAMED else ""
    return f"{one.run_id[:8]} {', '.join(parts)}{more}"


def _load_curves(workspace: "Workspace", one: "Run", names: list[str]) -> "dict[str, list[tuple[int, float]]]":
    curves = workspace.tracking.load_curves(one.run_id, [name for name in names if name in one.metrics])
    # Runs from before 2026-11-29 counted their epochs from 0.
    return {name: [(step + (points[0][0] == 0), value) for step, value in points] for name, points in curves.items()}
