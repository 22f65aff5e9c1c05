"""The command `lr-find`: which learning rate a training should have."""

from typing import TYPE_CHECKING, Annotated

import typer

from visionloop.cli.app import app

if TYPE_CHECKING:
    from visionloop.training.rate_sweep import Sweep

ROWS = 13


@app.command("lr-find")
def lr_find(
    *,
    steps: Annotated[int, typer.Option(min=20, max=1000, help="Steps of the sweep, one batch each.")] = 100,
    low: Annotated[float, typer.Option(min=1e-12, help="The rate of the first step.")] = 1e-6,
    high: Annotated[float, typer.Option(max=100.0, help="The rate of the last step.")] = 1.0,
) -> None:
    """Look for a learning rate: train a little, at rates that rise with each step, and see where the loss falls.

    The weights are thrown away: data, models and the work of a training stay as they are. The figure is
    .visionloop/lr-find.png, and in MLflow.

    Examples:

      visionloop lr-find

      visionloop lr-find --steps 300 --low 1e-5
    """
    from visionloop.cli.context import make_progress, open_context
    from visionloop.cli.progress import LineWatcher, print_line
    from visionloop.errors import SettingsError, TrainingError

    if not low < high:
        raise SettingsError("lr-find", f"got --low {low:g} and --high {high:g}", "low < high", "Change one of them.")
    context = open_context()
    section = context.params.train
    print_line(f"loading torch to try {section.backbone} ({section.way}) ...")
    from visionloop.training.fit import make_job
    from visionloop.training.rate_finder import FIGURE, search_rate
    from visionloop.training.rate_sweep import make_rates

    watcher = LineWatcher(print_line)
    job = make_job(context.settings, context.params, context.store, context.tracking, code_digest="", watcher=watcher)
    sweep, run_id = search_rate(job, make_rates(low, high, steps), on_step=make_progress("tried", "rates"))
    for line in describe_sweep(sweep, steps):
        print(line)
    print(f"  figure  {(context.settings.hidden_dir / FIGURE).relative_to(context.settings.home)}, MLflow run {run_id}")
    if sweep.suggestion is None:
        raise TrainingError(
            "lr-find",
            f"the loss falls clearly at no rate from {low:g} to {sweep.rates_s[-1]:g}",
            "a valley",
            "Try more --steps, other --low and --high, or look whether the labels can be learned.",
        )
    print(f"params.yaml  train.learning_rate: {sweep.suggestion:g}   (now {section.learning_rate:g})")


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
