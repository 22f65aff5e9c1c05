"""The learning-rate finder: a sweep from a tiny rate to a huge one, on the network that a training would start from.

Leslie Smith, "Cyclical Learning Rates for Training Neural Networks" (2017), section 3.3: the rate grows at each step;
a good one lies where the loss falls most steeply, well before it explodes. Nothing but the figure and an MLflow run of
its own is left; the weights are thrown away.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from visionloop.errors import TrainingError, VisionLoopError
from visionloop.tracking import KIND_TAG
from visionloop.training.batches import Batch
from visionloop.training.datamodule import PreparedData
from visionloop.training.fit import translate_error
from visionloop.training.groups import make_optimizer
from visionloop.training.job import Job, World
from visionloop.training.module import ClassifierModule
from visionloop.training.rate_sweep import Sweep, draw_sweep, make_sweep
from visionloop.training.run import close_failed, flatten_params
from visionloop.training.ways import prepare_learning

EXPLODED = 4.0  # times the lowest loss so far: the sweep ends
LAG = 0.9  # of the running mean that this is judged on
FIGURE = "lr-find.png"


def search_rate(
    job: Job, rates_s: NDArray[np.float64], *, on_step: Callable[[int, int], None] = lambda done, total: None
) -> tuple[Sweep, str]:
    """Sweep over rates, in an MLflow run of its own; return what came of it and the run's id.

    Writes .visionloop/lr-find.png. Raises what `find_rate` raises, and TrackingError.
    """
    pin, path = job.prepared.pin, job.settings.hidden_dir / FIGURE
    tags = {KIND_TAG: "lr-find", "visionloop.dataset_version": str(pin.version)}
    name = f"lr-find-{job.params.train.backbone}"
    run_id = job.tracking.open_run(name, run_id=None, tags=tags, params=flatten_params(job))
    try:
        sweep = find_rate(job, run_id, rates_s, on_step=on_step)
        path.write_bytes(draw_sweep(sweep, job.params.train.learning_rate))
        job.tracking.log_artifact(run_id, path, "figures")
        if sweep.suggestion is not None:
            job.tracking.log_metrics(run_id, {"lr_find/suggestion": sweep.suggestion})
        job.tracking.close_run(run_id)
    except KeyboardInterrupt:
        close_failed(job, run_id, "KILLED", "stopped")
        raise
    except Exception as exc:
        error = translate_error(exc)
        close_failed(job, run_id, "FAILED", str(error))
        raise error from (None if isinstance(exc, VisionLoopError) else exc)
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
            f"the loss is not finite before the first step, at {rates_s[0]:g}",
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
    """Return the loss before each step; fewer than there are rates where it explodes."""
    device = torch.device("cuda" if job.hardware.accelerator == "gpu" else "cpu")
    module.to(device).train()
    optimizer = make_optimizer(module.classifier, module.params, module.learns)
    shares = [group["lr"] / module.params.learning_rate for group in optimizer.param_groups]
    batches = _repeat(data, device)
    losses: list[float] = []
    mean = lowest = math.inf
    for step, rate in enumerate(rates_s):
        for group, share in zip(optimizer.param_groups, shares, strict=True):
            group["lr"] = rate * share
        loss = _step(module, optimizer, [next(batches) for _ in range(data.accumulate)], step, job)
        if not math.isfinite(loss):
            break
        losses.append(loss)
        mean = loss if step == 0 else LAG * mean + (1 - LAG) * loss
        lowest = min(lowest, mean)
        on_step(step + 1, len(rates_s))
        if mean > max(EXPLODED * lowest, losses[0]):  # of a loss near 0, four times is nothing yet
            break
    return np.asarray(losses)


def _step(module: ClassifierModule, optimizer: Any, parts: list[Batch], step: int, job: Job) -> float:
    """Take one step on the parts of a batch, and return its loss before the step."""
    optimizer.zero_grad(set_to_none=True)
    total = 0.0
    for number, batch in enumerate(parts):
        with torch.autocast(batch.inputs.device.type, torch.bfloat16, enabled=job.hardware.precision == "bf16"):
            loss, _ = module.compute_batch(batch, step * len(parts) + number)
        (loss / len(parts)).backward()  # type: ignore[no-untyped-call]
        total += float(loss.detach()) / len(parts)
    if module.params.clip_norm:
        torch.nn.utils.clip_grad_norm_(module.parameters(), module.params.clip_norm)
    optimizer.step()
    return total


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
