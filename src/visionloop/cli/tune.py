"""The command `tune`: tries other values for keys of `train`, and tells which did best."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from visionloop.cli.app import app
from visionloop.cli.progress import format_seconds
from visionloop.cli.tune_progress import format_value, open_tune_watcher

if TYPE_CHECKING:
    from visionloop.training.study import Tuning
    from visionloop.training.watch import TrialReport

SHOWN = 8
BAR = 24


@app.command()
def tune(
    trials: Annotated[int | None, typer.Option(min=1, help="So many in all; default: tune.trials.")] = None,
    show: Annotated[bool, typer.Option("--show", help="Only show what there is.")] = False,
    save: Annotated[bool, typer.Option("--save", help="Write the best values into params.yaml.")] = False,
) -> None:
    """Search the space `tune.space` of params.yaml for values of `train` (Optuna); each trial is a run in MLflow.

    Stopped or killed, the same command goes on. Nothing but --save changes the workspace.

    Examples:

      visionloop tune --trials 30

      visionloop tune --show --save
    """
    from visionloop.cli.context import open_context

    context = open_context()
    if not show:
        print(f"loading torch to tune {context.params.train.backbone} ...", flush=True)
    from visionloop.training.study import list_reports, open_tuning
    from visionloop.training.tune import run_trials

    with open_tune_watcher(os.environ) as watcher:
        tuning = open_tuning(context.settings, context.params, context.store, context.tracking, watcher=watcher)
        if not show:
            run_trials(tuning, trials or context.params.tune.trials)
    reports = list_reports(tuning)
    if not reports:
        print("no trial of this space and data yet: `visionloop tune` begins")
        return
    for line in [*describe_trials(reports), *describe_importance(tuning)]:
        print(line)
    for path in draw(tuning, reports, logged=not show):
        print(f"  {path}")
    if best := find_best_trial(reports):
        for line in keep(context.settings.params_path, best, save=save):
            print(line)


def find_best_trial(reports: "Sequence[TrialReport]") -> "TrialReport | None":
    """Return the best trial; None if none went to its end."""
    return next((report for report in reversed(reports) if report.is_best), None)


def describe_trials(reports: "Sequence[TrialReport]") -> list[str]:
    """Return the best trials as a table, best first, and how many there are of each kind."""
    from visionloop.cli.tables import align

    counts = {state: sum(report.state == state for report in reports) for state in ("done", "pruned", "failed")}
    took = format_seconds(sum(report.seconds for report in reports))
    said = ", ".join(f"{count} {state}" for state, count in counts.items() if count)
    lines = [f"{len(reports)} trials in {took}: {said}"]
    if failed := [report for report in reports if report.state == "failed"]:
        lines.append(f"  the last that failed, {failed[-1].number}: {failed[-1].reason}")
    done = [report for report in reports if report.state == "done" and report.value is not None]
    if not done:
        return [*lines, "  none went to its end"]
    rising = -1 if not done[0].metric.endswith("loss") else 1
    done.sort(key=lambda report: (rising * (report.value or 0.0), report.number))
    keys = sorted(done[0].values)
    rows = [["trial", done[0].metric, *keys, "epochs", "time"]]
    for report in done[:SHOWN]:
        values = [format_value(report.values[key]) for key in keys]
        rows.append(
            [str(report.number), f"{report.value:.4f}", *values, str(report.epochs), format_seconds(report.seconds)]
        )
    return [*lines, *(f"  {line}" for line in align(rows))]


def describe_importance(tuning: "Tuning") -> list[str]:
    """Return a bar a key: how much of the spread of the results it explains."""
    from visionloop.training.study import compute_importance

    shares = compute_importance(tuning)
    width = max(map(len, shares), default=0)
    bars = [f"  {key:<{width}}  {share:>4.0%}  {'█' * round(BAR * share)}" for key, share in shares.items()]
    return ["what made the difference:", *bars] if bars else []


def draw(tuning: "Tuning", reports: "Sequence[TrialReport]", *, logged: bool) -> list[Path]:
    """Write the pictures of a study beside its database, and into its MLflow run; return where they are."""
    from visionloop.training.tune_plots import draw_history, draw_parallel

    metric, stem = reports[0].metric, tuning.database.with_suffix("")
    pictures = {
        stem.with_name(f"{stem.name}-parallel.png"): draw_parallel(reports, tuning.params.tune.space, metric),
        stem.with_name(f"{stem.name}-history.png"): draw_history(reports, metric),
    }
    run_id, tracking = tuning.study.user_attrs.get("run_id"), tuning.base.tracking
    for path, png in pictures.items():
        path.write_bytes(png)
        if run_id and logged:
            tracking.log_artifact(run_id, path, "figures")
    best = reports[-1].best
    if run_id and logged and best is not None:
        tracking.log_metrics(run_id, {f"best/{metric.replace('/', '_')}": best, "trials": len(reports)})
    return list(pictures)


def keep(params_path: Path, best: "TrialReport", *, save: bool) -> list[str]:
    """Return the lines for params.yaml, or write them there."""
    from visionloop.cli.ingest import write_params
    from visionloop.params.edit import set_keys
    from visionloop.params.space import nest

    head = f"best: trial {best.number}, {best.metric} {best.value:.4f}"
    if save:
        with params_path.open(encoding="utf-8", newline="") as file:
            text = file.read()
        write_params(params_path, set_keys(text, {f"train.{key}": value for key, value in best.values.items()}))
        return [f"{head}; its values are in params.yaml now: `visionloop train` uses them"]
    head = f"{head}; `visionloop tune --show --save` writes its values into params.yaml:"
    return [head, *describe_section({"train": nest(best.values)})]


def describe_section(section: Mapping[str, Any], indent: int = 0) -> list[str]:
    """Return values as lines of YAML."""
    from visionloop.params.edit import make_scalar

    lines = []
    for key, value in sorted(section.items()):
        if isinstance(value, Mapping):
            lines += [f"{' ' * indent}{key}:", *describe_section(value, indent + 2)]
        else:
            lines.append(f"{' ' * indent}{key}: {make_scalar(value)}")
    return lines
