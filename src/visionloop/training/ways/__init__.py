"""The ways to train, by the word in `train.way`: each takes a job to a classifier that can be exported.

A classifier is a torch module that maps uint8 images (n, h, w, 3) to units (n, u) and embeddings (n, d); behind an ONNX
encoder it maps embeddings. `WAYS` has a
function for each way. `LEARNERS` has, for the ways with epochs, what makes the network as it is before the first step.
"""

from collections.abc import Callable
from pathlib import Path

from torch import nn

from visionloop.errors import ParamsError
from visionloop.training.job import Job
from visionloop.training.loop import MakeData, make_repeatable, run_loop
from visionloop.training.module import ClassifierModule
from visionloop.training.ways.embeddings import vote_neighbours
from visionloop.training.ways.head import attach_backbone, prepare_head, solve_head
from visionloop.training.ways.network import prepare_champion, prepare_network

Way = Callable[[Path, Job, str], nn.Module]
Learner = Callable[[Job, str], tuple[ClassifierModule, MakeData]]

LEARNERS: dict[str, Learner] = {
    "scratch": prepare_network,
    "finetune": prepare_network,
    "frozen": prepare_head,
    "warm": prepare_champion,
}


def prepare_learning(job: Job, run_id: str) -> tuple[ClassifierModule, MakeData]:
    """Return the module as it is before the first step, and what makes its batches.

    Raises:
        ParamsError: the way learns nothing.
        TrainingError: the network or its weights cannot be used.
        DatasetError: the embeddings that the way needs are not there.
    """
    way = job.params.train.way
    if way not in LEARNERS:
        raise ParamsError(
            "params.yaml train.way", f"got {way!r}, which has no epochs", ", ".join(sorted(LEARNERS)), "Edit the file."
        )
    make_repeatable(job.params.train.seed)
    return LEARNERS[way](job, run_id)


def learn_network(work: Path, job: Job, run_id: str) -> nn.Module:
    """Train a classifier on batches. Raises TrainingError."""
    module, make_data = prepare_learning(job, run_id)
    run_loop(work, job, run_id, module, make_data)
    return module.classifier


def learn_head(work: Path, job: Job, run_id: str) -> nn.Module:
    """Solve a head on embeddings, or train it by epochs, behind the network that made them.

    Raises:
        TrainingError: what `run_loop` raises.
        DatasetError: the embeddings that it needs are not there.
    """
    section = job.params.train
    if section.solves_head:
        return solve_head(job, run_id)
    if section.solver == "auto":
        keys = ", ".join(f"train.{key}" for key in section.list_epoch_keys())
        job.watcher.tell(f"head: learns by epochs, as {keys} asks for (without it, it would be solved: train.solver)")
    module, make_data = prepare_learning(job, run_id)
    run_loop(work, job, run_id, module, make_data)
    return attach_backbone(job, module.classifier)


WAYS: dict[str, Way] = {
    "scratch": learn_network,
    "finetune": learn_network,
    "frozen": learn_head,
    "knn": vote_neighbours,
    "warm": learn_network,
}
