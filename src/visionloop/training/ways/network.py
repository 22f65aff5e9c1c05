"""The ways that train a whole network on images: from random or pretrained weights, or from the champion's."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import islice

import torch
from torch import nn

from visionloop.bundle import Bundle, download_bundle
from visionloop.data.known_store import check_store
from visionloop.errors import BundleError, ParamsError, shorten
from visionloop.networks.backbones import make_backbone
from visionloop.networks.classifier import Classifier, map_head
from visionloop.networks.weights import State, fill_backbone, load_backbone, read_weights
from visionloop.promotion.ledger import iterate_history
from visionloop.training.datamodule import PreparedData
from visionloop.training.job import Job
from visionloop.training.loop import MakeData
from visionloop.training.module import ClassifierModule, make_module

# How many promotions back an interrupted training is looked for.
LOOK_BACK = 20


def choose_start(job: Job, has_work: Callable[[Job], bool] | None = None) -> Job:
    """Return the job with its start; for other ways than `warm`, as it is.

    A training that was cut off goes on with the start it began with, also when another champion was promoted since:
    `has_work` says whether there is work under a job's input key (default: in the work folder).

    Raises:
        PromotionError: the ledger is damaged.
        StoreError: the store cannot be read, or is not the one that the workspace knows.
    """
    if job.params.train.way != "warm":
        return job
    check_store(job)  # in another one there would be no champion to begin with
    has_work = has_work or has_work_here
    newest = islice(iterate_history(job.store, job.params.name), LOOK_BACK)
    digests = list(dict.fromkeys(entry.bundle for entry in newest))
    jobs = [replace(job, start=digest) for digest in (*digests, None)]
    return next((each for each in jobs if has_work(each)), jobs[0])


def has_work_here(job: Job) -> bool:
    """Say whether this machine has an unfinished training of a job."""
    return (job.settings.work_dir("train") / job.key[:16] / "run.json").is_file()


def prepare_network(job: Job, run_id: str) -> tuple[ClassifierModule, MakeData]:
    """Return a network with the weights of `train.weights`, to be trained on images. Raises TrainingError."""
    backbone, num_features = load_backbone(job.params.train, job.prepared.size_hw, job.settings.home)
    classifier = make_classifier(job, backbone, num_features)
    return make_module(job, run_id, classifier), partial(PreparedData, job)


def make_classifier(job: Job, backbone: nn.Module, num_features: int) -> Classifier:
    """Return a backbone with a fresh head for the classes of a job."""
    prepared = job.prepared
    return Classifier(
        backbone, num_features, len(prepared.classes), task=prepared.task, dropout=job.params.train.dropout
    )


def prepare_champion(job: Job, run_id: str) -> tuple[ClassifierModule, MakeData]:
    """Return the champion's network, its head moved to the classes of now; without a champion, as `prepare_network`.

    Raises:
        ParamsError: the champion has another backbone than `train.backbone`.
        BundleError: its weights cannot be had.
        TrainingError: they do not fit the image size.
    """
    if job.start is None:
        _tell(job, f"no champion of {job.params.name} yet: starts from train.weights ({job.params.train.weights})")
        return prepare_network(job, run_id)
    bundle = _fetch_champion(job, job.start)
    section = job.params.train
    torch.manual_seed(section.seed)
    backbone, num_features = make_backbone(section.backbone, job.prepared.size_hw)
    classifier = make_classifier(job, backbone, num_features)
    state = read_weights(bundle.folder / "weights.safetensors")
    fill_backbone(backbone, section.backbone, state, f"champion {bundle.digest[:12]}")
    _tell(job, _map_classes(classifier, state, bundle, job.prepared.classes))
    if job.world.is_first:
        job.tracking.set_tags(run_id, {"visionloop.started_from": bundle.digest})
    classifier.backbone.to(memory_format=torch.channels_last)
    return make_module(job, run_id, classifier), partial(PreparedData, job)


def _tell(job: Job, line: str) -> None:
    if job.world.is_first:
        job.watcher.tell(line)


def _fetch_champion(job: Job, digest: str) -> Bundle:
    where = f"champion {digest[:12]} of {job.params.name}"
    # A folder for each rank: two that put one bundle into one place would be in each other's way.
    name = "bundles" if job.world.is_first else f"bundles-rank{job.world.rank}"
    bundle = download_bundle(job.store, digest, job.settings.hidden_dir / name, with_weights=True)
    if not (bundle.folder / "weights.safetensors").is_file():
        raise BundleError(where, "has no weights.safetensors", "weights to start from", "Set train.way to scratch.")
    theirs, ours = str(bundle.card.network.get("backbone")), job.params.train.backbone
    if theirs != ours:
        raise ParamsError(
            "params.yaml train.backbone",
            f"got {ours!r}, but `way: warm` starts from {where}",
            f"{theirs!r}, as it has",
            "Edit the file, or set train.way to scratch or finetune for a new network.",
        )
    return bundle


def _map_classes(classifier: Classifier, state: State, bundle: Bundle, classes: tuple[str, ...]) -> str:
    """Take over the champion's head where it has a linear one; say in words what was."""
    line = f"starts from champion {bundle.digest[:12]}"
    old = {name: state[f"head.{name}"] for name in ("weight", "bias") if f"head.{name}" in state}
    if len(old) < 2:
        return f"{line}: its backbone; it has neighbours for a head, so the head is new"
    known = map_head(classifier.head, classes, old, bundle.card.classes)
    fresh, gone = sorted(set(classes) - set(known)), sorted(set(bundle.card.classes) - set(known))
    line += f": {len(known)} of its {len(bundle.card.classes)} classes kept"
    line += f", new: {shorten(fresh)}" if fresh else ""
    return line + (f", gone: {shorten(gone)}" if gone else "")
