"""What can be checked of a training before torch is loaded (it takes seconds) and before a run is opened."""

import difflib
from dataclasses import dataclass

import numpy as np

from visionloop.data.manifest import check_name, is_experiment, load_version
from visionloop.data.shards import IntArray, Prepared, load_prepared
from visionloop.errors import DatasetError, ParamsError, require_installed, shorten
from visionloop.networks.names import check_network
from visionloop.params import Train
from visionloop.params.train import check_threshold
from visionloop.workspace import Workspace


@dataclass(frozen=True)
class TrainingData:
    """Prepared data that a training can begin with. `validated_on` is the side that epochs are judged on."""

    prepared: Prepared
    validated_on: str


def check_training(workspace: Workspace) -> TrainingData:
    """Open the prepared data of a workspace, and check it and params.yaml; the first step of every training.

    Raises:
        SettingsError: torch is not installed.
        ParamsError: `train.monitor` is no figure of the epoch, or there are fewer images than neighbours.
        TrainingError: there is no such backbone, or no such file of an encoder or of weights.
        DatasetError: there is no prepared data, a class has no training image, or a side is empty.
    """
    section = workspace.params.train
    require_installed("torch")
    check_network(section, workspace.settings.home)
    prepared = load_prepared(workspace.settings.prepared_dir)
    check_name(prepared.pin, workspace.name)
    validated_on = "val"
    if not len(prepared.rows("val")):  # a random split has train and test alone
        version = load_version(workspace.store, prepared.pin.name, prepared.pin.version)
        validated_on = "test" if is_experiment(version) else "val"
    check_monitor(section, prepared.task)
    check_threshold(section, prepared.task)
    check_neighbours(section, len(find_train_rows(section, prepared, validated_on)))
    check_sides(prepared, validated_on)
    return TrainingData(prepared, validated_on)


def find_train_rows(section: Train, prepared: Prepared, validated_on: str) -> IntArray:
    """Return the rows to learn from: the training side, with `train.on: all` the validation side too."""
    sides = ["train", validated_on] if section.on == "all" else ["train"]
    return np.flatnonzero(np.isin(prepared.side_n, sides))


def judges_training(section: Train) -> bool:
    """Say whether training images are judged themselves, not only those of the validation side."""
    return section.on == "all" or section.monitor.startswith("train/")


def check_neighbours(section: Train, num_images: int) -> None:
    """Raise ParamsError if the way `knn` asks for more neighbours than there are training images."""
    # Where a training image is judged itself, it does not vote.
    most = num_images - judges_training(section)
    if section.way == "knn" and section.neighbours.k > most:
        found = f"got {section.neighbours.k} with {num_images} training images"
        todo = "Edit the file, or add images."
        raise ParamsError("params.yaml train.neighbours.k", found, f"at most {most}", todo)


def list_figures(task: str, on: str) -> tuple[str, ...]:
    """Return the figures of an epoch that may be monitored. With `on: all` there is no validation."""
    names = ["train/loss", "train/accuracy"]
    if on != "all":
        names += ["val/loss", "val/accuracy", "val/f1"] + ["val/map"] * (task == "multilabel")
    return tuple(names)


def check_monitor(section: Train, task: str) -> None:
    """Raise ParamsError unless `train.monitor` is a figure of the epoch."""
    names = list_figures(task, section.on)
    if section.monitor not in names:
        near = difflib.get_close_matches(section.monitor, names, n=1)
        hint = f"; near: {near[0]}" if near else ""
        raise ParamsError(
            "params.yaml train.monitor",
            f"got {section.monitor!r}, which no epoch of a {task} training (on: {section.on}) has",
            f"one of {', '.join(names)}{hint}",
            "Edit the file.",
        )


def check_sides(prepared: Prepared, validated_on: str = "val") -> None:
    """Raise DatasetError unless train has every class and validation has an image."""
    train, val = prepared.rows("train"), prepared.rows(validated_on)
    counts = prepared.count_classes(train)
    others = prepared.count_classes(np.flatnonzero(prepared.side_n != "train"))
    where = f"dataset {prepared.pin.name} version {prepared.pin.version}"
    if empty := [k for k, count in enumerate(counts) if not count]:
        held = f", of which the other sides have {int(others[empty].sum()):,}" if others[empty].any() else ""
        raise DatasetError(
            where,
            f"no training image of {shorten([prepared.classes[k] for k in empty])}{held}",
            "one or more on the training side",
            "Add images of it (the first ones go to train), or set ingest.expect.min_per_class, which leaves it out: "
            "then `visionloop ingest`.",
        )
    if len(train) < 2 or not len(val):
        raise DatasetError(
            where,
            f"{len(train)} training and {len(val)} validation images",
            "two or more for training and one or more for validation",
            "Add images, or change ingest.split.fractions under a new `name`.",
        )
