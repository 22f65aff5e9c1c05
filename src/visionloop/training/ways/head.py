"""The way `frozen`: a linear head learns from the embedding table, solved to convergence or by epochs.

Solved, it takes seconds: a run that was stopped begins anew. Whichever way, the bundle's network is the backbone and
one linear layer.

Dimensions: n images, d features, u units (1 for binary, else k classes).
"""

import time
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from visionloop.networks.classifier import Classifier
from visionloop.networks.frozen import load_frozen
from visionloop.params import Train
from visionloop.params.train import STEPS
from visionloop.training.datamodule import PreparedData
from visionloop.training.imbalance import plan_imbalance
from visionloop.training.job import Job
from visionloop.training.loop import MakeData, make_repeatable
from visionloop.training.losses import compute_figures, compute_loss, count_right, make_targets
from visionloop.training.module import ClassifierModule, announce_imbalance, make_module, make_objective
from visionloop.training.watch import StepReport
from visionloop.training.ways.embeddings import FloatArray, load_embeddings, report_figures
from visionloop.training.ways.logistic import MAX_EVALUATIONS, STRENGTHS, Regression, Scaling, Solution, compute_scaling
from visionloop.training.ways.network import make_classifier

# Three strengths are a factor of 30: where the last three gained next to nothing, weaker penalties are not tried.
LEAST_GAIN, GIVE_UP_AFTER = 1e-3, 3


def prepare_head(job: Job, run_id: str) -> tuple[ClassifierModule, MakeData]:
    """Return a fresh head alone, to be trained on embeddings by epochs. Its checkpoints hold no backbone.

    Raises:
        DatasetError: there are no embeddings, or they are of other data or of another network.
    """
    network, embedding_nd = load_embeddings(job)
    classifier = make_classifier(job, nn.Identity(), network.num_features)
    module = make_module(job, run_id, classifier, learns="head")
    return module, partial(PreparedData, job, embedding_nd=embedding_nd)


def attach_backbone(job: Job, classifier: Classifier) -> nn.Module:
    """Put the network that made the embeddings before a head that learned from them."""
    network = load_frozen(job.params.train, job.prepared.size_hw, job.settings.home)
    return network.put_before(classifier.head, len(job.prepared.classes), job.prepared.task)


def solve_head(job: Job, run_id: str) -> nn.Module:
    """Solve a head on the embeddings to convergence, and put it behind the network that made them.

    The penalty is that of `train.C`, or the one that is best on the validation side. With `on: all` it is chosen so
    too, from the training side alone; then the head is solved on all images.

    Raises:
        DatasetError: there are no embeddings, or they are of other data or of another network.
    """
    started = time.perf_counter()
    section = job.params.train
    make_repeatable(section.seed)
    network, embedding_nd = load_embeddings(job)
    announce_imbalance(job, run_id, plan_imbalance(job))
    for line in describe_solver(job):
        job.watcher.tell(line)
    if section.C is not None:
        found = _solve(job, embedding_nd, section.C)
    elif section.on == "all":
        on_train = job.params.model_copy(update={"train": section.model_copy(update={"on": "train"})})
        chosen = _search(replace(job, params=on_train), run_id, embedding_nd)
        found = replace(_solve(job, embedding_nd, chosen.solution.strength), num_tried=chosen.num_tried)
    else:
        found = _search(job, run_id, embedding_nd)
    job.watcher.tell(found.describe(choose_figure(section) if section.C is None else None))
    job.tracking.log_metrics(run_id, {"best/C": found.solution.strength}, step=0)
    report_figures(job, run_id, found.figures, time.perf_counter() - started)
    weight_ud, bias_u = found.scaling.fold(found.solution.weight_ud, found.solution.bias_u)
    head = nn.Linear(network.num_features, len(bias_u))
    with torch.no_grad():
        head.weight.copy_(weight_ud)
        head.bias.copy_(bias_u)
    return network.put_before(head, len(job.prepared.classes), job.prepared.task)


def describe_solver(job: Job) -> list[str]:
    """Say which keys that were written in params.yaml have no effect on a head that is solved."""
    section, compute = job.params.train, job.params.compute
    unused = [f"train.{name}" for name in sorted(section.model_fields_set.intersection(STEPS))]
    unused += [f"compute.{name}" for name in ("confusion_every", "tensorboard") if getattr(compute, name)]
    lines = []
    if unused:
        lines.append(f"head: solved without epochs; not used: {', '.join(unused)} (`train.solver: epochs` uses them)")
    if section.on == "train" and section.monitor.startswith("train/") and section.C is None:
        lines.append(f"head: C is chosen by val/loss, since {section.monitor} is best without any penalty")
    return lines


