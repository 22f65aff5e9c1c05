"""The learning-rate finder: a sweep from a tiny rate to a huge one, and what its curve suggests.

Leslie Smith, "Cyclical Learning Rates for Training Neural Networks" (2017), section 3.3: the rate grows at each step;
a good one lies where the loss falls most steeply, well before it explodes. Nothing but the figure and an MLflow run of
its own is left; the weights are thrown away.

The loss is measured on the same images after each step, not on the batch that was learned: batches differ from each
other by more than a step at a small rate changes (on photos of horses and humans by 0.05, where the fall is 0.4), and
the steepest place of such a curve is where two batches happen to differ most.

Dimensions: s steps of the sweep.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from visionloop.errors import TrainingError
from visionloop.evaluation.plots import BLUE, GREEN, MUTED, PALE_BLUE, open_figure
from visionloop.tracking import KIND_TAG
from visionloop.tracking_pages import make_note, make_used_dataset
from visionloop.training.batches import Batch
from visionloop.training.datamodule import PreparedData
from visionloop.training.fit import translated
from visionloop.training.groups import make_optimizer
from visionloop.training.job import Job
from visionloop.training.module import ClassifierModule
from visionloop.training.ranks.world import World
from visionloop.training.run import flatten_params, marking_failure
from visionloop.training.ways import prepare_learning

WIDTH_RATIO = 1 / 20  # of the sweep: how far the smoothing reaches; a fall takes about a quarter of it
RISE_RATIO = 0.1  # of the whole fall: more is not noise
LEAST_FALL = 0.02  # of the loss at the start: less is noise
EXPLODED = 4.0  # times the lowest loss so far: the sweep ends
LAG = 0.9  # of the running mean that this is judged on
LOOK_IMAGES = 64  # on so many, or one batch, the loss is measured
FIGURE = "lr-find.png"


@dataclass(frozen=True)
class Sweep:
    """The loss at each rate, and as a smooth curve. `suggestion` is None where it fell nowhere clearly."""

    rates_s: NDArray[np.float64]
    losses_s: NDArray[np.float64]
    smooth_s: NDArray[np.float64]
    suggestion: float | None


def make_sweep(rates_s: NDArray[np.float64], losses_s: NDArray[np.float64], *, num_steps: int) -> Sweep:
    """Smooth the losses of a sweep that was to have `num_steps`, and suggest a rate."""
    smooth_s = smooth_losses(losses_s, max(1.0, num_steps * WIDTH_RATIO))
    return Sweep(rates_s, losses_s, smooth_s, suggest_rate(rates_s, smooth_s))


def make_rates(low: float, high: float, steps: int) -> NDArray[np.float64]:
    """Return `steps` rates from low to high, each the same multiple of the one before."""
    return np.geomspace(low, high, steps)


def smooth_losses(losses_s: NDArray[np.float64], width: float) -> NDArray[np.float64]:
    """Return the losses under a Gaussian window of `width` steps; the ends are carried on.

    A running mean would do, but lags behind: it would move the steepest place to larger rates.
    """
    reach = max(1, round(3 * width))
    window = np.exp(-0.5 * (np.arange(-reach, reach + 1) / width) ** 2)
    padded = np.pad(losses_s, reach, mode="edge")
    return np.asarray(np.convolve(padded, window / window.sum(), mode="valid"))


def suggest_rate(rates_s: NDArray[np.float64], smooth_s: NDArray[np.float64]) -> float | None:
    """Return the rate at which the loss falls most steeply over log(rate), to two digits; None if it falls nowhere."""
    start, end = find_fall(smooth_s)
    if end - start < 2 or smooth_s[0] - smooth_s[end] < LEAST_FALL * abs(smooth_s[0]):
        return None
    slope_s = np.gradient(smooth_s[start : end + 1], np.log(rates_s[start : end + 1]))
    return float(f"{rates_s[start + int(np.argmin(slope_s))]:.1e}")


def find_fall(smooth_s: NDArray[np.float64]) -> tuple[int, int]:
    """Return the first and the last step of the greatest fall below the loss at the start; the first of equals.

    A rise of a tenth of all there is to fall ends a fall: a network may break at a high rate, and then fall back more
    steeply than it had ever learned.
    """
    below_s = np.minimum(smooth_s, smooth_s[0])
    tolerance = RISE_RATIO * (below_s[0] - below_s.min())
    best, high, low = (0, 0), 0, 0
    for step, loss in enumerate(below_s):
        if loss > below_s[low] + tolerance or loss > below_s[high]:
            high = low = step
        elif loss < below_s[low]:
            low = step
        if below_s[high] - below_s[low] > below_s[best[0]] - below_s[best[1]]:
            best = high, low
    return best


def draw_sweep(sweep: Sweep, current: float) -> bytes:
    """Return the PNG of a sweep: loss against rate, the suggestion and the present rate marked."""
    from matplotlib.ticker import NullFormatter

    with open_figure(7.2, 4.2) as (figure, sink):
        axes = figure.subplots()
        axes.plot(sweep.rates_s, sweep.losses_s, color=PALE_BLUE, linewidth=1, label="each step")
        axes.plot(sweep.rates_s, sweep.smooth_s, color=BLUE, linewidth=2, label="smoothed")
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(lambda rate, _: f"{rate:g}")  # matplotlib's own is a formula
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_ylim(*_choose_range(sweep))
        if sweep.rates_s[0] <= current <= sweep.rates_s[-1]:
            axes.axvline(current, color=MUTED, linewidth=1, linestyle=(0, (3, 3)), label=f"now {current:g}")
        if sweep.suggestion is not None:
            place = int(np.argmin(np.abs(np.log(sweep.rates_s / sweep.suggestion))))
            point = sweep.smooth_s[place]
            axes.plot(
                [sweep.suggestion], [point], "o", color=GREEN, markersize=9, label=f"suggested {sweep.suggestion:g}"
            )
        axes.set_title("Loss at each learning rate")
        axes.set_xlabel("learning rate (of the head)")
        axes.set_ylabel("training loss, of the same images after each step")
        axes.grid(visible=True, which="major")
        axes.legend(frameon=False)
    return sink.getvalue()


def _choose_range(sweep: Sweep) -> tuple[float, float]:
    """Return what of the losses is shown: the huge losses at the end would make the rest a flat line."""
    calm_s = sweep.losses_s[: find_fall(sweep.smooth_s)[1] + 1]
    low, high = float(calm_s.min()), float(calm_s.max())
    margin = 0.1 * max(high - low, 0.01 * abs(high), 1e-6)
    return low - margin, high + 3 * margin


def search_rate(
    job: Job, rates_s: NDArray[np.float64], *, on_step: Callable[[int, int], None] = lambda done, total: None
) -> tuple[Sweep, str]:
    """Sweep over rates, in an MLflow run of its own; return what came of it and the run's id.

    Writes .visionloop/lr-find.png. Raises what `find_rate` raises, and TrackingError.
    """
    pin, path = job.prepared.pin, job.settings.hidden_dir / FIGURE
    tags = {KIND_TAG: "lr-find", "visionloop.dataset_version": str(pin.version)}
    tags |= make_note("A learning rate is looked for: one step at each rate, rising")
    name = f"lr-find-{job.params.train.network_name}"
    if job.params.train.solves_head:
        job.watcher.tell("head: is solved without a learning rate; `train.solver: epochs` uses the one that is found")
    run_id = job.tracking.open_run(name, run_id=None, tags=tags, params=flatten_params(job))
    job.tracking.log_dataset(run_id, make_used_dataset(pin, job.store.url), "training")
    with marking_failure(job, run_id), translated():
        sweep = find_rate(job, run_id, rates_s, on_step=on_step)
        path.write_bytes(draw_sweep(sweep, job.params.train.learning_rate))
        job.tracking.log_artifact(run_id, path, "figures")
        job.tracking.log_images(run_id, [path])
        if sweep.suggestion is not None:
            job.tracking.log_metrics(run_id, {"lr_find/suggestion": sweep.suggestion})
        job.tracking.close_run(run_id)
    return sweep, run_id


def find_rate(
    job: Job,
    run_id: str,
    rates_s: NDArray[np.float64],
    *,
    on_step: Callable[[int, int], None] = lambda done, total: None,
) -> Sweep:
    """Train one step at each rate, rising, and suggest one.

    All layers learn from the first step on, at their shares of the rate (`backbone_rate`), without frozen epochs.

    Raises:
        ParamsError, TrainingError, DatasetError: there is nothing to train.
        TrainingError: the very first loss is not finite.
    """
    section = job.params.train.model_copy(update={"frozen_epochs": 0, "ema": None})
    job = replace(job, params=job.params.model_copy(update={"train": section}), world=World())
    module, make_data = prepare_learning(job, run_id)
    data = make_data(section.batch_size)
    try:
        losses_s = _sweep(job, module, data, rates_s, on_step)
    finally:
        data.teardown("fit")
    if not len(losses_s):
        raise TrainingError(
            "lr-find",
            f"the loss is not finite at the first step, at {rates_s[0]:g}",
            "a number",
            "Look at the images and at train.weights, or set train.precision to fp32.",
        )
    return make_sweep(rates_s[: len(losses_s)], losses_s, num_steps=len(rates_s))


def _sweep(
    job: Job,
    module: ClassifierModule,
    data: PreparedData,
    rates_s: NDArray[np.float64],
    on_step: Callable[[int, int], None],
) -> NDArray[np.float64]:
    """Return the loss of the same images after each step; fewer than there are rates where it explodes."""
    device = torch.device("cuda" if job.hardware.accelerator == "gpu" else "cpu")
    module.to(device).train()
    optimizer = make_optimizer(module.classifier, module.params, module.learns)
    shares = [group["lr"] / module.params.learning_rate for group in optimizer.param_groups]
    batches = _repeat(data, device)
    looked_at = [next(batches)]
    while sum(len(batch.targets) for batch in looked_at) < min(LOOK_IMAGES, len(job.train_rows)):
        looked_at.append(next(batches))
    losses: list[float] = []
    mean = lowest = math.inf
    for step, rate in enumerate(rates_s):
        for group, share in zip(optimizer.param_groups, shares, strict=True):
            group["lr"] = rate * share
        _step(module, optimizer, [next(batches) for _ in range(data.accumulate)], step, job)
        loss = _look(module, looked_at, job)
        if not math.isfinite(loss):
            break
        losses.append(loss)
        mean = loss if step == 0 else LAG * mean + (1 - LAG) * loss
        lowest = min(lowest, mean)
        on_step(step + 1, len(rates_s))
        if mean > max(EXPLODED * lowest, losses[0]):  # where the lowest loss is near 0, four times that is still small
            break
    return np.asarray(losses)


def _step(module: ClassifierModule, optimizer: Any, parts: list[Batch], step: int, job: Job) -> None:
    """Take one step on the parts of a batch."""
    optimizer.zero_grad(set_to_none=True)
    for number, batch in enumerate(parts):
        loss = _compute_loss(module, batch, step * len(parts) + number, job)
        (loss / len(parts)).backward()  # type: ignore[no-untyped-call]
    if module.params.clip_norm:
        torch.nn.utils.clip_grad_norm_(module.parameters(), module.params.clip_norm)
    optimizer.step()


@torch.no_grad()
def _look(module: ClassifierModule, batches: list[Batch], job: Job) -> float:
    """Return the mean loss of some batches as a step would see it, with the same dropout and mixing at each call."""
    num_images = [len(batch.targets) for batch in batches]
    losses = [float(_compute_loss(module, batch, number, job)) for number, batch in enumerate(batches)]
    return float(np.average(losses, weights=num_images))


def _compute_loss(module: ClassifierModule, batch: Batch, number: int, job: Job) -> torch.Tensor:
    with torch.autocast(batch.inputs.device.type, torch.bfloat16, enabled=job.hardware.precision == "bf16"):
        return module.compute_batch(batch, number)[0]


def _repeat(data: PreparedData, device: torch.device) -> Iterator[Batch]:
    """Yield training batches, epoch after epoch."""
    loader = data.train_dataloader()
    epoch = 0
    while True:
        loader.sampler.set_epoch(epoch)
        for batch in loader:
            moved = Batch(*(None if part is None else part.to(device) for part in batch))  # type: ignore[arg-type]
            yield data.on_after_batch_transfer(moved, 0)
        epoch += 1
