"""The ways to train, by the word in `train.way`: each takes a job to a classifier that can be exported.

A classifier is a torch module that maps uint8 images (n, h, w, 3) to units (n, u) and embeddings (n, d).
"""

from collections.abc import Callable
from pathlib import Path

from torch import nn

from visionloop.networks.classifier import make_classifier
from visionloop.networks.weights import load_weights
from visionloop.training.datamodule import PreparedData
from visionloop.training.job import Job
from visionloop.training.loop import make_repeatable, run_loop
from visionloop.training.module import ClassifierModule

Way = Callable[[Path, Job, str], nn.Module]


def learn_network(work: Path, job: Job, run_id: str) -> nn.Module:
    """Train the whole network on images: the ways `scratch` and `finetune`. Raises TrainingError."""
    section, prepared = job.params.train, job.prepared
    make_repeatable(section.seed)
    classifier = make_classifier(
        section.backbone, len(prepared.classes), prepared.size_hw, task=prepared.task, dropout=section.dropout
    )
    load_weights(classifier.backbone, section.backbone, section.weights, job.settings.home)
    module = ClassifierModule(classifier, section)
    run_loop(work, job, run_id, module, PreparedData(job, batch_size=section.batch_size))
    return classifier


WAYS: dict[str, Way] = {"scratch": learn_network, "finetune": learn_network}
