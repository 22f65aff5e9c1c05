"""The commands `tune` and `lr-find`: other values for keys of `train`, and a learning rate to begin with."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from visionloop.cli.app import Json, Quiet, app, print_json, say, say_next
from visionloop.cli.progress import format_seconds, format_value, open_watcher

if TYPE_CHECKING:
    from visionloop.training.rate_finder import Sweep
    from visionloop.training.study import Tuning
    from visionloop.training.watch import TrialReport


SHOWN = 8
BAR = 24
ROWS = 13


@app.command()
def tune(
    trials: Annotated[int | None, typer.Option(min=1, help="So many in all; default: tune.trials.")] = None,
    show: Annotated[bool, typer.Option("--show", help="Only show what there is.")] = False,
    save: Annotated[bool, typer.Option("--save", help="Write the best values into params.yaml.")] = False,
    *,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Search the space `tune.space` of params.yaml for values of `train` (Optuna); each trial is a run in MLflow.

    Stopped or killed, the same command goes on. Nothing but --save changes the workspace.

    Examples:

      visionloop tune --trials 30

      visionloop tune --show --save

      visionloop tune --show --json
    """
    from visionloop.workspace import open_workspace

    workspace = open_workspace()
    if not show and not as_json and not quiet:
        print(f"loading torch to tune {workspace.params.train.network_name} ...", flush=True)
    from visionloop.training.study import list_reports, open_tuning
    from visionloop.training.tune import run_trials

    with open_watcher(os.environ, quiet=as_json or quiet, is_study=True) as watcher:
        tuning = open_tuning(workspace, watcher=watcher)
        if not show:
            run_trials(tuning, trials or workspace.params.tune.trials)
    reports = list_reports(tuning)
    if as_json:
        print_json({"trials": [vars(report) for report in reports]})
        return
    if not reports:
        print("no trial of this space and data yet")
        say_next("`visionloop tune --trials 20`", quiet=quiet)
        return
    for line in [*describe_trials(reports), *describe_importance(tuning)]:
        print(line)
    for path in draw(tuning, reports, logged=not show):
        say(f"  {path}")
    todo = "`visionloop tune` goes on, or give `tune.space` other values"
    if best := find_best_trial(reports):
        whole = replace(best, values={**best.values, **tuning.needed})
        for line in keep(workspace.settings.params_path, whole, save=save):
            print(line)
        todo = "`visionloop train` uses them" if save else "`visionloop tune --show --save` writes them there"
    say_next(todo, quiet=quiet)


def find_best_trial(reports: "Sequence[TrialReport]") -> "TrialReport | None":
    """Return the best trial; None if none went to its end."""
    return next((report for report in reversed(reports) if report.is_best), None)


def describe_trials(reports: "Sequence[TrialReport]") -> list[str]:
    """Return the best trials as a table, best first, and how many there are of each kind."""
    from visionloop.words import align

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
    from visionloop.training.study import draw_history, draw_parallel

    metric, stem = reports[0].metric, tuning.database.with_suffix("")
    pictures = {
        stem.with_name(f"{stem.name}-parallel.png"): draw_parallel(tuning),
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
    from visionloop.params.edit import set_keys, write_params
    from visionloop.params.train import nest

    head = f"best: trial {best.number}, {best.metric} {best.value:.4f}"
    if save:
        with params_path.open(encoding="utf-8", newline="") as file:
            text = file.read()
        write_params(params_path, set_keys(text, {f"train.{key}": value for key, value in best.values.items()}))
        return [f"{head}; its values are in params.yaml now"]
    head = f"{head}; in params.yaml that is:"
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


@app.command("lr-find")
def lr_find(
    *,
    steps: Annotated[int, typer.Option(min=20, max=1000, help="Steps of the sweep, one batch each.")] = 100,
    low: Annotated[float, typer.Option(min=1e-12, help="The rate of the first step.")] = 1e-6,
    high: Annotated[float, typer.Option(max=100.0, help="The rate of the last step.")] = 1.0,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Look for a learning rate: train a little, at rates that rise with each step, and see where the loss falls.

    The weights are thrown away: data, models and the work of a training stay as they are. The figure is
    .visionloop/lr-find.png, and in MLflow.

    Examples:

      visionloop lr-find

      visionloop lr-find --steps 300 --low 1e-5
    """
    from visionloop.cli.progress import LineWatcher, print_line
    from visionloop.cli.waiting import make_progress
    from visionloop.errors import SettingsError, TrainingError
    from visionloop.training.checks import check_training
    from visionloop.workspace import open_workspace

    if not low < high:
        raise SettingsError("lr-find", f"got --low {low:g} and --high {high:g}", "low < high", "Change one of them.")
    workspace = open_workspace()
    section = workspace.params.train
    data = check_training(workspace)
    tell = (lambda line: None) if quiet or as_json else print_line
    tell(f"loading torch to try {section.network_name} ({section.way}) ...")
    from visionloop.training.fit import make_job
    from visionloop.training.job import Call
    from visionloop.training.rate_finder import FIGURE, make_rates, search_rate

    job = make_job(workspace, data, Call(watcher=LineWatcher(tell)))
    progress = make_progress("tried", "rates", quiet=quiet or as_json)
    sweep, run_id = search_rate(job, make_rates(low, high, steps), on_step=progress)
    settings = workspace.settings
    figure = (settings.hidden_dir / FIGURE).relative_to(settings.home)
    if as_json:
        curve = {"rates": sweep.rates_s.tolist(), "losses": sweep.losses_s.tolist(), "smooth": sweep.smooth_s.tolist()}
        print_json({"suggestion": sweep.suggestion, **curve, "run_id": run_id, "figure": str(figure)})
    else:
        for line in describe_sweep(sweep, steps):
            print(line)
        print(f"  figure  {figure}, MLflow run {run_id}")
    if sweep.suggestion is None:
        raise TrainingError(
            "lr-find",
            f"the loss falls clearly at no rate from {low:g} to {sweep.rates_s[-1]:g}",
            "a valley",
            "Try more --steps, other --low and --high, or look whether the labels can be learned.",
        )
    if not as_json:
        print(f"params.yaml  train.learning_rate: {sweep.suggestion:g}   (now {section.learning_rate:g})")
    say_next("write it into params.yaml, then `visionloop train`", quiet=quiet or as_json)


def describe_sweep(sweep: "Sweep", steps: int) -> list[str]:
    """Return a small table: some of the rates with the smoothed loss, and the suggested one marked."""
    import numpy as np

    count = len(sweep.rates_s)
    picks = set(np.linspace(0, count - 1, min(ROWS, count)).round().astype(int).tolist())
    chosen = None
    if sweep.suggestion is not None:
        chosen = int(np.argmin(np.abs(np.log(sweep.rates_s / sweep.suggestion))))
        picks = {pick for pick in picks if abs(pick - chosen) > 1} | {chosen}
    lines = [f"{'rate':>10}  {'loss':>8}"]
    for pick in sorted(picks):
        mark = "  <- falls most steeply" if pick == chosen else ""
        lines.append(f"{sweep.rates_s[pick]:>10.2g}  {sweep.smooth_s[pick]:>8.4f}{mark}")
    if count < steps:
        lines.append(f"{'':>10}  ended after {count} of {steps} steps: the loss exploded")
    return lines