@dataclass(frozen=True)
class _Found:
    """The best head of `num_tried`, how its inputs are standardised, and the figures of an epoch."""

    solution: Solution
    scaling: Scaling
    figures: dict[str, float]
    num_tried: int = 1

    def describe(self, chosen_by: str | None) -> str:
        """Return it in words. `chosen_by`: the figure that C was chosen by, if it was."""
        solution = self.solution
        how = f"the best of {self.num_tried} by {chosen_by}" if chosen_by else "given"
        ends = "" if solution.converged else f"; it still moved after {MAX_EVALUATIONS} evaluations"
        return f"head: solved with C {solution.strength:g} ({how}){ends}"


class _Sides:
    """The two sides of a job, standardised by the training side, and what judges a head on them."""

    def __init__(self, job: Job, embedding_nd: FloatArray) -> None:
        prepared, plan = job.prepared, plan_imbalance(job)
        self.task, self.objective = prepared.task, make_objective(job.params.train, prepared.task, plan)
        self.device = torch.device("cuda" if job.hardware.accelerator == "gpu" else "cpu")
        truth: Any = prepared.label_n if prepared.targets_nk is None else prepared.targets_nk
        self.targets, self.val_targets = (self._place(truth[rows]) for rows in (job.train_rows, job.val_rows))
        self.weights_n = None if plan.row_weights_n is None else self._place(plan.row_weights_n.astype(np.float32))
        train_nd, self.val_nd = self._place(embedding_nd[job.train_rows]), self._place(embedding_nd[job.val_rows])
        self.scaling = compute_scaling(train_nd)
        self.scaling.apply(self.val_nd)
        self.targets_nu = make_targets(self.targets, self.task, 1 if self.task == "binary" else len(prepared.classes))
        self.regression = Regression(self.scaling.apply(train_nd), self.targets_nu, self.objective, self.weights_n)

    def judge(self, solution: Solution) -> dict[str, float]:
        """Return the figures of an epoch."""
        loss = compute_loss(solution.units_nu, self.targets_nu, self.objective, row_weights_n=self.weights_n)
        right = count_right(solution.units_nu, self.targets, self.task)
        figures = {"train/loss": float(loss), "train/accuracy": float(right) / len(self.targets)}
        if not len(self.val_nd):
            return figures
        units_nu = torch.addmm(solution.bias_u, self.val_nd, solution.weight_ud.T)
        return figures | compute_figures(units_nu, self.val_targets, self.task)

    def _place(self, values: NDArray[Any]) -> Tensor:
        return torch.from_numpy(values).to(self.device)


def choose_figure(section: Train) -> str:
    """Return the figure that C is chosen by; a training figure would always choose the weakest penalty."""
    return section.monitor if section.monitor.startswith("val/") else "val/loss"


def _search(job: Job, run_id: str, embedding_nd: FloatArray) -> _Found:
    """Solve for weaker and weaker penalties until they gain nothing; return the best on the validation side.

    The figures of each are logged: `solver/val_loss` and others, with `solver/C`.
    """
    sides, started = _Sides(job, embedding_nd), time.perf_counter()
    name = choose_figure(job.params.train)
    sign = 1 if name.endswith("loss") else -1
    best: _Found | None = None
    lowest, wait, number = float("inf"), 0, 0
    for number, solution in enumerate(sides.regression.solve_path(STRENGTHS), start=1):
        figures = sides.judge(solution)
        named = {f"solver/{name.replace('/', '_')}": value for name, value in figures.items()}
        job.tracking.log_metrics(run_id, {**named, "solver/C": solution.strength}, step=number)
        images_per_s = number * len(sides.targets) / max(time.perf_counter() - started, 1e-9)
        job.watcher.on_step(StepReport(1, 1, number, len(STRENGTHS), figures["train/loss"], images_per_s, 0.0))
        value = sign * figures[name]
        if best is None or value < sign * best.figures[name]:
            best = _Found(solution, sides.scaling, figures)
        lowest, wait = (value, 0) if value < lowest - LEAST_GAIN else (lowest, wait + 1)
        if wait == GIVE_UP_AFTER:
            break
    assert best is not None
    return replace(best, num_tried=number)


def _solve(job: Job, embedding_nd: FloatArray, strength: float) -> _Found:
    """Solve for one C."""
    sides = _Sides(job, embedding_nd)
    (solution,) = sides.regression.solve_path([strength])
    return _Found(solution, sides.scaling, sides.judge(solution))
