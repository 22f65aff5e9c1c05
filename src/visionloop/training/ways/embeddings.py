"""The embedding table that the ways `frozen` and `knn` learn from without a pass over the images; neighbours that vote.

What is served is this network in fp32. Vectors of the table in fp32 equal the served ones, up to the order of sums;
in bf16 each rounding errs by 2^-8 of a number, and so do vectors, by about as much: `embed` takes none below a cosine
of 0.999 by itself. The head computes in fp32 unless `train.precision` is bf16.

Dimensions: n images, d features, k classes, u units.
"""

import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from visionloop.data.shards import IntArray, Prepared
from visionloop.errors import DatasetError
from visionloop.features.view import load_features
from visionloop.networks.classifier import NeighbourHead
from visionloop.networks.frozen import FrozenNetwork, load_frozen
from visionloop.training.checks import check_neighbours, judges_training
from visionloop.training.job import Job
from visionloop.training.loop import make_repeatable
from visionloop.training.losses import compute_figures
from visionloop.training.views.steps import log_best
from visionloop.training.watch import EpochReport

BLOCK_ROWS = 256
FloatArray = NDArray[np.float32]


def load_embeddings(job: Job) -> tuple[FrozenNetwork, FloatArray]:
    """Return the network of the parameters and its embeddings, (n, d) in prepared order.

    Raises:
        DatasetError: they are missing, or those of another network.
    """
    section, prepared = job.params.train, job.prepared
    network = load_frozen(section, prepared.size_hw, job.settings.home)
    embedding_nd, facts = load_features(job.settings.features_dir, prepared)
    where, todo = f"embeddings {job.settings.features_dir}", "Run `visionloop embed`."
    if facts.weights_digest != network.weights_digest or embedding_nd.shape[1] != network.num_features:
        found = f"are of another network ({facts.describe()}, weights {facts.weights_digest[:12]})"
        expected = f"those of {section.network_name}"
        expected += "" if section.is_onnx else f" with train.weights: {section.weights}"
        raise DatasetError(where, found, expected, todo)
    if not np.isfinite(embedding_nd).all():
        raise DatasetError(where, "have values that are not finite", "numbers", "Look at train.weights.")
    return network, embedding_nd


def vote_neighbours(work: Path, job: Job, run_id: str) -> nn.Module:
    """Build a classifier whose head lets the training images' embeddings vote: nothing is learned.

    Raises:
        DatasetError: there are no embeddings, or they are of other data or of another network.
    """
    started = time.perf_counter()
    section, prepared = job.params.train, job.prepared
    make_repeatable(section.seed)
    network, embedding_nd = load_embeddings(job)
    head = _make_neighbours(job, embedding_nd)
    figures = _judge(job, head, embedding_nd)
    report_figures(job, run_id, figures, time.perf_counter() - started)
    return network.put_before(head, len(prepared.classes), prepared.task)


def _make_neighbours(job: Job, embedding_nd: FloatArray) -> NeighbourHead:
    options, rows = job.params.train.neighbours, job.train_rows
    check_neighbours(job.params.train, len(rows))  # `tune` varies it
    return NeighbourHead(
        torch.from_numpy(embedding_nd[rows]),
        torch.from_numpy(make_targets_nk(job.prepared, rows)),
        task=job.prepared.task,
        num_neighbours=options.k,
        metric=options.metric,
        vote=options.vote,
        smoothing=options.smoothing,
    )


def make_targets_nk(prepared: Prepared, rows: IntArray) -> NDArray[np.uint8]:
    """Return which classes some images have, 0 or 1."""
    if prepared.targets_nk is not None:
        return prepared.targets_nk[rows]
    return np.eye(len(prepared.classes), dtype=np.uint8)[prepared.label_n[rows]]


def _judge(job: Job, head: NeighbourHead, embedding_nd: FloatArray) -> dict[str, float]:
    """Return the figures of an epoch: of the validation side; of the training side, each image without its own vote."""
    figures: dict[str, float] = {}
    if len(job.val_rows):
        figures |= _compute(job, head, embedding_nd, job.val_rows, None)
    if judges_training(job.params.train):
        own_n = np.arange(len(job.train_rows))
        found = _compute(job, head, embedding_nd, job.train_rows, own_n)
        figures |= {f"train/{name}": found[f"val/{name}"] for name in ("loss", "accuracy")}
    return figures


def _compute(
    job: Job, head: NeighbourHead, embedding_nd: FloatArray, rows: IntArray, own_n: IntArray | None
) -> dict[str, float]:
    parts: list[Tensor] = []
    with torch.no_grad():
        for start in range(0, len(rows), BLOCK_ROWS):
            block = slice(start, start + BLOCK_ROWS)
            own = None if own_n is None else torch.from_numpy(own_n[block])
            parts.append(head(torch.from_numpy(embedding_nd[rows[block]]), own))
    logits_nk, prepared = torch.cat(parts), job.prepared
    units_nu = logits_nk[:, 1:] - logits_nk[:, :1] if prepared.task == "binary" else logits_nk
    targets: Any = prepared.label_n if prepared.targets_nk is None else prepared.targets_nk
    return compute_figures(units_nu, torch.from_numpy(targets[rows]), prepared.task)


def report_figures(job: Job, run_id: str, figures: dict[str, float], seconds: float) -> None:
    """Log and tell the figures of a way without epochs, as those of one epoch. Raises TrackingError."""
    section, images_per_s = job.params.train, len(job.train_rows) / max(seconds, 1e-9)
    speed = {"train/images_per_s": images_per_s, "train/epoch_s": seconds}
    job.tracking.log_metrics(run_id, {**figures, **speed}, step=0)
    report = EpochReport(
        epoch=1,
        max_epochs=0,
        metrics=figures,
        images_per_s=images_per_s,
        seconds=seconds,
        monitor=section.monitor,
        best=figures[section.monitor],
        wait=0,
        patience=section.patience,
        eta_s=0.0,
    )
    log_best(job.tracking, run_id, [report])
    job.watcher.on_epoch(report)
