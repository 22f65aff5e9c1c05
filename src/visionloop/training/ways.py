"""The ways to train, by the word in `train.way`: each takes a job to a classifier that can be exported.

A classifier is a torch module that maps uint8 images (n, h, w, 3) to units (n, u) and embeddings (n, d).
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path

from torch import nn

from visionloop.networks.classifier import Classifier
from visionloop.networks.weights import load_backbone
from visionloop.training.datamodule import PreparedData
from visionloop.training.job import Job
from visionloop.training.loop import make_repeatable, run_loop
from visionloop.training.module import ClassifierModule

Way = Callable[[Path, Job, str], nn.Module]


def learn_network(work: Path, job: Job, run_id: str) -> nn.Module:
    """Train the whole network on images: the ways `scratch` and `finetune`. Raises TrainingError."""
    section, prepared = job.params.train, job.prepared
    make_repeatable(section.seed)
    backbone, num_features = load_backbone(section, prepared.size_hw, job.settings.home)
    classifier = Classifier(backbone, num_features, len(prepared.classes), task=prepared.task, dropout=section.dropout)
    run_loop(work, job, run_id, ClassifierModule(classifier, section), partial(PreparedData, job))
    return classifier


WAYS: dict[str, Way] = {"scratch": learn_network, "finetune": learn_network}
